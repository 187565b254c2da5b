"""A trained policy as an ONNX file, which acts without shoal and without PyTorch."""

# B rows, L layers, H hidden, A numbers of the action distribution

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from shoal.deploy.evaluation.saved_run import reset_memory_of
from shoal.deploy.library.acting import load_policy
from shoal.deploy.library.exporting import CannotExport
from shoal.envs.actions import action_map
from shoal.envs.space_json import space_to_json
from shoal.envs.spaces import Declared
from shoal.learner.checkpoint import Checkpoint, CheckpointError, find_checkpoint
from shoal.policy.actions import actions_to_json, legal
from shoal.policy.observation import observation_to_json
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.resets import State
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest ``OnnxFile.error`` that rounding explains."""
_OPSET = 18
_STEPS, _ROWS = 8, (5, 1)


class OnnxFile(NamedTuple):
    """What was written."""

    path: Path
    bytes: int
    error: float
    """Largest difference between the file's and the policy's logits, values and states, over a few steps; relative, of
    numbers above 1."""


class _Step(nn.Module):
    """One step, as a function of everything that it depends on."""

    def __init__(self, policy: RecurrentPolicy, declared: Declared | None) -> None:
        super().__init__()
        self.policy = policy
        self._map = action_map(declared.action) if declared is not None else None

    def forward(
        self, obs: Tensor, is_first: Tensor, state: State, action_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        output, after = self.policy.step(obs, is_first, state)
        logits = legal(output.logits, action_mask)
        return self._in_environments_terms(self.policy.actions.mode(logits)), logits, output.value, *after

    def _in_environments_terms(self, action: Tensor) -> Tensor:
        """As ``envs.spaces.action_converter``."""
        if self._map is None:
            return action
        shape, scale, offset, low, high, dtype = self._map
        action = action.reshape(-1, *shape)
        if low is None or high is None:
            return action + torch.from_numpy(offset)
        scaled = action * torch.from_numpy(scale.astype(np.float32)) + torch.from_numpy(offset.astype(np.float32))
        bounds = (torch.from_numpy(bound.astype(np.float32)) for bound in (low, high))
        return torch.clamp(scaled, *bounds).to(torch.from_numpy(np.empty(0, dtype)).dtype)


def export_onnx(run_dir: str | Path, file: str | Path) -> OnnxFile:
    """Write the policy of a run, or of one of its checkpoints, as an ONNX file of one step, and check it.

    Inputs: ``obs`` [B, *observation.shape], ``is_first`` bool [B] (the state is zeroed before the row is consumed: with
    episodes, or as ``shoal.reset_memory`` in the metadata says, which is the run's ``actor.reset_memory``), the
    tensors of the core's state by name (of the LSTM ``h`` and ``c``), float32 [L, B, ...], zeros at first; and
    ``action_mask`` bool [B, A] where the environment tells which actions are legal. Outputs: ``action`` [B,
    *action.shape], the most probable one (the mean), in the environment's terms; ``logits`` [B, A], to sample from;
    ``value`` [B] in units of the reward; and the state after the step (``next_h`` and ``next_c``). Statistics of
    observations and values are part of the graph. The file's metadata describe observation and actions by name, in
    JSON.

    Raises:
        CheckpointError: there is no checkpoint.
        CannotExport: packages of ``shoal[onnx]`` are missing, PyTorch cannot translate the policy, or the file computes
            something else than the policy.
        OSError: the file cannot be written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CannotExport(f"{error.name} is not installed: pip install 'shoal[onnx]'") from error
    # The policy's module may change the directory when it is imported.
    checkpoint, path = find_checkpoint(Path(run_dir)), Path(file).absolute()
    try:
        trained = load_policy(run_dir)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CannotExport(str(error)) from error
    policy, declared = trained.network.cpu(), trained.declared
    num_mask = sum(declared.mask.sizes) if declared is not None and declared.mask else 0
    step = _Step(policy, declared).eval()
    states = list(policy.core.state_shapes)
    names = ["obs", "is_first", *states, *(["action_mask"] if num_mask else [])]
    outputs = ["action", "logits", "value", *(f"next_{name}" for name in states)]
    generator = np.random.default_rng(0)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes: dict[str, Any] = {"obs": {0: batch}, "is_first": {0: batch}, "state": tuple({1: batch} for _ in states)}
    if num_mask:
        shapes["action_mask"] = {0: batch}
    with _quiet():
        try:
            program = torch.onnx.export(
                step,
                _arguments(policy, _inputs(policy, num_mask, _ROWS[0], generator)),
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=_OPSET,
            )
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), "")
            raise CannotExport(f"PyTorch cannot translate {policy.kind}: {type(error).__name__}: {text}") from error
    assert program is not None
    program.model.metadata_props.update(_metadata(checkpoint, policy, declared))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        program.save(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        try:
            difference = max(_difference(session, step, num_mask, rows, generator) for rows in _ROWS)
        except Exception as error:  # onnxruntime's own are of several classes
            text = " ".join(str(error).split())
            raise CannotExport(
                f"the file of {policy.kind} does not run with another number of rows: {text}. Where a policy takes "
                "len() or int() of a tensor's shape, x.shape[0] leaves it open"
            ) from error
        if not difference <= TOLERANCE:
            raise CannotExport(f"the file's numbers differ from the policy's by {difference:.2g}; it is not kept")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return OnnxFile(path, path.stat().st_size, difference)


def _inputs(policy: RecurrentPolicy, num_mask: int, rows: int, generator: np.random.Generator) -> dict[str, Tensor]:
    """Random inputs of one step."""
    observation = policy.observation
    shape = (rows, *observation.shape)
    if np.dtype(observation.dtype).kind == "f":
        obs = torch.from_numpy(generator.standard_normal(shape).astype(observation.dtype))
    else:
        obs = torch.from_numpy(generator.integers(0, 256, shape).astype(observation.dtype))
    found = {"obs": obs, "is_first": torch.from_numpy(generator.random(rows) < 0.3)}
    for name, part in zip(policy.core.state_shapes, policy.initial_state(rows), strict=True):
        found[name] = torch.from_numpy(generator.uniform(-1, 1, tuple(part.shape)).astype(np.float32))
    if num_mask:
        mask = generator.random((rows, num_mask)) < 0.7
        mask[:, 0] = True
        found["action_mask"] = torch.from_numpy(mask)
    return found


def _arguments(policy: RecurrentPolicy, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """The inputs as ``_Step`` takes them."""
    state = tuple(inputs[name] for name in policy.core.state_shapes)
    return inputs["obs"], inputs["is_first"], state, *([inputs["action_mask"]] if "action_mask" in inputs else [])


@torch.inference_mode()
def _difference(session: Any, step: _Step, num_mask: int, rows: int, generator: np.random.Generator) -> float:
    """Largest difference of logits, values and states over some steps, each with the state that the file returned."""
    worst = 0.0
    state: dict[str, Tensor] = {}
    for _ in range(_STEPS):
        given = _inputs(step.policy, num_mask, rows, generator) | state
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        _, *wanted = step(*_arguments(step.policy, given))
        for mine, theirs in zip(found[1:], wanted, strict=True):
            expected = theirs.numpy()
            # Relative to numbers above 1: values are in units of the reward.
            worst = max(worst, float((np.abs(mine - expected) / np.maximum(np.abs(expected), 1.0)).max(initial=0.0)))
        state = {
            name: torch.from_numpy(part) for name, part in zip(step.policy.core.state_shapes, found[3:], strict=True)
        }
    return worst


def _metadata(checkpoint: Checkpoint, policy: RecurrentPolicy, declared: Declared | None) -> dict[str, str]:
    found: dict[str, Any] = {
        "env_id": checkpoint.state["env_id"],
        "policy_version": checkpoint.policy_version,
        "reset_memory": reset_memory_of(checkpoint),
        "observation": observation_to_json(policy.observation),
        "actions": actions_to_json(policy.actions),
    }
    if declared is not None:
        found["observation_space"] = space_to_json(declared.observation)
        found["action_space"] = space_to_json(declared.action)
    return {f"shoal.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
