"""Builds a learner and its rollout workers, in the run's own process and in every peer learner's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from shoal.actors.config import ActorConfig
from shoal.actors.pool import InlinePool
from shoal.actors.rollout import trajectory_spec
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.placement.layout import Share
from shoal.envs.boundary import EnvSpec
from shoal.learner.batch import BatchAssembler
from shoal.learner.config import LearnerConfig, RecorderConfig, SelfPlayConfig
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner import Learner
from shoal.learner.learner_worker import LearnerWorker
from shoal.learner.ledger import Ledger
from shoal.learner.opponents import OpponentPool
from shoal.learner.parity_check import LogProbParityCheck
from shoal.learner.recorder import Recorder
from shoal.learner.statistics import StageClock
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.config import Initialization
from shoal.policy.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RolloutProcesses:
    """Rollout actors in processes of their own, for every learner."""

    config: ActorConfig
    options: Mapping[str, Any]
    """Ray's options of each actor."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LearnerSetup:
    """All settings of one learner, as plain data that crosses to the processes of peer learners."""

    worker: WorkerSetup
    learner: LearnerConfig
    total_env_steps: int
    """Trained environment steps at which the run ends."""
    initialization: Initialization
    env: EnvSpec
    max_policy_lag: int
    max_consecutive_failures: int
    """Consecutive failures of a rollout worker in the learner's own process that end the run."""
    seed: int
    recorder: RecorderConfig
    self_play: SelfPlayConfig | None = None
    """None without self-play."""
    in_turn: bool = False
    """One thread acts and learns in turn, so that results must not depend on how long anything takes."""
    policy: str = ""
    """The policy's name, where others are trained in the same games (``learner.policy_queues``); else empty."""
    rollout_processes: RolloutProcesses | None = None
    """The rollout processes that feed a peer learner; None for workers in its own process."""

    def make_learner_worker(self, share: Share) -> LearnerWorker:
        """A learner with fresh weights and the trajectory queue that feeds it; equal in every process."""
        torch.manual_seed(self.seed)
        path = make_device_path(self.learner)
        policy = self.worker.make_policy(self.initialization).to(path.device)
        acting, shares_games = self.worker, bool(self.policy)
        contract = trajectory_spec(
            self.env, acting.unroll_length, acting.burn_in, policy.core.state_shapes, acting.carries_memory
        )
        learner = Learner(
            policy,
            self.learner,
            path,
            num_shards=share.num_shards,
            first_shard=share.first_shard,
            num_threads=share.num_threads,
            total_env_steps=self.total_env_steps,
            seed=self.seed,
        )
        if learner.statistics.observations is not None:
            learner.statistics.observations.name = self.policy
        worker = LearnerWorker(
            learner=learner,
            queue=TrajectoryQueue(
                contract,
                run_id=self.worker.run_id,
                num_actors=len(share.actors),
                num_envs=self.worker.num_envs,
                batch_size=share.batch_size,
                max_policy_lag=self.max_policy_lag,
                ledger=Ledger(),
                # Whose unrolls are late is not asked where several policies have to train the same ones.
                clock=_standing_still if self.in_turn or shares_games else time.monotonic,
                drops_stale=not shares_games,
            ),
            assembler=BatchAssembler(contract, share.batch_size, pin_memory=path.pin_memory),
            publish_to=_as_it_is,
            parity_check=LogProbParityCheck(policy, path, max_policy_lag=self.max_policy_lag),
            clock=StageClock(),
            recorder=Recorder(self.recorder, keeps_weights=share.first_shard == 0, policy=self.policy),
            opponents=OpponentPool(self.self_play) if self.self_play else None,
        )
        path.prepare(policy)
        return worker

    def make_pool(self, share: Share, queue: TrajectoryQueue, restart_index: int = 0) -> InlinePool:
        """The share's rollout workers, in this process."""
        return InlinePool(
            self.worker,
            share.actors,
            queue,
            restart_index=restart_index,
            max_consecutive_failures=self.max_consecutive_failures,
        )


def _standing_still() -> float:
    return 0.0


def _as_it_is(weights: Weights) -> Weights:
    return weights
