"""Create vector environments, or only their specs, from environment ids."""

from __future__ import annotations

import difflib
import inspect
import json
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np
from shoal.envs.boundary import EnvSpec, VectorEnvironment
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.missions import MISSIONS


def list_env_ids() -> list[str]:
    """List the built-in ids; any gymnasium id and PettingZoo's parallel environments work as well."""
    return [*MISSIONS, "recall", "synthetic"]


def make_vector_env(env_id: str, num_envs: int, seed: int | np.random.SeedSequence, **kwargs: Any) -> VectorEnvironment:
    """Make ``num_envs`` slots of an environment.

    Args:
        env_id: ``mettagrid/<mission>``, ``recall``, ``synthetic`` (options may follow as in ``recall?delay=12``), a
            gymnasium id, or ``pettingzoo:package.module:factory``.
        num_envs: Slots; where several agents share an environment, a multiple of its agents.
        seed: Determines everything that is random in all slots.
        **kwargs: Arguments for the environment; for gymnasium ids also ``vectorization`` ("sync", "async", "native")
            and what ``envs.gym.GymEnvironment`` takes.

    Raises:
        EnvironmentNotFound: no installed environment has this id.
        ValueError: ``num_envs`` or an argument does not fit the environment.
    """
    if isinstance(seed, np.random.SeedSequence):
        # Spawning from the caller's own would give the next environment made with it other children.
        seed = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key, pool_size=seed.pool_size)
    name, options = _split(env_id)
    if name.startswith("mettagrid/"):
        mission = MISSIONS.get(name)
        if mission is None:
            raise EnvironmentNotFound(_unknown_own(env_id, name))
        from shoal.envs.mettagrid import MettaGridEnvironment

        return _make(env_id, MettaGridEnvironment, mission, num_envs, seed, **{**options, **kwargs})
    if name == "recall":
        from shoal.envs.recall import RecallEnvironment

        return _make(env_id, RecallEnvironment, num_envs, seed, **{**options, **kwargs})
    if name == "synthetic":
        from shoal.envs.synthetic import SyntheticEnvironment

        return _make(env_id, SyntheticEnvironment, num_envs, seed, **{**options, **kwargs})
    if close := difflib.get_close_matches(name, list_env_ids(), cutoff=0.8):
        raise EnvironmentNotFound(f"environment {env_id!r} is unknown; did you mean {' or '.join(close)}?")
    if name.startswith("pettingzoo:"):
        from shoal.envs.pettingzoo import PettingZooEnvironment

        return PettingZooEnvironment(env_id, num_envs, seed, **kwargs)
    if kwargs.get("vectorization") == "native":
        from shoal.envs.native import NativeEnvironment

        del kwargs["vectorization"]
        return NativeEnvironment(env_id, num_envs, seed, **kwargs)
    from shoal.envs.gym import GymEnvironment

    return GymEnvironment(env_id, num_envs, seed, **kwargs)


def make_env_spec(env_id: str, **kwargs: Any) -> EnvSpec:
    """Return the spec of ``make_vector_env``'s environment, from an instance with the fewest slots."""
    if env_id.startswith("pettingzoo:"):
        from shoal.envs.pettingzoo import make_pettingzoo_spec

        return make_pettingzoo_spec(env_id, **kwargs)
    mission = MISSIONS.get(_split(env_id)[0])
    env = make_vector_env(env_id, 1 if mission is None else mission.num_agents, 0, **kwargs)
    try:
        return env.spec
    finally:
        env.close()


def evaluation_kwargs(env_id: str, **kwargs: Any) -> dict[str, Any]:
    """Add to ``kwargs`` the arguments for playing whole episodes, without overriding any.

    First episodes are not shortened, and each episode has its own seed if the environment takes one.
    """
    name = _split(env_id)[0]
    if name in MISSIONS:
        return {"stagger": False, **kwargs}
    if name == "synthetic":
        return {"together": True, **kwargs}
    if name == "recall" or kwargs.get("vectorization") == "native":
        return kwargs
    return {"reseed_episodes": True, **kwargs}


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


def _make(env_id: str, adapter: Callable[..., VectorEnvironment], *args: Any, **kwargs: Any) -> VectorEnvironment:
    try:
        inspect.signature(adapter).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{env_id}: {error}") from None
    return adapter(*args, **kwargs)


def _unknown_own(env_id: str, name: str) -> str:
    close = difflib.get_close_matches(name, MISSIONS, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"environment {env_id!r} is unknown; {hint}Missions: {', '.join(MISSIONS)}"
