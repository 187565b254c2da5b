"""What a run says about its environments, checked before any process starts and before any library is imported."""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.envs.missions import MISSIONS, check_slots


class EnvironmentNotFound(ValueError):
    """An environment id names nothing that is installed; the message says what to write or install instead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig:
    """Which environment each actor steps, and how many slots of it."""

    id: str = "mettagrid/forage"
    """``mettagrid/<mission>``, ``recall``, any gymnasium id (``Env-v0`` or ``package.module:Env-v0``), or
    ``pettingzoo:package.module:factory`` for what returns a ``pettingzoo.ParallelEnv``."""
    num_envs: int = 64
    """Slots per actor. One slot is one agent in one environment; where several share one, a multiple of them."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments for the environment itself, e.g. ``{"delay": 12}`` for ``recall``. For gymnasium ids also
    ``vectorization`` (``sync``, ``async``, ``native``), ``wrappers``, ``autoreset_mode`` and, for ``async``,
    ``slot_groups``."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise ValueError(f"id={self.id!r} must name an environment, e.g. 'mettagrid/forage'")
        if isinstance(self.num_envs, bool) or not isinstance(self.num_envs, int) or self.num_envs < 1:
            raise ValueError(f"num_envs={self.num_envs!r} must be a positive integer")
        if not isinstance(self.kwargs, dict) or not all(isinstance(name, str) for name in self.kwargs):
            raise ValueError(f"kwargs={self.kwargs!r} must map argument names to values")
        mission = MISSIONS.get(self.id)
        if mission is not None:
            check_slots(mission, self.num_envs)
