"""The examples run as a user's own files: copied out of the tree, as scripts, in the modes that a user starts with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
import torch
from service import read_summary

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
SMALL = (
    "total_env_steps=2000",
    "env.num_envs=8",
    "actor.unroll_length=8",
    "learner.batch_size=16",
    "learner.epochs=1",
    "learner.minibatches=1",
    "evaluation.random_seconds=0",
)
SAYS = {
    "own_core.py": "with Traces:",
    "own_encoder.py": "Seeing with",
    "own_environment.py": "one episode: return",
    "own_loss.py": "with reward prediction:",
    "own_policy.py": "Narrow with",
    "curriculum.py": "reached a delay of",
    "policies.py": "hiders: return",
    "self_play.py": "the right move in",
    "tune_sweep.py": "best of 2: a return of",
}


def test_every_example_is_run() -> None:
    """Catches an example that nobody tries."""
    found = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {*SAYS, "notebook.ipynb"} == found - {"__init__.py"}


@pytest.mark.parametrize("mode", ["inline", "local"])
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, mode: str, tmp_path: Path) -> None:
    """Catches an example that works only in this tree, or that the library has left behind."""
    if name == "tune_sweep.py":
        pytest.importorskip("ray.tune", reason="needs ray[tune]", exc_type=ImportError)
        if mode == "local":
            pytest.skip("Tune shares the machine among trials, each of which is one process")
    shutil.copy(EXAMPLES / name, tmp_path)
    settings = [*SMALL, f"mode={mode}", "run_dir=run"]
    if mode == "local":
        settings += ["actor.num_actors=1", "learner.num_threads=1"]
    if name == "tune_sweep.py":
        settings.append("trials=2")
    done = subprocess.run([sys.executable, name, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout
    if name == "tune_sweep.py":
        # One may have been stopped early, whose process Tune ends at once.
        assert len(list((tmp_path / "run").glob("*_0000?/config.yaml"))) == 2
        assert list((tmp_path / "run").glob("*_0000?/summary.json"))
        return
    run = tmp_path / "run"
    parts = [run] if name != "policies.py" else [run / "policies" / each for each in ("seekers", "hiders")]
    summaries = [read_summary(part) for part in parts]
    assert sum(summary["env_steps"] for summary in summaries) >= 2000
    if name == "curriculum.py":
        last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["callback/delay"] >= 1
        # Options reached the environments: without them every episode has nine steps.
        assert summaries[0]["episodes"] > summaries[0]["env_steps"] / 6


@pytest.mark.parametrize("wind", [False, True], ids=["image", "Dict"])
def test_an_encoder_of_images_goes_where_the_policy_goes(wind: bool, tmp_path: Path) -> None:
    """Catches an encoder that trains, and cannot be resumed, evaluated or exported; and a part of a Dict it ignores."""
    pytest.importorskip("onnxruntime")
    settings: dict[str, Any] = {
        **dict(word.split("=") for word in SMALL),
        "env.id": "shoal.deploy.examples.own_encoder:Catch",
        "env.kwargs": {"wind": wind},
        "policy.kind": "shoal.deploy.examples.own_encoder:Seeing",
        "policy.kwargs": {"channels": [4], "size": 16},
        "mode": "inline",
    }
    settings |= {key: int(value) for key, value in settings.items() if isinstance(value, str) and value.isdecimal()}
    begun = shoal.train(run_dir=tmp_path / "run", progress=False, **{**settings, "total_env_steps": 512})
    steps = begun.summary["env_steps"]
    run = shoal.train(run_dir=tmp_path / "run", progress=False, **{**settings, "total_env_steps": 1024})
    assert steps < run.summary["env_steps"]
    assert run.evaluate(episodes=8).episodes == 8
    assert shoal.export_onnx(run.run_dir, tmp_path / "run.onnx").error <= 1e-4
    policy = run.policy.network
    obs = torch.from_numpy(np.zeros((2, *policy.observation.shape), policy.observation.dtype))
    [image] = policy.images(obs)
    assert (image.dtype, image.shape) == (torch.float32, (2, 3, 16, 16))
    assert policy.encode(obs).shape == (2, 16 + wind)
    obs[1].fill_(255) if not wind else obs[1, 1:].fill_(255)
    assert policy.images(obs)[0][1].unique().tolist() == [1.0]
    assert not torch.equal(*policy.encode(obs)[:, :16])


@pytest.mark.parametrize("mode", ["inline", "local"])
def test_the_notebook_runs(mode: str, tmp_path: Path) -> None:
    """Catches a library that a kernel does not survive, and cells that show nothing.

    Inside a kernel there is an event loop already, standard output is no file, and classes are of ``__main__``, which
    no other process can import.
    """
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = re.sub(r"steps = 100_000", "steps = 2_000", cell.source).replace('"inline"', repr(mode))
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(output.output_type == "error" for outputs in shown for output in outputs)
    results = [
        output.data["text/plain"] for outputs in shown for output in outputs if output.output_type == "execute_result"
    ]
    printed = "".join(output.text for outputs in shown for output in outputs if output.output_type == "stream")
    assert "Done." in printed
    assert "\x1b" not in printed  # the live view of a terminal
    assert len(results) == 4
    assert results[1].startswith("{0: ")
    assert float(results[-1]) in (0.0, 1.0)
    assert read_summary(tmp_path / "runs" / "recall")["env_steps"] >= 2000
    assert f"mode: {mode}\n" in (tmp_path / "runs" / "recall" / "config.yaml").read_text()
