"""Settings of the environments, checked before any process starts and before any library is imported."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.envs.missions import MISSIONS, check_slots
from shoal.section import Section


class EnvironmentNotFound(ValueError):
    """An environment id names nothing that is installed; the message says what to write or install instead."""


def _not_blank(env_id: str) -> str:
    if not env_id.strip():
        raise ValueError("must name an environment, e.g. 'mettagrid/forage'")
    return env_id


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig(Section):
    """The environment that each actor steps, and the number of its slots."""

    id: Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})] = "mettagrid/forage"
    """``mettagrid/<mission>``, ``recall``, any gymnasium id (``Env-v0`` or ``package.module:Env-v0``), or
    ``pettingzoo:package.module:factory`` for what returns a ``pettingzoo.ParallelEnv``."""
    num_envs: Annotated[int, Field(ge=1)] = 16
    """Slots per actor. One slot is one agent in one environment; where several share one, a multiple of them."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments for the environment itself, e.g. ``{"delay": 12}`` for ``recall``. For gymnasium ids also
    ``vectorization`` (``sync``, ``async``, ``native``), ``wrappers``, ``autoreset_mode`` and, for ``async``,
    ``slot_groups``."""

    def __post_init__(self) -> None:
        mission = MISSIONS.get(self.id)
        if mission is not None:
            try:
                check_slots(mission, self.num_envs)
            except ValueError as error:
                raise PydanticCustomError("cross_field", "{num_envs}", {"num_envs": str(error)}) from error
