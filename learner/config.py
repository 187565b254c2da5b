"""How the policy is updated; checked before any process starts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from shoal.policy.config import RegularizationConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """The update and everything around it. Coefficients default to the original trainer's."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto`` takes a CUDA device where there is one, then Apple's MPS, then the CPU."""
    batch_size: int | Literal["auto"] = "auto"
    """Segments (unroll_length steps of one slot) per update; a multiple of env.num_envs. ``auto``: an unroll of every
    slot that acts, at least 64."""
    num_learners: int | Literal["auto"] = "auto"
    """Processes that make every update together, each on its part of the batch, and add up their gradients. With
    placement=colocated each acts, too, and ``auto`` is one per core, as far as the batch can be shared out; with
    placement=disaggregated each is fed by its part of the actors, and ``auto`` is one."""
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimizer steps per pass, each on its share of the segments; every segment is used once per pass."""
    num_threads: int | Literal["auto"] = "auto"
    """Where rollout processes feed one learner on the CPU (placement=disaggregated): gradient threads, each of which
    computes its share of the batch; ``auto`` takes the cores that do not act."""
    learning_rate: float = 0.000457
    adam_eps: float = 1e-12
    gamma: float = 0.977
    """Discount per step."""
    advantage: Literal["vtrace", "gae"] = "vtrace"
    """``gae`` ignores the lag between acting and training; the two are equal at lag 0."""
    advantage_lambda: float = 0.916
    rho_bar: float = 1.0
    """V-trace: bound of the importance weight in the temporal difference."""
    c_bar: float = 1.0
    """V-trace: bound of the importance weight in the trace."""
    clip_coef: float = 0.1
    """PPO: the policy's ratio counts within 1 +- clip_coef."""
    value_clip_coef: float = 0.1
    """With several epochs the value counts within +- this of the value before the update; 0 turns it off."""
    value_coef: float = 0.44
    entropy_coef: float = 0.0021
    normalize_advantage: bool = True
    max_grad_norm: float = 0.5
    max_skipped_updates: int = 3
    """Non-finite losses or gradients in a row after which the run ends; each is refused and its batch saved."""
    refresh_states: bool = False
    """Start segments from states that the learner recomputed after the update before, instead of from the actors'
    stored ones: fresher memory for about a third more work per update. ``actor.burn_in`` is the other way."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the network's large products in an update; weights, gradients, optimizer and losses are float32, and so is
    acting. ``auto`` takes bfloat16 where the hardware multiplies it: NVIDIA GPUs since Ampere, CPUs with AMX."""
    compile: bool = False
    """torch.compile of the encoder and the heads on an accelerator."""
    weight_metrics_every: int = 50
    """Updates between readings of the weight metrics (norms, ranks, dormant units), each of which takes about as long
    as a tenth of a default update on a CPU; 0 never reads them."""
    regularization: RegularizationConfig = dataclasses.field(default_factory=RegularizationConfig)

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("epochs", "minibatches", "max_skipped_updates")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={getattr(self, name)} must be at least 1, or 'auto'"
            for name in ("batch_size", "num_learners", "num_threads")
            if getattr(self, name) != "auto" and getattr(self, name) < 1
        ]
        if self.batch_size != "auto" and self.minibatches >= 1 and self.batch_size % self.minibatches:
            problems.append(f"batch_size={self.batch_size} must be a multiple of minibatches={self.minibatches}")
        problems += [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("learning_rate", "max_grad_norm", "rho_bar", "c_bar", "adam_eps")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"{name}={getattr(self, name)} must lie in 0..1"
            for name in ("gamma", "advantage_lambda")
            if not 0 <= getattr(self, name) <= 1
        ]
        problems += [
            f"{name}={getattr(self, name)} must not be negative"
            for name in ("clip_coef", "value_clip_coef", "value_coef", "entropy_coef", "weight_metrics_every")
            if not getattr(self, name) >= 0
        ]
        if problems:
            raise ValueError("\n".join(problems))
