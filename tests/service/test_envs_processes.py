"""Environments in processes of their own: the same data as in one process, and no process that outlives its use."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from make_env import env_spec
from scripted_vectors import ID, MODES, Rows, environment, is_alive, process_ids, step
from shoal.envs.boundary import EnvironmentFault
from shoal.envs.processes import STOPPING


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("mode", MODES)
def test_faults_come_back_as_from_one_process(mode: str) -> None:
    """Catches a fault in a worker that is lost on the way, or ends the vector as gymnasium's own workers do: same rows,
    same messages, same seeds.
    """
    logs = []
    for vectorization in ("sync", "async"):
        log = []
        with environment(vectorization=vectorization, autoreset_mode=mode, how="raises", at=14) as env:
            rows = Rows(env).rows
            env.reset(rows.obs)
            for _ in range(40):
                if rows.final_obs is not None:
                    rows.final_obs[:] = 0
                step(env, rows)
                log += [part.tolist() for part in rows if part is not None]
            said = r": slot (\d), step \d+ .*: RuntimeError: 100% lost \(\S+scripted_envs\.py:\d+\)$"
            slots = [re.findall(said, text)[0] for text in env.faults]
            assert slots == ["0", "1"] * 2
            log += env.faults
        logs.append(log)
    assert logs[0] == logs[1]


def test_an_explicit_reset_is_one_reset() -> None:
    """Catches a reset after the end of an episode that a worker does again in its next step, as gymnasium's do without
    shared memory.
    """
    with environment() as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        for _ in range(3):
            rows.terminated[:] = rows.truncated[:] = False
            while not (rows.terminated | rows.truncated).any():
                step(env, rows)
            episode = rows.obs[:, 0].copy()
            env.reset(rows.obs)
            assert (rows.obs[:, 0] == episode + 1).all()
            step(env, rows)
            assert not rows.is_first.any()
            assert (rows.obs[:, 1] == 1).all()


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_a_process_that_dies_is_named(how: str, tmp_path: Path) -> None:
    """Catches a bare EOFError or BrokenPipeError, a hang, and siblings that stay behind; close comes after it all."""
    said = {"killed": "was killed by signal SIGKILL", "exits": "exited with code 3"}[how]
    with environment(3, how=how, at=5, marker=str(tmp_path / "once")) as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        processes = process_ids(env)
        assert len(set(processes)) == 3
        assert os.getpid() not in processes
        with pytest.raises(EnvironmentFault, match=rf"ScriptedLog-v0: slot \d: its process \d+ {said}"):
            step(env, rows, 20)
        assert not any(is_alive(process) for process in processes)


@pytest.mark.parametrize("then", ["step", "reset", "get_state", "set_state", "watch", "close"])
def test_a_process_killed_between_steps_is_no_mystery(then: str) -> None:
    """Catches close() raising BrokenPipeError and leaving processes alive, as gymnasium's own does."""
    with environment() as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        step(env, rows, 3)
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda: step(env, rows),
            "reset": lambda: env.reset(rows.obs),
            "get_state": env.get_state,
            "set_state": functools.partial(env.set_state, env.get_state(), rows.obs),
            "watch": lambda: env.watch("trial"),
        }
        os.kill(process_ids(env)[1], signal.SIGKILL)
        assert wait_until(lambda: not is_alive(process_ids(env)[1]))
        if then != "close":
            with pytest.raises(EnvironmentFault, match=r"slot 1: its process \d+ was killed by signal SIGKILL"):
                calls[then]()


def test_an_environment_that_always_breaks_is_given_up() -> None:
    """Catches the exception of a worker that gymnasium warns of (and fails to, with a % in it) before it raises."""
    with environment(how="raises", at=1) as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        with pytest.raises(
            EnvironmentFault, match=r"slot 0.*100% lost \(\S+:\d+\) \(3 faults in a row, given up\)"
        ) as caught:
            step(env, rows, 4)
        assert "in step" in caught.value.__notes__[0]


def test_an_environment_whose_close_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches close() waiting for ever."""
    monkeypatch.setattr("shoal.envs.processes.ProcessVectorEnv.close_extras.__defaults__", (0.3, False))
    with environment(how="close hangs") as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        step(env, rows)


def test_an_exception_in_the_middle_of_a_step_leaves_nothing(tmp_path: Path) -> None:
    """Catches close() waiting for the answer to a call that Ctrl-C broke off."""
    marker = tmp_path / "hangs"
    with environment(how="hangs", at=3, marker=str(marker)) as env:
        rows = Rows(env).rows
        env.reset(rows.obs)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(KeyboardInterrupt):
                step(env, rows, 4)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        env._vector.close(timeout=0.1)  # type: ignore[union-attr]


def test_asking_for_the_spec_starts_no_process() -> None:
    """Catches processes that are started to look at spaces."""
    spec = env_spec(ID, vectorization="async")
    assert spec == env_spec(ID)
    with environment() as env:
        assert process_ids(env) == []


PARENT = """
import sys, time
import numpy as np
from scripted_vectors import Rows
from make_env import make_env

kwargs = {"how": "hangs", "at": 2, "marker": sys.argv[1]}
env = make_env("scripted_envs:ScriptedLog-v0", 2, 0, vectorization="async", **kwargs)
rows = Rows(env).rows
env.reset(rows.obs)
env.step(np.zeros(2, int), rows)
print(*[process.pid for process in env._vector.processes], flush=True)
env.step(np.zeros(2, int), rows)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Catches orphans: a pool kills the actor of an environment that hangs, and the hanging process must go too. What
    asks a run to end, and may reach all its processes, ends none of them: the run finishes its update first.
    """
    marker = tmp_path / "hangs"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(marker)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 2
        assert wait_until(marker.exists)
        for process in processes:
            for number in STOPPING:
                os.kill(process, number)
        time.sleep(0.1)
        assert all(is_alive(process) for process in processes)
    finally:
        parent.kill()
        parent.communicate()
    assert wait_until(lambda: not any(is_alive(process) for process in processes))


CHILDREN = """
import os, signal, subprocess, time
from shoal.envs.processes import _outlast_signals

_outlast_signals()
game = subprocess.Popen(["sleep", "1000"])
game.terminate()
print(game.wait(timeout=200))
begun, begin = os.pipe()
if not (helper := os.fork()):
    os.write(begin, b"!")
    time.sleep(1000)
os.read(begun, 1)
os.kill(helper, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]))
"""


def test_what_an_environment_starts_ends_as_usual() -> None:
    """Catches a game or a helper of an environment's that no SIGTERM ends, because its process outlasts one."""
    done = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=400, check=True)
    assert done.stdout.split() == [str(-signal.SIGTERM)] * 2
