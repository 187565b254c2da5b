"""shoal: distributed rollouts and learning for recurrent reinforcement-learning policies.

Names load on first use: ``import shoal`` imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.policy import ComponentPolicy, FastPolicy, TokenObservation

__all__ = ["ComponentPolicy", "FastPolicy", "TokenObservation"]

_HOMES = {
    "ComponentPolicy": "shoal.policy",
    "FastPolicy": "shoal.policy",
    "TokenObservation": "shoal.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
