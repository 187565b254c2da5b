"""Hostile inputs, target by target: what is attacked, with what, and what must be true afterwards.

``shoal bench abuse`` runs them for minutes each, ``test_abuse.py`` a few of each and all that once failed
(``corpus/*.jsonl``). An attack is plain JSON, so that it can be kept.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from hypothesis.strategies import SearchStrategy

Attack = dict[str, Any]
CORPUS = Path(__file__).parent / "corpus"
MODULES = {
    "trajectories": "trajectories",
    "checkpoints": "checkpoints",
    "settings": "settings",
    "metrics": "metrics",
    "run-directories": "run_directories",
}


class Target(Protocol):
    """One intake of the service."""

    attacks: SearchStrategy[Attack]

    def attempt(self, attack: Attack) -> str:
        """Try one attack; "taken" or "refused". Whatever it raises is a fault of the service."""
        ...


@contextlib.contextmanager
def opened(name: str, directory: Path) -> Iterator[Target]:
    """The target of this name, which may write to ``directory``."""
    module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    with module.opened(directory) as target:
        yield target


def corpus(name: str) -> list[Attack]:
    """The attacks that once found a fault."""
    file = CORPUS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
