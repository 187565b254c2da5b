"""Weights that were trained elsewhere, as a checkpoint that ``evaluate``, ``export`` and ``train`` take."""

from __future__ import annotations

import dataclasses
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from shoal.deploy.placement.versions import versions
from shoal.deploy.settings.load import MAX_FILE_BYTES, BoundedComposer, to_dict
from shoal.deploy.settings.sections import Config
from shoal.deploy.weights.original import OriginalError, read_original
from shoal.envs.config import EnvConfig
from shoal.envs.registry import make_env_spec
from shoal.learner.checked_files import check_archive, open_regular
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.config import LearnerConfig
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner import Learner
from shoal.learner.ledger import Ledger
from shoal.policy.actions import Discrete
from shoal.policy.make import make_policy
from shoal.policy.observation import TokenObservation
from shoal.problems import Problems

_ARGUMENTS = {"attack": 9, "get_items": 1, "move": 2, "noop": 1, "put_items": 1, "rotate": 4, "swap": 1}
_RESOURCES = ("ore_red", "ore_blue", "ore_green", "battery_red", "battery_blue", "battery_green")
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "metta-2025-08": {
        "width": 11,
        "height": 11,
        "num_tokens": 200,
        "features": {
            "type_id": 1,
            "agent:group": 10,
            "hp": 30,
            "agent:frozen": 1,
            "agent:orientation": 1,
            "agent:color": 255,
            "converting": 1,
            "swappable": 1,
            "episode_completion_pct": 255,
            "last_action": 10,
            "last_action_arg": 10,
            "last_reward": 100,
            "agent:glyph": 255,
            "resource_rewards": 255,
            "agent:visitation_counts": 1000,
            **{f"inv:{name}": 100 for name in (*_RESOURCES, "heart", "armor", "laser", "blueprint")},
        },
        "actions": [f"{name}_{i}" for name, count in _ARGUMENTS.items() for i in range(count)],
    },
}
"""Features and actions that known weights were trained with, in their order; a file says the same of others."""
_KEYS = {"width": int, "height": int, "num_tokens": int, "features": dict, "actions": list}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """The checkpoint that was written."""

    checkpoint: Path
    num_parameters: int
    action_rows: dict[str, int]


def import_weights(
    file: Path,
    out: Path,
    *,
    description: str = "metta-2025-08",
    first_row: int | None = None,
    env_id: str = "",
    kind: str = "fast",
) -> Imported:
    """Write a checkpoint of version 0 with the weights in ``file`` below ``out/checkpoints``.

    Args:
        file: an original policy's ``state_dict``, as ``.safetensors`` or by ``torch.save``.
        out: the run directory.
        description: a name in ``DESCRIPTIONS``, or a YAML or JSON file with the same keys.
        first_row: the embedding row of the first action; None takes what the names of the tensors say.
        env_id: the environment that the weights are for; without it ``evaluate`` and ``train`` must be told.
        kind: of the policy.

    Raises:
        ValueError: the file, the description or both together are no policy; nothing was written.
        OSError: it cannot be read or written.
    """
    out = out.absolute()
    checkpoints = Checkpoints(out / "checkpoints")
    if checkpoints.latest() is not None:
        raise ValueError(f"{out} holds checkpoints already; choose another directory")
    config = Config(env=EnvConfig(id=env_id) if env_id else EnvConfig())
    described = _description(description)
    observation = TokenObservation(
        described["width"],
        described["height"],
        described["num_tokens"],
        list(described["features"].values()),
        list(described["features"]),
    )
    actions = Discrete((tuple(described["actions"]),))
    names = actions.flat_names
    expected = make_policy(kind, observation, actions, max(len(names), 1)).state_dict()
    original = read_original(_read_tensors(file), expected)
    if env_id:
        make_env_spec(env_id)  # whose module may change the directory that paths begin in
    _check_normalizations(original.normalizations, observation)
    table = len(original.weights["action_embeddings.weight"])
    rows = _rows(names, original.rows, original.first_row if first_row is None else first_row, first_row)
    policy = make_policy(kind, observation, actions, table, action_rows=rows)
    _load(policy, original.weights)
    settings = LearnerConfig(device="cpu")
    learner = Learner(policy, settings, make_device_path(settings), num_threads=1, seed=0)
    state = {
        "run_id": uuid.uuid4().hex,
        "session": 0,
        "run_dir": str(out.resolve()),
        "env_id": env_id,
        "env_kwargs": {},
        "env_options": {},
        "ledger": Ledger().to_json(),
        "mean_return": None,
        "config": to_dict(config),
        "versions": versions(),
        "imported_from": file.name,
    }
    path = checkpoints.save(learner, state)
    return Imported(checkpoint=path, num_parameters=sum(p.numel() for p in policy.parameters()), action_rows=rows)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    with open_regular(file) as opened:
        size = opened.seek(0, os.SEEK_END)
        is_archive = zipfile.is_zipfile(opened)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise OriginalError(f"{file} is no safetensors file: {error}") from error
    try:
        if is_archive:
            check_archive(file)
    except ValueError as error:
        raise OriginalError(str(error)) from error
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # torch raises all sorts of things for files that are damaged
        if type(error).__name__ == "UnpicklingError":  # its module is imported nowhere here
            raise OriginalError(
                f"{file} holds more than tensors, and reading it would run code that it brings along. Where it was "
                "made, save only its tensors: torch.save(policy.state_dict(), 'weights.pt')"
            ) from error
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise OriginalError(f"{file} is damaged, or no file of torch.save: {why[:200]}") from error
    # Some savers put the state_dict beside other things.
    while isinstance(saved, dict) and len(inner := [v for v in saved.values() if isinstance(v, dict)]) == 1:
        saved = inner[0]
    if not isinstance(saved, dict) or not all(isinstance(v, torch.Tensor) for v in saved.values()) or not saved:
        raise OriginalError(f"{file} is no state_dict: expected tensors by name, got {_shape_of(saved)}")
    # A tensor that repeats a part of itself has any size in a file of none.
    large = [name for name, tensor in saved.items() if tensor.numel() * tensor.element_size() > size]
    if large:
        raise OriginalError(f"{file} is no state_dict: {', '.join(map(str, large[:3]))} would be larger than the file")
    return saved


