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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from shoal.envs.actions import choices
from shoal.envs.arguments import naming_bad_arguments, refuse_settings
from shoal.envs.boundary import EnvSpec, StepRows
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.entry_points import find_maker
from shoal.envs.games import Games, make_groups
from shoal.envs.guard import first_answer, first_seed
from shoal.envs.plain_state import DoesNotFit, read_arrays
from shoal.envs.spaces import Declared, declared_by, make_spec
from shoal.envs.surroundings import Surroundings
from shoal.envs.wrappers import Wrapping, find_wrappers
from shoal.envs.writers import short

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
        self._games = games = make_games(env_id, num_envs, seed, options, reseed_episodes, kwargs, together)
        (group,) = games.groups
        self._group = group
        self.spec, self.num_envs, self.reports = group.spec, num_envs, group.reports
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self.action_mask, self.begins_anew = group.action_mask, games.flags.begins_anew

    @property
    def faults(self) -> list[str]:
        """Messages of the games, as in ``envs.boundary.VectorEnvironment``."""
        return self._games.faults

    @faults.setter
    def faults(self, messages: list[str]) -> None:
        self._games.faults = messages

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape].

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        self._games.reset()
        np.copyto(obs, self._group.obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` [B, *action_shape] and fill ``rows``.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        self._games.step((action,))
        np.copyto(rows.obs, self._group.obs)
        self._games.flags.copy_to(rows, slice(None))

    def watch(self, key: str) -> None:
        """Look for ``key`` in every agent's infos, as in ``envs.boundary.TrialEnvironment``."""
        for game in self._games.all:
            game.watch(key)

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later games, as in ``envs.boundary.OptionsEnvironment``."""
        self._games.set_options(options)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``."""
        with self._games.surroundings:
            games = [game.get_state() for game in self._games.all]
        return {"games": games, "obs": self._group.obs.copy(), "mask": self.action_mask.copy()}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: game by game."""
        ours = {"obs": self._group.obs, "mask": self.action_mask}
        try:
            saved = read_arrays(state, ours)
            games = state.get("games")
            if not isinstance(games, list) or len(games) != len(self._games.all):
                raise DoesNotFit(f"expected the states of {len(self._games.all)} games")
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        failed: dict[int, str] = {}
        for game, of_game in zip(self._games.all, games, strict=True):
            slots = game.slots
            with self._games.surroundings:
                why = game.set_state(of_game)
            if why is None:
                ours["obs"][slots], ours["mask"][slots] = saved["obs"][slots], saved["mask"][slots] != 0
            else:
                obs[slots] = ours["obs"][slots]
                failed |= dict.fromkeys(range(slots.start, slots.stop), why)
            self.faults += game.inner.take_messages()
        return failed

    def first_environment(self) -> Any:
        """The first game."""
        return self._games.all[0].inner.env

    def close(self) -> None:
        """Close every game."""
        self._games.close()


Divide = Callable[[str, tuple[Any, ...]], Mapping[str, tuple[int, ...]]]
"""(env_id, possible_agents) -> indices of the agents that share spaces, by the name of who plays them; raises
ValueError. A single group is of the name ""."""


def together(env_id: str, agents: tuple[Any, ...]) -> Mapping[str, tuple[int, ...]]:
    """All agents share spaces."""
    return {"": tuple(range(len(agents)))}


def make_games(
    env_id: str,
    num_envs: int,
    seed: int | np.random.SeedSequence,
    options: AdapterOptions | None,
    reseed_episodes: bool,
    kwargs: Mapping[str, Any],
    divide: Divide,
) -> Games:
    """The games of ``num_envs`` slots, of which the first is made; raises what ``PettingZooEnvironment`` does."""
    sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    # As many as the games would be of one agent each: the number of agents is not known yet.
    children = sequence.spawn(max(num_envs, 1))
    surroundings = Surroundings(env_id)
    with surroundings:
        make = _find_factory(env_id, options or AdapterOptions(), kwargs)
        env, agents, declared, answer = _make_first(env_id, make, kwargs, first_seed(children[0]), divide)
    try:
        if num_envs < 1 or num_envs % len(agents):
            raise ValueError(f"{env_id}: num_envs={num_envs} must be a positive multiple of its {len(agents)} agents")
        groups = make_groups(env_id, options, declared, num_envs // len(agents), surroundings.reports)
    except BaseException:
        env.close()
        raise
    return Games(env_id, agents, groups, children, make, surroundings, reseed_episodes, (env, answer))


class GroupSpec(NamedTuple):
    """Agents that share spaces."""

    agents: tuple[str, ...]
    """Their names."""
    indices: tuple[int, ...]
    """Their places among ``possible_agents``."""
    spec: EnvSpec
    """Of one agent's slot."""


def make_group_specs(
    env_id: str, options: AdapterOptions, kwargs: Mapping[str, Any], divide: Divide
) -> dict[str, GroupSpec]:
    """The groups by the name of who plays them; raises what ``PettingZooEnvironment`` does."""
    with Surroundings(env_id):
        make = _find_factory(env_id, options, kwargs)
        env, agents, declared, _ = _make_first(env_id, make, kwargs, 0, divide)
        try:
            return {
                name: GroupSpec(
                    tuple(str(agents[index]) for index in indices),
                    indices,
                    make_spec(env_id, spaces, options, num_agents=len(indices)),
                )
                for name, (indices, spaces) in declared.items()
            }
        finally:
            env.close()


def make_pettingzoo_spec(env_id: str, options: AdapterOptions, /, **kwargs: Any) -> EnvSpec:
    """The spec of one agent's slot, for any number of slots; raises what ``PettingZooEnvironment`` does."""
    (group,) = make_group_specs(env_id, options, kwargs, together).values()
    return group.spec


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
    name = env_id.removeprefix("pettingzoo:")
    if not all(name.partition(":")):
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
    expected = (
        "a class with reset and step, or a function that is annotated -> pettingzoo.ParallelEnv or AECEnv or lies in a "
        "module that imports pettingzoo"
    )
    factory = find_maker(env_id, name, _FORM, expected)
    refuse_settings(env_id, kwargs, factory)
    return _Maker(functools.partial(factory, **kwargs), find_wrappers(options.wrappers, env_id))


def _make_first(
    env_id: str, make: Callable[[], Any], kwargs: Mapping[str, Any], seed: int, divide: Divide
) -> tuple[Any, tuple[Any, ...], dict[str, tuple[tuple[int, ...], Declared]], Any]:
    """An environment, its possible agents, the indices and spaces of every group, and the answer to the first reset, if
    any."""
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
        groups = divide(env_id, agents)
        for name, indices in groups.items():
            _check_shared(env_id, env, name, [agents[index] for index in indices])
        actions = [env.action_space(agents[indices[0]]) for indices in groups.values()]
        # Only choices have masks, which the answer tells of.
        answer = first_answer(env, next((space for space in actions if choices(space)), actions[0]), seed)
        infos = answer[1] if answer and isinstance(answer[1], Mapping) else {}
        declared: dict[str, tuple[tuple[int, ...], Declared]] = {}
        for name, indices in groups.items():
            members = [agents[index] for index in indices]
            # The first agent may join later.
            info = next((found for agent, found in infos.items() if found and agent in members), None)
            spaces = env.observation_space(members[0]), env.action_space(members[0])
            declared[name] = indices, declared_by(env_id, env, *spaces, info)
        return env, agents, declared, answer
    except BaseException:
        with contextlib.suppress(Exception):
            env.close()
        raise


def _check_shared(env_id: str, env: Any, name: str, agents: Sequence[Any]) -> None:
    first = agents[0]
    who = f"the agents of policy {name!r} share it" if name else "all agents share one policy"
    instead = f"give {'agents of another kind' if name else 'each kind of agents'} a policy of their own (policies)"
    for agent in agents[1:]:
        for kind in ("observation_space", "action_space"):
            one, other = getattr(env, kind)(first), getattr(env, kind)(agent)
            if one != other:
                raise ValueError(
                    f"{env_id}: {who} and need the same {kind}; agent {first!r} has {one}, agent {agent!r} has "
                    f"{other}; {instead}"
                )
