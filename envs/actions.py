"""How the policy's actions become those of an environment's action space.

The policy has one or several discrete choices, or numbers around [-1, 1]. The parts of a Dict or Tuple stand beside
each other, in the order of ``envs.writers.leaves_of``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from shoal.envs.boundary import ContinuousActions, DiscreteActions
from shoal.envs.writers import leaves_of, parts_of

NO_BOUND = 1e9
"""A bound of an action that is as large as this is none: libraries write the largest number of a type for infinity."""
_MOST_ACTIONS = 2**20
"""Each of them has a name, a row of the policy's table and a logit in every step."""

Converter = Callable[[np.ndarray], Any]
"""actions [B, *action_shape] of the policy -> a batch of the action space: an array [B, ...], or a dict or tuple."""


def policy_actions(
    action: spaces.Space[Any], observation: spaces.Space[Any], meanings: Sequence[str], env_id: str
) -> DiscreteActions | ContinuousActions:
    """What the policy chooses in every step.

    Args:
        action: the action space of one agent.
        observation: its observation space.
        meanings: names of the actions of a Discrete; of another number, or with one twice, they are not used.
        env_id: begins messages.

    Raises:
        ValueError: the policy cannot choose such actions, or the spaces are those of several agents.
    """
    if isinstance(action, spaces.Discrete):
        _check_number(int(action.n), env_id)
        names = tuple(meanings)
        if not len(names) == action.n == len(set(names)):
            names = tuple(f"action_{index}" for index in range(action.n))
        return DiscreteActions(names=(names,))
    leaves = [leaf for _, leaf in leaves_of(action)]
    if isinstance(action, spaces.Tuple) and _are_of_several_agents(action, observation):
        raise ValueError(
            f"{env_id}: the action space is a Tuple of {len(action.spaces)} and so is the observation space, whose "
            "parts are all alike, as those of several agents: give the environment as a pettingzoo.ParallelEnv. If "
            "it has one agent, an observation that is a Dict is read as one agent's (env.wrappers)"
        )
    sizes = [_sizes(leaf) for leaf in leaves]
    if leaves and all(sizes):
        counts = [count for several in sizes for count in several]
        _check_number(sum(counts), env_id)
        several = tuple(tuple(f"action_{choice}_{i}" for i in range(count)) for choice, count in enumerate(counts))
        return DiscreteActions(names=several, scalar=False)
    boxes = [leaf for leaf in leaves if isinstance(leaf, spaces.Box) and np.issubdtype(leaf.dtype, np.floating)]
    if boxes and len(boxes) == len(leaves) and sum(box.low.size for box in boxes):
        low, high = (np.concatenate([getattr(box, side).reshape(-1) for box in boxes]) for side in ("low", "high"))
        return ContinuousActions(
            names=tuple(f"action_{index}" for index in range(len(low))),
            low=tuple(map(float, low)),
            high=tuple(map(float, high)),
        )
    mixed = "; one policy does not choose both numbers and among choices" if boxes and any(sizes) else ""
    raise ValueError(
        f"{env_id}: action space {action} is not supported{mixed}; supported: Discrete, MultiDiscrete, MultiBinary, "
        "Box of floats, and a Dict or Tuple of choices or of such Boxes. Wrap the environment in a "
        "gymnasium.ActionWrapper whose action_space is one of these (env.wrappers)"
    )


def _check_number(count: int, env_id: str) -> None:
    if count > _MOST_ACTIONS:
        raise ValueError(
            f"{env_id}: the action space has {count:,} actions, at most {_MOST_ACTIONS:,} are supported; wrap the "
            "environment in a gymnasium.ActionWrapper with several choices (MultiDiscrete) or numbers (Box)"
        )


def _are_of_several_agents(action: spaces.Tuple[Any], observation: spaces.Space[Any]) -> bool:
    """Equally many actions and observations, these all of one shape: as robotic-warehouse and lbforaging have it."""
    return (
        isinstance(observation, spaces.Tuple)
        and len(observation.spaces) == len(action.spaces) > 1
        and len({(type(part), part.shape) for part in observation.spaces}) == 1
    )


def _sizes(leaf: spaces.Space[Any]) -> list[int]:
    """Number of actions of each choice; empty for what is no choice."""
    if isinstance(leaf, spaces.Discrete):
        return [int(leaf.n)]
    if isinstance(leaf, spaces.MultiDiscrete):
        return [int(count) for count in leaf.nvec.reshape(-1)]
    if isinstance(leaf, spaces.MultiBinary):
        return [2] * int(np.prod(leaf.shape))
    return []


