"""Schedules of settings of the update, over the environment steps that a run has trained.

A setting's value is a function of that count alone: of no clock, no number of updates, no number of processes. So a
resumed run goes on where it was, and learners that make updates together have equal values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.section import Section

if TYPE_CHECKING:
    from shoal.learner.config import LearnerConfig

WARMUP_FROM = 0.01
"""Share of its value at which a warm-up begins. From 0 the first update would change nothing, and a
``value_clip_coef`` of 0 would clip nothing."""

Scheduled = Literal["learning_rate", "entropy_coef", "clip_coef", "value_clip_coef"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """The course of one setting: from its own value (``learner.NAME``) to ``end``, after a warm-up if there is one."""

    kind: Literal["constant", "linear", "cosine"] | None = None
    """``constant`` stays at the setting's value, ``linear`` goes to ``end`` in a straight line, ``cosine`` along half a
    wave: slowly at first and at last (Loshchilov and Hutter 2017, SGDR, eq. 5, without restarts). Without a kind it is
    linear where ``end`` or ``over_env_steps`` is given, and else what the setting does by itself: a warm-up alone
    changes nothing of what comes after it."""
    end: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Value at the end, in the unit of the setting itself, and from then on; without it ``linear`` and ``cosine`` go
    to 0."""
    warmup_env_steps: Annotated[int, Field(ge=0)] = 0
    """The value first rises in a straight line, from a hundredth of the setting to the setting, for so many trained
    environment steps of the run."""
    over_env_steps: Annotated[int, Field(ge=1)] | Literal["run"] = "run"
    """Trained environment steps of the run at which ``end`` is reached, the warm-up included. ``run``:
    total_env_steps, so a run that is resumed with another total_env_steps changes its course there and then; with a
    number it does not."""

    def __post_init__(self) -> None:
        if self.kind == "constant" and self.end is not None:
            raise PydanticCustomError(
                "cross_field", "end={end} needs kind linear or cosine, which go there", {"end": self.end}
            )
        if self.kind == "constant" and self.over_env_steps != "run":
            raise PydanticCustomError(
                "cross_field",
                "over_env_steps={over_env_steps} needs kind linear or cosine",
                {"over_env_steps": self.over_env_steps},
            )
        if self.over_env_steps != "run" and self.warmup_env_steps >= self.over_env_steps:
            raise PydanticCustomError(
                "cross_field",
                "warmup_env_steps={warmup_env_steps} leaves nothing of over_env_steps={over_env_steps}, which "
                "includes it",
                {"warmup_env_steps": self.warmup_env_steps, "over_env_steps": self.over_env_steps},
            )

    @property
    def moves(self) -> bool:
        """Whether it says that the setting goes to ``end``."""
        if self.kind is None:
            return self.end is not None or self.over_env_steps != "run"
        return self.kind != "constant"

    def value(self, setting: float, env_steps: int, total_env_steps: int | None) -> float:
        """The value after ``env_steps`` trained environment steps.

        Args:
            setting: the setting's own value, which the course begins with.
            env_steps: trained in the whole run, before the update.
            total_env_steps: at which the run ends; needed where ``over_env_steps`` says ``run``.

        Raises:
            ValueError: it is needed and missing.
        """
        if env_steps < self.warmup_env_steps:
            return setting * (WARMUP_FROM + (1 - WARMUP_FROM) * env_steps / self.warmup_env_steps)
        if not self.moves:
            return setting
        over = total_env_steps if self.over_env_steps == "run" else self.over_env_steps
        if over is None:
            raise ValueError("a schedule over the whole run needs the run's total_env_steps, or over_env_steps")
        left = over - self.warmup_env_steps
        done = min((env_steps - self.warmup_env_steps) / left, 1.0) if left > 0 else 1.0
        if self.kind == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return (1 - done) * setting + done * (self.end or 0.0)


COURSES: Mapping[Scheduled, ScheduleConfig] = {"learning_rate": ScheduleConfig(kind="linear")}
"""Courses of settings of which ``learner.schedules`` says none, in a run whose end is known: what was learned is not
undone by late steps as large as the first. Any other setting stays as it is."""


class ScheduledSettings(NamedTuple):
    """The values of one update."""

    learning_rate: float
    entropy_coef: float
    clip_coef: float
    value_clip_coef: float


def scheduled_settings(config: LearnerConfig, env_steps: int, total_env_steps: int | None) -> ScheduledSettings:
    """The values of the update that begins after ``env_steps`` trained environment steps of a run.

    ``total_env_steps`` is None where no end is known, and ``COURSES`` are not followed there.

    Raises:
        ValueError: ``total_env_steps`` is None, and a schedule that the settings name goes over the whole run.
    """
    return ScheduledSettings(
        **{
            name: course(config.schedules, name, total_env_steps).value(
                getattr(config, name), env_steps, total_env_steps
            )
            for name in get_args(Scheduled)
        }
    )


def course(
    schedules: Mapping[Scheduled, ScheduleConfig], name: Scheduled, total_env_steps: int | None
) -> ScheduleConfig:
    """The course of the setting ``name`` in a run whose end is known, or is not (None)."""
    given, by_itself = schedules.get(name, ScheduleConfig()), COURSES.get(name)
    if given.kind is not None or given.moves or by_itself is None or total_env_steps is None:
        return given
    return dataclasses.replace(given, kind=by_itself.kind)
