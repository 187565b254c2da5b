"""The games of a PettingZoo environment: rows for every agent, whoever the agents are divided among.

Agents that share spaces form a group, with arrays of its own for observations and masks. Where all agents share them,
there is one group (``envs.pettingzoo``); where several policies are trained, one for each (``envs.teams``).
"""

# S slots of all games, B rows of one group, A agents of a game

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from shoal.envs.actions import Converter, action_converter, by_row, choices
from shoal.envs.boundary import EnvSpec, StepRows
from shoal.envs.config import AdapterOptions
from shoal.envs.guard import Replaceable
from shoal.envs.masks import MaskSource, remark_unused
from shoal.envs.plain_state import DoesNotFit, read_arrays
from shoal.envs.reports import Reports
from shoal.envs.spaces import Declared, make_spec
from shoal.envs.surroundings import Surroundings
from shoal.envs.trials import TrialKey
from shoal.envs.writers import Malformed, Writer, check_flag, check_reward, make_writer, short


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The agents of all games that share spaces."""

    spec: EnvSpec
    """Its ``num_agents`` are those of the group in one game."""
    slots: np.ndarray
    """int64 [B]: the slot of every row, game by game."""
    obs: np.ndarray
    """[B, *obs_shape]."""
    action_mask: np.ndarray
    """uint8 [B, num_mask]."""
    reports: Reports
    """What was told of its rows; a report's slot is the row."""
    to_env: Converter
    """Converts the policy's actions [B, *action_shape]."""
    seats: tuple[Seat, ...]
    """[B]."""


class Seat(NamedTuple):
    """What one agent of one game has for itself, as views."""

    group: int
    row: int
    """The row within its group."""
    flat: np.ndarray
    """[1, size of an observation]."""
    action_mask: np.ndarray
    """uint8 [num_mask]."""
    write: Writer
    masks: MaskSource | None
    has_choices: bool
    reports: Reports


def make_groups(
    env_id: str,
    options: AdapterOptions | None,
    declared: Mapping[str, tuple[tuple[int, ...], Declared]],
    num_games: int,
    reports: Reports,
) -> list[Group]:
    """The groups of ``declared``: for each the indices of its agents among those of a game, and their spaces.

    By their names, with which remarks on their observations begin; that of a group which is alone is empty.
    ``reports`` are those of the first group; the others have their own.

    Raises:
        ValueError: a space is of a kind that the policy has no encoder or head for.
    """
    num_agents = sum(len(agents) for agents, _ in declared.values())
    groups = []
    for number, (name, (agents, spaces)) in enumerate(declared.items()):
        spec = make_spec(env_id, spaces, options, num_agents=len(agents))
        slots = (np.arange(num_games)[:, None] * num_agents + np.array(agents)).reshape(-1)
        obs = np.zeros((len(slots), *spec.obs_shape), spec.obs_dtype)
        mask = np.ones((len(slots), spec.num_mask), np.uint8)
        told = Reports() if number else reports
        field = f"{name}: obs" if name else "obs"
        write = make_writer(spaces.observation, spec, batched=False, reports=told, field=field)
        flat = obs.reshape(len(slots), -1)
        seats = tuple(
            Seat(number, row, flat[row : row + 1], mask[row], write, spaces.mask, bool(choices(spaces.action)), told)
            for row in range(len(slots))
        )
        groups.append(Group(spec, slots, obs, mask, told, action_converter(spaces.action), seats))
    return groups


def seats_of_games(groups: Sequence[Group], num_agents: int) -> list[tuple[Seat, ...]]:
    """The seats of every game's agents, in the order of ``possible_agents``."""
    by_slot = {slot: seat for group in groups for slot, seat in zip(group.slots.tolist(), group.seats, strict=True)}
    return [
        tuple(by_slot[slot] for slot in range(begin, begin + num_agents))
        for begin in range(0, len(by_slot), num_agents)
    ]


class Flags(NamedTuple):
    """What every slot's rows have in common, whatever its spaces: [S] each, as in ``envs.boundary``."""

    is_first: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    begins_anew: np.ndarray

    @classmethod
    def of(cls, slots: int) -> Flags:
        """Arrays for so many slots."""
        off = [np.zeros(slots, np.bool_) for _ in range(3)]
        return cls(off[0], np.zeros(slots, np.float32), off[1], off[2], np.ones(slots, np.bool_))

    def copy_to(self, rows: StepRows, slots: np.ndarray | slice) -> None:
        """Copy those of ``slots`` into ``rows``."""
        rows.is_first[:], rows.reward[:] = self.is_first[slots], self.reward[slots]
        rows.terminated[:], rows.truncated[:] = self.terminated[slots], self.truncated[slots]


