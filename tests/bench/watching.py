"""The cost of being watched: ``shoal bench watching [--rounds 5] [--json] [key=value ...]``.

The demo, twice a round, in alternating order: read by nobody (no line of metrics.jsonl, no tracker, and its page twice,
for the measurement), and watched: its page scraped every second as Prometheus does it, a line of metrics.jsonl every
second, TensorBoard where it is installed, logs as JSON. The ratio of environment steps per second, round by round, and
what of a core all threads of the learner's process but the training loop's took: where a machine's speed wanders by
more than a percent this says more, for the training loop waits for them no longer than they work.
``--flood N`` adds a third run a round, to which another process of this machine sends N requests a second, each with a
connection of its own: on few cores that process takes its share, too, and says how much. ``--evaluate N`` adds a run
that is evaluated every N environment steps while it trains. ``--windows N`` does something else: one run, watched in
every other of N windows of ``--seconds``, each of these compared with the two around it (its logs are JSON in all of
them). Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from limit import measure, service

BottleneckMonitor = Callable[[str, int], contextlib.AbstractContextManager[Any]]
"""Watches a process (its pid) through the address of its page, for the length of the block."""
SETTINGS = {
    "alone": ["log.every_seconds=1e9"],
    "watched": ["log.every_seconds=1", "log.format=json"],
    "flooded": ["log.every_seconds=1e9"],
}
if importlib.util.find_spec("tensorboard"):
    SETTINGS["watched"].append("log.sinks=[tensorboard]")


@contextlib.contextmanager
def alone(url: str, pid: int) -> Iterator[None]:
    """Nobody looks."""
    yield


@contextlib.contextmanager
def scraped(url: str, pid: int) -> Iterator[None]:
    """As Prometheus does it: every second, in its format, compressed."""
    stop = threading.Event()
    headers = {"Accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1", "Accept-Encoding": "gzip"}

    def scrape() -> None:
        while not stop.wait(1.0):
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as page:
                page.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


class Alternating:
    """Watches a run (``_switched.py``) in every other window; steps per second of each."""

    def __init__(self, switch: Path, seconds: float, watch: BottleneckMonitor) -> None:
        self._switch, self._seconds, self._watch = switch, seconds, watch
        self.speeds: list[float] = []

    def run(self, url: str, pid: int, windows: int) -> None:
        """The first and the last window are unwatched."""
        first = measure(url)
        for i in range(windows):
            with contextlib.ExitStack() as stack:
                if i % 2:
                    self._switch.touch()
                    stack.callback(self._switch.unlink)
                    stack.enter_context(self._watch(url, pid))
                time.sleep(self._seconds)
            last = measure(url)
            self.speeds.append((last.trained - first.trained) / (last.at - first.at))
            first = last

    def ratios(self) -> list[float]:
        """Every watched window over the mean of the two around it."""
        around = zip(self.speeds[:-2:2], self.speeds[1:-1:2], self.speeds[2::2], strict=True)
        return [2 * watched / (before + after) for before, watched, after in around]


def alternate(arguments: list[str], windows: int, seconds: float, warmup: float) -> None:
    """One run, and what is said of it."""
    windows += 1 - windows % 2
    with tempfile.TemporaryDirectory() as directory:
        alternating = Alternating(Path(directory) / "switch", seconds, scraped)

        @contextlib.contextmanager
        def watch(url: str, pid: int) -> Iterator[None]:
            time.sleep(warmup)
            alternating.run(url, pid, windows)
            yield

        os.environ["SHOAL_BENCH_SWITCH"] = f"{directory}/switch"
        service([*arguments, *SETTINGS["watched"]], 2.0, 0.0, watch, (str(Path(__file__).with_name("_switched.py")),))
    ratios = sorted(alternating.ratios())
    # Order statistics about the median: so many above and below with probability 0.95, whatever the distribution.
    reach = 0.98 * math.sqrt(len(ratios))
    ranks = [round((len(ratios) - 1) / 2 + sign * reach) for sign in (-1, 1)]
    low, high = ratios[max(ranks[0], 0)], ratios[min(ranks[1], len(ratios) - 1)]
    print(f"{' '.join(arguments)}; {len(ratios)} windows of {seconds:g} s, each against the two around it")
    print(f"  alone            {spread(alternating.speeds[::2], ',.0f')} steps/s")
    print(f"  watched          {spread(alternating.speeds[1::2], ',.0f')} steps/s")
    print(f"  watched / alone  {spread(ratios, '.3f')}; the median lies in {low:.3f} .. {high:.3f} (95%)")


class Flood:
    """Requests from a process of its own, so many a second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.answered: list[float] = []
        """Requests a second, of each run."""
        self.processor: list[float] = []
        """Share of a core that asking took, of each run."""

    @contextlib.contextmanager
    def __call__(self, url: str, pid: int) -> Iterator[None]:
        context = multiprocessing.get_context("spawn")
        stop, (here, there) = context.Event(), context.Pipe()
        process = context.Process(target=_flood, args=(url, self._rate, stop, there), daemon=True)
        process.start()
        here.recv()  # it is up, and asks from now on
        yield
        stop.set()
        count, seconds, processor = here.recv()
        process.join()
        self.answered.append(count / seconds)
        self.processor.append(processor / seconds)


