"""Schedules of settings of the update, over the environment steps that a run has trained.

A setting's value is a function of that count alone: of no clock, no number of updates, no number of processes. So a
resumed run goes on where it was, and learners that make updates together have equal values.

A schedule of the user's is a function of the progress from 0 to 1, as linear and cosine are, and returns a factor of
the setting. Progress, as in Stable-Baselines3 (where it counts down) and unlike the count that PyTorch's LambdaLR
passes, lets one function serve runs of every length, and come after a warm-up. A factor, as in LambdaLR and unlike
Stable-Baselines3's values, keeps the setting what command lines and sweeps change, and serves every setting.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal import given
from shoal.learner.value_balance import VALUE_COEF
from shoal.section import Named, Section

if TYPE_CHECKING:
    from shoal.learner.config import LearnerConfig

WARMUP_FROM = 0.01
"""Share of its value at which a warm-up begins. From 0 the first update would change nothing, and a
``value_clip_coef`` of 0 would clip nothing."""

Scheduled = Literal["learning_rate", "entropy_coef", "clip_coef", "value_clip_coef"]

CONSTANT, LINEAR, COSINE = "constant", "linear", "cosine"
_TRIED = 21
"""Points of progress at which a function of the user's is tried before a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """The course of one setting: from its own value (``learner.NAME``) to ``end``, after a warm-up if there is one."""

    kind: (
        Annotated[
            str,
            Named(
                CONSTANT,
                LINEAR,
                COSINE,
                yours="a function of progress as package.module:name",
                pattern=r"[^:\s]+:[^:\s]+",
            ),
        ]
        | None
    ) = None
    """``constant`` stays at the setting's value, ``linear`` goes to ``end`` in a straight line, ``cosine`` along half a
    wave: slowly at first and at last (Loshchilov and Hutter 2017, SGDR, eq. 5, without restarts). Or
    ``package.module:name`` of a function of the progress, a float that is 0 at the start, after the warm-up, and 1 at
    the end and from then on: the setting is multiplied by what it returns, a finite number of at least 0, the same
    whenever it is called. Without a kind it is linear where ``end`` or ``over_env_steps`` is given, and else what the
    setting does by itself: a warm-up alone changes nothing of what comes after it."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of that function, as plain data."""
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
        if self.is_own and self.end is not None:
            raise PydanticCustomError(
                "cross_field",
                "end={end} needs kind linear or cosine, which go there; {kind} returns itself what it ends with",
                {"end": self.end, "kind": self.kind},
            )
        if self.kwargs and not self.is_own:
            raise PydanticCustomError(
                "cross_field",
                "kwargs={kwargs} need a kind that is named by its function, e.g. kind=my_package.schedules:mine",
                {"kwargs": self.kwargs},
            )
        if self.kind == CONSTANT and self.end is not None:
            raise PydanticCustomError(
                "cross_field", "end={end} needs kind linear or cosine, which go there", {"end": self.end}
            )
        if self.kind == CONSTANT and self.over_env_steps != "run":
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
    def is_own(self) -> bool:
        """Whether it is a function of the user's."""
        return self.kind not in (None, CONSTANT, LINEAR, COSINE)

    @property
    def moves(self) -> bool:
        """Whether it says that the setting goes to ``end``, or where a function of the user's takes it."""
        if self.kind is None:
            return self.end is not None or self.over_env_steps != "run"
        return self.kind != CONSTANT

    def value(self, setting: float, env_steps: int, total_env_steps: int | None) -> float:
        """The value after ``env_steps`` trained environment steps.

        Args:
            setting: the setting's own value, which the course begins with.
            env_steps: trained in the whole run, before the update.
            total_env_steps: at which the run ends; needed where ``over_env_steps`` says ``run``.

        Raises:
            ValueError: it is needed and missing; or the function of the user's is missing, raises, or returns no
                finite number of at least 0.
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
        if self.is_own:
            return setting * self.factor(done)
        if self.kind == COSINE:
            done = (1 - math.cos(math.pi * done)) / 2
        return (1 - done) * setting + done * (self.end or 0.0)

    def factor(self, progress: float) -> float:
        """What the function of the user's returns at a progress from 0 to 1.

        Raises:
            ValueError: there is no such function, it raises, or it returns no finite number of at least 0.
        """
        name = str(self.kind)
        try:
            found = given.find(name, given.schedules)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except (Exception, SystemExit) as error:  # the user's module: it raises anything
            raise ValueError(f"{name}: its module cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(found) or isinstance(found, type):
            what = (
                f"the class {found.__qualname__}" if isinstance(found, type) else f"an object of {type(found).__name__}"
            )
            raise ValueError(f"{name} is {what}, must be a function of the progress, from 0 to 1")
        try:
            answer = found(progress, **self.kwargs)
        except (Exception, SystemExit) as error:  # the user's code: it raises anything
            called = f"called with the progress {progress:g}" + (f" and kwargs {self.kwargs}" if self.kwargs else "")
            raise ValueError(f"{name}, {called}, raises {type(error).__name__}: {error}") from error
        if isinstance(answer, bool) or not isinstance(answer, numbers.Real):
            raise ValueError(
                f"{name} returned an object of {type(answer).__name__} at progress {progress:g}, must be a number: "
                "float(...) makes one"
            )
        try:
            factor = float(answer)
        except OverflowError:  # Python's integers have no end
            factor = math.inf
        if not 0 <= factor < math.inf:
            raise ValueError(f"{name} returned {factor:g} at progress {progress:g}, must be finite and at least 0")
        return factor


COURSES: Mapping[Scheduled, ScheduleConfig] = {"learning_rate": ScheduleConfig(kind="linear")}
"""Courses of settings of which ``learner.schedules`` says none, in a run whose end is known: what was learned is not
undone by late steps as large as the first. Any other setting stays as it is."""


class ScheduledSettings(NamedTuple):
    """The values of one update."""

    learning_rate: float
    entropy_coef: float
    clip_coef: float
    value_clip_coef: float
    value_coef: float


def scheduled_settings(config: LearnerConfig, env_steps: int, total_env_steps: int | None) -> ScheduledSettings:
    """The values of the update that begins after ``env_steps`` trained environment steps of a run.

    ``total_env_steps`` is None where no end is known, and ``COURSES`` are not followed there.

    Raises:
        ValueError: ``total_env_steps`` is None, and a schedule that the settings name goes over the whole run.
    """
    return ScheduledSettings(
        value_coef=VALUE_COEF if config.value_coef == "auto" else config.value_coef,
        **{
            name: course(config.schedules, name, total_env_steps).value(
                getattr(config, name), env_steps, total_env_steps
            )
            for name in get_args(Scheduled)
        },
    )


def course(
    schedules: Mapping[Scheduled, ScheduleConfig], name: Scheduled, total_env_steps: int | None
) -> ScheduleConfig:
    """The course of the setting ``name`` in a run whose end is known, or is not (None)."""
    given, by_itself = schedules.get(name, ScheduleConfig()), COURSES.get(name)
    if given.kind is not None or given.moves or by_itself is None or total_env_steps is None:
        return given
    return dataclasses.replace(given, kind=by_itself.kind)


def check_schedules(config: LearnerConfig) -> list[str]:
    """What is wrong with the functions of the user's in ``learner.schedules``, found by calling them; empty where
    nothing is."""
    return [
        f"learner.schedules.{name}.kind: {problem}"
        for name, schedule in config.schedules.items()
        if schedule.is_own and (problem := _problem(name, schedule, getattr(config, name)))
    ]


def _problem(name: Scheduled, schedule: ScheduleConfig, setting: float | Literal["auto"]) -> str:
    points = [index / (_TRIED - 1) for index in range(_TRIED)]
    try:
        factors = [schedule.factor(progress) for progress in points]
        # In another order, which what goes by the number of its calls does not follow.
        again = [schedule.factor(progress) for progress in reversed(points)][::-1]
    except ValueError as error:
        return str(error)
    for progress, factor, other in zip(points, factors, again, strict=True):
        if factor != other:
            return (
                f"{schedule.kind} returned {factor:g} and then {other:g} at progress {progress:g}, must be a function "
                "of the progress alone: every learner, and a resumed run, calls it for itself"
            )
        if name == "value_clip_coef" and not factor:
            return (
                f"{schedule.kind} returned 0 at progress {progress:g}, but a value_clip_coef of 0 turns value clipping "
                "off instead of clipping most; must be above 0"
            )
        if setting != "auto" and not math.isfinite(setting * factor):
            return (
                f"{schedule.kind} returned {factor:g} at progress {progress:g}: {name}={setting} times that is infinite"
            )
    return ""
