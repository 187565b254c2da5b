"""The metrics catalogue; ``collector`` makes a page of it and ``history`` lines.

Each entry has a name, a kind, a help text, a label, and a function that reads its value from the run at a scrape. The
training loop does no work for metrics.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from shoal.actors.pool import ReplacementReason
from shoal.deploy.monitoring.bottleneck import STAGES, Bottleneck
from shoal.deploy.monitoring.learning import CAUSES, VERDICTS, Interval, Learning, Recorded, judge
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations
from shoal.envs.reports import Remark
from shoal.learner.ledger import DropReason, Ledger
from shoal.learner.opponents import Result
from shoal.learner.schedules import ScheduledSettings
from shoal.learner.statistics import RunStatistics, TimedStage
from shoal.learner.trajectory_queue import Refusal, TrajectoryQueue
from shoal.learner.weight_metrics import WeightMetrics


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """The parts of a run from which metrics are read."""

    statistics: RunStatistics
    trajectory_queue: TrajectoryQueue
    actors_alive: Callable[[], int]
    actor_restarts: Callable[[], Mapping[str, int]]
    bottleneck: Callable[[], Bottleneck | None]
    build: Mapping[str, str]
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the run as labels: few, and of bounded length."""
    actor_states: Callable[[], Mapping[str, int]] = dict
    """Number of actors by state; every state is a key."""
    recoveries: Callable[[], int] = int
    """Number of replaced actors whose successors are up."""
    recovery_seconds: Callable[[], float] = float
    """Sum of the seconds that these replacements took."""
    lags: Callable[[], Sequence[int]] = tuple
    """For each unroll under way, the number of versions published since it began."""
    late_unrolls: Callable[[], int] = int
    """Unrolls under way that will be too old to be trained when they come back."""
    accelerator_memory: Callable[[], Mapping[str, int]] = dict
    finished: Callable[[], bool] = bool
    target_env_steps: int = 0
    """Environment steps after which the whole run ends."""
    learning: Callable[[], Learning] = lambda: judge(Recorded(), expect_after=1.0)
    run_dir: Path = Path()
    evaluations: Evaluations = dataclasses.field(default_factory=Evaluations)
    opponents: Callable[[], Sequence[Result]] = tuple
    """Results against the versions of self-play, oldest first."""
    callback_numbers: Callable[[], Mapping[str, float]] = dict
    """The last numbers that callbacks returned, by name."""
    failed_readings: Counter[str] = dataclasses.field(default_factory=Counter)
    """Failed readings by metric name."""
    before: Ledger = dataclasses.field(default_factory=Ledger)
    """The ledger that a resumed run began with. Counters count this process only: a counter must never decrease."""

    @property
    def ledger(self) -> Ledger:
        """The ledger of the whole run."""
        return self.trajectory_queue.ledger

    @property
    def process_ledger(self) -> Ledger:
        """The part of the ledger that this process added."""
        return self.trajectory_queue.snapshot().since(self.before)


Kind = Literal["counter", "gauge", "histogram"]
Read = Callable[[Sources], Any]
"""A number; a mapping from label value to number where there is a label; a ``Histogram``."""


@dataclasses.dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One metric of the catalogue."""

    kind: Kind
    name: str
    help: str
    read: Read
    label: str | None
    of_run: bool = False
    """Of the whole run, and the same whichever of several policies it is read from: it is on the page once."""
    key: str = ""
    """Its name in metrics.jsonl, where that is not the metric's: trackers group by what is before the slash."""
    values: tuple[str, ...] = ()
    """All values of a counter's label, where they are known: each is 0 before its first event. ``increase()`` does not
    count what a series begins with."""

    @property
    def history_name(self) -> str:
        """Its name in metrics.jsonl; a label's value follows after a slash."""
        return self.key or self.name.removeprefix("shoal_").removesuffix("_total")


def _counter(
    name: str, help: str, read: Read, label: str | None = None, values: Any = (), *, of_run: bool = False
) -> CatalogueEntry:
    return CatalogueEntry("counter", f"shoal_{name}", help, read, label, of_run, values=tuple(values))


def _gauge(
    name: str, help: str, read: Read, label: str | None = None, *, of_run: bool = False, key: str = ""
) -> CatalogueEntry:
    return CatalogueEntry("gauge", f"shoal_{name}", help, read, label, of_run, key)


