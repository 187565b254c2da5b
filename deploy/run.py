"""The composition root: builds a run from its configuration, starts it, ends it, and says what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.deploy.evaluation.evaluator import Evaluator, Jobs, training_side
from shoal.deploy.evaluation.job_process import JobProcess
from shoal.deploy.interruption import interruption
from shoal.deploy.monitoring.bottleneck import BottleneckMonitor
from shoal.deploy.monitoring.catalogue import Sources
from shoal.deploy.monitoring.endpoint import served
from shoal.deploy.monitoring.history import MetricsHistory
from shoal.deploy.monitoring.metrics_server import MetricsServer
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.monitoring.sinks import make_sinks
from shoal.deploy.placement.hardware import available_cores
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.placement.learner_setup import RolloutProcesses
from shoal.deploy.placement.setups import make_learner_setup, make_worker_setup
from shoal.deploy.placement.versions import versions
from shoal.deploy.progress import Progress
from shoal.deploy.records.evaluations import Evaluations
from shoal.deploy.records.run_dir import CannotStart, exclusive, log_file
from shoal.deploy.settings.load import to_dict, to_yaml
from shoal.deploy.settings.sections import Config
from shoal.deploy.summary import measured_random_return, summarize, write_json
from shoal.deploy.worker_group import WorkerGroup
from shoal.envs.registry import make_env_spec
from shoal.learner.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from shoal.learner.device_choice import make_device_path
from shoal.learner.ledger import Ledger
from shoal.learner.training_loop import Limits, Parts, train
from shoal.learner.trajectory_queue import Driver
from shoal.policy.actions import Actions
from shoal.policy.allocator import keep_freed_memory
from shoal.policy.observation import Observation
from shoal.policy.remap import NameMap, PolicyInterface, Remapping, remap

if TYPE_CHECKING:  # Ray is imported where it is used
    from shoal.deploy.cluster.connect import Cluster
    from shoal.deploy.cluster.ray_peers import RayPeers
    from shoal.deploy.cluster.ray_session import RaySession


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    summary: dict[str, Any]
    interrupted_by: int | None
    """The signal that ended it, if one did."""


def run(config: Config, run_dir: Path) -> Outcome:
    """Train to the end or to the first signal; the run directory then holds a checkpoint and ``summary.json``.

    Raises:
        CannotStart: another process has the run directory, or the policy cannot be made from settings and checkpoint.
        Exception: whatever ended the run early; the summary is written all the same.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(run_dir))
        stack.enter_context(log_file(run_dir, json_lines=config.log.format == "json"))
        # What there is room for decides the layout, so a cluster comes first.
        cluster = None
        if config.mode == "cluster":
            from shoal.deploy.cluster.connect import connect

            cluster = stack.enter_context(connect(config.cluster))
        try:
            run_ = _Run(config, run_dir, cluster)
        except ValueError as error:
            raise CannotStart(str(error)) from error
        # Only now: where the run cannot be continued, the directory stays as it was.
        (run_dir / "config.yaml").write_text(to_yaml(config))
        return run_.run()


