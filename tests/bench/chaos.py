"""A run whose actors and machines die all the time: ``shoal bench chaos [--seconds 600] [--json] [key=value ...]``.

A Ray cluster of several nodes on this machine; every few seconds a random actor is killed, every minute a random node,
in whose place another comes. Then the same run in peace, for as many environment steps but no more than --peace-steps:
once with the same seed, and with others, to see how far runs differ anyway. Said of each: how it ended, whether its
books balance, how throughput followed the living actors, what became of memory and what was learned. Run it alone on
the machine. The order of the blows follows from --seed; what they meet does not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from _own_ray import own_ray

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
from service import actor_processes

STORE = 100 * 2**20
NODES, CPUS_PER_NODE = 2, 2
SETTINGS = (
    # The memory task with its own recipe, but for the lag.
    *("--config", "recall", "mode=cluster", "env.num_envs=16", "actor.max_policy_lag=2"),
    *(f"actor.num_actors={NODES * CPUS_PER_NODE}", "cluster.autoscaling=true", "checkpoint.every_updates=200"),
    *("actor.max_consecutive_failures=1000", "metrics.port=0", "run_dir=run", "log.every_seconds=1"),
)


class Nodes:
    """The cluster, and blows to it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
        self.nodes: list[Any] = []
        for _ in range(NODES):
            self.add()

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=STORE))

    def actors(self) -> list[int]:
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.nodes]
        return [pid for raylet in raylets for pid in actor_processes(raylet)]

    def kill_actor(self, chance: random.Random) -> bool:
        actors = sorted(self.actors())
        if not actors:
            return False
        try:
            os.kill(chance.choice(actors), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def replace_node(self, chance: random.Random) -> None:
        node = chance.choice(self.nodes)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add()


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    return {name: float(value) for name, value in re.findall(r"^((?:shoal|process)_\w+) (\S+)$", text, re.MULTILINE)}


def train(
    nodes: Nodes, limit: list[str], seed: int, chance: random.Random | None, options: argparse.Namespace
) -> dict[str, Any]:
    """One run to its end; under blows where there is ``chance``."""
    while len(nodes.nodes) < NODES:
        nodes.add()
    with tempfile.TemporaryDirectory() as directory:
        return _train(nodes, Path(directory), [*limit, f"seed={seed}"], chance, options)


def _train(
    nodes: Nodes, directory: Path, limit: list[str], chance: random.Random | None, options: argparse.Namespace
) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal", "train", *SETTINGS, *options.settings, *limit]
    command.append(f"cluster.address={nodes.cluster.address}")
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    url, said = None, ""
    for line in process.stdout:
        said += line
        if match := re.search(r"http://\S+/metrics", line):
            url = match[0]
            break
    if url is None:
        raise RuntimeError(f"the run did not start:\n{said}")
    # Nobody else reads what it says.
    with (directory / "output.txt").open("w") as log:
        reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
    samples: list[dict[str, float]] = []
    kills = node_kills = 0
    start = time.monotonic()
    next_actor, next_node = start + options.actor_every, start + options.node_every
    while process.poll() is None:
        now = time.monotonic()
        if chance and now >= next_actor:
            kills += nodes.kill_actor(chance)
            next_actor = now + options.actor_every * chance.uniform(0.5, 1.5)
        if chance and now >= next_node:
            nodes.replace_node(chance)
            node_kills += 1
            next_node = now + options.node_every
        with contextlib.suppress(OSError):  # it just ended
            samples.append({"at": now - start, **scrape(url)})
        time.sleep(1.0)
    reader.wait()
    summary = json.loads((directory / "run" / "summary.json").read_text())
    return {
        "exit_code": process.returncode,
        "killed_actors": kills,
        "killed_nodes": node_kills,
        "books_balance": summary["books_balance"],
        "env_steps": summary["env_steps"],
        "wall_seconds": summary["wall_seconds"],
        "mean_return": summary["mean_return"],
        "actor_restarts": summary["actor_restarts"],
        "actor_recovery_seconds": summary["actor_recovery_seconds"],
        "dropped": summary["ledger"]["dropped"],
        "lost_unrolls": summary["lost_unrolls"],
        "max_policy_lag": summary["policy_lag"]["max"],
        "max_log_prob_error": summary["max_log_prob_error"],
        "log_prob_checks": summary["log_prob_checks"],
        "return_by_env_steps": learning_curve(directory / "run" / "metrics.jsonl"),
        **follow(samples),
    }


def learning_curve(path: Path, every: int = 50_000) -> dict[str, float]:
    """Return of the last 256 episodes, by environment steps trained."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    points = [(line["env_steps"], line["mean_return"]) for line in lines if line["mean_return"] is not None]
    wanted = range(every, points[-1][0], every)
    return {f"{at:,}": round(next(value for steps, value in points if steps >= at), 2) for at in wanted}


def follow(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Throughput by the number of living actors, and what memory did, without the first tenth of the run."""
    settled = samples[len(samples) // 10 :]
    rates: dict[int, list[float]] = {}
    for before, after in itertools.pairwise(settled):
        alive = {int(sample["shoal_actors_alive"]) for sample in (before, after)}
        if len(alive) == 1:
            trained = after["shoal_trained_env_steps_total"] - before["shoal_trained_env_steps_total"]
            rates.setdefault(alive.pop(), []).append(trained / (after["at"] - before["at"]))
    third = max(1, len(settled) // 3)

    def median(part: list[dict[str, float]], name: str) -> float:
        return statistics.median(sample[name] for sample in part)

    return {
        "steps_per_second_by_living_actors": {n: round(statistics.median(r)) for n, r in sorted(rates.items())},
        "seconds_by_living_actors": {n: len(r) for n, r in sorted(rates.items())},
        "resident_mebibytes": [
            round(median(part, "process_resident_memory_bytes") / 2**20, 1)
            for part in (settled[:third], settled[-third:])
        ],
        "open_fds": [median(part, "process_open_fds") for part in (settled[:third], settled[-third:])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the run under blows")
    parser.add_argument("--actor-every", type=float, default=6.0, help="seconds between killed actors, on average")
    parser.add_argument("--node-every", type=float, default=60.0, help="seconds between killed nodes")
    parser.add_argument("--peace", type=int, default=3, help="runs in peace, each with a seed of its own")
    parser.add_argument("--peace-steps", type=int, default=500_000, help="environment steps of each at most")
    parser.add_argument("--seed", type=int, default=0, help="of the blows")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    nodes = Nodes()
    runs: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {"runs": runs}
    shared_memory = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    try:
        limit = [f"max_seconds={options.seconds}", "total_env_steps=1000000000"]
        runs["chaos"] = train(nodes, limit, 0, random.Random(options.seed), options)
        limit = [f"total_env_steps={min(runs['chaos']['env_steps'], options.peace_steps)}"]
        for seed in range(options.peace):
            runs[f"peace {seed}"] = train(nodes, limit, seed, None, options)
        results["left_behind"] = nodes.actors()
    finally:
        nodes.cluster.shutdown()
    if shared_memory or Path("/dev/shm").is_dir():
        results["shared_memory_left"] = sorted(set(os.listdir("/dev/shm")) - shared_memory)
    for name in runs["chaos"]:
        print("\n".join([name, *(f"    {run}  {found[name]}" for run, found in runs.items())]))
    print(f"processes left: {results['left_behind'] or 'none'}")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    own_ray()
    main()