def _weights(
    name: str, help: str, read: Callable[[WeightMetrics], Mapping[str, float]], *, key: str = ""
) -> CatalogueEntry:
    return _gauge(name, help, lambda s: read(s.statistics.weights), "component", key=key)


def _term(term: str, name: str, help: str) -> CatalogueEntry:
    """A term of the loss, or a number beside it, that has a metric of its own for its unit."""
    return _gauge(
        name,
        f"{help}. Mean over the optimizer steps of the last update; NaN before the first, and where learner.loss has "
        "no such term.",
        lambda s: s.statistics.terms.get(term, float("nan")),
        key=f"loss/{term}",
    )


def _histogram(name: str, help: str, read: Read) -> CatalogueEntry:
    return CatalogueEntry("histogram", f"shoal_{name}", help, read, None)


_ERROR = (
    "Log-prob parity check: the largest difference between the log-probabilities of actors and learner under the same "
    "weights. Above 1e-4 the memory is wrong"
)
_STALENESS = (
    "Relative distance between the recurrent states that segments begin with and those that the newest weights "
    "compute, for the states that actors stored and for those that training used. Value of the last measurement."
)
_W0 = "the initial weights (or the reference that learner.regularization.l2_init_reference_every moved)"
_RANK = "Number of singular values that make up 99% of their sum; the lowest if a component has several matrices."
_CONDITION = "Largest singular value divided by the smallest; the highest if a component has several matrices."
_DORMANT = "Share of a layer's units that are dormant: their mean |activation| is at most 0.025 of the layer's mean."
_STAGE = (
    "Seconds spent in each stage. actor_policy, actor_env and actor_pack are summed over actors; the others belong to "
    "the training loop of learner 0. If learners also act, wait includes their own unrolls, and reduce is the part "
    "of update that sums gradients and waits for slower learners."
)
_DROPPED = (
    "Environment steps that will never be trained, by reason. stale: they arrived too late; non_finite: their update "
    "was skipped; learner_lost: a peer learner died with them; shutdown: they were queued when the run ended; restart: "
    "they were queued when the checkpoint was saved from which the run was resumed."
)
_LOSS_TERMS = ("policy_loss", "value_loss", "l2_init_loss")
_LOSS = (
    "Terms of the loss in the last update: policy_loss; value_loss, without its factor shoal_value_coef; "
    "l2_init_loss, with its coefficients. shoal_total_loss is policy_loss + shoal_value_coef x value_loss - "
    "shoal_entropy_coef x shoal_entropy_nats + l2_init_loss, unless learner.loss is one of your own."
)
_TERMS: tuple[tuple[str, str, str], ...] = (
    ("loss", "total_loss", "The loss that is minimized"),
    ("entropy", "entropy_nats", "Entropy of the policy"),
    ("approx_kl", "approx_kl_nats", "KL divergence to the policy that acted, estimated by E[r - 1 - log r]"),
    ("update_kl", "update_kl_nats", "KL divergence to the policy before the update: E[(log pi - log pi_old)^2] / 2"),
    ("clip_fraction", "clipped_transitions_ratio", "Share of transitions whose ratio is beyond 1 +- shoal_clip_coef"),
    ("grad_norm", "global_gradient_norm", "L2 norm of the whole gradient before it is clipped (learner.max_grad_norm)"),
    (
        "explained_variance",
        "explained_variance_ratio",
        "1 - var(targets - V) / var(targets): 1 is a perfect value function, 0 no better than a constant",
    ),
    (
        "advantage_std",
        "advantage_std",
        "Standard deviation of the advantages before normalization, in the reward's units",
    ),
)
_OWN_TERMS = "Further terms that a loss of your own returns (learner.loss), in its units: those of the last update."
_REPLACED = (
    "Actors replaced, by reason. error: the environment raised; timeout: an unroll took too long; died: the process "
    "ended; oom: out of memory; object_store: the object store of its node was full; refused: its deliveries were; "
    "node_died: its node failed; preempted: its node is being shut down."
)
_STALE = (
    "Actors whose current unroll will be dropped as too old: it began more than actor.max_policy_lag versions ago. An "
    "actor that is too slow for that lag counts only once its unroll has taken twice its longest time of late. Actors "
    "of peer learners are counted once per update."
)
_SHARE = (
    "Trained environment steps of the actor that gave least and of the one that gave most, over the last trajectories "
    "(16 per actor), divided by an equal share of all actors. 1 is equal. Absent until there were so many."
)
_SLOWEST = "Policy versions published since the oldest unroll under way began; 0 if none is under way."
_STATE = (
    "Actors by state. up: can make unrolls; starting; unplaced: waits for resources of the cluster or for its process "
    "to answer; pausing: failed, and starts again after a pause. Actors of peer learners are counted once per update."
)
_RECOVERY = (
    "Seconds from detecting a failure until the successor is up, summed over shoal_actor_recoveries_total. Waiting for "
    'a place in the cluster is left out: shoal_actors{state="unplaced"} shows it.'
)
_ACCELERATOR = (
    "Memory of the accelerator of learner 0: allocated to tensors, reserved by torch, and in total. Absent on the CPU."
)

