"""Exported policies act as the policies do, without shoal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import shoal
import torch
from echo_envs import CASES, Case, even, mask
from gymnasium import spaces
from shoal.deploy.cli import main
from shoal.deploy.library import onnx_file
from shoal.deploy.library.exporting import CannotExport
from shoal.deploy.library.onnx_file import export_onnx
from shoal.envs.boundary import StepRows
from shoal.envs.registry import make_vector_env
from shoal.policy.tokens import TokensToBox

onnxruntime = pytest.importorskip("onnxruntime")

PAGE = (Path(__file__).resolve().parents[2] / "deploy" / "docs" / "files.md").read_text()
SMALL = {
    "mode": "inline",
    "total_env_steps": 200,
    "env.num_envs": 4,
    "actor.unroll_length": 8,
    "learner.epochs": 1,
    "learner.minibatches": 2,
    "evaluation.random_seconds": 0,
    "learner.batch_size": 16,
    "progress": False,
}
CASES["two choices"] = Case(even, action=spaces.MultiDiscrete([3, 2], start=[1, 0]))
CASES["one-sided bounds"] = Case(
    even, action=spaces.Box(np.array([[-3, 0, -np.inf]], np.float32), np.array([[9, np.inf, np.inf]], np.float32))
)
RUNS: dict[str, dict[str, Any]] = {
    "vectors": {"env.id": "recall"},
    "component": {"env.id": "recall", "policy.kind": "component"},
    "gru": {"env.id": "recall", "policy.core": "gru"},
    "linear": {"env.id": "recall", "policy.core": "linear"},
    "own core": {"env.id": "recall", "policy.core": "own_cores:Leaky"},
    "bounds": {"env.id": "Pendulum-v1"},
    "images": {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": "small"}},
    "residual": {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": "small"}, "policy.image_encoder": "residual"},
    "masks": {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": "mask in info"}},
    "two choices": {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": "two choices"}},
    "one-sided bounds": {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": "one-sided bounds"}},
}


def train(folder: Path, which: str) -> Path:
    return Path(shoal.train(run_dir=folder / "run", **RUNS[which], **SMALL).run_dir)


@pytest.mark.parametrize("which", RUNS)
def test_the_file_acts_as_the_policy_does(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches statistics that are left out, a state that is not zeroed, illegal actions, and a fixed batch size."""
    run, file = train(tmp_path, which), tmp_path / "policy.onnx"
    assert main(["export", str(run), "--onnx", str(file)]) == 0
    assert re.search(r"policy.onnx: [\d,]+ bytes; its numbers differ from the policy's by \d", capsys.readouterr().out)
    session = onnxruntime.InferenceSession(str(file))
    policy = shoal.load_policy(run, greedy=True)
    rng = np.random.default_rng(1)
    observation = policy.network.observation
    shapes = policy.network.core.state_shapes
    state = [np.zeros((layers, 3, *rest), np.float32) for layers, *rest in shapes.values()]
    for t in range(12):
        if np.dtype(observation.dtype).kind == "f":
            obs = rng.uniform(-2, 2, (3, *observation.shape)).astype(observation.dtype)
        else:
            obs = rng.integers(0, 256, (3, *observation.shape)).astype(observation.dtype)
        is_first = np.array([t == 0, t in (0, 4), True])
        given = {"obs": obs, "is_first": is_first, **dict(zip(shapes, state, strict=True))}
        masks = np.stack([mask(t), mask(t + 1), mask(t + 2)]) if which == "masks" else None
        if masks is not None:
            given["action_mask"] = masks.astype(bool)
        action, logits, value, *state = session.run(None, given)
        declared, policy.declared = policy.declared, None
        # The network's own rows; what the environment takes is compared below.
        policy.act(obs, [0, 1, 2], is_first)
        policy.declared = declared
        wanted = policy.get_memory()
        for row in range(3):
            for part, mine in zip(state, wanted[row], strict=True):
                np.testing.assert_allclose(part[:, row], mine, atol=1e-5)
        with torch.inference_mode():
            output, _ = policy.network.step(torch.from_numpy(obs), torch.from_numpy(is_first), None)
            if is_first.all():
                np.testing.assert_allclose(value, output.value.numpy(), atol=1e-4)
        if declared is None:  # rows and actions are the environment's own terms
            np.testing.assert_array_equal(action, logits.argmax(1))
            continue
        batch = np.stack([np.asarray(one) for one in action])
        assert all(declared.action.contains(one.astype(declared.action.dtype)) for one in batch)
        if masks is not None:
            chosen = action - declared.action.start  # type: ignore[attr-defined]
            assert np.take_along_axis(masks, chosen[:, None], 1).all()
            assert (logits[~masks.astype(bool)] < -1e8).all()
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["shoal.env_id"] == RUNS[which]["env.id"]
    assert json.loads(metadata["shoal.actions"])


