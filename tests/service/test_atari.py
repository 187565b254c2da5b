"""ALE's own vector environment, which steps games in threads of C++."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from service import SMALL, read_summary

# Not importorskip: an import registers the games with gymnasium, for all tests of this process.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ale_py") is None, reason="needs ale-py")


@pytest.mark.parametrize("ended", ["by its steps", "by its seconds"])
def test_a_run_of_ale_ends_with_its_process(ended: str, tmp_path: Path) -> None:
    """Catches a player that still steps C++ when the interpreter ends: ``terminate called without an active exception``
    and exit code 134, up to a minute after the last word.
    """
    settings = [setting for setting in SMALL if not setting.startswith(("env.", "evaluation."))]
    settings += ["env.id=ale_py:ALE/Pong-v5", "env.vectorization=native", "env.num_envs=4", "mode=inline"]
    # A game of Pong lasts longer than random play and the run: it is abandoned in its middle.
    settings += ["evaluation.random_seconds=2", f"run_dir={tmp_path}/run", "actor.unroll_length=8"]
    settings += ["total_env_steps=256"] if ended == "by its steps" else ["total_env_steps=1e9", "max_seconds=5"]
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "train", *settings], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "terminate called" not in done.stderr
    assert read_summary(tmp_path / "run")["env_steps"] >= 256
