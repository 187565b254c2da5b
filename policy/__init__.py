"""The policy: its network, its recurrent memory, its weights, and the trajectory format shared by actors and learner.

Names load on first use: settings (``policy.config``) can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.policy.component import ComponentPolicy
    from shoal.policy.config import Initialization
    from shoal.policy.core import Core
    from shoal.policy.fast import FastPolicy
    from shoal.policy.observation import DictObservation, ImageObservation, TokenObservation, VectorObservation
    from shoal.policy.recurrent_policy import PolicyOutput, RecurrentPolicy
    from shoal.policy.resets import zeroed

__all__ = [
    "ComponentPolicy",
    "Core",
    "DictObservation",
    "FastPolicy",
    "ImageObservation",
    "Initialization",
    "PolicyOutput",
    "RecurrentPolicy",
    "TokenObservation",
    "VectorObservation",
    "zeroed",
]

_HOMES = {
    "ComponentPolicy": "component",
    "Core": "core",
    "FastPolicy": "fast",
    "Initialization": "config",
    "PolicyOutput": "recurrent_policy",
    "RecurrentPolicy": "recurrent_policy",
    "zeroed": "resets",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shoal.policy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shoal.policy.{_HOMES.get(name, 'observation')}"), name)
