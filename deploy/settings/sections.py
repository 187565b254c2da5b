"""The sections of the configuration that belong to deploy/, and the root.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.actors.config import ActorConfig
from shoal.envs.config import EnvConfig
from shoal.learner.config import POLICY_NAME, LearnerConfig, RecorderConfig, SelfPlayConfig, TeamConfig
from shoal.policy.config import PolicyConfig
from shoal.section import LONGEST_SECONDS, Named, Seconds, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig(Section):
    """The Prometheus endpoint."""

    port: Annotated[int, Field(ge=-1, le=65535)] = 9464
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
    max_update_age_seconds: Seconds = 300.0
    """/readyz says 503 when the last update is older."""
    last_scrape_seconds: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 60.0
    """A run that has ended and is scraped in regular intervals waits so long at most until it is scraped once more, so
    that Prometheus knows it is done (shoal_run_finished). 0 waits for nothing."""
    file_sd: str = ""
    """File to write the address to while the run goes on, for Prometheus' file_sd_configs; empty writes none."""

    def __post_init__(self) -> None:
        names = ("tls_certificate", "tls_key", "token_file")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        if given and (missing := [name for name in names if name not in given]):
            raise PydanticCustomError(
                "cross_field",
                ", ".join(f"{name}={{{name}}}" for name in given)
                + f": {' and '.join(missing)} must be set, too, or none of the three: without TLS everybody on the way "
                "reads the token, without a token everybody reads the metrics",
                given,
            )


