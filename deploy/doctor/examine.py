"""``shoal doctor``: describes the machine or cluster and the layout of a run, with reasons, and tries the environment;
starts no run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.actors.ray_watch import RayLost
from shoal.deploy.doctor import preflight
from shoal.deploy.doctor.first_steps import Found, first_steps
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, LayoutError, Machine, choose_layout
from shoal.deploy.placement.versions import versions
from shoal.deploy.records.run_dir import CannotStart
from shoal.deploy.settings.sections import Config
from shoal.problems import problems_of

if TYPE_CHECKING:  # Ray and torch are imported where they are used
    from shoal.deploy.cluster.connect import Cluster
    from shoal.deploy.doctor.measure import Measured
    from shoal.envs.boundary import EnvSpec

GIB = 2**30


def examine(config: Config, run_dir: Path, *, measure: bool, known: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(lines to read, problems that keep a run with this configuration from starting, beside those that are ``known``);
    ``measure`` takes seconds."""
    found = Found() if known else first_steps(config)
    if not found.answers:
        # Whatever else makes the environment would wait for it, too.
        return _machine(run_dir), [f"env.id: {problem}" for problem in found.problems]
    problems = preflight.check(config, run_dir, known)
    lines = _machine(run_dir) + _environment(config) + _played(found)
    problems += [f"env.id: {problem}" for problem in found.problems]
    agents_known = not config.policies or not (problems or known)
    if config.mode == "cluster" and not problems and agents_known:
        from shoal.deploy.cluster.connect import connect
        from shoal.deploy.cluster.own_modules import own_modules

        try:
            with connect(config.cluster, own_modules(config), owns_process=False) as cluster:
                lines += _cluster(config, cluster, problems, measure)
        except (CannotStart, RayLost) as error:
            problems += problems_of(error)
    elif config.mode != "cluster":
        machine = Machine(cores=available_cores(), accelerator=_accelerator(config))
        slots = _team_slots(config) if config.policies and agents_known else []
        lines += _layout(config, machine, slots, measure=measure and not problems)
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


def _environment(config: Config) -> list[str]:
    from shoal.envs.boundary import TokenSpace
    from shoal.envs.reading import reading, reading_by_part
    from shoal.policy.token_convolution import available

    if config.policies:
        try:
            return _teams(config)
        except (Exception, SystemExit):  # noqa: BLE001  (other people's code raises anything; among the problems)
            return []
    if (spec := _spec(config)) is None:
        return []
    observations, actions = reading(spec, config.policy.encoder_of)
    agents = [f"  agents         {spec.num_agents} in each environment"] if spec.num_agents > 1 else []
    if isinstance(spec.observation, TokenSpace):
        how = "from the tokens themselves on a CPU, compiled by numba"
        without = "from the box that they fill; pip install 'shoal[tokens]' takes less time on a CPU"
        observations += f", whose first layer is computed {how if available() else without}"
    return [
        f"environment {config.env.id}",
        f"  reads          {observations}",
        *_aligned(reading_by_part(spec, config.policy.encoder_of)),
        f"  acts           {actions}",
        *agents,
    ]


def _played(found: Found) -> list[str]:
    """Lines about the first steps."""
    if not found.steps:
        return []
    ended = f"{found.episodes} episodes ended" if found.episodes else "no episode ended"
    return [
        f"  tried          {found.steps} random steps of every agent: {ended}",
        *(f"  warns          {remark}" for remark in found.remarks),
    ]


def _spec(config: Config) -> EnvSpec | None:
    """None where the environment cannot be made, which is among the problems."""
    from shoal.envs.registry import make_env_spec

    try:
        return make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    except (Exception, SystemExit):  # noqa: BLE001  (other people's code raises anything; among the problems)
        return None


def _aligned(parts: Sequence[tuple[str, str]]) -> list[str]:
    """A line for every part of an observation, below that of the whole."""
    width = max((len(name) for name, _ in parts), default=0)
    return [f"    {name:<{width}}  {read}" for name, read in parts]


