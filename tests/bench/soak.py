"""Does anything grow? ``shoal bench soak [--hours 1] [--only forage cartpole] [--out DIR] [--json]``.

Runs in local mode, one after the other, are scraped every second, evaluated and saved, and stopped after their share of
the hours. Every few seconds memory, descriptors, threads and processes are read for each part of the run (the process
of the command, actors, the process that evaluates, Ray's own), and shared memory and the run directory. A slope per
hour is fitted to each: the median of the slopes between medians of a minute (Theil and Sen), from the second fifth on.
A slope above its limit fails the command. The time of a scrape is that at the machine's usual speed: a fixed piece of
work is timed before each, which other work on the machine makes slower as well. What was read lies in
``DIR/NAME.jsonl``, so that it can be fitted again (``--fit DIR``).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.processes import PATIENCE, descendants, end

RUNS = {
    "forage": ("--config", "forage"),
    "cartpole": ("env.id=CartPole-v1", "env.num_envs=16", "actor.num_actors=1"),
    # Thousands of calls a minute, which Ray keeps account of.
    "short-unrolls": ("env.id=CartPole-v1", "env.num_envs=4", "actor.unroll_length=4", "learner.minibatches=1"),
}
SETTINGS = (
    *("mode=local", "metrics.port=0", "run_dir=run", "resume=never", "total_env_steps=1000000000000", "max_seconds=0"),
    *("evaluation.every_env_steps=50000", "evaluation.episodes=32", "checkpoint.every_updates=50"),
)
EVERY = 5.0
"""Seconds between two readings of the processes."""
LIMITS = {
    # A minute's median moves by a few MiB when nothing leaks: allocators keep what they were once given.
    "memory_mib": 30.0,
    "descriptors": 5.0,
    "threads": 5.0,
    "processes": 3.0,
    "shared_memory_mib": 10.0,
    # metrics.jsonl has a line for every few seconds, evaluation.jsonl one for each evaluation.
    "run_dir_mib": 40.0,
    "scrape_ms": 5.0,
}
"""Per hour."""


WORK = [{"name": f"shoal_{i}", "values": [i / 3, str(i), None]} for i in range(500)]


def reference_ms() -> float:
    """Milliseconds that a fixed piece of work takes now, in one thread of this process."""
    begun = time.perf_counter()
    json.loads(json.dumps(WORK))
    return 1000 * (time.perf_counter() - begun)


def part_of(command: str) -> str:
    """The part of the run that a process belongs to, by its command line."""
    for name, pattern in (
        ("gcs_server", r"gcs_server"),
        ("raylet", r"/raylet"),
        ("actors", r"^ray::Rollout"),
        ("learners", r"^ray::Learner"),
        ("evaluation", r"multiprocessing|job_process"),
        ("Ray's others", r"^ray::|/ray/|ray\."),
    ):
        if re.search(pattern, command):
            return name
    return "command"


def read_processes(root: int) -> dict[str, dict[str, float]]:
    """Memory, descriptors, threads and number of the processes below ``root``, by part."""
    found: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for pid in descendants(root):
        place = Path(f"/proc/{pid}")
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            status = dict(re.findall(r"^(\w+):\s+(\d+)", (place / "status").read_text(), re.MULTILINE))
            descriptors = len(list((place / "fd").iterdir()))
        except OSError:
            continue  # it ended meanwhile
        part = found["command" if pid == root else part_of(command)]
        # Pages of shared memory are counted once, below.
        part["memory_mib"] += (int(status.get("VmRSS", 0)) - int(status.get("RssShmem", 0))) / 1024
        part["descriptors"] += descriptors
        part["threads"] += int(status.get("Threads", 0))
        part["processes"] += 1
    return {name: dict(part) for name, part in found.items()}


def directory_mib(place: Path) -> float:
    """Size of the files below it."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue  # replaced meanwhile
    return total / 2**20


