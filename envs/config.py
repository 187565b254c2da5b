"""Settings of the environments, checked before any process starts and before any library is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
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


def _one_wrapper(value: Any) -> Any:
    named = value if isinstance(value, str) else next(iter(value), "") if isinstance(value, Mapping) else ""
    if not isinstance(named, str) or not all(named.partition(":")) or (named is not value and len(value) != 1):
        raise ValueError("must be 'module:Class', or {module:Class: {argument: value}}")
    return value


Wrapper = Annotated[str | dict[str, dict[str, Any] | None], BeforeValidator(_one_wrapper)]
"""``module:Class``, or ``{module:Class: {argument: value}}``."""


Layout = Literal["auto", "channels_last", "channels_first", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOptions(Section):
    """How an environment of another library is made, stepped and read: everything that is no argument of its own."""

    vectorization: Literal["sync", "async", "native"] = "sync"
    """Of gymnasium ids. ``sync``: one slot after the other in the actor's process; ``async``: each in a process of its
    own; ``native``: all at once, by the id's own ``vector_entry_point``."""
    slot_groups: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Groups that ``async`` slots are stepped in, so that actors act for one meanwhile; ``auto`` is 2."""
    autoreset_mode: Literal["next_step", "same_step", "disabled"] = "next_step"
    """How gymnasium's vector of ``sync`` or ``async`` slots resets; a native one declares its own."""
    wrappers: list[Wrapper] = dataclasses.field(default_factory=list)
    """Wrappers, innermost first: ``module:Class``, or ``{module:Class: {argument: value}}``. Of every slot's
    environment by itself; with vectorization=native of the whole vector, as those of ``gymnasium.wrappers.vector``."""
    image_layout: Layout | dict[str, Layout] = "auto"
    """How a box of numbers is read as an image. ``auto`` goes by its shape and type and refuses what could be either;
    ``none`` reads every number by itself. Of a Dict or Tuple one for all parts, or by part:
    ``{camera: channels_first, map: none}``, where parts that are not named are ``auto``."""
    reset_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What every episode gets as ``reset(options=...)``, in training and in evaluations; a callback's
    ``run.set_env_options`` takes its place. A native vector takes it by a method ``set_options``."""

    def __post_init__(self) -> None:
        if self.slot_groups not in (1, "auto") and self.vectorization != "async":
            raise PydanticCustomError(
                "cross_field",
                "slot_groups={slot_groups} is for vectorization=async: slots that are stepped in one process have "
                "nothing to overlap with",
                {"slot_groups": self.slot_groups},
            )
        if self.vectorization == "native" and self.autoreset_mode != "next_step":
            raise PydanticCustomError(
                "cross_field",
                "autoreset_mode: a native vector declares its own; leave it out, or set vectorization to sync or async",
                {"autoreset_mode": self.autoreset_mode},
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig(AdapterOptions):
    """The environment that each actor steps, the number of its slots, and how they are stepped."""

    id: Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})] = "mettagrid/forage"
    """``mettagrid/<mission>``, ``recall``, any gymnasium id (``Env-v0`` or ``package.module:Env-v0``), a class, or a
    function annotated as returning one (``package.module:Name``), or ``pettingzoo:package.module:factory`` for what
    returns a ``pettingzoo.ParallelEnv`` or ``AECEnv``, ``mettagrid:package.module:function`` for what returns a
    ``MettaGridConfig``, or ``envpool:TASK``."""
    num_envs: Annotated[int, Field(ge=1)] = 16
    """Slots per actor. One slot is one agent in one environment; where several share one, a multiple of them. With
    self-play those of the trained agents."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The environment's own arguments, e.g. ``{"delay": 12}`` for ``recall``."""

    def __post_init__(self) -> None:
        AdapterOptions.__post_init__(self)
        mission = MISSIONS.get(self.id)
        if mission is not None:
            try:
                check_slots(self.id, mission.num_agents, self.num_envs)
            except ValueError as error:
                raise PydanticCustomError("cross_field", "{num_envs}", {"num_envs": str(error)}) from error

    @property
    def options(self) -> AdapterOptions:
        """The settings that are no arguments of the environment."""
        return AdapterOptions(**{name: getattr(self, name) for name in OPTION_NAMES})


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(AdapterOptions))


def in_one_process(options: AdapterOptions, games: int = 1) -> tuple[AdapterOptions, int]:
    """The options and the number of games at a time, at most ``games``, for one process beside those that train.

    Where slots have processes of their own, one game: copies of some environments cannot share a process, as those
    that read pygame's only display.
    """
    if options.vectorization != "async":
        return options, games
    return dataclasses.replace(options, vectorization="sync", slot_groups="auto"), 1


def split_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], AdapterOptions]:
    """(the environment's own arguments, options) of a checkpoint that has both in one mapping, as once was written."""
    own = {name: value for name, value in kwargs.items() if name not in OPTION_NAMES}
    return own, AdapterOptions(**{name: value for name, value in kwargs.items() if name in OPTION_NAMES})
