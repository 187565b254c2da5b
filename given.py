"""The user's classes and functions that no import finds, by the names that settings have for them.

Those of a notebook, or of the script that runs: ``actors.user_code`` takes them to the other processes of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

environments: dict[str, Callable[..., Any]] = {}
"""By ``env.id``: each makes one environment."""
policies: dict[str, type[Any]] = {}
"""Subclasses of ``RecurrentPolicy`` by ``policy.kind``."""
losses: dict[str, Callable[..., Any]] = {}
"""By ``learner.loss``."""
