"""A run before it starts: everything that can be built and checked without starting a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.monitoring.bottleneck import BottleneckMonitor
from shoal.deploy.monitoring.learning import LearningMonitor
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Layout, Machine, Share, choose_layout
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.deploy.placement.setups import TeamShare, check_batches, make_learner_setup, make_worker_setup, team_shares
from shoal.deploy.placement.versions import versions
from shoal.deploy.settings.load import to_dict
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.going_on import find_rollouts, restore_queue
from shoal.deploy.training.resume import Origin, find_origin, match_names, restore, restore_options
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
    target_env_steps: int
    """Environment steps that it is to train: ``total_env_steps``, or of several policies the part of its agents."""
    policy: str = ""
    """The policy's name where several are trained, with ``run_dir`` a folder of the run's; else empty."""
    agents: tuple[int, ...] = ()
    """The places of its agents among those of a game, where several policies are trained."""

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.run_dir.parents[1].name if self.policy else self.run_dir.name

    def describe(self) -> dict[str, Any]:
        """The run's state beside the weights, for checkpoints; from any thread."""
        return {
            "run_id": self.origin.run_id,
            "session": self.origin.session,
            "run_dir": str(self.checkpoints.directory.parent.resolve()),
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
    what they share: settings, machine, layout, origin, bottleneck and checkpoints.

    Raises:
        ValueError: settings, checkpoint and environment do not fit each other.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    machine = _machine(config, cluster)
    teams = team_shares(config) if config.policies else {}
    spec = None if teams else make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    layout = choose_layout(config, machine, [own.num_slots for own in teams.values()])
    check_batches(config, layout, teams)
    if config.mode == "local" and machine.accelerator and layout.num_learners > 1:
        # Ray hands out GPUs from the first on, to the peer learners.
        torch.cuda.set_device(layout.num_learners - 1)
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    origin = find_origin(config, checkpoints)

    if spec is None:
        parts = _policies(config, layout, origin, run_dir, teams)
    else:
        parts = [_whole(config, spec, layout, origin, run_dir)]
    learners = [part.setup.make_learner_worker(part.share) for part in parts]
    all_statistics = [
        RunStatistics(learner.queue.ledger, learner.clock, num_actors=layout.num_actors) for learner in learners
    ]
    for part, learner, statistics in zip(parts, learners, all_statistics, strict=True):
        restore(part.origin, learner, statistics)
    # Several policies play in the same games, which the first one's weights reach.
    restore_options(config, origin, learners[0])
    rollouts = None if teams else find_rollouts(config, origin)
    if rollouts is not None:
        restore_queue(rollouts, origin, learners[0])
    bottleneck = _bottleneck(config, layout, all_statistics)
    return tuple(
        PreparedRun(
            config=config,
            run_dir=part.run_dir,
            cluster=cluster,
            machine=machine,
            layout=layout,
            origin=part.origin,
            setup=part.setup,
            share=part.share,
            learner=learner,
            statistics=statistics,
            bottleneck=bottleneck,
            learning=_learning(config, part.setup, layout, learner.learner.policy.actions, statistics),
            before=learner.queue.snapshot(),
            checkpoints=checkpoints,
            updates=RecordedUpdates(
                part.run_dir / FOLDER,
                keep=config.recorder.keep_updates,
                about={
                    "run_id": part.origin.run_id,
                    "session": part.origin.session,
                    "env_id": config.env.id,
                    "num_agents": part.setup.env.num_agents if part.setup.worker.games is None else 1,
                },
            ),
            rollouts=rollouts,
            target_env_steps=part.target_env_steps,
            policy=part.setup.policy,
            agents=part.agents,
        )
        for part, learner, statistics in zip(parts, learners, all_statistics, strict=True)
    )


class _Part(NamedTuple):
    """What a policy's learner is made from."""

    setup: LearnerSetup
    share: Share
    origin: Origin
    run_dir: Path
    target_env_steps: int
    agents: tuple[int, ...] = ()


def _whole(config: Config, spec: EnvSpec, layout: Layout, origin: Origin, run_dir: Path) -> _Part:
    """The only policy of a run."""
    setup = make_learner_setup(config, layout, _worker_setup(config, origin, spec), spec)
    in_one_process = config.mode == "inline" or layout.num_learners == 1
    share = layout.whole() if in_one_process else layout.share(0)
    return _Part(setup, share, origin, run_dir, config.total_env_steps)


def _policies(
    config: Config, layout: Layout, origin: Origin, run_dir: Path, teams: Mapping[str, TeamShare]
) -> list[_Part]:
    """Each of several policies."""
    parts = []
    for name, own in teams.items():
        origin_of = origin.of(name)
        setup = own.setup(config, layout, _worker_setup(config, origin_of, own.spec))
        share, target = own.part(config, layout), own.target_env_steps(config)
        parts.append(_Part(setup, share, origin_of, run_dir / POLICIES / name, target, own.agents))
    return parts


def describe_together(runs: Sequence[PreparedRun]) -> dict[str, Any]:
    """What belongs to a run of several policies and to none of them, for checkpoints."""
    described = runs[0].describe()
    shared = ("run_id", "session", "run_dir", "env_id", "env_kwargs", "env_options", "config", "versions")
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
        among_others=bool(config.policies),
        masked=setup.env.num_mask > 0,
    )


def _bottleneck(config: Config, layout: Layout, statistics: Sequence[RunStatistics]) -> BottleneckMonitor:
    acting = config.mode == "inline" or layout.placement == "colocated"
    num_processes = 1 if config.mode == "inline" else layout.num_learners if acting else layout.num_actors
    num_learners = 1 if config.mode == "inline" else layout.num_learners
    return BottleneckMonitor(statistics, acting=acting, num_processes=num_processes, num_learners=num_learners)
