"""Families of environments, each really installed, stepped and trained: ``shoal bench families [--only WORD ...]``.

Every family of ``families.yaml`` gets a virtual environment below ``--venvs``, in which it is installed above what this
one has. There its environment is stepped by random actions, and trained with its line of config for ``--steps`` steps
with ``mode=inline``, and evaluated. What cannot be installed or trained says why. Steps per second are those of every
second of processor time, so of one core, whatever else the machine does and however many threads and processes step.
It ends with 1 where a family fails that did not, or trains that ``families.yaml`` says fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import json, sys, time
import numpy as np
import psutil
from shoal.deploy.settings.load import load_config
from shoal.envs.boundary import MaskedEnvironment, StepRows
from shoal.envs.reference import random_player
from shoal.envs.registry import make_vector_env
def spent():
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in tree))
config, problems = load_config([], json.loads(sys.argv[1]))
assert not problems, problems
env = make_vector_env(config.env.id, config.env.num_envs, 0, config.env.options, **config.env.kwargs)
flags = [np.zeros(env.num_envs, bool) for _ in range(3)]
obs = np.empty((env.num_envs, *env.spec.obs_shape), env.spec.obs_dtype)
final = np.empty_like(obs) if env.spec.same_step else None
rows = StepRows(obs, flags[0], np.zeros(env.num_envs, np.float32), flags[1], flags[2], final)
rows.is_first[:] = True
player = random_player(env.spec, np.random.default_rng(0))
masks = (env.action_mask,) if env.spec.num_mask and isinstance(env, MaskedEnvironment) else ()
env.reset(obs)
steps, began, before = 0, time.perf_counter(), spent()
while time.perf_counter() - began < float(sys.argv[2]):
    env.step(player(obs, rows.is_first, *masks), rows)
    steps += env.num_envs
print("rate", steps / (spent() - before), flush=True)
env.close()
"""


def make_venv(folder: Path, requirements: list[str]) -> str:
    """Install, unless it is done; return why it cannot be, in a line, or nothing."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        # What this environment has is seen there, behind what the family brings.
        (own / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "source").mkdir()
        (folder / "source" / "shoal").symlink_to(ROOT)
        if requirements:
            words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
            # What needs older ones than shoal cannot be used beside it.
            bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
            (folder / "bounds.txt").write_text("\n".join(bounds) + "\n")
            words += ["--constraint", folder / "bounds.txt"]
            done = subprocess.run([*words, *requirements], capture_output=True, text=True, check=False)
            if done.returncode:
                return last_word(done.stderr)
        (folder / "installed").touch()
    return ""


def last_word(text: str) -> str:
    """The last line that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "WARNING" not in line]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["nothing was said"])[-1][:200]


def run(python: Path, words: list[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Exit code and what was said."""
    environment = {**os.environ, "PYTHONPATH": str(python.parent.parent / "source"), "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(
            [python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"it did not end within {seconds:.0f} seconds"
    return done.returncode, done.stdout + done.stderr


def attempt(name: str, family: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Install, step, train and evaluate one family."""
    venv = options.venvs / "".join(letter if letter.isalnum() else "-" for letter in name)
    found: dict[str, Any] = {"family": name, "settings": family["settings"], "install": family.get("with", [])}
    if why := make_venv(venv, family.get("with", [])):
        return found | {"failed": f"not installed: {why}"}
    python = venv / "bin" / "python"
    version = f"import importlib.metadata as m; print(m.version({family['version']!r}))"
    found["version"] = run(python, ["-c", version], venv, 60)[1].strip().splitlines()[-1]
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        code, said = run(python, ["-c", STEP, json.dumps(family["settings"]), str(options.seconds)], Path(folder), 300)
        rates = [line.split()[1] for line in said.splitlines() if line.startswith("rate ")]
        if code or not rates:
            return found | {"failed": f"not stepped: {last_word(said)}"}
        found["steps_per_second"] = float(rates[-1])
        small = ["mode=inline", "metrics.port=-1", "seed=1", "run_dir=run", f"total_env_steps={options.steps}"]
        code, said = run(python, ["-m", "shoal", "train", *family["settings"], *small], Path(folder), options.patience)
        if code:
            return found | {"failed": f"not trained: {last_word(said)}"}
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        words = ["-m", "shoal", "evaluate", "run", "--episodes", "8", "--max-episode-steps", "500", "--json"]
        code, said = run(python, words, Path(folder), options.patience)
        if code:
            return found | {"failed": f"not evaluated: {last_word(said)}"}
        found |= {"faults": summary.get("env_faults", 0), "return": summary["mean_return"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="families whose name has one of the words"
    )
    parser.add_argument("--venvs", type=Path, default=Path("build/families"), help="where they are installed")
    parser.add_argument("--steps", type=int, default=2000, help="environment steps to train (default 2,000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="to step with random actions (default 5)")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds of a run, at most (default 600)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    options.venvs = options.venvs.resolve()
    families = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())
    chosen = {
        name: family
        for name, family in families.items()
        if not options.only or any(word.lower() in name.lower() for word in options.only)
    }
    if not chosen:
        parser.error(f"no family has {' or '.join(options.only)} in its name; there are: {', '.join(families)}")
    rows = []
    print("| family | version | `env.id` | steps/s of a core | |\n|---|---|---|---|---|", flush=True)
    for name, family in chosen.items():
        row = attempt(name, family, options)
        rows.append(row)
        rate = f"{row['steps_per_second']:,.0f}" if "steps_per_second" in row else ""
        env_id = family["settings"][0].removeprefix("env.id=")
        said = row.get("failed", "trains")
        print(f"| {name} | {row.get('version', '')} | `{env_id}` | {rate} | {said} |", flush=True)
    if options.json:
        print(json.dumps({"families": rows}))
    unlike = [
        name
        for (name, family), row in zip(chosen.items(), rows, strict=True)
        if ("fails" in family) != ("failed" in row)
    ]
    if unlike:
        sys.exit(f"not as families.yaml has it: {', '.join(unlike)}")


if __name__ == "__main__":
    main()
