"""One run, from its settings to its summary: prepare, start the workers, watch, train, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.actors.pool import InlinePool, Recoveries
from shoal.actors.ray_watch import RayLost
from shoal.deploy.evaluation.evaluator import Evaluator, Jobs, Rounds, kept_state, training_side
from shoal.deploy.evaluation.job_process import JobProcess
from shoal.deploy.monitoring.catalogue import Sources
from shoal.deploy.monitoring.endpoint import served
from shoal.deploy.monitoring.history import MetricsHistory
from shoal.deploy.monitoring.metrics_server import MetricsServer
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.monitoring.sinks import LoggedRun, SinkThread, make_sinks
from shoal.deploy.monitoring.stall import Stall
from shoal.deploy.placement.versions import versions
from shoal.deploy.records.evaluations import Evaluations
from shoal.deploy.records.json_file import write_json
from shoal.deploy.records.run_dir import CannotStart, exclusive, log_file
from shoal.deploy.records.waits import told_if_slow
from shoal.deploy.settings.earlier import keep
from shoal.deploy.settings.load import to_dict, to_yaml
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.callbacks import Callback, CallbackFailed, Callbacks, make_callbacks, restore_callbacks
from shoal.deploy.training.going_on import get_rollouts, restore_pool
from shoal.deploy.training.interruption import Interruption, interruption
from shoal.deploy.training.prepared_run import PreparedRun, describe_together, prepare
from shoal.deploy.training.progress import Progress, headline
from shoal.deploy.training.random_play import SHARE_BEFORE, RandomPlay, RandomPlayer, Returns
from shoal.deploy.training.summary import summarize, together
from shoal.deploy.training.worker_group import WorkerGroup, setup_of_actors, start_workers
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.opponents import Result
from shoal.learner.training_loop import Limits, Saving, TrainedPolicy, train
from shoal.policy.weights import Weights
from shoal.problems import problems_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run."""

    summary: dict[str, Any]
    interrupted_by: int | None
    """The signal that ended it; None where none did."""
    ray_lost: bool
    """Ray ended under it, and threads of this process may wait for Ray for ever."""


@dataclasses.dataclass(frozen=True, slots=True)
class Watchers:
    """The parts that observe a run and take no part in it; of several policies each has its own."""

    progress: tuple[Progress, ...]
    evaluations: Mapping[str, Evaluations]
    callbacks: Callbacks
    server: MetricsServer | None
    finished: threading.Event
    """The run has ended as it was meant to."""


