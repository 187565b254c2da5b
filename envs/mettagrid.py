"""MettaGrid as a native vector environment: the simulations of all slots write into one shared set of buffers.

Made by ``envs.registry``, of a game (``envs.mettagrid_game``). It never runs Python per agent, and per simulation only
the call of its C++ step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from shoal.envs.boundary import EnvironmentFault, EnvSpec, StepRows
from shoal.envs.mettagrid_game import Game, own_game
from shoal.envs.missions import Map, check_slots
from shoal.envs.plain_state import DoesNotFit, read_arrays, read_generator, to_plain
from shoal.envs.raised import raised

_VIBE = "change_vibe_"
_ENGINES = ("action.", "cell.", "status.", "objects.", "tokens_")
"""What the statistics begin with that MettaGrid keeps of every game."""
_LONGEST_REPLAYED = 20_000
"""An episode that may have more steps than these is not played again after a resume, but begun anew."""


class MettaGridEnvironment:
    """``num_envs / game.num_agents`` simulations; slot ``s * num_agents + a`` is agent ``a`` of simulation ``s``."""

    def __init__(
        self,
        game: Game,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        stagger: bool = True,
    ) -> None:
        """Build the buffers; ``reset`` builds the simulations.

        Args:
            game: What to play.
            num_envs: Slots, a multiple of ``game.num_agents``.
            seed: Determines maps and simulations; every simulation has a stream of its own.
            stagger: Spread the simulations over the phases of an episode by truncating the first episode of each at a
                different step. Otherwise all episodes of a worker would start and end on the same steps for ever, and
                every batch would show one phase of them. Slots in such an episode are marked in ``short_episode``.
        """
        check_slots(game.env_id, game.num_agents, num_envs)
        from mettagrid.config import mettagrid_c_config
        from mettagrid.mettagrid_c import MettaGrid

        self.spec = game.spec
        self.num_envs = num_envs
        """Agents per simulation."""
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        """[B]: the slot's current episode was shortened by ``stagger``, so its return is not that of a full episode."""
        self._reports = None if game.surroundings is None else game.surroundings.reports
        if self._reports is not None:
            self.reports = self._reports

        self._game = game
        self._stagger = stagger and game.staggers and game.max_steps > 0
        self._simulation, self._rename = MettaGrid, mettagrid_c_config.rename_map_agents
        # Simulation objects would translate the configuration anew for every episode, at four times the cost of the
        # rest of a reset. It does not change, so it is translated once.
        try:
            self._config, self._agent_names = mettagrid_c_config.convert_to_cpp_game_config(game.config)
        except Exception as error:
            raise ValueError(f"{game.env_id}: MettaGrid refuses this game: {raised(error)}") from error
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        self._rngs = [np.random.default_rng(child) for child in sequence.spawn(num_envs // game.num_agents)]
        self._ends = tuple(game.config.end_episode_on_game_stats.items())

        self._obs = np.zeros((num_envs, *self.spec.obs_shape), dtype=np.uint8)
        self._is_first = np.zeros(num_envs, dtype=bool)
        self._reward = np.zeros(num_envs, dtype=np.float32)
        self._terminated = np.zeros(num_envs, dtype=bool)
        self._truncated = np.zeros(num_envs, dtype=bool)
        self._action = np.zeros(num_envs, dtype=np.int32)
        self._vibe_action = np.zeros(num_envs, dtype=np.int32)
        names = [action.name for action in game.config.actions.actions()]
        self._num_actions = len(names)
        self._first_vibe = next((index for index, name in enumerate(names) if name.startswith(_VIBE)), None)
        """The first of the actions that change an agent's vibe, which come last; None if there are none."""
        self._advance: list[Callable[[], None]] = []
        self._current: list[Any] = [None] * len(self._rngs)
        """The simulation of each episode."""
        self._step = 0
        # The simulation does not say its state. It follows from its map, its seed and these.
        kept = game.max_steps if game.max_steps <= _LONGEST_REPLAYED else 0
        self._played = np.zeros((kept, num_envs), dtype=np.int32)
        """The actions of the last steps; those of step s, from 1, are in row s % max_steps. Empty where an episode may
        have more steps than are played again."""
        self._beginnings: list[tuple[int, int, Any]] = [(0, 0, None)] * len(self._rngs)
        """Of each simulation's episode: the step in which it began, its limit, the stream that it was drawn from."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape].

        Raises:
            EnvironmentFault: there is no map, or MettaGrid does not take it.
        """
        limits = self._first_limits()
        self._advance = [functools.partial(self._begin, index, limit) for index, limit in enumerate(limits)]
        try:
            for advance in tuple(self._advance):
                advance()
        except Exception as error:
            raise EnvironmentFault(f"{self.spec.env_id}: no episode can begin: {raised(error)}") from error
        np.copyto(obs, self._obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` int64 [B] and fill ``rows``."""
        # The simulation silently ignores actions out of range.
        if action.min() < 0 or action.max() >= self._num_actions:
            raise ValueError(
                f"{self.spec.env_id}: actions from {action.min()} to {action.max()}, must be 0..{self._num_actions - 1}"
            )
        self._is_first.fill(False)
        self._step += 1
        if len(self._played):
            self._played[self._step % len(self._played)] = action
        self._act(slice(None), action)
        try:
            for advance in self._advance:
                advance()
        except Exception as error:
            raise EnvironmentFault(f"{self.spec.env_id}: step {self._step} raised {raised(error)}") from error
        if not np.isfinite(self._reward).all():
            slot = int(np.flatnonzero(~np.isfinite(self._reward))[0])
            raise EnvironmentFault(f"{self.spec.env_id}: slot {slot}, step {self._step}: reward {self._reward[slot]}")
        np.copyto(rows.obs, self._obs)
        np.copyto(rows.is_first, self._is_first)
        np.copyto(rows.reward, self._reward)
        np.copyto(rows.terminated, self._terminated)
        np.copyto(rows.truncated, self._truncated)
        # All agents of a simulation end together, so its first agent's flags suffice.
        agents = self._game.num_agents
        ended = self._terminated[::agents] | self._truncated[::agents]
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                self._report(index)
                self._advance[index] = functools.partial(self._begin, index, self._game.max_steps)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``: what episodes were drawn from, and their actions."""
        agents, found = self._game.num_agents, []
        if not len(self._played):
            return {"simulations": None}
        for index, (begun, limit, stream) in enumerate(self._beginnings):
            slots = slice(index * agents, (index + 1) * agents)
            ended = bool(self._terminated[slots.start] | self._truncated[slots.start])
            steps = np.arange(self._step if ended else begun, self._step) + 1
            found.append(
                {
                    "random": to_plain(self._rngs[index] if ended else _generator(stream)),
                    "limit": limit,
                    "ended": ended,
                    "actions": self._played[steps % len(self._played), slots],
                    "obs": self._obs[slots].copy(),
                }
            )
        return {"simulations": found}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: the episodes are played again so far."""
        agents, failed = self._game.num_agents, dict[int, str]()
        saved = state.get("simulations") if isinstance(state, dict) else None
        if not len(self._played):
            return dict.fromkeys(range(self.num_envs), f"its episodes may have more than {_LONGEST_REPLAYED} steps")
        # As if all had gone on since their episodes began, none of which is longer than this.
        self._step = len(self._played)
        for index, fresh in enumerate(list(self._rngs)):
            slots = slice(index * agents, (index + 1) * agents)
            try:
                if not isinstance(saved, list) or len(saved) != len(self._rngs):
                    raise DoesNotFit("it is the state of other simulations")
                self._replay(index, slots, saved[index])
            except DoesNotFit as error:
                self._rngs[index] = fresh
                self._begin(index, self._game.max_steps)
                obs[slots] = self._obs[slots]
                failed |= dict.fromkeys(range(slots.start, slots.stop), str(error))
        return failed

    def _replay(self, index: int, slots: slice, state: Any) -> None:
        """Play a simulation's episode again, up to the step in which its state was taken.

        Raises:
            DoesNotFit: it is no such state, or the episode was another one.
        """
        longest, now = self._game.max_steps, self._step
        generator = read_generator(state.get("random") if isinstance(state, dict) else None)
        limit, actions = state.get("limit"), state.get("actions")
        seen = read_arrays(state, {"obs": self._obs[slots]})["obs"]
        if type(limit) is not int or not 1 <= limit <= longest or not isinstance(state.get("ended"), bool):
            raise DoesNotFit(f"the limit of an episode is {limit!r}, must be 1 to {longest}")
        shaped = isinstance(actions, np.ndarray) and actions.ndim == 2 and len(actions) <= limit
        read_arrays({"actions": actions}, {"actions": self._played[: len(actions) if shaped else 0, slots]})
        if actions.size and (actions.min() < 0 or actions.max() >= self._num_actions):
            raise DoesNotFit("an action is out of range")
        self._rngs[index] = generator
        if state["ended"]:
            self._terminated[slots] = True
            self.short_episode[slots] = limit < longest
            self._beginnings[index] = (now, limit, None)
            self._advance[index] = functools.partial(self._begin, index, longest)
            return
        self._step = now - len(actions)
        self._begin(index, limit)
        for action in actions:
            self._step += 1
            self._played[self._step % longest, slots] = action
            self._act(slots, action)
            self._is_first[slots] = False
            try:
                self._advance[index]()
            except Exception as error:
                self._step = now
                raise DoesNotFit(f"playing it again raised {type(error).__name__}: {error}") from error
        if self._terminated[slots.start] or self._truncated[slots.start] or not np.array_equal(self._obs[slots], seen):
            raise DoesNotFit("its episode, played again, came to other observations: was another version of it saved?")

    def close(self) -> None:
        """Release the simulations."""
        self._advance.clear()
        self._current.clear()

    def _begin(self, index: int, limit: int) -> None:
        """Put a new simulation in place of the one that ended, and write its first observations."""
        rng = self._rngs[index]
        self._beginnings[index] = (self._step, limit, rng.bit_generator.state)
        with self._game.surroundings or contextlib.nullcontext():
            grid = self._game.draw_map(rng)
        simulation = self._make_simulation(grid, limit, int(rng.integers(2**31)))
        agents = self._game.num_agents
        slots = slice(index * agents, (index + 1) * agents)
        self._reward[slots] = 0.0
        self._terminated[slots] = False
        self._truncated[slots] = False
        self._is_first[slots] = True
        self.short_episode[slots] = limit < self._game.max_steps
        self._current[index] = simulation
        simulation.set_buffers(
            self._obs[slots],
            self._terminated[slots],
            self._truncated[slots],
            self._reward[slots],
            self._action[slots],
            self._vibe_action[slots],
        )
        self._advance[index] = (
            functools.partial(self._step_to_end, simulation, slots) if self._ends else simulation.step
        )

    def _act(self, slots: slice, action: np.ndarray) -> None:
        """Hand over actions; one that changes the vibe is told beside the action that does nothing, the first one."""
        self._action[slots] = action
        if self._first_vibe is not None:
            vibe = action >= self._first_vibe
            self._vibe_action[slots] = np.where(vibe, action, 0)
            self._action[slots][vibe] = 0

    def _step_to_end(self, simulation: Any, slots: slice) -> None:
        """Step a simulation whose episodes also end where a statistic of the game reaches a threshold."""
        simulation.step()
        for name, threshold in self._ends:
            value = simulation.get_game_stat(name)
            if value is not None and value >= threshold:
                self._truncated[slots] = True

    def _report(self, index: int) -> None:
        """Report what a game of the user's has counted in an episode: its own numbers first, there is room for few."""
        if self._reports is None:
            return
        stats = self._current[index].get_episode_stats()
        of_game = {f"game.{name}": value for name, value in stats["game"].items() if not name.startswith(_ENGINES)}
        for agent, counted in enumerate(stats["agent"]):
            own = {name: value for name, value in counted.items() if not name.startswith(_ENGINES)}
            self._reports.end_episode(index * self._game.num_agents + agent, {**own, **of_game, **counted})

    def _make_simulation(self, grid: Map, limit: int, seed: int) -> Any:
        """Create an episode's simulation; ``limit`` is its length in steps."""
        self._config.max_steps = limit
        # Every agent has a configuration of its own under a name of its own.
        return self._simulation(self._config, self._rename(grid.tolist(), self._agent_names), seed)

    def _first_limits(self) -> list[int]:
        """Steps of each simulation's first episode: evenly spread, from a phase that differs between workers."""
        count, longest = len(self._rngs), self._game.max_steps
        if not self._stagger:
            return [longest] * count
        phase = 1.0 - self._rngs[0].random()
        return [max(1, round(longest * (index + phase) / count)) for index in range(count)]


def try_own_game(env_id: str, kwargs: Mapping[str, Any]) -> EnvSpec:
    """The spec of the user's own game, once an episode of it has begun.

    Raises:
        EnvironmentNotFound: as ``envs.mettagrid_game.own_game``.
        ValueError: likewise, or no episode can begin.
    """
    game = own_game(env_id, kwargs)
    env = MettaGridEnvironment(game, game.num_agents, 0)
    try:
        env.reset(np.zeros((game.num_agents, *env.spec.obs_shape), np.uint8))
    except EnvironmentFault as error:
        raise ValueError(str(error)) from error
    return env.spec


def _generator(state: Any) -> np.random.Generator:
    generator = np.random.default_rng(0)
    generator.bit_generator.state = state
    return generator
