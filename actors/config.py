"""Settings of the rollouts, checked before any process starts."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.section import Seconds, Section

EPISODE, NEVER, INFO = "episode", "never", "info:"


def reset_key(reset_memory: str) -> str | None:
    """KEY of ``info:KEY``; None of the other values of ``actor.reset_memory``."""
    return reset_memory.removeprefix(INFO) if reset_memory.startswith(INFO) else None


def _not_a_mapping(value: Any) -> Any:
    # What YAML makes of "info:" and of "info: KEY".
    if value == {"info": None}:
        return INFO
    if isinstance(value, dict):
        raise ValueError("write info:KEY without a space, as in info:trial_ended")
    return value


def _check_reset_memory(value: str) -> str:
    if value in (EPISODE, NEVER) or reset_key(value):
        return value
    if value in (INFO, INFO.rstrip(":")):
        raise ValueError("info: needs the key of info that tells where the memory is zeroed, as in info:trial_ended")
    word, colon, key = value.partition(":")
    near = difflib.get_close_matches(word, [INFO.rstrip(":")] if colon else [EPISODE, NEVER], n=1)
    hint = f"; did you mean {near[0]}{colon}{key}?" if near else ""
    raise ValueError(f"must be episode, never or info:KEY{hint}")


ResetMemory = Annotated[
    str,
    BeforeValidator(_not_a_mapping),
    AfterValidator(_check_reset_memory),
    Field(json_schema_extra={"pattern": "^(episode|never|info:.+)$"}),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig(Section):
    """Rollout actors: how many, how long their unrolls are, and what happens when one fails."""

    num_actors: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rollout workers, each with env.num_envs slots; ``auto`` chooses from the cores of the machine. Setting it makes
    them processes of their own that feed one learner, unless placement says otherwise."""
    unroll_length: Annotated[int, Field(ge=1)] = 32
    """T: environment steps per slot in one unroll, and the length of backpropagation through time."""
    burn_in: Annotated[int, Field(ge=0)] = 0
    """Rows before each unroll that travel with it, so that the learner can bring the memory up to its newest weights
    before training starts; none of them is trained twice."""
    reset_memory: ResetMemory = EPISODE
    """Where the memory of a slot is zeroed. ``episode``: at every episode's first row. ``never``: only where the slot
    itself begins anew: at the run's start, after a fault, with a new actor. ``info:KEY``: there, and at the first row
    of an episode where ``info[KEY]`` was true in the last step of the episode before or in the reset; missing is false.
    Values and advantages end with episodes in any case."""
    stagger_episodes: bool = True
    """The first episodes of gymnasium's environments that have a step limit are truncated at lengths evenly spread over
    it, and are not counted. Otherwise slots whose episodes all last to the limit end in the same step for ever, and a
    batch has rows of one phase of an episode alone. Not with ``vectorization=native``, nor where ``reset_memory``
    carries the memory across episodes."""
    max_policy_lag: Annotated[int, Field(ge=0)] = 1
    """Versions that may pass between acting and training. An unroll is started only if, by the durations measured, it
    can be trained within it, and dropped (counted) if it came too late all the same. The log names actors that are too
    slow for that; theirs are trained whatever their lag. 0 is lock step: deterministic, but actors and learner take
    turns."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Torch threads per actor; more than one spins against the other processes of a small machine."""
    unroll_timeout_seconds: Seconds = 300.0
    """An unroll that takes longer counts as hung: its actor is killed and replaced."""
    max_consecutive_failures: Annotated[int, Field(ge=1)] = 5
    """Failures of one actor without a finished unroll in between after which the run ends."""

    def __post_init__(self) -> None:
        if self.burn_in > self.unroll_length:
            raise PydanticCustomError(
                "cross_field",
                "burn_in={burn_in} must lie in 0..unroll_length={unroll_length}",
                {"burn_in": self.burn_in, "unroll_length": self.unroll_length},
            )
