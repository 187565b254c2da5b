"""The pool of frozen versions that self-play games are played against, and the results of these games."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from shoal.learner.config import SelfPlayConfig
from shoal.policy.trajectory import Trajectory
from shoal.policy.weights import Opponent, Weights, hash_of

RECENT = 128
"""Games against a version that its results are of."""
LEAST = 0.01
"""Least weight of a version in a draw by results: one that always loses is still met now and then."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The results of the trained agents against one version."""

    policy_version: int
    games: int
    """Whole games that ended in trained trajectories."""
    win_share: float | None
    """Of the last ``RECENT`` games: the share in which the trained agent had a higher return than the mean of the
    others; a draw counts one half. None before the first game."""
    return_difference: float | None
    """Of the same games: the mean of that difference."""


@dataclasses.dataclass(slots=True)
class _Member:
    weights: Weights
    reference: Any = None
    """What actors get in place of the weights; None before they were published as a member of the pool."""
    games: int = 0
    recent: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=RECENT))
    """Differences of returns."""

    def result(self) -> Result:
        recent = list(self.recent)
        wins = sum(1.0 if each > 0 else 0.5 if each == 0 else 0.0 for each in recent)
        return Result(
            policy_version=self.weights.policy_version,
            games=self.games,
            win_share=wins / len(recent) if recent else None,
            return_difference=sum(recent) / len(recent) if recent else None,
        )


class OpponentPool:
    """Versions of one policy, oldest first. The training loop's thread alone changes it; any may read ``results``."""

    def __init__(self, config: SelfPlayConfig) -> None:
        self._config = config
        self._members: list[_Member] = []
        self.results: tuple[Result, ...] = ()
        """By version, oldest first."""

    def publish(self, weights: Weights, publish_to: Callable[[Weights], Any]) -> Weights:
        """The weights as actors get them, with the opponents; they join the pool before that if it is their turn.

        ``publish_to`` is called once for every member.
        """
        members = self._members
        if not members or weights.policy_version >= members[-1].weights.policy_version + self._config.every_updates:
            members.append(_Member(dataclasses.replace(weights, env_options=None)))
            del members[: -self._config.pool_size]
        for member in members:
            if member.reference is None:
                member.reference = publish_to(member.weights)
        self._tell()
        return dataclasses.replace(weights, opponents=self._opponents())

    def _opponents(self) -> tuple[Opponent, ...]:
        by_results = self._config.draw == "results"
        chances = [_hardness(result) if by_results else 1.0 for result in self.results]
        return tuple(
            Opponent(member.weights.policy_version, chance / sum(chances), member.reference)
            for member, chance in zip(self._members, chances, strict=True)
        )

    def add_games(self, trajectories: Sequence[Trajectory]) -> None:
        """Add the games that ended in these trajectories; those against versions that have left are not kept."""
        members = {member.weights.policy_version: member for member in self._members}
        for trajectory in trajectories:
            for version, difference in trajectory.header.statistics.get("games", ()):
                if version in members:
                    members[version].games += 1
                    members[version].recent.append(float(difference))
        self._tell()

    def _tell(self) -> None:
        self.results = tuple(member.result() for member in self._members)

    def get_state(self) -> dict[str, Any]:
        """All versions with their results, as plain data (``learner.plain_file``)."""
        return {
            "members": [
                {
                    "policy_version": member.weights.policy_version,
                    "content_hash": member.weights.content_hash,
                    "weights": member.weights.flat,
                    "games": member.games,
                    "recent": list(member.recent),
                }
                for member in self._members
            ]
        }

    def set_state(self, state: Any, size: int) -> None:
        """Go on from ``get_state``, before the first version is published; weights have ``size`` numbers.

        Where fewer versions are kept now, the oldest make room.

        Raises:
            ValueError: it is no such state.
        """
        self._members = _read_members(state, size)[-self._config.pool_size :]
        self._tell()


def sentence(results: Sequence[Result]) -> str:
    """Games won against the newest and the oldest version that were met, in words; empty before the first game."""
    met = [result for result in results if result.win_share is not None]
    said = [
        f"{each.win_share:.0%} against version {each.policy_version}" for each in dict.fromkeys([*met[-1:], *met[:1]])
    ]
    return f"won {' and '.join(said)}; {len(results)} in the pool" if said else ""


def read_versions(state: Any, size: int) -> tuple[Weights, ...]:
    """The versions of ``OpponentPool.get_state``, oldest first; weights have ``size`` numbers.

    Raises:
        ValueError: it is no such state.
    """
    return tuple(member.weights for member in _read_members(state, size))


def _hardness(result: Result) -> float:
    win_share = 0.5 if result.win_share is None else result.win_share
    return max((1 - win_share) ** 2, LEAST)


def _read_members(state: Any, size: int) -> list[_Member]:
    found = state.get("members") if isinstance(state, Mapping) else None
    if not isinstance(found, list):
        raise ValueError("expected a list of versions")
    members = [_read_member(each, size) for each in found]
    versions = [member.weights.policy_version for member in members]
    if versions != sorted(set(versions)):
        raise ValueError(f"versions must rise, got {versions}")
    return members


def _read_member(saved: Any, size: int) -> _Member:
    try:
        version, flat, content_hash = saved["policy_version"], saved["weights"], saved["content_hash"]
        games, recent = saved["games"], [float(each) for each in saved["recent"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a version is damaged ({type(error).__name__}: {error})") from error
    if not all(type(number) is int and number >= 0 for number in (version, games)):
        raise ValueError(f"expected whole numbers from 0 on, got version {version!r} with {games!r} games")
    if not isinstance(flat, np.ndarray) or (flat.dtype, flat.shape) != (np.float32, (size,)):
        raise ValueError(f"weights of version {version} must be {size:,} numbers of float32: they are another policy's")
    if hash_of(flat) != content_hash or not (np.isfinite(flat).all() and np.isfinite(recent).all()):
        raise ValueError(f"the numbers of version {version} are damaged")
    return _Member(Weights(version, flat, content_hash), None, games, deque(recent, RECENT))
