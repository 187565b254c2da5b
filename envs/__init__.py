"""Environments of every source behind one boundary contract (``envs.boundary``).

Importing this package imports neither gymnasium nor mettagrid: an adapter loads its library when it is made.
"""

from __future__ import annotations

from shoal.envs.boundary import EnvironmentFault, EnvSpec, StepRows, VectorEnvironment
from shoal.envs.config import EnvConfig, EnvironmentNotFound
from shoal.envs.registry import list_env_ids, make_env_spec, make_vector_env

__all__ = [
    "EnvConfig",
    "EnvSpec",
    "EnvironmentFault",
    "EnvironmentNotFound",
    "StepRows",
    "VectorEnvironment",
    "list_env_ids",
    "make_env_spec",
    "make_vector_env",
]
