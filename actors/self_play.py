"""Self-play: games in which one agent is trained and frozen versions of the policy play the others.

``SelfPlayEnvironment`` lies between a rollout worker and the environment. The worker sees the trained agents alone, one
row each, so that steps of frozen agents are no training data: no trajectory, count, statistic or check has them. The
frozen agents of all games are acted for here, in one call for every version, each with a memory of its own.
"""

# S slots of the environment, B rows of trained agents, G games against versions, A agents of a game, V versions

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from shoal.envs.boundary import (
    EnvironmentFault,
    MaskedEnvironment,
    OptionsEnvironment,
    ReportingEnvironment,
    StatefulEnvironment,
    StepRows,
    VectorEnvironment,
)
from shoal.envs.plain_state import DoesNotFit, read_arrays, read_generator, to_plain
from shoal.envs.reports import Reports
from shoal.policy.actions import legal
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.weights import Opponent, Weights, WeightsError, hash_of, load_weights

_NO_STEP, _PLAYING, _ENDED = range(3)
LARGEST_ERROR = 0.1
"""Distance between the share of games that was asked for and the one that slots can be divided into."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Games:
    """The games of one actor."""

    against_versions: int
    """G: games of which one agent is trained."""
    among_themselves: int
    """Games of which all agents are trained."""
    num_agents: int
    """A."""
    versions_at_once: int
    """V: versions that play at a time."""

    @property
    def num_slots(self) -> int:
        """S: agents of all games."""
        return (self.against_versions + self.among_themselves) * self.num_agents

    @property
    def num_rows(self) -> int:
        """B: trained agents of all games."""
        return self.against_versions + self.among_themselves * self.num_agents

    @property
    def share(self) -> float:
        """Share of the games that are played against versions."""
        return self.against_versions / (self.against_versions + self.among_themselves)


def divide_games(num_envs: int, num_agents: int, share: float, versions_at_once: int) -> Games:
    """The games whose trained agents are ``num_envs``, with a share against versions as near as can be to ``share``.

    Raises:
        ValueError: the environment has one agent, or no division comes near.
    """
    if num_agents < 2:
        raise ValueError("self_play.share: games against versions of the policy need several agents; this has one")
    possible = [
        Games(
            against_versions=num_envs - among * num_agents,
            among_themselves=among,
            num_agents=num_agents,
            versions_at_once=versions_at_once,
        )
        for among in range((num_envs - 1) // num_agents + 1)
    ]
    nearest = min(possible, key=lambda games: abs(games.share - share))
    if abs(nearest.share - share) > LARGEST_ERROR:
        shares = ", ".join(f"{games.share:.3g}" for games in possible)
        raise ValueError(
            f"self_play.share: env.num_envs={num_envs} trained agents, in games of {num_agents}, make shares of "
            f"{shares} possible; choose one of these instead of {share:g}, or more env.num_envs"
        )
    return nearest


class Game(NamedTuple):
    """The end of a game against a version."""

    policy_version: int
    """The version that played all agents but the trained one."""
    difference: float
    """Return of the trained agent less the mean return of the others."""


class SelfPlayEnvironment:
    """A ``VectorEnvironment`` of the trained agents: those of the games against versions, then those of the others.

    Row g < G is the trained agent of game g. Which one that is, and which version plays the others, is drawn anew for
    every game. Versions are acted with in V places. A place is given a version that is drawn from the pool; it begins
    its part of the worker's games and makes room for another one once these are over.

    Args:
        envs: ``games.num_slots`` slots; the agents of a game are consecutive.
        games: how they are divided.
        make_policy: makes a policy with any weights.
        fetch: turns ``Opponent.weights`` into ``Weights``.
        seed: of all that is drawn here.
    """

    def __init__(
        self,
        envs: VectorEnvironment,
        games: Games,
        make_policy: Callable[[], RecurrentPolicy],
        fetch: Callable[[Any], Weights],
        seed: np.random.SeedSequence,
    ) -> None:
        if envs.num_envs != games.num_slots:
            raise ValueError(f"expected {games.num_slots} slots for {games}, got {envs.num_envs}")
        self.spec, self.num_envs = envs.spec, games.num_rows
        self._envs, self._games, self._fetch = envs, games, fetch
        numpy_seed, torch_seed = seed.spawn(2)
        self._random = np.random.default_rng(numpy_seed)
        self._generator = torch.Generator().manual_seed(int(torch_seed.generate_state(1, np.uint64)[0] >> 1))
        slots, spec = envs.num_envs, envs.spec
        self._rows = StepRows(
            np.zeros((slots, *spec.obs_shape), spec.obs_dtype),
            np.ones(slots, np.bool_),
            np.zeros(slots, np.float32),
            np.zeros(slots, np.bool_),
            np.zeros(slots, np.bool_),
            np.zeros((slots, *spec.obs_shape), spec.obs_dtype) if spec.same_step else None,
        )
        self._actions = np.zeros((slots, *spec.action_shape), spec.action_dtype)
        count = games.against_versions
        self._agent = np.zeros(count, np.int64)
        """[G]: the trained agent."""
        self._place = np.full(count, -1, np.int64)
        """[G]: the place of the version that plays the others; -1 before there is one."""
        self._returns = np.zeros(slots, np.float64)
        """[S]: rewards of the game so far."""
        self._course = np.full(slots, _NO_STEP, np.int64)
        """[S]: how far each agent is in its game."""
        self._short = np.zeros(slots, np.bool_)
        self._slot_of_row = np.arange(self.num_envs)
        """[B]: the slot of every trained agent."""
        self._slot_of_row[count:] += count * (games.num_agents - 1)
        self._draw_agents(np.arange(count))
        places = [_Place(make_policy().eval().requires_grad_(False)) for _ in range(games.versions_at_once)]
        self._places, self._distribution = places, places[0].policy.actions
        self._groups: list[_Group] | None = None
        """The frozen agents by version; None where they have to be found anew."""
        self._opponents: Sequence[Opponent] = ()
        self._masks = envs.action_mask if spec.num_mask and isinstance(envs, MaskedEnvironment) else None
        self.action_mask = np.ones((self.num_envs, spec.num_mask), np.uint8)
        self.short_episode = np.zeros(self.num_envs, np.bool_)
        self.reports = Reports()
        self._ended: list[Game] = []
        self._frozen_steps = 0
        self._policy_seconds = 0.0

    @property
    def faults(self) -> list[str]:
        """Messages of the environment, as in ``envs.boundary.VectorEnvironment``."""
        return self._envs.faults

    @faults.setter
    def faults(self, messages: list[str]) -> None:
        self._envs.faults = messages

    def play_against(self, opponents: Sequence[Opponent]) -> None:
        """Draw versions from ``opponents`` from now on, and for the games that have none yet.

        Raises:
            ValueError: there are none.
        """
        if not opponents:
            raise ValueError("weights came without the versions that games are played against")
        self._opponents = opponents
        for game in np.flatnonzero(self._place < 0):
            self._place[game] = self._choose_place()

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape]."""
        self._envs.reset(self._rows.obs)
        self._rows.is_first.fill(True)
        self._tell()
        obs[:] = self._rows.obs[self._slot_of_row]

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Act for the frozen agents and step all games, as in ``envs.boundary.VectorEnvironment``."""
        begun = time.perf_counter()
        self._actions[self._slot_of_row] = action
        with torch.inference_mode():
            self._act()
        self._policy_seconds += time.perf_counter() - begun
        # A copy where the environment changes it in place: it describes the episodes that this step may end.
        np.copyto(self._short, self._envs.short_episode)
        self._envs.step(self._actions, self._rows)
        # What a step results in is the old trained agent's; what the next one sees is the new one's.
        before = self._slot_of_row.copy()
        self._take_reports(before)
        self._count()
        ours = self._rows
        rows.reward[:], rows.terminated[:] = ours.reward[before], ours.terminated[before]
        rows.truncated[:] = ours.truncated[before]
        if rows.final_obs is not None and ours.final_obs is not None:
            rows.final_obs[:] = ours.final_obs[before]
        rows.obs[:], rows.is_first[:] = ours.obs[self._slot_of_row], ours.is_first[self._slot_of_row]
        self._tell()

    def _act(self) -> None:
        """Choose the actions of all frozen agents, in one call for every version."""
        # For all slots: what is drawn for one does not depend on who plays the others.
        uniform = 1 - torch.rand((len(self._actions), self._distribution.num_uniform), generator=self._generator)
        for group in self._find_groups():
            obs = torch.from_numpy(self._rows.obs[group.slots])
            is_first = torch.from_numpy(self._rows.is_first[group.slots])
            mask = None if self._masks is None else torch.from_numpy(self._masks[group.slots] != 0)
            output = group.policy.act(obs, group.ids, is_first)
            action, _ = self._distribution.sample(legal(output.logits, mask), uniform[group.slots])
            self._actions[group.slots] = action.numpy()

    def _find_groups(self) -> list[_Group]:
        if self._groups is None:
            agents = self._games.num_agents
            played = np.repeat(self._place, agents)
            played[self._slot_of_row[: len(self._place)]] = -1
            found = [(place.policy, np.flatnonzero(played == index)) for index, place in enumerate(self._places)]
            self._groups = [_Group(policy, slots, tuple(slots.tolist())) for policy, slots in found if len(slots)]
        return self._groups

    def _count(self) -> None:
        """Add up the rewards of a step, and begin new games where games are over."""
        rows, count, agents = self._rows, self._games.against_versions, self._games.num_agents
        ended = rows.terminated | rows.truncated
        valid = ~rows.is_first | ended
        self._returns += rows.reward
        self._course[valid] = np.where(ended[valid], _ENDED, _PLAYING)
        against = count * agents
        self._frozen_steps += int(np.count_nonzero(valid[:against]))
        self._frozen_steps -= int(np.count_nonzero(valid[self._slot_of_row[:count]]))
        # While a game goes on, at least one of its agents makes a step.
        over = np.flatnonzero(rows.is_first[:against].reshape(count, agents).all(1))
        if len(over):
            for game in over:
                self._end(int(game))
            self._draw_agents(over)
            for game in over:
                self._place[game] = self._choose_place()

    def _end(self, game: int) -> None:
        """Note a game that is over, unless a fault or a shorter time limit cut it off, and give its place back."""
        agents = self._games.num_agents
        slots = slice(game * agents, (game + 1) * agents)
        version = self._places[self._place[game]].version
        course = self._course[slots]
        whole = (course == _ENDED).any() and not (course == _PLAYING).any() and not self._short[slots].any()
        if version is not None and whole:
            returns = self._returns[slots]
            own = returns[self._agent[game]]
            self._ended.append(Game(version, float(own - (returns.sum() - own) / (agents - 1))))
        self._returns[slots], self._course[slots] = 0.0, _NO_STEP
        self._place[game] = -1

    def _draw_agents(self, games: np.ndarray) -> None:
        agents = self._games.num_agents
        self._agent[games] = self._random.integers(agents, size=len(games))
        self._slot_of_row[games] = games * agents + self._agent[games]
        self._groups = None

    def _choose_place(self) -> int:
        """The place of the version that plays a game which begins now."""
        self._groups = None
        playing = np.bincount(self._place[self._place >= 0], minlength=len(self._places))
        for index, place in enumerate(self._places):
            if (place.closed or place.version is None) and not playing[index]:
                place.version = None
                self._draw_version(place)
        open_ = [index for index, place in enumerate(self._places) if place.version is not None and not place.closed]
        chosen = open_[int(self._random.integers(len(open_)))]
        place = self._places[chosen]
        place.begun += 1
        term = math.ceil(self._games.against_versions / len(self._places))
        place.closed = place.begun >= term and len(open_) > 1
        return chosen

    def _draw_version(self, place: _Place) -> None:
        """Give a place a version of the pool that no other place has; none where they have all."""
        taken = {other.version for other in self._places}
        free = [opponent for opponent in self._opponents if opponent.policy_version not in taken]
        if free:
            chances = np.array([opponent.probability for opponent in free])
            drawn = free[int(self._random.choice(len(free), p=chances / chances.sum()))]
            weights = self._fetch(drawn.weights)
            weights.verify()
            place.load(weights)

    def _tell(self) -> None:
        """Bring what describes the trained agents' next step up to date."""
        if self._masks is not None:
            self.action_mask[:] = self._masks[self._slot_of_row]
        self.short_episode[:] = self._envs.short_episode[self._slot_of_row]

    def _take_reports(self, slot_of_row: np.ndarray) -> None:
        if not isinstance(self._envs, ReportingEnvironment) or not self._envs.reports:
            return
        told = self._envs.reports.take()
        row_of = {slot: row for row, slot in enumerate(slot_of_row.tolist())}
        episodes = [(row_of[slot], numbers) for slot, numbers in told.episodes if slot in row_of]
        self.reports.add(Reports(told.counts, told.examples, episodes), 0)

    def take_games(self) -> tuple[list[Game], int]:
        """The games against versions that ended since the last call, and the steps of frozen agents."""
        taken = self._ended, self._frozen_steps
        self._ended, self._frozen_steps = [], 0
        return taken

    def take_policy_seconds(self) -> float:
        """Seconds spent acting for frozen agents since the last call."""
        seconds, self._policy_seconds = self._policy_seconds, 0.0
        return seconds

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options on, as in ``envs.boundary.OptionsEnvironment``."""
        if not isinstance(self._envs, OptionsEnvironment):
            raise EnvironmentFault(f"{self.spec.env_id} takes no options, got {options}")
        self._envs.set_options(options)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``; with the weights of the versions that play now."""
        return {
            "env": self._envs.get_state() if isinstance(self._envs, StatefulEnvironment) else None,
            **{name: array.copy() for name, array in self._arrays().items()},
            "random": to_plain(self._random),
            "places": [place.get_state(self._frozen_ids()) for place in self._places],
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "obs": self._rows.obs,
            "is_first": self._rows.is_first,
            "agent": self._agent,
            "place": self._place,
            "returns": self._returns,
            "course": self._course,
            "generator": self._generator.get_state().numpy(),
        }

    def _frozen_ids(self) -> tuple[int, ...]:
        """Every slot that a frozen agent may have."""
        return tuple(range(self._games.against_versions * self._games.num_agents))

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``."""
        if not isinstance(self._envs, StatefulEnvironment):
            return dict.fromkeys(range(self.num_envs), f"{self.spec.env_id} does not say its state")
        try:
            saved = read_arrays(state, self._arrays())
            random = read_generator(state.get("random"))
            self._check(saved, state.get("places"))
            for place, of_place in zip(self._places, state["places"], strict=True):
                place.set_state(of_place, self._frozen_ids())
            self._generator.set_state(torch.from_numpy(saved["generator"].copy()))
        except (DoesNotFit, WeightsError, RuntimeError) as error:  # torch refuses a damaged stream so
            for place in self._places:
                place.clear()
            return dict.fromkeys(range(self.num_envs), str(error))
        self._random = random
        first = self._rows.obs.copy()
        failed = self._envs.set_state(state.get("env"), first)
        for name, array in self._arrays().items():
            if name != "generator":
                array[:] = saved[name]
        games, agents = len(self._agent), self._games.num_agents
        self._slot_of_row[:games] = np.arange(games) * agents + self._agent
        for slot in failed:
            self._rows.obs[slot], self._rows.is_first[slot] = first[slot], True
            self._returns[slot], self._course[slot] = 0.0, _NO_STEP
            if slot < games * agents:
                self._place[slot // agents] = -1
        self._groups = None
        self._tell()
        begun = {row: failed[slot] for row, slot in enumerate(self._slot_of_row.tolist()) if slot in failed}
        for row in begun:
            obs[row] = self._rows.obs[self._slot_of_row[row]]
        return begun

    def _check(self, saved: dict[str, np.ndarray], places: Any) -> None:
        if not isinstance(places, list) or len(places) != len(self._places):
            raise DoesNotFit(f"expected the states of {len(self._places)} versions")
        empty = [not isinstance(place, dict) or place.get("version") is None for place in places]
        agent, place = saved["agent"], saved["place"]
        if not ((agent >= 0) & (agent < self._games.num_agents)).all():
            raise DoesNotFit(f"agent must lie in 0..{self._games.num_agents - 1}")
        if not ((place >= -1) & (place < len(places))).all() or any(empty[index] for index in place[place >= 0]):
            raise DoesNotFit("a game is played by a version that is missing")

    def close(self) -> None:
        """Close the environment."""
        self._envs.close()


class _Place:
    """A policy that acts with one version at a time."""

    def __init__(self, policy: RecurrentPolicy) -> None:
        self.policy = policy
        self._weights: Weights | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the version."""
        self.version: int | None = None
        self.begun = 0
        """Games that it began."""
        self.closed = False
        """It begins no more."""
        self._weights = None
        self.policy.reset_memory()

    def load(self, weights: Weights) -> None:
        """Act with these weights and an empty memory."""
        self.clear()
        load_weights(self.policy, weights)
        self.version, self._weights = weights.policy_version, weights

    def get_state(self, ids: tuple[int, ...]) -> dict[str, Any]:
        """The state as plain data, with the memory of ``ids``."""
        weights = self._weights
        return {
            "version": self.version,
            "begun": self.begun,
            "closed": self.closed,
            "weights": None if weights is None else weights.flat.copy(),
            "memory": {name: array.copy() for name, array in self._memory(ids).items()},
        }

    def set_state(self, state: Any, ids: tuple[int, ...]) -> None:
        """Go on from ``get_state``.

        Raises:
            DoesNotFit, WeightsError: it is no such state.
        """
        self.clear()
        if not isinstance(state, dict):
            raise DoesNotFit("the description of a version is damaged")
        version, begun, closed = (state.get(name) for name in ("version", "begun", "closed"))
        if version is None:
            return
        flat = state.get("weights")
        if type(version) is not int or type(begun) is not int or type(closed) is not bool:
            raise DoesNotFit("the description of a version is damaged")
        if not isinstance(flat, np.ndarray) or flat.dtype != np.float32 or not np.isfinite(flat).all():
            raise DoesNotFit(f"weights of version {version} must be finite numbers of float32")
        memory = read_arrays(state.get("memory"), self._memory(ids))
        self.load(Weights(version, flat, hash_of(flat)))
        self.begun, self.closed = begun, closed
        self.policy.memory.write(ids, tuple(torch.from_numpy(array.copy()) for array in memory.values()))

    def _memory(self, ids: tuple[int, ...]) -> dict[str, np.ndarray]:
        state = self.policy.memory.read(ids) or self.policy.initial_state(len(ids))
        return {name: part.numpy() for name, part in zip(self.policy.core.state_shapes, state, strict=True)}


class _Group(NamedTuple):
    """The frozen agents that one version plays."""

    policy: RecurrentPolicy
    slots: np.ndarray
    """int64."""
    ids: tuple[int, ...]
    """The same, and the same tuple at every step: the memory then does nothing per id."""
