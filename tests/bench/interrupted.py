"""Runs that are killed and resumed: ``shoal bench interrupted [--mode inline] [--kills 200] [--json]``.

Small runs are killed with SIGKILL at moments drawn by chance, half of them while a checkpoint is written, until they
come to their end. In one process, over several environments, weights, ledger, episodes and mean return are those of the
same runs left alone. With ``--mode local`` (30 kills) the command of a run with processes of its own is killed, also in
its start: each session goes on from the last whole checkpoint, every step is counted once, the curve goes on, and no
process is left. Exit 1 where any of that does not hold; the directory of such a run is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
sys.path.append(HELPERS)
# Environments in processes of their own import their modules, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), HELPERS)))
from _own_ray import own_ray  # noqa: E402  (found by the path above)
from kills import CASES, trial  # noqa: E402  (found by the path above)
from local_kills import LOCAL_CASES, local_trial  # noqa: E402  (found by the path above)


def main() -> int:
    parser = argparse.ArgumentParser(prog="shoal bench interrupted", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["inline", "local"], default="inline", help="of the runs")
    parser.add_argument("--kills", type=int, help="in all; 200, with --mode local 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--case", action="append", choices=[*CASES, *LOCAL_CASES], help="by default all in turn")
    parser.add_argument("--directory", type=Path, help="where the runs lie; by default a temporary one")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    cases = LOCAL_CASES if options.mode == "local" else CASES
    if others := [case for case in options.case or () if case not in cases]:
        parser.error(f"--case {', '.join(others)}: with --mode {options.mode} there are {', '.join(cases)}")
    directory = options.directory or Path(tempfile.mkdtemp(prefix="shoal-interrupted-"))
    if options.mode == "local":
        own_ray()
        found = local_trial(directory, options.case or list(cases), options.kills or 30, options.seed)
        kind, wrong = "wrong", "things are wrong"
        before = found["kills before the session's first checkpoint"]
        moment = "before the first checkpoint of their session"
    else:
        found = trial(directory, options.case or list(cases), options.kills or 200, options.seed)
        kind, wrong = "different", "runs ended otherwise than left alone"
        before, moment = found["kills before the first checkpoint"], "before the first checkpoint"
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['kills']} kills in {found['runs']} runs, {found['kills during a write']} of them during a write "
            f"and {before} {moment}: {len(found[kind])} {wrong}"
        )
        for each in found[kind]:
            print(json.dumps(each))
    return 1 if found[kind] else 0


if __name__ == "__main__":
    sys.exit(main())
