"""A run before it starts: everything that can be built and checked without starting a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.monitoring.bottleneck import BottleneckMonitor
from shoal.deploy.monitoring.learning import LearningMonitor
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, Machine, Share, choose_layout
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.deploy.placement.setups import make_learner_setup, make_worker_setup, team_shares
from shoal.deploy.placement.versions import versions
from shoal.deploy.settings.load import to_dict
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.going_on import find_rollouts, restore_queue
from shoal.deploy.training.resume import Origin, find_origin, match_names, restore
from shoal.envs.boundary import EnvSpec
from shoal.envs.registry import make_env_spec
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.config import POLICIES
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner_worker import LearnerWorker
from shoal.learner.ledger import Ledger
from shoal.learner.recorded_updates import FOLDER, RecordedUpdates
from shoal.learner.statistics import RunStatistics
from shoal.policy.actions import Actions
from shoal.policy.allocator import keep_freed_memory

if TYPE_CHECKING:  # Ray is imported where it is used
    from shoal.deploy.cluster.connect import Cluster


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run's settings, its placement, the learner of this process, and its statistics."""

    config: Config
    run_dir: Path
    cluster: Cluster | None
    machine: Machine
    layout: Layout
    origin: Origin
    setup: LearnerSetup
    """Makes the learner and rollout workers of every process."""
    share: Share
    """This process's part of the layout."""
    learner: LearnerWorker
    statistics: RunStatistics
    bottleneck: BottleneckMonitor
    learning: LearningMonitor
    before: Ledger
    """The ledger that the run continues."""
    checkpoints: Checkpoints
    updates: RecordedUpdates
    rollouts: Mapping[str, Any] | None
    """The acting side's state that a run in one process goes on from (``deploy.training.going_on``)."""
    policy: str = ""
    """The policy's name where several are trained, with ``run_dir`` a folder of the run's; else empty."""

    def describe(self) -> dict[str, Any]:
        """The run's state beside the weights, for checkpoints; from any thread."""
        return {
            "run_id": self.origin.run_id,
            "session": self.origin.session,
            "env_id": self.config.env.id,
            "env_kwargs": self.config.env.kwargs,
            "spaces": self.setup.env.spaces,
            "env_options": dataclasses.asdict(self.config.env.options),
            "ledger": self.learner.queue.snapshot().to_json(),
            "mean_return": self.statistics.mean_return,
            "statistics": self.statistics.get_state(),
            "config": to_dict(self.config),
            "versions": versions(),
        }


def prepare(config: Config, run_dir: Path, cluster: Cluster | None) -> tuple[PreparedRun, ...]:
    """Build a run; ``cluster`` is connected already, because its free resources decide the layout.

    Where several policies are trained (``config.policies``), one for each of them: a run of one policy each, but for
    what they share: settings, machine, layout, origin and checkpoints.

    Raises:
        ValueError: settings, checkpoint and environment do not fit each other.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    machine = _machine(config, cluster)
    layout = choose_layout(config, machine)
    if config.mode == "local" and machine.accelerator and layout.num_learners > 1:
        # Ray hands out GPUs from the first on, to the peer learners.
        torch.cuda.set_device(layout.num_learners - 1)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    origin = find_origin(config, checkpoints)

    def build(setup: LearnerSetup, share: Share, origin: Origin, run_dir: Path, policy: str = "") -> PreparedRun:
        learner = setup.make_learner_worker(share)
        statistics = RunStatistics(learner.queue.ledger, learner.clock, num_actors=layout.num_actors)
        restore(origin, learner, statistics)
        rollouts = None if policy else find_rollouts(config, origin)
        if rollouts is not None:
            restore_queue(rollouts, origin, learner)
        return PreparedRun(
            config=config,
            run_dir=run_dir,
            cluster=cluster,
            machine=machine,
            layout=layout,
            origin=origin,
            setup=setup,
            share=share,
            learner=learner,
            statistics=statistics,
            bottleneck=_bottleneck(config, layout, statistics),
            learning=_learning(config, setup, layout, learner.learner.policy.actions, statistics),
            before=learner.queue.snapshot(),
            checkpoints=checkpoints,
            updates=RecordedUpdates(
                run_dir / FOLDER,
                keep=config.recorder.keep_updates,
                about={
                    "run_id": origin.run_id,
                    "session": origin.session,
                    "env_id": config.env.id,
                    "num_agents": setup.env.num_agents if setup.worker.games is None else 1,
                },
            ),
            rollouts=rollouts,
            policy=policy,
        )

    if config.policies:
        runs = []
        for name, own in team_shares(config, layout).items():
            from_ = origin.of(name)
            setup = own.setup(config, layout, _worker_setup(config, from_, own.spec))
            runs.append(build(setup, own.part(config, layout), from_, run_dir / POLICIES / name, name))
        return tuple(runs)
    spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    setup = make_learner_setup(config, layout, _worker_setup(config, origin, spec), spec)
    in_one_process = config.mode == "inline" or layout.num_learners == 1
    return (build(setup, layout.whole() if in_one_process else layout.share(0), origin, run_dir),)


def describe_together(runs: Sequence[PreparedRun]) -> dict[str, Any]:
    """What belongs to a run of several policies and to none of them, for checkpoints."""
    described = runs[0].describe()
    shared = ("run_id", "session", "env_id", "env_kwargs", "env_options", "config", "versions")
    ledger = Ledger()
    for run in runs:
        ledger.add(run.learner.queue.snapshot())
    return {name: described[name] for name in shared} | {"ledger": ledger.to_json()}


def _machine(config: Config, cluster: Cluster | None) -> Machine:
    """The cores and the accelerator of this process, and the CPUs that a cluster has for actors."""
    accelerator = make_device_path(config.learner).device.type != "cpu"
    machine = Machine(cores=available_cores(), accelerator=accelerator)
    return cluster.machine(config, machine) if cluster else machine


def _worker_setup(config: Config, origin: Origin, spec: EnvSpec) -> WorkerSetup:
    interface = match_names(config, origin, observation_of(spec), actions_of(spec))
    return make_worker_setup(config, spec, run_id=origin.run_id, session=origin.session, interface=interface)


def _learning(
    config: Config, setup: LearnerSetup, layout: Layout, actions: Actions, statistics: RunStatistics
) -> LearningMonitor:
    return LearningMonitor(
        statistics,
        max_entropy=actions.max_entropy,
        action_dimensions=len(actions.flat_names),
        num_agents=setup.env.num_agents,
        num_slots=layout.num_actors * setup.worker.num_envs,
        normalized=config.learner.normalize_advantage,
        expect_after=config.log.expect_learning_after,
    )


def _bottleneck(config: Config, layout: Layout, statistics: RunStatistics) -> BottleneckMonitor:
    acting = config.mode == "inline" or layout.placement == "colocated"
    num_processes = 1 if config.mode == "inline" else layout.num_learners if acting else layout.num_actors
    num_learners = 1 if config.mode == "inline" else layout.num_learners
    return BottleneckMonitor(statistics, acting=acting, num_processes=num_processes, num_learners=num_learners)
