"""Results of evaluations during training: ``RUN/evaluation.jsonl``, the last result and the best."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from shoal.deploy.records.json_lines import append

log = logging.getLogger(__name__)


class EvaluationResult(NamedTuple):
    """One evaluation; a line of the file."""

    time: float
    """Unix seconds."""
    session: int
    """Index of the session of a resumed run, from 0."""
    policy_version: int
    env_steps: int
    """Environment steps trained in the whole run when the weights were taken."""
    episodes: int
    mean_return: float
    return_ci95: float | None
    """Half the width of the mean's 95% interval; None if there were too few episodes."""
    mean_length: float


def sentence(result: EvaluationResult) -> str:
    """Return the result in words."""
    interval = "" if result.return_ci95 is None else f" +- {result.return_ci95:.3f}"
    return (
        f"return {result.mean_return:.3f}{interval} of {result.episodes} episodes at {result.env_steps:,} steps "
        f"(policy version {result.policy_version})"
    )


class Evaluations:
    """The results of a run; one thread adds them, others read."""

    def __init__(self, file: Path | None = None) -> None:
        """Read the results of earlier sessions from ``file``; torn lines are skipped."""
        self._file = file
        self.count = 0
        """Evaluations made by this process."""
        self.failed = 0
        """Evaluations of this process that failed or timed out."""
        self.last: EvaluationResult | None = None
        self.best: EvaluationResult | None = None
        """The result with the highest mean return; the latest of equal ones."""
        for result in read_evaluations(file) if file else []:
            self._take_in(result)

    def add(self, result: EvaluationResult) -> bool:
        """Append a result to the file; return whether it is the best so far."""
        self.count += 1
        is_best = self._take_in(result)
        if self._file:
            try:
                append(self._file, result._asdict())
            except (OSError, ValueError) as error:
                log.warning("an evaluation could not be written to %s: %s", self._file, error)
        return is_best

    def _take_in(self, result: EvaluationResult) -> bool:
        self.last = result
        if self.best is not None and not result.mean_return >= self.best.mean_return:
            return False
        self.best = result
        return True


def read_evaluations(file: Path) -> list[EvaluationResult]:
    """Return all results of ``RUN/evaluation.jsonl``; none if there is no such file."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [result for line in text.splitlines() if (result := _parse(line))]


def _parse(line: str) -> EvaluationResult | None:
    try:
        found: Any = json.loads(line)
        result = EvaluationResult(**found)
    except (ValueError, TypeError):
        return None
    return result if isinstance(result.mean_return, int | float) and math.isfinite(result.mean_return) else None