def test_actions_are_those_of_load_policy(tmp_path: Path) -> None:
    """Catches a torque between -1 and 1 where the environment's is between -2 and 2."""
    run, file = train(tmp_path, "bounds"), tmp_path / "policy.onnx"
    export_onnx(run, file)
    session, policy = onnxruntime.InferenceSession(str(file)), shoal.load_policy(run, greedy=True)
    env = gymnasium.make("Pendulum-v1")
    obs, _ = env.reset(seed=3)
    h = c = np.zeros((2, 1, 128), np.float32)
    for t in range(30):
        wanted = policy.act(obs, 0, t == 0)
        action, _, _, h, c = session.run(None, {"obs": obs[None], "is_first": np.array([t == 0]), "h": h, "c": c})
        np.testing.assert_allclose(action[0], wanted, atol=1e-4)
        obs, *_ = env.step(action[0])
    env.close()


class Mixed(gymnasium.Env[Any, Any]):
    """Shows a picture, two numbers and a choice, of its own random stream; episodes have six steps."""

    observation_space = spaces.Dict(
        screen=spaces.Box(0, 255, (12, 14, 3), np.uint8), v=spaces.Box(-3, 3, (2,), np.float32), kind=spaces.Discrete(3)
    )
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return self.observation_space.sample(), float(action == 1), self.time == 6, False, {}


gymnasium.register("Mixed-v0", Mixed)


@pytest.mark.parametrize(
    "settings",
    [
        {"env.id": "Mixed-v0"},
        {"env.id": "Mixed-v0", "policy.core": "gru", "policy.image_encoder": "residual"},
        {"env.id": "mettagrid/forage"},
        {"env.id": "mettagrid/forage", "policy.kind": "component", "policy.core": "linear"},
    ],
    ids=str,
)
def test_recorded_episodes_are_acted_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """Catches whole policies of Dicts and of tokens that see something else in the file, and a memory that differs once
    episodes have ended."""
    run = Path(shoal.train(run_dir=tmp_path / "run", **SMALL | settings | {"env.num_envs": 8}).run_dir)
    export_onnx(run, tmp_path / "policy.onnx")
    session, policy = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx")), shoal.load_policy(run, greedy=True)
    env = make_vector_env(settings["env.id"], 8, 3, None, True)
    rows = np.zeros((8, *env.spec.obs_shape), env.spec.obs_dtype)
    env.reset(rows)
    is_first, steps = np.ones(8, np.bool_), []
    for _ in range(20):
        obs = policy.network.read(torch.from_numpy(rows)).numpy().copy()
        with torch.inference_mode():
            logits = policy.network.act(torch.from_numpy(rows), range(8), torch.from_numpy(is_first)).logits.numpy()
        steps.append((obs, is_first.copy(), logits.copy()))
        outcome = StepRows(rows, is_first, np.zeros(8, np.float32), np.zeros(8, np.bool_), np.zeros(8, np.bool_), None)
        env.step(logits.argmax(1).astype(np.int64), outcome)
    env.close()
    assert settings["env.id"] == "mettagrid/forage" or sum(first.any() for _, first, _ in steps) > 1
    shapes = policy.network.core.state_shapes
    state = [np.zeros((layers, 8, *rest), np.float32) for layers, *rest in shapes.values()]
    for obs, first, wanted in steps:
        given = {"obs": obs, "is_first": first, **dict(zip(shapes, state, strict=True))}
        action, logits, _, *state = session.run(None, given)
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
        assert (action == logits.argmax(1)).all()


