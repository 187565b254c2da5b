"""The cores by the names that ``policy.core`` has for them: this package's, and classes of the user's own."""

# T time, B rows, K final rows, I inputs, H hidden

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from shoal import given
from shoal.policy.core import Core
from shoal.policy.graph import LSTM
from shoal.policy.gru import GRUCore
from shoal.policy.linear_recurrence import LinearCore
from shoal.policy.lstm import LSTMCore
from shoal.policy.resets import ResetPlan, State, plan_resets
from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference between ``unroll`` and ``step`` that rounding explains, relative to numbers above 1."""
_OWN: dict[str, type[Core]] = {LSTM: LSTMCore, "gru": GRUCore, "linear": LinearCore}
_TAKEN = ("obs", "is_first")
"""Names in trajectories that a state cannot have."""
_STEPS, _ROWS = 6, 4


def find_core(name: str) -> type[Core]:
    """The class that ``policy.core`` names.

    Raises:
        ValueError: there is no such module or class, or it is no ``Core``.
    """
    try:
        found = given.find(name, {**_OWN, **given.cores}, "class")
    except ValueError as error:
        raise ValueError(f"core {name}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Core):
        raise ValueError(f"core {name}: expected a subclass of shoal.Core, got {found!r}")
    return found


def make_core(name: str, kwargs: Mapping[str, Any], input_size: int, hidden_size: int) -> Core:
    """Construct the core that ``policy.core`` names, with ``policy.core_kwargs``.

    Raises:
        ValueError: the constructor does not take the arguments or raises, or the core's state cannot travel.
    """
    cls = find_core(name)
    try:
        inspect.signature(cls).bind(input_size, hidden_size, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"core {name}: {error}. Its __init__ takes (input_size, hidden_size) and policy.core_kwargs, which are "
            f"{dict(kwargs)}"
        ) from error
    try:
        core = cls(input_size, hidden_size, **kwargs)
    except (Exception, SystemExit) as error:  # the user's code: it raises anything
        raise ValueError(f"core {name}: its __init__ raises {type(error).__name__}: {error}") from error
    if problem := _missing(core, input_size, hidden_size):
        raise ValueError(f"core {name}: {problem}")
    return core


def _missing(core: Core, input_size: int, hidden_size: int) -> str:
    """What is wrong with how a core describes itself, as a sentence; "" if nothing is."""
    if (core.input_size, core.hidden_size) != (input_size, hidden_size):
        return (
            f"it has input_size={core.input_size} and hidden_size={core.hidden_size}, must be {input_size} and "
            f"{hidden_size}: hand both to Core.__init__"
        )
    try:
        shapes = dict(core.state_shapes)
    except NotImplementedError:
        return "it lacks the property state_shapes, which names its state: shape by name"
    if not shapes:
        return "state_shapes is empty: a core without a state is no memory"
    for name, shape in shapes.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _TAKEN:
            return (
                f"its state is named {name!r}; a name is a lower-case letter, then lower-case letters, digits and "
                f"underscores, and none of {', '.join(_TAKEN)}"
            )
        if len(shape) < 2 or min(shape) < 1:
            return (
                f"state {name} has the shape {tuple(shape)}; it must begin with the number of layers and go on with "
                f"that of one layer, e.g. (1, {hidden_size})"
            )
    return ""


@torch.no_grad()
def check_core(core: Core, name: str) -> None:
    """Compare ``step`` and ``unroll`` on random inputs with resets and final rows inside, and every row with itself
    alone.

    Draws from no random stream of the caller.

    Raises:
        ValueError: an output or a state has another shape, survives a reset, depends on another row, or differs by more
            than rounding.
    """
    was_training = core.training
    core.eval()
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            problem = _difference(core)
    except (Exception, SystemExit) as error:  # the user's code: it raises anything
        raise ValueError(f"core {name} fails: {type(error).__name__}: {error}") from error
    finally:
        core.train(was_training)
    if problem:
        raise ValueError(f"core {name}: {problem}")


def _difference(core: Core) -> str:
    x = torch.randn(_STEPS * _ROWS + 1, core.input_size)
    is_first = torch.zeros(_STEPS, _ROWS, dtype=torch.bool)
    is_first[0, 0] = is_first[2, 1] = is_first[3, 2] = is_first[4, 1] = True
    plan = plan_resets(is_first.numpy(), (torch.tensor([1]).numpy(), torch.tensor([1]).numpy()))
    start = tuple(torch.rand_like(part) - 0.5 for part in core.initial_state(_ROWS))
    y, state = core.step(x[:_ROWS], is_first[0], start)
    if tuple(y.shape) != (_ROWS, core.hidden_size):
        return f"step gives outputs {list(y.shape)} for {_ROWS} rows, must be {[_ROWS, core.hidden_size]}"
    got, wanted = ([(list(part.shape), part.dtype) for part in parts] for parts in (state, start))
    if got != wanted:
        return f"step gives the state {got}, must be {wanted}, as state_shapes says"
    everywhere = torch.ones(_ROWS, dtype=torch.bool)
    reset, _ = core.step(x[:_ROWS], everywhere, tuple(torch.full_like(part, float("nan")) for part in start))
    fresh, _ = core.step(x[:_ROWS], everywhere, core.initial_state(_ROWS))
    if not torch.equal(reset, fresh):
        return "step lets the state through where is_first is set; zero it there first, e.g. by shoal.zeroed"
    stepped, after = Core.unroll(core, x, plan, is_first, start)
    unrolled, last = core.unroll(x, plan, is_first, start)
    assert after is not None
    if last is None:
        return "unroll returns no state, though return_state asks for it"
    for what, one, other in (
        ("outputs", unrolled, stepped),
        *((f"state {name}", one, other) for name, one, other in zip(core.state_shapes, last, after, strict=True)),
        ("outputs of a row alone", *_alone(core, x, plan, is_first, start, stepped)),
    ):
        if one.shape != other.shape:
            return f"unroll gives {what} {list(one.shape)}, must be {list(other.shape)}"
        difference = float((one - other).abs().max())
        if not difference <= TOLERANCE * (1 + float(other.abs().max())):
            return (
                f"unroll gives other {what} than step, by up to {difference:.2g}: the learner would train another "
                "memory than acted. Does it reset where is_first is set, look at other rows, draw random numbers, or "
                "keep something between calls?"
            )
    return ""


def _alone(
    core: Core, x: Tensor, plan: ResetPlan, is_first: Tensor, start: State, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Row 0's outputs [T, H] in a batch of its own, and in the whole one."""
    steps = x[: is_first.numel()].view(_STEPS, _ROWS, -1)[:, 0]
    mine = is_first[:, :1]
    found, _ = core.unroll(steps, plan_resets(mine.numpy()), mine, tuple(part[:, :1] for part in start))
    return found, outputs[: is_first.numel()].view(_STEPS, _ROWS, -1)[:, 0]