class _Run:
    """One run: everything that lives from its start to its end."""

    def __init__(self, config: Config, run_dir: Path, cluster: Cluster | None) -> None:
        self.config, self.run_dir, self.cluster = config, run_dir, cluster
        torch.set_num_threads(1)
        keep_freed_memory()
        spec = make_env_spec(config.env.id, **config.env.kwargs)
        accelerator = make_device_path(config.learner).device.type != "cpu"
        self.machine = Machine(cores=available_cores(), accelerator=accelerator)
        if cluster:
            self.machine = cluster.machine(config, self.machine)
        self.layout = choose_layout(config, self.machine)
        self.checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
        if config.mode == "local" and accelerator and self.layout.num_learners > 1:
            # Ray hands out GPUs from the first on, to the learners beside this one.
            torch.cuda.set_device(self.layout.num_learners - 1)
        resumed = self._find_resumed()
        self.run_id = resumed.state["run_id"] if resumed else uuid.uuid4().hex
        self.session = 1 + int(resumed.state["session"]) if resumed else 0
        interface = self._match_names(resumed, observation_of(spec), actions_of(spec))
        worker = make_worker_setup(config, spec, run_id=self.run_id, session=self.session, interface=interface)
        self.setup = make_learner_setup(config, self.layout, worker, spec, run_dir / "skipped")
        in_one_process = config.mode == "inline" or self.layout.num_learners == 1
        self.share = self.layout.whole() if in_one_process else self.layout.share(0)
        self.loop = self.setup.make_loop(self.share)
        self.learner, self.trajectory_queue, self.statistics = (
            self.loop.learner,
            self.loop.trajectory_queue,
            self.loop.statistics,
        )
        self.ledger = self.trajectory_queue.ledger
        if resumed:
            resumed.restore(self.learner)
            self._restore_books(resumed)
        self.statistics.policy_version = self.learner.policy_version
        acting = config.mode == "inline" or self.layout.placement == "colocated"
        processes = 1 if config.mode == "inline" else self.layout.num_learners if acting else self.layout.num_actors
        self.bottleneck = BottleneckMonitor(self.statistics, acting=acting, num_processes=processes)
        self.books_before = self.trajectory_queue.books()
        self.sinks = make_sinks(config.log, run_dir, self.run_id, to_dict(config))
        self.evaluations = Evaluations(run_dir / "evaluation.jsonl")
        self.limits = Limits(total_env_steps=config.total_env_steps, checkpoint_every=config.checkpoint.every_updates)

    def run(self) -> Outcome:
        """Start the pool, train, stop everything, write the summary."""
        config = self.config
        with contextlib.ExitStack() as stack:
            worker_group = stack.enter_context(self._worker_group())
            # After Ray, which sets handlers of its own.
            asked = stack.enter_context(interruption(config.max_seconds))
            sources = self._sources(worker_group)
            ready = Readiness(
                statistics=self.statistics,
                actors_alive=lambda: worker_group.num_alive,
                stopping=asked.requested.is_set,
                max_update_age_seconds=config.metrics.max_update_age_seconds,
            )
            server = stack.enter_context(served(config.metrics, sources, ready, run=self.run_dir.name))
            progress = Progress(
                self.statistics,
                self.trajectory_queue,
                worker_group,
                self.bottleneck,
                total_env_steps=config.total_env_steps,
                time_is_up_at=asked.time_is_up_at,
                json_lines=config.log.format == "json",
                evaluations=self.evaluations,
            )
            progress.say(self._headline(server))
            history = MetricsHistory(
                sources,
                self.run_dir,
                session=self.session,
                every_seconds=config.log.every_seconds,
                sinks=self.sinks,
            )
            stack.callback(self.learner.close)
            parts = Parts(
                loop=self.loop, checkpoints=self.checkpoints, describe=self._describe, peers=worker_group.peers
            )
            weights = None
            driver = None
            completed = False
            try:
                with progress, self._evaluator():
                    if worker_group.drive is None:
                        driver = Driver(worker_group.pool.pump, self.trajectory_queue)
                        driver.start()
                    weights = train(parts, self.limits, worker_group.drive, asked.requested)
                completed = True
            finally:
                self.statistics.end()
                if driver:
                    driver.stop()
                worker_group.close()
                self.trajectory_queue.close()
                history.close()
                # A failed run's environment may be what failed: it is not played again.
                random = measured_random_return(self.setup.worker) if completed else None
                summary = summarize(
                    self.statistics,
                    self.trajectory_queue,
                    actor_restarts=sum(worker_group.restarts.values()),
                    recoveries=worker_group.recoveries,
                    weights=weights,
                    trained_before=self.books_before.trained,
                    random=random,
                    interrupted_by=asked.signal_number,
                    limit=self.bottleneck.whole(),
                    evaluations=self.evaluations,
                    about={"env_id": config.env.id, "seed": config.seed, "policy_kind": config.policy.kind},
                )
                write_json(self.run_dir / "summary.json", summary)
            progress.summary(summary, self.run_dir)
            return Outcome(summary, asked.signal_number)

    @contextlib.contextmanager
    def _worker_group(self) -> Iterator[WorkerGroup]:
        config, layout = self.config, self.layout
        fed = layout.placement == "disaggregated"
        if config.mode == "inline" or (layout.num_learners == 1 and not fed):
            pool = self.setup.make_pool(self.share, self.loop)
            yield WorkerGroup(pool, drive=pool.pump)
            return
        with self._ray() as ray:
            peers = self._peers(ray) if layout.num_learners > 1 else None
            if not fed:
                pool = self.setup.make_pool(self.share, self.loop)
                yield WorkerGroup(pool, drive=pool.pump, peers=peers)
                return
            from shoal.actors.ray_pool import RayPool

            self.loop.publish_to = ray.put
            actors = RayPool(
                self.setup.worker, self.share.actors, config.actor, self.trajectory_queue, ray.actor_options
            )
            yield WorkerGroup(actors, drive=None, peers=peers)

    def _peers(self, ray: RaySession) -> RayPeers:
        from shoal.deploy.cluster.ray_peers import RayPeers

        setup = self.setup
        if self.layout.placement == "disaggregated":
            feeding = RolloutProcesses(config=self.config.actor, options=ray.actor_options)
            setup = dataclasses.replace(setup, rollout_processes=feeding)
        unrolls = self.share.batch_size // self.config.env.num_envs
        return RayPeers(
            setup,
            self.layout,
            self.config.actor,
            ray,
            on_lost_turn=lambda: self.trajectory_queue.count_lost(unrolls),
            on_lost_steps=lambda steps, reason: self.trajectory_queue.add_books(
                Ledger(in_flight=-steps, dropped=Counter({reason: steps}))
            ),
        )

    def _ray(self) -> contextlib.AbstractContextManager[RaySession]:
        from shoal.deploy.cluster import ray_session

        if self.cluster:
            return contextlib.nullcontext(self.cluster.session(self.machine))
        layout = self.layout
        arrays = self.loop.assembler.arrays.values()
        unroll = sum(array.nbytes for array in arrays) / self.share.batch_size * self.config.env.num_envs
        actors = layout.num_actors if layout.placement == "disaggregated" else 0
        return ray_session.local(
            num_actors=actors,
            num_learners=layout.num_learners - 1,
            unroll_bytes=int(unroll),
            accelerator=self.machine.accelerator,
        )

    def _sources(self, worker_group: WorkerGroup) -> Sources:
        return Sources(
            statistics=self.statistics,
            trajectory_queue=self.trajectory_queue,
            actors_alive=lambda: worker_group.num_alive,
            actor_restarts=lambda: worker_group.restarts,
            bottleneck=self.bottleneck.now,
            before=self.books_before,
            build=versions(),
            about={
                "mode": self.config.mode,
                "placement": self.layout.placement,
                "env_id": self.config.env.id,
                "policy": self.config.policy.kind,
                "device": self.learner.path.device.type,
                "session": str(self.session),
            },
            actor_states=lambda: worker_group.states,
            recoveries=lambda: worker_group.recoveries.count,
            recovery_seconds=lambda: worker_group.recoveries.seconds,
            lags=lambda: [*self.trajectory_queue.lags(), *(worker_group.peers.lags if worker_group.peers else ())],
            accelerator_memory=self.learner.path.memory_bytes,
            target_env_steps=self.config.total_env_steps,
            run_dir=self.run_dir,
            evaluations=self.evaluations,
        )

    def _evaluator(self) -> contextlib.AbstractContextManager[object]:
        config = self.config.evaluation
        if not config.every_env_steps:
            return contextlib.nullcontext()
        best = Checkpoints(self.run_dir / "best")
        jobs: Jobs = JobProcess(silent=True)
        if self.cluster:
            from shoal.deploy.evaluation.ray_jobs import RayJobs

            jobs = RayJobs(self.cluster.session(self.machine).actor_options)
        return Evaluator(
            config,
            training_side(self.setup.worker, config, num_agents=self.setup.env.num_agents, seed=self.config.seed),
            jobs,
            self.evaluations,
            session=self.session,
            newest=lambda: self.loop.weights,
            env_steps=lambda: self.ledger.trained,
            # Between two bookings: what a resumed run starts with has to balance.
            describe=lambda: {**self._describe(), "ledger": self.trajectory_queue.books().to_json()},
            keep_best=(lambda weights, state: best.save(self.learner, state, weights)) if config.best else None,
        )

    def _headline(self, server: MetricsServer | None) -> str:
        config, count = self.config, sum(p.numel() for p in self.learner.policy.parameters())
        start = f", continuing from policy version {self.learner.policy_version}" if self.session else ""
        env, actor = config.env, config.actor
        name = {"fast": "Fast", "component": "ComponentPolicy"}[config.policy.kind]
        layout, path = self.layout, self.learner.path
        who = f"{path.describe()}, {layout.batch_size} segments per update"
        if layout.num_learners > 1:
            apart = "which also act" if layout.placement == "colocated" else "each fed by its own actors"
            where = "in one process" if config.mode == "inline" else apart
            who = f"{layout.num_learners}, {where}; {who}"
        elif layout.placement == "disaggregated" and path.device.type == "cpu":
            who += f", gradient threads: {layout.num_threads}"
        return "\n".join(
            [
                f"Training {name} ({count:,} parameters) on {env.id}, mode {config.mode}, seed {config.seed}{start}",
                f"  actors   {layout.num_actors} x {env.num_envs} slots, unrolls of {actor.unroll_length} steps",
                f"  {'learners' if layout.num_learners > 1 else 'learner '} {who}",
                f"  metrics  {server.url if server else 'not served'}",
                f"  run      {self.run_dir}",
            ]
        )

    def _find_resumed(self) -> Checkpoint | None:
        if self.config.resume == "never":
            return None
        return self.checkpoints.latest() if self.config.resume == "auto" else find_checkpoint(Path(self.config.resume))

    def _match_names(
        self, resumed: Checkpoint | None, observation: Observation, actions: Actions
    ) -> PolicyInterface | None:
        """How the weights of a resumed run are to read the environment; None for fresh ones, which take its order.

        Raises:
            ValueError: they do not fit, or something is mapped without weights that could have other names.
        """
        settings = self.config.policy
        remapping = Remapping(
            NameMap(settings.map_features, "policy.map_features"), NameMap(settings.map_actions, "policy.map_actions")
        )
        if resumed:
            return remap(resumed.state["policy"], observation, actions, remapping)
        for names in (remapping.features, remapping.actions):
            if names.entries:
                raise ValueError(f"{names.option}: nothing is resumed, so there are no other names to map to")
        return None

    def _restore_books(self, resumed: Checkpoint) -> None:
        """Continue the books; what was in flight when the checkpoint was saved can no longer come."""
        books = resumed.state["ledger"]
        self.ledger.sampled, self.ledger.trained = books["sampled"], books["trained"]
        self.ledger.dropped.update(books["dropped"])
        self.ledger.dropped["restart"] += books["in_flight"]
        if not self.ledger.dropped["restart"]:
            del self.ledger.dropped["restart"]

    def _describe(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "session": self.session,
            "env_id": self.config.env.id,
            "env_kwargs": self.config.env.kwargs,
            # Between two bookings: whoever keeps the best weights asks from a thread of its own.
            "ledger": self.trajectory_queue.books().to_json(),
            "mean_return": self.statistics.mean_return,
            "config": to_dict(self.config),
            "versions": versions(),
        }
