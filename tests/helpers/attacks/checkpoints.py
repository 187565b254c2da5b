"""Checkpoints: every region of every file, with the hashes that were right before and with those that are right now."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from shoal.deploy.library.acting import load_policy
from shoal.learner.checkpoint import CheckpointError, Checkpoints, find_saved
from shoal.learner.config import LearnerConfig
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner import Learner

from attacks import Attack
from attacks.edits import byte_edits, edited, tree_edited, tree_edits
from attacks.recorded import seal, train

FILES = (
    *("weights.safetensors", "regularizer.safetensors", "optimizer.pt", "state.json", "rollouts.npz"),
    "manifest.json",
)


DAMAGE = {
    "tree": tree_edits,
    "bytes": byte_edits,
    "kind": st.sampled_from(
        (
            *("missing", "empty", "pipe", "folder", "dangling", "device", "large", "deep", "laughs", "many names"),
            *("compressed", "bomb"),
        )
    ),
    "sealed": st.just(True),
}
"""What may be done to a file."""


class Damaged:
    """The newest of two checkpoints of a run."""

    attacks = st.fixed_dictionaries(
        {"file": st.sampled_from(FILES)},
        optional=DAMAGE,
    )

    def __init__(self, directory: Path) -> None:
        pristine = train(directory / "pristine")
        self._run = directory / "attacked"
        shutil.rmtree(self._run, ignore_errors=True)
        shutil.copytree(pristine, self._run)
        self._before, self._newest = sorted((self._run / "checkpoints").iterdir())
        self._content = {path.name: path.read_bytes() for path in self._newest.iterdir()}
        policy = find_saved(self._run).make_policy()
        config = LearnerConfig(device="cpu", normalize_values=True, epochs=1, minibatches=1)
        self._learner = Learner(policy, config, make_device_path(config), seed=0)

    def attempt(self, attack: Attack) -> str:
        """Find it, make its policy, restore a learner from it; where it is refused, the one before is taken."""
        for name, content in self._content.items():
            path = self._newest / name
            if path.is_symlink() or not path.is_file():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.write_bytes(content)
        name = attack["file"]
        if not damage(self._newest / name, self._content[name], attack):
            return "not made"
        if attack.get("sealed"):
            seal(self._newest)
        try:
            checkpoint = find_saved(self._newest)
        except CheckpointError:
            latest = Checkpoints(self._run / "checkpoints").latest()
            assert latest is not None
            assert latest.path == self._before, "the one before is not taken"
            return "refused"
        if not attack.get("sealed") and name != "manifest.json":
            assert (self._newest / name).read_bytes() == self._content[name], "changed and taken"
        outcome = "taken"
        with _refused() as used:
            checkpoint.make_policy()
        with _refused(ValueError) as played:
            load_policy(self._newest)
        with _refused() as restored:
            checkpoint.restore(self._learner)
            checkpoint.restore_start_states(self._learner)
        with _refused() as went_on:
            if checkpoint.has_rollouts:
                checkpoint.load_rollouts()
        if any((*used, *played, *restored, *went_on)):
            outcome = "refused"
        return outcome


def damage(path: Path, data: bytes, attack: Attack) -> bool:
    """Write ``data`` as the attack has changed it; False where that cannot be written."""
    if tree := attack.get("tree"):
        try:
            data = _with_tree(path.suffix, data, tree)
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError, RuntimeError, AttributeError):
            return False
    path.write_bytes(edited(data, attack.get("bytes", ())))
    if kind := attack.get("kind"):
        path.unlink()
        match kind:
            case "empty":
                path.touch()
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "dangling":
                path.symlink_to("nothing")
            case "device":
                path.symlink_to("/dev/zero")
            case "large":
                path.write_bytes(data * (2**22 // len(data) + 1))
            case "deep":
                path.write_bytes(b"[" * 200_000)
            case "laughs":
                doubled = "".join(f"l{n}: &l{n} {{a: *l{n - 1}, b: *l{n - 1}}}\n" for n in range(1, 28))
                path.write_bytes(data.rstrip() + b"\nl0: &l0 {x: 1}\n" + doubled.encode())
            case "many names":
                path.write_text("".join(map(_line_of_new_names, range(600))))
            case "compressed":
                _compress(path, data)
            case "bomb":
                path.write_bytes(_bomb())
    return True


def _line_of_new_names(number: int) -> str:
    line = {"time": number, "session": 0, "seconds": number, "env_steps": number}
    return json.dumps(line | {f"n{number}/{label}": 1 for label in range(40)}) + "\n"


def _compress(path: Path, data: bytes) -> None:
    """The same archive, compressed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made, contextlib.suppress(zipfile.BadZipFile):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                made.writestr(name, archive.read(name))


@contextlib.contextmanager
def _refused(documented: type[ValueError] = CheckpointError) -> Iterator[list[str]]:
    """The documented refusals of what is done here."""
    found: list[str] = []
    try:
        yield found
    except documented as error:
        found.append(str(error))


def _with_tree(suffix: str, data: bytes, edits: list[Any]) -> bytes:
    """A file whose JSON, in whichever form it has it, is edited."""
    match suffix:
        case ".json":
            return json.dumps(tree_edited(json.loads(data), edits)).encode()
        case ".yaml":
            return json.dumps(tree_edited(yaml.safe_load(data), edits)).encode()
        case ".jsonl":
            lines = data.splitlines(keepends=True)
            at = edits[0][1] % len(lines)
            lines[at] = json.dumps(tree_edited(json.loads(lines[at]), edits)).encode() + b"\n"
            return b"".join(lines)
        case ".log" | ".txt" | "":
            return data + str(edits).encode()
        case ".safetensors":
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(tree_edited(json.loads(data[8 : 8 + size]), edits)).encode()
            return len(header).to_bytes(8, "little") + header + data[8 + size :]
        case ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                parts = dict(arrays)
            document = tree_edited(json.loads(parts["document"].tobytes()), edits)
            parts["document"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
            made = io.BytesIO()
            (np.savez_compressed if len(edits) > 2 else np.savez)(made, **parts)
            return made.getvalue()
    made = io.BytesIO()
    torch.save(tree_edited(torch.load(io.BytesIO(data), weights_only=True), edits), made)
    return made.getvalue()


@functools.cache
def _bomb() -> bytes:
    """An archive of some kilobytes that unpacks to 64 MiB, and says that it does to more than the process may have."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("document.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (9 * 2**30,)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(16):
                file.write(bytes(2**22))
    return made.getvalue()


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Damaged]:
    """The run lies in ``directory``."""
    loggers = [logging.getLogger(name) for name in ("shoal", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        yield Damaged(directory)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
