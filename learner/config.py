"""Settings of the update, checked before any process starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.learner.schedules import ScheduleConfig, Scheduled
from shoal.policy.config import RegularizationConfig
from shoal.section import Named, Section

ADAM = "adam"
PPO, IMPALA = "ppo", "impala"
POLICY_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,31}"
"""Names of policies are those of folders, and values of a label."""
POLICIES = "policies"
"""Folder of a run directory with a folder for each of several policies, which has what is recorded of that policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecorderConfig(Section):
    """The flight recorder: ``shoal replay RUN`` makes recorded updates again."""

    keep_updates: Annotated[int, Field(ge=0)] = 3
    """The last so many updates are kept, each with its batch and all that it began with, and as many skipped ones; 0
    records nothing. They are written when the run ends, whatever ends it but SIGKILL, with a checkpoint at most once a
    minute, and at once where an update is skipped."""
    max_bytes: Annotated[int, Field(ge=1)] = 2**28
    """Bytes that they take in each learner's memory at most, beside the update that is being made; fewer are kept where
    they are larger. On disk skipped ones may take as much again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig(Section):
    """The update and everything around it. ``--config original`` has the coefficients of the original trainer."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto`` takes a CUDA device where there is one, then Apple's MPS, then the CPU."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Segments (unroll_length steps of one slot) per update; a multiple of env.num_envs. ``auto``: an unroll of every
    slot that acts, at least 32; with rollout processes and a max_policy_lag of N, of every N-th actor."""
    num_learners: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that make every update together, each on its part of the batch, and add up their gradients. With
    placement=colocated each acts, too, and ``auto`` is one per core, as far as the batch can be shared out; with
    placement=disaggregated each is fed by its part of the actors, and ``auto`` is one."""
    epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over each batch."""
    target_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """With several epochs an update makes no further pass once the KL divergence from the policy that acted, as the
    last optimizer step of a pass found it (approx_kl), is above this; 0 always makes all passes."""
    minibatches: Annotated[int, Field(ge=1)] = 4
    """Optimizer steps per pass, each on its share of the segments; every segment is used once per pass."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Gradient threads of one learner on the CPU that rollout processes feed (placement=disaggregated); each computes
    its shard of the batch, and ``auto`` takes the cores that do not act."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001
    """The largest; over the run it falls to 0 (schedules), and below that where updates move the policy too far."""
    desired_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """The learning rate falls where an update moves the policy by more than twice this KL divergence, and rises again,
    up to its course, where it moves it by less than half of it; an update that has moved it by ten times as much makes
    no further step. ``auto`` is 0.01 for every number or choice of an action, whose divergences add up; 0 turns it
    off. It sees what the steps before the last one moved,
    and the lag: with one epoch, one minibatch and lag 0 it sees nothing."""
    adam_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    optimizer: Annotated[str, Named(ADAM, yours="a torch.optim.Optimizer as package.module:Class")] = ADAM
    """``adam``, or ``package.module:Class`` of a ``torch.optim.Optimizer``, which gets learning_rate as ``lr``."""
    optimizer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of that class, as plain data."""
    loss: Annotated[
        str, Named(PPO, IMPALA, yours="a loss of yours as package.module:name", pattern=r"[^:\s]+:[^:\s]+")
    ] = PPO
    """``ppo``: the clipped surrogate. ``impala``: the policy gradient with V-trace's truncated importance weights, for
    one pass (learner.epochs=1). Or ``package.module:name`` of a function, or of a class whose objects are called
    (``learner.loss.LossInputs``)."""
    loss_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of that function, or of that class, as plain data."""
    gamma: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.99
    """Discount per step."""
    advantage: Literal["vtrace", "gae"] = "vtrace"
    """``gae`` ignores the lag between acting and training; the two are equal at lag 0."""
    advantage_lambda: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.95
    rho_bar: Annotated[float, Field(gt=0)] = 1.0
    """V-trace: bound of the importance weight in the temporal difference, and of the policy gradient's."""
    c_bar: Annotated[float, Field(gt=0)] = 1.0
    """V-trace: bound of the importance weight in the trace."""
    clip_coef: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """PPO: the policy's ratio to the one before the update counts within 1 +- clip_coef. ``auto`` is 0.2, and 0.1 with
    several epochs and a max_policy_lag above 0, where an update and the one before it move the same actions."""
    value_clip_coef: Annotated[float, Field(ge=0)] = 0.0
    """With several epochs the value counts within +- this of the value before the update, in the unit of values; 0
    turns it off."""
    value_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Weight of the value loss. ``auto`` is 0.5, and less while its gradient is more than twice the policy's in the
    layers that both reach, where it would decide alone what the memory keeps (``shoal_gradient_norm``)."""
    entropy_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = "auto"
    """Weight of the entropy bonus; ``auto`` is 0.01 where actions are discrete and 0 where they are continuous, whose
    entropy has no largest value."""
    schedules: Mapping[Scheduled, ScheduleConfig] = dataclasses.field(default_factory=dict)
    """Courses of ``learning_rate``, ``entropy_coef``, ``clip_coef`` and ``value_clip_coef`` over the trained
    environment steps of the run, by name: ``learner.schedules.clip_coef={kind: linear, end: 0.1}``. Where none is
    given, learning_rate falls in a straight line to 0 at total_env_steps (``{kind: constant}`` keeps it), and any other
    setting stays as it is. ``kind`` may also name a function of yours."""
    normalize_advantage: bool = True
    """Advantages get mean 0 and are divided by their standard deviation over the minibatch."""
    normalize_values: bool = True
    """Values are learned in units of the spread of their targets (PopArt), so that value_coef, value_clip_coef and
    gradients mean the same whatever the scale of the rewards."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.5
    max_skipped_updates: Annotated[int, Field(ge=1)] = 3
    """The run ends after so many skipped updates in a row (non-finite loss or gradient); the recorder keeps each."""
    refresh_states: bool = False
    """Start segments from states that the learner recomputed after the update before, instead of from the actors'
    stored ones: fresher memory for about a sixth more time per update of one epoch, less with several.
    ``actor.burn_in`` is the other way."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the network's large products in an update; weights, gradients, optimizer and losses are float32, and so
    is acting. ``auto`` takes bfloat16 where the hardware multiplies it: NVIDIA GPUs since Ampere, CPUs with AMX or
    AVX512_BF16."""
    compile: bool = False
    """torch.compile of the encoder and the heads on an accelerator."""
    weight_metrics_every: Annotated[int, Field(ge=0)] = 50
    """Updates between readings of the weight metrics (norms, ranks, dormant units, gradients by loss), each of which
    takes about as long as a tenth of a default update on a CPU; 0 never reads them."""
    regularization: RegularizationConfig = dataclasses.field(default_factory=RegularizationConfig)

    def __post_init__(self) -> None:
        if self.optimizer_kwargs and self.optimizer == ADAM:
            raise PydanticCustomError(
                "cross_field",
                "optimizer_kwargs={optimizer_kwargs} need an optimizer that is named by its class, e.g. "
                "optimizer=torch.optim:AdamW; Adam's are learning_rate and adam_eps",
                {"optimizer_kwargs": self.optimizer_kwargs},
            )
        if self.loss_kwargs and self.loss in (PPO, IMPALA):
            raise PydanticCustomError(
                "cross_field",
                "loss_kwargs={loss_kwargs} need a loss that is named by its function, e.g. loss=my_package.losses:mine",
                {"loss_kwargs": self.loss_kwargs},
            )
        if self.loss == IMPALA and self.epochs > 1:
            raise PydanticCustomError(
                "cross_field",
                "loss=impala is for epochs=1, got epochs={epochs}: its importance weights are those of the first pass, "
                "and nothing bounds how far later ones move the policy; set epochs=1, or loss=ppo",
                {"loss": self.loss, "epochs": self.epochs},
            )
        if self.batch_size != "auto" and self.batch_size % self.minibatches:
            raise PydanticCustomError(
                "cross_field",
                "batch_size={batch_size} must be a multiple of minibatches={minibatches}, e.g. {nearest}",
                {
                    "batch_size": self.batch_size,
                    "minibatches": self.minibatches,
                    "nearest": -(-self.batch_size // self.minibatches) * self.minibatches,
                },
            )
        course = self.schedules.get("value_clip_coef")
        if course and (not self.value_clip_coef or (course.moves and not course.is_own and not course.end)):
            raise PydanticCustomError(
                "cross_field",
                "schedules.value_clip_coef goes from value_clip_coef={value_clip_coef} to {end}, but 0 turns value "
                "clipping off instead of clipping most; both must be above 0",
                {"schedules": self.schedules, "value_clip_coef": self.value_clip_coef, "end": course.end or 0},
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfPlayConfig(Section):
    """Games in which one agent is trained and frozen versions of the policy play the others. With one learner, in
    mode=inline and mode=local."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the games of every actor that are played so, as near as env.num_envs, which counts the trained agents,
    can be divided; 0 plays none. In the other games all agents are trained."""
    every_updates: Annotated[int, Field(ge=1)] = 50
    """Updates from one version that joins the pool to the next; the first are the weights that the run begins with."""
    pool_size: Annotated[int, Field(ge=1, le=64)] = 16
    """Versions in the pool, of which the oldest makes room. Every checkpoint has their weights."""
    draw: Literal["uniform", "results"] = "uniform"
    """``uniform``: every version equally often. ``results``: in proportion to (1 - w)^2, w the share of the last games
    against it that were won (prioritized fictitious self-play, Vinyals et al. 2019), so that those that win come
    most often."""
    versions_at_once: Annotated[int, Field(ge=2, le=16)] = 2
    """Versions that an actor plays at a time, each in one call of the network for all its agents. Each begins its part
    of the games and then makes room for another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeamConfig(Section):
    """One of several policies that are trained in the same games."""

    agents: Annotated[list[str], Field(min_length=1)]
    """Patterns of the names of the agents that it plays, such as adversary_* (*, ? and [..] as in file names)."""
