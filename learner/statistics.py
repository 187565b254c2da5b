"""The run's counters and levels: written by the training loop, read by metrics, progress and the summary."""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from shoal.learner.data_share import DataShare
from shoal.learner.ledger import Ledger
from shoal.learner.schedules import ScheduledSettings
from shoal.learner.weight_metrics import WeightMetrics
from shoal.policy.trajectory import Trajectory

if TYPE_CHECKING:
    from shoal.learner.learner_worker import Trained

RETURN_WINDOW = 256
"""Finished episodes (one agent's each) that ``mean_return`` averages over."""
TERMS_WINDOW = 64
"""Updates that ``mean_terms`` averages over."""
MOST_METRICS = 64
"""Names of numbers from the environments' ``info`` that are kept: each is a label of a metric."""


class Histogram:
    """Number of observations by bucket; ``bounds`` are the buckets' upper bounds, as in Prometheus."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self.max = float("-inf")

    def observe(self, values: Iterable[float]) -> None:
        """Count every value in its bucket."""
        for value in values:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.sum += value
            self.max = max(self.max, value)

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean of all observations; NaN before the first."""
        return self.sum / self.count if self.count else float("nan")


_UNREPORTED: Mapping[str, Any] = {
    "episode_returns": [],
    "episode_lengths": [],
    "policy_seconds": 0.0,
    "env_seconds": 0.0,
    "pack_seconds": 0.0,
    "ignored_tokens": 0,
    "faults": [],
    "remarks": {},
    "episode_metrics": {},
}
"""The statistics of an actor that reports none."""


class TrajectoryReport(NamedTuple):
    """The statistics that an actor reported with one trajectory, without the trajectory's data."""

    actor: int
    env_steps: int
    statistics: Mapping[str, Any]
    policy_lag: int
    num_bytes: int


def report_trajectories(batch: Sequence[Trajectory], policy_version: int) -> tuple[TrajectoryReport, ...]:
    """One report for each trajectory of an update whose first weights were ``policy_version``."""
    return tuple(
        TrajectoryReport(
            actor=t.header.actor,
            env_steps=t.env_steps,
            statistics={**_UNREPORTED, **t.header.statistics},
            policy_lag=policy_version - t.header.policy_version,
            num_bytes=t.num_bytes,
        )
        for t in batch
    )


TimedStage = Literal[
    "actor_policy",
    "actor_env",
    "actor_pack",
    "wait",
    "assemble",
    "parity_check",
    "update",
    "reduce",
    "publish",
    "weight_metrics",
    "checkpoint",
]
"""Stages whose seconds are counted: of actors, then of the training loop, where ``reduce`` is part of ``update``."""


class StageClock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[TimedStage, float] = defaultdict(float)
        self.under_way: tuple[str, float] | None = None
        """The stage that has not ended yet, and when it began, by the monotonic clock."""

    @contextmanager
    def time(self, stage: TimedStage) -> Iterator[None]:
        """Add the seconds of the block to a stage."""
        start = time.perf_counter()
        try:
            with self.mark(stage):
                yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def mark(self, stage: str) -> Iterator[None]:
        """Say that the block is under way, whose seconds are counted nowhere."""
        before, self.under_way = self.under_way, (stage, time.monotonic())
        try:
            yield
        finally:
            self.under_way = before


