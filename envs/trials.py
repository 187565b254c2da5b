"""Where the episodes of a slot begin anew: what the environment's ``info`` reports under a key.

Episodes that belong together, as those of one trial of RL^2 (Duan et al. 2016), are told apart from those that begin
from nothing by a flag ``info[key]``, of an episode's last step or of the reset that begins the next; a missing one
is false. Infos of other steps are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from shoal.envs.reports import Remark, Reports
from shoal.envs.writers import check_flag, check_flags

EPISODES_WITHOUT_KEY = 10
"""Episodes of a slot without the key after which that is remarked."""
KEY_MISSING: Remark = "reset_key_missing"
"""Remark: no ``info`` had the key."""


class TrialKey:
    """Reads a key from one slot's infos."""

    def __init__(self, key: str, slot: str, reports: Reports) -> None:
        """``slot`` names it in ``reports``, where it is remarked if the key never comes."""
        self.key, self._slot, self._reports = key, slot, reports
        self.was_told = False
        """The last step of the episode before reported it."""
        self._missing = 0
        """Episodes until now, while no info had the key; -1 afterwards."""

    def end(self, info: Any) -> None:
        """Read the ``info`` of an episode's last step; raises ``Malformed`` if the flag is none."""
        self.was_told = self._read(info)
        if self._missing >= 0:
            self._missing += 1
            if self._missing == EPISODES_WITHOUT_KEY:
                self._reports.remark(KEY_MISSING, 1, missing(self._slot, self.key))

    def begin(self, info: Any) -> bool:
        """Read the ``info`` of a reset; True where its episode begins anew."""
        anew = self._read(info) or self.was_told
        self.was_told = False
        return anew

    def _read(self, info: Any) -> bool:
        if not isinstance(info, Mapping) or info.get(self.key) is None:
            return False
        self._missing = -1
        return check_flag(info[self.key], f"info[{self.key!r}]")


def missing(slot: str, key: str) -> str:
    """The remark on a key that never came."""
    return (
        f"{slot}: info had no {key!r} at the ends and beginnings of {EPISODES_WITHOUT_KEY} episodes, so "
        f"actor.reset_memory=info:{key} has not zeroed the memory: is this how the environment spells it? If it comes "
        "after more episodes than that, all is well"
    )


def flags_told(infos: Mapping[str, Any], key: str, slots: int) -> np.ndarray | None:
    """bool [B]: the flags under ``key`` in the infos of all slots, as gymnasium's vectors write them; None where no
    slot has it. Raises ``Malformed`` if one is neither true nor false."""
    if key not in infos:
        return None
    values = np.asarray(infos[key])
    if values.dtype == object and values.shape == (slots,):
        values = values.astype(np.bool_)  # those of slots that have none are None
    flags = check_flags(values, slots, f"infos[{key!r}]")
    told = infos.get(f"_{key}")
    return flags if told is None else flags & check_flags(told, slots, f"infos['_{key}']")