def _shape_of(saved: Any) -> str:
    if not isinstance(saved, dict):
        return type(saved).__name__
    return "{" + ", ".join(f"{key}: {type(value).__name__}" for key, value in list(saved.items())[:8]) + "}"


class _Loader(BoundedComposer, yaml.SafeLoader):
    """YAML without what grows beyond its file."""


def _description(name: str) -> dict[str, Any]:
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--describe {name}: neither a file nor one of {', '.join(DESCRIPTIONS)}")
    with open_regular(path) as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"--describe {name}: expected at most {MAX_FILE_BYTES // 1024} KiB; is it the right file?")
    try:
        found = yaml.load(text.decode(), _Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter for numbers of thousands of digits, and dates
        raise ValueError(f"--describe {name}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or set(found) != set(_KEYS):
        got = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"--describe {name}: expected the keys {sorted(_KEYS)}, got {got}")
    problems = [
        f"--describe {name}: {key}: expected {kind.__name__}, got {found[key]!r}"
        for key, kind in _KEYS.items()
        if type(found[key]) is not kind
    ]
    if not problems:
        texts = [*found["features"], *found["actions"]]
        problems += [
            f"--describe {name}: {text!r} is no name; write it in quotes" for text in texts if type(text) is not str
        ]
        problems += [
            f"--describe {name}: features.{key}: expected a normalization, got {value!r}"
            for key, value in found["features"].items()
            if type(value) not in (int, float)
        ]
    if problems:
        raise Problems(*problems)
    return found


def _check_normalizations(saved: tuple[float, ...] | None, observation: TokenObservation) -> None:
    described = tuple(float(norm or 1) for norm in observation.feature_normalizations)
    if saved is not None and saved != described:
        raise OriginalError(
            f"the weights were trained with the normalizations {saved}, the description has {described}"
        )


def _rows(names: tuple[str, ...], saved: tuple[int, ...] | None, first_row: int, asked: int | None) -> dict[str, int]:
    rows = tuple(range(first_row, first_row + len(names)))
    if saved is not None:
        if len(saved) != len(names):
            raise OriginalError(f"the weights were saved with {len(saved)} actions, the description has {len(names)}")
        if asked is not None and saved != rows:
            raise OriginalError(f"--first-row {asked}: the weights say that their actions have rows {list(saved)}")
        rows = saved
    return dict(zip(names, rows, strict=True))


def _load(policy: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    expected = policy.state_dict()
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in weights.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise OriginalError("the weights are of another network than the description's:\n  " + "\n  ".join(wrong))
    policy.load_state_dict(weights)


def describe(imported: Imported) -> str:
    """The report of an import, for the command line."""
    rows = sorted(imported.action_rows.values())
    return (
        f"{imported.checkpoint}: {imported.num_parameters:,} parameters, "
        f"{len(rows)} actions in embedding rows {rows[0]}..{rows[-1]}"
    )
