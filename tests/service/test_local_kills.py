"""Local runs whose command is killed go on from their last whole checkpoint, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shoal.deploy.cli import BENCHMARKS


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_local_runs_count_every_step_once(tmp_path: Path) -> None:
    """Catches steps that are trained and forgotten, or counted twice, versions and curves that go back, half a
    checkpoint, a best policy that is another than the recorded one, and processes that nobody ends."""
    program = [sys.executable, str(BENCHMARKS / "interrupted.py"), "--mode", "local"]
    program += ["--kills", "12", "--directory", str(tmp_path), "--json"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 12
    assert found["kills during a write"] >= 4, found