def soak(name: str, settings: Sequence[str], seconds: float, out: Path) -> tuple[list[dict[str, Any]], int]:
    """One run; what was read, and the run's exit code."""
    with tempfile.TemporaryDirectory() as directory, (out / f"{name}.jsonl").open("w") as record:
        command = [sys.executable, "-m", "shoal", "train", *settings, *SETTINGS]
        process = subprocess.Popen(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert process.stdout is not None
        url, said = None, ""
        for line in process.stdout:
            said += line
            if match := re.search(r"http://\S+/metrics", line):
                url = match[0]
                break
        if url is None:
            raise RuntimeError(f"the run did not start:\n{said}")
        with (out / f"{name}.log").open("w") as log:
            reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
        process.stdout.close()
        samples: list[dict[str, Any]] = []
        seen: set[int] = set()
        try:
            for sample in readings(url, process, Path(directory) / "run", seconds, seen):
                samples.append(sample)
                print(json.dumps(sample), file=record, flush=True)
            if process.poll() is not None:
                raise RuntimeError(f"the run ended by itself: exit code {process.returncode}, see {out / name}.log")
        finally:
            process.send_signal(signal.SIGTERM)  # SIGINT stays ignored where a script starts this in the background
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            end(process, seen)
            reader.wait(10)
        return samples, process.returncode


def readings(
    url: str, process: subprocess.Popen[str], run_dir: Path, seconds: float, seen: set[int]
) -> Iterator[dict[str, Any]]:
    """A sample every few seconds, and a scrape every second; ``seen`` collects the processes of the run."""
    scrapes: list[float] = []
    references: list[float] = []
    start = due = time.monotonic()
    while (now := time.monotonic()) - start < seconds and process.poll() is None:
        references.append(reference_ms())
        asked = time.monotonic()
        try:
            with urllib.request.urlopen(url, timeout=30) as page:
                text = page.read().decode()
        except OSError as error:
            # A run stops serving a moment before its end.
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise error from None
            return
        scrapes.append(1000 * (time.monotonic() - asked))
        if now >= due:
            due = now + EVERY
            seen.update(descendants(process.pid))
            steps = re.search(r"^shoal_trained_env_steps_total (\S+)$", text, re.MULTILINE)
            yield {
                "seconds": now - start,
                "steps": float(steps[1]) if steps else 0.0,
                "parts": read_processes(process.pid),
                "shared_memory_mib": directory_mib(Path("/dev/shm")),
                "run_dir_mib": directory_mib(run_dir),
                "scrape_ms": statistics.median(scrapes),
                "reference_ms": statistics.median(references),
            }
            scrapes.clear()
            references.clear()
        time.sleep(max(0.0, 1.0 - (time.monotonic() - now)))


def curves(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(seconds, number) by (part, what), without the first fifth, in which a run grows into its size.

    The time of a scrape is divided by that of the reference work, in units of the latter's median; as it was read where
    there is none (older recordings).
    """
    begin = samples[-1]["seconds"] / 5
    usual = statistics.median(sample.get("reference_ms", 1.0) for sample in samples)
    found: dict[tuple[str, str], list[tuple[float, float]]] = collections.defaultdict(list)
    for sample in samples:
        if sample["seconds"] >= begin:
            for what in ("shared_memory_mib", "run_dir_mib"):
                found["run", what].append((sample["seconds"], sample[what]))
            slowness = sample.get("reference_ms", usual) / usual
            found["run", "scrape_ms"].append((sample["seconds"], sample["scrape_ms"] / slowness))
            for part, numbers in sample["parts"].items():
                for what, number in numbers.items():
                    found[part, what].append((sample["seconds"], number))
    return found


def slope_per_hour(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: the median of the slopes between the medians of every two minutes; 0 for less than two."""
    minutes: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    for point in points:
        minutes[int(point[0] // 60)].append(point)
    middles = [tuple(map(statistics.median, zip(*each, strict=True))) for each in minutes.values()]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(middles, 2)]
    return 3600 * statistics.median(slopes) if slopes else 0.0


def report(name: str, samples: Sequence[Mapping[str, Any]], code: int | None) -> dict[str, Any]:
    """Print the slopes of a run; what fails is marked."""
    seconds, steps = samples[-1]["seconds"], samples[-1]["steps"]
    ended = "" if code is None else f", ended with {code}"
    print(f"\n{name}: {steps:,.0f} environment steps in {seconds / 60:.0f} minutes{ended}")
    print(f"  {'':<34} {'first':>10} {'last':>10} {'per hour':>10} {'limit':>7}")
    found, failed = {}, code not in (None, 0, 128 + signal.SIGTERM)
    for (part, what), points in sorted(curves(samples).items()):
        slope = slope_per_hour(points)
        above = slope > LIMITS[what]
        failed |= above
        found[f"{part} {what}"] = slope
        first, last = (statistics.median(number for _, number in some) for some in (points[:6], points[-6:]))
        mark = "  GROWS" if above else ""
        print(f"  {part + ': ' + what:<34} {first:>10.1f} {last:>10.1f} {slope:>+10.1f} {LIMITS[what]:>7.0f}{mark}")
    return {"slopes_per_hour": found, "minutes": seconds / 60, "env_steps": steps, "exit": code, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="of each run")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=["forage", "cartpole"], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--fit", type=Path, help="fit what an earlier soak has read, and run nothing")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    results = {}
    if options.fit:
        for file in sorted(options.fit.glob("*.jsonl")):
            results[file.stem] = report(file.stem, [json.loads(line) for line in file.read_text().splitlines()], None)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            samples, code = soak(name, [*RUNS[name], *options.settings], 3600 * options.hours, options.out)
            results[name] = report(name, samples, code)
    if options.json:
        print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    sys.exit(main())