def _teams(config: Config) -> list[str]:
    """Lines about what the agents of several policies read and do."""
    from shoal.deploy.placement.setups import team_shares
    from shoal.envs.reading import reading, reading_by_part

    lines = [f"environment {config.env.id}"]
    for name, own in team_shares(config).items():
        observations, actions = reading(own.spec, config.policy.encoder_of)
        lines += [
            f"  policy         {name}, {own.spec.num_agents} of the agents in each environment",
            f"  reads          {observations}",
            *_aligned(reading_by_part(own.spec, config.policy.encoder_of)),
            f"  acts           {actions}",
        ]
    return lines


def _team_slots(config: Config) -> list[int]:
    from shoal.deploy.placement.setups import team_shares

    return [own.num_slots for own in team_shares(config).values()]


def _accelerator(config: Config) -> bool:
    from shoal.learner.device_choice import DeviceNotFound, make_device_path

    try:
        return make_device_path(config.learner).device.type != "cpu"
    except DeviceNotFound:
        return False  # among the problems


def _cluster(config: Config, cluster: Cluster, problems: list[str], measure: bool) -> list[str]:
    """Lines about the nodes, their room for actors, and the layout; appends what is wrong to ``problems``."""
    from shoal.actors.ray_pool import describe
    from shoal.deploy.placement.setups import team_shares

    nodes = cluster.nodes()
    answers = cluster.probe(nodes, config)
    room = cluster.room(nodes)
    lines = [f"cluster at {cluster.address}, {len(nodes)} nodes" + (", autoscaling" if room.autoscaling else "")]
    for node in nodes:
        labels = [f"{name}={value}" for name, value in node.labels.items() if not name.startswith("ray.io/")]
        amounts = {
            k: v for k, v in node.resources.items() if k not in ("memory", "object_store_memory") and ":" not in k
        }
        parts = [
            ", ".join(f"{node.available.get(name, 0):g} of {amount:g} {name} free" for name, amount in amounts.items()),
            *labels,
            *(["draining"] if node.is_draining else []),
            *(["the learner is here"] if node.is_here else []),
            *([] if cluster.uses(node, config) else ["not for this run"]),
        ]
        if answer := answers.get(node):
            if answer.shared_memory_bytes is not None:
                parts.append(f"{answer.shared_memory_bytes / GIB:.1f} GiB shared memory free")
            parts.append(f"{answer.disk_bytes / GIB:.1f} GiB disk free")
        else:
            parts.append("does not answer")
        lines.append(f"  {node.name:<26} " + "; ".join(part for part in parts if part))
    needs = describe(cluster.actor_options())
    lines.append(
        f"  room           for {room.elsewhere} actors of {needs} on other nodes, {room.here} beside the learner"
    )
    here = Machine(cores=available_cores(), accelerator=_accelerator(config))
    found = cluster.problems(config, nodes, room, here) + cluster.mismatches(answers, config)
    found = found or cluster.try_out(nodes, config)
    problems += found
    if not found:
        machine = cluster.place(config, room, here)
        slots: list[int] = []
        try:
            slots = _team_slots(config) if config.policies else []
            layout = choose_layout(config, machine, slots)
            if config.policies:
                team_shares(config, layout)
        except ValueError as error:
            problems += problems_of(error)
        lines += _layout(config, machine, slots, measure=measure and not problems)
    return lines


def _layout(config: Config, machine: Machine, team_slots: list[int], *, measure: bool) -> list[str]:
    from shoal.learner.device_choice import NO_BFLOAT16, DeviceNotFound, make_device_path, runs_bfloat16

    try:
        path = make_device_path(config.learner)
        layout = choose_layout(config, machine, team_slots)
    except (DeviceNotFound, LayoutError):
        return []  # among the problems
    steps = layout.batch_size * config.actor.unroll_length
    reason = "" if runs_bfloat16(path.device.type) else f", float32 ({NO_BFLOAT16})"
    lines = [
        f"layout (mode {config.mode})",
        f"  placement      {layout.placement}: {layout.why}",
        *_processes(config, layout),
        f"  update         {layout.batch_size} segments x {config.actor.unroll_length} steps = {steps:,} environment "
        f"steps, in {config.learner.minibatches * config.learner.epochs} optimizer steps",
        f"  lag            an unroll starts only if it can be trained within {_lag(config, layout)}",
        f"  arithmetic     {path.describe()}{reason}; acting is float32, so that log-probabilities can be compared",
    ]
    if layout.placement == "colocated":
        idle = layout.cores - layout.num_learners
        if idle > 0 and config.mode != "inline":
            lines.append(
                f"  idle           {idle} cores: learner.batch_size must be a multiple of learners x env.num_envs x "
                "learner.minibatches; auto sizes it to the machine"
            )
    if config.policies:
        lines.append("  feeding        not measured: that is done with the update of one policy")
    elif measure:
        from shoal.deploy.doctor import measure as measuring
        from shoal.envs.boundary import EnvironmentFault

        try:
            lines += _feeding(config, layout, measuring.measure(config, layout))
        except EnvironmentFault as error:
            lines.append(f"  feeding        not measured: {error}")
    else:
        lines.append(
            "  feeding        not measured: --measure takes some seconds and says how many actors keep the learner busy"
        )
    return lines


