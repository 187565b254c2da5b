"""Runs in one process that are killed and resumed again and again, against the same runs left alone.

Every session of a run is a child of this process, which imports everything once and must have no other thread: that is
``tests/bench/interrupted.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL = (
    *("mode=inline", "metrics.port=-1", "env.num_envs=4", "actor.unroll_length=8", "total_env_steps=320", "seed=5"),
    *("evaluation.random_seconds=0", "checkpoint.every_updates=1", "checkpoint.keep=2", "log.every_seconds=60"),
    *("learner.batch_size=4", "learner.epochs=2", "learner.minibatches=2", "learner.num_threads=2"),
)
CASES: dict[str, tuple[str, ...]] = {
    "recall": ("env.id=recall",),
    "CartPole": ("env.id=CartPole-v1",),
    "Pendulum": ("env.id=Pendulum-v1", "learner.desired_kl=0.01"),
    "async": ("env.id=CartPole-v1", "env.vectorization=async", "actor.max_policy_lag=0"),
    "same_step": ("env.id=CartPole-v1", "env.autoreset_mode=same_step", "actor.burn_in=4"),
    # Unrolls of one actor wait for those of the other: a checkpoint has some in flight.
    "waiting": (
        *("env.id=recall", "actor.num_actors=3", "env.num_envs=2", "learner.batch_size=4", "actor.max_policy_lag=2"),
        "learner.refresh_states=true",
    ),
    "self-play": ("env.id=pettingzoo:turn_games:Nim", "self_play.share=0.6", "self_play.every_updates=2"),
    "plain": ("env.id=stateful_envs:PlainWalk-v0", "env.wrappers=[stateful_envs:Smoothing]"),
    "saying": ("env.id=stateful_envs:SayingWalk-v0",),
}
MOST_PER_RUN = 4
"""Kills of one run: several in a row also interrupt what a resumed session saves."""
EXACT = ("weights_sha256", "env_steps", "policy_version", "ledger", "episodes", "mean_return")


def trial(directory: Path, cases: list[str], kills: int, seed: int) -> dict[str, Any]:
    """So many kills, spread over the cases in turn; what became of them."""
    # Imported once, for all children.
    for module in ("shoal.deploy.training.run", "shoal.deploy.doctor", "gymnasium.wrappers", "shoal.envs.gym"):
        importlib.import_module(module)

    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    different: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}
    for number, case in enumerate(_in_turn(cases)):
        if counts["kills"] >= kills:
            break
        if case not in alone:
            alone[case] = run_alone(directory / f"{case}-alone", CASES[case])
        run = directory / f"{case}-{number}"
        most = min(kills - counts["kills"], -(-kills // len(cases)), MOST_PER_RUN)
        found = run_killed(run, CASES[case], chance, counts, most)
        counts["runs"] += 1
        if wrong := {name: [found[name], alone[case][name]] for name in EXACT if found[name] != alone[case][name]}:
            different.append({"case": case, "run": str(run), **wrong})
        else:
            shutil.rmtree(run)
    return {"cases": cases, "seed": seed, **counts, "different": different}


def run_alone(run: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """The summary of a run that nobody interrupts."""
    child = start(run, (*SMALL, *settings))
    _, status = os.waitpid(child, 0)
    assert status == 0, (run / "output").read_text()
    return summary(run)


def run_killed(
    run: Path, settings: tuple[str, ...], chance: random.Random, counts: Counter[str], most: int
) -> dict[str, Any]:
    """The summary of a run whose sessions are killed until one comes to its end, or ``most`` have been."""
    while True:
        child = start(run, (*SMALL, *settings))
        if most and kill(child, run, chance, counts):
            most -= 1
            continue
        if most:
            counts["came to their end"] += 1
        else:
            _, status = os.waitpid(child, 0)
            assert status == 0, (run / "output").read_text()
        return summary(run)


def kill(child: int, run: Path, chance: random.Random, counts: Counter[str]) -> bool:
    """Kill a session at a moment drawn by chance, every other time while it writes; False where it ended before."""
    checkpoints = run / "checkpoints"
    seen = names(checkpoints)
    wanted, writing = chance.randrange(5), counts["kills"] % 2 == 0
    pause = chance.random() * 0.1
    new: set[str] = set()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, (run / "output").read_text()
            return False
        now = names(checkpoints)
        new |= {name for name in now - seen if not name.startswith(".")}
        begun = any(name.startswith(".incomplete-") for name in now)
        if len(new) >= wanted and (begun if writing else now or wanted):
            break
    time.sleep(pause / 10 if writing else pause)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return False
    counts["kills"] += 1
    counts["kills during a write"] += any(
        name.startswith((".incomplete-", ".replaced-")) for name in names(checkpoints)
    )
    counts["kills before the first checkpoint"] += not any(name.isdecimal() for name in names(checkpoints))
    return True


def names(directory: Path) -> set[str]:
    """What is in a directory; nothing where there is none."""
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def start(run: Path, settings: tuple[str, ...]) -> int:
    """A session of the run, as a child of its own session; its process id."""
    run.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        output = os.open(run / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from shoal.deploy.cli import main as shoal

        code = shoal(["train", *settings, f"run_dir={run}"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def summary(run: Path) -> dict[str, Any]:
    """``summary.json``."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def _in_turn(cases: list[str]) -> Iterator[str]:
    while True:
        yield from cases
