"""PettingZoo's environments: several agents per game, one slot each; they may end together or separately.

Games in which agents take turns (``AECEnv``) are played one turn a step (``envs.turns``).

Made by ``envs.registry`` for ids of the form ``pettingzoo:package.module:factory``. Episodes end in the boundary's
next-step form. The same-step form would need the first observation of an agent's next episode in the step in which its
last one ends, and there is none before the others have ended too; here such an agent is out of the game, with
reset transitions (masked), until the call that resets the game, which is a reset transition for all of its agents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from shoal.envs.arguments import naming_bad_arguments, refuse_settings
from shoal.envs.boundary import EnvSpec, StepRows
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.entry_points import is_maker
from shoal.envs.guard import Replaceable, first_answer, first_seed
from shoal.envs.masks import MaskSource
from shoal.envs.plain_state import DoesNotFit, read_arrays
from shoal.envs.reports import Reports
from shoal.envs.spaces import Declared, action_converter, declared_by, make_spec
from shoal.envs.surroundings import Surroundings
from shoal.envs.trials import TrialKey
from shoal.envs.wrappers import Wrapping, find_wrappers
from shoal.envs.writers import Malformed, Writer, check_flag, check_reward, make_writer, short

_FORM = "pettingzoo:package.module:factory, where factory(**env.kwargs) returns a pettingzoo.ParallelEnv or AECEnv"


class PettingZooEnvironment:
    """``num_envs / num_agents`` games; slot ``g * num_agents + a`` is the ``a``-th of ``possible_agents`` in game g."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        options: AdapterOptions | None = None,
        reseed_episodes: bool = False,
        /,
        **kwargs: Any,
    ) -> None:
        """Make the first game and look at its spaces; ``reset`` makes the others.

        Args:
            env_id: ``pettingzoo:package.module:factory``.
            num_envs: Slots, a multiple of the number of ``possible_agents``.
            seed: Determines everything random in environments that keep to their own generators.
            options: Wrappers, and how observations are read; None takes the defaults.
            reseed_episodes: Give every episode a seed of its own, not only the first: evaluation plays so.
            **kwargs: Arguments for the factory.

        Raises:
            EnvironmentNotFound: there is no such factory, or PettingZoo is not installed.
            ValueError: an argument is wrong, agents have different spaces, or a space is of a kind that the policy has
                no encoder or head for.
        """
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        # As many as the games would be of one agent each: the number of agents is not known yet.
        children = sequence.spawn(max(num_envs, 1))
        self._surroundings = Surroundings(env_id)
        with self._surroundings:
            make = _find_factory(env_id, options or AdapterOptions(), kwargs)
            env, agents, declared, first = _make_first(env_id, make, kwargs, first_seed(children[0]))
        try:
            if num_envs < 1 or num_envs % len(agents):
                raise ValueError(
                    f"{env_id}: num_envs={num_envs} must be a positive multiple of its {len(agents)} agents"
                )
            self.spec = make_spec(env_id, declared, options, num_agents=len(agents))
        except BaseException:
            env.close()
            raise
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self._to_env = action_converter(declared.action)
        self.action_mask = np.ones((num_envs, self.spec.num_mask), dtype=np.uint8)
        self.begins_anew = np.ones(num_envs, dtype=bool)
        self._rows = StepRows(
            np.zeros((num_envs, *self.spec.obs_shape), self.spec.obs_dtype),
            np.zeros(num_envs, dtype=bool),
            np.zeros(num_envs, dtype=np.float32),
            np.zeros(num_envs, dtype=bool),
            np.zeros(num_envs, dtype=bool),
        )
        self.reports = self._surroundings.reports
        write = make_writer(declared.observation, self.spec, batched=False, reports=self.reports)
        self._games = [
            _Game(
                env_id,
                agents,
                slice(begin, begin + len(agents)),
                child,
                make,
                write,
                declared.mask,
                self._rows,
                self.action_mask,
                self.begins_anew,
                self.reports,
                reseed_episodes,
            )
            for begin, child in zip(range(0, num_envs, len(agents)), children, strict=False)
        ]
        self._games[0].inner.adopt(env, first)

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape].

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        for game in self._games:
            with self._surroundings:
                game.begin()
            self.faults += game.inner.take_messages()
        self.begins_anew.fill(True)
        np.copyto(obs, self._rows.obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` [B, *action_shape] and fill ``rows``.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        actions = self._to_env(action)
        self.begins_anew.fill(False)
        with self._surroundings:
            for game in self._games:
                game.step(actions)
        for game in self._games:
            self.faults += game.inner.take_messages()
        for ours, theirs in zip(self._rows[:5], rows[:5], strict=True):
            np.copyto(theirs, ours)

    def watch(self, key: str) -> None:
        """Look for ``key`` in every agent's infos, as in ``envs.boundary.TrialEnvironment``."""
        for game in self._games:
            game.watch(key)

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later games, as in ``envs.boundary.OptionsEnvironment``."""
        for game in self._games:
            game.inner.options = options

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``."""
        with self._surroundings:
            games = [game.get_state() for game in self._games]
        return {"games": games, "obs": self._rows.obs.copy(), "mask": self.action_mask.copy()}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: game by game."""
        try:
            arrays = read_arrays(state, {"obs": self._rows.obs, "mask": self.action_mask})
            games = state.get("games")
            if not isinstance(games, list) or len(games) != len(self._games):
                raise DoesNotFit(f"expected the states of {len(self._games)} games")
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        failed: dict[int, str] = {}
        for game, saved in zip(self._games, games, strict=True):
            slots = game.slots
            with self._surroundings:
                why = game.set_state(saved, arrays["obs"][slots], arrays["mask"][slots])
            if why is not None:
                obs[slots] = self._rows.obs[slots]
                failed |= dict.fromkeys(range(slots.start, slots.stop), why)
            self.faults += game.inner.take_messages()
        return failed

    def first_environment(self) -> Any:
        """The first game."""
        return self._games[0].inner.env

    def close(self) -> None:
        """Close every game."""
        with self._surroundings:
            for game in self._games:
                game.inner.close()


class _Game:
    """One parallel environment, replaced when it fails, and its rows of the buffers that all games share."""

    def __init__(
        self,
        env_id: str,
        agents: tuple[Any, ...],
        slots: slice,
        seed: np.random.SeedSequence,
        make: Callable[[], Any],
        write: Writer,
        masks: MaskSource | None,
        rows: StepRows,
        action_mask: np.ndarray,
        begins_anew: np.ndarray,
        reports: Reports,
        reseed_episodes: bool,
    ) -> None:
        self._env_id = env_id
        self._agents, self.slots, self._write, self._reports = agents, slots, write, reports
        self._obs, self._is_first, self._reward, self._terminated, self._truncated = (row[slots] for row in rows[:5])
        self._masks, self._action_mask = masks, action_mask[slots]
        self._begins_anew = begins_anew[slots]
        self._trials: list[TrialKey] = []
        """One for each agent; empty if no key of infos is watched."""
        self._flat = self._obs.reshape(len(agents), -1)
        self._playing = np.zeros(len(agents), dtype=bool)
        self._finished = np.zeros(len(agents), dtype=bool)
        """Agents that had an episode since the last reset; PettingZoo does not revive agents."""
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
            TrialKey(key, f"{self._env_id}: slot {self.slots.start + index}", self._reports)
            for index in range(len(self._agents))
        ]

    def get_state(self) -> dict[str, Any]:
        """Its state as plain data (``Replaceable.get_state``)."""
        state = {**self.inner.get_state(), "playing": self._playing.copy(), "finished": self._finished.copy()}
        if self._trials:
            state["trial_ended"] = self._trial_ended()
        return state

    def _trial_ended(self) -> np.ndarray:
        return np.array([trial.was_told for trial in self._trials], dtype=bool)

    def set_state(self, state: Any, obs: np.ndarray, mask: np.ndarray) -> str | None:
        """Go on from ``get_state``, with these rows; else begin a new game and return why."""
        try:
            arrays = read_arrays(state, {"playing": self._playing, "finished": self._finished})
            trial_ended = read_arrays(state, {"trial_ended": self._trial_ended()} if self._trials else {})
            self.inner.set_state(state)
        except DoesNotFit as error:
            self.inner.restart()
            return str(error)
        self._playing[:], self._finished[:] = arrays["playing"], arrays["finished"]
        self._obs[:], self._action_mask[:] = obs, mask != 0
        for trial, ended in zip(self._trials, trial_ended.get("trial_ended", ()), strict=True):
            trial.was_told = bool(ended)
        return None

    def begin(self) -> None:
        """Reset the game: a reset transition (masked) for all of its agents."""
        if not self.inner.reset():
            self._begins_anew.fill(True)

    def step(self, actions: np.ndarray) -> None:
        """Step the game with the actions [B, ...] of agents in the game, or reset it if there are none."""
        if not self._playing.any():
            self.begin()
            return
        mine = actions[self.slots]
        chosen = {agent: mine[index] for index, agent in enumerate(self._agents) if self._playing[index]}
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
                    self._enter(index, agent, obs, infos, enters=agent in live and not self._finished[index])
                    continue
                self._observe(index, agent, obs, infos)
                self._reward[index] = check_reward(_of(reward, agent, "reward"))
                self._terminated[index] = check_flag(_of(terminated, agent, "terminated"), "terminated")
                self._truncated[index] = check_flag(_of(truncated, agent, "truncated"), "truncated")
                self._is_first[index] = False
                if self._terminated[index] or self._truncated[index]:
                    self._playing[index], self._finished[index] = False, True
                    info = infos.get(agent) if isinstance(infos, Mapping) else None
                    self._reports.end_episode(self.slots.start + index, info)
                    if self._trials:
                        self._trials[index].end(info)
                elif agent not in live:
                    raise Malformed("is gone from agents, but was neither terminated nor truncated")

    def _observe(self, index: int, agent: Any, obs: Any, infos: Any) -> None:
        seen = _of(obs, agent, "obs")
        if self._masks:
            seen, mask = self._masks.split(seen, infos.get(agent) if isinstance(infos, Mapping) else None)
            self._masks.write(mask, self._action_mask[index])
        self._write(seen, self._flat[index : index + 1])

    def _enter(self, index: int, agent: Any, obs: Any, infos: Any, *, enters: bool) -> None:
        """A row of a reset transition (masked): ``obs`` is the first observation if the agent ``enters`` the game, else
        zeros."""
        self._is_first[index] = True
        self._reward[index], self._terminated[index], self._truncated[index] = 0.0, False, False
        self._playing[index] = enters
        if enters:
            self._observe(index, agent, obs, infos)
            if self._trials:
                info = infos.get(agent) if isinstance(infos, Mapping) else None
                self._begins_anew[index] = self._trials[index].begin(info)
        else:
            self._flat[index] = 0
            self._action_mask[index] = 1

    def _live(self) -> set[Any]:
        live = set(self.inner.env.agents)
        if strangers := live.difference(self._agents):
            raise Malformed(f"agent {min(map(repr, strangers))} is not in possible_agents {short(self._agents)}")
        return live


def make_pettingzoo_spec(env_id: str, options: AdapterOptions, /, **kwargs: Any) -> EnvSpec:
    """The spec of one agent's slot, for any number of slots; raises what ``PettingZooEnvironment`` does."""
    with Surroundings(env_id):
        env, agents, declared, _ = _make_first(env_id, _find_factory(env_id, options, kwargs), kwargs, 0)
        try:
            return make_spec(env_id, declared, options, num_agents=len(agents))
        finally:
            env.close()


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Maker:
    """Create one game, wrapped."""

    factory: Callable[[], Any]
    wrappers: tuple[Wrapping, ...]

    def __call__(self) -> Any:
        from pettingzoo import AECEnv

        game = self.factory()
        if isinstance(game, AECEnv):
            from shoal.envs.turns import taking_turns

            game = taking_turns(game)
        for wrap in self.wrappers:
            game = wrap(game)
        return game


def _find_factory(env_id: str, options: AdapterOptions, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    module, _, name = env_id.removeprefix("pettingzoo:").partition(":")
    if not module or not name:
        raise EnvironmentNotFound(f"environment {env_id!r}: write {_FORM}")
    for setting in ("vectorization", "autoreset_mode"):
        if getattr(options, setting) != getattr(AdapterOptions(), setting):
            raise ValueError(
                f"{env_id}: env.{setting} is for gymnasium ids; PettingZoo's games run one after the other"
            )
    try:
        importlib.import_module("pettingzoo")
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(
            f"environment {env_id!r} needs the package {error.name!r}: pip install 'shoal[pettingzoo]'"
        ) from error
    try:
        factory = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(
            f"environment {env_id!r}: there is no module {error.name!r}; install the package that has it"
        ) from error
    except AttributeError as error:
        raise EnvironmentNotFound(f"environment {env_id!r}: {error}; write {_FORM}") from error
    if not callable(factory):
        raise ValueError(f"{env_id}: {name} is {short(factory)}; write {_FORM}")
    if not is_maker(factory):
        raise ValueError(
            f"{env_id}: {name} makes no game: expected a class with reset and step, or a function that is annotated -> "
            "pettingzoo.ParallelEnv or AECEnv or lies in a module that imports pettingzoo"
        )
    refuse_settings(env_id, kwargs, factory)
    return _Maker(functools.partial(factory, **kwargs), find_wrappers(options.wrappers, env_id))


def _make_first(
    env_id: str, make: Callable[[], Any], kwargs: Mapping[str, Any], seed: int
) -> tuple[Any, tuple[Any, ...], Declared, Any]:
    """An environment, its possible agents, the spaces of one agent, and the answer to the first reset, if any."""
    from pettingzoo import ParallelEnv

    with naming_bad_arguments(env_id, kwargs):
        env = make()
    try:
        if not isinstance(env, ParallelEnv):
            raise ValueError(f"{env_id}: the factory returned {short(env)}, must be a pettingzoo.ParallelEnv or AECEnv")
        agents = tuple(getattr(env, "possible_agents", ()))
        if not agents:
            raise ValueError(
                f"{env_id}: has no possible_agents; every agent that may ever play needs a slot of its own"
            )
        first = agents[0]
        for agent in agents[1:]:
            for kind in ("observation_space", "action_space"):
                one, other = getattr(env, kind)(first), getattr(env, kind)(agent)
                if one != other:
                    raise ValueError(
                        f"{env_id}: all agents share one policy and need the same {kind}; agent {first!r} has {one}, "
                        f"agent {agent!r} has {other}"
                    )
        observation, action = env.observation_space(first), env.action_space(first)
        answer = first_answer(env, action, seed)
        infos = answer[1] if answer else None
        # The first agent may join later.
        info = next((found for found in infos.values() if found), None) if isinstance(infos, Mapping) else None
        return env, agents, declared_by(env, observation, action, info), answer
    except BaseException:
        with contextlib.suppress(Exception):
            env.close()
        raise
