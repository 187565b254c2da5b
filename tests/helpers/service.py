"""Tests of the whole service share these: worker set-ups, the command line as a process, and its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.actors.rollout import trajectory_spec
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.envs.config import split_options
from shoal.envs.registry import make_env_spec, make_vector_env
from shoal.policy.trajectory import TrajectorySpec

SMALL = (
    "env.id=recall",
    "env.num_envs=8",
    "actor.unroll_length=8",
    "learner.batch_size=16",
    "learner.epochs=1",
    "learner.minibatches=2",
    "learner.num_threads=1",
    "evaluation.random_seconds=0",
    "metrics.port=-1",
)
"""Settings of a run whose updates take milliseconds, and which starts no process to play at random."""
SHARED = tuple(setting for setting in SMALL if not setting.startswith(("learner.num_threads", "learner.batch_size")))
"""The same where learners also act."""


def make_setup(env_id: str, *, num_envs: int = 4, unroll_length: int = 8, seed: int = 0, **kwargs: Any) -> WorkerSetup:
    own, options = split_options(kwargs)
    spec = make_env_spec(env_id, options, **own)
    return WorkerSetup(
        env_id=env_id,
        env_kwargs=own,
        env_options=options,
        num_envs=num_envs,
        unroll_length=unroll_length,
        run_id="test",
        seed=seed,
        observation=observation_of(spec),
        actions=actions_of(spec),
    )


def make_spec(setup: WorkerSetup) -> TrajectorySpec:
    envs = make_vector_env(setup.env_id, setup.num_envs, 0, setup.env_options, **setup.env_kwargs)
    envs.close()
    return trajectory_spec(envs.spec, setup.unroll_length)


def shoal(*arguments: object, cwd: Path, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout)


def start_shoal(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """The command line in a session of its own, as a terminal starts it."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "shoal", *map(str, arguments)]


def wait_for(
    condition: Callable[[], Any], *, seconds: float = 600, process: subprocess.Popen[str] | None = None
) -> Any:
    """The value of ``condition`` once it is true; ``seconds`` end a test that hangs, and measure nothing."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the process ended with {process.returncode}:\n{process.communicate()[0]}")
        if time.monotonic() > deadline:
            if process is not None:
                os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0] if process is not None else ""
            raise AssertionError(f"waited {seconds} s in vain:\n{said}")
        time.sleep(0.02)
    return found


def descendants(pid: int) -> dict[int, str]:
    """Titles of all processes below ``pid``, by process id."""
    children: dict[int, list[int]] = {}
    titles = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = entry.joinpath("cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(entry.name))
    found, todo = {}, [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found[child] = titles[child]
            todo.append(child)
    return found


def actor_processes(pid: int) -> list[int]:
    """The rollout actors of the run that ``pid`` is."""
    return [child for child, title in descendants(pid).items() if title.startswith("ray::RolloutActor")]


def learner_processes(pid: int) -> list[int]:
    """The learners beside the run's own."""
    return [child for child, title in descendants(pid).items() if title.startswith("ray::LearnerActor")]


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_files(pid: int) -> int:
    """Descriptors that a process holds."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def files_and_pipes(pid: int) -> int:
    """Descriptors that a process holds, but for those whose number is the affair of gRPC and of Ray.

    Ray keeps some idle workers on every node, and connections to them, which gRPC closes when it likes. Event
    descriptors come with the threads that gRPC starts.
    """
    connections = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
            connections |= {f"socket:[{line.split()[9]}]" for line in lines}
    held = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptor)
            held += not target.startswith("anon_inode:") and target not in connections
    return held


def shared_memory() -> set[str]:
    """Names in shared memory but for multiprocessing's semaphores, which tests beside this one make."""
    place = Path("/dev/shm")
    return {path.name for path in place.iterdir() if not path.name.startswith("sem.mp-")} if place.is_dir() else set()


def ups(run: Path) -> int:
    """The number of times that an actor, or a peer learner, finished its start; before that it may hang longer."""
    log = run / "run.log"
    return log.read_text().count(" is up: ") if log.exists() else 0


def recovered(run: Path) -> dict[str, Any]:
    """``summary.json`` of a run with the default lag whose actors were replaced: they came back, after a time that is
    told, and what was trained was made with current weights."""
    summary = read_summary(run)
    back = summary["actor_recovery_seconds"]
    # A successor may have failed in its turn.
    assert 1 <= back["count"] <= summary["actor_restarts"]
    assert 0 < back["mean"] <= back["max"] < summary["wall_seconds"]
    assert summary["policy_lag"]["max"] <= 2
    assert summary["log_prob_checks"] >= 1
    return summary


def read_summary(run: Path) -> dict[str, Any]:
    """``summary.json``, after the checks that every run must pass."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    books = summary["ledger"]
    assert summary["books_balance"]
    assert books["sampled"] == books["trained"] + books["in_flight"] + sum(books["dropped"].values())
    assert books["in_flight"] == 0
    assert summary["max_log_prob_error"] <= 1e-4
    return summary