_OPTIMIZER_STEPS = "Optimizer steps made by this process: learner.epochs x learner.minibatches an update at most."
_SCHEDULED: tuple[tuple[str, str, Read], ...] = (
    ("learning_rate", "Learning rate", lambda s: _scheduled(s).learning_rate),
    ("entropy_coef", "Coefficient of the entropy bonus", lambda s: _scheduled(s).entropy_coef),
    ("clip_coef", "Bound of the policy's ratio", lambda s: _scheduled(s).clip_coef),
    ("value_clip_coef", "Bound of the value's change", lambda s: _scheduled(s).value_clip_coef),
)
_GRADIENTS = (
    "L2 norm of the gradients of the losses, policy (with the entropy bonus) and value (times shoal_value_coef), "
    "through the parameters that both reach, on a few segments, every learner.weight_metrics_every updates, and every "
    "20 with learner.value_coef=auto. Where value is far larger, the policy does not learn."
)
_RETURN_CI = "Half the width of the 95% interval of shoal_mean_return; NaN before the second episode."
_RANDOM = (
    "Mean return of uniformly random actions, measured before the first update, or, where rollout processes act, "
    "beside the training; NaN until then, or if that could not be done."
)
_RANDOM_CI = "Half the width of the 95% interval of shoal_random_return."
_LEARNING = (
    "1 for how the mean return compares with a random policy's, 0 for the others: better, no_better (within noise), "
    "worse, unknown."
)
_PROBLEM = (
    "Once the return should be better than a random policy's (log.expect_learning_after) and is not: 1 for the "
    "likeliest cause, 0 for the others. "
    + "; ".join(f"{cause}: {words}" for cause, words in CAUSES.items())
    + ". The live view and summary.json say it in a sentence, with the setting to turn."
)
_INFO_NUMBER = (
    "Mean of a number that the environment's info had at the end of an episode, over the last 256 episodes that had it."
)
_REMARKED = (
    "Remarks on environments. out_of_bounds: observations that leave the bounds of their space; clipped: observations "
    "with a number beyond 1e9; undeclared: observations with a part that their space has not, which is left out; "
    "dark_picture: slots whose pictures have no bright pixel and may be codes; mask_not_used: masks of legal actions "
    "that nothing heeds; printed: lines printed; process_setting: settings of the process that were changed; "
    "reset_key_missing: slots whose infos never had the key of actor.reset_memory."
)
_EVALUATION = "Mean return of the last evaluation (evaluation.every_env_steps); NaN before the first."

_OPPONENT = "By the place of the version in the pool, newest is the last that joined."
_WINS = (
    "Share of the last 128 whole games against a version in which the trained agent had a higher return than the mean "
    f"of the others; a draw counts one half. {_OPPONENT} Absent before the first game."
)
_DIFFERENCE = f"Mean of the trained agent's return less the mean of the others', over the same games. {_OPPONENT}"
_FROZEN = (
    "Environment steps of agents that frozen versions played, in trained trajectories. No other count has them: they "
    "are neither delivered nor trained."
)

_CALLBACK = "Numbers that the run's callbacks returned, by the names they gave them: the last of each."

