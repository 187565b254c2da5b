"""Recorded updates on disk: ``RUN/recorder/``, a file for each update, complete or absent, of plain data and arrays.

``<version>.npz``  the update that made this policy version
``<version>-skipped-<attempt>.npz``, ``<version>-failed-<attempt>.npz``  one that would have made it

Each is a ``learner.plain_file``: nothing in it is run, and the archive has a checksum of every part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import re
import stat
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from shoal.learner.config import POLICIES, LearnerConfig
from shoal.learner.described_policy import describe_policy
from shoal.learner.learner import Learner
from shoal.learner.plain_file import load_document, load_plain, save_plain
from shoal.learner.recorder import Outcome, Recorded, Recorder
from shoal.policy.observation import observation_to_json
from torch import Tensor

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDER = "recorder"
EVERY_SECONDS = 60.0
"""Least time between two writings with checkpoints: updates may take milliseconds, and files of them longer."""
_INCOMPLETE = ".incomplete-"
_NAME = re.compile(r"0*(\d+)(?:-(skipped|failed)-(\d+))?\.npz")
_CONFIG = TypeAdapter(LearnerConfig)
_SHARED = ("policy", "optimizer", "regularizer", "statistics", "learning_rate_factor")
_COUNTS = ("policy_version", "env_steps", "num_learners", "total_env_steps", "torch_threads")
_TEXTS = ("run_id", "outcome", "weights_hash", "error")
_MAPPINGS = ("policy", "observation", "shared", "about", "terms", "machine")


class RecordError(ValueError):
    """A recorded update cannot be used: it is missing, damaged or incomplete, or was written by something else."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One learner's part of an update."""

    rank: int
    own: dict[str, Any]
    """``Learner.own_state``."""
    batch: dict[str, Tensor]
    """Columns [B, ...] of its batch."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordedUpdate:
    """One update as it was written."""

    path: Path
    run_id: str
    policy_version: int
    """The version before it; it makes the next one."""
    env_steps: int
    """Environment steps trained before it."""
    total_env_steps: int
    outcome: Outcome
    weights_hash: str
    """Content hash of the weights after it; empty where it failed."""
    error: str
    """Why it was not made."""
    terms: dict[str, float]
    """Loss terms and the like, means over its optimizer steps; empty where it was not made."""
    num_learners: int
    config: LearnerConfig
    policy: dict[str, Any]
    """``describe_policy``."""
    observation: dict[str, Any]
    """The environment's observation, which may have other features than the trained one."""
    shared: dict[str, Any]
    """``Learner.shared_state``."""
    parts: tuple[Part, ...]
    """By rank."""
    torch_threads: int
    machine: dict[str, str]
    """What rounding depends on: device, precision, processor, version of torch."""
    about: dict[str, Any]
    """The run: ``session``, ``env_id``, ``num_agents``."""

    @property
    def name(self) -> str:
        """The name that ``--update`` takes."""
        found = _NAME.fullmatch(self.path.name)
        return _said(found) if found else str(self.policy_version + 1)

    @property
    def num_segments(self) -> int:
        """Segments of all learners."""
        return sum(len(part.batch["reward"]) for part in self.parts)


def _said(found: re.Match[str]) -> str:
    number, outcome, attempt = found.groups()
    return f"{number}-{outcome}-{attempt}" if outcome else str(number)


