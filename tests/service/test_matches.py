"""Games of a trained policy against frozen versions, another run, or random actions: ``shoal evaluate --against``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
from duels import Duels
from shoal.deploy.cli import main
from shoal.deploy.evaluation.evaluate import checkpoint_side, evaluation_setup
from shoal.deploy.evaluation.matches import RESULTS, SeatPlayer, find_opponents, with_results
from shoal.envs.play import Player, play
from shoal.learner.checkpoint import find_checkpoint

NIM = "pettingzoo:turn_games:Nim"


def always(action: int) -> Player:
    return lambda obs, is_first, *masks: np.full(len(obs), action)


@pytest.mark.parametrize("agents", [2, 3])
@pytest.mark.parametrize("same_step", [False, True])
def test_who_does_better_in_every_seat_wins_every_game(same_step: bool, agents: int) -> None:
    """Catches actions that go to another seat, results of the others, games counted once per agent. In ``Duels`` the
    higher action wins; the first agent plays a step less."""
    for seat in range(agents):
        for own, other, result in ((2, 0, "won"), (0, 2, "lost"), (1, 1, "drawn")):
            env = Duels(4, agents, same_step=same_step)
            games = play(env, SeatPlayer(always(own), always(other), seat, agents), 8 * agents)
            found = with_results(games, seat, agents)
            assert found.agent.tolist() == [seat] * len(games.starts())
            assert found.episodes == 8
            assert {name: found.metrics[name].tolist() for name in RESULTS} == {
                name: [float(name == result)] * 8 for name in RESULTS
            }
            for action, *_ in env.log:
                assert action.reshape(-1, agents)[:, seat].tolist() == [own] * 4


def test_a_game_may_be_won_by_some() -> None:
    """Catches a result of one game given to another: which of them are won is known from the returns."""

    def by_game(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(obs)) % 2, 2, 0)  # wins the odd games, loses the even ones

    games = play(Duels(4), SeatPlayer(by_game, always(1), 0, 2), 16)
    found = with_results(games, 0, 2)
    assert found.metrics["won"].tolist() == (found.environment % 2).tolist()
    assert found.metrics["lost"].tolist() == (1 - found.environment % 2).tolist()
    assert (np.sign(found.returns) == np.where(found.metrics["won"] > 0, 1, -1)).all()


def test_each_player_sees_its_own_agents_alone() -> None:
    """Catches a memory that is fed with the other side's observations or masks."""
    seen: dict[str, list[Any]] = {"own": [], "other": []}

    def watching(name: str) -> Player:
        def act(obs: np.ndarray, is_first: np.ndarray, mask: np.ndarray) -> np.ndarray:
            seen[name].append((obs[:, 0].tolist(), len(is_first), mask.shape))
            return mask.argmax(1)

        return act

    play(Duels(2, 3, masked=True), SeatPlayer(watching("own"), watching("other"), 1, 3), 6)
    assert set(map(str, seen["own"])) == {str(([1.0, 1.0], 2, (2, 3)))}
    assert set(map(str, seen["other"])) == {str(([0.0, 2.0, 0.0, 2.0], 4, (4, 3)))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    """A short run with a pool of versions."""
    return shoal.train(
        NIM,
        config={"mode": "inline", "env.num_envs": 8, "actor.unroll_length": 8, "learner.batch_size": 16},
        total_env_steps=800,
        run_dir=tmp_path_factory.mktemp("matches") / "run",
        progress=False,
        **{"self_play": {"share": 1, "every_updates": 2, "pool_size": 3}, "evaluation.random_seconds": 0},
    )


def test_a_policy_plays_every_version_of_its_pool(
    trained: shoal.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches versions that play with the trained weights, seats that are not played alike, and three numbers that say
    three things. A game of Nim is won with a return of 1."""
    versions = [each["policy_version"] for each in trained.summary["self_play"]]
    assert len(versions) == 3
    checkpoint = find_checkpoint(trained.run_dir)
    side = checkpoint_side(checkpoint, evaluation_setup(checkpoint, num_envs=None, seed=1))
    pool = find_opponents(["pool"], side)
    weights = [each.weights for each in pool.values()]
    assert [each.policy_version for each in weights if each] == versions
    assert len({each.content_hash for each in weights if each}) == 3

    found = trained.evaluate(32, against="pool", processes=1)
    assert list(found.policies) == [f"version {version}" for version in versions]
    assert found.episodes == 3 * 32
    for episodes in found.policies.values():
        assert np.bincount(episodes.agent).tolist() == [16, 16]
        np.testing.assert_array_equal(episodes.metrics["won"], episodes.returns > 0)
        np.testing.assert_array_equal(sum(episodes.metrics[name] for name in RESULTS), np.ones(32))
    one = shoal.evaluate(trained.run_dir, 32, against=versions[0], processes=1)
    np.testing.assert_array_equal(one.returns, found.policies[f"version {versions[0]}"].returns)

    arguments = ["evaluate", str(trained.run_dir), "--episodes", "32", "--processes", "1", "--against", "pool"]
    capsys.readouterr()
    assert main([*arguments, "--against", "random", "--against", str(checkpoint.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["against"]
    assert [each["opponent"] for each in told] == [*found.policies, "random", str(checkpoint.path)]
    assert [each["policy_version"] for each in told] == [*versions, None, checkpoint.policy_version]
    for each, episodes in zip(told, found.policies.values(), strict=False):
        assert [seat["games"] for seat in each["seats"].values()] == [16, 16, 32]
        assert each["seats"]["all seats"]["won"] == episodes.metrics["won"].mean()
        assert each["seats"]["seat 1"]["mean_return"] == episodes.of_agents([1]).mean
        assert each["seats"]["all seats"]["return_ci95"] > 0
    assert main(arguments) == 0
    table = capsys.readouterr().out
    for version in versions:
        assert f"version {version}, seat 0" in table
    assert "won  drawn  lost" in table


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--against", "999999"], "--against 999999: the pool has the versions "),
        (["--against", "greedy"], "--against greedy: write pool, the number of a version"),
        (["--against", "nowhere"], r"--against nowhere: .* \(or one of the words pool and random\)"),
        (["--against", "pool", "--vs", "random"], "--vs: compares or records games that the policy plays alone"),
    ],
)
def test_who_cannot_be_played_against_is_refused(
    extra: list[str], said: str, trained: shoal.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or games against somebody else."""
    assert main(["evaluate", str(trained.run_dir), *extra]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_without_a_pool_or_other_agents_nobody_is_played_against(tmp_path: Path) -> None:
    """Catches an empty table."""
    run = shoal.train("CartPole-v1", mode="inline", total_env_steps=300, run_dir=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"--against pool: .* has no pool of versions"):
        run.evaluate(2, against="pool")
    with pytest.raises(ValueError, match=r"games against another policy need several agents, CartPole-v1 has one"):
        run.evaluate(2, against="random")
