"""Checkpoints: directories of tensors and plain data, each complete or absent. Nothing in them is run as code.

``<policy_version>/weights.safetensors``  the policy's ``state_dict``
``<policy_version>/regularizer.safetensors``  w0, and the initial magnitudes that clip bounds are multiples of
``<policy_version>/optimizer.pt``  optimizer, random streams and running statistics, loaded with ``weights_only=True``
``<policy_version>/state.json``  counters, ledger, config, observation and action names
``<policy_version>/manifest.json``  size and sha256 of each of these
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from shoal.learner.config import ADAM
from shoal.learner.learner import Learner
from shoal.learner.optimizer import restore_optimizer
from shoal.policy.actions import actions_from_json, actions_to_json
from shoal.policy.graph import components_from_json, differences, resolve
from shoal.policy.make import make_policy
from shoal.policy.observation import observation_from_json, observation_to_json
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.weights import Weights, named_weights

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_FILES = ("weights.safetensors", "regularizer.safetensors", "optimizer.pt", "state.json")

_NORMALIZATION = {
    "normalize_observations": "policy.normalize_observations",
    "normalize_values": "learner.normalize_values",
}
"""Settings by their names in a policy's description."""

_INCOMPLETE, _REPLACED = ".incomplete-", ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it is incomplete or changed, or has another format or another policy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    path: Path
    state: Mapping[str, Any]

    @property
    def policy_version(self) -> int:
        """Updates made when it was saved."""
        return int(self.state["policy_version"])

    def make_policy(self) -> RecurrentPolicy:
        """The policy as it was saved, rebuilt from its description in the checkpoint."""
        described = self.state["policy"]
        policy = make_policy(
            described["kind"],
            observation_from_json(described["observation"]),
            actions_from_json(described["actions"]),
            described["embedding_rows"],
            components=described.get("components"),
            kwargs=described.get("kwargs"),
            action_rows=described["action_rows"],
            normalize_observations=described.get("normalize_observations", False),
            normalize_values=described.get("normalize_values", False),
        )
        policy.load_state_dict(self.load_weights())
        return policy

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The policy's ``state_dict``."""
        return load_file(self.path / "weights.safetensors")

    def restore(self, learner: Learner) -> None:
        """Load weights, optimizer, regularizer, random streams and trained steps into ``learner``.

        The policy may be of another kind than the saved one if it computes the same.

        Raises:
            CheckpointError: it holds a policy of another shape, or something else than tensors and plain data.
        """
        if changed := _changed_components(self.state["policy"], learner.policy):
            raise CheckpointError(
                f"{self.path} holds another policy than this run's config describes: it has other components "
                f"{', '.join(changed)} than {learner.policy.kind} with policy.components={learner.policy.components}"
            )
        here = describe_policy(learner.policy)
        for key, name in _NORMALIZATION.items():
            saved_with = self.state["policy"].get(key, False)
            if saved_with != here[key] and not (key == "normalize_values" and here[key]):
                raise CheckpointError(
                    f"{self.path} was trained with {name}={str(saved_with).lower()} and can only be resumed so"
                )
        try:
            # mmap=False: a mapped file could change after it was verified.
            saved = torch.load(
                self.path / "optimizer.pt", weights_only=True, mmap=False, map_location=learner.path.device
            )
        except Exception as error:  # pickle and torch raise errors of any class
            raise CheckpointError(f"{self.path / 'optimizer.pt'} holds more than tensors and plain data") from error
        try:
            weights = load_file(self.path / "weights.safetensors")
            if learner.policy.value_scale is not None and not self.state["policy"].get("normalize_values", False):
                # Values in units of the reward are values in units of 1.
                weights |= {"value_scale.mean": torch.zeros(()), "value_scale.std": torch.ones(())}
            learner.policy.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path} holds another policy than this run's config describes: {error}"
            ) from error
        learner.regularizer.load_state_dict(load_file(self.path / "regularizer.safetensors"))
        saved_by = self.state.get("config", {}).get("learner", {}).get("optimizer", ADAM)
        if saved_by == learner.config.optimizer:
            restore_optimizer(learner.optimizer, saved["optimizer"])
        else:
            log.warning(
                "%s was saved with the optimizer %s; %s begins anew", self.path, saved_by, learner.config.optimizer
            )
        learner.statistics.load_state_dict(saved.get("statistics", {}))
        learner.kl_adaptation.factor = float(saved.get("learning_rate_factor", 1.0))
        learner.load_random_state(saved["random"])
        learner.policy_version = self.policy_version
        learner.env_steps = int(self.state.get("ledger", {}).get("trained", 0))