def run(
    config: Config,
    run_dir: Path,
    *,
    callbacks: Sequence[Callback] = (),
    shown: Path | None = None,
    quiet: bool = False,
    owns_process: bool = True,
) -> Outcome:
    """Train to the end or to the first signal; the run directory then holds a checkpoint and ``summary.json``.

    Args:
        config: the configuration, checked by ``deploy.doctor.preflight``.
        run_dir: directory of the run.
        callbacks: called beside those of ``config.callbacks``.
        shown: what the summary on the screen calls the directory; None is its absolute path.
        quiet: print nothing.
        owns_process: a second signal ends the process; otherwise it raises KeyboardInterrupt.

    Raises:
        CannotStart: another process has the run directory, or the policy cannot be made from settings and checkpoint.
        CallbackFailed: a callback raised; the run is saved.
        RayLost: Ray's head or raylet ended; the run is saved, unless the message says otherwise.
        Exception: whatever ended the run early; the summary is written all the same.
    """
    # An environment may change the working directory in the middle of the run.
    run_dir = run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(exclusive(run_dir))
        stack.enter_context(log_file(run_dir, json_lines=config.log.format == "json"))
        cluster = None
        if config.mode == "cluster":
            from shoal.deploy.cluster.connect import connect
            from shoal.deploy.cluster.own_modules import own_modules

            cluster = stack.enter_context(connect(config.cluster, own_modules(config), owns_process=owns_process))
            stack.callback(cluster.end_turn)
        try:
            called = make_callbacks(config.callbacks, callbacks)
            with told_if_slow(f"making {config.env.id}"):
                prepared = prepare(config, run_dir, cluster)
            restore_callbacks(called, prepared[0].origin.run_state)
            sinks = [_sinks(each, stack) for each in prepared]
        except ValueError as error:
            raise CannotStart(*problems_of(error)) from error
        # Written only now: where the run cannot be continued, the directory stays as it was.
        for directory in dict.fromkeys((run_dir, *(each.run_dir for each in prepared))):
            directory.mkdir(parents=True, exist_ok=True)
            if prepared[0].origin.same_run and prepared[0].origin.changes:
                keep(directory, *prepared[0].origin.trained_with)
            (directory / "config.yaml").write_text(to_yaml(config))
            # That of an earlier session would be taken for the end of this one, if it is killed.
            (directory / "summary.json").unlink(missing_ok=True)
        with told_if_slow(f"making {config.env.id} for every worker"):
            workers = _start(prepared, run_dir, stack, owns_process=owns_process)
        if cluster:
            cluster.end_turn_soon()
        # Signal handlers are set after Ray, which sets its own.
        asked = stack.enter_context(interruption(config.max_seconds, owns_process=owns_process, quiet=quiet))
        watchers = _watch(prepared, run_dir, workers, asked, sinks, called, stack, quiet=quiet)
        for each in prepared:
            stack.callback(each.learner.learner.close)
        if watch := workers.watch:
            watch.expect_end(lambda: asked.signal_number is not None)
            # What is lost after training stopped nothing.
            watch.tell(lambda: None if prepared[0].statistics.ended else asked.stop("ray_lost"))
        try:
            summary = _train(prepared, workers, asked, watchers, run_dir)
        except Exception as error:
            if watch and watch.lost.is_set():
                raise RayLost(f"{watch.why}; and then {type(error).__name__}: {error}") from error
            raise
        for each, progress in zip(prepared, watchers.progress, strict=True):
            own = summary["policies"][each.policy] if each.policy else summary
            progress.summary(own, shown or run_dir, is_last=each is prepared[-1])
        if watch and asked.stopped_by == "ray_lost":
            raise RayLost(f"{watch.why}; policy version {summary['policy_version']} is saved")
        if asked.signal_number is None:
            watchers.finished.set()
            if watchers.server:
                watchers.server.wait_for_scrape(
                    config.metrics.last_scrape_seconds,
                    lambda: asked.signal_number is not None or bool(watch and watch.lost.is_set()),
                )
        return Outcome(summary, asked.signal_number, bool(watch and watch.lost.is_set()))


def _sinks(run: PreparedRun, stack: contextlib.ExitStack) -> list[SinkThread]:
    """The sinks of a run, or of one of its policies; they end with ``stack``, if the history was not begun."""
    config = run.config
    which = f"-{run.policy}" if run.policy else ""
    run.run_dir.mkdir(parents=True, exist_ok=True)  # for their files
    logged = LoggedRun(
        directory=run.run_dir,
        id=run.origin.run_id + which,
        name=(config.log.name or run.name) + which,
        config=to_dict(config),
        policy=run.policy,
        project=config.log.project,
    )
    sinks = make_sinks(config.log, logged)
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def _start(
    runs: Sequence[PreparedRun], run_dir: Path, stack: contextlib.ExitStack, *, owns_process: bool
) -> WorkerGroup:
    """Start the workers, which end with ``stack``.

    Raises:
        RayLost: Ray ended meanwhile; the summary says so.
    """

    def lost() -> None:
        _summaries(runs, run_dir, _evaluations(runs), stopped_by="ray_lost")

    def gone(why: str) -> None:
        log.error("%s", why)
        lost()
        if owns_process:
            os._exit(1)  # Ray, whose start does not end, would end it in a minute

    try:
        return stack.enter_context(start_workers(runs, owns_process=owns_process, gone=gone))
    except RayLost:
        lost()
        raise