def _feeding(config: Config, layout: Layout, measured: Measured) -> list[str]:
    acting, learning = measured.acting, measured.learning
    actor, learner = 1 / acting, 1 / learning
    lines = [
        "measured (in one process while the others rest: cores that all work are slower)",
        f"  acting         {actor:,.0f} environment steps/s, {measured.environment / acting:.0%} of the time in the "
        "environment",
        f"  learning       {learner:,.0f} environment steps/s",
    ]
    if layout.placement == "colocated" or config.mode == "inline":
        learners = 1 if config.mode == "inline" else layout.num_learners
        rate = learners / (acting + learning)
        each = f", {learners} learners of {rate / learners:,.0f}" if learners > 1 else ""
        share = acting / (acting + learning)
        return [*lines, f"  together       {rate:,.0f} environment steps/s{each}; acting takes {share:.0%} of the time"]
    most = config.actor.max_policy_lag
    actors = layout.num_actors // layout.num_learners
    enough = learner / actor
    whose = "a learner" if layout.num_learners > 1 else "the learner"
    lines.append(f"  feeding        {enough:.1f} actors of this speed keep {whose} busy; it has {actors}")
    if actors > enough:
        lines.append(
            f"  expect         {layout.num_learners * learner:,.0f} environment steps/s and a lag of up to "
            f"{most} versions: actors wait {1 - enough / actors:.0%} of their time"
        )
    else:
        # Versions made during an unroll, and on average while the rest of its batch comes in.
        unrolls = max(1.0, layout.batch_size / layout.num_learners / config.env.num_envs)
        lag = min(most, actors / unrolls + (unrolls - 1) / (2 * unrolls))
        lines.append(
            f"  expect         {layout.num_actors * actor:,.0f} environment steps/s and a lag of about {lag:.1f} "
            f"versions: {whose} waits {1 - actors / enough:.0%} of its time; more actors (actor.num_actors) help"
        )
    return lines


def _lag(config: Config, layout: Layout) -> str:
    most = config.actor.max_policy_lag
    if layout.placement == "colocated" or most == 0:
        return "the version it acts with (lag 0)"
    unrolls = max(1, layout.batch_size // config.env.num_envs)
    # An actor is admitted while at most so many unrolls are ahead of it (learner.trajectory_queue).
    at_once = most * unrolls
    text = (
        f"{most} versions (actor.max_policy_lag): at most {at_once} unrolls are under way while an update is computed"
    )
    if layout.num_actors > at_once:
        idle = layout.num_actors - at_once
        text += f"; {idle} of {layout.num_actors} actors then wait: raise learner.batch_size or the lag"
    return text


def _processes(config: Config, layout: Layout) -> list[str]:
    slots = f"{config.env.num_envs} slots"
    if config.mode == "inline":
        return [
            f"  processes      1, which runs {layout.num_actors} rollout workers of {slots} and all updates in turn"
        ]
    threads = "one torch thread each: threads of several processes that wait for each other spin"
    if layout.placement == "colocated":
        actors = layout.num_actors // layout.num_learners
        workers = f"{actors} rollout workers of {slots}" if actors > 1 else slots
        return [
            f"  learners       {layout.num_learners}, each acting on {workers} and learning from them",
            f"  threads        {threads}",
        ]
    return [
        f"  actors         {layout.num_actors} processes of {slots}",
        f"  learners       {layout.num_learners}, gradient threads of each: {layout.num_threads}"
        if layout.num_learners > 1
        else f"  learner        1, gradient threads: {layout.num_threads}",
        f"  threads        {threads}",
    ]
