"""The optimizer: Adam, or a class of the user's choice, named ``package.module:Class`` (``learner.optimizer``)."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from shoal.learner.config import ADAM, LearnerConfig
from torch import Tensor


def make_optimizer(config: LearnerConfig, parameters: Iterable[Tensor], *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of ``parameters``; ``fused`` is for Adam.

    Raises:
        ValueError: there is no such class, it is no optimizer, or it does not take the arguments.
    """
    if config.optimizer == ADAM:
        return torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps, fused=fused)
    cls = _find(config.optimizer)
    try:
        return cls(parameters, lr=config.learning_rate, **config.optimizer_kwargs)
    except Exception as error:
        raise ValueError(f"{config.optimizer}: {type(error).__name__}: {error}") from error


def check_optimizer(config: LearnerConfig) -> str:
    """What is wrong with the optimizer, found by a step of one; "" where nothing is."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = make_optimizer(config, [parameter], fused=False)
        try:
            optimizer.step()
        except Exception as error:
            raise ValueError(f"{config.optimizer}: step() raises {type(error).__name__}: {error}") from error
    except ValueError as error:
        return str(error)
    return ""


def _find(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: there is no such class here ({error}); install the package that has it") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ValueError(f"{name}: expected a subclass of torch.optim.Optimizer, got {found!r}")
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the moments of a checkpoint; settings stay those of ``optimizer``, which follow from the run's own."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
