"""The composition root: builds a run from its configuration, starts it, ends it, and says what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.agent import WorkerSetup, actions_of, observation_of
from actors.pool import InlinePool
from actors.rollout import trajectory_spec
from deploy import hardware
from deploy.config import Config, to_dict, to_yaml
from deploy.interruption import interruption
from deploy.progress import Progress
from deploy.run_dir import CannotStart, exclusive, log_file
from deploy.summary import measured_random_return, summarize, versions, write_json
from envs.registry import make_env_spec
from learner.batch import BatchAssembler
from learner.canary import Canary
from learner.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from learner.device_choice import make_device_path
from learner.intake import Driver, Intake
from learner.learner import Learner
from learner.ledger import Ledger
from learner.metrics import MetricsServer, Sources
from learner.statistics import RunStatistics
from learner.train import Limits, Parts, train
from policy.actions import Actions
from policy.allocator import keep_freed_memory
from policy.graph import components_to_json
from policy.observation import Observation
from policy.remap import NameMap, PolicyInterface, Remapping, remap
from policy.weights import Weights


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
    with exclusive(run_dir), log_file(run_dir):
        try:
            run_ = _Run(config, run_dir)
        except ValueError as error:
            raise CannotStart(str(error)) from error
        # Only now: where the run cannot be continued, the directory stays as it was.
        (run_dir / "config.yaml").write_text(to_yaml(config))
        return run_.run()


class _Run:
    """One run: everything that lives from its start to its end."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        torch.set_num_threads(1)
        keep_freed_memory()
        torch.manual_seed(config.seed)
        spec = make_env_spec(config.env.id, **config.env.kwargs)
        path = make_device_path(config.learner)
        accelerator = path.device.type != "cpu"
        self.num_actors = hardware.num_actors(config, accelerator=accelerator)
        self.gradient_threads = hardware.gradient_threads(config, num_actors=self.num_actors, accelerator=accelerator)
        self.checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
        resumed = self._find_resumed()
        run_id = resumed.state["run_id"] if resumed else uuid.uuid4().hex
        self.session = 1 + int(resumed.state["session"]) if resumed else 0
        presented = (observation_of(spec), actions_of(spec))
        interface = self._match_names(resumed, *presented)
        self.setup = WorkerSetup(
            env_id=config.env.id,
            env_kwargs=config.env.kwargs,
            num_envs=config.env.num_envs,
            unroll_length=config.actor.unroll_length,
            run_id=f"{run_id}-{self.session}",
            # Every session of a resumed run has random streams of its own.
            seed=int(
                np.random.SeedSequence(config.seed, spawn_key=(self.session,)).generate_state(1, np.uint64)[0] >> 1
            ),
            observation=interface.observation if interface else presented[0],
            actions=interface.actions if interface else presented[1],
            policy_kind=config.policy.kind,
            components=components_to_json(config.policy.components),
            embedding_rows=config.policy.embedding_rows,
            action_rows=interface.action_rows if interface else None,
            trained_observation=interface.trained_observation if interface else None,
            presented=presented,
            burn_in=config.actor.burn_in,
            num_threads=config.actor.num_threads,
            package_root=str(Path(__file__).resolve().parent.parent),
        )
        self.run_id = run_id
        policy = self.setup.make_policy(config.policy.initialization).to(path.device)
        self.learner = Learner(policy, config.learner, path, num_threads=self.gradient_threads, seed=config.seed)
        self.ledger = Ledger()
        if resumed:
            resumed.restore(self.learner)
            self._restore_books(resumed)
        self.statistics = RunStatistics(self.ledger)
        self.statistics.policy_version = self.learner.policy_version
        self.trained_before = self.ledger.trained
        contract = trajectory_spec(spec, config.actor.unroll_length, config.actor.burn_in, policy.lstm.hidden_size)
        self.intake = Intake(
            contract,
            run_id=self.setup.run_id,
            num_actors=self.num_actors,
            num_envs=config.env.num_envs,
            batch_size=config.learner.batch_size,
            max_policy_lag=config.actor.max_policy_lag,
            ledger=self.ledger,
        )
        self.parts = Parts(
            learner=self.learner,
            intake=self.intake,
            assembler=BatchAssembler(contract, config.learner.batch_size, pin_memory=path.pin_memory),
            publish=_as_it_is,
            canary=Canary(policy, path, max_policy_lag=config.actor.max_policy_lag),
            checkpoints=self.checkpoints,
            statistics=self.statistics,
            refused_dir=run_dir / "refused",
            describe=self._describe,
        )
        path.prepare(policy)
        self.limits = Limits(
            total_env_steps=config.total_env_steps,
            max_seconds=config.max_seconds,
            checkpoint_every=config.checkpoint.every_updates,
        )

    def run(self) -> Outcome:
        """Start the pool, train, stop everything, write the summary."""
        config = self.config
        with contextlib.ExitStack() as stack:
            pool: Any
            if config.mode == "inline":
                pool = InlinePool(self.setup, self.num_actors, self.intake)
                drive: Callable[[float], None] | None = pool.pump
            else:
                pool = stack.enter_context(self._ray_pool())
                drive = None
            # After Ray, which sets handlers of its own.
            asked = stack.enter_context(interruption())
            server = self._serve_metrics(pool)
            progress = Progress(self.statistics, self.intake, pool, total_env_steps=config.total_env_steps)
            progress.say(self._headline(server))
            stack.callback(self.learner.close)
            if server:
                stack.callback(server.close)
            weights = None
            driver = None
            completed = False
            try:
                with progress:
                    if drive is None:
                        driver = Driver(pool.pump, self.intake)
                        driver.start()
                    weights = train(self.parts, self.limits, drive, asked.requested)
                completed = True
            finally:
                self.statistics.end()
                if driver:
                    driver.stop()
                pool.close()
                self.intake.close()
                # A failed run's environment may be what failed: it is not played again.
                random = measured_random_return(self.setup) if completed else None
                summary = summarize(
                    self.statistics,
                    self.intake,
                    actor_restarts=sum(pool.restarts.values()),
                    weights=weights,
                    trained_before=self.trained_before,
                    random=random,
                    interrupted_by=asked.signal_number,
                    about={"env_id": config.env.id, "seed": config.seed, "policy_kind": config.policy.kind},
                )
                write_json(self.run_dir / "summary.json", summary)
            progress.summary(summary, self.run_dir)
            return Outcome(summary, asked.signal_number)

    @contextlib.contextmanager
    def _ray_pool(self) -> Iterator[Any]:
        from actors.ray_pool import RayPool
        from deploy import local_ray

        payload = sum(array.nbytes for array in self.parts.assembler.arrays.values()) / self.config.learner.batch_size
        with local_ray.session(self.num_actors, unroll_bytes=int(payload * self.config.env.num_envs)) as put:
            self.parts = dataclasses.replace(self.parts, publish=put)
            yield RayPool(self.setup, self.num_actors, self.config.actor, self.intake)

    def _serve_metrics(self, pool: Any) -> MetricsServer | None:
        if self.config.metrics.port < 0:
            return None
        sources = Sources(
            statistics=self.statistics,
            intake=self.intake,
            actors_alive=lambda: pool.num_alive,
            actor_restarts=lambda: pool.restarts,
            build=versions(),
        )
        return MetricsServer(sources, address=self.config.metrics.address, port=self.config.metrics.port)

    def _headline(self, server: MetricsServer | None) -> str:
        config, count = self.config, sum(p.numel() for p in self.learner.policy.parameters())
        start = f", continuing from policy version {self.learner.policy_version}" if self.session else ""
        env, actor = config.env, config.actor
        name = {"fast": "Fast", "component": "ComponentPolicy"}[config.policy.kind]
        where = self.learner.path.describe()
        threads = f", gradient threads: {self.gradient_threads}" if where == "cpu" else ""
        return "\n".join(
            [
                f"Training {name} ({count:,} parameters) on {env.id}, mode {config.mode}, seed {config.seed}{start}",
                f"  actors   {self.num_actors} x {env.num_envs} slots, unrolls of {actor.unroll_length} steps",
                f"  learner  {where}{threads}, {config.learner.batch_size} segments per update",
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
            "ledger": self.ledger.to_json(),
            "mean_return": self.statistics.mean_return,
            "config": to_dict(self.config),
            "versions": versions(),
        }


def _as_it_is(weights: Weights) -> Weights:
    return weights
