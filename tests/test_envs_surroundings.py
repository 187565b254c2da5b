"""What environments do to the process they run in stays with them."""

from __future__ import annotations

import contextlib
import io
import logging
import logging.config
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rude_envs import EVERY, Rude
from scripted_vectors import Rows
from service import make_setup
from shoal.deploy.records.run_dir import log_file
from shoal.envs.boundary import VectorEnvironment
from shoal.envs.config import AdapterOptions
from shoal.envs.registry import make_env_spec, make_vector_env
from shoal.envs.surroundings import CHANGED, PRINTED, SHOWN_LINES, Surroundings
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights

HOWS = ("sync", "pettingzoo")
QUIETLY = ("filters", "root")
"""What libraries change as a matter of course."""
FILE_CONFIG = """
[loggers]
keys=root
[handlers]
keys=
[formatters]
keys=
[logger_root]
level=CRITICAL
handlers=
"""


def make(how: str, **kwargs: Any) -> VectorEnvironment:
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
        return make_vector_env("pettingzoo:rude_envs:parallel_env", 2, 0, **kwargs)
    return make_vector_env("rude_envs:Rude-v0", 2, 0, AdapterOptions(vectorization=how), **kwargs)  # type: ignore[arg-type]


LOGGERS = ("shoal", "shoal.actors", "shoal.learner.trajectory_queue")


def settings() -> tuple[Any, ...]:
    os.umask(umask := os.umask(0o022))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        os.getcwd(),
        list(warnings.filters),
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGHUP),
        sys.stdout,
        torch.zeros(1).device,
        torch.get_deterministic_debug_mode(),
        np.geterr(),
        signal.getsignal(signal.SIGPIPE),
        umask,
        socket.getdefaulttimeout(),
        logging.root.manager.disable,
        logging.root.level,
        list(logging.root.handlers),
        [(logger.disabled, logger.level) for logger in loggers],
    )


@pytest.fixture(autouse=True)
def _restored() -> Any:
    """A test that fails leaves nothing behind for others."""
    before = settings()
    with warnings.catch_warnings():
        yield
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    torch.set_num_threads(before[2])
    os.chdir(before[3])
    signal.signal(signal.SIGTERM, before[5])
    signal.signal(signal.SIGHUP, before[6])
    torch.set_default_device(None)
    torch.set_deterministic_debug_mode(before[9])
    np.seterr(**before[10])
    signal.signal(signal.SIGPIPE, before[11])
    os.umask(before[12])
    socket.setdefaulttimeout(before[13])
    logging.disable(before[14])
    logging.root.setLevel(before[15])
    logging.root.handlers[:] = before[16]
    for name, (disabled, level) in zip(LOGGERS, before[17], strict=True):
        logging.getLogger(name).disabled = disabled
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("when", ["init", "reset", "step"])
@pytest.mark.parametrize("what", EVERY)
@pytest.mark.parametrize("how", HOWS)
def test_settings_of_the_process_are_kept_apart(how: str, what: str, when: str) -> None:
    """Catches a default type of float64 that the policy is then computed with, and an environment that does not find
    again what it set: ``Rude`` fails where it does not.
    """
    before = settings()
    env = make(how, what=what, when=when)
    rows = Rows(env).rows
    assert settings() == before
    env.reset(rows.obs)
    assert settings() == before
    for _ in range(5):
        env.step(np.zeros(2, np.int64), rows)
        assert settings() == before
    assert env.faults == []
    told = env.reports.take()  # type: ignore[attr-defined]
    if what in QUIETLY:
        assert not told
    else:
        assert told.counts[CHANGED] == 1
        assert f"{env.spec.env_id} changes" in told.examples[CHANGED]
    env.close()
    assert settings() == before


@pytest.mark.parametrize("what", EVERY)
def test_settings_are_kept_apart_however_late_they_change(what: str) -> None:
    """Catches settings that are looked at in the first steps, and later only now and then."""
    before = settings()
    env, surroundings = Rude(what="", when="late"), Surroundings("E")
    for _ in range(300):
        with surroundings:
            pass
    env.what = what
    for _ in range(3):
        with surroundings:
            env._maybe("late")
            env._check()
        assert settings() == before
    with surroundings:
        env._check()
    assert settings() == before
    told = surroundings.reports.take()
    assert told.counts == ({} if what in QUIETLY else {CHANGED: 1})
    if what == "signals":
        assert "what SIGTERM does from SIG_DFL to SIG_IGN" in told.examples[CHANGED]


@pytest.mark.parametrize(
    "silence",
    [
        lambda: logging.disable(logging.CRITICAL),
        lambda: logging.config.dictConfig({"version": 1, "root": {"handlers": [], "level": "CRITICAL"}}),
        lambda: logging.config.fileConfig(io.StringIO(FILE_CONFIG)),
        lambda: logging.basicConfig(handlers=[logging.NullHandler()], level=logging.CRITICAL, force=True),
        lambda: [logging.getLogger(name).setLevel(logging.CRITICAL) for name in list(logging.root.manager.loggerDict)],
        lambda: [handler.setLevel(logging.CRITICAL) for handler in logging.root.handlers],
    ],
    ids=["disable", "dictConfig", "fileConfig", "basicConfig", "every logger", "every handler"],
)
def test_a_run_keeps_its_log(silence: Any, tmp_path: Path) -> None:
    """Catches run.log and warnings that end where an environment's library sets up logging as it likes."""
    logging.getLogger("shoal.learner.trajectory_queue")
    surroundings = Surroundings("E")
    with log_file(tmp_path, json_lines=False):
        for _ in range(2):
            with surroundings:
                silence()
            for name in LOGGERS:
                logging.getLogger(name).info("said by %s", name)
    said = (tmp_path / "run.log").read_text()
    for name in LOGGERS:
        assert said.count(f"INFO {name}: said by {name}\n") == 2


