"""The adapters share these: arguments, settings of training, the window of time that is measured, and the line at their
end."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import platform
import sys
import time
from typing import Any

SLOTS = 64
LEAST_UPDATES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Steps and passes of an update, and the coefficients of its losses, the same for everyone."""

    unroll: int = 64
    epochs: int = 1
    minibatches: int = 1
    learning_rate: float = 1e-3
    gamma: float = 0.977
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    max_grad_norm: float = 0.5

    @property
    def batch(self) -> int:
        """Environment steps of an update."""
        return SLOTS * self.unroll


SPEED = Recipe()
LEARNING = Recipe(unroll=32, epochs=2, minibatches=2)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """The arguments that ``run.py`` and ``learning.py`` give an adapter."""

    task: str
    seed: int
    seconds: float
    warmup: float
    settings: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return SPEED if self.task in ("free", "images") else LEARNING

    def window(self) -> Window:
        return Window(self.seconds, self.warmup)


def arguments() -> Arguments:
    """The arguments of the command line; where a task is learned nothing ends the adapter but its caller."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="free")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--warmup", type=float, default=15.0)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    return Arguments(**vars(parser.parse_args()))


class Window:
    """Environment steps trained between the first update that ends after the warm-up and the first that ends after the
    window, but over ``LEAST_UPDATES`` at least.

    The clock starts with the first update, so what it takes to start is not counted.
    """

    def __init__(self, seconds: float, warmup: float) -> None:
        self._seconds, self._warmup = seconds, warmup
        self._begin: float | None = None
        self._marks: list[tuple[float, int]] = []

    def add(self, trained: int, when: float | None = None) -> bool:
        """An update ended by which ``trained`` steps were trained in all; whether the window is full."""
        when = time.monotonic() if when is None else when
        if self._begin is None:
            self._begin = when
        if when - self._begin >= self._warmup:
            self._marks.append((when, trained))
        return when - self._begin >= self._warmup + self._seconds and len(self._marks) > LEAST_UPDATES

    def report(self, packages: tuple[str, ...], **more: Any) -> None:
        """Print the result as the one JSON line that the caller looks for."""
        if len(self._marks) < 2:
            raise RuntimeError(f"only {len(self._marks)} updates ended after the warm-up of {self._warmup} s")
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        versions = {name: importlib.metadata.version(name) for name in (*packages, "torch", "numpy", "gymnasium")}
        versions["python"] = platform.python_version()
        result = {"env_steps": last - first, "seconds": end - start, "versions": versions, **more}
        # Peers print without a newline at the end.
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        sys.stdout.flush()
