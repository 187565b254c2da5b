"""shoal against its peers, side by side: the same network, nearly free environment, slots and rollouts.

    python tests/bench/peers/run.py [--rounds 3] [--seconds 60] [--only NAME ...] [--images] [--sweep] [--json]

Every peer runs in a virtual environment of its own, made here. The systems alternate over the rounds, each measured in
environment steps trained per second after a warm-up; run it alone on the machine. Absolute figures do not travel, the
ratios do. README.md beside this file says what is equal and what is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The benches beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from suite.processes import descendants, end, last_words

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
VENVS = ROOT / ".bench-venvs"
START_SECONDS = 240.0
"""Seconds that a peer may take to start, on top of warm-up and window."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to run a peer."""

    options: dict[str, Any]
    malloc: bool = True
    """glibc is told to keep large blocks, as shoal does by itself."""

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        return " ".join([*words, "malloc=" + ("tuned" if self.malloc else "plain")])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An adapter script, the virtual environment it runs in, and how to run it."""

    script: str
    venv: str
    best: Setting
    others: tuple[Setting, ...]
    """Settings that ``--sweep`` tries besides ``best``."""


def sample_factory(*, malloc: bool = True, **options: Any) -> Setting:
    common = {
        "batched_sampling": True,
        "async_rl": True,
        "num_workers": 1,
        "num_envs_per_worker": 1,
        "worker_num_splits": 1,
        "set_workers_cpu_affinity": False,
    }
    return Setting(options=common | options, malloc=malloc)


def rllib(algorithm: str, *, malloc: bool = True, **options: Any) -> Setting:
    common = {"algorithm": algorithm, "runners": 1, "learners": 0, "threads": 1, "timeout": 0.05}
    return Setting(options=common | options, malloc=malloc)


def rllib_others(algorithm: str) -> tuple[Setting, ...]:
    return (
        rllib(algorithm, malloc=False),
        rllib(algorithm, threads=2),
        rllib(algorithm, runners=2),
        rllib(algorithm, learners=1),
        rllib(algorithm, timeout=0.0),
        rllib(algorithm, learners=1, timeout=0.0),
        rllib(algorithm, max_seq_len=64),
    )


PEERS = {
    "sample-factory": Peer(
        script="run_sample_factory.py",
        venv="sample-factory",
        best=sample_factory(num_workers=2),
        others=(
            sample_factory(num_workers=2, malloc=False),
            sample_factory(),
            sample_factory(async_rl=False),
            sample_factory(num_envs_per_worker=2, worker_num_splits=2),
            sample_factory(num_workers=2, num_envs_per_worker=2, worker_num_splits=2),
            sample_factory(num_workers=1, num_envs_per_worker=64, worker_num_splits=2, batched_sampling=False),
            sample_factory(num_workers=2, num_envs_per_worker=32, worker_num_splits=2, batched_sampling=False),
        ),
    ),
    "sb3": Peer(
        script="run_sb3.py",
        venv="sb3",
        best=Setting(options={"threads": 2}),
        others=(
            Setting(options={"threads": 2}, malloc=False),
            Setting(options={"threads": 1}),
            Setting(options={"threads": 1}, malloc=False),
        ),
    ),
    "rllib-impala": Peer(script="run_rllib.py", venv="rllib", best=rllib("IMPALA"), others=rllib_others("IMPALA")),
    "rllib-appo": Peer(script="run_rllib.py", venv="rllib", best=rllib("APPO"), others=rllib_others("APPO")),
}
SHOAL = "shoal"
ONE_STEP = ["actor.unroll_length=64", "learner.epochs=1", "learner.minibatches=1"]
"""Every step is trained once, in whole batches: the work that the others do in one environment step."""
OURS = {
    SHOAL: [*ONE_STEP, "env.num_envs=64"],
    "shoal-64": [*ONE_STEP, "env.num_envs=32", "learner.batch_size=64"],
}
"""Our defaults, and as many slots and segments in all as the peers have (on two cores)."""


def install(name: str, venvs: Path) -> Path:
    """The interpreter of a virtual environment, made where it is not there as its requirements ask."""
    requirements = HERE / f"requirements-{name}.txt"
    venv = venvs / name
    python, stamp = venv / "bin" / "python", venv / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {requirements.name} into {venv} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    command = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--prefer-binary"]
    subprocess.run(["nice", *map(str, command), "-r", str(requirements)], check=True)
    stamp.write_text(wanted)
    return python


def install_all(names: Sequence[str], venvs: Path) -> dict[str, Path]:
    """The interpreters of the peers among ``names``; who cannot be installed is told and missing."""
    pythons = {}
    for name in names:
        if name not in PEERS:
            continue
        try:
            pythons[name] = install(PEERS[name].venv, venvs.resolve())
        except subprocess.CalledProcessError as error:
            print(f"{name} cannot be installed: {error}", flush=True)
    return pythons


def command(peer: Peer, setting: Setting, python: Path, **options: Any) -> tuple[list[str], dict[str, str]]:
    """The command that starts an adapter, and its environment."""
    words = [str(python), str(HERE / peer.script), "--settings", json.dumps(setting.options)]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "RAY_"))}
    environment |= {"PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
    return words, environment | (MALLOC if setting.malloc else {})


def run_for(
    words: list[str], environment: dict[str, str], timeout: float, enough: Callable[[], bool] = lambda: False
) -> tuple[str, int | None]:
    """Run a system until it ends, ``enough()`` or ``timeout`` seconds are over; what it said, and its exit code where
    it ended by itself. Nothing that it started is left."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory(prefix="peer") as directory:
        process = subprocess.Popen(
            words,
            cwd=directory,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        seen: set[int] = set()
        try:
            deadline = time.monotonic() + timeout
            while process.poll() is None and time.monotonic() < deadline and not enough():
                # Daemons of a peer leave its process group; they are remembered while they still hang below it.
                seen |= set(descendants(process.pid))
                time.sleep(1.0)
            code = process.poll()
        finally:
            end(process, seen)
        output.seek(0)
        return output.read(), code


def measure_peer(
    peer: Peer, setting: Setting, python: Path, task: str, seconds: float, warmup: float
) -> dict[str, Any]:
    """Run the adapter once; its result with ``rate``.

    Raises:
        RuntimeError: the peer failed or gave no result in time; the message ends with what it said last.
    """
    timeout = seconds + warmup + START_SECONDS
    text, code = run_for(*command(peer, setting, python, task=task, seconds=seconds, warmup=warmup), timeout)
    for line in reversed(text.splitlines()):
        if line.startswith('{"env_steps"'):
            result = json.loads(line)
            return {**result, "rate": result["env_steps"] / result["seconds"]}
    why = f"gave no result in {timeout:.0f} s" if code is None else f"ended with {code}"
    raise RuntimeError(f"{why}; it said last:\n    {last_words(text)}")


def measure_shoal(name: str, task: str, seconds: float, warmup: float) -> dict[str, Any]:
    """Run ``shoal train``."""
    from limit import service

    own = ["env.id=vector_env:images-v0", "env.vectorization=native"] if task == "images" else ["env.id=synthetic"]
    rate, _ = service([*own, "mode=local", *OURS[name]], seconds, warmup)
    names = ("shoal", "ray", "torch", "numpy")
    return {"rate": rate, "versions": {name: importlib.metadata.version(name) for name in names}}


def spread(values: Sequence[float], form: str) -> str:
    """``median [lowest..highest]``."""
    return f"{statistics.median(values):{form}} [{min(values):{form}}..{max(values):{form}}]"


def show(results: dict[str, list[dict[str, Any] | None]], versions: dict[str, dict[str, str]]) -> None:
    """The table, and the exact versions below it."""
    print(f"\n{'':<16} {'env steps/s':<28} {'shoal / peer, per round':<26} settings")
    for name, rounds in results.items():
        rates = [one["rate"] for one in rounds if one]
        if not rates:
            print(f"{name:<16} failed")
            continue
        pairs = zip(results.get(SHOAL, []), rounds, strict=False)
        ratios = [own["rate"] / one["rate"] for own, one in pairs if own and one] if name not in OURS else []
        ratio = spread(ratios, ".2f") if ratios else ""
        settings = " ".join(OURS[name]) or "defaults" if name in OURS else str(PEERS[name].best)
        print(f"{name:<16} {spread(rates, ',.0f'):<28} {ratio:<26} {settings}")
    print()
    for name, found in versions.items():
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in found.items()))


