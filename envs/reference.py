"""Reference returns: measure those of a random and a scripted player in an environment.

``python -m shoal.envs.reference ENV_ID [--episodes N] [--seed N]`` prints both. Runs call ``random_return``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from shoal.envs.actions import NO_BOUND
from shoal.envs.boundary import ContinuousActions, DiscreteActions, EnvSpec, TokenSpace
from shoal.envs.config import AdapterOptions
from shoal.envs.missions import MISSIONS
from shoal.envs.play import Episodes, Player, play
from shoal.envs.registry import make_vector_env


def random_player(spec: EnvSpec, rng: np.random.Generator) -> Player:
    """Uniform over discrete actions, legal ones where masks say so, and over [-1, 1], which adapters map onto bounds;
    standard normal where an action has not both."""
    actions = spec.actions
    if isinstance(actions, DiscreteActions):
        sizes = np.array([len(names) for names in actions.names])
        if spec.num_mask:
            cuts = np.cumsum(sizes)[:-1]

            def play_legal(obs: np.ndarray, is_first: np.ndarray, mask: np.ndarray) -> np.ndarray:
                draws = np.split(np.where(mask, rng.random(mask.shape), -1.0), cuts, axis=1)
                chosen = np.stack([draw.argmax(1) for draw in draws], 1)
                return chosen[:, 0] if actions.scalar else chosen

            return play_legal
        if actions.scalar:
            return lambda obs, is_first: rng.integers(sizes[0], size=len(obs))
        return lambda obs, is_first: rng.integers(sizes, size=(len(obs), len(sizes)))
    assert isinstance(actions, ContinuousActions)
    bounded = (np.abs(actions.low) < NO_BOUND) & (np.abs(actions.high) < NO_BOUND)

    def play(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        shape = (len(obs), len(bounded))
        return np.where(bounded, 2.0 * rng.random(shape) - 1.0, rng.standard_normal(shape)).astype(np.float32)

    return play


class RecallPlayer:
    """Plays ``recall`` without a mistake: remembers the cue, answers with it always."""

    def __init__(self) -> None:
        self._cue: np.ndarray | None = None

    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Action [B] for obs [B, num_cues + 1]."""
        shown = obs[:, :-1].argmax(1)
        self._cue = shown if self._cue is None else np.where(is_first, shown, self._cue)
        return self._cue


