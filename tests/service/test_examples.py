"""The examples run as a user's own files: copied out of the tree, as scripts, in the modes that a user starts with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from service import read_summary

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
SMALL = (
    "total_env_steps=2000",
    "env.num_envs=8",
    "actor.unroll_length=8",
    "learner.batch_size=16",
    "learner.minibatches=1",
)
SAYS = {
    "own_core.py": "with Traces:",
    "own_environment.py": "one episode: return",
    "own_loss.py": "with reward prediction:",
    "own_policy.py": "Narrow with",
    "curriculum.py": "reached a delay of",
    "self_play.py": "the right move in",
}


def test_every_example_is_run() -> None:
    """Catches an example that nobody tries."""
    assert set(SAYS) == {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("mode", ["inline", "local"])
@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, mode: str, tmp_path: Path) -> None:
    """Catches an example that works only in this tree, or that the library has left behind."""
    shutil.copy(EXAMPLES / name, tmp_path)
    settings = [*SMALL, f"mode={mode}", "run_dir=run"]
    if mode == "local":
        settings += ["actor.num_actors=1", "learner.num_threads=1"]
    done = subprocess.run([sys.executable, name, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout
    summary = read_summary(tmp_path / "run")
    assert summary["env_steps"] >= 2000
    if name == "curriculum.py":
        last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["callback/delay"] >= 1
        # Options reached the environments: without them every episode has nine steps.
        assert summary["episodes"] > summary["env_steps"] / 6
