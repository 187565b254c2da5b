"""Legal actions: found in observations that are ``Dict(..., action_mask=...)`` or in ``info["action_mask"]``.

A mask has a 1 for each legal action, the choices of several beside each other, in the order of the policy's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from shoal.envs.writers import Malformed, short

KEY = "action_mask"


@dataclasses.dataclass(frozen=True, slots=True)
class MaskSource:
    """Where an environment's masks are; plain data that crosses to other processes."""

    where: Literal["obs", "info"]
    sizes: tuple[int, ...]
    """Number of actions of each choice."""
    part: str | None = None
    """Key of the only other part of the observations; None where these have several, or no mask."""

    def split(self, obs: Any, info: Any) -> tuple[Any, Any]:
        """(observation without the mask, mask or None), of one slot or of a whole batch.

        Raises:
            Malformed: the observation has no mask though its space has.
        """
        if self.where == "info":
            return obs, info.get(KEY) if isinstance(info, Mapping) else None
        if not isinstance(obs, Mapping) or KEY not in obs or (self.part is not None and self.part not in obs):
            raise Malformed(f"obs {short(obs)} must have the keys {KEY!r} and {self.part or 'those of its space'!r}")
        rest = {key: value for key, value in obs.items() if key != KEY} if self.part is None else obs[self.part]
        return rest, obs[KEY]

    def write(self, mask: Any, row: np.ndarray) -> None:
        """Write one slot's mask into ``row`` uint8 [sum of sizes]; without a mask, every action is legal.

        A choice of which nothing is legal is left open: it is no choice, as that of an agent whose turn it is not.

        Raises:
            Malformed: it is no mask for these actions.
        """
        if mask is None:
            row[:] = 1
            return
        parts = mask if isinstance(mask, tuple) else (mask,)
        flat = np.concatenate([np.asarray(part).reshape(-1) for part in parts])
        if flat.size != row.size or flat.dtype.kind not in "iufb" or ((flat != 0) & (flat != 1)).any():
            raise Malformed(f"{KEY} {short(mask)} must be {row.size} numbers 0 or 1")
        row[:] = flat
        first = 0
        for size in self.sizes:
            choice = row[first : first + size]
            if not choice.any():
                choice[:] = 1
            first += size


def find_mask(
    observation: spaces.Space[Any], action: spaces.Space[Any], info: Any
) -> tuple[spaces.Space[Any], MaskSource | None]:
    """(the space of observations without a mask, where the masks are); ``info`` is that of a reset."""
    sizes = choices(action)
    if not sizes:
        return observation, None
    if isinstance(observation, spaces.Dict) and KEY in observation.spaces and len(observation.spaces) > 1:
        if _length(observation.spaces[KEY]) != sum(sizes):
            return observation, None
        rest = {key: space for key, space in observation.spaces.items() if key != KEY}
        if len(rest) > 1:
            return spaces.Dict(rest), MaskSource("obs", sizes)
        ((part, inner),) = rest.items()
        return inner, MaskSource("obs", sizes, part)
    return observation, MaskSource("info", sizes) if isinstance(info, Mapping) and KEY in info else None


def choices(action: spaces.Space[Any]) -> tuple[int, ...]:
    """Number of actions of each choice; empty for actions that have no masks."""
    if isinstance(action, spaces.Discrete):
        return (int(action.n),)
    if isinstance(action, spaces.MultiDiscrete):
        return tuple(int(count) for count in action.nvec.reshape(-1))
    return ()


def _length(space: spaces.Space[Any]) -> int | None:
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return int(np.prod(space.shape, dtype=int))
    if isinstance(space, spaces.MultiDiscrete) and (space.nvec == 2).all():
        return int(space.nvec.size)
    return None