def test_the_umask_is_never_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a umask that is read by setting another one, which a file of another thread is then made with."""
    surroundings, really, made = Surroundings("E"), os.umask, []
    with surroundings:
        pass
    umask = really(0o022)
    really(umask)
    monkeypatch.setattr(os, "umask", lambda mask: made.append(mask) or really(mask))
    for _ in range(3):
        with surroundings:
            pass
    assert set(made) == {umask}


def test_asking_for_a_spec_changes_nothing() -> None:
    """Catches a check before the start that leaves the process as the environment's constructor made it."""
    before = settings()
    make_env_spec("rude_envs:Rude-v0", what="dtype")
    assert settings() == before


def test_environments_may_compute_gradients() -> None:
    """Catches environments that are stepped in torch's inference mode: alone they work, in training they fail."""
    setup = make_setup("rude_envs:Rude-v0", num_envs=2, unroll_length=4, what="autograd")
    worker = setup.make_worker(0, 0)
    for _ in range(2):
        payload = worker.rollout(flatten_weights(setup.make_policy(), 0))
    worker.close()
    assert from_bytes(worker.spec, payload).header.statistics["faults"] == []


@pytest.mark.parametrize("how", HOWS)
def test_what_environments_print_is_shown_a_little_and_counted(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches 10,867 lines that drown the progress of a run."""
    env = make(how, lines=5)
    rows = Rows(env).rows
    env.reset(rows.obs)
    print("ours")
    for _ in range(4):
        env.step(np.zeros(2, np.int64), rows)
    env.close()
    print("ours again")
    out, err = capfd.readouterr()
    assert out == "ours\nours again\n"
    lines = err.splitlines()
    assert len(lines) == SHOWN_LINES
    assert lines[0].endswith("prints: debug 0")
    assert "not shown" in lines[-1]
    told = env.reports.take()  # type: ignore[attr-defined]
    assert told.counts == {PRINTED: 4 * 2 * 5}


class Unread(io.StringIO):
    """Standard error whose reader has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("how", HOWS)
def test_what_environments_print_costs_nothing_where_nobody_reads(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ``2>&1 | head -1`` as a fault of the environment, which loses its episodes."""
    monkeypatch.setattr(sys, "stderr", Unread())
    env = make(how, lines=1)
    rows = Rows(env).rows
    env.reset(rows.obs)
    for _ in range(4):
        env.step(np.zeros(2, np.int64), rows)
    assert env.faults == []
    assert env.reports.take().counts == {PRINTED: 4 * 2}  # type: ignore[attr-defined]
    env.close()


def test_what_environments_print_in_their_processes_is_counted() -> None:
    """Catches the same from processes that share the standard output."""
    env = make("async", lines=5)
    rows = Rows(env).rows
    env.reset(rows.obs)
    for _ in range(4):
        env.step(np.zeros(2, np.int64), rows)
    assert env.reports.take().counts == {PRINTED: 4 * 2 * 5}  # type: ignore[attr-defined]
    env.close()


def test_other_threads_print_as_ever() -> None:
    """Catches progress lines that are taken for the environment's."""
    output = io.StringIO()
    surroundings = Surroundings("E")
    with contextlib.redirect_stdout(output):
        with surroundings:
            thread = threading.Thread(target=lambda: print("progress"))
            thread.start()
            thread.join()
            sys.stdout.flush()
        print("after")
    assert output.getvalue() == "progress\nafter\n"
    assert not surroundings.reports


def test_other_threads_print_at_any_moment() -> None:
    """Catches a stream that is freed while another thread prints to it, which ends CPython 3.11: segmentation fault."""
    program = """
import sys, threading, time
from shoal.envs.surroundings import Surroundings
surroundings, until = Surroundings("E"), time.monotonic() + 1.5
def beat():
    while time.monotonic() < until:
        print("a heartbeat")
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=beat) for _ in range(2)]
for thread in threads:
    thread.start()
while time.monotonic() < until:
    with surroundings:
        pass
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60, check=False)
    assert done.returncode == 0


def test_an_error_leaves_the_surroundings_too() -> None:
    """Catches a change that stays because the environment failed after it."""
    before = settings()
    surroundings = Surroundings("E")

    def lose() -> None:
        with surroundings:
            torch.set_default_dtype(torch.float64)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose()
    assert settings() == before
    with surroundings:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)
    with surroundings:
        assert torch.get_default_dtype() == torch.float32
    assert settings() == before


def test_a_handler_that_the_program_adds_meanwhile_stays() -> None:
    """Catches an environment in a thread at whose end the program's root logger is as it was at its beginning."""
    inside, added = threading.Event(), threading.Event()
    handler = logging.NullHandler()

    def play() -> None:
        with Surroundings("E"):
            inside.set()
            added.wait()

    thread = threading.Thread(target=play)
    thread.start()
    inside.wait()
    logging.root.addHandler(handler)
    try:
        added.set()
        thread.join()
        assert handler in logging.root.handlers
    finally:
        logging.root.removeHandler(handler)
