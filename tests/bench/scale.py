"""The number of actors that one learner's process can coordinate: ``shoal bench scale [--actors 1 4 16 64] [--json]``.

Simulated actors on a Ray cluster of several nodes on this machine: their environment sleeps, so that 64 of them need
hardly any processor, and everything else is the service's own: admission, calls, collection, checks, books, and a new
version of weights (of the real size, verified by every actor) for every batch. Instead of an update the batch is only
booked. Reported: environment steps per second against linear, and the processor seconds of the coordinating thread
(publication included), by part; and how fast unrolls of the defaults' size are taken in, against copying them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from _own_ray import own_ray
from shoal.actors.rollout import trajectory_spec
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.envs.registry import make_env_spec
from shoal.learner.ledger import Ledger
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.weights import Weights, flatten_weights

SLOTS, UNROLL, LAG = 4, 16, 2
STEP_SECONDS = 0.25
PER_NODE = 16


def make_setup(num_envs: int, unroll_length: int, **kwargs: Any) -> WorkerSetup:
    spec = make_env_spec("synthetic", **kwargs)
    return WorkerSetup(
        env_id="synthetic",
        env_kwargs=kwargs,
        num_envs=num_envs,
        unroll_length=unroll_length,
        run_id="scale",
        seed=0,
        observation=observation_of(spec),
        actions=actions_of(spec),
    )


def make_trajectory_queue(setup: WorkerSetup, num_actors: int, batch_size: int) -> TrajectoryQueue:
    spec = make_env_spec(setup.env_id, **setup.env_kwargs)
    return TrajectoryQueue(
        trajectory_spec(spec, setup.unroll_length),
        run_id=setup.run_id,
        num_actors=num_actors,
        num_envs=setup.num_envs,
        batch_size=batch_size,
        max_policy_lag=LAG,
        ledger=Ledger(),
    )


@contextmanager
def cluster(num_actors: int) -> Iterator[None]:
    """As many nodes as the actors need, and a head for this process."""
    import ray
    from ray.cluster_utils import Cluster

    store = 150 * 2**20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
    try:
        for _ in range(-(-num_actors // PER_NODE)):
            made.add_node(num_cpus=PER_NODE, object_store_memory=store)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        made.shutdown()


PARTS = ("deliver", "call", "get", "wait", "publish")
"""The work of the coordinating thread: checking and booking an unroll; Ray's call of an actor, fetching an answer,
waiting; putting and announcing weights. The rest is its own loops: admission, who is due, what hangs."""


@contextmanager
def timed(seconds: Counter[str], part: str, owner: Any, name: str) -> Iterator[None]:
    """Adds this thread's processor seconds in ``owner.name`` to ``seconds[part]``."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return method(*arguments, **options)
        finally:
            seconds[part] += time.thread_time() - start

    with patch.object(owner, name, call):
        yield