def compare(names: list[str], pythons: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """All systems in turn, round by round, in an order that turns around every time."""
    results: dict[str, list[dict[str, Any] | None]] = {name: [] for name in names}
    versions: dict[str, dict[str, str]] = {}
    for i in range(options.rounds):
        for name in names if i % 2 == 0 else reversed(names):
            try:
                if name in OURS:
                    result = measure_shoal(name, options.task, options.seconds, options.warmup)
                else:
                    peer = PEERS[name]
                    result = measure_peer(peer, peer.best, pythons[name], options.task, options.seconds, options.warmup)
            except Exception as error:  # noqa: BLE001 - one system's failure must not stop the others
                results[name].append(None)
                print(f"round {i + 1}: {name} failed: {error}", flush=True)
            else:
                results[name].append(result)
                versions[name] = result.pop("versions")
                print(f"round {i + 1}: {name:<16} {result['rate']:>10,.0f} env steps/s", flush=True)
    show(results, versions)
    settings = {name: str(PEERS[name].best) for name in names if name not in OURS}
    return {"rounds": results, "versions": versions, "settings": settings}


def sweep(names: list[str], pythons: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Every setting of every peer once, briefly."""
    found: dict[str, dict[str, float | str]] = {}
    for name in names:
        if name in OURS:
            continue
        peer = PEERS[name]
        found[name] = {}
        for setting in (peer.best, *peer.others):
            try:
                rate = measure_peer(peer, setting, pythons[name], options.task, options.seconds, options.warmup)["rate"]
            except Exception as error:  # noqa: BLE001 - one setting's failure must not stop the others
                found[name][str(setting)] = str(error)
                print(f"{name}: {'failed':>10}  {setting}\n    {error}", flush=True)
            else:
                found[name][str(setting)] = rate
                mark = " (best so far used)" if setting is peer.best else ""
                print(f"{name}: {rate:>10,.0f}  {setting}{mark}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="measured per run; 60, or 20 with --sweep")
    parser.add_argument("--warmup", type=float, default=15.0, help="seconds of training before that")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], metavar="NAME", help=", ".join([*OURS, *PEERS]))
    parser.add_argument(
        "--images", dest="task", action="store_const", const="images", default="free", help="in place of tokens"
    )
    parser.add_argument("--sweep", action="store_true", help="try every setting of every peer instead")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the peers are installed")
    options = parser.parse_args()
    options.seconds = options.seconds or (20.0 if options.sweep else 60.0)
    names = options.only or [*OURS, *PEERS]
    pythons = install_all(names, options.venvs)
    names = [name for name in names if name in OURS or name in pythons]
    found = (sweep if options.sweep else compare)(names, pythons, options)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(HERE)  # shoal finds vector_env by name
    # So that a bench that is told to end also ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