def _watch(
    runs: Sequence[PreparedRun],
    run_dir: Path,
    workers: WorkerGroup,
    asked: Interruption,
    sinks: Sequence[list[SinkThread]],
    called: list[Callback],
    stack: contextlib.ExitStack,
    *,
    quiet: bool,
) -> Watchers:
    """Serve the metrics, print the headline, and begin the history, which ends with ``stack``."""
    first, config = runs[0], runs[0].config
    finished = threading.Event()
    sources: dict[str, Sources] = {}
    shown: list[Progress] = []
    # The policies are updated in turn: what keeps one from it keeps all.
    stall = Stall(statistics=first.statistics, states=lambda: workers.states)
    evaluations = _evaluations(runs)
    callbacks = Callbacks(called, runs, run_dir, evaluations, lambda: asked.stop("callback"))
    for run in runs:
        progress = Progress(
            run.statistics,
            run.learner.queue,
            workers,
            run.bottleneck,
            run.learning,
            total_env_steps=config.total_env_steps,
            share_trained=functools.partial(_share_trained, runs),
            time_is_up_at=asked.time_is_up_at,
            json_lines=config.log.format == "json",
            evaluations=evaluations[run.policy],
            opponents=functools.partial(_opponents, run),
            quiet=quiet,
            stalled=stall.now,
            policy=run.policy,
            leads=run is first,
        )
        sources[run.policy] = _sources(run, workers, evaluations[run.policy], callbacks, progress, finished)
        shown.append(progress)
    ready = Readiness(
        statistics=first.statistics,
        actors_alive=lambda: workers.num_alive,
        stopping=asked.requested.is_set,
        max_update_age_seconds=config.metrics.max_update_age_seconds,
        stalled=stall.now,
    )
    server = stack.enter_context(served(config.metrics, sources, ready, run=run_dir.name))
    for run, progress, own in zip(runs, shown, sinks, strict=True):
        progress.say(headline(run, server.url if server else None))
        history = MetricsHistory(
            sources[run.policy],
            run.run_dir,
            session=run.origin.session,
            every_seconds=config.log.every_seconds,
            sinks=own,
        )
        stack.callback(history.close)
    return Watchers(tuple(shown), evaluations, callbacks, server, finished)


def _train(
    runs: Sequence[PreparedRun], workers: WorkerGroup, asked: Interruption, watchers: Watchers, run_dir: Path
) -> dict[str, Any]:
    """Train, then end everything in the order in which data flows, and write the summary."""
    run = runs[0]
    weights: Sequence[Weights] = ()
    completed = False
    random = _random_player(runs, workers)
    callbacks = watchers.callbacks
    rounds = Rounds({each.policy: each.learner for each in runs}, callbacks)
    policies = [
        TrainedPolicy(name=each.policy, learners=learners, statistics=each.statistics, updates=each.updates)
        for each, learners in zip(runs, workers.learners, strict=True)
    ]
    saving = Saving(write=_checkpoint_writer(runs, workers, callbacks), undisturbed=asked.deferred)
    if workers.watch:
        workers.watch.warn(saving.asked.set)
    limits = Limits(total_env_steps=run.config.total_env_steps, checkpoint_every=run.config.checkpoint.every_updates)
    try:
        with contextlib.ExitStack() as watched:
            for progress in watchers.progress:
                watched.enter_context(progress)
            watched.enter_context(_evaluator(runs, watchers.evaluations, rounds, asked))
            callbacks.started()
            if workers.driver:
                workers.driver.start()
            random.before(asked.requested.is_set)
            for each in runs:
                restore_pool(each, workers.pool)
                each.statistics.begin()
            weights = train(policies, saving, limits, asked.requested, rounds)
            for each in runs:
                # What follows is no training.
                each.statistics.end()
        completed = True
    finally:
        for each in runs:
            each.statistics.end()
        try:
            # Whatever ended the run: peer learners still have their parts.
            for each, learners in zip(runs, workers.learners, strict=True):
                each.updates.write(each.learner.learner, each.learner.recorder, learners.recorded)
        finally:
            workers.close()
            for each in runs:
                each.learner.queue.close()
        if completed and asked.stopped_by != "ray_lost":
            # After a failure no episode is played: the environment may be the cause.
            random.after(lambda: asked.signal_number is not None, asked.time_is_up_at - time.monotonic())
        random.close()
        summary = _summaries(
            runs,
            run_dir,
            watchers.evaluations,
            workers=workers,
            progress=watchers.progress,
            weights=weights,
            interrupted_by=asked.signal_number,
            stopped_by=asked.stopped_by or None,
        )
        if not completed:
            _end_after_failure(callbacks, summary)
    callbacks.ended(summary)
    return summary


