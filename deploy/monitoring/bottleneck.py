"""The bottleneck of a run and the setting to change, found from how actors and learner spend their time."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from shoal.deploy.monitoring.stall import TIMES_SLOWER
from shoal.learner.statistics import RunStatistics

Stage = Literal["environment", "inference", "transfer", "learner", "waiting", "staleness", "actors"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WINDOW_SECONDS = 30.0
STARVING = 0.2
"""If a learner waits for rollouts for this share of its time, acting is the bottleneck."""
TOO_LATE = 0.1
"""If this share of the steps arrives too late to be trained, staleness is the bottleneck."""
_TRANSFER = ("assemble", "publish", "parity_check", "checkpoint", "weight_metrics")


class Bottleneck(NamedTuple):
    """The limiting stage, and a sentence that says which setting to change."""

    stage: Stage
    sentence: str


class _Moment(NamedTuple):
    at: float
    stages: dict[str, float]
    sampled: int
    stale: int


class BottleneckMonitor:
    """Finds the bottleneck over the last ``WINDOW_SECONDS`` of a run, or over all of it.

    Args:
        statistics: of the run; those of all policies where several are trained, which share one training loop and the
            same actors, so that the time of each is a part of the whole.
        acting: whether the learners also act.
        num_processes: number of processes that act.
        num_learners: number of processes that learn.
    """

    def __init__(
        self, statistics: Sequence[RunStatistics], *, acting: bool, num_processes: int, num_learners: int = 1
    ) -> None:
        self._statistics, self._acting, self._num_processes = tuple(statistics), acting, num_processes
        self._num_learners = num_learners
        self._moments: deque[_Moment] = deque([self._moment()])
        self._lock = threading.Lock()

    def now(self) -> Bottleneck | None:
        """Return the bottleneck of the last ``WINDOW_SECONDS``, or what the run waits in where it has made no update in
        them, has been in this stage for as long, and for ``TIMES_SLOWER`` times its longest wait for an update.

        None before the first update, unless that takes as long, and between two that are far apart.
        """
        moment = self._moment()
        with self._lock:  # scrapes and the progress view call it from their own threads
            moments = self._moments
            if moment.at - moments[-1].at >= 1.0:
                moments.append(moment)
            while len(moments) > 1 and moment.at - moments[1].at >= WINDOW_SECONDS:
                moments.popleft()
            first = moments[0]
        found = self._between(first, moment)
        under_way = next(filter(None, (each.stage_under_way for each in self._statistics)), None)
        if found or under_way is None:
            return found
        stage, seconds = under_way
        # Where updates take their time, a window without one is nothing new.
        if seconds < max(WINDOW_SECONDS, TIMES_SLOWER * max(each.longest_wait for each in self._statistics)):
            return None
        return judge_stall(stage, seconds, acting=self._acting, num_learners=self._num_learners)

    def whole(self) -> Bottleneck | None:
        """Return the bottleneck of the run so far; None before the first update."""
        nothing = _Moment(self._moment().at - self._statistics[0].seconds, {}, 0, 0)
        return self._between(nothing, self._moment())

    def _moment(self) -> _Moment:
        seconds: dict[str, float] = {}
        for each in self._statistics:
            for stage, spent in dict(each.stage_seconds).items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        ledgers = [each.ledger for each in self._statistics]
        return _Moment(
            time.monotonic(),
            seconds,
            sum(ledger.sampled for ledger in ledgers),
            sum(ledger.dropped["stale"] for ledger in ledgers),
        )

    def _between(self, first: _Moment, last: _Moment) -> Bottleneck | None:
        seconds = {stage: spent - first.stages.get(stage, 0.0) for stage, spent in last.stages.items()}
        loop = sum(spent for stage, spent in seconds.items() if not stage.startswith("actor_") and stage != "reduce")
        if not seconds.get("update") or loop <= 0:
            return None
        # Measured by the training loop's clock, which stops when training ends: the final evaluation is not part of it.
        shares = {stage: spent / loop for stage, spent in seconds.items()}
        sampled = last.sampled - first.sampled
        too_late = (last.stale - first.stale) / sampled if sampled else 0.0
        return judge(shares, acting=self._acting, num_processes=self._num_processes, too_late=too_late)


def judge_stall(stage: str, seconds: float, *, acting: bool, num_learners: int) -> Bottleneck:
    """Name what a run waits in that makes no update.

    Args:
        stage: the stage of the training loop that is under way.
        seconds: how long it has been.
        acting: whether the learners also act.
        num_learners: number of processes that learn.
    """
    if stage == "wait" and acting:
        return Bottleneck(
            "actors",
            f"acting has not made a batch for {seconds:.0f} s: with mode=local and placement=disaggregated an "
            "environment that hangs is replaced",
        )
    if stage == "wait":
        return Bottleneck(
            "actors",
            f"no batch has arrived for {seconds:.0f} s: run.log and shoal_actors say what actors do; those that hang "
            "are replaced after actor.unroll_timeout_seconds",
        )
    if stage in _TRANSFER:
        return Bottleneck("transfer", f"{stage} has been under way for {seconds:.0f} s: a disk or Ray may hang")
    if num_learners > 1:
        return Bottleneck(
            "waiting",
            f"an update of {num_learners} learners has been under way for {seconds:.0f} s: one that hangs is given up "
            "after actor.unroll_timeout_seconds",
        )
    return Bottleneck(
        "learner", f"an update has been under way for {seconds:.0f} s: smaller batches (learner.batch_size)"
    )


def judge(shares: Mapping[str, float], *, acting: bool, num_processes: int, too_late: float) -> Bottleneck:
    """Find the bottleneck from seconds by stage (``RunStatistics.stage_seconds``) per second of the training loop.

    Args:
        acting: whether the learners also act.
        num_processes: number of processes that act; the seconds of actors are sums over them.
        too_late: share of the sampled steps that were dropped as stale.
    """
    environment, inference = (shares.get(f"actor_{name}", 0.0) / num_processes for name in ("env", "policy"))
    reduce = shares.get("reduce", 0.0)
    update = shares.get("update", 0.0) - reduce
    transfer = sum(shares.get(stage, 0.0) for stage in _TRANSFER)
    wait = 0.0 if acting else shares.get("wait", 0.0)
    if too_late > TOO_LATE:
        return Bottleneck(
            "staleness",
            f"{too_late:.0%} of the steps came too late to be trained: raise actor.max_policy_lag, shorten "
            "actor.unroll_length, or find the actors that are slower than the others",
        )
    if acting:
        parts: dict[Stage, float] = {
            "environment": environment,
            "inference": inference,
            "transfer": transfer,
            "learner": update,
            "waiting": reduce,
        }
    elif wait > STARVING:
        parts = {"environment": environment, "inference": inference}
    else:
        parts = {"transfer": transfer, "learner": update}
    stage = max(parts, key=lambda name: parts[name])
    share = f"{parts[stage]:.0%}"
    starving = f", and the learner waits for them {wait:.0%} of its own" if wait > STARVING else ""
    more = "more cores" if acting else "more actors (actor.num_actors)"
    match stage:
        case "environment":
            return Bottleneck(
                stage,
                f"stepping environments takes {share} of the actors' time{starving}: {more}, or an environment that "
                "steps all slots at once",
            )
        case "inference":
            return Bottleneck(
                stage,
                f"acting takes {share} of the actors' time{starving}: more slots per call (env.num_envs), or {more}",
            )
        case "transfer":
            return Bottleneck(
                stage,
                f"assembling, checking, publishing and saving take {share} of the learner's time: larger batches "
                "(learner.batch_size), or fewer checkpoints (checkpoint.every_updates)",
            )
        case "waiting":
            return Bottleneck(
                stage,
                f"learners wait for each other {share} of their time: larger minibatches (learner.minibatches, "
                "env.num_envs), or cores that nobody else uses",
            )
    return Bottleneck(
        "learner",
        f"updates take {share} of the learner's time: fewer optimizer steps (learner.epochs, learner.minibatches), "
        + ("more cores" if acting else "more gradient threads (learner.num_threads)")
        + ", or an accelerator",
    )
