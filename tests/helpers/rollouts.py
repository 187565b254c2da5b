"""Tests of the learner train on these: real rollouts with episodes ending inside unrolls, and random batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import yaml
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.deploy.settings.load import CONFIGS
from shoal.envs.boundary import ContinuousActions, DiscreteActions, EnvSpec, VectorSpace
from shoal.envs.recall import RecallEnvironment
from shoal.learner.batch import BatchAssembler
from shoal.learner.config import LearnerConfig
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner import Learner
from shoal.policy import ComponentPolicy, FastPolicy, VectorObservation
from shoal.policy.graph import core_component
from shoal.policy.trajectory import TrajectoryHeader, TrajectorySpec, allocate, from_bytes, to_bytes
from shoal.policy.weights import flatten_weights
from slow_reference import ENDS, draw_boundaries

RUN = "a-run"
ORIGINAL = yaml.safe_load((CONFIGS / "original.yaml").read_text())["learner"] | {"adam_eps": 1e-12}
"""The section ``learner`` of ``--config original``; YAML 1.1 takes 1e-12 for a string."""


class RecallWithTimeLimits(RecallEnvironment):
    """``recall`` in which every other slot's episodes end by truncation."""

    def step(self, action, rows):
        """As ``recall``, with the ends of odd slots called truncations."""
        super().step(action, rows)
        rows.truncated[1::2] = rows.terminated[1::2]
        rows.terminated[1::2] = False


class SameStepRecall(RecallEnvironment):
    """``recall`` in the same-step form, every other slot ending by truncation with an observation of its own."""

    def __init__(self, num_envs, seed, **settings):
        super().__init__(num_envs, seed, **settings)
        self.spec = dataclasses.replace(self.spec, same_step=True)

    def step(self, action, rows):
        """As ``recall``, but a new episode begins where one ends."""
        super().step(action, rows._replace(final_obs=None))
        ended = rows.terminated.copy()
        assert not rows.is_first.any()
        rows.final_obs[ended] = rows.obs[ended] - 0.5
        rows.truncated[1::2] = rows.terminated[1::2]
        rows.terminated[1::2] = False
        rows.is_first[:] = ended
        rows.obs[ended] = 0.0
        if ended.any():
            self._begin(np.flatnonzero(ended), rows.obs)


class NoiseEnvironment:
    """Random observations, rewards and ends; for actions of any kind."""

    def __init__(self, num_envs, actions, seed=0):
        self.spec = EnvSpec(env_id="noise", observation=VectorSpace(size=3), actions=actions)
        self.num_envs, self.faults, self.short_episode = num_envs, [], np.zeros(num_envs, bool)
        self._rng = np.random.default_rng(seed)
        self._ended = np.zeros(num_envs, bool)

    def reset(self, obs):
        """The first observations."""
        obs[:] = self._rng.normal(size=obs.shape)

    def step(self, action, rows):
        """One episode in five steps ends, in either way."""
        self.reset(rows.obs)
        rows.is_first[:] = self._ended
        ends, terminates = self._rng.random((2, self.num_envs)) < np.array([[0.2], [0.5]])
        self._ended = ends & ~rows.is_first
        rows.terminated[:], rows.truncated[:] = self._ended & terminates, self._ended & ~terminates
        rows.reward[:] = np.where(rows.is_first, 0.0, self._rng.normal(size=self.num_envs))

    def close(self):
        """Nothing is held."""


ACTIONS = {
    "discrete": DiscreteActions(names=(("a", "b", "c"),)),
    "several": DiscreteActions(names=(("a", "b", "c"), ("d", "e")), scalar=False),
    "continuous": ContinuousActions(names=("x", "y"), low=(-1.0, -1.0), high=(1.0, 1.0)),
}


def make_policy(observation, actions, seed=0, core="lstm"):
    """A policy whose memory and actions matter as much as in a trained one; a fresh one is nearly uniform."""
    torch.manual_seed(seed)
    policy = FastPolicy(observation, actions, core=core)
    with torch.no_grad():
        policy.action_embeddings.weight.mul_(10)
        policy.actor_W.mul_(3)
        policy.encoded_obs.weight.mul_(3)
        if core == "lstm":
            policy.lstm.weight_ih_l1.mul_(2)
    return policy