def _summaries(
    runs: Sequence[PreparedRun],
    run_dir: Path,
    evaluations: Mapping[str, Evaluations],
    *,
    workers: WorkerGroup | None = None,
    progress: Sequence[Progress] = (),
    weights: Sequence[Weights] = (),
    interrupted_by: int | None = None,
    stopped_by: str | None = None,
) -> dict[str, Any]:
    """Write the summaries of a run that is over, and return that of the whole run.

    Without ``workers`` and ``progress`` the run never began to train; without ``weights`` it failed.
    """
    summaries = {}
    for number, run in enumerate(runs):
        about = {"env_id": run.config.env.id, "seed": run.config.seed, "policy_kind": run.config.policy.kind}
        summaries[run.policy] = summarize(
            run.statistics,
            run.learner.queue,
            actor_restarts=sum(workers.restarts.values()) if workers else 0,
            recoveries=workers.recoveries if workers else Recoveries(),
            weights=weights[number] if weights else None,
            trained_before=run.before.trained,
            learning=run.learning.now(progress[number].share_done if progress else 0.0),
            interrupted_by=interrupted_by,
            stopped_by=stopped_by,
            limit=run.bottleneck.whole(),
            evaluations=evaluations[run.policy],
            opponents=_results(run),
            about=about | ({"policy": run.policy} if run.policy else {}),
        )
        write_json(run.run_dir / "summary.json", summaries[run.policy])
    summary = summaries[""] if "" in summaries else together(summaries)
    write_json(run_dir / "summary.json", summary)
    return summary


def _checkpoint_writer(runs: Sequence[PreparedRun], workers: WorkerGroup, callbacks: Callbacks) -> Callable[[], Path]:
    """What writes a checkpoint of the whole run."""
    run = runs[0]
    if run.policy:
        return lambda: run.checkpoints.save_policies(
            {each.policy: (each.learner.learner, each.describe()) for each in runs},
            describe_together(runs) | callbacks.get_state(),
        )
    rollouts, opponents = _rollouts(run, workers), run.learner.opponents
    return lambda: run.checkpoints.save(
        run.learner.learner,
        run.describe() | callbacks.get_state(),
        rollouts=rollouts(),
        opponents=None if opponents is None else opponents.get_state(),
    )


def _share_trained(runs: Sequence[PreparedRun]) -> float:
    """The share of ``total_env_steps`` that is trained, by all policies."""
    return sum(run.learner.queue.ledger.trained for run in runs) / runs[0].config.total_env_steps


def _opponents(run: PreparedRun) -> Sequence[Result]:
    return _results(run) or ()


def _results(run: PreparedRun) -> tuple[Result, ...] | None:
    """Results against the versions of self-play; None without it."""
    return None if run.learner.opponents is None else run.learner.opponents.results


def _rollouts(run: PreparedRun, workers: WorkerGroup) -> Callable[[], dict[str, Any] | None]:
    """What tells the acting side's state for checkpoints, where that is in this process alone."""
    pool = workers.pool
    if run.config.mode == "inline" and isinstance(pool, InlinePool):
        return functools.partial(get_rollouts, run.learner, pool)
    return lambda: None


