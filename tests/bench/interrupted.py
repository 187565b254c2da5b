"""Runs that are killed and resumed, against the same left alone: ``shoal bench interrupted [--kills 200] [--json]``.

Small runs in one process over several environments are killed with SIGKILL at moments drawn by chance, half of them
while a checkpoint is written, until they come to their end. Weights, ledger, episodes and mean return are compared.
Exit 1 where any differ; the directory of such a run is kept.
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
from kills import CASES, trial  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="shoal bench interrupted", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--case", action="append", choices=list(CASES), help="by default all of them in turn")
    parser.add_argument("--directory", type=Path, help="where the runs lie; by default a temporary one")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="shoal-interrupted-"))
    found = trial(directory, options.case or list(CASES), options.kills, options.seed)
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['kills']} kills in {found['runs']} runs, {found['kills during a write']} of them during a write "
            f"and {found['kills before the first checkpoint']} before the first checkpoint: {len(found['different'])} "
            "runs ended otherwise than left alone"
        )
        for each in found["different"]:
            print(json.dumps(each))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
