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
        if flat.size != row.size or not _are_flags(flat):
            raise Malformed(f"{KEY} {short(mask)} must be {row.size} numbers 0 or 1")
        row[:] = flat
        self._open_choices(row)

    def write_batch(self, masks: Any, told: np.ndarray | None, rows: np.ndarray) -> None:
        """Write every slot's mask into ``rows`` uint8 [B, sum of sizes]: of several choices, ``masks`` is a tuple.

        Args:
            masks: as ``gymnasium.vector`` has them, [B, ...]; None where no slot told one.
            told: bool [B], the slots whose masks these are; None for all.
            rows: written.

        Raises:
            Malformed: as ``write`` does; it knows the slot where one can be told.
        """
        if masks is None:
            rows[:] = 1
            return
        parts = [np.asarray(part) for part in (masks if isinstance(masks, tuple) else (masks,))]
        if any(part.dtype == object or part.ndim < 2 or len(part) != len(rows) for part in parts):
            self._write_each(masks, told, rows)
            return
        flat = np.concatenate([part.reshape(len(rows), -1) for part in parts], axis=1)
        if told is not None:
            flat[~told] = 1
        if flat.shape != rows.shape or not _are_flags(flat):
            # The same once more, to find the slot.
            self._write_each(masks, told, rows)
            return
        rows[:] = flat
        self._open_choices(rows)

    def _write_each(self, masks: Any, told: np.ndarray | None, rows: np.ndarray) -> None:
        for slot, row in enumerate(rows):
            mine = None
            try:
                if told is None or told[slot]:
                    mine = tuple(part[slot] for part in masks) if isinstance(masks, tuple) else masks[slot]
            except (IndexError, TypeError, KeyError):
                raise Malformed(f"{KEY} {short(masks)} must have a mask for each of {len(rows)} slots") from None
            try:
                self.write(mine, row)
            except Malformed as error:
                raise Malformed(str(error), slot) from None

    def _open_choices(self, rows: np.ndarray) -> None:
        """A choice without a legal action in ``rows`` [..., sum of sizes] becomes one in which everything is legal."""
        first = 0
        for size in self.sizes:
            choice = rows[..., first : first + size]
            choice[~choice.any(-1)] = 1
            first += size


def _are_flags(values: np.ndarray) -> bool:
    return values.dtype.kind in "iufb" and not ((values != 0) & (values != 1)).any()


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