class WindowPlayer:
    """Plays the MettaGrid missions from the tokens alone.

    It walks the shortest visible way to the nearest mine, or to the nearest altar if it carries ore. If it sees
    none, it keeps its direction until something is in the way.

    With ``remember`` it walks to the place of its last delivery instead, and back if it carries nothing, which is all
    that memory can contribute in a corridor.
    """

    def __init__(self, spec: EnvSpec, rng: np.random.Generator, *, remember: bool = False) -> None:
        space = spec.observation
        assert isinstance(space, TokenSpace)
        assert isinstance(spec.actions, DiscreteActions)
        self._rng = rng
        self._shape = (space.height, space.width)
        self._tag, self._ore = space.feature_names.index("tag"), space.feature_names.index("inv:ore")
        kinds = dict(space.categorical_features)[self._tag]
        self._mine, self._altar = kinds.index("mine"), kinds.index("altar")
        names = spec.actions.names[0]
        self._moves = np.array([names.index(f"move_{way}") for way in ("north", "south", "west", "east")])
        self._remember = remember
        self._heading: np.ndarray | None = None
        self._choice = self._carried = self._altar_way = np.zeros(0, dtype=np.int64)

    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Action [B] for tokens [B, num_tokens, 3]."""
        slots, height, width = len(obs), *self._shape
        row, column = height // 2 + 1, width // 2 + 1
        coordinate, feature, value = (obs[..., index].astype(np.int64) for index in range(3))
        y, x = coordinate >> 4, coordinate & 15
        inside = (y < height) & (x < width)
        slot = np.broadcast_to(np.arange(slots)[:, None], y.shape)
        # One cell of margin all around, so that every cell has four neighbours.
        kind = np.full((slots, height + 2, width + 2), -1)
        seen = inside & (feature == self._tag)
        kind[slot[seen], y[seen] + 1, x[seen] + 1] = value[seen]
        ore = inside & (feature == self._ore) & (y + 1 == row) & (x + 1 == column) & (value > 0)
        carries = ore.any(1)
        target = kind == np.where(carries, self._altar, self._mine)[:, None, None]
        free = kind == -1
        far = height * width
        distance = np.where(target, 0, far)
        for _ in range(height + width):
            nearest = np.full_like(distance, far)
            nearest[:, 1:-1, 1:-1] = self._neighbours(distance).min(0) + 1
            distance = np.where(free, np.minimum(distance, nearest), distance)
        ways = np.stack([d[:, row - 1, column - 1] for d in self._neighbours(distance)], 1)  # [B, 4]
        open_ways = np.stack([f[:, row - 1, column - 1] for f in self._neighbours(free)], 1)
        noise = self._rng.random((slots, 4))
        if self._heading is None:
            self._heading = self._rng.integers(4, size=slots)
            self._choice, self._carried = self._heading, np.zeros(slots, dtype=bool)
            self._altar_way = np.full(slots, -1)
        keep = open_ways[np.arange(slots), self._heading] & ~is_first & (self._rng.random(slots) > 0.03)
        self._heading = np.where(keep, self._heading, (open_ways + noise).argmax(1))
        if self._remember:
            self._altar_way[self._carried & ~carries] = self._choice[self._carried & ~carries]
            self._altar_way[is_first] = -1
            # North and south differ in the last bit, as do west and east.
            way = np.where(carries, self._altar_way, self._altar_way ^ 1)
            self._heading = np.where(
                (self._altar_way >= 0) & open_ways[np.arange(slots), way % 4], way % 4, self._heading
            )
        choice = np.where(ways.min(1) < far, (ways + noise * 0.5).argmin(1), self._heading)
        self._choice, self._carried = choice, carries
        return np.asarray(self._moves[choice])

    @staticmethod
    def _neighbours(grid: np.ndarray) -> np.ndarray:
        """Values north, south, west and east of every inner cell: [4, B, height, width]."""
        return np.stack([grid[:, :-2, 1:-1], grid[:, 2:, 1:-1], grid[:, 1:-1, :-2], grid[:, 1:-1, 2:]])


def scripted_player(spec: EnvSpec, rng: np.random.Generator) -> Player | None:
    """The scripted player of an environment; None if there is none."""
    if spec.env_id in MISSIONS:
        return WindowPlayer(spec, rng, remember=spec.env_id == "mettagrid/corridor")
    return RecallPlayer() if spec.env_id == "recall" else None


def random_return(
    env_id: str,
    *,
    episodes: int = 256,
    seed: int = 0,
    num_envs: int = 64,
    max_env_steps: int | None = None,
    enough: Callable[[], bool] = lambda: False,
    env_kwargs: Mapping[str, Any] | None = None,
    options: AdapterOptions | None = None,
) -> Episodes:
    """Measure the return of uniformly random actions; missions record it over more episodes.

    ``max_env_steps`` and ``enough`` as in ``envs.play.play``.
    """
    env = make_vector_env(env_id, num_envs, np.random.SeedSequence([seed, 1]), options, **(env_kwargs or {}))
    try:
        player = random_player(env.spec, np.random.default_rng([seed, 2]))
        return play(env, player, episodes, max_env_steps=max_env_steps, enough=enough)
    finally:
        env.close()


def scripted_return(env_id: str, *, episodes: int = 256, seed: int = 0, num_envs: int = 64) -> Episodes | None:
    """Measure the return of the scripted player; None if there is none."""
    env = make_vector_env(env_id, num_envs, np.random.SeedSequence([seed, 1]))
    try:
        player = scripted_player(env.spec, np.random.default_rng([seed, 2]))
        return None if player is None else play(env, player, episodes)
    finally:
        env.close()


def main() -> None:
    """Print the figures of one environment."""
    parser = argparse.ArgumentParser(
        prog="python -m shoal.envs.reference", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("env_id")
    parser.add_argument("--episodes", type=int, default=2048, help="episodes (of one slot each) per player")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, measure in (("random", random_return), ("scripted", scripted_return)):
        returns = measure(arguments.env_id, episodes=arguments.episodes, seed=arguments.seed)
        if returns is not None:
            error, episodes = returns.standard_error, returns.episodes
            print(
                f"{arguments.env_id} {name}_return {returns.mean:.3f} +- {error:.3f} (s.e., {episodes} slot episodes)"
            )


if __name__ == "__main__":
    main()