class Counting(shoal.FastPolicy):
    """Fixes the number of rows of an exported graph."""

    def encode(self, obs: torch.Tensor) -> torch.Tensor:
        return super().encode(obs) + torch.zeros(len(obs), 1)


def test_a_policy_that_fixes_its_rows_is_told_so(tmp_path: Path) -> None:
    """Catches a traceback of onnxruntime, and a file that plays one number of environments alone."""
    run = shoal.train("CartPole-v1", policy=Counting, run_dir=tmp_path / "run", **SMALL).run_dir
    with pytest.raises(CannotExport, match=r"does not run with another number of rows: .*x\.shape\[0\] leaves it open"):
        export_onnx(run, tmp_path / "policy.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_last_token_of_a_cell_wins(tmp_path: Path) -> None:
    """Catches a graph that writes two tokens into one cell, whose order ONNX leaves open."""
    tokens = shoal.TokenObservation(5, 5, 30, [2.0, 3.0], ["a", "b"])
    box = TokensToBox(tokens)
    rows = torch.randint(0, 3, (2, 30, 3), dtype=torch.uint8)
    rows[..., 0] = rows[..., 0] << 4 | rows[..., 1]
    with onnx_file._quiet():
        program = torch.onnx.export(box, (rows,), dynamo=True, verbose=False, opset_version=18)
    assert program is not None
    kinds = [node.op_type for node in program.model.graph]
    scatters = [node for node in program.model.graph if node.op_type.startswith("Scatter")]
    assert "NonZero" not in kinds
    # The one that finds the last writer takes a maximum; of the other, all writers of a cell write one number.
    assert any(node.attributes["reduction"].value == "max" for node in scatters if "reduction" in node.attributes)
    program.save(tmp_path / "box.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "box.onnx"))
    [name] = [one.name for one in session.get_inputs()]
    [found] = session.run(None, {name: rows.numpy()})
    np.testing.assert_array_equal(found, box(rows).numpy())


def test_the_example_of_the_site_plays(tmp_path: Path) -> None:
    """Catches a page whose program fails, or needs shoal or PyTorch."""
    run = train(tmp_path, "vectors")
    [snippet] = re.findall(r"```python\n(import gymnasium\nimport numpy as np\nimport onnxruntime.*?)```", PAGE, re.S)
    shoal.train("CartPole-v1", run_dir=tmp_path / "cartpole", **SMALL)
    export_onnx(tmp_path / "cartpole", tmp_path / "policy.onnx")
    snippet += "\nimport sys\nassert not {'torch', 'shoal'} & set(sys.modules)\n"
    (tmp_path / "play.py").write_text(snippet)
    done = subprocess.run([sys.executable, "play.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 8
    assert run.exists()


def test_what_cannot_be_exported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that computes something else, and a traceback where a package is missing."""
    run, file = train(tmp_path, "vectors"), tmp_path / "policy.onnx"
    assert main(["export", str(tmp_path / "nowhere"), "--onnx", str(file)]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(onnx_file, "TOLERANCE", -1.0)
        with pytest.raises(CannotExport, match=r"differ from the policy's by .*; it is not kept"):
            export_onnx(run, file)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
        with pytest.raises(CannotExport, match="PyTorch cannot translate fast: ZeroDivisionError"):
            export_onnx(run, file)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(run), "--onnx", str(file)]) == 2
    assert "pip install 'shoal[onnx]'" in capsys.readouterr().err
