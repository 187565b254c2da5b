"""Create vector environments, or only their specs, from environment ids."""

from __future__ import annotations

import difflib
import inspect
import json
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from shoal.envs.arguments import refuse_settings
from shoal.envs.boundary import EnvSpec, OptionsEnvironment, VectorEnvironment
from shoal.envs.config import OPTION_NAMES, AdapterOptions, EnvironmentNotFound
from shoal.envs.missions import MISSIONS

_OF_OTHERS = ("mettagrid/", "mettagrid:", "pettingzoo:", "envpool:")


def list_env_ids() -> list[str]:
    """List the built-in ids; any gymnasium id and PettingZoo's parallel environments work as well."""
    return [*MISSIONS, "recall", "synthetic"]


def make_vector_env(
    env_id: str,
    num_envs: int,
    seed: int | np.random.SeedSequence,
    options: AdapterOptions | None = None,
    whole_episodes: bool = False,
    /,
    **kwargs: Any,
) -> VectorEnvironment:
    """Make ``num_envs`` slots of an environment.

    Args:
        env_id: ``mettagrid/<mission>``, ``recall``, ``synthetic`` (options may follow as in ``recall?delay=12``), a
            gymnasium id, ``pettingzoo:package.module:factory``, ``mettagrid:package.module:function``, or
            ``envpool:TASK``.
        num_envs: Slots; where several agents share an environment, a multiple of its agents.
        seed: Determines everything that is random in all slots.
        options: How environments of other libraries are made, stepped and read; None takes the defaults.
        whole_episodes: For evaluation: first episodes are not shortened, and each episode has its own seed if the
            environment takes one.
        **kwargs: The environment's own arguments, by any name.

    Raises:
        EnvironmentNotFound: no installed environment has this id.
        ValueError: ``num_envs`` or an argument does not fit the environment.
    """
    if isinstance(seed, np.random.SeedSequence):
        # Spawning from the caller's own would give the next environment made with it other children.
        seed = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key, pool_size=seed.pool_size)
    options = options or AdapterOptions()
    name, written = _split(env_id)
    if name.startswith("mettagrid/"):
        mission = MISSIONS.get(name)
        if mission is None:
            raise EnvironmentNotFound(_unknown_own(env_id, name))
        from shoal.envs.mettagrid import MettaGridEnvironment
        from shoal.envs.mettagrid_game import mission_game

        whole = {"stagger": False} if whole_episodes else {}
        game = mission_game(mission)
        return _make(env_id, options, MettaGridEnvironment, game, num_envs, seed, **{**whole, **written, **kwargs})
    if name.startswith("mettagrid:"):
        from shoal.envs.mettagrid import MettaGridEnvironment
        from shoal.envs.mettagrid_game import own_game

        whole = {"stagger": False} if whole_episodes else {}
        return _make(env_id, options, MettaGridEnvironment, own_game(env_id, kwargs), num_envs, seed, **whole)
    if name == "recall":
        from shoal.envs.recall import RecallEnvironment

        return _make(env_id, options, RecallEnvironment, num_envs, seed, **{**written, **kwargs})
    if name == "synthetic":
        from shoal.envs.synthetic import SyntheticEnvironment

        whole = {"together": True} if whole_episodes else {}
        return _make(env_id, options, SyntheticEnvironment, num_envs, seed, **{**whole, **written, **kwargs})
    if close := difflib.get_close_matches(name, list_env_ids(), cutoff=0.8):
        raise EnvironmentNotFound(f"environment {env_id!r} is unknown; did you mean {' or '.join(close)}?")
    if name.startswith("pettingzoo:"):
        from shoal.envs.pettingzoo import PettingZooEnvironment

        return _with_options(PettingZooEnvironment(env_id, num_envs, seed, options, whole_episodes, **kwargs), options)
    if options.vectorization == "native" or name.startswith("envpool:"):
        from shoal.envs.native import NativeEnvironment

        return _with_options(NativeEnvironment(env_id, num_envs, seed, options, **kwargs), options)
    from shoal.envs.gym import GymEnvironment

    return _with_options(GymEnvironment(env_id, num_envs, seed, options, whole_episodes, **kwargs), options)


_Optioned = TypeVar("_Optioned", bound=OptionsEnvironment)


def _with_options(env: _Optioned, options: AdapterOptions) -> _Optioned:
    if options.reset_options:
        try:
            env.set_options(dict(options.reset_options))
        except BaseException:
            env.close()
            raise
    return env


def is_of_gymnasium(env_id: str) -> bool:
    """Whether gymnasium makes the environment of this id: neither we nor another library."""
    name, _ = _split(env_id)
    return not name.startswith(_OF_OTHERS) and name not in ("recall", "synthetic")


def make_env_spec(env_id: str, options: AdapterOptions | None = None, /, **kwargs: Any) -> EnvSpec:
    """Return the spec of ``make_vector_env``'s environment, from an instance with the fewest slots."""
    if env_id.startswith("pettingzoo:"):
        from shoal.envs.pettingzoo import make_pettingzoo_spec

        return make_pettingzoo_spec(env_id, options or AdapterOptions(), **kwargs)
    if env_id.startswith("mettagrid:"):
        from shoal.envs.mettagrid import try_own_game

        return try_own_game(env_id, kwargs)
    env = make_one_env(env_id, 0, options, **kwargs)
    try:
        return env.spec
    finally:
        env.close()


def make_one_env(
    env_id: str, seed: int | np.random.SeedSequence, options: AdapterOptions | None = None, /, **kwargs: Any
) -> VectorEnvironment:
    """``make_vector_env`` with the fewest slots: one environment, or one game of all its agents."""
    if env_id.startswith(("pettingzoo:", "mettagrid:")):
        num_agents = make_env_spec(env_id, options, **kwargs).num_agents
    else:
        mission = MISSIONS.get(_split(env_id)[0])
        num_agents = 1 if mission is None else mission.num_agents
    return make_vector_env(env_id, num_agents, seed, options, **kwargs)


def _split(env_id: str) -> tuple[str, dict[str, Any]]:
    """Parse ``recall?delay=12`` into its name and ``{"delay": 12}``; values are JSON."""
    name, _, query = env_id.partition("?")
    if not query or not (name.startswith("mettagrid/") or name in ("recall", "synthetic")):
        return env_id, {}
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True)
        return name, {key: json.loads(value) for key, value in pairs}
    except ValueError as error:
        raise EnvironmentNotFound(f"environment {env_id!r}: {query!r} is not of the form key=number&key=...") from error


def _make(
    env_id: str, options: AdapterOptions, adapter: Callable[..., VectorEnvironment], /, *args: Any, **kwargs: Any
) -> VectorEnvironment:
    refuse_settings(env_id, kwargs, adapter)
    for name in OPTION_NAMES:
        if getattr(options, name) != getattr(AdapterOptions(), name):
            raise ValueError(f"{env_id}: env.{name} is for environments of gymnasium and PettingZoo; leave it out")
    try:
        inspect.signature(adapter).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{env_id}: {error}") from None
    return adapter(*args, **kwargs)


def _unknown_own(env_id: str, name: str) -> str:
    close = difflib.get_close_matches(name, MISSIONS, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"environment {env_id!r} is unknown; {hint}Missions: {', '.join(MISSIONS)}"