class RecordedUpdates:
    """Writes what the recorders of a run keep; in rank 0's process, whose thread trains.

    Args:
        directory: ``RUN/recorder``.
        keep: so many made updates are kept, and so many others.
        about: the run in plain data, with its ``run_id``.
    """

    def __init__(self, directory: Path, *, keep: int, about: Mapping[str, Any]) -> None:
        self._directory, self._keep, self._about = directory, keep, about
        self._written_at = -EVERY_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether the last writing was long enough ago for another one with a checkpoint."""
        return time.monotonic() - self._written_at >= EVERY_SECONDS

    def write(
        self, learner: Learner, recorder: Recorder, peers: Callable[[Collection[int]], Sequence[Recorded]]
    ) -> None:
        """Write what was not written yet, and remove the oldest; what cannot be written is said, and training goes on.

        ``peers`` returns the parts of the peer learners in these attempts.
        """
        waiting = recorder.unwritten()
        if not waiting:
            return
        self._written_at = time.monotonic()
        try:
            others = peers({one.attempt for one in waiting}) if any(one.num_learners > 1 for one in waiting) else []
            self._directory.mkdir(parents=True, exist_ok=True)
            self._clear_abandoned()
            last = max((_saved(path) for path, _ in _files(self._directory)), default=0)
            for saved, one in enumerate(waiting, last + 1):
                parts = [one, *(other for other in others if other.attempt == one.attempt)]
                path = self._save(learner, one, parts, saved)
                if one.outcome != "made":
                    log.error("the %s update is recorded in %s; shoal replay makes it again", one.outcome, path)
            self._clear_old()
        except Exception as error:  # noqa: BLE001  (a GPU raises at every copy once a kernel has failed)
            log.error(
                "recorded updates could not be written to %s: %s: %s", self._directory, type(error).__name__, error
            )
        finally:
            recorder.was_written([one.attempt for one in waiting])

    def _save(self, learner: Learner, one: Recorded, parts: Sequence[Recorded], saved: int) -> Path:
        other = "" if one.outcome == "made" else f"-{one.outcome}-{one.attempt}"
        path = self._directory / f"{one.policy_version:09d}{other}.npz"
        temporary = self._directory / f"{_INCOMPLETE}{uuid.uuid4().hex}"
        about = dict(self._about)
        document = {
            "format_version": FORMAT_VERSION,
            "saved": saved,
            "run_id": about.pop("run_id"),
            "about": about,
            "policy_version": one.policy_version - 1,
            "env_steps": one.shared["env_steps"] if one.shared else 0,
            "total_env_steps": learner.total_env_steps or 0,
            "outcome": one.outcome,
            "weights_hash": one.weights_hash,
            "error": one.error,
            "terms": one.terms,
            "num_learners": one.num_learners,
            "config": _CONFIG.dump_python(learner.config),
            "policy": describe_policy(learner.policy),
            "observation": observation_to_json(learner.policy.observation),
            "shared": _to_plain(one.shared),
            "parts": [
                {"rank": part.rank, "own": _to_plain(part.own), "batch": _to_plain(part.batch)}
                for part in sorted(parts, key=lambda part: part.rank)
            ],
            "torch_threads": torch.get_num_threads(),
            "machine": machine(learner),
        }
        try:
            save_plain(temporary, document)
            # No fsync: what a power failure leaves of it is found when it is read, and it is no checkpoint.
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return path

    def _clear_abandoned(self) -> None:
        for abandoned in self._directory.glob(f"{_INCOMPLETE}*"):
            abandoned.unlink(missing_ok=True)

    def _clear_old(self) -> None:
        """Remove all but the last, in the order of writing: versions fall where a run goes on from an older one, and
        the clock where it is set back."""
        for made in (True, False):
            paths = [path for path, found in _files(self._directory) if (found[2] is None) == made]
            for path in sorted(paths, key=_saved)[: -self._keep]:
                path.unlink(missing_ok=True)


def _saved(path: Path) -> int:
    """The place of a file in the order of writing, from 1; 0 where it does not say, or is damaged."""
    try:
        saved = load_document(path).get("saved")
    except (OSError, ValueError, AttributeError):
        return 0
    return saved if type(saved) is int else 0


def machine(learner: Learner) -> dict[str, str]:
    """What rounding depends on, beside the numbers themselves."""
    return {
        "torch": torch.__version__,
        "device": learner.path.describe(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _files(directory: Path) -> list[tuple[Path, re.Match[str]]]:
    """Files of updates with their matched names, by version and attempt."""
    if not directory.is_dir():
        return []
    found = [(path, match) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, key=lambda one: (int(one[1][1]), one[1][2] is None, int(one[1][3] or 0)))


def recorded_names(run: Path) -> dict[str, Path]:
    """The files of a run's recorded updates, by the names that ``find_recorded`` takes, in their order.

    Raises:
        RecordError: there is none.
    """
    found = {_said(match): path for path, match in _files(run / FOLDER)}
    if not found:
        why = "expected a run directory"
        of_policies = [folder for folder in sorted(run.glob(f"{POLICIES}/*")) if _files(folder / FOLDER)]
        if not run.exists():
            why = "there is nothing of that name"
        elif of_policies:
            why = (
                "every policy of the run has its own: name one, as shoal replay "
                f"{' or shoal replay '.join(map(str, of_policies))}"
            )
        elif (run / "config.yaml").is_file():
            why = (
                "a run writes them when it ends, with a checkpoint at most once a minute, and when an update is "
                "skipped, unless recorder.keep_updates=0"
            )
        raise RecordError(f"no recorded updates in {run}: {why}")
    return found


def find_recorded(run: Path, name: str) -> RecordedUpdate:
    """The recorded update ``name`` of a run: a policy version, or as ``RecordedUpdate.name`` says.

    Raises:
        RecordError: there is none of that name, or it cannot be used.
    """
    found = recorded_names(run)
    # A version that was never made may be named without what became of it.
    like = [one for one in found if one == name] or [one for one in found if one.partition("-")[0] == name]
    if not like:
        raise RecordError(f"update {name} is not recorded in {run}; there are: {', '.join(found)}")
    return load_recorded(found[like[-1]])


def load_recorded(path: Path) -> RecordedUpdate:
    """Read and check a file.

    Raises:
        RecordError: it is missing, damaged or incomplete, or was written by something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe might never end, or never begin
            raise RecordError(f"{path} is no regular file")
        document = load_plain(path)
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise RecordError(f"{path} is missing") from error
    except Exception as error:  # numpy and zipfile raise errors of any class for damaged archives
        raise RecordError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if problem := _problem(document):
        raise RecordError(f"{path}: {problem}")
    try:
        fields = {name: document[name] for name in (*_COUNTS, *_TEXTS, *_MAPPINGS) if name != "shared"}
        return RecordedUpdate(
            path=path,
            config=_CONFIG.validate_python(document["config"]),
            shared=_from_plain(document["shared"]),
            parts=tuple(
                Part(rank=part["rank"], own=_from_plain(part["own"]), batch=_from_plain(part["batch"]))
                for part in document["parts"]
            ),
            **fields,
        )
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is no recorded update of this version of shoal: {error}") from error