def make_learner(policy, *, num_threads=1, num_shards=None, first_shard=0, total_env_steps=None, seed=0, **settings):
    """A learner on the CPU, with the original trainer's coefficients."""
    config = LearnerConfig(**{**ORIGINAL, "device": "cpu", "precision": "float32", **settings})
    return Learner(
        policy,
        config,
        make_device_path(config),
        num_threads=num_threads,
        num_shards=num_shards,
        first_shard=first_shard,
        total_env_steps=total_env_steps,
        seed=seed,
    )


class Rollouts:
    """A worker that acts with a learner's newest weights, and the batches that its unrolls make."""

    def __init__(self, envs, *, unroll_length=32, seed=0, burn_in=0, core="lstm", reset_memory="episode"):
        self.observation, self.actions = observation_of(envs.spec), actions_of(envs.spec)
        self.worker = RolloutWorker(
            envs,
            FastPolicy(self.observation, self.actions, core=core),
            unroll_length,
            run_id=RUN,
            actor=0,
            restart_index=0,
            seed=seed,
            burn_in=burn_in,
            reset_memory=reset_memory,
        )
        self.assembler = BatchAssembler(self.worker.spec, envs.num_envs)

    def batch(self, policy, policy_version):
        """One unroll, over the wire, as a batch."""
        payload = self.worker.rollout(flatten_weights(policy, policy_version))
        return self.assembler.assemble([from_bytes(self.worker.spec, payload, run_id=RUN)])


def random_columns(spec, num_slots, seed, num_actions=3):
    """Columns of one unroll with random numbers and boundaries of every kind."""
    rng = np.random.default_rng(seed)
    columns = allocate(spec, num_slots)
    for column in columns.values():
        if column.dtype.kind == "f":
            column[:] = rng.normal(0, 0.7, column.shape)
    columns["training_env_id"][:] = np.arange(num_slots)
    columns["action"][:] = rng.integers(0, num_actions, columns["action"].shape)
    columns["behavior_log_prob"][:] = -np.abs(columns["behavior_log_prob"]) - 0.3
    for b in range(num_slots):
        ends = rng.choice(ENDS, 20)
        lengths = rng.integers(1, rng.choice([4, 9, 40]), 20)
        columns["is_first"][b], columns["terminated"][b], columns["truncated"][b] = draw_boundaries(
            lengths, ends, spec.unroll_length, begins_void=rng.random() < 0.2, same_step=spec.same_step
        )
        columns["is_first"][b, 0] = rng.random() < 0.3
    if spec.carries_memory:
        columns["memory_reset"][:] = columns["is_first"] & (rng.random(columns["is_first"].shape) < 0.3)
    if spec.burn_in:
        columns["burn_in_is_first"][:] = rng.random(columns["burn_in_is_first"].shape) < 0.15
    return columns


SMALL = TrajectorySpec(12, (3,), "float32", (), "int64")


def random_batch(seed, *, spec=SMALL, num_slots=7, policy_version=0, **changes):
    """The columns above as a batch, by way of the wire; ``changes`` are those of ``spec``."""
    spec = dataclasses.replace(spec, **changes)
    header = TrajectoryHeader(run_id=RUN, actor=0, restart_index=0, sequence=0, policy_version=policy_version)
    payload = to_bytes(spec, header, random_columns(spec, num_slots, seed))
    return BatchAssembler(spec, num_slots).assemble([from_bytes(spec, payload)])


def small_policy(seed=0, core="lstm"):
    """The policy of ``SMALL``."""
    return make_policy(VectorObservation(3), ["a", "b", "c"], seed, core)


TINY_HIDDEN = 4


def tiny_policy(core="lstm", observation=None, actions=("a", "b", "c"), seed=0):
    """A policy, by default of ``SMALL``, with a handful of units, sharpened too: for properties that are tried on many
    cases."""
    torch.manual_seed(seed)
    sizes = {"fc1": 6, "encoded_obs": 5, core_component(core): TINY_HIDDEN, "critic_1": 6, "actor_1": 6}
    components = {name: {"size": size} for name, size in sizes.items()}
    policy = ComponentPolicy(observation or VectorObservation(3), actions, 3, components=components, core=core)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3)
    return policy


def state_of(policy):
    """``TrajectorySpec.state_shapes`` of the policy's core."""
    return tuple(policy.core.state_shapes.items())
