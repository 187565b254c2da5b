"""Legal actions: found in observations that are ``Dict(..., action_mask=...)`` or in ``info["action_mask"]``; or what
a method ``action_masks()`` says, as sb3-contrib has it.

A mask has a 1 for each legal action, the choices of several beside each other, in the order of the policy's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from shoal.envs.actions import choices
from shoal.envs.reports import Remark, Reports
from shoal.envs.writers import Malformed, leaves_of, short

KEY = "action_mask"
METHOD = "action_masks"
NOT_USED: Remark = "mask_not_used"
"""Remark: there is a mask, and illegal actions are taken all the same."""


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
        if isinstance(mask, list) and len(mask) == len(self.sizes) and any(np.ndim(part) for part in mask):
            parts = tuple(mask)  # a mask for each choice
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


class MasksOfMethod(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Puts what the method ``action_masks()`` of an environment or of a wrapper says into ``info``."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        return self._told(super().reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        """Step."""
        return self._told(super().step(action))

    def _told(self, answer: Any) -> Any:
        """The answer with a mask; one of another form is returned for the guard to refuse."""
        if not isinstance(answer, tuple) or not answer or not (answer[-1] is None or isinstance(answer[-1], Mapping)):
            return answer
        return *answer[:-1], {KEY: self.env.get_wrapper_attr(METHOD)(), **(answer[-1] or {})}


def with_masks_of_method(env: Any) -> Any:
    """``env``, with masks in ``info`` where it or a wrapper of it says them by a method."""
    layer = env
    while layer is not None:
        if callable(getattr(type(layer), METHOD, None)):
            return MasksOfMethod(env)
        layer = layer.env if isinstance(layer, gymnasium.Wrapper) else None
    return env


def remark_unused(info: Any, has_choices: bool, where: str, reports: Reports) -> bool:
    """Say that ``info`` has a mask that is not used; return whether it has one."""
    if not isinstance(info, Mapping) or KEY not in info:
        return False
    why = (
        "the first reset's info had none: give it in the info of every reset, too"
        if has_choices
        else "only Discrete and MultiDiscrete actions have masks"
    )
    reports.remark(NOT_USED, 1, f"{where}: info has {KEY!r}, which is not used: {why}")
    return True


def find_mask(
    env_id: str, observation: spaces.Space[Any], action: spaces.Space[Any], info: Any
) -> tuple[spaces.Space[Any], MaskSource | None]:
    """(the space of observations without a mask, where the masks are); ``info`` is that of a reset.

    Raises:
        ValueError: observations have a part of that name which is no mask of these actions.
    """
    sizes = choices(action)
    if not sizes:
        return observation, None
    for keys, _ in leaves_of(observation):
        if KEY in keys[1:]:
            path = "".join(f"[{key!r}]" for key in keys)
            raise ValueError(
                f"{env_id}: obs{path} is too deep to be the mask of legal actions: put it beside the observation, as "
                f"Dict(observation=..., {KEY}=...), or give it another name"
            )
    if isinstance(observation, spaces.Dict) and KEY in observation.spaces and len(observation.spaces) > 1:
        found = observation.spaces[KEY]
        if _length(found) != sum(sizes):
            raise ValueError(
                f"{env_id}: obs[{KEY!r}] is {found}, which is no mask of {action}: expected {sum(sizes)} numbers 0 or "
                "1, those of several choices beside each other; if it is none, give it another name"
            )
        rest = {key: space for key, space in observation.spaces.items() if key != KEY}
        if len(rest) > 1:
            return spaces.Dict(rest), MaskSource("obs", sizes)
        ((part, inner),) = rest.items()
        return inner, MaskSource("obs", sizes, part)
    return observation, MaskSource("info", sizes) if isinstance(info, Mapping) and KEY in info else None


def _length(space: spaces.Space[Any]) -> int | None:
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return int(np.prod(space.shape, dtype=int))
    if isinstance(space, spaces.MultiDiscrete) and (space.nvec == 2).all():
        return int(space.nvec.size)
    if isinstance(space, spaces.Tuple):
        lengths = [_length(part) for part in space.spaces]
        return None if None in lengths else sum(length for length in lengths if length is not None)
    return None
