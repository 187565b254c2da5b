"""Whether learning depends on the user's units: ``shoal bench units [--seeds 2] [--only pendulum ...] [--json]``.

CartPole, Pendulum and the memory task, with rewards times 0.001 and 1000, observations times 0.001 and 1000, and
observations shifted by 1000, each trained from the same seeds with default settings in one process. Printed is the mean
return of 100 episodes played afterwards, in the environment's own unit, and by how much the worst unit is behind the
environment's own, beside what seeds alone make of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
TASKS = {"cartpole": ("CartPole", 100_000), "pendulum": ("Pendulum", 200_000), "recall": ("Recall", 150_000)}
"""Environment and steps by name."""
UNITS = {
    "its own": {},
    "rewards / 1000": {"reward": 0.001},
    "rewards x 1000": {"reward": 1000.0},
    "observations / 1000": {"scale": 0.001},
    "observations x 1000": {"scale": 1000.0},
    "observations + 1000": {"shift": 1000.0},
}


def trained(task: str, units: str, seed: int) -> float:
    """Mean return of 100 episodes after one run, in the environment's own unit."""
    name, steps = TASKS[task]
    with tempfile.TemporaryDirectory(prefix="shoal-units-") as directory:
        run = Path(directory, "run")
        arguments = [f"env.id=unit_envs:{name}InUnits-v1", f"env.kwargs={json.dumps(UNITS[units])}", f"seed={seed}"]
        arguments += [f"total_env_steps={steps}", f"run_dir={run}", "mode=inline", "learner.num_threads=1"]
        path = os.pathsep.join([HELPERS, *sys.path])
        for words in (["train", *arguments, "metrics.port=-1"], ["evaluate", str(run), "--episodes", "100", "--json"]):
            done = subprocess.run(
                [sys.executable, "-m", "shoal", *words],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{task}, {units}, seed {seed}: {done.stdout}{done.stderr}")
        found: float = json.loads(done.stdout)["mean_return"]
    return found / UNITS[units].get("reward", 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="runs of every environment in every unit")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="some of the environments")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side, a core each")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    rows = []
    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        for task in options.only:
            runs = {
                units: [pool.submit(trained, task, units, seed) for seed in range(1, options.seeds + 1)]
                for units in UNITS
            }
            for units, made in runs.items():
                returns = [run.result() for run in made]
                rows.append({"task": task, "units": units, "returns": returns})
                print(f"{task:<10} {units:<22}" + "".join(f"{one:10.4g}" for one in returns), flush=True)
            means = [statistics.mean(row["returns"]) for row in rows if row["task"] == task]
            own = rows[-len(UNITS)]["returns"]
            behind, spread = means[0] - min(means), max(own) - min(own)
            print(f"{task:<10} the worst unit is {behind:.4g} behind its own, whose seeds differ by {spread:.4g}")
    if options.json:
        print(json.dumps({"bench": "units", "rows": rows}))


if __name__ == "__main__":
    main()
