"""The time to a threshold on memory tasks, with the same network and settings.

    python tests/bench/peers/learning.py [--tasks NAME ...] [--seeds 5] [--limit 300] [--only NAME ...] [--json]

The tasks (``tasks.py``) write down the episodes that end in them, whoever steps them. A system is under way from its
first environment step, and has learned when its last 256 episodes returned nine tenths of the best there is. The
systems alternate over the seeds; run it alone on the machine. README.md beside this file says what is equal.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from run import HERE, OURS, PEERS, ROOT, SHOAL, VENVS, command, install_all, run_for
from suite.processes import last_words
from tasks import TASKS
from window import LEARNING, SLOTS

THRESHOLD = 0.9
EPISODES = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One system, task and seed; times in seconds. Where the threshold was not reached ``seconds`` is None."""

    seconds: float | None
    env_steps: int
    """Until the threshold, or the end."""
    rate: float
    """Environment steps per second until then."""
    start_seconds: float
    """From the command to the first environment step."""
    best: float
    """The best mean return of 256 episodes, as a part of the best there is."""


def read(directory: Path, best_return: float, began: float) -> Trial | None:
    """The content of the files of ``tasks.Episodes``; None before the first environment step."""
    events = []
    for path in directory.iterdir():
        before = 0
        for line in path.read_text().splitlines():
            at, steps, ended, returned = line.split()
            events.append((float(at), int(steps) - before, int(ended), float(returned)))
            before = int(steps)
    if not events:
        return None
    events.sort()
    start = at = events[0][0]
    last: collections.deque[tuple[int, float]] = collections.deque()
    total = played = 0
    best, summed = -float("inf"), 0.0
    for at, steps, ended, returned in events:
        total += steps
        last.append((ended, returned))
        played += ended
        summed += returned
        while played - last[0][0] >= EPISODES:
            ended, returned = last.popleft()
            played -= ended
            summed -= returned
        if played >= EPISODES:
            best = max(best, summed / played / best_return)
            if best >= THRESHOLD:
                return Trial(at - start, total, total / (at - start), start - began, best)
    return Trial(None, total, total / max(at - start, 1e-9), start - began, best)


def ours(task: str, seed: int) -> tuple[list[str], dict[str, str]]:
    """``shoal train`` with the recipe; who acts and who learns is its own choice."""
    recipe = LEARNING
    settings = {
        "env.id": f"vector_env:{task}-v0",
        "env.vectorization": "native",
        "env.num_envs": SLOTS,
        "actor.unroll_length": recipe.unroll,
        "policy.initialization.lstm_bias": "zeros",
        "learner.batch_size": SLOTS,
        "learner.epochs": recipe.epochs,
        "learner.minibatches": recipe.minibatches,
        "learner.learning_rate": recipe.learning_rate,
        "learner.gamma": recipe.gamma,
        "learner.advantage_lambda": recipe.gae_lambda,
        "learner.clip_coef": recipe.clip,
        "learner.value_clip_coef": 0,
        "learner.value_coef": recipe.value_coef,
        "learner.entropy_coef": recipe.entropy_coef,
        "learner.max_grad_norm": recipe.max_grad_norm,
        "total_env_steps": 10**12,
        "checkpoint.every_updates": 0,
        "metrics.port": 0,
        "run_dir": "run",
        "seed": seed,
    }
    words = [sys.executable, "-m", "shoal", "train", *(f"{name}={value}" for name, value in settings.items())]
    return words, {**os.environ, "PYTHONPATH": str(HERE)}


def try_once(name: str, task: str, seed: int, python: Path | None, limit: float) -> Trial:
    """One system on one task.

    Raises:
        RuntimeError: it ended by itself, or did not start.
    """
    best_return = TASKS[task].best_return
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        if python is None:
            words, environment = ours(task, seed)
        else:
            words, environment = command(PEERS[name], PEERS[name].best, python, task=task, seed=seed)
        began = time.monotonic()

        def enough() -> bool:
            trial = read(directory, best_return, began)
            if trial is None:
                return False
            return trial.seconds is not None or time.monotonic() > began + trial.start_seconds + limit

        text, code = run_for(words, {**environment, "PEERS_EPISODES": place}, limit + 120.0, enough)
        trial = read(directory, best_return, began)
    if trial is None or (code is not None and trial.seconds is None):
        raise RuntimeError(f"ended with {code}; it said last:\n    {last_words(text)}")
    return trial


def show(task: str, trials: dict[str, list[Trial]]) -> None:
    """One line a system, and the ratio."""
    print(f"\n{task}, to {THRESHOLD} of the best return")
    print(f"{'':<16} {'seconds':<26} {'env steps':<32} {'steps/s':>8} {'start s':>8}  reached")
    medians = {}
    for name, found in trials.items():
        reached = [trial for trial in found if trial.seconds is not None]
        seconds = steps = ""
        if reached:
            times = [trial.seconds for trial in reached if trial.seconds is not None]
            counts = [trial.env_steps for trial in reached]
            seconds = f"{statistics.median(times):.1f} [{min(times):.1f}..{max(times):.1f}]"
            steps = f"{statistics.median(counts):,.0f} [{min(counts):,}..{max(counts):,}]"
            # Who did not get there counts as later than everybody who did.
            medians[name] = statistics.median([trial.seconds or float("inf") for trial in found])
        rate = statistics.median(trial.rate for trial in found) if found else float("nan")
        start = statistics.median(trial.start_seconds for trial in found) if found else float("nan")
        others = [f"{trial.best:.2f}" for trial in found if trial.seconds is None]
        note = f"{len(reached)} of {len(found)}" + (f"; the others {', '.join(others)}" if others else "")
        print(f"{name:<16} {seconds:<26} {steps:<32} {rate:>8,.0f} {start:>8.1f}  {note}")
    peers = {name: value for name, value in medians.items() if name not in OURS}
    if peers and SHOAL in medians:
        best = min(peers, key=lambda name: peers[name])
        print(f"shoal / {best}: {medians[SHOAL] / peers[best]:.2f} of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a system has not learned")
    systems = [SHOAL, *PEERS]
    parser.add_argument("--only", nargs="+", choices=systems, default=systems, metavar="NAME", help=", ".join(systems))
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the peers are installed")
    options = parser.parse_args()
    pythons = install_all(options.only, options.venvs)
    names = [name for name in options.only if name == SHOAL or name in pythons]
    results = {}
    for task in options.tasks:
        trials: dict[str, list[Trial]] = {name: [] for name in names}
        for seed in range(options.seeds):
            for name in names if seed % 2 == 0 else reversed(names):
                try:
                    trial = try_once(name, task, seed, pythons.get(name), options.limit)
                except RuntimeError as error:
                    print(f"{task}, seed {seed}: {name} failed: {error}", flush=True)
                else:
                    trials[name].append(trial)
                    when = "not" if trial.seconds is None else f"{trial.seconds:.1f} s,"
                    said = f"{when} {trial.env_steps:,} steps, {trial.rate:,.0f}/s, best {trial.best:.2f}"
                    print(f"{task}, seed {seed}: {name:<16} {said}", flush=True)
        show(task, trials)
        results[task] = {name: [dataclasses.asdict(trial) for trial in found] for name, found in trials.items()}
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    os.chdir(ROOT)
    # So that a bench that is told to end also ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
