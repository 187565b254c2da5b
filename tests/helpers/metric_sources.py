"""A run with something to report in every metric."""

from __future__ import annotations

import dataclasses
from collections import Counter

from rollouts import RUN, SMALL, random_columns
from shoal.deploy.monitoring.bottleneck import Bottleneck
from shoal.deploy.monitoring.catalogue import Sources
from shoal.deploy.monitoring.learning import Interval, Recorded, judge
from shoal.learner.data_share import PER_ACTOR
from shoal.learner.ledger import Ledger
from shoal.learner.opponents import Result
from shoal.learner.schedules import ScheduledSettings
from shoal.learner.statistics import RunStatistics, report_trajectories
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.learner.weight_metrics import WeightMetrics
from shoal.policy.trajectory import TrajectoryHeader, from_bytes, to_bytes

REPORTED = {
    "episode_returns": [1.0, -3.0],
    "episode_lengths": [7, 9],
    "policy_seconds": 0.25,
    "env_seconds": 0.5,
    "pack_seconds": 0.125,
    "ignored_tokens": 4,
    "episode_metrics": {"is_success": [1.0, 0.0, 1.0, 1.0]},
    "remarks": {"out_of_bounds": [3, "slot 2 left its bounds"]},
    "faults": ["slot 1 was restarted"],
}

TERMS = (
    *("loss", "policy_loss", "value_loss", "l2_init_loss", "entropy", "approx_kl", "update_kl", "clip_fraction"),
    *("grad_norm", "explained_variance", "advantage_std", "reward_error"),
)
"""Terms of an update with shoal's loss, and one that a loss of the user's adds."""


def make_sources() -> Sources:
    """A run that has something to say of everything."""
    ledger = Ledger(sampled=100, trained=60, in_flight=30, dropped=Counter(stale=7, non_finite=3))
    trajectory_queue = TrajectoryQueue(
        SMALL, run_id=RUN, num_actors=1, num_envs=4, batch_size=4, max_policy_lag=1, ledger=ledger
    )
    trajectory_queue.refused["duplicate"] += 2
    statistics = RunStatistics(ledger)
    header = TrajectoryHeader(run_id=RUN, actor=0, restart_index=0, sequence=0, policy_version=3, statistics=REPORTED)
    trajectory = from_bytes(SMALL, to_bytes(SMALL, header, random_columns(SMALL, 4, 0)))
    statistics.policy_version = 5
    restarted, remarked = statistics.add_reports(report_trajectories([trajectory], 5))
    assert restarted == "slot 1 was restarted"
    assert remarked.startswith("slot 2 left its bounds (said once; ")
    assert statistics.add_reports([]) == []
    for _ in range(PER_ACTOR - 1):
        statistics.data_share.add(0, 3)
    statistics.terms = {name: number / 4 for number, name in enumerate(TERMS)}
    statistics.gradient_norms = {"policy": 0.25, "value": 4.0}
    statistics.optimizer_steps = 40
    statistics.scheduled = ScheduledSettings(
        learning_rate=1e-3, entropy_coef=0.01, clip_coef=0.2, value_clip_coef=0.1, value_coef=0.5
    )
    numbers = {field.name: {"lstm": float(i)} for i, field in enumerate(dataclasses.fields(WeightMetrics))}
    statistics.weights = WeightMetrics(**numbers)
    statistics.staleness = {"stored": 0.1, "used": 0.02}
    statistics.add_log_prob_errors([1e-6])
    return Sources(
        statistics=statistics,
        trajectory_queue=trajectory_queue,
        actors_alive=lambda: 3,
        actor_restarts=lambda: {"died": 1},
        learning=lambda: judge(
            Recorded(returned=Interval(2.0, 0.5), random=Interval(2.1, 0.25), movement=0.1), expect_after=0.0
        ),
        bottleneck=lambda: Bottleneck("learner", "updates take all of it"),
        build={"python": "3", "shoal": "0.1"},
        about={"mode": "inline", "placement": "colocated"},
        actor_states=lambda: {"up": 3, "starting": 0, "unplaced": 2, "pausing": 0},
        lags=lambda: [0, 1, 2, 5],
        late_unrolls=lambda: 2,
        accelerator_memory=lambda: {"allocated": 7, "reserved": 8, "total": 9},
        finished=lambda: True,
        target_env_steps=1000,
        opponents=lambda: [
            Result(policy_version=0, games=9, win_share=0.75, return_difference=0.5),
            Result(policy_version=50, games=0, win_share=None, return_difference=None),
        ],
        callback_numbers=lambda: {"success": 0.5},
        failed_readings=Counter(shoal_broken=1),
    )