class Game:
    """One parallel environment, replaced when it fails, and its rows of the arrays that all games share."""

    def __init__(
        self,
        env_id: str,
        agents: tuple[Any, ...],
        slots: slice,
        seats: tuple[Seat, ...],
        seed: np.random.SeedSequence,
        make: Callable[[], Any],
        flags: Flags,
        reseed_episodes: bool,
    ) -> None:
        self._env_id = env_id
        self._agents, self.slots, self._seats = agents, slots, seats
        self._is_first, self._reward, self._terminated, self._truncated, self._begins_anew = (
            part[slots] for part in flags
        )
        self._trials: list[TrialKey] = []
        """One for each agent; empty if no key of infos is watched."""
        self._looks_for_masks = True
        self._playing = np.zeros(len(agents), dtype=bool)
        self._finished = np.zeros(len(agents), dtype=bool)
        """Agents that have ended and were listed ever since."""
        self.inner = Replaceable(
            env_id,
            f"slots {slots.start}..{slots.stop - 1}",
            seed,
            make,
            self._read_reset,
            reseed_episodes=reseed_episodes,
        )

    def watch(self, key: str) -> None:
        """Look for ``key`` in the infos of every agent."""
        self._trials = [
            TrialKey(key, f"{self._env_id}: slot {self.slots.start + index}", seat.reports)
            for index, seat in enumerate(self._seats)
        ]

    def get_state(self) -> dict[str, Any]:
        """Its state as plain data (``Replaceable.get_state``)."""
        state = {**self.inner.get_state(), "playing": self._playing.copy(), "finished": self._finished.copy()}
        if self._trials:
            state["trial_ended"] = self._trial_ended()
        return state

    def _trial_ended(self) -> np.ndarray:
        return np.array([trial.was_told for trial in self._trials], dtype=bool)

    def set_state(self, state: Any) -> str | None:
        """Go on from ``get_state``; the caller then puts back observations and masks. Else begin a new game and return
        why."""
        try:
            arrays = read_arrays(state, {"playing": self._playing, "finished": self._finished})
            trial_ended = read_arrays(state, {"trial_ended": self._trial_ended()} if self._trials else {})
            self.inner.set_state(state)
        except DoesNotFit as error:
            self.inner.restart()
            return str(error)
        self._playing[:], self._finished[:] = arrays["playing"], arrays["finished"]
        for trial, ended in zip(self._trials, trial_ended.get("trial_ended", ()), strict=True):
            trial.was_told = bool(ended)
        return None

    def begin(self) -> None:
        """Reset the game: a reset transition (masked) for all of its agents."""
        if not self.inner.reset():
            self._begins_anew.fill(True)

    def step(self, actions: Sequence[Sequence[Any]]) -> None:
        """Step the game with the actions [B, ...] of every group, or reset it if no agent is in the game."""
        if not self._playing.any():
            self.begin()
            return
        chosen = {
            agent: actions[seat.group][seat.row]
            for index, (agent, seat) in enumerate(zip(self._agents, self._seats, strict=True))
            if self._playing[index]
        }
        if not self.inner.step(chosen, self._read_step):
            self._begins_anew.fill(True)

    def _read_reset(self, obs: Any, infos: Any) -> None:
        self._finished.fill(False)
        live = self._live()
        for index, agent in enumerate(self._agents):
            with _naming(agent):
                self._enter(index, agent, obs, infos, enters=agent in live)
        if not self._playing.any():
            raise Malformed("no agent is in the game after a reset")

    def _read_step(self, obs: Any, reward: Any, terminated: Any, truncated: Any, infos: Any) -> None:
        live = self._live()
        for index, agent in enumerate(self._agents):
            with _naming(agent):
                if not self._playing[index]:
                    # One that has ended may still be listed; one that was gone and is listed again is back.
                    self._finished[index] &= agent in live
                    self._enter(index, agent, obs, infos, enters=agent in live and not self._finished[index])
                    continue
                seat = self._seats[index]
                self._terminated[index] = check_flag(_of(terminated, agent, "terminated"), "terminated")
                self._truncated[index] = check_flag(_of(truncated, agent, "truncated"), "truncated")
                self._reward[index] = check_reward(_of(reward, agent, "reward"))
                if self._terminated[index] and isinstance(obs, Mapping) and agent not in obs:
                    # Nothing is bootstrapped from it.
                    seat.flat[:] = 0
                    seat.action_mask[:] = 1
                else:
                    self._observe(seat, agent, obs, infos)
                self._is_first[index] = False
                if self._terminated[index] or self._truncated[index]:
                    self._playing[index], self._finished[index] = False, agent in live
                    info = infos.get(agent) if isinstance(infos, Mapping) else None
                    seat.reports.end_episode(seat.row, info)
                    if self._trials:
                        self._trials[index].end(info)
                elif agent not in live:
                    raise Malformed("is gone from agents, but was neither terminated nor truncated")

    def _enter(self, index: int, agent: Any, obs: Any, infos: Any, *, enters: bool) -> None:
        """A row of a reset transition (masked): ``obs`` is the first observation if the agent ``enters`` the game, else
        zeros."""
        self._is_first[index] = True
        self._reward[index], self._terminated[index], self._truncated[index] = 0.0, False, False
        self._playing[index] = enters
        seat = self._seats[index]
        if enters:
            self._observe(seat, agent, obs, infos)
            if self._trials:
                info = infos.get(agent) if isinstance(infos, Mapping) else None
                self._begins_anew[index] = self._trials[index].begin(info)
        else:
            seat.flat[:] = 0
            seat.action_mask[:] = 1

    def _observe(self, seat: Seat, agent: Any, obs: Any, infos: Any) -> None:
        seen = _of(obs, agent, "obs")
        info = infos.get(agent) if isinstance(infos, Mapping) else None
        if seat.masks:
            seen, mask = seat.masks.split(seen, info)
            seat.masks.write(mask, seat.action_mask)
        elif self._looks_for_masks:
            self._looks_for_masks = not remark_unused(info, seat.has_choices, f"agent {agent!r}", seat.reports)
        seat.write(seen, seat.flat)

    def _live(self) -> set[Any]:
        live = set(self.inner.env.agents)
        if strangers := live.difference(self._agents):
            raise Malformed(f"agent {min(map(repr, strangers))} is not in possible_agents {short(self._agents)}")
        return live


