"""The whole service against what this machine's cores could do: ``shoal bench limit [--json]``.

In one run, alternating: bare loops of the very environment, inference and update that the service uses, with one
thread and the slots and segments that one learner has; then the service itself, read from its own metrics endpoint once
it is under way, with where its own learner's core spent the time. The limit is
cores / (environment + inference + update seconds per environment step): no overlap, no waiting, nothing but the work.
It is measured twice: on one core while the others rest, and on all cores at once, which is slower where cores share
caches, memory or power. The roofline is what is left of it if only products of the network's shapes took time
(``_roofline.py``). Run it alone on the machine; absolute figures do not travel, the ratio does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _roofline import products, seconds_per_step, token_multiply_adds
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import StepRows
from shoal.envs.reference import random_player
from shoal.envs.registry import make_env_spec, make_vector_env
from shoal.learner.batch import BatchAssembler
from shoal.learner.device_choice import make_device_path
from shoal.learner.forward_pass import valid_transitions
from shoal.learner.learner import Learner
from shoal.policy.allocator import keep_freed_memory
from shoal.policy.fast import FastPolicy
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights


def seconds_per_call(function: Callable[[], object], budget: float) -> float:
    """Median over calls for ``budget`` seconds, after two that are not counted."""
    for _ in range(2):
        function()
    times = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Bare:
    """The three pieces of work of one environment step, without a service around them."""

    def __init__(self, config: Config, layout: Layout) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
        self.slots, self.unroll = config.env.num_envs, config.actor.unroll_length
        batch_size = layout.share(0).batch_size
        self.setup = WorkerSetup(
            env_id=config.env.id,
            env_kwargs=config.env.kwargs,
            env_options=config.env.options,
            num_envs=self.slots,
            unroll_length=self.unroll,
            run_id="bench",
            seed=0,
            observation=observation_of(spec),
            actions=actions_of(spec),
        )
        self.env = make_vector_env(config.env.id, self.slots, 0, config.env.options, **config.env.kwargs)
        shape = (self.slots,)
        self.rows = StepRows(
            np.zeros((self.slots, *spec.obs_shape), spec.obs_dtype),
            np.zeros(shape, np.bool_),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.bool_),
            np.zeros(shape, np.bool_),
        )
        self.env.reset(self.rows.obs)
        self.worker = self.setup.make_worker(0, 0)
        path = make_device_path(config.learner)
        policy = self.setup.make_policy(config.policy.initialization).to(path.device)
        self.learner = Learner(policy, config.learner, path, num_threads=1, seed=0)
        assembler = BatchAssembler(self.worker.spec, batch_size)
        weights = flatten_weights(policy, 0)
        unrolls = [self.worker.rollout(weights) for _ in range(batch_size // self.slots)]
        self.batch = path.to_device(assembler.assemble([from_bytes(self.worker.spec, unroll) for unroll in unrolls]))
        self.batch_steps = int(valid_transitions(self.batch).sum())
        # Inference sees another row at every call, as it does in the service.
        seen = self.batch["obs"][: self.slots].cpu(), self.batch["is_first"][: self.slots].cpu()
        self.inputs = itertools.cycle(
            [(o.contiguous(), f.contiguous()) for o, f in zip(*(x.unbind(1) for x in seen), strict=True)]
        )
        self.player = random_player(spec, np.random.default_rng(0))
        segments, epochs = batch_size // config.learner.minibatches, config.learner.epochs
        assert isinstance(policy, FastPolicy)
        self.products = products(policy, self.slots, segments, self.unroll, epochs, bfloat16=not path.is_exact)
        dense = sum(product.multiply_adds for product in self.products)
        self.multiply_adds = dense + token_multiply_adds(policy.cpu(), self.batch["obs"].flatten(0, 1).cpu(), epochs)
        self._sparse = self.multiply_adds / dense
        policy.to(path.device)

    def environment(self) -> None:
        """One step of all slots with random actions."""
        self.env.step(self.player(self.rows.obs, self.rows.is_first), self.rows)

    def inference(self) -> None:
        """One forward of all slots and one action each."""
        worker = self.worker
        with torch.inference_mode():
            obs, first = next(self.inputs)
            output = worker.policy.act(obs, worker.training_env_ids, first)
            worker.policy.actions.sample(output.logits, torch.rand(self.slots, worker.policy.actions.num_uniform))

    def update(self) -> None:
        """One update on a recorded batch."""
        self.learner.update(self.batch)

    def roofline(self, seconds: float) -> float:
        """Environment steps per second, if a core did nothing but multiply."""
        # Tokens are multiplied at the rate of all the others.
        return 1 / (seconds_per_step(self.products, seconds) * self._sparse)

    def measure(self, seconds: float) -> dict[str, float]:
        """Seconds per environment step of each."""
        return {
            "environment": seconds_per_call(self.environment, seconds) / self.slots,
            "inference": seconds_per_call(self.inference, seconds) / self.slots,
            "update": seconds_per_call(self.update, seconds) / self.batch_steps,
        }


class AllCores:
    """The same pieces in one process per core, all at the same moment."""

    def __init__(self, config: Config, layout: Layout, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(cores)
        self._pipes, self._processes = [], []
        for _ in range(cores):
            here, there = context.Pipe()
            arguments = (config, layout, self._barrier, there)
            self._pipes.append(here)
            self._processes.append(context.Process(target=_one_core, args=arguments, daemon=True))
            self._processes[-1].start()
        for pipe in self._pipes:
            pipe.recv()  # it is ready: from now on it computes when asked

    def measure(self, seconds: float) -> tuple[float, float]:
        """Environment steps per second of all cores, and the roofline of them."""
        for pipe in self._pipes:
            pipe.send(seconds)
        found = [pipe.recv() for pipe in self._pipes]
        return sum(steps for steps, _ in found), sum(roofline for _, roofline in found)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


def _one_core(config: Config, layout: Layout, barrier: Barrier, pipe: Connection) -> None:
    bare = Bare(config, layout)
    pipe.send(None)
    while (seconds := pipe.recv()) is not None:
        barrier.wait()
        steps = 1 / sum(bare.measure(seconds).values())
        barrier.wait()
        pipe.send((steps, bare.roofline(seconds)))


class Measured(NamedTuple):
    """The service's metrics at one moment."""

    at: float
    """When the last update ended, in seconds."""
    trained: int
    stages: dict[str, float]
    """Seconds so far."""


