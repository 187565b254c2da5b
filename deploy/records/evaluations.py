"""Results of evaluations during training: ``RUN/evaluation.jsonl``, the last result and the best.

Where a run trains several policies, each has them in its own folder, and none is the best.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shoal.deploy.records.json_lines import append
from shoal.learner.checked_files import open_regular

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20
"""Bytes of a file that are read, its last ones: hundreds of thousands of evaluations."""


class EvaluationResult(NamedTuple):
    """One evaluation; a line of the file."""

    time: float
    """Unix seconds."""
    session: int
    """Index of the session of a resumed run, from 0."""
    policy_version: int
    env_steps: int
    """Environment steps trained in the whole run when the weights were taken, of several policies by this one."""
    episodes: int
    mean_return: float
    return_ci95: float | None
    """Half the width of the mean's 95% interval; None if there were too few episodes."""
    mean_length: float
    policy: str = ""
    """Whose result it is, of several policies that play together."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; without the policy where it is the only one."""
        found = self._asdict()
        return found if self.policy else {name: value for name, value in found.items() if name != "policy"}


def sentence(result: EvaluationResult) -> str:
    """Return the result in words."""
    interval = "" if result.return_ci95 is None else f" +- {result.return_ci95:.3f}"
    return (
        f"return {result.mean_return:.3f}{interval} of {result.episodes} episodes at {result.env_steps:,} steps "
        f"(policy version {result.policy_version})"
    )


class Evaluations:
    """The results of a run; one thread adds them, others read."""

    def __init__(self, file: Path | None = None, policy: str = "") -> None:
        """Read the results of earlier sessions from ``file``; torn lines are skipped.

        Those of one of several policies have its name, and no best: each is of games with the others as they were then,
        so a higher return may mean that those were worse.
        """
        self._file, self._policy = file, policy
        self.count = 0
        """Evaluations made by this process."""
        self.failed = 0
        """Evaluations of this process that failed or timed out."""
        self.last: EvaluationResult | None = None
        self.best: EvaluationResult | None = None
        """The result with the highest mean return, the latest of equal ones; where weights are kept, of those kept.
        None of several policies."""
        for result in read_evaluations(file) if file else []:
            self._take_in(result, kept=True)

    def is_best(self, result: EvaluationResult) -> bool:
        """Whether no result before had a higher mean return."""
        return self.best is None or result.mean_return >= self.best.mean_return

    def add(self, result: EvaluationResult, *, kept: bool = True) -> None:
        """Append a result to the file. ``kept``: it may be the best; its weights, where wanted, are kept already."""
        self.count += 1
        self._take_in(result, kept=kept)
        self._write(result)

    def reconcile(self, kept: Mapping[str, Any] | None) -> None:
        """Take the best of earlier sessions from the state of the checkpoint that is kept as the best.

        A run may have been killed after it kept the weights and before it recorded the result, and a full disk may keep
        it from the first; None where nothing is kept.
        """
        results = read_evaluations(self._file) if self._file else []
        if kept is None:
            self.best = None
        elif (result := parse(kept.get("evaluation"))) is None:
            same = [result for result in results if result.policy_version == kept["policy_version"]]
            self.best = max(same, key=lambda result: result.mean_return, default=None)
        else:
            self.best = result
            if result not in results:
                self._write(result)

    def _write(self, result: EvaluationResult) -> None:
        if self._file:
            try:
                append(self._file, result.to_json())
            except (OSError, ValueError) as error:
                log.warning("an evaluation could not be written to %s: %s", self._file, error)

    def _take_in(self, result: EvaluationResult, *, kept: bool) -> None:
        self.last = result
        if kept and not self._policy and self.is_best(result):
            self.best = result


def read_evaluations(file: Path) -> list[EvaluationResult]:
    """Return all results of ``RUN/evaluation.jsonl``; none if there is no such file.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    try:
        with open_regular(file) as opened:
            too_much = opened.seek(0, os.SEEK_END) - MOST_BYTES
            opened.seek(max(0, too_much))
            text = opened.read(MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    if too_much > 0:
        log.warning("%s has more than %d MiB: only results in its last part are read", file, MOST_BYTES // 2**20)
    return [result for line in text.splitlines() if (result := _parse_line(line))]


def _parse_line(line: str) -> EvaluationResult | None:
    try:
        return parse(json.loads(line))
    except (ValueError, RecursionError):
        return None


def parse(found: Any) -> EvaluationResult | None:
    """The result that ``EvaluationResult.to_json`` gave; None for anything else."""
    if not isinstance(found, dict) or {"policy", *found} != set(EvaluationResult._fields):
        return None
    result = EvaluationResult(**found)
    counts = (result.session, result.policy_version, result.env_steps, result.episodes)
    half_width = 0.0 if result.return_ci95 is None else result.return_ci95
    numbers = (result.time, result.mean_return, result.mean_length, half_width)
    if not all(type(count) is int for count in counts) or not all(type(number) in (int, float) for number in numbers):
        return None
    return result if all(map(math.isfinite, numbers)) and isinstance(result.policy, str) else None