def choices(action: spaces.Space[Any]) -> tuple[int, ...]:
    """Number of actions of each choice; empty for actions that have no masks."""
    leaves = [leaf for _, leaf in leaves_of(action)]
    if not all(isinstance(leaf, (spaces.Discrete, spaces.MultiDiscrete)) for leaf in leaves):
        return ()
    return tuple(count for leaf in leaves for count in _sizes(leaf))


class ActionMap(NamedTuple):
    """How the policy's actions become the environment's: reshaped, then clip(action * scale + offset, low, high)."""

    shape: tuple[int, ...]
    scale: np.ndarray
    offset: np.ndarray
    low: np.ndarray | None
    """None: nothing is clipped."""
    high: np.ndarray | None
    dtype: np.dtype[Any]


def action_map(space: spaces.Space[Any]) -> ActionMap:
    """The map of an action space that ``policy_actions`` takes.

    That of a Dict or Tuple has the numbers of all parts beside each other, in one axis.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [action_map(leaf) for _, leaf in leaves_of(space)]
        width = [int(np.prod(part.shape, dtype=int)) for part in parts]

        def beside(values: Sequence[Any]) -> np.ndarray:
            full = (np.broadcast_to(value, part.shape) for value, part in zip(values, parts, strict=True))
            return np.concatenate([value.reshape(-1) for value in full])

        clipped = parts[0].low is not None
        return ActionMap(
            (sum(width),),
            beside([part.scale for part in parts]),
            beside([part.offset for part in parts]),
            beside([part.low for part in parts]) if clipped else None,
            beside([part.high for part in parts]) if clipped else None,
            np.result_type(*(part.dtype for part in parts)),
        )
    shape = space.shape or ()
    if not isinstance(space, spaces.Box):
        start = np.asarray(getattr(space, "start", 0), np.int64)
        return ActionMap(shape, np.asarray(1, np.int64), start, None, None, np.dtype(space.dtype))
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    has_low, has_high = low > -NO_BOUND, high < NO_BOUND
    low, high = np.where(has_low, low, 0.0), np.where(has_high, high, 0.0)
    # [-1, 1] is mapped onto the bounds where an action has both of them, and moved within the only one.
    both = has_low & has_high
    moved = np.where(has_low, np.maximum(low + 1.0, 0.0), np.where(has_high, np.minimum(high - 1.0, 0.0), 0.0))
    scale, offset = np.where(both, high / 2 - low / 2, 1.0), np.where(both, low / 2 + high / 2, moved)
    return ActionMap(shape, scale, offset, space.low, space.high, np.dtype(space.dtype))


def action_converter(space: spaces.Space[Any]) -> Converter:
    """Convert the policy's actions [B, *action_shape] to the batched action space."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return _converter_of_parts(space)
    shape, scale, offset, low, high, dtype = action_map(space)
    if low is None or high is None:
        return lambda action: (action.reshape(-1, *shape) + offset).astype(dtype, copy=False)
    return lambda action: np.clip(action.reshape(-1, *shape) * scale + offset, low, high).astype(dtype)


def _converter_of_parts(space: spaces.Dict | spaces.Tuple[Any]) -> Converter:
    parts, end = [], 0
    for key, inner in parts_of(space):
        begin, end = end, end + sum(int(np.prod(leaf.shape or (), dtype=int)) for _, leaf in leaves_of(inner))
        parts.append((key, slice(begin, end), action_converter(inner)))
    if isinstance(space, spaces.Dict):
        return lambda action: {key: convert(action[:, columns]) for key, columns, convert in parts}
    return lambda action: tuple(convert(action[:, columns]) for _, columns, convert in parts)


def row_of(actions: Any, index: int) -> Any:
    """Row ``index`` of a batch that a ``Converter`` made."""
    if isinstance(actions, dict):
        return {key: row_of(part, index) for key, part in actions.items()}
    if isinstance(actions, tuple):
        return tuple(row_of(part, index) for part in actions)
    return actions[index]


def by_row(actions: Any, count: int) -> Sequence[Any]:
    """The rows of a batch that a ``Converter`` made; an array is its own rows."""
    return [row_of(actions, index) for index in range(count)] if isinstance(actions, dict | tuple) else actions