def service(
    arguments: list[str],
    seconds: float,
    warmup: float,
    watch: Callable[[str, int], contextlib.AbstractContextManager[object]] = lambda url, pid: contextlib.nullcontext(),
    program: Sequence[str] = ("-m", "shoal"),
) -> tuple[float, dict[str, float]]:
    """Environment steps trained per second of ``shoal train``, over ``seconds`` after ``warmup`` seconds of it; and the
    share of each stage in that time. ``watch`` is given its page's address and its process and lasts as long;
    ``program`` is what is run in place of ``shoal``.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            *program,
            "train",
            *arguments,
            "metrics.port=0",
            f"run_dir={directory}/run",
        ]
        command += ["total_env_steps=1000000000", "max_seconds=0", "checkpoint.every_updates=0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            url, said = None, ""
            for line in process.stdout or ():
                said += line
                if match := re.search(r"http://\S+/metrics", line):
                    url = match[0]
                    break
            if url is None:
                raise RuntimeError(f"the service did not start:\n{said}")
            while not measure(url).trained:
                time.sleep(0.5)
            with watch(url, process.pid):
                time.sleep(warmup)
                first = measure(url)
                time.sleep(seconds)
                last = measure(url)
            spent = last.at - first.at
            shares = {stage: (s - first.stages.get(stage, 0.0)) / spent for stage, s in last.stages.items()}
            return (last.trained - first.trained) / spent, shares
        finally:
            process.terminate()
            process.communicate(timeout=60)


def measure(url: str) -> Measured:
    """One scrape. Whole updates lie between two of them."""
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    values = dict(re.findall(r"^(shoal_\w+) (\S+)$", text, re.MULTILINE))
    stages = re.findall(r'^shoal_stage_seconds_total\{stage="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return Measured(
        float(values["shoal_last_update_timestamp_seconds"]),
        int(float(values["shoal_trained_env_steps_total"])),
        {stage: float(s) for stage, s in stages},
    )


def profile(shares: dict[str, float], layout: Layout) -> dict[str, float]:
    """The use of one core's time: of the run's own learner, and of an actor where actors are apart."""
    acting = {name: shares.get(f"actor_{name}", 0.0) / layout.num_actors for name in ("env", "policy", "pack")}
    learning = {
        "assembling": shares["assemble"],
        "parity_check": shares["parity_check"],
        "update": shares["update"] - shares.get("reduce", 0.0),
        "adding up, waiting for slower learners": shares.get("reduce", 0.0),
        "publication": shares["publish"],
    }
    named = {"environment": acting["env"], "inference": acting["policy"], "packing": acting["pack"]}
    if layout.placement == "colocated":
        whole = {**named, "between acting and assembling": shares["wait"] - sum(named.values()), **learning}
        return {**whole, "anything else": 1 - sum(whole.values())}
    actors = {f"actor: {name}": share for name, share in named.items()}
    learner = {f"learner: {name}": share for name, share in {"waiting": shares["wait"], **learning}.items()}
    return {
        **actors,
        "actor: waiting": 1 - sum(actors.values()),
        **learner,
        "learner: anything else": 1 - sum(learner.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the service, per round")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config, problems = load_config(options.config or ["forage"], options.settings)
    if problems:
        sys.exit("\n".join(problems))
    arguments = [part for file in options.config or ["forage"] for part in ("--config", file)] + options.settings
    cores = available_cores()
    accelerator = make_device_path(config.learner).device.type != "cpu"
    layout = choose_layout(config, Machine(cores=cores, accelerator=accelerator))
    bare, all_cores = Bare(config, layout), AllCores(config, layout, cores)
    shares = []
    rounds = []
    for i in range(options.rounds):
        seconds = bare.measure(3.0)
        limit, (together, roofline) = cores / sum(seconds.values()), all_cores.measure(3.0)
        achieved, stages = service(arguments, options.seconds, warmup=5.0)
        shares.append(profile(stages, layout))
        ratios = {
            "ratio": achieved / limit,
            "ratio_together": achieved / together,
            "roofline_ratio": achieved / roofline,
        }
        limits = {"limit": limit, "limit_together": together, "roofline": roofline}
        rounds.append({**seconds, **limits, "service": achieved, **ratios})
        print(
            f"round {i + 1}: limit {limit:,.0f}, all cores at once {together:,.0f}, roofline {roofline:,.0f}, "
            f"service {achieved:,.0f} steps/s",
            flush=True,
        )
    all_cores.close()

    def spread(name: str, scale: Callable[[float], float] = float) -> tuple[float, float, float]:
        values = sorted(scale(r[name]) for r in rounds)
        return statistics.median(values), values[0], values[-1]

    print(
        f"\n{config.env.id}, {config.env.num_envs} slots per actor, unrolls of {config.actor.unroll_length}, "
        f"{layout.batch_size} segments in {config.learner.minibatches} minibatches, {layout.num_learners} learners "
        f"({layout.placement}), {cores} cores; median [lowest .. highest] of {len(rounds)} rounds"
    )
    table = [
        ("environment alone, one core", *spread("environment", lambda s: 1 / s), "{:,.0f} steps/s"),
        ("inference alone, one core", *spread("inference", lambda s: 1 / s), "{:,.0f} steps/s"),
        ("update alone, one core", *spread("update", lambda s: 1 / s), "{:,.0f} steps/s"),
        (f"limit: {cores} times one core alone", *spread("limit"), "{:,.0f} steps/s"),
        ("limit: all cores at once", *spread("limit_together"), "{:,.0f} steps/s"),
        ("roofline: only its products", *spread("roofline"), "{:,.0f} steps/s"),
        ("service", *spread("service"), "{:,.0f} steps/s"),
        ("service / one core alone", *spread("ratio"), "{:.3f}"),
        ("service / all cores at once", *spread("ratio_together"), "{:.3f}"),
        ("service / roofline", *spread("roofline_ratio"), "{:.3f}"),
    ]
    for name, median, low, high, form in table:
        print(
            f"  {name:<31} {form.format(median):>16}  [{form.split()[0].format(low)} .. {form.split()[0].format(high)}]"
        )
    print(f"  an environment step takes {bare.multiply_adds / 1e6:.2f} million multiply-adds")
    print("\nshare of one core's time in the service")
    for name in shares[0]:
        values = sorted(100 * each[name] for each in shares)
        print(f"  {name:<40} {statistics.median(values):5.1f} %  [{values[0]:.1f} .. {values[-1]:.1f}]")
    if options.json:
        medians = {name: spread(name)[0] for name in rounds[0]}
        print(json.dumps({**medians, "multiply_adds": bare.multiply_adds, "cores": cores, "rounds": rounds}))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
