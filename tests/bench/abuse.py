"""Attacks on every intake of the service: ``shoal bench abuse [--only TARGET ...] [--minutes 20] [--seed N] [--json]``.

Trajectories, checkpoints, settings, requests to the metrics and run directories are forged, damaged and misshapen by
properties of hypothesis (``tests/helpers/attacks``), in processes under a limit of memory. Each must be taken, or
refused with its documented error, within seconds. Exit 1 where anything else came of one. Its attack is printed; once
it is mended it becomes a line of ``tests/helpers/attacks/corpus/TARGET.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = str(ROOT / "tests" / "helpers")
sys.path.append(HELPERS)
# The processes that are attacked import them, too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), HELPERS)))
from attacks import MODULES  # noqa: E402  (found by the path above)
from attacks.campaign import campaign  # noqa: E402  (found by the path above)


def main() -> int:
    parser = argparse.ArgumentParser(prog="shoal bench abuse", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MODULES), default=list(MODULES), metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=20, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks")
    parser.add_argument("--memory", type=float, default=8, help="GiB of address space for each process")
    parser.add_argument("--at-once", type=int, default=1, help="targets attacked at the same time")
    parser.add_argument("--directory", type=Path, help="where what is found lies; by default a temporary one")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    directory = (options.directory or Path(tempfile.mkdtemp(prefix="shoal-abuse-"))).resolve()

    def attack(name: str) -> dict[str, object]:
        return campaign(name, directory / name, minutes=options.minutes, first_seed=options.seed, memory=options.memory)

    with ThreadPoolExecutor(options.at_once) as pool:
        found = list(pool.map(attack, options.only))
    if options.json:
        print(json.dumps(found))
    else:
        for each in found:
            faults = each.pop("faults")
            print(", ".join(f"{name}: {value}" for name, value in each.items()))
            for fault in faults:
                print(json.dumps(fault, indent=1))
            each["faults"] = faults
    return 1 if any(each["faults"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
