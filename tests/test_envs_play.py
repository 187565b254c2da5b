"""Returns and lengths that ``envs.play`` counts, against those of scripts that are known step by step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scripted_envs import Episode, choose, play_script
from scripted_vectors import MODES, make
from shoal.envs.play import ARRAYS, Episodes, join, play
from shoal.envs.registry import make_vector_env

GAME = "pettingzoo:scripted_games:parallel_env"


def player(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
    return np.array([choose(slot, state) for slot, state in enumerate(obs)])


def expected(environments: list[list[Episode]]) -> tuple[float, ...]:
    """Every entry holds the episodes that count together."""
    returns = [float(np.mean([sum(episode.rewards) for episode in episodes])) for episodes in environments]
    lengths = [len(episode.rewards) for episodes in environments for episode in episodes]
    error = float(np.std(returns, ddof=1)) / len(returns) ** 0.5
    terminated = sum(episode.terminated for episodes in environments for episode in episodes)
    return float(np.mean(returns)), error, len(lengths), float(np.mean(lengths)), terminated


def numbers(found: Episodes) -> tuple[float, ...]:
    return found.mean, found.standard_error, found.episodes, found.mean_length, int(found.terminated.sum())


@pytest.mark.parametrize("vectorization", ["sync", "native"])
@pytest.mark.parametrize("mode", MODES)
def test_episodes_count_alike_in_every_mode(mode: str, vectorization: str) -> None:
    """Catches a void transition that counts as a step, and a last reward that is lost where is_first comes with it."""
    env = make(vectorization, mode, salt=3)
    found = play(env, player, 18)
    env.close()
    scripts = [play_script(slot, 3, 6) for slot in range(3)]
    assert numbers(found) == pytest.approx(expected([[episode] for episodes in scripts for episode in episodes]))
    assert found.environment.tolist() == [slot for slot in range(3) for _ in range(6)]
    assert found.number.tolist() == [*range(6)] * 3
    lengths = [len(episode.rewards) for episodes in scripts for episode in episodes]
    assert found.lengths.tolist() == lengths


@pytest.mark.parametrize("kwargs", [{}, {"late": (1,)}], ids=str)
def test_agents_that_end_apart_count_together(kwargs: dict[str, Any]) -> None:
    """Catches the waiting of an agent that is out of the game taken for steps of its next episode, an agent that counts
    only if it ends last, and play that never ends because one has no episode.
    """
    pytest.importorskip("pettingzoo")
    env = make_vector_env(GAME, 6, 0, salt=3, **kwargs)
    found = play(env, player, 30)
    env.close()
    if not kwargs:
        scripts = [play_script(slot, 3, 5) for slot in range(6)]
        games = [[scripts[first + agent][k] for agent in range(3)] for first in (0, 3) for k in range(5)]
        assert numbers(found) == pytest.approx(expected(games))
        assert len(found.starts()) == len(games)
    else:
        # Those in the game from its beginning have as many episodes as it has, the latecomer at most so many.
        assert 20 < found.episodes <= 30


def test_what_a_fault_cut_off_counts_nowhere() -> None:
    """Catches an agent's episode before a fault that is joined to those after it, or the cut one counted as whole."""
    pytest.importorskip("pettingzoo")
    # Two games of 5 and 7 steps; in the third step of the next, two agents have ended and the third has not.
    env = make_vector_env(GAME, 3, 0, salt=4, how="raises", at=15)
    found = play(env, player, 12)
    faults = len(env.faults)
    env.close()
    script = [play_script(slot, 4, 3) for slot in range(3)]
    assert [[len(episode.rewards) for episode in episodes] for episodes in script] == [[3, 7, 5], [5, 1, 2], [3, 3, 2]]
    assert faults == 1
    games = [[episodes[k] for episodes in script] for k in (0, 1, 0, 1)]
    assert numbers(found) == pytest.approx(expected(games))


def test_an_early_end_does_not_favour_short_episodes() -> None:
    """Catches a mean over whatever had ended by then: short episodes, of which there were more."""
    env = make_vector_env("recall", 64, 0, min_delay=0, max_delay=30)
    found = play(env, lambda obs, is_first: np.zeros(64, np.int64), 10**6, max_env_steps=64 * 300)
    counts = np.bincount(found.environment)
    assert len(counts) == 64
    assert set(counts) == {counts[0]}
    assert counts[0] > 5
    # Cue, delay of 0 to 30, answer.
    assert abs(found.mean_length - 17) < 1.5


def test_starts_tell_which_episodes_began_alike() -> None:
    """Catches a start that depends on what was done, that is the same for all, or that is taken from the step before
    the reset.
    """
    found = {}
    for name, reseeded in (("plain", False), ("again", True), ("reseeded", True)):
        for still in (False, True):
            env = make_vector_env("evaluated_envs:Wandering-v0", 3, 5, None, reseeded)
            rng = np.random.default_rng(0)
            played = play(env, lambda obs, _, still=still, rng=rng: rng.integers(3, size=3) * (not still), 12)
            env.close()
            found[name, still] = played.starts()
    assert len(set(found["reseeded", True].tolist())) == 12
    assert found["reseeded", True].tolist() == found["reseeded", False].tolist() == found["again", True].tolist()
    same = found["plain", True] == found["plain", False]
    assert same[::4].all()
    assert not same.all()


def test_joined_episodes_keep_their_environments_apart() -> None:
    """Catches blocks whose environments get the same number: their episodes would count as one."""
    parts = []
    for seed in range(3):
        env = make_vector_env("recall", 4, seed)
        parts.append(play(env, lambda obs, is_first: np.zeros(4, np.int64), 8))
    whole = join(parts)
    assert whole.environment.tolist() == [slot for slot in range(12) for _ in range(2)]
    assert len(whole.by_environment(whole.returns)) == 24
    assert whole.returns.tolist() == [value for part in parts for value in part.returns.tolist()]


def test_episodes_are_shown_in_a_line() -> None:
    """Catches a repr of whole arrays, and one that does not say how many episodes were cut."""
    arrays = {name: np.zeros(4, np.int64) for name in ARRAYS} | {"number": np.arange(4)}
    arrays |= {"returns": np.array([1.0, 2.0, 3.0, 4.0]), "lengths": np.full(4, 9), "cut": np.array([1, 0, 0, 0], bool)}
    shown = "mean return 2.5 +- 0.645 (standard error) over 4 episodes of 9 steps on average, 1 of them cut"
    own = Episodes(metrics={}, **arrays)
    assert str(own) == shown
    assert repr(dataclasses.replace(own, policies={"a": own})) == f"{shown}\n  a: {shown}"
    none = Episodes(metrics={}, **{name: values[:0] for name, values in arrays.items()})
    assert str(none) == "no episodes"
