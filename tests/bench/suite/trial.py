"""One system, environment and seed: trained by a command as a user gives it, evaluated, and told as plain data."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import curve, processes
from suite.curve import Curve, Reached
from suite.rows import Row

ROOT = Path(__file__).resolve().parents[3]
OURS = "shoal"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be tried. Two of the same row, system, seed and settings are the same trial."""

    system: str
    row: str
    seed: int
    budget: int
    """Environment steps."""
    threshold: float
    recipe: str = ""
    """A configuration by name."""
    settings: tuple[str, ...] = ()
    """What differs from the defaults besides, as key=value."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What came of it. Returns are means in the environment's own units; a number that is not known is None."""

    asked: Asked
    error: str = ""
    """Why there is nothing else."""
    command: str = ""
    seconds: float = 0.0
    """Of the training command, from its start to its end."""
    steps_per_second: float | None = None
    """Between the first and the last point of the curve."""
    reached: Reached | None = None
    best: float | None = None
    """The highest mean of ``curve.EPISODES`` episodes in training."""
    sampled: float | None = None
    """Mean return of the trained policy, with actions as in training."""
    greedy: float | None = None
    """The same with the most probable action."""
    random: float | None = None
    """Of uniformly random actions."""
    curve: Curve | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found |= {"asked": dataclasses.asdict(self.asked), "curve": self.curve and self.curve.to_json()}
        return found | {"reached": self.reached and self.reached._asdict()}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Trial:
        """What ``to_json`` made."""
        asked = Asked(**{**data["asked"], "settings": tuple(data["asked"]["settings"])})
        reached = data["reached"] and Reached(**data["reached"])
        drawn = data["curve"] and Curve.of_json(data["curve"])
        return cls(**{**data, "asked": asked, "reached": reached, "curve": drawn})


def command(row: Row, asked: Asked, run_dir: Path) -> list[str]:
    """``shoal train`` as a user writes it; metrics are written every second, for the sake of the curve alone."""
    words = ["train", *(("--config", asked.recipe) if asked.recipe else ()), f"env.id={row.env_id}"]
    words += [f"env.{name}={json.dumps(value)}" for name, value in row.env_options.items()]
    words += [f"total_env_steps={asked.budget}", f"seed={asked.seed}", f"run_dir={run_dir}"]
    return [*words, "metrics.port=-1", "log.every_seconds=1", *asked.settings]


def train(row: Row, asked: Asked, directory: Path) -> Trial:
    """Train and evaluate in ``directory``, which is made.

    Raises:
        processes.Failed: the training or the evaluation did not end with 0.
    """
    directory.mkdir(parents=True)
    run_dir = directory / "run"
    words = command(row, asked, run_dir)
    began = time.time()
    processes.run([sys.executable, "-m", "shoal", *words], log=directory / "train.log", cwd=ROOT)
    seconds = time.time() - began
    summary = json.loads((run_dir / "summary.json").read_text())
    random = summary["random_return"]
    # The run gives up measuring it where episodes are long; an evaluation plays them to their ends.
    told = evaluate(run_dir, directory / "evaluate.log", ["greedy", *(["random"] if random is None else [])])
    others = {other["versus"]: other["mean_return"] for other in told["versus"]}
    drawn = curve.of_run(run_dir, began)
    return Trial(
        asked=asked,
        command=shown(words),
        seconds=seconds,
        steps_per_second=drawn.rate,
        reached=drawn.reached(asked.threshold, asked.budget),
        best=drawn.best(asked.budget),
        sampled=told["mean_return"],
        greedy=others["greedy"],
        random=others.get("random", random),
        curve=drawn.thinned(),
    )


def evaluate(run_dir: Path, log: Path, versus: Sequence[str]) -> dict[str, Any]:
    """What ``shoal evaluate`` says of a run beside ``versus``."""
    words = ["evaluate", str(run_dir), "--episodes", str(curve.EPISODES), "--json"]
    words += [word for other in versus for word in ("--vs", other)]
    said = processes.run([sys.executable, "-m", "shoal", *words], log=log, cwd=ROOT)
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"checkpoint"')))


def shown(words: Sequence[str]) -> str:
    """A command of ours as one would type it in the root of the checkout."""
    return " ".join(["shoal", *(f"'{word}'" if any(c in word for c in ' {}"') else word for word in words)])
