"""Environments from one mapping of both their own arguments and the settings of ``env``, as tables of tests have it."""

from __future__ import annotations

from typing import Any

import numpy as np
from shoal.envs.boundary import EnvSpec, VectorEnvironment
from shoal.envs.config import split_options
from shoal.envs.registry import make_env_spec, make_vector_env


def make_env(env_id: str, num_envs: int, seed: int | np.random.SeedSequence, /, **mixed: Any) -> VectorEnvironment:
    own, options = split_options(mixed)
    return make_vector_env(env_id, num_envs, seed, options, **own)


def env_spec(env_id: str, /, **mixed: Any) -> EnvSpec:
    own, options = split_options(mixed)
    return make_env_spec(env_id, options, **own)
