"""The optimizer: Adam, or a class of the user's choice, named ``package.module:Class`` (``learner.optimizer``)."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from shoal import given
from shoal.learner.config import ADAM, LearnerConfig
from torch import Tensor


def make_optimizer(config: LearnerConfig, parameters: Iterable[Tensor], *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of ``parameters``; ``fused`` is for Adam.

    Raises:
        ValueError: there is no such class, it is no optimizer, or it does not take the arguments.
    """
    if config.optimizer == ADAM:
        return torch.optim.Adam(parameters, lr=config.learning_rate, eps=config.adam_eps, fused=fused)
    name, kwargs = config.optimizer, config.optimizer_kwargs
    cls = _find(name)
    try:
        inspect.signature(cls).bind(parameters, lr=config.learning_rate, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{name}: {error}. Its __init__ takes (params, lr) and learner.optimizer_kwargs, which are {kwargs}"
        ) from error
    try:
        return cls(parameters, lr=config.learning_rate, **kwargs)
    except (Exception, SystemExit) as error:  # the user's code: it raises anything
        raise ValueError(f"{name}: its __init__ raises {type(error).__name__}: {error}") from error


def check_optimizer(config: LearnerConfig) -> str:
    """What is wrong with the optimizer, found by a step of one and its way through a checkpoint; "" where nothing is.

    Draws from no random stream of the caller.
    """
    try:
        with torch.random.fork_rng(devices=()):
            return _problem(config)
    except ValueError as error:
        return str(error)


def _problem(config: LearnerConfig) -> str:
    name = config.optimizer
    # A policy has matrices and biases; some optimizers are for the former alone.
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(config, parameters, fused=False)
    try:
        optimizer.step()
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's code: it raises anything)
        return f"{name}: step() raises {type(error).__name__}: {error}"
    if not all(parameter.isfinite().all() for parameter in parameters):
        return f"{name}: weights are not finite after a step with finite gradients"
    fresh = make_optimizer(config, parameters, fused=False)
    try:
        state = optimizer.state_dict()
        if found := _no_plain_data(state, "state_dict()"):
            return f"{name}: {found}; checkpoints hold tensors, numbers, texts, and lists, tuples and mappings of these"
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        restore_optimizer(fresh, torch.load(file, weights_only=True))
        fresh.step()
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's code: it raises anything)
        return f"{name} does not go on from a checkpoint: {type(error).__name__}: {error}"
    return ""


def _no_plain_data(value: Any, where: str) -> str:
    """What neither a checkpoint nor a recorded update can hold, and where; "" if there is none."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return ""
    if isinstance(value, Mapping) and all(isinstance(key, int | str) for key in value):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return f"{where} is a {type(value).__name__}"
    return next((found for key, part in parts if (found := _no_plain_data(part, f"{where}[{key!r}]"))), "")


def _find(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        found: Any = given.find(name, given.optimizers, "class")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (Exception, SystemExit) as error:  # the user's module: it raises anything
        raise ValueError(f"{name}: its module cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ValueError(f"{name}: expected a subclass of torch.optim.Optimizer, got {found!r}")
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the moments of a checkpoint; settings stay those of ``optimizer``, which follow from the run's own."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