class Games:
    """All games of an environment: ``reset`` and ``step`` write ``flags`` and the groups' arrays.

    Args:
        env_id: for messages.
        agents: ``possible_agents`` of a game.
        groups: who shares which spaces.
        seeds: one for each game, or more.
        make: makes a game.
        surroundings: those that the games are played in.
        reseed_episodes: give every episode a seed of its own, not only the first.
        first: a game that is made already, and its answer to ``reset`` if it was asked.
    """

    def __init__(
        self,
        env_id: str,
        agents: tuple[Any, ...],
        groups: list[Group],
        seeds: Sequence[np.random.SeedSequence],
        make: Callable[[], Any],
        surroundings: Surroundings,
        reseed_episodes: bool,
        first: tuple[Any, Any],
    ) -> None:
        self.groups, self.surroundings = groups, surroundings
        seats = seats_of_games(groups, len(agents))
        self.num_slots = len(seats) * len(agents)
        self.flags = Flags.of(self.num_slots)
        self.faults: list[str] = []
        begins = range(0, self.num_slots, len(agents))
        self.all = [
            Game(env_id, agents, slice(begin, begin + len(agents)), own, seed, make, self.flags, reseed_episodes)
            for begin, own, seed in zip(begins, seats, seeds, strict=False)
        ]
        self.all[0].inner.adopt(*first)

    def reset(self) -> None:
        """Begin an episode in every slot.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        for game in self.all:
            with self.surroundings:
                game.begin()
            self.faults += game.inner.take_messages()
        self.flags.begins_anew.fill(True)

    def step(self, actions: Sequence[np.ndarray]) -> None:
        """Apply the actions [B, *action_shape] of every group.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        chosen = [by_row(group.to_env(action), len(action)) for group, action in zip(self.groups, actions, strict=True)]
        self.flags.begins_anew.fill(False)
        with self.surroundings:
            for game in self.all:
                game.step(chosen)
        for game in self.all:
            self.faults += game.inner.take_messages()

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later games."""
        for game in self.all:
            game.inner.options = options

    def close(self) -> None:
        """Close every game."""
        with self.surroundings:
            for game in self.all:
                game.inner.close()


@contextlib.contextmanager
def _naming(agent: Any) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise Malformed(f"agent {agent!r}: {error}") from None


def _of(answers: Any, agent: Any, field: str) -> Any:
    if not isinstance(answers, Mapping) or agent not in answers:
        raise Malformed(f"{field} {short(answers)} is not for it")
    return answers[agent]
