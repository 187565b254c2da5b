"""Settings of the rollouts, checked before any process starts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.section import Seconds, Section


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
    max_policy_lag: Annotated[int, Field(ge=0)] = 2
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