class RunStatistics:
    """Counters and levels of this process; a resumed run continues those of ``get_state``."""

    def __init__(self, ledger: Ledger, clock: StageClock | None = None, *, num_actors: int = 1) -> None:
        self.ledger = ledger
        self.data_share = DataShare(num_actors)
        self._clock = clock or StageClock()
        self.stage_seconds = self._clock.seconds
        self._started: float | None = None
        self._ended: float | None = None
        self._last_update: float | None = None
        self.longest_wait = 0.0
        """Most seconds from one update to the next."""
        self.policy_version = 0
        self.updates = 0
        self.optimizer_steps = 0
        self.scheduled: ScheduledSettings | None = None
        self.first_terms: dict[str, float] = {}
        """Terms of the first update that this process made."""
        self.wildest_terms: dict[str, float] = {}
        """Terms of the update with the highest ``approx_kl``."""
        self.gradient_norms: dict[str, float] = {}
        """``Learner.gradient_norms``, last reading."""
        self.learning_rate_sum = 0.0
        """Sum of the learning rate over the optimizer steps: about the most that any one weight has moved by Adam."""
        self._terms: deque[dict[str, float]] = deque(maxlen=TERMS_WINDOW)
        self.skipped_updates = 0
        self.failed_checkpoints = 0
        self.episodes = 0
        self.earlier_episodes = 0
        """Episodes of the sessions that this one resumes."""
        self.slots_begun_anew = 0
        """Slots that began an episode because the run was resumed: their environments could not go on."""
        self.env_faults = 0
        self.opponent_env_steps = 0
        """Steps of frozen agents in trained trajectories; no ledger has them, because they are never delivered."""
        self.ignored_tokens = 0
        self.remarks: Counter[str] = Counter()
        """Number of cases by remark on environments (``envs.reports``)."""
        self._episode_metrics: dict[str, deque[float]] = {}
        self.published_bytes = 0
        self.received_bytes = 0
        self.max_log_prob_error = 0.0
        self.last_log_prob_error = 0.0
        self.log_prob_checks = 0
        self.terms: dict[str, float] = {}
        self.staleness: dict[str, float] = {}
        self.weights = WeightMetrics()
        self.last_update_timestamp = 0.0
        self.last_checkpoint_timestamp = 0.0
        self.returns: deque[float] = deque(maxlen=RETURN_WINDOW)
        self.episode_return = Histogram(
            (-100, -10, -5, -2, -1, 0, 0.5, 1, 2, 3, 5, 8, 12, 16, 20, 30, 50, 100, 200, 500, 1000)
        )
        self.episode_length = Histogram((1, 3, 10, 30, 100, 200, 300, 500, 1000, 3000, 10_000))
        self.policy_lag = Histogram((0, 1, 2, 3, 4, 6, 8, 16, 32))

    @property
    def all_episodes(self) -> int:
        """Episodes that ended in trained trajectories of the whole run."""
        return self.earlier_episodes + self.episodes

    @property
    def fault_share(self) -> float:
        """Share of this session's episodes that a fault of their environment ended."""
        return self.env_faults / max(self.env_faults + self.episodes, 1)

    def get_state(self) -> dict[str, Any]:
        """Windows, last readings and the count of episodes, as plain data for a checkpoint."""
        return {
            "episodes": self.all_episodes,
            "returns": list(self.returns),
            "episode_metrics": {name: list(values) for name, values in dict(self._episode_metrics).items()},
            "recent_terms": list(self._terms),
            "first_terms": self.first_terms,
            "wildest_terms": self.wildest_terms,
            "gradient_norms": dict(self.gradient_norms),
            "staleness": dict(self.staleness),
        }

    def set_state(self, state: Any) -> None:
        """Go on from ``get_state`` of an earlier session, before the first update.

        Raises:
            ValueError: it is no such state.
        """
        try:
            episodes, returns = state["episodes"], [float(each) for each in state["returns"]]
            metrics = {name: [float(each) for each in values] for name, values in state["episode_metrics"].items()}
            recent = [_numbers(terms) for terms in state["recent_terms"]]
            names = ("first_terms", "wildest_terms", "gradient_norms", "staleness")
            levels = {name: _numbers(state[name]) for name in names}
            if type(episodes) is not int or episodes < 0:
                raise ValueError(f"episodes must be a whole number from 0 on, got {episodes!r}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged ({type(error).__name__}: {error})") from error
        self.earlier_episodes = episodes
        self.returns.extend(returns)
        self._episode_metrics = {name: deque(values, RETURN_WINDOW) for name, values in metrics.items()}
        self._terms.extend(recent)
        self.terms = dict(recent[-1]) if recent else {}
        for name, numbers in levels.items():
            setattr(self, name, numbers)

    @property
    def mean_return(self) -> float | None:
        """Mean over the last finished episodes; None before the first."""
        return sum(self.returns) / len(self.returns) if self.returns else None

    @property
    def episode_metrics(self) -> dict[str, float]:
        """Means of the numbers that ``info`` had at the ends of the last episodes, by name."""
        # A copy, because the training loop may add a name meanwhile.
        return {name: sum(values) / len(values) for name, values in dict(self._episode_metrics).items()}

    @property
    def seconds(self) -> float:
        """Wall seconds of training, from ``begin`` to ``end``; 0 before."""
        if self._started is None:
            return 0.0
        return (time.monotonic() if self._ended is None else self._ended) - self._started

    @property
    def mean_terms(self) -> dict[str, float]:
        """Each term's mean over the last ``TERMS_WINDOW`` updates; empty before the first."""
        recent = list(self._terms)
        return {name: sum(terms.get(name, math.nan) for terms in recent) / len(recent) for name in self.terms}

    @property
    def present_entropy(self) -> float:
        """Mean entropy over the last quarter of the updates, and ``TERMS_WINDOW`` at most; NaN before the first.

        Not over all of a short run: that of a policy that has stopped exploring would be hidden by how it began.
        """
        recent = [terms.get("entropy", math.nan) for terms in self._terms]
        recent = recent[-max(min(self.updates // 4, TERMS_WINDOW), 1) :]
        return sum(recent) / len(recent) if recent else math.nan

    @property
    def stage_under_way(self) -> tuple[str, float] | None:
        """The stage of the training loop that has not ended yet, and its seconds so far; None between two stages."""
        found = self._clock.under_way
        return None if found is None else (found[0], time.monotonic() - found[1])

    def begin(self) -> None:
        """Start the clock: training begins."""
        self._started = time.monotonic()

    def end(self) -> None:
        """Stop the clock, unless it is stopped: training is over."""
        if self._ended is None:
            self._ended = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether training is over."""
        return self._ended is not None

    def add_update(self, policy_version: int, made: Trained) -> None:
        """Count an update that was made just now."""
        self.policy_version = policy_version
        self.updates += 1
        self.optimizer_steps += made.optimizer_steps
        self.learning_rate_sum += made.optimizer_steps * made.scheduled.learning_rate
        self.terms = dict(made.terms)
        self.first_terms = self.first_terms or self.terms
        self._terms.append(self.terms)
        if self.terms.get("approx_kl", 0.0) >= self.wildest_terms.get("approx_kl", 0.0):
            self.wildest_terms = self.terms
        self.gradient_norms.update(made.gradient_norms)
        self.scheduled = made.scheduled
        self.staleness.update(made.staleness)
        self.stamp_update()

    def stamp_update(self) -> None:
        """Record the time of an update that was made just now."""
        self.last_update_timestamp = time.time()
        now = time.monotonic()
        # Forgotten slowly: one stall says nothing about how long updates take.
        self.longest_wait = max(0.98 * self.longest_wait, now - (self._last_update or now))
        self._last_update = now

    def add_empty_batch(self) -> None:
        """Count a batch without a transition as a sign of life: no update was missed."""
        if self._last_update is not None:
            self._last_update, self.last_update_timestamp = time.monotonic(), time.time()

    @property
    def seconds_since_update(self) -> float | None:
        """Seconds since the last update or empty batch, by the monotonic clock; None before the first update."""
        return None if self._last_update is None else time.monotonic() - self._last_update

    def add_reports(self, reports: Sequence[TrajectoryReport]) -> list[str]:
        """Add the actors' reports; messages of environment slots that were restarted, and the first of each remark."""
        messages: list[str] = []
        for actor, env_steps, statistics, policy_lag, num_bytes in reports:
            self.data_share.add(actor, env_steps)
            returns, lengths = statistics["episode_returns"], statistics["episode_lengths"]
            self.episodes += len(returns)
            self.returns.extend(returns)
            self.episode_return.observe(returns)
            self.episode_length.observe(lengths)
            self.stage_seconds["actor_policy"] += statistics["policy_seconds"]
            self.stage_seconds["actor_env"] += statistics["env_seconds"]
            self.stage_seconds["actor_pack"] += statistics["pack_seconds"]
            self.ignored_tokens += statistics["ignored_tokens"]
            self.env_faults += len(statistics["faults"])
            self.opponent_env_steps += statistics.get("opponent_env_steps", 0)
            self.received_bytes += num_bytes
            self.policy_lag.observe([policy_lag])
            messages += statistics["faults"]
            for kind, (count, example) in statistics["remarks"].items():
                if not self.remarks[kind]:
                    messages.append(f"{example} (said once; shoal_env_remarks_total counts {kind})")
                self.remarks[kind] += count
            for name, values in statistics["episode_metrics"].items():
                if name not in self._episode_metrics and len(self._episode_metrics) == MOST_METRICS:
                    continue
                self._episode_metrics.setdefault(name, deque(maxlen=RETURN_WINDOW)).extend(values)
        return messages

    def add_log_prob_errors(self, errors: Iterable[float]) -> None:
        """Add readings of the log-prob parity check."""
        for error in errors:
            self.log_prob_checks += 1
            self.last_log_prob_error = error
            # A NaN must not hide behind a comparison.
            self.max_log_prob_error = error if error != error else max(self.max_log_prob_error, error)


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}
