"""What a mind is: the network, its memory, its weights, and the trajectory contract that both sides share.

Names load on first use: settings (``policy.config``) can be read without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.config import Initialization
    from policy.fast import FastPolicy, PolicyOutput
    from policy.observation import ImageObservation, TokenObservation, VectorObservation

__all__ = ["FastPolicy", "ImageObservation", "Initialization", "PolicyOutput", "TokenObservation", "VectorObservation"]

_HOMES = {"FastPolicy": "fast", "PolicyOutput": "fast", "Initialization": "config"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'policy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"policy.{_HOMES.get(name, 'observation')}"), name)
