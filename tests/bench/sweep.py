"""The choices of ``auto`` beside settings chosen by hand: ``shoal bench sweep [--config FILE] [key=value ...]``.

Every layout trains the same batches: only who acts, who learns, in how many processes and with how many slots differs.
They alternate over the rounds. Run it alone on the machine; the ratios are for its number of cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from limit import service
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import LayoutError, Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.learner.device_choice import make_device_path


def candidates(cores: int, batch: int) -> dict[str, list[str]]:
    """Settings by name, the chosen ones first."""
    found = {"auto": []}
    for learners in sorted({max(1, cores // 2), cores, cores + 1, 2 * cores}):
        for slots in sorted({batch // learners, batch // (2 * learners)}):
            found[f"{learners} learners that act on {slots}"] = [
                "placement=colocated",
                f"learner.num_learners={learners}",
                f"env.num_envs={slots}",
            ]
    for actors in sorted({max(1, cores // 2), cores}):
        for threads in sorted({max(1, cores - actors), cores}):
            found[f"{actors} actors of {batch // actors}, {threads} gradient threads"] = [
                "placement=disaggregated",
                f"actor.num_actors={actors}",
                f"learner.num_threads={threads}",
                f"env.num_envs={batch // actors}",
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each layout, per round")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    files = [part for file in options.config for part in ("--config", file)]
    config, problems = load_config(options.config, options.settings)
    if problems:
        sys.exit("\n".join(problems))
    cores, accelerator = available_cores(), make_device_path(config.learner).device.type != "cpu"
    batch = choose_layout(config, Machine(cores=cores, accelerator=accelerator)).batch_size
    chosen = {}
    for name, settings in candidates(cores, batch).items():
        arguments = [*options.settings, f"learner.batch_size={batch}", *settings]
        made, problems = load_config(options.config, arguments)
        try:
            choose_layout(made, Machine(cores=cores, accelerator=accelerator))
        except LayoutError:
            continue
        if not problems:
            chosen[name] = [*files, *arguments]
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for i in range(options.rounds):
        for name in chosen if i % 2 == 0 else reversed(list(chosen)):
            rates[name].append(service(chosen[name], options.seconds, warmup=4.0)[0])
            print(f"round {i + 1}: {name:<44} {rates[name][-1]:>9,.0f} env steps/s", flush=True)
    print(f"\n{config.env.id}, batches of {batch} segments, {cores} cores")
    print("median [lowest .. highest] environment steps/s, and the same over auto's of the same round")
    for name, found in rates.items():
        ratios = [rate / auto for rate, auto in zip(found, rates["auto"], strict=True)]
        print(
            f"  {name:<44} {statistics.median(found):>9,.0f} [{min(found):,.0f} .. {max(found):,.0f}]"
            f"   {statistics.median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]"
        )
    if options.json:
        print(json.dumps({"cores": cores, "batch_size": batch, "rates": rates}))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