_MEASURED: tuple[CatalogueEntry, ...] = (
    # Step accounting
    _counter("sampled_env_steps_total", "Environment steps delivered by actors.", lambda s: s.process_ledger.sampled),
    _counter("trained_env_steps_total", "Environment steps used in updates.", lambda s: s.process_ledger.trained),
    _counter("dropped_env_steps_total", _DROPPED, lambda s: s.process_ledger.dropped, "reason", get_args(DropReason)),
    _gauge("run_env_steps", "Environment steps trained in the whole run.", lambda s: s.ledger.trained),
    _gauge(
        "run_finished",
        "1 once the run has ended as it was meant to, not by a signal or a failure. A run that is scraped regularly "
        "waits for the scrape that sees it (metrics.last_scrape_seconds).",
        lambda s: s.finished(),
        of_run=True,
    ),
    _gauge("target_env_steps", "Environment steps the whole run is to train.", lambda s: s.target_env_steps),
    _gauge("in_flight_env_steps", "Environment steps waiting for their update.", lambda s: s.ledger.in_flight),
    _gauge(
        "ledger_imbalance_env_steps",
        "Environment steps unaccounted for: sampled - trained - in flight - dropped. Must be 0.",
        lambda s: s.trajectory_queue.imbalance(),
    ),
    # Trajectories
    _counter(
        "refused_trajectories_total",
        "Trajectory batches that were refused, by reason.",
        lambda s: s.trajectory_queue.refused,
        "reason",
        get_args(Refusal),
        of_run=True,
    ),
    _counter(
        "lost_unrolls_total",
        "Unrolls lost because their actor ended.",
        lambda s: s.trajectory_queue.lost_unrolls,
        of_run=True,
    ),
    _gauge("queued_segments", "Segments waiting for their update.", lambda s: s.trajectory_queue.queued_segments),
    _gauge(
        "queued_bytes", "Bytes of trajectories waiting for their update.", lambda s: s.trajectory_queue.queued_bytes
    ),
    _counter("received_bytes_total", "Bytes of trajectories used in updates.", lambda s: s.statistics.received_bytes),
    _gauge("stale_actors", _STALE, lambda s: s.late_unrolls()),
    _gauge("slowest_actor_lag_versions", _SLOWEST, lambda s: max(s.lags(), default=0)),
    _histogram(
        "policy_lag_versions",
        "Policy versions published between acting and training.",
        lambda s: s.statistics.policy_lag,
    ),
    _gauge("actor_data_share_ratio", _SHARE, lambda s: s.statistics.data_share.ratios(), "actor"),
    # Updates
    _gauge("policy_version", "Updates made in the whole run.", lambda s: s.statistics.policy_version),
    _counter("updates_total", "Updates made by this process.", lambda s: s.statistics.updates),
    _counter("optimizer_steps_total", _OPTIMIZER_STEPS, lambda s: s.statistics.optimizer_steps),
    _counter(
        "skipped_updates_total",
        "Updates skipped because a loss or a gradient was not finite.",
        lambda s: s.statistics.skipped_updates,
    ),
    _gauge(
        "last_update_timestamp_seconds",
        "Unix time of the last update, or of a later batch that had no step of the policy's agents.",
        lambda s: s.statistics.last_update_timestamp,
    ),
    _counter("published_bytes_total", "Bytes of weights published.", lambda s: s.statistics.published_bytes),
    _gauge("loss", _LOSS, lambda s: _loss_terms(s), "term"),
    *(_term(*term) for term in _TERMS),
    _gauge("loss_metric", _OWN_TERMS, lambda s: _own_terms(s), "name", key="loss"),
    _gauge("gradient_norm", _GRADIENTS, lambda s: s.statistics.gradient_norms, "loss"),
    *(
        _gauge(name, f"{what} of the last update (learner.{name}, learner.schedules); NaN before the first.", read)
        for name, what, read in _SCHEDULED
    ),
    _gauge(
        "value_coef",
        "Coefficient of the value loss of the last update (learner.value_coef); NaN before the first.",
        lambda s: _scheduled(s).value_coef,
    ),
    # Weights, by component; read every learner.weight_metrics_every updates
    _weights("weight_norm", "L2 norm of a component's parameters.", lambda w: w.norm),
    _weights("weight_distance_to_init", f"L2 distance of the parameters to {_W0}.", lambda w: w.distance_to_init),
    _weights(
        "weight_distance_to_init_ratio",
        f"Distance to init divided by the norm of {_W0}.",
        lambda w: w.relative_distance_to_init,
        key="weight_relative_distance_to_init",
    ),
    _weights("weight_effective_rank", _RANK, lambda w: w.effective_rank),
    _weights("weight_condition_number", _CONDITION, lambda w: w.condition_number),
    _weights(
        "weight_clipped_ratio",
        "Share of the weights under clipping that lie on their bound.",
        lambda w: w.clipped_fraction,
        key="weight_clipped_fraction",
    ),
    _weights("dormant_units_ratio", _DORMANT, lambda w: w.dormant_units_ratio),
    # Memory
    _gauge("log_prob_error", f"{_ERROR}. Value of the last check.", lambda s: s.statistics.last_log_prob_error),
    _gauge("log_prob_error_max", f"{_ERROR}. Maximum over this process.", lambda s: s.statistics.max_log_prob_error),
    _counter("log_prob_checks_total", "Log-prob parity checks made.", lambda s: s.statistics.log_prob_checks),
    _gauge("memory_staleness_ratio", _STALENESS, lambda s: s.statistics.staleness, "state"),
    # Episodes, one per agent
    _counter(
        "sampled_episodes_total",
        "Episodes that ended in delivered trajectories.",
        lambda s: s.trajectory_queue.sampled_episodes,
    ),
    _counter("episodes_total", "Episodes that ended in trained trajectories.", lambda s: s.statistics.episodes),
    _histogram("episode_return", "Undiscounted returns of finished episodes.", lambda s: s.statistics.episode_return),
    _histogram("episode_length_steps", "Lengths of finished episodes.", lambda s: s.statistics.episode_length),
    _gauge(
        "mean_return",
        "Mean return of the last 256 finished episodes; NaN before the first.",
        lambda s: _number(s.statistics.mean_return),
    ),
    # Is it learning?
    _gauge("mean_return_ci95", _RETURN_CI, lambda s: _half_width(s.learning().returned)),
    _gauge("random_return", _RANDOM, lambda s: _mean(s.learning().random)),
    _gauge("random_return_ci95", _RANDOM_CI, lambda s: _half_width(s.learning().random)),
    _gauge("learning", _LEARNING, lambda s: _one_of(VERDICTS, s.learning().verdict), "verdict"),
    _gauge("learning_problem", _PROBLEM, lambda s: _one_of(CAUSES, s.learning().cause), "cause"),
    _gauge("episode_metric", _INFO_NUMBER, lambda s: s.statistics.episode_metrics, "name"),
    # Evaluation during training
    _gauge("evaluation_return", _EVALUATION, lambda s: _evaluated(s.evaluations.last)),
    _gauge(
        "evaluation_best_return",
        "Highest mean return of all evaluations of the run; NaN where it trains several policies.",
        lambda s: _evaluated(s.evaluations.best),
    ),
    _gauge(
        "evaluation_env_steps",
        "Environment steps trained when the last evaluation took its weights.",
        lambda s: _evaluation_steps(s),
    ),
    _counter("evaluations_total", "Evaluations made by this process.", lambda s: s.evaluations.count),
    _counter("failed_evaluations_total", "Evaluations that failed or timed out.", lambda s: s.evaluations.failed),
    # Self-play
    _gauge(
        "opponent_version",
        f"Policy version of each opponent. {_OPPONENT}",
        lambda s: _by_place(s, lambda result: result.policy_version),
        "opponent",
    ),
    _gauge("opponent_win_ratio", _WINS, lambda s: _by_place(s, lambda result: result.win_share), "opponent"),
    _gauge(
        "opponent_return_difference",
        _DIFFERENCE,
        lambda s: _by_place(s, lambda result: result.return_difference),
        "opponent",
    ),
    _counter("opponent_env_steps_total", _FROZEN, lambda s: s.statistics.opponent_env_steps),
    # Callbacks
    _gauge("callback", _CALLBACK, lambda s: s.callback_numbers(), "name"),
    # Actors
    _gauge("actors_alive", "Actors that can make unrolls.", lambda s: s.actors_alive(), of_run=True),
    _gauge("actors", _STATE, lambda s: s.actor_states(), "state", of_run=True),
    _counter(
        "actor_restarts_total",
        _REPLACED,
        lambda s: s.actor_restarts(),
        "reason",
        get_args(ReplacementReason),
        of_run=True,
    ),
    _counter(
        "actor_recoveries_total", "Replaced actors whose successors are up.", lambda s: s.recoveries(), of_run=True
    ),
    _counter("actor_recovery_seconds_total", _RECOVERY, lambda s: s.recovery_seconds(), of_run=True),
    _counter("env_faults_total", "Environment slots restarted after a fault.", lambda s: s.statistics.env_faults),
    _counter(
        "ignored_tokens_total",
        "Observation tokens ignored: an unknown feature, or coordinates outside the window.",
        lambda s: s.statistics.ignored_tokens,
    ),
    _counter("env_remarks_total", _REMARKED, lambda s: s.statistics.remarks, "remark", get_args(Remark)),
    # The bottleneck
    _gauge(
        "bottleneck",
        "1 for the stage that limits the run now, 0 for the others.",
        lambda s: _bottleneck(s),
        "stage",
        of_run=True,
    ),
    # The process
    _counter("stage_seconds_total", _STAGE, lambda s: s.statistics.stage_seconds, "stage", get_args(TimedStage)),
    _counter(
        "failed_checkpoints_total",
        "Checkpoints that could not be written.",
        lambda s: s.statistics.failed_checkpoints,
        of_run=True,
    ),
    _gauge(
        "last_checkpoint_timestamp_seconds",
        "Unix time of the last checkpoint.",
        lambda s: s.statistics.last_checkpoint_timestamp,
        of_run=True,
    ),
    _gauge(
        "run_dir_free_bytes",
        "Free bytes of the disk of run_dir.",
        lambda s: shutil.disk_usage(s.run_dir).free,
        of_run=True,
    ),
    _gauge(
        "run_dir_size_bytes",
        "Total bytes of the disk of run_dir.",
        lambda s: shutil.disk_usage(s.run_dir).total,
        of_run=True,
    ),
    _gauge("accelerator_memory_bytes", _ACCELERATOR, lambda s: s.accelerator_memory(), "part", of_run=True),
)
CATALOGUE = (
    *_MEASURED,
    # Read last, so that it includes the failures of this page.
    _counter(
        "failed_readings_total",
        "Readings of a metric that failed.",
        lambda s: s.failed_readings,
        "metric",
        [entry.name for entry in _MEASURED],
    ),
)
INFO: Mapping[str, tuple[str, Callable[[Sources], Mapping[str, str]]]] = {
    "shoal_build_info": ("Versions of shoal and its libraries, as labels; always 1.", lambda s: s.build),
    "shoal_run_info": ("Settings of the run, as labels; always 1.", lambda s: s.about),
}
"""Gauges that are always 1 and carry text as labels: their help, and the labels of a run."""