def _changed_components(described: Mapping[str, Any], policy: RecurrentPolicy) -> list[str]:
    """Names of the components that differ; equal shapes may still have another activation or another source."""
    saved = resolve(
        components_from_json(described.get("components") or {}), observation_from_json(described["observation"])
    )
    return differences(saved, resolve(components_from_json(policy.components), policy.trained_observation))


def describe_policy(policy: RecurrentPolicy) -> dict[str, Any]:
    """The description from which the policy can be rebuilt around its weights."""
    return {
        "kind": policy.kind,
        "components": policy.components,
        "kwargs": dict(policy.kwargs),
        "observation": observation_to_json(policy.trained_observation),
        "actions": actions_to_json(policy.actions),
        "action_rows": dict(policy.action_rows),
        "embedding_rows": policy.embedding_rows,
        "normalize_observations": policy.vector_normalizer is not None,
        "normalize_values": policy.value_scale is not None,
    }


class Checkpoints:
    """The checkpoints of one run, of which the newest ``keep`` are kept."""

    def __init__(self, directory: Path, *, keep: int = 3) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: the newest may turn out to be damaged")
        self.directory, self._keep = directory, keep

    def save(self, learner: Learner, state: Mapping[str, Any], weights: Weights | None = None) -> Path:
        """Write a checkpoint of ``learner`` with ``state`` beside it; visible under its name only once complete.

        With ``weights``, which ``learner`` published before, it holds these and a fresh optimizer, because the moments
        of that time are gone. The learner may go on with its updates meanwhile.

        Raises:
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        version = weights.policy_version if weights else learner.policy_version
        parameters, optimizer = learner.policy.state_dict(), learner.optimizer.state_dict()
        if weights:
            parameters = {**parameters, **named_weights(learner.policy, weights)}
            optimizer = {**optimizer, "state": {}}
        final = self.directory / f"{version:09d}"
        for abandoned in self.directory.glob(f"{_INCOMPLETE}*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=self.directory))
        try:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in parameters.items()},
                temporary / _FILES[0],
            )
            save_file(
                {k: v.cpu().contiguous() for k, v in learner.regularizer.state_dict().items()}, temporary / _FILES[1]
            )
            tensors = {
                "optimizer": optimizer,
                "random": learner.random_state(),
                "statistics": learner.statistics.state_dict(),
                "learning_rate_factor": learner.kl_adaptation.factor,
            }
            torch.save(tensors, temporary / _FILES[2])
            document = {
                "format_version": FORMAT_VERSION,
                "policy_version": version,
                "policy": describe_policy(learner.policy),
                **state,
            }
            (temporary / _FILES[3]).write_text(json.dumps(document, indent=1))
            manifest = {name: _fingerprint(temporary / name) for name in _FILES}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            replaced = self.directory / (_REPLACED + final.name)
            if final.exists():  # the same version again: a run that stopped right after saving
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(final, replaced)
            os.rename(temporary, final)
            _sync(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self._complete()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; a warning names each damaged one. None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none of them verifies. A fresh start would hide this.
        """
        problems = []
        for path in self._complete():
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
                problems.append(str(error))
        if problems:
            raise CheckpointError("no usable checkpoint in " + str(self.directory) + ":\n  " + "\n  ".join(problems))
        return None

    def _complete(self) -> list[Path]:
        """Complete checkpoints, newest first; one whose replacement was interrupted comes after its successor."""
        if not self.directory.is_dir():
            return []
        versions = {path: path.name.removeprefix(_REPLACED) for path in self.directory.iterdir()}
        found = [path for path, version in versions.items() if version.isdecimal()]
        return sorted(found, key=lambda path: (int(versions[path]), path.name == versions[path]), reverse=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint after verifying every file against its manifest.

    Raises:
        CheckpointError: a file is missing or changed, or the format is not this one.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in _FILES:
            actual = _fingerprint(path / name)
            if actual != manifest.get(name):
                raise CheckpointError(f"{path / name} is damaged: expected {manifest.get(name)}, found {actual}")
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no complete checkpoint: {error}") from error
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {state.get('format_version')}; this version reads {FORMAT_VERSION}")
    return Checkpoint(path, state)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, which is a checkpoint, a run directory or a run's ``checkpoints`` directory.

    Raises:
        CheckpointError: there is no checkpoint, or none verifies.
    """
    if (path / "manifest.json").is_file():
        return load_checkpoint(path)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint = Checkpoints(directory).latest()
    if checkpoint is None:
        why = "expected RUN, RUN/checkpoints or one of the directories in it"
        if not path.exists():
            why = f"there is nothing of that name; {why}"
        elif (path / "config.yaml").is_file():
            why = "the run has saved none yet: that happens every checkpoint.every_updates updates and at its end"
        raise CheckpointError(f"no checkpoint in {path}: {why}")
    return checkpoint


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
