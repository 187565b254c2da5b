"""Staleness of the memory that training starts from, and the cost of freshening it: ``shoal bench staleness [--json]``.

After a warm-up in lock step that all share (fresh weights remember little), for every lag and every way to start a
segment (``learner.start_states``): train for some updates on rollouts acted with weights that are exactly ``lag``
versions old, and compare the states that segments start from with the reference, which is the newest weights run over
the ``HISTORY`` unrolls before. Printed are

- staleness: ||state - reference|| / ||reference|| over h and c, averaged over the segments in mid-episode;
- |dV|: how much V of the segment's first row changes when it starts from the reference instead;
- the update's seconds, over those of the update from stored states in the same round (measured interleaved).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections import defaultdict, deque
from typing import Any

import torch
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.envs.registry import make_env_spec
from shoal.learner.batch import BatchAssembler
from shoal.learner.device import DevicePath
from shoal.learner.learner import Learner
from shoal.learner.start_states import final_state, stored_state, with_state
from shoal.policy.allocator import keep_freed_memory
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import Weights, flatten_weights
from tensordict import TensorDict

LAGS = (1, 4, 16)
HISTORY = 4
"""Unrolls that the reference state is recomputed over."""
CPU = DevicePath(torch.device("cpu"))


def ways(unroll_length: int) -> dict[str, dict[str, Any]]:
    """Settings by name: burn-in rows, and whether states are refreshed."""
    quarters = {f"burn-in of {n} rows": {"burn_in": n} for n in (unroll_length // 4, unroll_length // 2, unroll_length)}
    return {"stored": {}, **quarters, "refreshed": {"refresh_states": True}}


Learned = tuple[dict[str, Any], dict[str, Any]]
"""State dicts of a policy and its optimizer."""


class Stream:
    """One worker and one learner, in lock step at a given lag."""

    def __init__(
        self,
        config: Config,
        lag: int,
        learned: Learned | None = None,
        *,
        burn_in: int = 0,
        refresh_states: bool = False,
    ) -> None:
        spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
        setup = WorkerSetup(
            env_id=config.env.id,
            env_kwargs=config.env.kwargs,
            env_options=config.env.options,
            num_envs=config.env.num_envs,
            unroll_length=config.actor.unroll_length,
            run_id="bench",
            seed=config.seed,
            observation=observation_of(spec),
            actions=actions_of(spec),
            burn_in=burn_in,
        )
        torch.manual_seed(config.seed)
        policy = setup.make_policy(config.policy.initialization)
        settings = dataclasses.replace(config.learner, refresh_states=refresh_states, batch_size=config.env.num_envs)
        self.learner = Learner(policy, settings, CPU, num_threads=1, seed=config.seed)
        if learned is not None:
            policy.load_state_dict(learned[0])
            self.learner.optimizer.load_state_dict(copy.deepcopy(learned[1]))
        self.worker: RolloutWorker = setup.make_worker(0, 0)
        self.assembler = BatchAssembler(self.worker.spec, config.env.num_envs)
        self._published: deque[Weights] = deque(maxlen=lag + 1)
        self._history: deque[TensorDict] = deque(maxlen=HISTORY)

    def step(self) -> dict[str, float]:
        """One unroll and its update; what was measured, once there is enough history."""
        policy = self.learner.policy
        self._published.append(flatten_weights(policy, self.learner.policy_version))
        payload = self.worker.rollout(self._published[0])
        batch = self.assembler.assemble([from_bytes(self.worker.spec, payload)]).clone()
        found = self._measure(batch) if len(self._history) == HISTORY else {}
        self._history.append(batch)
        start = time.perf_counter()
        self.learner.update(batch)
        return {**found, "seconds": time.perf_counter() - start}

    def _measure(self, batch: TensorDict) -> dict[str, float]:
        policy = self.learner.policy
        state = stored_state(policy.core, self._history[0])
        for earlier in self._history:
            state = final_state(policy, with_state(policy.core, earlier, state), CPU)
        used = stored_state(policy.core, self.learner.with_start_states(batch))
        running = ~batch["is_first"][:, 0]
        reference, start = (torch.cat(parts, 0).transpose(0, 1).flatten(1)[running] for parts in (state, used))
        with torch.no_grad():
            values = [policy.step(batch["obs"][:, 0], batch["is_first"][:, 0], s)[0].value for s in (state, used)]
        return {
            "staleness": float(((start - reference).norm(dim=1) / reference.norm(dim=1)).mean()),
            "value": float((values[0] - values[1])[running].abs().mean()),
        }


def warm_up(config: Config, updates: int) -> Learned:
    """The result of ``updates`` updates in lock step."""
    stream = Stream(config, 0)
    for _ in range(updates):
        stream.step()
    stream.worker.close()
    return stream.learner.policy.state_dict(), stream.learner.optimizer.state_dict()


def run(config: Config, lag: int, learned: Learned, updates: int) -> dict[str, dict[str, list[float]]]:
    """Measurements by way and quantity; the ways take turns, so that a busy machine is busy for all of them."""
    settings = ways(config.actor.unroll_length)
    streams = {name: Stream(config, lag, learned, **which) for name, which in settings.items()}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in streams}
    for _ in range(HISTORY + lag + updates):
        measured = {name: stream.step() for name, stream in streams.items()}
        for name, numbers in measured.items():
            if "staleness" in numbers:
                found[name]["staleness"].append(numbers["staleness"])
                found[name]["value"].append(numbers["value"])
                found[name]["cost"].append(numbers["seconds"] / measured["stored"]["seconds"])
    for stream in streams.values():
        stream.worker.close()
    return {name: {what: values[lag:] for what, values in numbers.items()} for name, numbers in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--updates", type=int, default=24, help="measured, per lag and way")
    parser.add_argument("--warmup", type=int, default=150, help="updates before")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config, problems = load_config(options.config or ["forage"], options.settings or ["env.num_envs=32"])
    problems = [problem for problem in problems if not problem.startswith("learner.batch_size")]
    if problems:
        raise SystemExit("\n".join(problems))
    torch.set_num_threads(1)
    keep_freed_memory()
    print(
        f"{config.env.id}, {config.env.num_envs} slots, unrolls of {config.actor.unroll_length}, "
        f"median [lowest .. highest] of {options.updates} updates after {options.warmup}"
    )
    print(f"{'lag':>4}  {'start':<20} {'staleness':<24} {'|dV|':<26} update seconds / stored")
    learned = warm_up(config, options.warmup)
    rows = []
    for lag in LAGS:
        for name, numbers in run(config, lag, learned, options.updates).items():
            row: dict[str, Any] = {"lag": lag, "start": name}
            for what, values in numbers.items():
                row[what] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            rows.append(row)
            texts = [
                f"{row[w]['median']:.4f} [{row[w]['min']:.4f} .. {row[w]['max']:.4f}]" for w in ("staleness", "value")
            ]
            print(f"{lag:>4}  {name:<20} {texts[0]:<24} {texts[1]:<26} {row['cost']['median']:.2f}", flush=True)
    if options.json:
        print(json.dumps({"bench": "staleness", "rows": rows}))


if __name__ == "__main__":
    main()
