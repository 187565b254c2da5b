"""Checkpoints: directories of tensors and plain data, each complete or absent. Nothing in them is run as code.

``<policy_version>/weights.safetensors``  the policy's ``state_dict``
``<policy_version>/regularizer.safetensors``  w0, and the initial magnitudes that clip bounds are multiples of
``<policy_version>/optimizer.pt``  optimizer, random streams and running statistics, loaded with ``weights_only=True``
``<policy_version>/state.json``  counters, ledger, config, observation and action names, and when it was saved
``<policy_version>/rollouts.npz``  environments, memory and waiting unrolls of a run in one process
``<policy_version>/opponents.npz``  the versions that self-play games are played against
``<policy_version>/manifest.json``  size and sha256 of each of these

Where a run trains several policies, ``<policy_version>/<policy>/`` has all of these for each. Beside them is a
``state.json`` of what belongs to the run, and a ``manifest.json`` with size and sha256 of that and of their manifests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from shoal.learner.checked_files import check_archive, fingerprint, read_json, sync
from shoal.learner.config import ADAM, POLICIES, POLICY_NAME
from shoal.learner.described_policy import (
    changed_components,
    check_sizes,
    describe_policy,
    make_described_policy,
    other_kind,
    other_part,
)
from shoal.learner.learner import Learner
from shoal.learner.optimizer import restore_optimizer
from shoal.learner.plain_file import load_plain, save_plain
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.weights import Weights, named_weights

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_FILES = ("weights.safetensors", "regularizer.safetensors", "optimizer.pt", "state.json")
_ROLLOUTS, _OPPONENTS = "rollouts.npz", "opponents.npz"
_OPTIONAL = (_ROLLOUTS, _OPPONENTS)

_NORMALIZATION = {
    "normalize_observations": "policy.normalize_observations",
    "normalize_values": "learner.normalize_values",
}
"""Settings by their names in a policy's description."""

