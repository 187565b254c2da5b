"""Policies of the user's own, named by their class: ``package.module:Class``.

A class that no import finds in another process (one of a notebook) is known here by its name, in every process of the
run: ``actors.user_code`` takes it there.
"""

# B rows, T time, A actions, H hidden

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from shoal import given
from shoal.policy.actions import Continuous
from shoal.policy.core import Core
from shoal.policy.cores import find_core
from shoal.policy.graph import LSTM
from shoal.policy.observation import ImageObservation, Observation
from shoal.policy.recurrent_policy import RecurrentPolicy
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest difference of logits that rounding explains; the log-prob parity check of training allows as much."""
_ROWS, _STEPS = 3, 4


def find_policy(kind: str) -> type[RecurrentPolicy]:
    """The class that ``policy.kind`` names.

    Raises:
        ValueError: there is no such module or class, or it is no ``RecurrentPolicy``.
    """
    try:
        found = given.find(kind, given.policies, "class")
    except ValueError as error:
        raise ValueError(f"policy {kind}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, RecurrentPolicy):
        raise ValueError(f"policy {kind}: expected a subclass of shoal.RecurrentPolicy, got {found!r}")
    return found


def make_own(
    kind: str,
    *arguments: Any,
    kwargs: Mapping[str, Any],
    core: str = LSTM,
    core_kwargs: Mapping[str, Any] | None = None,
    normalize_observations: bool = False,
    normalize_values: bool = False,
    **settings: Any,
) -> RecurrentPolicy:
    """Construct the policy of a class that ``find_policy`` finds; ``kwargs`` are arguments of that class alone.

    ``core`` and ``core_kwargs`` go to it only where they are set: a class may have a core of its own.

    Values are normalized where the policy has a linear layer ``value_head``, which moving statistics rescale.

    Raises:
        ValueError: the constructor does not take the arguments, or the policy that it made lacks a part.
    """
    cls = find_policy(kind)
    memory = {"core": core, "core_kwargs": dict(core_kwargs or {})}
    if twice := sorted((settings | memory).keys() & kwargs.keys()):
        raise ValueError(f"policy {kind}: policy.kwargs has {', '.join(twice)}, which every policy is given")
    settings |= kwargs
    try:
        inspect.signature(cls).bind(*arguments, **settings)
    except TypeError as error:
        raise ValueError(
            f"policy {kind}: {error}. Its __init__ takes (observation, actions, embedding_rows, *, action_rows, "
            "trained_observation), which it hands to RecurrentPolicy.__init__, initialization, and policy.kwargs"
        ) from error
    if core == LSTM and not core_kwargs:
        policy = cls(*arguments, **settings)
    else:
        policy = _with_core(kind, cls, arguments, settings | memory)
    if problem := _missing(policy, core):
        raise ValueError(f"policy {kind}: {problem}")
    head = getattr(policy, "value_head", None)
    policy.normalize(observations=normalize_observations, values=normalize_values and isinstance(head, nn.Linear))
    policy.kind, policy.kwargs = kind, dict(kwargs)
    return policy


def _with_core(
    kind: str, cls: type[RecurrentPolicy], arguments: tuple[Any, ...], settings: dict[str, Any]
) -> RecurrentPolicy:
    try:
        return cls(*arguments, **settings)
    except TypeError as error:
        if "unexpected keyword argument 'core" not in str(error):
            raise
        raise ValueError(
            f"policy {kind}: it makes a core of its own, so policy.core={settings['core']} and "
            f"policy.core_kwargs={settings['core_kwargs']} are without effect; its __init__ must take core and "
            "core_kwargs, hand them to RecurrentPolicy.__init__, and make the core with self.make_core(inputs)"
        ) from error


def _missing(policy: RecurrentPolicy, core: str) -> str:
    """The part of the interface that a policy lacks, as a sentence; "" if it has all."""
    try:
        made: object = policy.core
    except AttributeError:
        return "it has no core: its __init__ must make one with self.make_core(inputs)"
    if not isinstance(made, Core):
        return f"expected a shoal.Core as self.core, or a torch.nn.LSTM as self.lstm, got {type(made).__name__}"
    if core != LSTM and not isinstance(made, find_core(core)):
        return f"its core is of {type(made).__name__}, where policy.core={core}; make it with self.make_core(inputs)"
    return ""


@torch.no_grad()
def check_policy(policy: RecurrentPolicy) -> None:
    """Compare ``act``, ``step`` and ``unroll`` on random observations with resets inside.

    Draws from no random stream of the caller; the policy's memory is empty afterwards.

    Raises:
        ValueError: an output has another shape, or two of them differ by more than rounding.
    """
    was_training = policy.training
    policy.eval()
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            _check(policy)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # the user's code: it raises anything
        raise ValueError(
            f"policy {policy.kind} fails on observations {list(policy.observation.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        policy.train(was_training)
        policy.reset_memory()


def _check(policy: RecurrentPolicy) -> None:
    obs = _observations(policy.observation)
    is_first = torch.zeros(_STEPS, _ROWS, dtype=torch.bool)
    is_first[0], is_first[2, 1] = True, True
    acted, stepped, values = [], [], []
    state, ids = None, tuple(range(_ROWS))
    for t in range(_STEPS):
        acted.append(policy.act(obs[t], ids, is_first[t]).logits)
        output, state = policy.step(obs[t], is_first[t], state)
        stepped.append(output.logits)
        values.append(output.value)
    unrolled, _ = policy.unroll(obs, is_first)
    if policy.value_scale is not None:
        core = torch.randn(_ROWS, policy.core.hidden_size)
        policy.value_scale.mean.fill_(3.0)
        moved = float((policy.heads(core).value - 3.0).abs().max())
        policy.value_scale.mean.zero_()
        if moved > TOLERANCE:
            raise ValueError(
                f"policy {policy.kind}: heads returns the output of value_head as it is, not in units of the reward; "
                "return self.in_reward_units(value), or set learner.normalize_values=false"
            )
    actions = policy.actions
    wanted = len(actions.flat_names) * (2 if isinstance(actions, Continuous) else 1)
    what = "means and log standard deviations" if isinstance(actions, Continuous) else "logits"
    for name, tensor, shape in (
        ("logits of act", acted[0], (_ROWS, wanted)),
        ("logits of step", stepped[0], (_ROWS, wanted)),
        ("value of step", values[0], (_ROWS,)),
    ):
        if tuple(tensor.shape) != shape:
            of = f", {wanted} {what}" if len(shape) > 1 else ""
            raise ValueError(
                f"policy {policy.kind}: {name} for {_ROWS} observations has shape {list(tensor.shape)}, must be "
                f"{list(shape)}{of}"
            )
    for name, tensor, expected in (
        ("step gives other logits than act", torch.stack(stepped), torch.stack(acted)),
        ("unroll gives other logits than step", unrolled.logits, torch.stack(stepped)),
        ("unroll gives other values than step", unrolled.value, torch.stack(values)),
    ):
        difference = float((tensor - expected).abs().max())
        if not difference <= TOLERANCE * (1 + float(expected.abs().max())):
            raise ValueError(
                f"policy {policy.kind}: {name} for the same observations, by up to {difference:.2g}: the learner "
                "would train another policy than acted. Does a layer draw random numbers, look at other rows, or "
                "keep something between calls?"
            )


def _observations(observation: Observation) -> Tensor:
    """[T, B, *shape], random, in the observation's dtype."""
    shape = (_STEPS, _ROWS, *observation.shape)
    if observation.dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape) * (observation.scale if isinstance(observation, ImageObservation) else 1.0)