def _problem(document: Any) -> str:
    """Why no run can have written this; empty if one can have."""
    if not isinstance(document, dict) or "format_version" not in document:
        return "is no recorded update: another program, or another part of shoal, wrote it"
    if document["format_version"] != FORMAT_VERSION:
        return f"has format {document['format_version']}; this version of shoal reads {FORMAT_VERSION}"
    kinds: list[tuple[type, Sequence[str]]] = [(int, _COUNTS), (str, _TEXTS), (dict, _MAPPINGS), (list, ["parts"])]
    for kind, names in kinds:
        for name in names:
            if not isinstance(document.get(name), kind) or (kind is int and document[name] < 0):
                return f"{name} must be {'a count' if kind is int else kind.__name__}, got {document.get(name)!r:.80}"
    if document["outcome"] not in get_args(Outcome):
        return f"outcome must be one of {', '.join(get_args(Outcome))}, got {document['outcome']!r}"
    if missing := [name for name in _SHARED if name not in document["shared"]]:
        return f"its state lacks {', '.join(missing)}"
    if not 1 <= document["num_learners"] <= 2**16 or not document["torch_threads"]:
        return f"{document['num_learners']} learners with {document['torch_threads']} threads made it"
    ranks = [part.get("rank") if isinstance(part, dict) else None for part in document["parts"]]
    if not all(type(rank) is int for rank in ranks):
        return f"its parts must be of learners, got {ranks!r:.80}"
    if not all(isinstance(part.get("batch"), dict) and "reward" in part["batch"] for part in document["parts"]):
        return "a part of it has no batch"
    if absent := set(range(document["num_learners"])) - set(ranks):
        return (
            f"it lacks the part of {'learner' if len(absent) == 1 else 'learners'} {', '.join(map(str, absent))}, lost "
            "before it was written; without it the update cannot be made again"
        )
    return "" if ranks == list(range(document["num_learners"])) else f"its parts are of the learners {ranks}"


def _to_plain(value: Any) -> Any:
    """Tensors as arrays, and keys as texts."""
    if isinstance(value, Tensor):
        value = value.cpu()
        return {"bfloat16": value.view(torch.int16).numpy()} if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, Mapping):
        if any(isinstance(key, int) for key in value):
            return {"by number": [[key, _to_plain(part)] for key, part in value.items()]}
        return {key: _to_plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_to_plain(part) for part in value]
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        if value.keys() == {"bfloat16"}:
            return torch.from_numpy(value["bfloat16"]).view(torch.bfloat16)
        if value.keys() == {"by number"}:
            return {key: _from_plain(part) for key, part in value["by number"]}
        return {key: _from_plain(part) for key, part in value.items()}
    return [_from_plain(part) for part in value] if isinstance(value, list) else value
