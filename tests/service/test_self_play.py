"""Self-play in a rollout worker: who plays whom, what frozen versions do, and what of it is training data."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from duels import Duels
from hypothesis import given
from hypothesis import strategies as st
from rollouts import tiny_policy
from scripted_vectors import Rows
from shoal.actors.rollout import RolloutWorker
from shoal.actors.self_play import LARGEST_ERROR, Games, SelfPlayEnvironment, divide_games
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.envs.reports import Reports
from shoal.learner.plain_file import load_plain, save_plain
from shoal.policy.actions import legal
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.trajectory import Trajectory, from_bytes
from shoal.policy.weights import Opponent, Weights, WeightsError, flatten_weights

T = 5


class Played:
    """A worker of self-play games, with everything that happened in them."""

    def __init__(
        self,
        games: Games,
        *,
        same_step: bool = False,
        masked: bool = False,
        burn_in: int = 0,
        seed: int = 0,
        reports: bool = False,
        **cut: Any,
    ) -> None:
        self.games = games
        count = games.against_versions + games.among_themselves
        self.duels = Duels(count, games.num_agents, same_step=same_step, masked=masked, **cut)
        if reports:
            self.duels.reports = Reports()  # type: ignore[attr-defined]
        spec = self.duels.spec
        self.observation, self.actions = observation_of(spec), actions_of(spec)
        self.fetched: list[int] = []
        self._weights: dict[int, Weights] = {}
        self.env = SelfPlayEnvironment(
            self.duels, games, lambda: self.policy(0), self._fetch, np.random.SeedSequence(seed)
        )
        self.worker = RolloutWorker(
            self.env, self.policy(0), T, run_id="test", actor=0, restart_index=0, seed=seed, burn_in=burn_in
        )
        self.duels.watch = self._watch
        self.trained: list[list[int]] = []
        """The slots of trained agents, by step."""
        self.versions: list[list[int | None]] = []
        """The versions that play the other agents, by step and game."""
        self.uniform: list[torch.Tensor] = []
        """What the frozen agents' actions were drawn by, by step."""
        self.trajectories: list[Trajectory] = []

    def policy(self, version: int) -> RecurrentPolicy:
        return tiny_policy(observation=self.observation, actions=self.actions, seed=version)

    def weights(self, version: int) -> Weights:
        if version not in self._weights:
            self._weights[version] = flatten_weights(self.policy(version), version)
        return self._weights[version]

    def opponents(self, versions: Sequence[int], chances: Sequence[float] | None = None) -> tuple[Opponent, ...]:
        chances = chances or [1 / len(versions)] * len(versions)
        return tuple(Opponent(version, chance, version) for version, chance in zip(versions, chances, strict=True))

    def _fetch(self, version: int) -> Weights:
        self.fetched.append(version)
        return self.weights(version)

    def _watch(self) -> None:
        places = self.env._places
        self.trained.append(self.env._slot_of_row.tolist())
        self.versions.append([places[place].version for place in self.env._place])

    def unroll(self, version: int, opponents: tuple[Opponent, ...]) -> Trajectory:
        state = self.env._generator.get_state()
        stream = torch.Generator()
        stream.set_state(state)
        self.uniform += [1 - torch.rand((self.duels.num_envs, 1), generator=stream) for _ in range(T)]
        weights = dataclasses.replace(self.weights(version), opponents=opponents)
        payload = self.worker.rollout(weights)
        self.trajectories.append(from_bytes(self.worker.spec, payload, run_id="test"))
        return self.trajectories[-1]

    def play(self, unrolls: int) -> Played:
        """The pool gains a version every other unroll."""
        for version in range(unrolls):
            self.unroll(version, self.opponents(range(version // 2 + 1)))
        return self


CASES = [
    ({}, Games(against_versions=4, among_themselves=2, num_agents=2, versions_at_once=2)),
    ({"masked": True}, Games(against_versions=5, among_themselves=1, num_agents=3, versions_at_once=3)),
    ({"same_step": True}, Games(against_versions=6, among_themselves=0, num_agents=2, versions_at_once=2)),
    (
        {"same_step": True, "masked": True, "burn_in": 2},
        Games(against_versions=3, among_themselves=1, num_agents=3, versions_at_once=2),
    ),
]
cases = pytest.mark.parametrize(("settings", "games"), CASES, ids=["next step", "masked", "same step", "burn-in"])


@torch.no_grad()
@cases
def test_a_frozen_agent_acts_as_its_version_with_its_memory(settings: dict[str, Any], games: Games) -> None:
    """Catches another version's weights, a memory that is shared, lost within a game or kept beyond it, an observation,
    mask or random number of another slot. The reference plays every frozen agent alone, one step at a time."""
    played = Played(games, **settings).play(16)
    policies = {version: played.policy(version) for version in range(8)}
    compared: Counter[int] = Counter()
    for slot in range(games.against_versions * games.num_agents):
        game, state = slot // games.num_agents, None
        obs, is_first = played.duels.first[slot], True
        for t, (actions, rows, masks) in enumerate(played.duels.log):
            version = played.versions[t][game]
            if slot not in played.trained[t]:
                assert version is not None
                policy = policies[version]
                output, state = policy.step(torch.from_numpy(obs)[None], torch.tensor([is_first]), state)
                mask = torch.from_numpy(masks[slot : slot + 1] != 0) if settings.get("masked") else None
                action, _ = policy.actions.sample(legal(output.logits, mask), played.uniform[t][slot : slot + 1])
                assert action.item() == actions[slot], (slot, t)
                compared[version] += 1
            obs, is_first = rows.obs[slot], bool(rows.is_first[slot])
    assert len(compared) >= 6
    assert min(compared.values()) >= 5


@torch.no_grad()
@cases
def test_trained_agents_are_trained_as_without_opponents(settings: dict[str, Any], games: Games) -> None:
    """Catches a row of a frozen agent among the training data, a result or an observation of another agent, a state of
    the game before: every row is what its agent saw, did and got, and the learner can recompute it."""
    played = Played(games, **settings).play(12)
    policies = [played.policy(version) for version in range(12)]
    count, steps = games.num_rows, 12 * T
    assert played.env.num_envs == count
    for row in range(count):
        state = policies[0].initial_state(1)
        for t in range(steps):
            columns = played.trajectories[t // T].columns
            slot, at = played.trained[t][row], t % T
            actions, rows, masks = played.duels.log[t]
            if settings.get("masked"):
                assert columns["action_mask"][row, at].tolist() == masks[slot].tolist()
            seen = played.duels.log[t - 1][1] if t else None
            assert columns["obs"][row, at].tolist() == (seen.obs if seen else played.duels.first)[slot].tolist()
            is_first = bool(seen.is_first[slot]) if seen else True
            assert columns["is_first"][row, at] == is_first
            assert columns["action"][row, at] == actions[slot]
            for name in ("reward", "terminated", "truncated"):
                assert columns[name][row, at] == getattr(rows, name)[slot], name
            if rows.final_obs is not None and (rows.terminated | rows.truncated)[slot]:
                assert columns["final_obs"][row, at].tolist() == rows.final_obs[slot].tolist()
            if at == 0:
                for name, part in zip(("h", "c"), state, strict=True):
                    kept = torch.from_numpy(columns[f"initial_{name}"][row].copy())
                    torch.testing.assert_close(kept, part[:, 0])
            policy = policies[t // T]
            obs = torch.from_numpy(columns["obs"][row : row + 1, at].copy())
            output, state = policy.step(obs, torch.tensor([is_first]), state)
            mask = torch.from_numpy(columns["action_mask"][row : row + 1, at] != 0) if settings.get("masked") else None
            log_prob, _ = policy.actions.evaluate(legal(output.logits, mask), torch.tensor([int(actions[slot])]))
            assert columns["behavior_log_prob"][row, at] == pytest.approx(log_prob.item(), abs=1e-5)
    # Rows change their agent at the beginning of a game alone.
    for before, now, (_, rows, _) in zip(played.trained, played.trained[1:], played.duels.log, strict=False):
        for old, new in zip(before, now, strict=True):
            assert old == new or rows.is_first[new]


@cases
def test_the_books_have_trained_steps_and_whole_games(settings: dict[str, Any], games: Games) -> None:
    """Catches steps of frozen agents that are counted as the policy's, or nowhere; a game that is counted twice, before
    its end, or for another version; one that a fault or a shorter time limit cut off; returns with rewards of the game
    before."""
    played = Played(games, **settings, faulty=(1, 11, 24, 25), short=3).play(12)
    agents, against = games.num_agents, games.against_versions
    trained = frozen = 0
    expected: Counter[tuple[int, float]] = Counter()
    returns = np.zeros(played.duels.num_envs)
    playing, stepped = np.zeros((2, played.duels.num_envs), np.bool_)
    cut: Counter[str] = Counter()
    begun = 0
    for t, (_, rows, _) in enumerate(played.duels.log):
        valid = ~rows.is_first | rows.terminated | rows.truncated
        trained += int(valid[played.trained[t]].sum())
        frozen += int(valid.sum()) - int(valid[played.trained[t]].sum())
        returns += rows.reward
        stepped |= valid
        playing[valid] = ~(rows.terminated | rows.truncated)[valid]
        for game in range(against):
            slots = slice(game * agents, (game + 1) * agents)
            if rows.is_first[slots].all():
                (own,) = (slot for slot in range(slots.start, slots.stop) if slot in played.trained[t])
                others = [returns[slot] for slot in range(slots.start, slots.stop) if slot != own]
                version = played.versions[t][game]
                assert version is not None
                if game == 1 and begun < 3:
                    cut["short"] += 1
                elif playing[slots].any() or not stepped[slots].any():
                    cut["fault"] += 1
                else:
                    expected[version, round(returns[own] - sum(others) / len(others), 5)] += 1
                begun += game == 1
                returns[slots], playing[slots], stepped[slots] = 0, False, False
    statistics = [trajectory.header.statistics for trajectory in played.trajectories]
    assert sum(each["env_steps"] for each in statistics) == trained
    assert sum(each["opponent_env_steps"] for each in statistics) == frozen
    found = Counter((version, round(difference, 5)) for each in statistics for version, difference in each["games"])
    assert found == expected
    assert sum(found.values()) > 10
    assert cut["short"] == 3
    assert cut["fault"] >= 2
    assert len({version for version, _ in found}) >= 3


def test_versions_take_turns_in_one_call_each() -> None:
    """Catches a call per game or per agent, more versions at a time than asked for, a version that never leaves, is
    sent again although it is held, or is drawn more or less often than it should be."""
    games = Games(against_versions=12, among_themselves=0, num_agents=3, versions_at_once=3)
    played = Played(games)
    calls: list[int] = []
    for place in played.env._places:
        act = place.policy.act

        def counted(*arguments: Any, act: Any = act) -> Any:
            calls.append(len(arguments[1]))
            return act(*arguments)

        place.policy.act = counted  # type: ignore[method-assign]
    opponents = played.opponents(range(6), [0.02, 0.3, 0.3, 0.3, 0.04, 0.04])
    for version in range(60):
        calls.clear()
        played.unroll(version, opponents)
        assert len(calls) <= 3 * T
        assert sum(calls) == T * 12 * 2
    loads = Counter(played.fetched)
    assert 20 < sum(loads.values()) < 300
    assert set(loads) >= {1, 2, 3, 4, 5}
    assert min(loads[1], loads[2], loads[3]) > 3 * max(loads[0], loads[4], loads[5]) / 2
    assert {game[0] for each in played.trajectories for game in each.header.statistics["games"]} >= {1, 2, 3, 4, 5}
    agents = Counter(slot % 3 for step in played.trained for slot in step)
    assert min(agents.values()) > max(agents.values()) / 2


def test_what_frozen_agents_report_is_not_reported() -> None:
    """Catches numbers of info that mix those of opponents into the means of the policy, or name another row."""
    games = Games(against_versions=2, among_themselves=1, num_agents=2, versions_at_once=2)
    played = Played(games, reports=True)
    reports = played.duels.reports  # type: ignore[attr-defined]
    reports.remark("printed", 2, "a line")
    for slot in range(6):
        reports.episodes.append((slot, {"slot": float(slot)}))
    trained = played.env._slot_of_row.tolist()
    played.env.play_against(played.opponents([0]))
    played.env.step(np.zeros(4, np.int64), Rows(played.env).rows)
    told = played.env.reports.take()
    assert told.counts == {"printed": 2}
    assert sorted(told.episodes) == [(row, {"slot": float(slot)}) for row, slot in enumerate(trained)]


def stop(played: Played, path: Path) -> Any:
    """The worker's state as a checkpoint has it."""
    save_plain(path / "state.npz", played.worker.get_state())
    return load_plain(path / "state.npz")


@cases
def test_a_worker_goes_on_exactly(settings: dict[str, Any], games: Games, tmp_path: Path) -> None:
    """Catches a part of the games that is not in the state: who is trained, who plays, memories, streams, sums."""
    played = Played(games, **settings).play(6)
    state = stop(played, tmp_path)
    again = Played(games, **settings, seed=9)
    assert again.worker.set_state(state) == {}
    places = state["env"]["places"]
    for saved, now in zip(places, again.worker.get_state()["env"]["places"], strict=True):
        for name, part in saved["memory"].items():
            np.testing.assert_array_equal(now["memory"][name], part)
    assert any(part.any() for saved in places for part in saved["memory"].values())
    opponents = played.opponents([2, 3])  # of those that play now, some have left the pool
    for version in range(6, 14):
        one, other = played.unroll(version, opponents), again.unroll(version, opponents)
        for name, column in one.columns.items():
            np.testing.assert_array_equal(other.columns[name], column, name)
        assert one.header.statistics["games"] == other.header.statistics["games"]


def _set(*path: Any, to: Any) -> Any:
    def damage(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = to

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set("env", "agent", to=np.array([0, 2, 0, 1])), r"agent must lie in 0\.\.1"),
        (_set("env", "place", to=np.array([0, 1, 2, 0])), "a version that is missing"),
        (_set("env", "places", 0, "version", to=None), "a version that is missing"),
        (_set("env", "places", to=[]), "expected the states of 2 versions"),
        (_set("env", "places", 0, "weights", to=np.zeros(3, np.float32)), "parameters, got 3"),
        (_set("env", "places", 1, "begun", to="many"), "description of a version is damaged"),
        (_set("env", "returns", to=np.zeros(2)), "returns must be float64"),
        (_set("env", "env", "time", to=None), "time must be int64"),
        (_set("env", to=None), "must be"),
    ],
)
def test_a_mutated_state_begins_anew(damage: Any, words: str, tmp_path: Path) -> None:
    """Catches a mapping of agents to versions that is believed although it is none, or ends the run."""
    games = CASES[0][1]
    played = Played(games).play(6)
    state = stop(played, tmp_path)
    damage(state)
    again = Played(games)
    failed = again.worker.set_state(state)
    assert sorted(failed) == list(range(games.num_rows))
    assert all(re.search(words, why) for why in failed.values()), failed
    again.unroll(0, again.opponents([0, 1]))
    trained = again.unroll(1, again.opponents([0, 1]))
    assert np.isfinite(trained.columns["behavior_log_prob"]).all()


def test_weights_without_or_with_damaged_versions_are_refused() -> None:
    """Catches games that are played by whatever the places hold, and a version that was damaged on its way."""
    played = Played(CASES[0][1])
    with pytest.raises(ValueError, match="without the versions"):
        played.unroll(0, ())
    damaged = dataclasses.replace(played.weights(0), flat=played.weights(0).flat + 1)
    played.env._fetch = lambda _: damaged
    with pytest.raises(WeightsError, match="content hash"):
        played.unroll(0, played.opponents([0]))


@given(num_agents=st.integers(2, 8), games=st.integers(1, 20), share=st.floats(0.001, 1), rows=st.integers(0, 7))
def test_slots_are_divided_into_games(num_agents: int, games: int, share: float, rows: int) -> None:
    """Catches trained agents that are not as many as the slots, and a share that is silently another one."""
    num_envs = max(games * num_agents + rows, 1)
    try:
        found = divide_games(num_envs, num_agents, share, 2)
    except ValueError:
        possible = [
            (num_envs - among * num_agents) / (num_envs - among * (num_agents - 1))
            for among in range(num_envs)
            if among * num_agents < num_envs
        ]
        assert min(abs(one - share) for one in possible) > LARGEST_ERROR
        return
    assert found.num_rows == num_envs
    assert found.against_versions > 0
    assert found.share == pytest.approx(found.against_versions / (found.num_slots / num_agents))
    assert abs(found.share - share) <= LARGEST_ERROR


def test_one_agent_plays_nobody() -> None:
    """Catches games against versions in an environment of one agent."""
    with pytest.raises(ValueError, match="need several agents"):
        divide_games(8, 1, 0.5, 2)
