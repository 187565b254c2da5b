"""The sections of the configuration that belong to deploy/, and the root.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from shoal.actors.config import ActorConfig
from shoal.envs.config import EnvConfig
from shoal.learner.config import LearnerConfig
from shoal.policy.config import PolicyConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """The Prometheus endpoint."""

    port: int = 9464
    """0 takes a free port and says which; -1 serves no metrics."""
    address: str = "127.0.0.1"
    """Only this machine unless asked otherwise: metrics tell who trains what."""
    tls_certificate: str = ""
    """File of a certificate (chain) in PEM: HTTPS, with tls_key and token_file, all three or none. Read again when it
    changes."""
    tls_key: str = ""
    """File of its key in PEM, without a passphrase."""
    token_file: str = ""
    """File of the token that readers of /metrics send (Authorization: Bearer). Read again when it changes."""
    max_update_age_seconds: float = 300.0
    """/readyz says 503 when the last update is older."""
    file_sd: str = ""
    """File to write the address to while the run goes on, for Prometheus' file_sd_configs; empty writes none."""

    def __post_init__(self) -> None:
        problems = []
        if not -1 <= self.port <= 65535:
            problems.append(f"port={self.port} must lie in 0..65535, or be -1 for no endpoint")
        if not self.max_update_age_seconds > 0:
            problems.append(f"max_update_age_seconds={self.max_update_age_seconds} must be positive")
        names = ("tls_certificate", "tls_key", "token_file")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        if missing := [name for name in names if not getattr(self, name)] if given else []:
            problems.append(
                f"{', '.join(given)}: {' and '.join(missing)} must be set, too, or none of the three: without TLS "
                "everybody on the way reads the token, without a token everybody reads the metrics"
            )
        if problems:
            raise ValueError("\n".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is written down while a run goes on."""

    every_seconds: float = 10.0
    """Between lines of RUN/metrics.jsonl, which has every metric over time."""
    format: Literal["text", "json"] = "text"
    """``json``: progress, warnings, the summary and RUN/run.log are one JSON object a line, for machines."""
    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(default_factory=list)
    """Trackers that get the same numbers; each is an extra: pip install 'shoal[tensorboard]'."""
    project: str = "shoal"
    """What W&B and trackio file the run under."""
    name: str = ""
    """What they call it; empty takes the name of run_dir."""

    def __post_init__(self) -> None:
        if not self.every_seconds > 0:
            raise ValueError(f"every_seconds={self.every_seconds} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved; it is always saved at its end."""

    every_updates: int = 100
    """0 saves only at the end."""
    keep: int = 3
    """Newest checkpoints that are kept, at least 2."""

    def __post_init__(self) -> None:
        if self.every_updates < 0:
            raise ValueError(f"every_updates={self.every_updates} must not be negative")
        if self.keep < 2:
            raise ValueError(f"keep={self.keep} must be at least 2: the newest may turn out to be damaged")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Playing whole episodes with the newest weights during training, apart from it and at a low priority."""

    every_env_steps: int = 0
    """Trained environment steps from one to the next; 0 makes none. There is never more than one at a time: what falls
    due meanwhile is left out."""
    episodes: int = 128
    """At least so many, one per agent; with the same seeds every time."""
    greedy: bool = False
    """Take the most probable action instead of sampling."""
    best: bool = True
    """Keep the weights with the highest mean return in RUN/best."""
    max_seconds: float = 600.0
    """One that takes longer is given up."""
    niceness: int = 15
    """Of the process that plays, 0 to 19: at 15 Linux gives it about 3% of a core where training uses all of them, and
    what is idle."""

    def __post_init__(self) -> None:
        problems = []
        if self.every_env_steps < 0:
            problems.append(f"every_env_steps={self.every_env_steps} must not be negative; 0 makes no evaluations")
        if self.episodes < 1:
            problems.append(f"episodes={self.episodes} must be at least 1")
        if not self.max_seconds > 0:
            problems.append(f"max_seconds={self.max_seconds} must be positive")
        if not 0 <= self.niceness <= 19:
            problems.append(f"niceness={self.niceness} must lie in 0..19")
        if problems:
            raise ValueError("\n".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """With mode=cluster: where the cluster is, and where on it everybody goes. The learner is the process that runs the
    command."""

    address: str = "auto"
    """host:port of the head; ``auto`` takes RAY_ADDRESS, or the cluster that this machine is part of."""
    actor_cpus: float = 1.0
    """CPUs that each rollout actor takes."""
    actor_resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other resources of the cluster that each rollout actor takes, by name."""
    actor_labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes that rollout actors may be on: a value, !value, in(a,b) or !in(a,b)."""
    learner_labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same for learners beside the run's own (learner.num_learners)."""
    autoscaling: bool | Literal["auto"] = "auto"
    """Whether nodes may still come: a run then starts with the actors that have a place. ``auto`` asks the cluster."""
    runtime_env: dict[str, Any] = dataclasses.field(default_factory=dict)
    """A Ray runtime environment for all processes of the run. This code is sent to them in any case."""

    def __post_init__(self) -> None:
        problems = []
        if not self.address:
            problems.append("address must not be empty; auto takes RAY_ADDRESS, or this machine's cluster")
        if not self.actor_cpus >= 0:
            problems.append(f"actor_cpus={self.actor_cpus} must not be negative")
        problems += [
            f"actor_resources.{name}={amount} must be positive"
            for name, amount in self.actor_resources.items()
            if not amount > 0
        ]
        if not self.actor_cpus and not self.actor_resources:
            problems.append("actor_cpus=0 needs actor_resources: nothing else would limit the actors of a node")
        if problems:
            raise ValueError("\n".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    mode: Literal["inline", "local", "cluster"] = "local"
    """``inline``: one process, no Ray, deterministic. ``local``: Ray started and stopped on this machine. ``cluster``:
    a Ray cluster that is running already."""
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    """``colocated``: every learner also acts on slots of its own, one process per core. ``disaggregated``: rollout
    processes feed the learner, or each of learner.num_learners. ``auto``: disaggregated where the learner has an
    accelerator, in a cluster, where actor.num_actors or learner.num_threads is set, where environments run in
    processes of their own, or where minibatches are small; else colocated."""
    seed: int = 0
    """Everything random in the run follows from it."""
    run_dir: str = ""
    """Where the run is written; empty makes a new directory below ``runs/``."""
    total_env_steps: int = 3_000_000
    """Environment steps to train on; one step of one slot counts one."""
    max_seconds: float = 0.0
    """Training also ends after so many seconds; 0 is no limit."""
    resume: str = "auto"
    """``auto`` continues what ``run_dir`` holds, ``never`` refuses a run_dir with checkpoints, a path continues that
    one."""
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    actor: ActorConfig = dataclasses.field(default_factory=ActorConfig)
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.total_env_steps < 1:
            raise ValueError(f"total_env_steps={self.total_env_steps} must be at least 1")
        if self.max_seconds < 0:
            raise ValueError(f"max_seconds={self.max_seconds} must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in 0..2^63-1")
