"""Runs in local mode that are killed and resumed again and again: what they count, keep and leave behind.

Such a run is not the same twice, so it is held against its own checkpoints: an update has the same number of steps
always, and what a later session starts from is what was complete before the kill. Every session is a child of this
process, in a Unix session of its own, by which the processes are known that it leaves: ``tests/bench/interrupted.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kills import names, start, summary

TOTAL, STEPS_PER_UPDATE = 4800, 8 * 8
ALL = (
    # Every row of an unroll is a transition: an update has as many steps as its batch has rows.
    *("mode=local", "metrics.port=-1", "env.id=CartPole-v1", "env.autoreset_mode=same_step", "seed=5"),
    *("env.num_envs=4", "actor.unroll_length=8", "learner.batch_size=8", "learner.num_threads=1"),
    *("learner.epochs=1", "learner.minibatches=1", "evaluation.random_seconds=0", "log.every_seconds=0.2"),
    *("checkpoint.every_updates=1", "checkpoint.keep=2", f"total_env_steps={TOTAL}"),
)
LOCAL_CASES: dict[str, tuple[str, ...]] = {
    "actors": ("actor.num_actors=2",),
    "evaluated": ("actor.num_actors=1", "evaluation.every_env_steps=640", "evaluation.episodes=8"),
    # One acts in this process, the other in its own: what waits there is known only from its answers.
    "learners": ("placement=colocated", "learner.num_learners=2"),
}
MOST_PER_RUN = 5
LEFT_SECONDS = 100.0
"""By Ray's own time limit, two of its processes outlive a killed run by a minute."""


