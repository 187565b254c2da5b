"""The pool of versions for self-play: who joins and leaves, how often each is drawn, what a checkpoint has of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollouts import RUN, SMALL, make_learner, random_columns, small_policy
from shoal.learner.checkpoint import Checkpoints, load_checkpoint
from shoal.learner.config import SelfPlayConfig
from shoal.learner.opponents import LEAST, RECENT, OpponentPool, sentence
from shoal.policy.trajectory import Trajectory, TrajectoryHeader
from shoal.policy.weights import Weights, hash_of

SIZE = 6


def weights(version: int) -> Weights:
    flat = np.full(SIZE, version, np.float32)
    return Weights(version, flat, hash_of(flat), {"level": version})


def trajectory(games: Sequence[tuple[int, float]]) -> Trajectory:
    header = TrajectoryHeader(
        run_id=RUN, actor=0, restart_index=0, sequence=0, policy_version=0, statistics={"games": games}
    )
    return Trajectory(header, random_columns(SMALL, 2, 0), 0)


def filled(versions: int, **settings: Any) -> tuple[OpponentPool, list[int]]:
    """A pool to which so many versions were published, and those that it sent."""
    pool, sent = OpponentPool(SelfPlayConfig(**settings)), list[int]()

    def publish_to(weights: Weights) -> str:
        sent.append(weights.policy_version)
        return f"reference to {weights.policy_version}"

    for version in range(versions):
        published = pool.publish(weights(version), publish_to)
        assert published.policy_version == version
        assert published.env_options == {"level": version}
    pool.publish(weights(versions - 1), publish_to)  # as after an update that was skipped
    return pool, sent


def test_versions_join_by_the_schedule_and_are_sent_once() -> None:
    """Catches a version that joins too early, twice or never, more versions than asked for, and one sent again."""
    pool, sent = filled(24, share=1, every_updates=3, pool_size=4)
    assert sent == [0, 3, 6, 9, 12, 15, 18, 21]
    opponents = pool.publish(weights(23), lambda _: pytest.fail("sent again")).opponents
    assert [one.policy_version for one in opponents] == [12, 15, 18, 21]
    assert [one.weights for one in opponents] == [f"reference to {version}" for version in (12, 15, 18, 21)]
    assert [one.probability for one in opponents] == [0.25] * 4


def test_results_are_those_of_the_last_games() -> None:
    """Catches a draw that counts as a win, an old game that counts for ever, a game against a version that has left."""
    pool, _ = filled(3, share=1, every_updates=1)
    assert sentence(pool.results) == ""
    pool.add_games([trajectory([(0, 2.0), (1, -1.0)]), trajectory([(0, 0.0), (7, 1.0)]), trajectory([(0, -5.0)])])
    found = {result.policy_version: result for result in pool.results}
    assert (found[0].games, found[0].win_share, found[0].return_difference) == (3, 0.5, -1.0)
    assert (found[1].games, found[1].win_share, found[1].return_difference) == (1, 0.0, -1.0)
    assert (found[2].games, found[2].win_share, found[2].return_difference) == (0, None, None)
    assert sentence(pool.results) == "won 0% against version 1 and 50% against version 0; 3 in the pool"
    pool.add_games([trajectory([(0, 1.0)] * RECENT)])
    assert (pool.results[0].games, pool.results[0].win_share) == (RECENT + 3, 1.0)


def test_versions_that_win_are_drawn_more_often() -> None:
    """Catches weights that favour those that lose, that forget new versions, or that never meet a beaten one again."""
    pool, _ = filled(4, share=1, every_updates=1, draw="results")
    pool.add_games([trajectory([(0, 1.0)] * 8 + [(1, 1.0), (1, -1.0)] + [(2, -1.0)])])
    chances = [one.probability for one in pool.publish(weights(3), str).opponents]
    expected = np.array([LEAST, 0.25, 1.0, 0.25])
    np.testing.assert_allclose(chances, expected / expected.sum())


def restored(state: Any, **settings: Any) -> OpponentPool:
    pool = OpponentPool(SelfPlayConfig(share=1, **settings))
    pool.set_state(state, SIZE)
    return pool


def test_a_checkpoint_has_the_pool(tmp_path: Path) -> None:
    """Catches versions or results that a resumed run lacks, a first version that joins anew, a pool that is not covered
    by the manifest."""
    pool, _ = filled(24, share=1, every_updates=3, pool_size=4)
    pool.add_games([trajectory([(18, 2.0), (18, -1.0), (12, 0.0)])])
    path = Checkpoints(tmp_path).save(make_learner(small_policy()), {}, opponents=pool.get_state())
    checkpoint = load_checkpoint(path)
    again = restored(checkpoint.load_opponents(), every_updates=3, pool_size=4)
    assert again.results == pool.results
    sent: list[Weights] = []
    opponents = again.publish(weights(23), sent.append).opponents
    assert [one.policy_version for one in opponents] == [12, 15, 18, 21]
    assert [one.flat.tolist() for one in sent] == [weights(version).flat.tolist() for version in (12, 15, 18, 21)]
    assert [result.policy_version for result in restored(checkpoint.load_opponents(), pool_size=2).results] == [18, 21]
    file = path / "opponents.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"opponents\.npz is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["members"][1].update(weights=np.zeros(SIZE + 1, np.float32)), "they are another policy's"),
        (lambda s: s["members"][1].update(weights=np.zeros(SIZE)), "must be 6 numbers of float32"),
        (lambda s: s["members"][1].update(weights=np.ones(SIZE, np.float32)), "numbers of version 3 are damaged"),
        (lambda s: s["members"][1].update(policy_version=0), "versions must rise"),
        (lambda s: s["members"][1].update(policy_version="3"), "whole numbers from 0 on"),
        (lambda s: s["members"][1].update(games=-1), "whole numbers from 0 on"),
        (lambda s: s["members"][1].update(recent=["many"]), "a version is damaged"),
        (lambda s: s["members"][1].update(recent=[float("nan")]), "numbers of version 3 are damaged"),
        (lambda s: s["members"][1].pop("games"), "a version is damaged"),
        (lambda s: s.update(members={}), "expected a list"),
    ],
)
def test_a_damaged_pool_is_refused(change: Any, words: str) -> None:
    """Catches a version that is played with another's weights, or under another's name."""
    state = filled(10, share=1, every_updates=3)[0].get_state()
    change(state)
    with pytest.raises(ValueError, match=words):
        restored(state)