_MANIFEST = "manifest.json"
_NAME = re.compile(POLICY_NAME)
_INCOMPLETE, _REPLACED = ".incomplete-", ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it is incomplete or changed, or has another format or another policy."""


@contextlib.contextmanager
def refusing_damage(path: Path, passed_on: type[Exception] = CheckpointError) -> Iterator[None]:
    """Take in what ``path`` holds. Hashes that are right say nothing of contents that no run saved.

    Raises:
        CheckpointError: whatever became of it, but for ``passed_on``.
    """
    try:
        yield
    except passed_on:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} holds what cannot be used: {what}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    path: Path
    """Absolute: what the user's modules do to the working directory does not move it."""
    state: Mapping[str, Any]
    has_rollouts: bool = False
    """Whether ``load_rollouts`` has something to load."""
    has_opponents: bool = False
    """Whether ``load_opponents`` has something to load."""
    policies: Mapping[str, Checkpoint] = dataclasses.field(default_factory=dict)
    """Those of a run of several policies by name; nothing else of this one can be loaded then."""

    @property
    def policy_version(self) -> int:
        """Updates made when it was saved."""
        return int(self.state["policy_version"])

    def make_policy(self) -> RecurrentPolicy:
        """The policy as it was saved, rebuilt from its description in the checkpoint.

        Raises:
            CheckpointError: there is no such policy here, or its weights are others.
        """
        with refusing_damage(self.path):
            policy = make_described_policy(self.state["policy"])
            policy.load_state_dict(self.load_weights())
        return policy

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The policy's ``state_dict``.

        Raises:
            CheckpointError: they cannot be read.
        """
        with refusing_damage(self.path / _FILES[0]):
            return load_file(self.path / _FILES[0])

    def load_rollouts(self) -> Any:
        """What ``Checkpoints.save`` was given as ``rollouts``.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._load_plain(_ROLLOUTS)

    def load_opponents(self) -> Any:
        """What ``Checkpoints.save`` was given as ``opponents``.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._load_plain(_OPPONENTS)

    def _load_plain(self, name: str) -> Any:
        try:
            return load_plain(self.path / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error}") from error

    def restore(self, learner: Learner) -> None:
        """Load weights, optimizer, regularizer, random streams and trained steps into ``learner``.

        States that were refreshed are not loaded: they follow unrolls of actors. The policy may be of another kind than
        the saved one if it computes the same.

        Raises:
            CheckpointError: it holds a policy of another shape, or something else than tensors and plain data.
        """
        with refusing_damage(self.path):
            self._restore(learner)

    def _restore(self, learner: Learner) -> None:
        if problem := other_part(self.state["policy"], learner.policy):
            raise CheckpointError(f"{self.path} {problem}")
        kinds = other_kind(self.state["policy"], learner.policy)
        other = f"{self.path} holds another policy than this run's config describes: {kinds}"
        if changed := changed_components(self.state["policy"], learner.policy):
            here = f"{learner.policy.kind} with policy.components={learner.policy.components}"
            raise CheckpointError(f"{other}it has other components {', '.join(changed)} than {here}")
        described = describe_policy(learner.policy)
        for key, name in _NORMALIZATION.items():
            saved_with = self.state["policy"].get(key, False)
            if saved_with != described[key] and not (key == "normalize_values" and described[key]):
                raise CheckpointError(
                    f"{self.path} was trained with {name}={str(saved_with).lower()} and can only be resumed so"
                )
        saved = self._load_training(learner)
        try:
            weights = load_file(self.path / "weights.safetensors")
            if learner.policy.value_scale is not None and not self.state["policy"].get("normalize_values", False):
                # Values in units of the reward are values in units of 1.
                weights |= {"value_scale.mean": torch.zeros(()), "value_scale.std": torch.ones(())}
            learner.policy.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{other}{' '.join(str(error).split())}") from error
        learner.regularizer.load_state_dict(load_file(self.path / "regularizer.safetensors"))
        saved_by = self.state.get("config", {}).get("learner", {}).get("optimizer", ADAM)
        if saved_by == learner.config.optimizer:
            restore_optimizer(learner.optimizer, saved["optimizer"])
        else:
            own = learner.config.optimizer
            log.warning("%s was saved with the optimizer %s; %s begins anew", self.path, saved_by, own)
        learner.statistics.load_state_dict(saved.get("statistics", {}))
        learner.kl_adaptation.factor = float(saved.get("learning_rate_factor", 1.0))
        learner.value_balance.factor = float(saved.get("value_coef_factor", 1.0))
        learner.load_random_state(saved["random"])
        learner.policy_version = self.policy_version
        learner.env_steps = int(self.state.get("ledger", {}).get("trained", 0))

    def restore_start_states(self, learner: Learner) -> None:
        """Load the states that were refreshed for the next unrolls, where these are those that follow.

        Raises:
            CheckpointError: they cannot be read, or are none.
        """
        with refusing_damage(self.path / _FILES[2]):
            if learner.refreshed is not None and (states := self._load_training(learner).get("start_states")):
                learner.refreshed.load_state_dict(states)

    def _load_training(self, learner: Learner) -> dict[str, Any]:
        try:
            check_archive(self.path / "optimizer.pt")
            # mmap=False: a mapped file could change after it was verified.
            found: dict[str, Any] = torch.load(
                self.path / "optimizer.pt", weights_only=True, mmap=False, map_location=learner.path.device
            )
        except Exception as error:  # pickle and torch raise errors of any class
            raise CheckpointError(f"{self.path / 'optimizer.pt'} holds more than tensors and plain data") from error
        return found


class Checkpoints:
    """The checkpoints of one directory, of which the ``keep`` saved last are kept.

    They have an order of their own, that of saving. In ``RUN/checkpoints`` versions rise with it, unless the run went
    on from an older one because the newest was damaged; in ``RUN/best`` a later one may have any version.
    """

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: the newest may turn out to be damaged")
        self.directory, self._keep = directory, keep
        self._verified: set[Path] = set()
        """Those that this process saved, or loaded."""

    def save(
        self,
        learner: Learner,
        state: Mapping[str, Any],
        weights: Weights | None = None,
        *,
        rollouts: Mapping[str, Any] | None = None,
        opponents: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint of ``learner`` with ``state`` beside it; visible under its name only once complete.

        ``rollouts`` is the acting side's state, ``opponents`` the pool of self-play's, both of plain data and arrays
        (``learner.plain_file``).

        With ``weights``, which ``learner`` published before, it holds these and a fresh optimizer, because the moments
        of that time are gone. The learner may go on with its updates meanwhile.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        version = weights.policy_version if weights else learner.policy_version

        def write(directory: Path, common: Mapping[str, Any]) -> None:
            document = {**common, "policy_version": version, "policy": describe_policy(learner.policy), **state}
            _write(directory, learner, document, weights, rollouts=rollouts, opponents=opponents)

        return self._save(version, write)

    def save_policies(
        self, policies: Mapping[str, tuple[Learner, Mapping[str, Any]]], state: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint of several policies, each a learner with its state, and of the run's ``state``.

        It has the highest version of them, and is visible only once complete.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        version = max(learner.policy_version for learner, _ in policies.values())

        def write(directory: Path, common: Mapping[str, Any]) -> None:
            for name, (learner, own) in policies.items():
                (directory / name).mkdir()
                described = {"policy_version": learner.policy_version, "policy": describe_policy(learner.policy)}
                _write(directory / name, learner, {**common, **described, **own})
            document = {**common, "policy_version": version, "policies": list(policies), **state}
            (directory / _FILES[3]).write_text(json.dumps(document, indent=1))
            _write_manifest(directory, [_FILES[3], *(f"{name}/{_MANIFEST}" for name in policies)])

        return self._save(version, write)

    def _save(self, version: int, write: Callable[[Path, Mapping[str, Any]], None]) -> Path:
        """Have ``write`` fill a directory, with what all states have in common, and give it the name of ``version``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"{version:09d}"
        self.clear_abandoned()
        common = {
            "format_version": FORMAT_VERSION,
            "saved": 1 + max((_saved(path) or 0 for path in self._complete()), default=0),
        }
        temporary = self.directory / f"{_INCOMPLETE}{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            write(temporary, common)
            replaced = self.directory / (_REPLACED + final.name)
            if final.exists():  # the same version again: a run that stopped right after saving
                _remove(replaced)
                os.rename(final, replaced)
            os.rename(temporary, final)
            sync(self.directory)
            _remove(replaced)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._verified.add(final)
        self._clear_old()
        return final

    def clear_abandoned(self) -> None:
        """Remove what a process was writing when it was killed. No other process may be writing."""
        for abandoned in self.directory.glob(f"{_INCOMPLETE}*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The checkpoint saved last that verifies; a warning names each damaged one. None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none of them verifies; or the directory cannot be reached. A
                fresh start would hide this.
        """
        problems = []
        for path in self._complete():
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
                problems.append(str(error))
            else:
                self._verified.add(path)
                return checkpoint
        if problems:
            raise CheckpointError("no usable checkpoint in " + str(self.directory) + ":\n  " + "\n  ".join(problems))
        return None

    def _clear_old(self) -> None:
        """Remove all but the last ``keep`` that verify; nothing where there are fewer."""
        complete = self._complete()
        kept = list(itertools.islice(filter(self._verifies, complete), self._keep))
        if len(kept) == self._keep:
            for path in set(complete) - set(kept):
                _remove(path)

    def _verifies(self, path: Path) -> bool:
        if path not in self._verified:
            try:
                load_checkpoint(path)
            except CheckpointError:
                return False
            self._verified.add(path)
        return True

    def _complete(self) -> list[Path]:
        """Complete checkpoints, last saved first; one whose replacement was interrupted comes after its successor.

        Those that do not say when they were saved are first: who looks for the newest is then told of the damage.

        Raises:
            CheckpointError: the directory is something else, or a link to nothing.
        """
        if not self.directory.is_dir():
            if os.path.lexists(self.directory):
                kind = "a link to nothing" if self.directory.is_symlink() else "no directory"
                raise CheckpointError(f"{self.directory} is {kind}: is the storage mounted that it should be on?")
            return []
        versions = {path: path.name.removeprefix(_REPLACED) for path in self.directory.iterdir()}
        found = [path for path, version in versions.items() if version.isdecimal()]
        saved = {path: _saved(path) for path in found}
        return sorted(
            found,
            key=lambda path: (saved[path] is None, saved[path] or 0, int(versions[path]), path.name == versions[path]),
            reverse=True,
        )


def _write(
    directory: Path,
    learner: Learner,
    document: Mapping[str, Any],
    weights: Weights | None = None,
    *,
    rollouts: Mapping[str, Any] | None = None,
    opponents: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of one policy, with ``document`` as its state.

    Raises:
        OSError: they could not be written.
    """
    parameters, optimizer = learner.policy.state_dict(), learner.optimizer.state_dict()
    if weights:
        parameters = {**parameters, **named_weights(learner.policy, weights)}
        optimizer = {**optimizer, "state": {}}
    tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
    kept = {name: value.cpu().contiguous() for name, value in learner.regularizer.state_dict().items()}
    training = {
        "optimizer": optimizer,
        "random": learner.random_state(),
        "statistics": learner.statistics.state_dict(),
        "learning_rate_factor": learner.kl_adaptation.factor,
        "value_coef_factor": learner.value_balance.factor,
    }
    if learner.refreshed is not None and weights is None:
        training["start_states"] = learner.refreshed.state_dict()
    try:
        (directory / _FILES[3]).write_text(json.dumps(document, indent=1))
        save_file(tensors, directory / _FILES[0])
        save_file(kept, directory / _FILES[1])
        torch.save(training, directory / _FILES[2])
        further = {
            name: value for name, value in zip(_OPTIONAL, (rollouts, opponents), strict=True) if value is not None
        }
        for name, value in further.items():
            save_plain(directory / name, value)
    except (SafetensorError, RuntimeError) as error:
        # That is what safetensors and torch make of a full disk.
        raise OSError(f"{directory}: {type(error).__name__}: {error}") from error
    # safetensors gives its files to their owner alone, whatever the umask says.
    mode = stat.S_IMODE((directory / _FILES[3]).stat().st_mode)
    names = (*_FILES, *further)
    for name in names:
        (directory / name).chmod(mode)
    _write_manifest(directory, names)


def _write_manifest(directory: Path, names: Iterable[str]) -> None:
    """Write size and sha256 of these files, after which the directory is complete on disk."""
    manifest = {name: fingerprint(directory / name) for name in names}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*directory.iterdir(), directory):
        sync(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; where it is a link to one on other storage, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _saved(path: Path) -> int | None:
    """The place of a checkpoint in the order of saving, from 1; 0 for one of an earlier version of shoal.

    None where its state cannot be read.
    """
    try:
        saved = read_json(path / "state.json").get("saved", 0)
    except (OSError, ValueError):
        return None
    return int(saved) if _is_count(saved) else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint after verifying every file against its manifest.

    Raises:
        CheckpointError: a file is missing or changed, or the format is not this one.
    """
    manifest = _read(path, _MANIFEST)
    names = [name for name in manifest if _NAME.fullmatch(name.removesuffix(f"/{_MANIFEST}")) and "/" in name]
    if not names:
        return _load_policy(path, manifest)
    state = _verify(path, manifest, (_FILES[3], *names))
    folders = {name.partition("/")[0]: path / name.partition("/")[0] for name in names}
    policies = {name: _load_policy(folder, _read(folder, _MANIFEST)) for name, folder in folders.items()}
    if state.get("policies") != list(policies):
        named = f"policies must be {list(policies)}, which are beside it, got {state.get('policies')!r}"
        raise CheckpointError(f"{path / _FILES[3]}: {named}")
    return Checkpoint(path.absolute(), state, policies=policies)


def _load_policy(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of one policy, which is all that is looked for in ``path``.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    state = _verify(path, manifest, (*_FILES, *(name for name in _OPTIONAL if name in manifest)))
    if not isinstance(state.get("policy"), dict):
        raise CheckpointError(f"{path / _FILES[3]}: policy must be a mapping, got {state.get('policy')!r}")
    with refusing_damage(path):
        check_sizes(state["policy"], path / _FILES[0])
    return Checkpoint(path.absolute(), state, _ROLLOUTS in manifest, _OPPONENTS in manifest)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path / name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {error}") from error


def _verify(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Compare these files with the manifest; return the state, which a run can have saved.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    for name in names:
        try:
            actual = fingerprint(path / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no complete checkpoint: {error}") from error
        if actual != manifest.get(name):
            raise CheckpointError(f"{path / name} is damaged: expected {manifest.get(name)}, found {actual}")
    state = _read(path, _FILES[3])
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {state.get('format_version')}; this version reads {FORMAT_VERSION}")
    if problem := _problem(state):
        raise CheckpointError(f"{path / _FILES[3]}: {problem}")
    return state


def _problem(state: Mapping[str, Any]) -> str | None:
    """Why no run can have saved this state; None if one can have."""
    for name in ("policy_version", "session"):
        if name in state and not _is_count(state[name]):
            return f"{name} must be a whole number from 0 on, got {state[name]!r}"
    if "policy_version" not in state:
        return "policy_version is missing"
    if "run_id" in state and not (isinstance(state["run_id"], str) and state["run_id"]):
        return f"run_id must be a text, got {state['run_id']!r}"
    return _ledger_problem(state["ledger"]) if "ledger" in state else None


def _ledger_problem(ledger: Any) -> str | None:
    if not isinstance(ledger, dict) or not isinstance(dropped := ledger.get("dropped"), dict):
        return f"ledger must be a mapping with steps and dropped, got {ledger!r}"
    steps: list[Any] = [ledger.get(name) for name in ("sampled", "trained", "in_flight")]
    if not all(map(_is_count, [*steps, *dropped.values()])):
        return f"ledger must have whole numbers from 0 on, got {ledger!r}"
    if steps[0] != steps[1] + steps[2] + sum(dropped.values()):
        return f"ledger does not balance: sampled must be trained + in_flight + dropped, got {ledger!r}"
    return None


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def find_checkpoint(path: Path) -> Checkpoint:
    """``find_saved`` of one policy.

    Raises:
        CheckpointError: there is no checkpoint, none verifies, or it holds several policies.
    """
    checkpoint = find_saved(path)
    if checkpoint.policies:
        first = checkpoint.path / next(iter(checkpoint.policies))
        raise CheckpointError(
            f"{path} holds several policies, {', '.join(checkpoint.policies)}: shoal evaluate {path} plays them "
            f"together; shoal.load_policy and shoal export --onnx take the folder of one, such as {first}"
        )
    return checkpoint


def find_saved(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, which is a checkpoint, a run directory or a run's ``checkpoints`` directory.

    Raises:
        CheckpointError: there is no checkpoint, or none verifies.
    """
    if os.path.lexists(path / _MANIFEST):
        return load_checkpoint(path)
    # Also where it is a link to nothing, or a file: that is not a run without checkpoints.
    directory = path / "checkpoints" if os.path.lexists(path / "checkpoints") else path
    checkpoint = Checkpoints(directory).latest()
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint in {path}: {_why_none(path)}")
    return checkpoint


def _why_none(path: Path) -> str:
    """Why there is no checkpoint in ``path``, and what to name instead.

    Raises:
        CheckpointError: it is of one of several policies, and no checkpoint of these verifies.
    """
    expected = "expected RUN, RUN/checkpoints or one of the directories in it"
    if not path.exists():
        return f"there is nothing of that name; {expected}"
    if not (path / "config.yaml").is_file():
        return expected
    none_yet = "the run has saved none yet: that happens every checkpoint.every_updates updates and at its end"
    folder = path if path.parent.name == POLICIES else path.resolve()
    if folder.parent.name != POLICIES:
        return none_yet
    run = folder.parent.parent
    saved = Checkpoints(run / "checkpoints").latest()
    if saved is None or folder.name not in saved.policies:
        return none_yet
    return (
        f"it is the folder of one of several policies, which the run saves together in {run / 'checkpoints'}: shoal "
        f"evaluate {run} plays them all, and {saved.path / folder.name} is for shoal.load_policy and shoal export "
        "--onnx"
    )