def _end_after_failure(callbacks: Callbacks, summary: dict[str, Any]) -> None:
    """Call ``on_end`` without hiding what ended the run."""
    try:
        callbacks.ended(summary)
    except CallbackFailed as error:
        log.error("after the failure of the run also a callback failed: %s", error)


def _sources(
    run: PreparedRun,
    workers: WorkerGroup,
    evaluations: Evaluations,
    callbacks: Callbacks,
    progress: Progress,
    finished: threading.Event,
) -> Sources:
    """The objects that the metrics are read from."""
    config, path = run.config, run.learner.learner.path
    return Sources(
        statistics=run.statistics,
        trajectory_queue=run.learner.queue,
        actors_alive=lambda: workers.num_alive,
        actor_restarts=lambda: workers.restarts,
        bottleneck=run.bottleneck.now,
        learning=lambda: run.learning.now(progress.share_done),
        before=run.before,
        build=versions(),
        about={
            "mode": config.mode,
            "placement": run.layout.placement,
            "env_id": config.env.id,
            # The label ``policy`` is the name of one of several.
            "policy_kind" if run.policy else "policy": config.policy.kind,
            "device": path.device.type,
            "session": str(run.origin.session),
        },
        actor_states=lambda: workers.states,
        recoveries=lambda: workers.recoveries.count,
        recovery_seconds=lambda: workers.recoveries.seconds,
        lags=run.learner.queue.lags if run.policy else workers.lags,
        late_unrolls=run.learner.queue.late if run.policy else workers.late_unrolls,
        accelerator_memory=path.memory_bytes,
        finished=finished.is_set,
        target_env_steps=run.target_env_steps,
        run_dir=run.run_dir,
        evaluations=evaluations,
        opponents=functools.partial(_opponents, run),
        callback_numbers=lambda: callbacks.numbers(run.policy),
    )


def _random_player(runs: Sequence[PreparedRun], workers: WorkerGroup) -> RandomPlayer:
    config = runs[0].config

    def found(random: Returns) -> None:
        for run in runs:
            run.learning.random = random.get(run.policy)

    play = RandomPlay(
        setup=setup_of_actors(runs),
        num_agents=sum(run.setup.env.num_agents for run in runs),
        niceness=config.evaluation.niceness,
    )
    seconds = min(config.evaluation.random_seconds, SHARE_BEFORE * (config.max_seconds or math.inf))
    return RandomPlayer(play, seconds, found, workers.elsewhere)


def _evaluations(runs: Sequence[PreparedRun]) -> dict[str, Evaluations]:
    """The results of every policy, with those of earlier sessions."""
    return {run.policy: Evaluations(run.run_dir / "evaluation.jsonl", run.policy) for run in runs}


def _evaluator(
    runs: Sequence[PreparedRun], evaluations: Mapping[str, Evaluations], rounds: Rounds, asked: Interruption
) -> contextlib.AbstractContextManager[object]:
    """Evaluation during training; does nothing where ``evaluation.every_env_steps`` is 0."""
    run = runs[0]
    config, learner = run.config.evaluation, run.learner.learner
    best = Checkpoints(run.run_dir / "best") if config.best and not run.policy else None
    if best:
        evaluations[run.policy].reconcile(kept_state(best))
    if not config.every_env_steps:
        return contextlib.nullcontext()
    jobs: Jobs = JobProcess(silent=True)
    if run.cluster:
        from shoal.deploy.evaluation.ray_jobs import RayJobs

        jobs = RayJobs(run.cluster.session(run.machine).actor_options, run.cluster.watch)
    return Evaluator(
        config,
        training_side(
            setup_of_actors(runs),
            config,
            num_agents=sum(each.setup.env.num_agents for each in runs),
            seed=run.config.seed,
            agents={each.policy: each.agents for each in runs},
        ),
        jobs,
        evaluations,
        session=run.origin.session,
        newest=lambda: rounds.newest,
        env_steps=sum(each.before.trained for each in runs),
        describe=run.describe,
        keep_best=(lambda weights, state: best.save(learner, state, weights)) if best else None,
        hurried=asked.requested.is_set,
    )
