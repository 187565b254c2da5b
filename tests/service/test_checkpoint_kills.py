"""Checkpoints of a process that is killed while it saves."""

from __future__ import annotations

import subprocess
import sys

KILLS = """
import os, shutil, signal, sys, time
from pathlib import Path
from rollouts import make_learner, small_policy
from shoal.learner.checkpoint import Checkpoints

directory = Path({directory!r})
learner, checkpoints = make_learner(small_policy()), Checkpoints(directory, keep=2)
in_mid_save = 0
for kill in range(12):
    done, written = os.pipe()
    child = os.fork()
    if not child:
        while True:
            learner.policy_version += 1
            checkpoints.save(learner, {{}})
            os.write(written, bytes([learner.policy_version]))
            checkpoints.save(learner, {{}})  # the same version again
    os.close(written)  # so that the child's end is seen if it fails
    finished = os.read(done, 1)[0]
    time.sleep(0.004 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = max([finished, *os.read(done, 9999)])
    os.close(done)
    latest = checkpoints.latest()
    assert latest.policy_version >= finished, (latest, finished)
    # The newest that has a name is the one that loads: nothing under its own name is half there.
    names = [path.name for path in directory.iterdir()]
    in_mid_save += any(name.startswith(".") for name in names)
    named = [int(name.removeprefix(".replaced-")) for name in names if not name.startswith(".incomplete-")]
    assert max(named) == latest.policy_version, (names, latest)
    shutil.rmtree(directory)
print("killed in mid save:", in_mid_save)
"""


def test_a_kill_in_mid_save_leaves_a_loadable_newest(tmp_path):
    """A checkpoint that is visible before it is complete, or gone before its successor is there."""
    script = KILLS.format(directory=str(tmp_path / "checkpoints"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(":")[1]) >= 3, done.stdout