def _flood(url: str, rate: float, stop: Event, pipe: Connection) -> None:
    place = urllib.parse.urlsplit(url)
    address = (place.hostname, place.port)
    answered, lock = [0], threading.Lock()
    pipe.send(None)
    start, processor = time.monotonic(), time.process_time()
    turn = [start]

    def ask() -> None:
        while not stop.is_set():
            with lock:
                turn[0] = max(turn[0] + 1 / rate, time.monotonic() - 0.1)
                wait = turn[0] - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=10) as client:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while client.recv(65536):
                    pass
                with lock:
                    answered[0] += 1

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send((answered[0], time.monotonic() - start, time.process_time() - processor))


class OtherThreads:
    """The share of a core that all threads of a process but its first took during ``watch``, by run; Linux only."""

    def __init__(self, watch: BottleneckMonitor) -> None:
        self._watch = watch
        self.shares: list[float] = []

    @contextlib.contextmanager
    def __call__(self, url: str, pid: int) -> Iterator[None]:
        begin, before = time.monotonic(), self._seconds(pid)
        with self._watch(url, pid):
            yield
        self.shares.append((self._seconds(pid) - before) / (time.monotonic() - begin))

    def _seconds(self, pid: int) -> float:
        ticks = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            if int(task.name) != pid:
                with contextlib.suppress(OSError):  # it just ended
                    user, system = task.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
                    ticks += int(user) + int(system)
        return ticks / os.sysconf("SC_CLK_TCK")


def spread(values: list[float], form: str) -> str:
    """Median [lowest .. highest]."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} [{low:{form}} .. {high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds of each run before")
    parser.add_argument("--flood", type=float, default=0.0, metavar="N", help="requests a second of the third run")
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="environment steps between evaluations")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="of one run, every other one watched")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    arguments = [part for file in options.config or ["forage"] for part in ("--config", file)] + options.settings
    if options.windows:
        if options.flood or options.evaluate or options.json:
            parser.error("--windows goes with neither --flood, --evaluate nor --json")
        alternate(arguments, options.windows, options.seconds, options.warmup)
        return
    flood = Flood(options.flood)
    watches: dict[str, BottleneckMonitor] = {"alone": alone, "watched": scraped}
    if options.flood:
        watches["flooded"] = flood
    if options.evaluate:
        watches["evaluated"] = alone
        SETTINGS["evaluated"] = [*SETTINGS["alone"], f"evaluation.every_env_steps={options.evaluate}"]
    threads = {name: OtherThreads(watch) for name, watch in watches.items()}
    rounds: list[dict[str, float]] = []
    for i in range(options.rounds):
        names = list(watches) if i % 2 == 0 else list(watches)[::-1]
        speeds = {
            name: service([*arguments, *SETTINGS[name]], options.seconds, options.warmup, threads[name])[0]
            for name in names
        }
        rounds.append(speeds)
        print(
            f"round {i + 1}: " + ", ".join(f"{name} {speeds[name]:,.0f}" for name in watches) + " steps/s", flush=True
        )
    print(f"\n{' '.join(arguments)}; median [lowest .. highest] of {len(rounds)} rounds")
    for name in watches:
        print(f"  {name:<16} {spread([speeds[name] for speeds in rounds], ',.0f')} steps/s")
    for name in list(watches)[1:]:
        print(f"  {name + ' / alone':<16} {spread([speeds[name] / speeds['alone'] for speeds in rounds], '.3f')}")
    for name, found in threads.items():
        print(f"  {name:<16} {spread(found.shares, '.4f')} of a core in the other threads of the learner's process")
    if options.flood:
        cores = spread(flood.processor, ".2f")
        print(f"  {'the flood':<16} {spread(flood.answered, ',.0f')} answers/s, with {cores} cores")
    if options.json:
        shares = {name: found.shares for name, found in threads.items()}
        told = {"rounds": rounds, "other_threads": shares}
        print(json.dumps(told | {"answered": flood.answered, "flood_cores": flood.processor}))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
