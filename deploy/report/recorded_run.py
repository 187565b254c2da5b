"""Reads a run directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from shoal.deploy.records.run_dir import MEMORY_HORIZON
from shoal.deploy.report.log import Complaints, read_log
from shoal.deploy.report.recorded_metrics import RecordedMetrics, read_json_lines, read_metrics
from shoal.deploy.settings.earlier import ChangedAt, changes_of
from shoal.deploy.settings.load import BoundedComposer
from shoal.learner.config import POLICIES

MOST_CHARACTERS = 2**18
"""Of a ``config.yaml`` whose settings are read: many times the largest, and seconds for the parser."""


class Evaluation(NamedTuple):
    """One line of ``evaluation.jsonl``."""

    env_steps: float
    mean_return: float
    half_width: float | None
    """Half the width of the 95% interval of ``mean_return``."""
    episodes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """The records of one run."""

    path: Path
    metrics: RecordedMetrics
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any] | None
    """None if the last process of the run wrote none: it is running, or was killed."""
    evaluations: list[Evaluation]
    complaints: Complaints
    memory_horizon: dict[str, Any] | None
    """What ``shoal evaluate --memory-horizon`` recorded; None where there is none that can be read."""
    films: list[Path]
    """Films of episodes within the run directory, the newest first."""
    failure: str | None
    """The last line of the traceback that ended the run, or that there was an error."""
    changes: list[ChangedAt] = dataclasses.field(default_factory=list)
    """Where the run went on with other settings, in order."""
    policy: str = ""
    """The name of one of several policies, in whose folder of the run ``path`` is; else empty."""
    run_env_steps: float | None = None
    """Environment steps that all policies together trained in the whole run; None where there is no such summary."""

    @property
    def run_dir(self) -> Path:
        """The run's directory, where ``path`` is the folder of one of its policies, too."""
        return run_dir_of(self.path, self.policy)

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.path.resolve().name

    @property
    def env_id(self) -> str:
        """The environment id; empty if it is not recorded."""
        return str(self.setting("env.id") or (self.summary or {}).get("env_id") or "")

    def setting(self, dotted: str) -> Any:
        """Return a setting by its dotted name; None if it is not recorded."""
        here: Any = self.config
        for part in dotted.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def total(self, key: str) -> float:
        """Return a counter's sum over all processes of the run."""
        return sum(float(self.metrics.increments(key)[s.start : s.stop].sum()) for s in self.metrics.sessions)

    @property
    def final_return(self) -> float | None:
        """Mean return of the last 256 episodes at the end; None if no episode ended."""
        value = self.summary.get("mean_return") if self.summary else self.metrics.last("mean_return")
        return float(value) if isinstance(value, int | float) else None

    @property
    def env_steps(self) -> float:
        """Environment steps trained in the whole run."""
        value = self.summary.get("env_steps") if self.summary else None
        return float(value) if isinstance(value, int | float) else float(self.metrics.steps[-1])


def run_dir_of(path: Path, policy: str) -> Path:
    """The run's directory of ``path``, which is the folder of ``policy`` in it unless that is empty."""
    return path.resolve().parent.parent if policy else path


