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
from shoal.deploy.doctor.first_steps import first_steps
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, LayoutError, Machine, choose_layout
from shoal.deploy.placement.setups import team_shares
from shoal.deploy.placement.versions import versions
from shoal.deploy.records.run_dir import CannotStart
from shoal.deploy.settings.sections import Config
from shoal.envs.first_steps import FirstSteps
from shoal.problems import problems_of

if TYPE_CHECKING:  # Ray and torch are imported where they are used
    from shoal.deploy.cluster.connect import Cluster
    from shoal.deploy.doctor.measure import Measured
    from shoal.envs.boundary import EnvSpec

GIB = 2**30


def examine(config: Config, run_dir: Path, *, measure: bool, known: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(lines to read, problems that keep a run with this configuration from starting, beside those that are ``known``);
    ``measure`` takes seconds."""
    if known:  # it is made for more problems, with settings that nobody meant to try it with
        made = preflight.make(config, known)
        tried = FirstSteps(made.spec, made.teams)
    else:
        tried, found = first_steps(config)
        made = preflight.Made(tried.spec, tried.teams, found)
    problems = preflight.check_made(config, run_dir, made, known)
    lines = _machine(run_dir) + _environment(config, tried)
    slots: list[int] = []
    if tried.teams and not problems:
        slots = [own.num_slots for own in team_shares(config, agents=tried.teams).values()]
    agents_known = not config.policies or bool(slots)
    if config.mode == "cluster" and not problems and agents_known:
        from shoal.deploy.cluster.connect import connect
        from shoal.deploy.cluster.own_modules import own_modules

        try:
            with connect(config.cluster, own_modules(config), owns_process=False) as cluster:
                lines += _cluster(config, cluster, tried, slots, problems, measure)
        except (CannotStart, RayLost) as error:
            problems += problems_of(error)
    elif config.mode != "cluster":
        machine = Machine(cores=available_cores(), accelerator=_accelerator(config))
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


def _environment(config: Config, tried: FirstSteps) -> list[str]:
    """Lines about what the agents read and do, and about the first steps; none where it cannot be made."""
    from shoal.envs.boundary import TokenSpace
    from shoal.envs.reading import reading, reading_by_part
    from shoal.policy.token_convolution import available

    lines = []
    named = {name: group.spec for name, group in tried.teams.items()} or ({"": tried.spec} if tried.spec else {})
    for name, spec in named.items():
        observations, actions = reading(spec, config.policy.encoder_of)
        if isinstance(spec.observation, TokenSpace):
            how = "from the tokens themselves on a CPU, compiled by numba"
            without = "from the box that they fill; pip install 'shoal[tokens]' takes less time on a CPU"
            observations += f", whose first layer is computed {how if available() else without}"
        if name:
            lines.append(f"  policy         {name}, {spec.num_agents} of the agents in each environment")
        lines += [
            f"  reads          {observations}",
            *_aligned(reading_by_part(spec, config.policy.encoder_of)),
            *_scaled(config, spec),
            f"  acts           {actions}",
        ]
        if not name and spec.num_agents > 1:
            lines.append(f"  agents         {spec.num_agents} in each environment")
    return [f"environment {config.env.id}", *lines, *_played(tried)] if lines else []


def _scaled(config: Config, spec: EnvSpec) -> list[str]:
    """A line about numbers that the environment's space may declare bounds of."""
    from shoal.envs.boundary import DictSpace, VectorSpace

    space = spec.observation
    numbers = space.numbers if isinstance(space, DictSpace) else space
    if not spec.declared or not isinstance(numbers, VectorSpace) or numbers.size == len(numbers.categorical):
        return []
    by = "numbers by their own mean and spread"
    if not config.policy.normalize_observations:
        by = "no numbers (policy.normalize_observations=false)"
    return [f"  scales         {by}; what leaves declared bounds is taken and warned of"]


def _played(tried: FirstSteps) -> list[str]:
    if not tried.steps or tried.fault:
        return []
    several = bool(tried.teams) or (tried.spec is not None and tried.spec.num_agents > 1)
    ended = f"{tried.episodes} episode{'s' * (tried.episodes > 1)} ended" if tried.episodes else "no episode ended"
    limit = f"; at most {tried.step_limit:,} steps in an episode" if tried.step_limit else ""
    lines = [f"  tried          {tried.steps} random steps{' of every agent' * several}: {ended}{limit}"]
    if tried.step_limit == 0 and not tried.episodes:
        lines.append(
            "  no time limit  unless the environment ends episodes by itself, they go on for ever: "
            "env.kwargs.max_episode_steps=N truncates them after N steps"
        )
    return [*lines, *(f"  warns          {remark}" for remark in tried.remarks)]


def _aligned(parts: Sequence[tuple[str, str]]) -> list[str]:
    """A line for every part of an observation, below that of the whole."""
    width = max((len(name) for name, _ in parts), default=0)
    return [f"    {name:<{width}}  {read}" for name, read in parts]


def _accelerator(config: Config) -> bool:
    from shoal.learner.device_choice import DeviceNotFound, make_device_path

    try:
        return make_device_path(config.learner).device.type != "cpu"
    except DeviceNotFound:
        return False  # among the problems


def _cluster(
    config: Config, cluster: Cluster, tried: FirstSteps, slots: list[int], problems: list[str], measure: bool
) -> list[str]:
    """Lines about the nodes, their room for actors, and the layout; appends what is wrong to ``problems``."""
    from shoal.actors.ray_pool import describe

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
        try:
            layout = choose_layout(config, machine, slots)
            if config.policies:
                team_shares(config, layout, tried.teams)
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
