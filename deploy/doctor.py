"""``shoal doctor``: what a run would find on this machine, how it would be laid out and why; nothing is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploy import preflight
from deploy.config import Config
from deploy.hardware import available_cores
from deploy.layout import Layout, LayoutError, choose_layout
from deploy.summary import versions

GIB = 2**30


def examine(config: Config, run_dir: Path) -> tuple[list[str], list[str]]:
    """(lines to read, problems that keep a run with this configuration from starting)."""
    problems = preflight.check(config, run_dir)
    lines = _machine(run_dir) + _layout(config)
    lines += ["versions", "  " + ", ".join(f"{name} {version}" for name, version in versions().items())]
    return lines, problems


def _machine(run_dir: Path) -> list[str]:
    import torch

    cores, all_cores = available_cores(), os.cpu_count() or 1
    limited = f" of {all_cores}, as this process may use no others" if cores < all_cores else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    accelerators = gpus or (["Apple MPS"] if torch.backends.mps.is_available() else [])
    lines = [
        "machine",
        f"  cores          {cores}{limited}",
        f"  accelerators   {', '.join(accelerators) or 'none'}",
    ]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines.append(f"  memory         {free / GIB:.1f} GiB free")
    places = {"run directory": next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())}
    if Path("/dev/shm").is_dir():
        places["shared memory"] = Path("/dev/shm")
    lines += [f"  {name:<14} {shutil.disk_usage(path).free / GIB:.1f} GiB free" for name, path in places.items()]
    return lines


def _layout(config: Config) -> list[str]:
    from learner.device_choice import DeviceNotFound, make_device_path

    try:
        path = make_device_path(config.learner)
        layout = choose_layout(config, cores=available_cores(), accelerator=path.device.type != "cpu")
    except (DeviceNotFound, LayoutError):
        return []  # among the problems
    steps = layout.batch_size * config.actor.unroll_length
    lines = [
        f"layout (mode {config.mode})",
        f"  placement      {layout.placement}: {layout.why}",
        *_processes(config, layout),
        f"  update         {layout.batch_size} segments x {config.actor.unroll_length} steps = {steps:,} environment "
        f"steps, in {config.learner.minibatches * config.learner.epochs} optimizer steps",
        f"  arithmetic     {path.describe()}; acting is always float32, so that log-probabilities can be compared",
    ]
    if layout.placement == "shared":
        idle = layout.cores - layout.num_learners
        if idle > 0 and config.mode != "inline":
            lines.append(
                f"  idle           {idle} cores: learner.batch_size must be a multiple of learners x env.num_envs x "
                "learner.minibatches; auto sizes it to the machine"
            )
    return lines


def _processes(config: Config, layout: Layout) -> list[str]:
    slots = f"{config.env.num_envs} slots"
    if config.mode == "inline":
        return [
            f"  processes      1, which runs {layout.num_actors} rollout workers of {slots} and all updates in turn"
        ]
    threads = "one torch thread each: threads of several processes that wait for each other spin"
    if layout.placement == "shared":
        actors = layout.num_actors // layout.num_learners
        workers = f"{actors} rollout workers of {slots}" if actors > 1 else slots
        return [
            f"  learners       {layout.num_learners}, each acting on {workers} and learning from them",
            f"  threads        {threads}",
        ]
    return [
        f"  actors         {layout.num_actors} processes of {slots}",
        f"  learner        1, gradient threads: {layout.num_threads}",
        f"  threads        {threads}",
    ]