def read_run(path: Path) -> RecordedRun:
    """Read the run directory ``path``.

    Raises:
        ValueError: it is no run directory, or has no metrics.jsonl; the message says what to do.
    """
    path = path.parent if path.name == "metrics.jsonl" else path
    if not path.exists():
        raise ValueError(f"{path}: there is no such directory; name a run directory, e.g. runs/NAME")
    metrics_file = path / "metrics.jsonl"
    marks = ("config.yaml", "summary.json", "checkpoints", "metrics.jsonl")
    if not path.is_dir() or not any((path / name).exists() for name in marks):
        raise ValueError(f"{path}: is no run directory: it has none of {', '.join(marks)}")
    for name in ("metrics.jsonl", "run.log", "evaluation.jsonl", MEMORY_HORIZON):
        if (path / name).exists() and not (path / name).is_file():
            raise ValueError(f"{path / name}: is no regular file")  # a pipe would never end
    if not metrics_file.exists():
        raise ValueError(
            f"{path}: has no metrics.jsonl, which a report is made of: the run is older than that file, was started "
            "without it, or has only just begun"
        )
    try:
        metrics = read_metrics(metrics_file)
        config_text = _text(path / "config.yaml")
        config = _config(config_text)
        summary = _summary(path / "summary.json", metrics)
        run_dir, run_env_steps = path, None
        if policy := _policy(path, config):
            # The policies of a run have its settings in common, its log, and how it ended.
            config["trained_policy"] = policy
            run_dir = run_dir_of(path, policy)
            whole = _summary(run_dir / "summary.json", metrics) if summary else None
            run_env_steps = float(whole["env_steps"]) if whole else None
        failure = _failure(run_dir) or _raised(summary)
        complaints = read_log(run_dir / "run.log")
        memory_horizon = _memory_horizon(path / MEMORY_HORIZON)
        evaluations = _evaluations(path / "evaluation.jsonl", metrics)
        # Those of a game are of all of its policies.
        films = _films(run_dir)
        changes = changes_of(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    return RecordedRun(
        path=path,
        metrics=metrics,
        config=config,
        config_text=config_text,
        summary=summary,
        evaluations=evaluations,
        complaints=complaints,
        memory_horizon=memory_horizon,
        films=films,
        failure=failure,
        changes=changes,
        policy=policy,
        run_env_steps=run_env_steps,
    )


def _policy(path: Path, config: dict[str, Any]) -> str:
    """The name of the policy whose folder of a run this is; empty where it is a run of its own."""
    folder, policies = path.resolve(), config.get(POLICIES)
    is_one = folder.parent.name == POLICIES and isinstance(policies, dict) and folder.name in policies
    return folder.name if is_one else ""


def _films(path: Path) -> list[Path]:
    """Films by the names that ``shoal evaluate --video`` gives them, in the run directory or in a folder of it."""
    places = (path.glob(pattern) for pattern in ("*-episode-*.mp4", "*/*-episode-*.mp4"))
    found = {film: film.stat().st_mtime for place in places for film in place if film.is_file()}
    return sorted(found, key=lambda film: (-found[film], film))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


class _Texts(BoundedComposer, yaml.BaseLoader):
    """Every value as text: equal settings are equal texts."""


def _config(text: str) -> dict[str, Any]:
    if len(text) > MOST_CHARACTERS:
        return {}
    try:
        config = yaml.load(text, _Texts)  # noqa: S506  (it makes strings, lists and dicts only)
    except (yaml.YAMLError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _summary(path: Path, metrics: RecordedMetrics) -> dict[str, Any] | None:
    try:
        summary = json.loads(_text(path) or "null")
    except (ValueError, RecursionError):
        return None
    # A summary that is older than the last line, or has fewer steps, belongs to an earlier session.
    if not isinstance(summary, dict) or path.stat().st_mtime < metrics.time[-1] - 60:
        return None
    steps = summary.get("env_steps")
    return summary if isinstance(steps, int | float) and steps >= metrics.steps[-1] else None


def _memory_horizon(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_text(path) or "null")
        for level in (found["whole"], *found["horizons"]):
            float(level["mean_return"]), float(level["return_ci95"] or 0.0)
        steps = [int(level["steps"]) for level in found["horizons"]]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return found if steps else None


def _failure(path: Path) -> str | None:
    """Return the error that ended the run; None if a later session ended well, whose summary is newer."""
    traceback, summary = path / "traceback.txt", path / "summary.json"
    if not traceback.is_file():
        return None
    if summary.is_file() and summary.stat().st_mtime > traceback.stat().st_mtime:
        return None
    lines = _text(traceback).strip().splitlines()
    return lines[-1] if lines else None


def _raised(summary: dict[str, Any] | None) -> str | None:
    """That training failed in a program, which was given the error: the summary then has no last weights."""
    if summary is None or summary.get("weights_sha256", "unknown") is not None:
        return None
    return "the error was raised in the program that trained it"


def _evaluations(path: Path, metrics: RecordedMetrics) -> list[Evaluation]:
    """Return evaluations by environment steps; a resumed run replaces those at and beyond its step."""
    found: dict[float, Evaluation] = {}
    for entry in read_json_lines(path):
        if "env_steps" not in entry or "mean_return" not in entry:
            continue
        steps = entry["env_steps"]
        found = {at: evaluation for at, evaluation in found.items() if at < steps}
        found[steps] = Evaluation(steps, entry["mean_return"], entry.get("return_ci95"), entry.get("episodes"))
    return list(found.values())