def _bottleneck(sources: Sources) -> dict[str, int]:
    found = sources.bottleneck()
    return {stage: int(found is not None and found.stage == stage) for stage in STAGES}


def _one_of(names: Iterable[str], holds: str | None) -> dict[str, int]:
    return {name: int(name == holds) for name in names}


def _loss_terms(sources: Sources) -> dict[str, float]:
    terms = sources.statistics.terms
    return {name: terms[name] for name in _LOSS_TERMS if name in terms}


def _own_terms(sources: Sources) -> dict[str, float]:
    known = {*_LOSS_TERMS, *(term for term, *_ in _TERMS)}
    return {name: number for name, number in sources.statistics.terms.items() if name not in known}


def _mean(interval: Interval | None) -> float:
    return float("nan") if interval is None else interval.mean


def _half_width(interval: Interval | None) -> float:
    return float("nan") if interval is None else interval.half_width


def _evaluated(result: EvaluationResult | None) -> float:
    return float("nan") if result is None else result.mean_return


def _evaluation_steps(sources: Sources) -> float:
    last = sources.evaluations.last
    return float("nan") if last is None else last.env_steps


def _by_place(sources: Sources, read: Callable[[Result], float | None]) -> dict[str, float]:
    """A number of every opponent by its place: versions as labels would never end."""
    found = {}
    for place, result in enumerate(reversed(sources.opponents())):
        if (number := read(result)) is not None:
            found[f"newest-{place}" if place else "newest"] = number
    return found


def _scheduled(sources: Sources) -> ScheduledSettings:
    return sources.statistics.scheduled or ScheduledSettings(*[float("nan")] * len(ScheduledSettings._fields))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
