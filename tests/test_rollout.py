"""The rollout worker by itself: what it writes into a trajectory, and the memory it acts with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import RecallWithTimeLimits, Rollouts, SameStepRecall
from rollouts import make_policy as sharp_policy
from service import SMALL, make_setup, read_summary
from shoal.actors.episodes import EpisodeCounter
from shoal.actors.rollout import RolloutWorker
from shoal.deploy.cli import main
from shoal.policy.trajectory import Trajectory, from_bytes
from shoal.policy.weights import Weights, WeightsError, flatten_weights

SCRIPTED = "service_envs:Scripted-v0"


def unroll(worker: RolloutWorker, weights: Weights | None = None, **options: bool) -> Trajectory:
    payload = worker.rollout(weights or flatten_weights(worker.policy, 0), **options)
    return from_bytes(worker.spec, payload, run_id="test")


@pytest.mark.parametrize(
    ("env_id", "kwargs", "obs", "action"),
    [
        ("recall", {}, ((5,), np.float32), ((), np.int64)),
        (SCRIPTED, {}, ((4,), np.float32), ((), np.int64)),
        (SCRIPTED, {"actions": "multi"}, ((4,), np.float32), ((2,), np.int64)),
        (SCRIPTED, {"actions": "continuous"}, ((4,), np.float32), ((1,), np.float32)),
    ],
)
def test_shapes_and_nothing_unwritten(env_id: str, kwargs: dict[str, Any], obs: Any, action: Any) -> None:
    """Catches a column of another shape or type, and a row that nobody wrote."""
    worker = make_setup(env_id, **kwargs).make_worker(2, 0)
    for sequence in range(3):
        trajectory = unroll(worker)
        columns = trajectory.columns
        assert (columns["obs"].shape, columns["obs"].dtype) == ((4, 9, *obs[0]), obs[1])
        assert (columns["action"].shape, columns["action"].dtype) == ((4, 8, *action[0]), action[1])
        assert columns["is_first"].shape == (4, 9)
        for name in ("reward", "terminated", "truncated", "behavior_log_prob"):
            assert columns[name].shape == (4, 8)
        assert columns["initial_h"].shape == columns["initial_c"].shape == (4, 2, 128)
        for name, column in columns.items():
            if column.dtype.kind == "f":
                assert np.isfinite(column).all(), name
            elif name != "obs":
                assert column.min() >= 0, name
                assert column.dtype != np.uint8 or column.max() <= 1, name
        if action[1] == np.int64:
            assert (columns["behavior_log_prob"] <= 0).all()
        assert columns["training_env_id"].tolist() == [2 * 2**32 + slot for slot in range(4)]
        header = trajectory.header
        assert (header.actor, header.restart_index, header.sequence, header.policy_version) == (2, 0, sequence, 0)
        assert header.statistics["env_steps"] == trajectory.env_steps


def test_episodes_begin_where_the_environment_says() -> None:
    """Catches is_first a step early or late, a reward or an end on the wrong row, a step lost between unrolls."""
    worker = make_setup(SCRIPTED, unroll_length=7).make_worker(0, 0)
    trajectories = [unroll(worker) for _ in range(8)]
    for before, after in itertools.pairwise(trajectories):
        for name in ("obs", "is_first"):
            np.testing.assert_array_equal(before.columns[name][:, -1], after.columns[name][:, 0])
    rows = {n: np.concatenate([t.columns[n][:, :7] for t in trajectories], 1) for n in ("obs", "is_first", "reward")}
    ends = {n: np.concatenate([t.columns[n] for t in trajectories], 1) for n in ("terminated", "truncated")}
    for slot in range(4):
        episode, step = 0, 0
        for t in range(7 * 8 - 1):
            assert rows["obs"][slot, t, 2:].tolist() == [episode, step]
            assert rows["is_first"][slot, t] == (step == 0)
            length = 5 + episode % 3
            void = step == length
            over = step + 1 == length
            assert rows["reward"][slot, t] == (0 if void else step + 1)
            assert ends["terminated"][slot, t] == (over and episode % 2 == 0)
            assert ends["truncated"][slot, t] == (over and episode % 2 == 1)
            episode, step = (episode + 1, 0) if void else (episode, step + 1)
    finished = [pair for t in trajectories for pair in _episodes(t)]
    assert {(length, sum(range(length + 1))) for length in (5, 6, 7)} == set(finished)


def _episodes(trajectory: Trajectory) -> list[tuple[int, float]]:
    reported: Any = trajectory.header.statistics
    return list(zip(reported["episode_lengths"], reported["episode_returns"], strict=True))


@torch.no_grad()
def test_the_learner_can_recompute_what_the_actor_did() -> None:
    """Catches memory reset late, early or in another slot, a state shipped from the wrong step, stale weights."""
    worker = make_setup("recall", num_envs=6, unroll_length=10).make_worker(0, 0)
    policy = worker.policy
    state = policy.initial_state(6)
    for version in range(4):
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
        weights = flatten_weights(policy, version)
        columns = unroll(worker, weights).columns
        for part, name in zip(state, ("initial_h", "initial_c"), strict=True):
            torch.testing.assert_close(torch.from_numpy(columns[name].copy()).transpose(0, 1), part)
        for t in range(10):
            is_first = torch.from_numpy(columns["is_first"][:, t].astype(bool))
            output, state = policy.step(torch.from_numpy(columns["obs"][:, t].copy()), is_first, state)
            log_prob, _ = policy.actions.evaluate(output.logits, torch.from_numpy(columns["action"][:, t].copy()))
            np.testing.assert_allclose(log_prob, columns["behavior_log_prob"][:, t], atol=1e-5)
        memory = policy.get_memory()
        for slot, env_id in enumerate(worker.training_env_ids):
            for part, kept in zip(state, memory[env_id], strict=True):
                torch.testing.assert_close(part[:, slot], kept)


def test_slots_share_nothing() -> None:
    """Catches two slots, actors or restart indices that play the same episodes, or write into one memory."""
    setup = make_setup(SCRIPTED, num_envs=3)
    workers = [setup.make_worker(*identity) for identity in ((0, 0), (1, 0), (2, 0), (0, 1))]
    columns = [unroll(worker).columns for worker in workers]
    seeds = {tuple(row) for c in columns for row in c["obs"][:, 0, :2].tolist()}
    assert len(seeds) == 12
    assert len({worker.training_env_ids for worker in workers}) == 3  # a replacement takes over its actor's ids
    assert len(set().union(*(worker.training_env_ids for worker in workers))) == 9
    assert len({c["action"].tobytes() for c in columns}) == 4
    again = unroll(setup.make_worker(1, 0)).columns
    assert all(np.array_equal(again[name], column) for name, column in columns[1].items())


def test_only_the_published_weights_are_used() -> None:
    """Catches weights damaged on their way, of another policy, or older than those that acted before."""
    worker = make_setup("recall").make_worker(0, 0)
    weights = flatten_weights(worker.policy, 3)
    unroll(worker, weights)
    bad = weights.flat.copy()
    bad[7] += 1
    for wrong, message in (
        (Weights(4, bad, weights.content_hash), "expected content hash"),
        (Weights(2, weights.flat, weights.content_hash), "version 2 after those of 3"),
        (flatten_weights(torch.nn.Linear(2, 2), 5), "parameters, got 6"),
    ):
        with pytest.raises(WeightsError, match=message):
            unroll(worker, wrong)
    assert unroll(worker, weights).header.policy_version == 3


steps = st.lists(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 2.0]), st.sampled_from(["", "end", "fault"]), st.booleans()),
        min_size=3,
        max_size=3,
    ),
    max_size=25,
)


@given(script=steps, same_step=st.booleans())
def test_episodes_are_counted_as_a_slow_reference_does(script: list[list[tuple[float, str, bool]]], same_step) -> None:
    """Catches void steps that count, rewards that leak into the next episode, cut or short episodes taken for whole."""
    counter = EpisodeCounter(3)
    expected: list[tuple[float, int]] = []
    rewards: list[list[float]] = [[], [], []]
    ended = [False] * 3
    short = [True] * 3
    for row in script:
        void = np.array([(ended[slot] and not same_step) or row[slot][1] == "fault" for slot in range(3)])
        reward = np.array([0.0 if v else r for v, (r, _, _) in zip(void, row, strict=True)])
        ends = np.array([not v and what == "end" for v, (_, what, _) in zip(void, row, strict=True)])
        begins = void | (ends & same_step)
        counter.add(reward, begins, ends, np.array(short))
        for slot in range(3):
            rewards[slot] = [] if void[slot] else [*rewards[slot], reward[slot]]
            if ends[slot] and not short[slot]:
                expected.append((sum(rewards[slot]), len(rewards[slot])))
            rewards[slot] = [] if begins[slot] else rewards[slot]
            short[slot] = row[slot][2] if begins[slot] else short[slot]
            ended[slot] = bool(ends[slot])
    found = counter.drain()
    assert list(zip(found["episode_returns"], found["episode_lengths"], strict=True)) == expected
    assert not any(counter.drain().values())


@pytest.mark.parametrize("envs", [RecallWithTimeLimits, SameStepRecall])
@pytest.mark.parametrize("burn_in", [0, 3])
def test_where_unrolls_are_cut_changes_nothing(envs: Any, burn_in: int) -> None:
    """Catches a row, an action, a state or a reset that is lost, repeated or made up between two unrolls."""
    streams = []
    for length in (6, 10, 30):
        rollouts = Rollouts(envs(4, 0), unroll_length=length, burn_in=burn_in, seed=3)
        policy = sharp_policy(rollouts.observation, rollouts.actions)
        batches = [rollouts.batch(policy, 0).clone() for _ in range(60 // length)]
        for before, after in itertools.pairwise(batches):
            for name in ("obs", "is_first"):
                assert torch.equal(before[name][:, -1], after[name][:, 0])
                if burn_in:
                    assert torch.equal(before[name][:, -1 - burn_in : -1], after[f"burn_in_{name}"])
        names = ("action", "behavior_log_prob", "reward", "terminated", "truncated")
        stream = {name: torch.cat([batch[name] for batch in batches], 1) for name in names}
        stream["obs"] = torch.cat([batch["obs"][:, :-1] for batch in batches], 1)
        stream["is_first"] = torch.cat([batch["is_first"][:, :-1] for batch in batches], 1)
        for row, t in enumerate(range(0, 60, length)):  # the states at the cuts that all lengths share
            if t % 30 == 0:
                stream[f"h{t}"] = batches[row]["initial_h"]
        streams.append(stream)
    for stream in streams[1:]:
        for name, column in streams[0].items():
            torch.testing.assert_close(stream[name], column, rtol=0, atol=1e-6)
    assert streams[0]["terminated"].any()
    assert streams[0]["truncated"].any()


@pytest.mark.parametrize("start", ["actor.burn_in=5", "learner.refresh_states=true"])
def test_fresher_memory_trains_and_is_measured(tmp_path: Path, start: str) -> None:
    """Catches an option that the service does not hand on, books that count burn-in rows, a false alarm."""
    settings = (start, "actor.max_policy_lag=2", "mode=inline", "total_env_steps=2500", "env.kwargs={delay: 20}")
    assert main(["train", *SMALL, *settings, f"run_dir={tmp_path / 'run'}"]) == 0
    summary = read_summary(tmp_path / "run")
    assert summary["ledger"]["dropped"] == {}
    assert summary["log_prob_checks"] >= 1


@pytest.mark.parametrize("actions", ["discrete", "multi", "continuous"])
def test_every_kind_of_action_trains(tmp_path: Path, actions: str) -> None:
    """Catches a head that acts but does not train, or trains on other log-probabilities than it acted with."""
    settings = (
        *SMALL,
        f"env.id={SCRIPTED}",
        f"env.kwargs={{actions: {actions}}}",
        "mode=inline",
        "total_env_steps=300",
        "evaluation.random_seconds=1",
    )
    assert main(["train", *settings, f"run_dir={tmp_path / 'run'}"]) == 0
    summary = read_summary(tmp_path / "run")
    assert summary["policy_version"] >= 3
    assert summary["log_prob_checks"] >= 3
    assert (summary["mean_return"], summary["random_return"]) != (None, None)
