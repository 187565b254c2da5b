"""The result of a run as plain data: ``RUN/summary.json``."""

from __future__ import annotations

import dataclasses
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.actors.pool import Recoveries
from shoal.deploy.monitoring.bottleneck import Bottleneck
from shoal.deploy.monitoring.learning import Learning
from shoal.deploy.placement.versions import versions
from shoal.deploy.records.evaluations import Evaluations
from shoal.learner.ledger import Ledger
from shoal.learner.opponents import Result
from shoal.learner.statistics import RunStatistics
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.weights import Weights


def summarize(
    statistics: RunStatistics,
    trajectory_queue: TrajectoryQueue,
    *,
    actor_restarts: int,
    recoveries: Recoveries,
    weights: Weights | None,
    trained_before: int,
    learning: Learning,
    interrupted_by: int | None,
    stopped_by: str | None,
    limit: Bottleneck | None,
    evaluations: Evaluations,
    opponents: Sequence[Result] | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The summary of a run that is over.

    Args:
        actor_restarts: actors replaced.
        weights: the last published ones; None where training failed.
        trained_before: trained environment steps of the runs that this one resumed.
        learning: whether it learned.
        interrupted_by: the signal that ended the run.
        stopped_by: what ended the run before its last step: ``signal``, ``max_seconds``, ``callback``,
            ``ray_lost``, or None.
        limit: the bottleneck over the whole run.
        opponents: results against the versions of self-play; None without it.
        about: further entries that say which run it was.
    """
    ledger, seconds, lag = trajectory_queue.ledger, statistics.seconds, statistics.policy_lag
    return {
        **about,
        "env_steps": ledger.trained,
        "policy_version": statistics.policy_version,
        "session_env_steps": ledger.trained - trained_before,
        "session_updates": statistics.updates,
        "env_steps_per_second": (ledger.trained - trained_before) / seconds if seconds else 0.0,
        "wall_seconds": seconds,
        "mean_return": statistics.mean_return,
        "return_ci95": learning.returned.half_width if learning.returned else None,
        "episodes": statistics.all_episodes,
        "evaluation": _evaluation(evaluations),
        "random_return": learning.random.mean if learning.random else None,
        "random_return_ci95": learning.random.half_width if learning.random else None,
        "learning": learning.words(),
        "max_log_prob_error": statistics.max_log_prob_error,
        "log_prob_checks": statistics.log_prob_checks,
        "actor_restarts": actor_restarts,
        "actor_recovery_seconds": {
            "count": recoveries.count,
            "mean": recoveries.seconds / recoveries.count if recoveries.count else None,
            "max": recoveries.slowest if recoveries.count else None,
        },
        "env_faults": statistics.env_faults,
        "env_fault_share": statistics.fault_share,
        "slots_begun_anew": statistics.slots_begun_anew,
        "episode_metrics": statistics.episode_metrics,
        "self_play": None if opponents is None else [dataclasses.asdict(result) for result in opponents],
        "opponent_env_steps": statistics.opponent_env_steps,
        "env_remarks": dict(statistics.remarks),
        "skipped_updates": statistics.skipped_updates,
        "optimizer_steps": statistics.optimizer_steps,
        "lost_unrolls": trajectory_queue.lost_unrolls,
        "refused_trajectories": dict(trajectory_queue.refused),
        "ledger": ledger.to_json(),
        "books_balance": ledger.balance() == 0,
        "weights_sha256": weights.sha256 if weights else None,
        "actor_data_share": statistics.data_share.ratios() or None,
        "policy_lag": {"mean": lag.mean if lag.count else None, "max": lag.max if lag.count else None},
        "stage_seconds": {stage: round(value, 3) for stage, value in statistics.stage_seconds.items()},
        "limit": limit._asdict() if limit else None,
        "stopped_by": stopped_by,
        "interrupted_by": signal.Signals(interrupted_by).name if interrupted_by else None,
        "versions": versions(),
    }


def together(policies: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The summary of a run of several policies, from those of each by name.

    What a policy earns and how it learns (``mean_return``, ``learning``, ``policy_lag``, ``max_log_prob_error`` and the
    like) is under ``policies`` alone. An unroll of an actor has a trajectory for each: one that was lost or refused
    counts once.
    """
    first, *_ = all_ = list(policies.values())
    steps = ("env_steps", "session_env_steps", "env_steps_per_second")
    same = ("env_id", "seed", "policy_kind", "wall_seconds", "limit", "stopped_by", "interrupted_by", "versions")
    of_actors = ("actor_restarts", "actor_recovery_seconds", "lost_unrolls", "refused_trajectories")
    # The faults of a game are told to one policy.
    added = ("episodes", "env_faults", "skipped_updates")
    ledger = Ledger()
    for each in all_:
        ledger.add(Ledger(**{**each["ledger"], "dropped": Counter(each["ledger"]["dropped"])}))
    return {
        **{name: first[name] for name in same},
        **{name: sum(each[name] for each in all_) for name in steps},
        "policy_version": max(each["policy_version"] for each in all_),
        **{name: sum(each[name] for each in all_) for name in added},
        "ledger": ledger.to_json(),
        "books_balance": all(each["books_balance"] for each in all_),
        **{name: first[name] for name in of_actors},
        "policies": dict(policies),
    }


def _evaluation(evaluations: Evaluations) -> dict[str, Any] | None:
    """The evaluations during training; None where there was none."""
    last, best = evaluations.last, evaluations.best
    if last is None and not evaluations.failed:
        return None
    return {
        "made": evaluations.count,
        "failed": evaluations.failed,
        "last": last.to_json() if last else None,
        "best": best.to_json() if best else None,
    }
