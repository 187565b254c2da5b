"""A test whether clipping and the L2-init loss keep a policy able to learn: ``shoal bench plasticity [--json]``.

One task after another with the same observations: in every phase, chance picks anew which action each of 16 patterns
asks for. A fresh policy (phase 1) shows what can be earned in that time. One that loses its plasticity earns less from
phase to phase, though no phase is harder than the first; the entropy says whether it is exploration that it lacks.
Learner, policy and rollout worker are the service's own, in one process; the variants differ in
``learner.regularization`` alone. Adam's settings are the original trainer's but for the learning rate, which is four
times its own, so that the loss shows within minutes: about 15 for the whole, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.envs.boundary import DiscreteActions, EnvSpec, StepRows, VectorSpace
from shoal.learner.activations import ActivationSampler
from shoal.learner.batch import BatchAssembler
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath
from shoal.learner.learner import Learner
from shoal.learner.weight_metrics import measure_weights
from shoal.policy import FastPolicy
from shoal.policy.allocator import keep_freed_memory
from shoal.policy.config import Initialization, RegularizationConfig
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights

NUM_ENVS, UNROLL_LENGTH = 32, 4
PATTERNS, SIZE, ACTIONS = 16, 16, 4
CLIP = {"clip_scale": 2.0}
L2_INIT = {"l2_init_coef": 1e-3}
VARIANTS: dict[str, dict[str, float]] = {"plain": {}, "clip": CLIP, "l2_init": L2_INIT, "both": {**CLIP, **L2_INIT}}


class ShiftingPatterns:
    """Every step shows one of ``PATTERNS`` fixed patterns; the action it asks for earns 1. It goes on for ever."""

    def __init__(self, num_envs: int, seed: int) -> None:
        names = tuple(f"action_{i}" for i in range(ACTIONS))
        self.spec = EnvSpec(
            env_id="patterns", observation=VectorSpace(size=SIZE), actions=DiscreteActions(names=(names,))
        )
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, np.bool_)
        self._rng = np.random.default_rng(seed)
        self._patterns = self._rng.normal(size=(PATTERNS, SIZE)).astype(np.float32)
        self._shown = np.zeros(num_envs, np.int64)
        self.shift()

    def shift(self) -> None:
        """Begin a phase: another action for each pattern, by chance."""
        self._asked = self._rng.integers(ACTIONS, size=PATTERNS)

    def reset(self, obs: np.ndarray) -> None:
        """Show a pattern in every slot."""
        self._shown = self._rng.integers(PATTERNS, size=self.num_envs)
        obs[:] = self._patterns[self._shown]

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Pay, and show the next patterns."""
        rows.reward[:] = action == self._asked[self._shown]
        rows.is_first[:] = rows.terminated[:] = rows.truncated[:] = False
        self.reset(rows.obs)

    def close(self) -> None:
        """Nothing is held."""


def train(regularization: RegularizationConfig, *, seed: int, phases: int, updates: int) -> list[dict[str, float]]:
    """The mean reward of all steps of each phase, and the state of the weights at its end."""
    torch.manual_seed(seed)
    envs = ShiftingPatterns(NUM_ENVS, seed)
    observation, actions = observation_of(envs.spec), actions_of(envs.spec)
    policy = FastPolicy(observation, actions, initialization=Initialization(lstm_bias="zeros"))
    config = LearnerConfig(
        device="cpu",
        batch_size=NUM_ENVS,
        epochs=4,
        minibatches=2,
        learning_rate=2e-3,
        gamma=0.0,
        clip_coef=0.2,
        value_clip_coef=0.0,
        entropy_coef=0.05,
        regularization=regularization,
    )
    learner = Learner(policy, config, DevicePath(torch.device("cpu")), num_threads=1, seed=seed)
    worker = RolloutWorker(
        envs, FastPolicy(observation, actions), UNROLL_LENGTH, run_id="bench", actor=0, restart_index=0, seed=seed
    )
    assembler = BatchAssembler(worker.spec, NUM_ENVS)
    activations = ActivationSampler(policy)
    history = []
    for _ in range(phases):
        envs.shift()
        rewards = []
        entropy = float("nan")
        for _ in range(updates):
            payload = worker.rollout(flatten_weights(policy, learner.policy_version))
            batch = assembler.assemble([from_bytes(worker.spec, payload)])
            rewards.append(float(batch["reward"].mean()))
            entropy = learner.update(batch).terms["entropy"]
        weights = measure_weights(learner.regularizer, activations.sample(batch))
        history.append(
            {
                "reward": statistics.mean(rewards),
                "entropy": entropy,
                "norm": sum(norm**2 for norm in weights.norm.values()) ** 0.5,
                "distance": sum(distance**2 for distance in weights.distance_to_init.values()) ** 0.5,
                "lowest_rank": min(weights.effective_rank[layer] for layer in ("encoded_obs", "lstm", "actor_1")),
                "dormant": max(weights.dormant_units_ratio.values()),
            }
        )
    return history


def summarize(runs: Sequence[Sequence[dict[str, float]]], last: int) -> dict[str, list[float]]:
    """[median, lowest, highest] over seeds of every number: rewards of the first phase and of the ``last`` ones."""

    def spread(values: Sequence[float]) -> list[float]:
        return [statistics.median(values), min(values), max(values)]

    rewards = [[phase["reward"] for phase in run] for run in runs]
    found = {
        "first": spread([run[0] for run in rewards]),
        "last": spread([statistics.mean(run[-last:]) for run in rewards]),
    }
    return {**found, **{name: spread([run[-1][name] for run in runs]) for name in runs[0][0] if name != "reward"}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train every variant from every seed, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phases", type=int, default=8)
    parser.add_argument("--updates", type=int, default=40, help="per phase")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--last", type=int, default=3, help="phases that the table calls the last")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        for name, settings in VARIANTS.items():
            start = time.perf_counter()
            history = train(RegularizationConfig(**settings), seed=seed, phases=options.phases, updates=options.updates)
            runs[name].append(history)
            by_phase = " ".join(f"{phase['reward']:.2f}" for phase in history)
            print(f"seed {seed} {name:<8} {by_phase}   {time.perf_counter() - start:.0f} s", flush=True)
    table: dict[str, Any] = {name: summarize(of_seeds, options.last) for name, of_seeds in runs.items()}
    print(
        f"\nmean reward per step (chance {1 / ACTIONS:.2f}, best 1), {options.phases} phases of {options.updates} "
        f"updates on {NUM_ENVS * UNROLL_LENGTH} steps each; median [lowest .. highest] of {options.seeds} seeds"
    )
    columns = {"first": "phase 1", "last": f"last {options.last}", "entropy": "entropy", "norm": "norm"}
    columns |= {"distance": "distance to init", "lowest_rank": "lowest rank", "dormant": "highest dormant"}
    print(" " * 10 + "".join(f"{title:>24}" for title in columns.values()))
    for name, row in table.items():
        cells = (f"{row[key][0]:.3g} [{row[key][1]:.3g} .. {row[key][2]:.3g}]" for key in columns)
        print(f"  {name:<8}" + "".join(f"{cell:>24}" for cell in cells))
    if options.json:
        print(json.dumps({"variants": table, "runs": runs}))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
