"""How rollouts are made; checked before any process starts."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorConfig:
    """Rollout actors: how many, how long their unrolls are, and what happens when one fails."""

    num_actors: int | Literal["auto"] = "auto"
    """Rollout workers, each with env.num_envs slots; ``auto`` chooses from the cores of the machine. Setting it makes
    them processes of their own that feed one learner, unless placement says otherwise."""
    unroll_length: int = 64
    """T: environment steps per slot in one unroll, and the length of backpropagation through time."""
    burn_in: int = 0
    """Rows before each unroll that travel with it, so that the learner can bring the memory up to its newest weights
    before training starts; none of them is trained twice."""
    max_policy_lag: int = 2
    """Versions that may pass between acting and training. An unroll is started only if it can be trained within it,
    and dropped (counted) if it came too late all the same. 0 is lock step: deterministic, but actors and learner take
    turns."""
    num_threads: int = 1
    """Torch threads per actor; more than one spins against the other processes of a small machine."""
    unroll_timeout_seconds: float = 300.0
    """An unroll that takes longer counts as hung: its actor is killed and replaced."""
    max_consecutive_failures: int = 5
    """Failures of one actor without a finished unroll in between after which the run ends."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("unroll_length", "num_threads", "max_consecutive_failures")
            if getattr(self, name) < 1
        ]
        if self.num_actors != "auto" and self.num_actors < 1:
            problems.append(f"num_actors={self.num_actors} must be at least 1, or 'auto'")
        if not 0 <= self.burn_in <= self.unroll_length:
            problems.append(f"burn_in={self.burn_in} must lie in 0..unroll_length={self.unroll_length}")
        if self.max_policy_lag < 0:
            problems.append(f"max_policy_lag={self.max_policy_lag} must not be negative; 0 is lock step")
        if not self.unroll_timeout_seconds > 0:
            problems.append(f"unroll_timeout_seconds={self.unroll_timeout_seconds} must be positive")
        if problems:
            raise ValueError("\n".join(problems))