def local_trial(directory: Path, cases: list[str], kills: int, seed: int) -> dict[str, Any]:
    """So many kills, spread over the cases in turn; what became of them, and everything that was wrong."""
    for module in ("shoal.deploy.training.run", "shoal.deploy.doctor", "shoal.deploy.cluster.ray_session"):
        importlib.import_module(module)

    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    returns: dict[str, list[float]] = {}
    number = 0
    while counts["kills"] < kills and number < 2 * kills:
        case = cases[number % len(cases)]
        trial = LocalRun(directory / f"{case}-{number}", LOCAL_CASES[case], chance, counts)
        trial.play(min(MOST_PER_RUN, kills - counts["kills"], -(-kills // len(cases))))
        number += 1
        if not trial.failed:
            returns.setdefault(case, []).append(round(summary(trial.run)["mean_return"], 2))
        wrong += [f"{trial.run}: {each}" for each in trial.wrong]
        if not trial.wrong:
            shutil.rmtree(trial.run)
    counts["runs"] = number
    return {"cases": cases, "seed": seed, **counts, "mean_return": returns, "wrong": wrong}


class LocalRun:
    """One run with its sessions."""

    def __init__(self, run: Path, settings: tuple[str, ...], chance: random.Random, counts: Counter[str]) -> None:
        self.run, self._settings, self._chance, self._counts = run, (*ALL, *settings), chance, counts
        self.wrong: list[str] = []
        self.failed = False
        """A session ended with another exit code than 0."""
        self._sessions: list[int] = []
        """Process ids of the sessions, which are those of their Unix sessions."""
        self._start_seconds = 8.0
        """What a session took to its first update."""

    def play(self, kills: int) -> None:
        """Kill it so often, and let it come to its end; where a session fails it is the last one."""
        while kills and self._session(kill=True):
            kills -= 1
        if not kills:
            self._session(kill=False)
        if not self.failed:
            self._check_end()

    def _expect(self, holds: bool, words: str) -> None:
        if not holds:
            self.wrong.append(f"session {len(self._sessions)}: {words}")

    def _session(self, *, kill: bool) -> bool:
        """One session, from the last checkpoint on; False where it came to its end."""
        before, lines = self._newest(), self._lines()
        child = start(self.run, self._settings)
        earlier, self._sessions = self._sessions, [*self._sessions, child]
        killed = kill and self._kill(child)
        if not kill:
            self._ended(os.waitpid(child, 0)[1])
        self._check_session(before, self._lines()[len(lines) :], killed=killed)
        # Ray was started, and what a run before it left was removed.
        if self._newest()["policy_version"] > before["policy_version"]:
            left = processes(earlier)
            self._expect(not left, f"processes of killed sessions are still there: {left}")
        return killed

    def _ended(self, status: int) -> None:
        self.failed = status != 0
        self._expect(not self.failed, f"ended with {status}: {(self.run / 'output').read_text()[-2000:]}")

    def _kill(self, child: int) -> bool:
        """Kill a session at a moment drawn by chance, every other time while it writes; False where it ended before."""
        checkpoints, begun_at = self.run / "checkpoints", time.monotonic()
        seen = names(checkpoints)
        writing = self._counts["kills"] % 2 == 0
        # Of those that are not during a write, every third falls into the start.
        starting = not writing and self._counts["kills"] % 6 == 1
        wanted, pause = self._chance.randrange(8), self._chance.random()
        new: set[str] = set()
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self._ended(status)
                return False
            now = names(checkpoints)
            if not new and now - seen:
                self._start_seconds = time.monotonic() - begun_at
            new |= {name for name in now - seen if name.isdecimal()}
            if starting and time.monotonic() - begun_at > pause * self._start_seconds:
                break
            begun = any(name.startswith(".incomplete-") for name in now)
            if not starting and len(new) >= max(wanted, not writing) and (begun or not writing):
                break
            time.sleep(0.0005)
        time.sleep(pause * (0.005 if writing else 0.1))
        visible = max((int(name) for name in names(checkpoints) if name.isdecimal()), default=0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self._counts["processes that a kill left at first"] += len(processes([child]))
        self._counts["kills"] += 1
        self._counts["kills during a write"] += any(
            name.startswith((".incomplete-", ".replaced-")) for name in names(checkpoints) - seen
        )
        self._counts["kills before the session's first checkpoint"] += not new
        newest = self._newest()["policy_version"]
        self._expect(newest >= visible, f"checkpoint {visible} was complete before the kill, {newest} is the newest")
        return True

    def _newest(self) -> dict[str, Any]:
        """State of the checkpoint that the next session starts from, after the checks that each must pass."""
        from shoal.learner.checkpoint import Checkpoints

        found = Checkpoints(self.run / "checkpoints").latest()
        if found is None:
            return {"policy_version": 0, "ledger": {"trained": 0, "in_flight": 0}, "path": None}
        books, version = found.state["ledger"], found.policy_version
        accounted = books["trained"] + books["in_flight"] + sum(books["dropped"].values())
        self._expect(books["sampled"] == accounted, f"the books do not balance: {books}")
        self._expect(
            books["trained"] == version * STEPS_PER_UPDATE,
            f"{version} updates of {STEPS_PER_UPDATE} steps, and {books['trained']} are counted",
        )
        return {**found.state, "path": found.path}

    def _lines(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``."""
        path, found = self.run / "metrics.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # half a line
                found.append(json.loads(line))
        return found

    def _check_session(self, before: dict[str, Any], lines: list[dict[str, Any]], *, killed: bool) -> None:
        """Compare what a session wrote with the checkpoint that it began with, and with that which it left."""
        after, log = self._newest(), self.run / "run.log"
        resumed = re.findall(r"resumed from (\S+) of this run", log.read_text() if log.exists() else "")
        if before["path"] and (lines or not killed):
            self._expect(
                resumed[-1:] == [str(before["path"])], f"resumed from {resumed[-1:]}, the newest was {before['path']}"
            )
        self._expect(after["policy_version"] >= before["policy_version"], "the newest checkpoint went back")
        steps = [line["env_steps"] for line in lines]
        versions = [line["policy_version"] for line in lines]
        self._expect(steps == sorted(steps) and versions == sorted(versions), f"went back: {steps}, {versions}")
        self._expect(
            all(line["env_steps"] >= before["ledger"]["trained"] for line in lines),
            f"{steps[:1]} steps after a checkpoint of {before['ledger']['trained']}",
        )
        # With one checkpoint an update, the one that is being saved is all that a kill can take.
        lost = max(versions, default=0) - after["policy_version"]
        self._expect(lost <= 1, f"{lost} updates are lost")
        self._counts["updates lost that a line had told of"] += max(lost, 0)
        kept = [line for line in self._lines() if line["env_steps"] <= before["ledger"]["trained"]]
        if lines and any(line["mean_return"] is not None and line["session"] < lines[0]["session"] for line in kept):
            self._expect(lines[0]["mean_return"] is not None, "the mean return begins anew")

    def _check_end(self) -> None:
        """The run came to its end as one run, and nothing of it is left on the machine."""
        from shoal.deploy.report.recorded_metrics import read_metrics
        from shoal.learner.checkpoint import Checkpoints

        told, newest = summary(self.run), self._newest()
        self._expect(told["books_balance"] and told["stopped_by"] is None, f"ended with {told}")
        self._expect(told["env_steps"] >= TOTAL, f"ended at {told['env_steps']} steps")
        self._expect(newest["ledger"]["trained"] == told["env_steps"], "the last checkpoint is another than the end")
        self._expect(told["ledger"]["in_flight"] == 0, "steps are in flight after the end")
        steps, _ = read_metrics(self.run / "metrics.jsonl").curve("mean_return")
        self._expect(bool((steps[1:] >= steps[:-1]).all()), "the curve goes back")
        self._expect(steps[-1] == told["env_steps"], f"the curve ends at {steps[-1]}")
        if told["evaluation"] and told["evaluation"]["best"]:
            best = told["evaluation"]["best"]["policy_version"]
            kept = Checkpoints(self.run / "best").latest()
            self._expect(kept is not None and kept.policy_version == best, f"the best is {best}, kept is {kept}")
        left = names(self.run / "checkpoints")
        self._expect(all(name.isdecimal() for name in left), f"half a checkpoint is left: {left}")
        deadline = time.monotonic() + LEFT_SECONDS
        while (still := processes(self._sessions)) and time.monotonic() < deadline:
            time.sleep(0.5)
        self._expect(not still, f"processes are left: {still}")


def processes(sessions: list[int]) -> dict[int, str]:
    """Command lines of the processes that belong to one of these Unix sessions and live, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(session) in sessions and state not in ("Z", "X"):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:200]
        except OSError:
            continue  # it ended meanwhile
    return found
