"""What is learned with default settings: ``shoal bench learn [--only NAME ...] [--seeds N] [--json]``.

Every row of the suite (``suite/rows.py``) is an environment, a mean return that counts as learned, and the environment
steps allowed for it. It is trained by ``shoal train`` with the default settings, as a user would, and then evaluated by
``shoal evaluate``. Printed are, over the seeds:

- reached: how many had the mean return of 100 training episodes at the threshold, within the budget; after how many
  environment steps and seconds of wall clock, the command's start included: median [lowest .. highest];
- best in training: the highest such mean, the median over seeds;
- final: mean return of 100 episodes with the trained weights, actions sampled and greedy, +- half of the 95% interval
  over seeds; and what uniformly random actions return.

``--peer`` trains other libraries in place of shoal, each in a virtual environment of its own, with the settings that
their own projects recommend (``suite/recommended.yaml``).

Every trial's numbers and curve are a line of OUT/trials.jsonl. Those that are there already are not made again, so
``--out`` goes on with what was interrupted, and sets systems side by side. ``--show`` tells without training what such
directories hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.run import VENVS, install
from shoal.deploy.settings.load import load_config
from suite import peers, picture, table
from suite.processes import Failed
from suite.rows import ROWS, Row, missing
from suite.trial import OURS, ROOT, Asked, Trial, train

TRIALS = "trials.jsonl"
Train = Callable[[Row, Asked, Path], Trial]


def main() -> int:
    """0: all was trained; 1: something failed; 2: bad arguments; 130 or 143: interrupted."""
    options = _options()
    if options.list:
        print(_listing())
        return 0
    skipped: dict[str, str] = {}
    code = 0
    if options.show:
        trials = load(options.show)
    else:
        out: Path = options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        planned, skipped = plan(options)
        for name, why in skipped.items():
            print(f"{name}: skipped, {why}", flush=True)
        try:
            trainers = {OURS: train} | {system: peer_trainer(system, options.venvs) for system in options.peer}
            code = work(planned, trainers, out)
        except subprocess.CalledProcessError as error:
            print(f"a peer cannot be installed: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            code = 130
        except SystemExit as interrupted:  # of the handler of SIGTERM
            code = int(interrupted.code or 0)
        trials = load([out])
        print(f"trials: {out / TRIALS}")
    found = table.results(trials)
    print("\n" + (table.as_markdown if options.markdown else table.as_text)(found, ROWS))
    if options.plot is not None:
        picture.draw(found, trials, ROWS, options.plot)
        print(f"\ncurves: {options.plot}")
    if options.json:
        print(json.dumps(as_json(found, trials, skipped)))
    return code


def plan(options: argparse.Namespace) -> tuple[list[Asked], dict[str, str]]:
    """The trials that were asked for, row by row, and why rows are skipped, by row and system."""
    planned: list[Asked] = []
    skipped: dict[str, str] = {}
    for row in (ROWS[name] for name in options.only):
        for system in options.peer or [OURS]:
            ours = system == OURS
            if why := missing(row) if ours else not_for(system, row):
                skipped[f"{row.name}, {system}"] = why
                continue
            recipe = row.recipe if options.recipe is None else options.recipe
            planned += [
                Asked(
                    system=system,
                    row=row.name,
                    seed=seed,
                    budget=max(1, round(row.env_steps * options.budget_scale)),
                    threshold=row.threshold,
                    recipe=recipe if ours else "",
                    settings=tuple(options.set) if ours else (),
                )
                for seed in range(options.seeds or row.seeds)
            ]
    return planned, skipped


def work(planned: Sequence[Asked], trainers: dict[str, Train], out: Path) -> int:
    """Train what is planned and not in ``out`` yet; 1 where something failed, else 0."""
    done = {trial.asked for trial in load([out]) if not trial.error}
    code = 0
    for asked in planned:
        head = f"{asked.row}, {asked.system}, seed {asked.seed}"
        if asked in done:
            print(f"{head}: is there already", flush=True)
            continue
        trial = attempt(trainers[asked.system], ROWS[asked.row], asked, out)
        with (out / TRIALS).open("a") as file:
            file.write(json.dumps(trial.to_json()) + "\n")
        code = code or int(bool(trial.error))
        print(f"{head}: {told(trial)}", flush=True)
    return code


def peer_trainer(system: str, venvs: Path) -> Train:
    """Trains a peer, which is installed where it is not there yet."""
    return functools.partial(peers.train, python=install(peers.PEERS[system].venv, venvs.resolve()))


def not_for(system: str, row: Row) -> str:
    """Why a peer is not tried on a row; empty where it is."""
    return "" if peers.recommended(system, row.name) else "suite/recommended.yaml has no settings for it"


def attempt(train: Train, row: Row, asked: Asked, out: Path) -> Trial:
    """One trial, in a new directory below ``out``; a failure is one of its results."""
    name, again = f"{asked.row}-{asked.system}-{asked.seed}", 0
    while (directory := out / (f"{name}-{again}" if again else name)).exists():
        again += 1
    print(f"{asked.row}, {asked.system}, seed {asked.seed}: trains, log {directory / 'train.log'}", flush=True)
    try:
        return train(row, asked, directory)
    except Failed as error:
        return Trial(asked=asked, error=str(error))


def load(directories: Sequence[Path]) -> list[Trial]:
    """The trials that the directories hold. Of those asked for alike the last counts: what failed may have been tried
    again."""
    found: dict[Asked, Trial] = {}
    for directory in directories:
        path = directory / TRIALS
        for line in path.read_text().splitlines() if path.exists() else ():
            trial = Trial.of_json(json.loads(line))
            found[trial.asked] = trial
    return list(found.values())


def told(trial: Trial) -> str:
    """One line for a trial that has just ended."""
    if trial.error:
        return f"failed: {trial.error}"
    when = "not reached"
    if trial.reached is not None:
        when = f"reached after {trial.reached.env_steps:,} steps and {trial.reached.seconds:,.0f} s"
    numbers = {
        "best in training": trial.best,
        "final sampled": trial.sampled,
        "greedy": trial.greedy,
        "random": trial.random,
    }
    said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
    return f"{when}; {said}; {trial.seconds:,.0f} s in all"


def as_json(found: Sequence[table.Result], trials: Sequence[Trial], skipped: dict[str, str]) -> dict[str, Any]:
    """What the line of ``--json`` holds: ``results`` by environment and system, the ``trials`` behind them without
    their curves, and why environments were ``skipped``."""
    results = [{k: v for k, v in dataclasses.asdict(one).items() if k != "asked"} for one in found]
    return {
        "results": results,
        "trials": [{k: v for k, v in trial.to_json().items() if k != "curve"} for trial in trials],
        "skipped": skipped,
    }


def _listing() -> str:
    lines = []
    for row in ROWS.values():
        seeds = f"{row.seeds} seed" + ("s" if row.seeds > 1 else "")
        kind = ", an aim" if row.aim else ""
        lines.append(f"{row.name:<20} {row.env_id}: {row.threshold:g} by {row.env_steps:,} steps, {seeds}{kind}")
        if why := missing(row):
            lines.append(f"{'':<20} {why}")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="shoal bench learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=_positive, metavar="N", help="the first N seeds (default: see --list)")
    parser.add_argument("--budget-scale", type=_share, default=1.0, metavar="X", help="this share of the steps only")
    parser.add_argument("--recipe", metavar="NAME", help="shoal train --config NAME; '' for the default settings")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings for shoal train")
    parser.add_argument(
        "--peer", nargs="+", choices=peers.PEERS, default=[], metavar="NAME", help=", ".join(peers.PEERS)
    )
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where peers are installed (default .bench-venvs)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=_new_directory(), help="directory (default: new)")
    parser.add_argument("--show", nargs="+", type=Path, default=[], metavar="DIR", help="only tell what these hold")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves, e.g. curves.svg")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--list", action="store_true", help="only list the environments")
    options = parser.parse_args()
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is not installed: pip install 'shoal[suite]'")
    _, problems = load_config([options.recipe] if options.recipe else [], options.set)
    if problems:
        parser.error("\n  ".join(problems))
    return options


def _positive(word: str) -> int:
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be at least 1")
    return number


def _share(word: str) -> float:
    if not 0 < (number := float(word)) <= 1:
        raise argparse.ArgumentTypeError(f"{word} must lie above 0, and be at most 1")
    return number


def _new_directory() -> Path:
    return ROOT / "runs" / f"learn-{datetime.datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    os.chdir(ROOT)
    # So that a bench that is told to end also ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
