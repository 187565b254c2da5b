"""What a run directory says of its run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from shoal.deploy.report.log import Complaints, read_log
from shoal.deploy.report.recorded_metrics import History, read_history, read_json_lines


class Evaluation(NamedTuple):
    """One line of ``evaluation.jsonl``."""

    env_steps: float
    mean_return: float
    half_width: float | None
    """Of the 95% interval of ``mean_return``."""
    episodes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """One run, as far as it is written down."""

    path: Path
    history: History
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any] | None
    """None where the run's last process has written none: it goes on, or was killed."""
    evaluations: list[Evaluation]
    complaints: Complaints
    failure: str | None
    """The last line of the traceback that ended the run."""

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.path.resolve().name

    @property
    def env_id(self) -> str:
        """The environment; empty where nothing says which."""
        return str(self.setting("env.id") or (self.summary or {}).get("env_id") or "")

    def setting(self, dotted: str) -> Any:
        """A setting; None where it is not written down."""
        here: Any = self.config
        for part in dotted.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def total(self, key: str) -> float:
        """A counter's sum over all processes of the run."""
        return sum(float(self.history.increments(key)[s.start : s.stop].sum()) for s in self.history.sessions)

    @property
    def final_return(self) -> float | None:
        """Mean of the last 256 episodes at the end; None where none ended."""
        value = self.summary.get("mean_return") if self.summary else self.history.last("mean_return")
        return float(value) if isinstance(value, int | float) else None

    @property
    def env_steps(self) -> float:
        """Trained in the whole run."""
        value = self.summary.get("env_steps") if self.summary else None
        return float(value) if isinstance(value, int | float) else float(self.history.steps[-1])


def read_run(path: Path) -> RecordedRun:
    """Read what ``path`` holds.

    Raises:
        ValueError: it is no run directory, or has no history; the message says what to do.
    """
    path = path.parent if path.name == "metrics.jsonl" else path
    if not path.exists():
        raise ValueError(f"{path}: there is no such directory; name a run directory, e.g. runs/NAME")
    metrics = path / "metrics.jsonl"
    marks = ("config.yaml", "summary.json", "checkpoints", "metrics.jsonl")
    if not path.is_dir() or not any((path / name).exists() for name in marks):
        raise ValueError(f"{path}: is no run directory: it has none of {', '.join(marks)}")
    if not metrics.exists():
        raise ValueError(
            f"{path}: has no metrics.jsonl, which a report is made of: the run is older than that file, was started "
            "without it, or has only just begun"
        )
    try:
        history = read_history(metrics)
        config_text = _text(path / "config.yaml")
        summary = _summary(path / "summary.json", history)
        failure = _failure(path)
        complaints = read_log(path / "run.log")
        evaluations = _evaluations(path / "evaluation.jsonl", history)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return RecordedRun(
        path=path,
        history=history,
        config=_config(config_text),
        config_text=config_text,
        summary=summary,
        evaluations=evaluations,
        complaints=complaints,
        failure=failure,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _config(text: str) -> dict[str, Any]:
    try:
        # Every value as it is written: equal settings are equal texts, and nothing is made of them.
        config = yaml.load(text, yaml.BaseLoader)  # noqa: S506  (it makes strings, lists and dicts only)
    except (yaml.YAMLError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _summary(path: Path, history: History) -> dict[str, Any] | None:
    try:
        summary = json.loads(_text(path) or "null")
    except ValueError:
        return None
    # One that knows less than the last lines, or is older, is that of an earlier session.
    if not isinstance(summary, dict) or path.stat().st_mtime < history.time[-1] - 60:
        return None
    steps = summary.get("env_steps")
    return summary if isinstance(steps, int | float) and steps >= history.steps[-1] else None


def _failure(path: Path) -> str | None:
    """A run that fails writes its summary first; one that succeeds later leaves the traceback where it is."""
    traceback, summary = path / "traceback.txt", path / "summary.json"
    if not traceback.is_file():
        return None
    if summary.is_file() and summary.stat().st_mtime > traceback.stat().st_mtime:
        return None
    lines = _text(traceback).strip().splitlines()
    return lines[-1] if lines else None


def _evaluations(path: Path, history: History) -> list[Evaluation]:
    """By environment steps; what was trained again was evaluated again."""
    found: dict[float, Evaluation] = {}
    for entry in read_json_lines(path):
        if "env_steps" not in entry or "mean_return" not in entry:
            continue
        steps = entry["env_steps"]
        found = {at: evaluation for at, evaluation in found.items() if at < steps}
        found[steps] = Evaluation(steps, entry["mean_return"], entry.get("return_ci95"), entry.get("episodes"))
    return list(found.values())