def _named(section: type[Section], name: Any) -> BeforeValidator:
    """Lets a name stand for a section of ``name`` and ``kwargs``, also in the JSON schema."""

    def read(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    return BeforeValidator(read, json_schema_input_type=name | section)


TENSORBOARD, WANDB, TRACKIO = OWN_SINKS = ("tensorboard", "wandb", "trackio")
_SINK = Annotated[str, Named(*OWN_SINKS, yours="a shoal.Sink of yours as package.module:Class")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkConfig(Section):
    """What gets the lines of RUN/metrics.jsonl: a name alone, or a name with arguments."""

    name: _SINK
    """``tensorboard``, ``wandb``, ``trackio``, or ``package.module:Class`` of a ``shoal.Sink``."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments for that class. RUN/config.yaml has them: no secrets."""

    def __post_init__(self) -> None:
        if self.kwargs and self.name in OWN_SINKS:
            raise PydanticCustomError(
                "cross_field",
                "kwargs are for a sink of yours, and {name} takes none; leave them out",
                {"name": self.name, "kwargs": 0},
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(Section):
    """Logs and trackers of a run."""

    every_seconds: Seconds = 10.0
    """Seconds between lines of RUN/metrics.jsonl, which has every metric over time."""
    format: Literal["text", "json"] = "text"
    """``json``: progress, warnings, the summary and RUN/run.log are one JSON object a line, for machines."""
    expect_learning_after: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the run (of total_env_steps, or of max_seconds) after which its return should be better than a random
    policy's; from then on, while it is not, the run names the likeliest cause and the setting to turn."""
    sinks: list[Annotated[SinkConfig, _named(SinkConfig, _SINK)]] = dataclasses.field(default_factory=list)
    """What gets the same numbers: tensorboard, wandb or trackio, each of which is an extra (pip install
    'shoal[tensorboard]'), and classes of one's own; names, or mappings of ``name`` and ``kwargs``."""
    project: str = "shoal"
    """Project of the run in W&B and trackio; sinks of one's own are told it, too."""
    name: str = ""
    """Name of the run there; empty takes the name of run_dir."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Checkpoints during the run; one is always saved at its end."""

    every_updates: Annotated[int, Field(ge=0)] = 100
    """Updates between checkpoints; 0 saves only at the end."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints that are kept, at least 2: the newest may turn out to be damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(Section):
    """Playing whole episodes with the newest weights during training, apart from it and at a low priority."""

    random_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Longest time that a uniformly random policy plays before the first update, for the return to be compared with; 0
    plays none. Where rollout processes act, another process plays it beside the training."""
    every_env_steps: Annotated[int, Field(ge=0)] = 0
    """Trained environment steps from one to the next; 0 makes none. There is never more than one at a time: what falls
    due meanwhile is left out."""
    episodes: Annotated[int, Field(ge=1)] = 128
    """At least so many, one per agent; with the same seeds every time."""
    greedy: bool = False
    """Take the most probable action instead of sampling."""
    best: bool = True
    """Keep the weights with the highest mean return in RUN/best. Not of several policies: the return of each says as
    much of the others."""
    max_seconds: Seconds = 600.0
    """One that takes longer is given up."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 15
    """Niceness of the process that plays, 0 to 19: at 15 Linux gives it about 3% of a core where training uses all of
    them, and all idle time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Section):
    """With mode=cluster: the address of the cluster and the placement of processes on it. The learner is the process
    that runs the command."""

    address: Annotated[str, Field(min_length=1)] = "auto"
    """host:port of the head; ``auto`` takes RAY_ADDRESS, or the cluster that this machine is part of."""
    actor_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """CPUs that each rollout actor takes."""
    actor_resources: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = dataclasses.field(
        default_factory=dict
    )
    """Other resources of the cluster that each rollout actor takes, by name."""
    actor_labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the nodes that rollout actors may be on: a value, !value, in(a,b) or !in(a,b)."""
    learner_labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same for peer learners (learner.num_learners)."""
    autoscaling: bool | Literal["auto"] = "auto"
    """Nodes may still come: a run then starts with the actors that have a place. ``auto`` asks the cluster."""
    wait_seconds: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 0.0
    """How long the start waits at most for what other runs have taken. 0 refuses at once; what the cluster would not
    have without other runs either is refused in any case. It does not count for max_seconds."""
    head_may_return: bool = False
    """A head that has ended is started again by the cluster, and knows what it knew (GCS fault tolerance): the run
    waits for it until 15 s before Ray gives it up, which is 60 s after its end. Otherwise it saves and ends at once."""
    runtime_env: dict[str, Any] = dataclasses.field(default_factory=dict)
    """A Ray runtime environment for all processes of the run. This code is sent to them in any case, and modules of the
    user's that are not installed here, unless it has a working_dir."""

    def __post_init__(self) -> None:
        if not self.actor_cpus and not self.actor_resources:
            raise PydanticCustomError(
                "cross_field",
                "actor_cpus={actor_cpus} needs actor_resources: nothing else would limit the actors of a node",
                {"actor_cpus": 0},
            )


_CALLBACK = Annotated[str, Named(yours="the name of a callback as package.module:Name", pattern=r"[\w.]+:[\w.]+")]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallbackConfig(Section):
    """A callback of the user's: a name alone, or a name with arguments."""

    name: _CALLBACK
    """``package.module:Name`` of a ``shoal.Callback`` class, or of a function that makes one."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments for it."""


def _policy_name(value: str) -> str:
    if not re.fullmatch(POLICY_NAME, value):
        raise ValueError(
            "a policy's name is that of a folder and of a label: a letter, then at most 31 letters, digits, _ and -"
        )
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Section):
    """One run."""

    mode: Literal["inline", "local", "cluster"] = "local"
    """``inline``: one process, no Ray, deterministic. ``local``: Ray started and stopped on this machine. ``cluster``:
    a Ray cluster that is running already."""
    placement: Literal["auto", "colocated", "disaggregated"] = "auto"
    """``colocated``: every learner also acts on slots of its own, one process per core. ``disaggregated``: rollout
    processes feed the learner, or each of learner.num_learners. ``auto``: disaggregated where the learner has an
    accelerator, in a cluster, where actor.num_actors or learner.num_threads is set, where environments run in
    processes of their own, with self-play or several policies, or where minibatches are small; else colocated."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Everything random in the run follows from it."""
    run_dir: str = ""
    """Directory of the run; empty makes a new one below ``runs/``."""
    total_env_steps: Annotated[int, Field(ge=1)] = 3_000_000
    """Environment steps to train on; one step of one slot counts one."""
    max_seconds: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 0.0
    """Training also ends after so many seconds; 0 is no limit."""
    resume: str = "auto"
    """``auto`` continues what ``run_dir`` holds, ``never`` refuses a run_dir with checkpoints, a path continues that
    one."""
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    actor: ActorConfig = dataclasses.field(default_factory=ActorConfig)
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    self_play: SelfPlayConfig = dataclasses.field(default_factory=SelfPlayConfig)
    policies: Mapping[Annotated[str, AfterValidator(_policy_name)], TeamConfig] = dataclasses.field(
        default_factory=dict
    )
    """Several policies by name, each with ``agents`` of a PettingZoo environment: every agent belongs to one. Empty
    trains one policy that plays all agents. Each has one learner."""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    recorder: RecorderConfig = dataclasses.field(default_factory=RecorderConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    callbacks: list[Annotated[CallbackConfig, _named(CallbackConfig, _CALLBACK)]] = dataclasses.field(
        default_factory=list
    )
    """The user's code that the run calls at its start and end, and at updates, episodes, checkpoints and evaluations:
    names, or mappings of ``name`` and ``kwargs``."""