def measure(num_actors: int, seconds: float) -> dict[str, Any]:
    """One pool of ``num_actors``, measured for ``seconds`` after all of them are up and have delivered."""
    import ray
    from shoal.actors.config import ActorConfig
    from shoal.actors.ray_pool import RayPool
    from shoal.actors.supervisor import Supervisor

    setup = make_setup(SLOTS, UNROLL, step_seconds=STEP_SECONDS, together=True)
    # All may be under way within the lag.
    trajectory_queue = make_trajectory_queue(setup, num_actors, SLOTS * max(1, num_actors // LAG))
    weights = flatten_weights(setup.make_policy(), 0)
    published: list[float] = []
    parts: Counter[str] = Counter()

    def publish(version: int) -> None:
        start, begun = time.perf_counter(), time.thread_time()
        trajectory_queue.publish(version, ray.put(Weights(version, weights.flat, weights.content_hash)))
        published.append(time.perf_counter() - start)
        parts["publish"] += time.thread_time() - begun

    with cluster(num_actors), ExitStack() as stack:
        stack.enter_context(timed(parts, "deliver", trajectory_queue, "deliver"))
        stack.enter_context(timed(parts, "call", Supervisor, "call"))
        stack.enter_context(timed(parts, "get", ray, "get"))
        stack.enter_context(timed(parts, "wait", ray, "wait"))
        pool = RayPool(
            setup, range(num_actors), ActorConfig(), trajectory_queue, {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        )
        publish(0)
        stop = threading.Event()
        version, delivered, seen = 0, 0, set[int]()
        begin, busy, first = 0.0, 0.0, 0
        try:
            while not begin or time.perf_counter() < begin + seconds:
                batch = trajectory_queue.next_batch(pool.pump, stop) or []
                trajectory_queue.book(batch, trained=sum(trajectory.env_steps for trajectory in batch))
                delivered += len(batch)
                version += 1
                publish(version)
                seen |= {trajectory.header.actor for trajectory in batch}
                if not begin and len(seen) == num_actors:
                    # This thread does nothing but coordinate: what it waits for costs no processor.
                    begin, busy, first = time.perf_counter(), time.thread_time(), delivered
                    steps = trajectory_queue.ledger.trained
                    published.clear()
                    parts.clear()
            elapsed = time.perf_counter() - begin
            unrolls, busy = delivered - first, time.thread_time() - busy
            return {
                "actors": num_actors,
                "steps_per_second": (trajectory_queue.ledger.trained - steps) / elapsed,
                "ideal": num_actors * SLOTS / STEP_SECONDS,
                "unrolls_per_second": unrolls / elapsed,
                "coordinator_share": busy / elapsed,
                "coordinator_microseconds": 1e6 * busy / unrolls,
                "parts_microseconds": {part: 1e6 * parts[part] / unrolls for part in PARTS},
                "publish_milliseconds": 1e3 * statistics.median(published),
                "stale": sum(trajectory_queue.ledger.dropped.values()),
                "rss_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        finally:
            pool.close()
            trajectory_queue.close()


def ingest(rounds: int) -> dict[str, float]:
    """Unrolls of the defaults' size taken in (checked, booked, ready to be assembled), against copying their bytes."""
    setup = make_setup(64, 64)
    worker = setup.make_worker(0, 0)
    weights = flatten_weights(setup.make_policy(), 0)
    payloads = [worker.rollout(weights) for _ in range(8)]
    worker.close()
    target = np.empty(max(payload.nbytes for payload in payloads), np.uint8)
    taken, copied = [], []
    for _ in range(rounds):
        trajectory_queue = make_trajectory_queue(setup, 1, 64 * len(payloads))
        trajectory_queue.publish(0, weights)
        for payload in payloads:
            assert trajectory_queue.admit([0]) is not None
            start = time.perf_counter()
            trajectory_queue.deliver(0, payload)
            middle = time.perf_counter()
            np.copyto(target[: payload.nbytes], payload)
            taken.append(middle - start)
            copied.append(time.perf_counter() - middle)
    assert not trajectory_queue.refused
    return {
        "mebibytes": payloads[0].nbytes / 2**20,
        "deliver_milliseconds": 1e3 * statistics.median(taken),
        "memcpy_milliseconds": 1e3 * statistics.median(copied),
        "speed_of_memcpy": statistics.median(copied) / statistics.median(taken),
    }


def fit(results: list[dict[str, Any]]) -> dict[str, float]:
    """Processor seconds of the coordinator per second as a constant and a part for every unroll, by least squares."""
    rates = [found["unrolls_per_second"] for found in results]
    per_unroll, fixed = np.polyfit(rates, [found["coordinator_share"] for found in results], 1)
    return {"fixed_share": float(fixed), "per_unroll_microseconds": 1e6 * float(per_unroll)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=60.0, help="measured for each number of actors")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    taken = ingest(20)
    print(
        f"taking in {taken['mebibytes']:.2f} MiB: {taken['deliver_milliseconds']:.2f} ms, copying it "
        f"{taken['memcpy_milliseconds']:.2f} ms: {taken['speed_of_memcpy']:.2f} of memcpy's speed\n"
    )
    print(f"actors that sleep {STEP_SECONDS} s per step of {SLOTS} slots, unrolls of {UNROLL}, {PER_NODE} to a node")
    print(
        "actors   steps/s   of linear   unrolls/s   coordinator: share of a core, us/unroll   publication ms   peak MiB"
    )
    results = []
    for number in options.actors:
        found = measure(number, options.seconds)
        results.append(found)
        print(
            f"{number:>6}  {found['steps_per_second']:>8,.1f}  {found['steps_per_second'] / found['ideal']:>9.3f}"
            f"  {found['unrolls_per_second']:>10.1f}  {found['coordinator_share']:>26.4f}"
            f"  {found['coordinator_microseconds']:>10,.0f}  {found['publish_milliseconds']:>15.1f}"
            f"  {found['rss_mebibytes']:>9,.0f}"
        )
        named = found["parts_microseconds"]
        rest = found["coordinator_microseconds"] - sum(named.values())
        print("        of it, us:", ", ".join(f"{part} {spent:,.0f}" for part, spent in named.items()), end="")
        print(f", its own loops {rest:,.0f}", flush=True)
    model = {}
    if len(results) > 1:
        model = fit(results)
        print(
            f"\nmodel: {model['fixed_share']:.4f} of a core and {model['per_unroll_microseconds']:.0f} us per unroll: "
            f"a core is full at {(1 - model['fixed_share']) * 1e6 / model['per_unroll_microseconds']:,.0f} unrolls/s"
        )
    if options.json:
        print(json.dumps({"ingest": taken, "scale": results, "model": model}))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    own_ray()
    main()
