"""Actors that die, hang and fail, on a real Ray cluster of several nodes: the run goes on, every step stays in the
books, nothing is left behind. The faults of whole nodes are in ``test_cluster.py``."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
import shoal.actors.supervisor as supervisor_module
from replaying import REFUSED, REFUSED_OF_A_SUCCESSOR, ReplayingSetup
from service import (
    SMALL,
    actor_processes,
    alive,
    descendants,
    files_and_pipes,
    make_setup,
    make_spec,
    read_summary,
    recovered,
    shared_memory,
    start_shoal,
    wait_for,
)
from shoal.actors.config import ActorConfig
from shoal.actors.ray_actor import ProcessLocation, process_location
from shoal.actors.ray_pool import RayPool
from shoal.actors.supervisor import Supervisor, TooManyFailures
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.cli import main
from shoal.deploy.report.recorded_metrics import read_metrics
from shoal.learner.checkpoint import find_checkpoint
from shoal.learner.ledger import Ledger
from shoal.learner.rollout_driver import RolloutDriver
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import Trajectory
from shoal.policy.weights import Weights, flatten_weights

SCRIPTED = "service_envs:Scripted-v0"
STORE = 80 * 2**20
PLACED = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}


@pytest.fixture(scope="module")
def _cluster() -> Iterator[str]:
    """Its address: a head without CPUs, where the coordinator is, and two nodes."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    memory = shared_memory()
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=2, object_store_memory=STORE)
    yield str(made.address)
    ray.shutdown()
    made.shutdown()
    assert shared_memory() <= memory


@pytest.fixture
def cluster(_cluster: str) -> None:
    """This process is connected to it; tests that start Ray themselves disconnect."""
    if not ray.is_initialized():
        ray.init(address=_cluster, log_to_driver=False, logging_level="ERROR")
        # Connections to the nodes are made with the first actors, and kept for the next ones.
        first = Run(make_setup("recall"))
        first.update_until(lambda _: first.pool.num_alive == 2)
        first.pool.close()
        Run.may_hold = files_and_pipes(os.getpid())


class Run:
    """A pool and its trajectory queue, with a loop in place of a learner: every batch is one more version."""

    may_hold: ClassVar[int]
    """Descriptors of this process when all is closed, after any number of faults."""

    def __init__(self, setup: WorkerSetup, num_actors: int = 2, **config: Any) -> None:
        self._memory = shared_memory()
        self.weights = flatten_weights(setup.make_policy(), 0)
        self.trajectory_queue = TrajectoryQueue(
            make_spec(setup),
            run_id=setup.run_id,
            num_actors=num_actors,
            num_envs=setup.num_envs,
            batch_size=setup.num_envs,
            max_policy_lag=2,
            ledger=Ledger(),
        )
        self.version = 0
        self.trained: set[tuple[int, int, int]] = set()
        self.trajectory_queue.publish(0, self.weights)
        self.pool = RayPool(setup, range(num_actors), ActorConfig(**config), self.trajectory_queue, PLACED)

    def update(self) -> Trajectory:
        [trajectory] = self.trajectory_queue.next_batch(self.pool.pump, threading.Event()) or []
        self.trajectory_queue.book([trajectory], trained=trajectory.env_steps)
        header = trajectory.header
        unroll = header.actor, header.restart_index, header.sequence
        assert unroll not in self.trained
        self.trained.add(unroll)
        # An actor that admission has found too slow for the lag, always or at times, is trained at any.
        assert 0 <= self.version - header.policy_version <= 2 or self.found_slow(header.actor)
        self.version += 1
        self.trajectory_queue.publish(self.version, Weights(self.version, self.weights.flat, self.weights.content_hash))
        assert self.trajectory_queue.ledger.balance() == 0
        return trajectory

    def found_slow(self, actor: int) -> bool:
        admission = self.trajectory_queue._admission
        return actor in admission._too_slow or actor in admission._slow_at_times

    def update_until(self, condition: Any, seconds: float = 200) -> Trajectory:
        deadline = time.monotonic() + seconds
        while not condition(trajectory := self.update()):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # the others would have no core to start on
        return trajectory

    def close(self) -> None:
        """Nothing is left behind: no step, no process, no descriptor, no shared memory."""
        processes = self.pool.process_ids()
        back, lost = self.pool.recoveries, self.trajectory_queue.lost_unrolls
        self.pool.close()
        assert self.trajectory_queue.lost_unrolls == lost  # what is under way at the end is nobody's loss
        self.trajectory_queue.close()
        assert self.trajectory_queue.ledger.balance() == self.trajectory_queue.ledger.in_flight == 0
        assert back.count <= sum(self.pool.restarts.values())
        assert back.seconds >= 0.5 * back.count  # the shortest pause before a successor
        assert shared_memory() <= self._memory
        wait_for(lambda: files_and_pipes(os.getpid()) <= self.may_hold, seconds=200)
        wait_for(lambda: not any(map(alive, processes)), seconds=200)


@pytest.mark.usefixtures("cluster")
def test_unrolls_that_nobody_reads_leave_the_store() -> None:
    """Catches a pool that keeps every unroll, so that memory fills up, and one whose unrolls are let go of by whoever
    read them last, where the raylet may be gone."""
    run = Run(make_setup("recall"))
    for _ in range(20):
        read = run.update()
        assert any(np.shares_memory(read.columns["obs"], payload) for payload in run.pool._delivered)
        assert len(run.pool._delivered) <= 6  # some wait in the queue, some came at last
    run.close()


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_is_replaced() -> None:
    """Catches a run that stops, or hangs, with its first dead actor; a replacement that is not counted, or acts with
    the weights of long ago; processes that stay."""
    run = Run(make_setup("recall", num_envs=8, unroll_length=32))
    run.update_until(lambda _: run.pool.num_alive == 2)
    before = run.pool.process_ids()
    os.kill(before[0], signal.SIGKILL)
    back = run.update_until(lambda trajectory: trajectory.header.restart_index == 1)
    # Its very first unroll may be as slow as several of the other actor's and come too late: dropped, and in the books.
    assert back.header.actor == 0
    assert run.version - 1 - back.header.policy_version <= 2
    assert run.pool.restarts == {"died": 1}
    assert run.pool.recoveries.count == 1
    assert run.trajectory_queue.lost_unrolls <= 1
    assert set(run.trajectory_queue.ledger.dropped) <= {"stale"}
    assert not run.trajectory_queue.refused
    assert run.pool.num_alive == 2
    assert len(set(run.pool.process_ids()) - set(before)) == 1
    run.close()


class StopsInItsStart:
    """An actor whose first restart index hangs before it can answer anything."""

    def __init__(self, restart_index: int) -> None:
        if restart_index == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    def process_location(self) -> ProcessLocation:
        return process_location()

    def build(self) -> None:
        pass


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_hangs_in_its_start_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a process that hangs before it said where it is, taken for one that waits for a place: for ever."""
    monkeypatch.setattr(supervisor_module, "REPORT_AFTER_SECONDS", 1.0)
    monkeypatch.setattr(supervisor_module, "REPORT_AGAIN_SECONDS", 1.0)
    supervisor = Supervisor(
        range(1),
        title="actor",
        make=lambda _, restart_index: ray.remote(StopsInItsStart).options(**PLACED).remote(restart_index),
        needs="1 CPU",
        call_timeout_seconds=60.0,
        max_consecutive_failures=100,
        on_lost=lambda slot: None,
        build_timeout_seconds=20.0,
    )
    [slot] = supervisor.all

    def up() -> bool:
        supervisor.start_due()
        supervisor.fail_overdue()
        if slot.call is not None and ray.wait([slot.call], timeout=0)[0]:
            supervisor.collect(slot)
        return bool(supervisor.up())

    wait_for(lambda: up() or slot.process_location)
    assert slot.process_location
    hung = slot.process_location.process_id
    wait_for(up)
    assert slot.restart_index == supervisor.restarts["timeout"] >= 1
    assert "the processes of 1 are still starting" in caplog.text
    wait_for(lambda: not alive(hung))
    supervisor.close()


@pytest.mark.usefixtures("cluster")
def test_an_unroll_under_way_is_lost_and_counted(tmp_path: Path) -> None:
    """Catches an admission that is never given back: in the end nobody would be admitted any more."""
    setup = make_setup(SCRIPTED, how="exits", at=30, marker=str(tmp_path / "marker"))
    run = Run(setup)
    run.update_until(lambda trajectory: trajectory.header.restart_index == 1)
    assert run.pool.restarts == {"died": 1}
    assert run.pool.recoveries.count == 1
    assert run.trajectory_queue.lost_unrolls == 1
    run.close()


@pytest.mark.usefixtures("cluster")
def test_a_hanging_environment_is_replaced(tmp_path: Path) -> None:
    """Catches one environment that sleeps for ever and takes its actor, or everybody, with it."""
    setup = make_setup(SCRIPTED, how="hangs", at=30, marker=str(tmp_path / "marker"))
    # Long enough for the other actor on a busy machine, whose calls take milliseconds.
    run = Run(setup, unroll_timeout_seconds=15.0)
    run.update_until(lambda trajectory: trajectory.header.restart_index == 1)
    assert run.pool.restarts == {"timeout": 1}
    assert run.pool.recoveries.count == 1
    assert run.trajectory_queue.lost_unrolls == 1
    run.close()


@pytest.mark.usefixtures("cluster")
def test_what_comes_twice_or_from_another_run_is_not_trained(tmp_path: Path) -> None:
    """Catches steps that are trained or booked twice, or a successor that is taken for its predecessor; fault 16."""
    plain = make_setup("recall", num_envs=8, unroll_length=32)
    setup = ReplayingSetup(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}, folder=tmp_path)
    run = Run(setup)
    expected = REFUSED + REFUSED
    run.update_until(lambda _: run.trajectory_queue.refused == expected)
    [victim, _] = run.pool.process_ids()
    os.kill(victim, signal.SIGKILL)
    expected += REFUSED_OF_A_SUCCESSOR
    run.update_until(lambda _: run.trajectory_queue.refused == expected)
    at = run.version
    run.update_until(lambda trajectory: run.version >= at + 20 and trajectory.header.restart_index == 1)
    assert run.trajectory_queue.refused == expected
    assert run.pool.restarts == {"died": 1}
    # Not each of their first ones: a successor's may come too late.
    assert {unroll[:2] for unroll in run.trained} == {(0, 0), (0, 1), (1, 0)}
    run.close()


@pytest.mark.usefixtures("cluster")
def test_nobody_waits_for_a_straggler(tmp_path: Path) -> None:
    """Catches a barrier among actors, and unrolls that are trained although they came too late; fault 10."""
    setup = make_setup(SCRIPTED, how="dawdles", at=30, marker=str(tmp_path / "marker"))
    run = Run(setup)
    run.update_until(lambda _: (tmp_path / "marker").exists())
    start = run.version
    run.update_until(lambda _: run.version == start + 50)
    # Until the straggler is back, whose unroll takes 0.8 s: the other one went on for dozens of versions.
    dropped = run.trajectory_queue.ledger.dropped
    run.update_until(lambda _: bool(dropped) or any(map(run.found_slow, range(2))))
    assert set(dropped) <= {"stale"}
    assert run.pool.restarts == {}
    run.close()


@pytest.mark.usefixtures("cluster")
def test_actors_wait_for_a_learner_that_stalls() -> None:
    """Catches a queue that grows while the learner is busy with something else, until memory is gone; fault 11."""
    run = Run(make_setup("recall", num_envs=8, unroll_length=32))
    run.update_until(lambda _: run.pool.num_alive == 2)
    driver = RolloutDriver(run.pool.pump, run.trajectory_queue)
    driver.start()
    time.sleep(3)
    waiting, held = run.trajectory_queue.queued_segments, run.trajectory_queue.queued_bytes
    time.sleep(1)
    assert (run.trajectory_queue.queued_segments, run.trajectory_queue.queued_bytes) == (waiting, held)
    assert waiting <= 3 * 8  # the batch that may be trained now, and max_policy_lag=2 more
    driver.stop()
    run.update_until(lambda _: run.version > 20)
    run.close()


@pytest.mark.usefixtures("cluster")
def test_an_environment_that_always_fails_ends_the_run() -> None:
    """Catches an endless loop of restarts, and an end that does not say what the environment said."""
    run = Run(make_setup(SCRIPTED, how="raises"), num_actors=1, max_consecutive_failures=2)
    with pytest.raises(TooManyFailures, match="actor 0 failed 2 times in a row") as caught:
        run.update()
    assert "lost the plot" in str(caught.value)
    assert "slot 0, step" in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "EnvironmentFault"
    assert run.pool.restarts == {"error": 2}
    assert run.pool.num_alive == 0
    run.close()


@pytest.mark.usefixtures("cluster")
def test_an_actor_refuses_other_weights_than_were_published() -> None:
    """Catches an actor that plays on with weights which were damaged on their way."""
    run = Run(make_setup("recall"), num_actors=1, max_consecutive_failures=1)
    run.trajectory_queue.publish(1, Weights(1, run.weights.flat + 1, run.weights.content_hash))
    with pytest.raises(TooManyFailures, match="WeightsError: weights of version 1: expected content hash"):
        run.update()
    run.close()


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_a_run_survives_the_loss_of_an_actor(tmp_path: Path) -> None:
    """The same through the command line; and Ctrl-C, which a terminal sends to Ray's processes too, ends it cleanly."""
    process = start_shoal(
        *(
            "train",
            *SMALL,
            "actor.num_actors=2",
            "total_env_steps=1000000000",
            "max_seconds=800",
            "run_dir=run",
            "checkpoint.every_updates=20",
        ),
        cwd=tmp_path,
    )

    def newest() -> int:
        return max((int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("0*")), default=0)

    def recoveries() -> float:
        metrics = tmp_path / "run" / "metrics.jsonl"
        return max(read_metrics(metrics).curve("actor_recoveries")[1], default=0) if metrics.exists() else 0

    # The first may have made some updates before the second is there.
    wait_for(lambda: newest() and len(actor_processes(process.pid)) == 2, process=process)
    children = descendants(process.pid)
    victim, survivor = actor_processes(process.pid)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: set(actor_processes(process.pid)) > {survivor}, process=process)
    # The other actor alone makes updates, too: the successor is back with its first delivery.
    wait_for(lambda: recoveries() == 1, process=process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    summary = recovered(tmp_path / "run")
    assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == 1
    assert summary["actor_recovery_seconds"]["mean"] >= 0.5  # the pause before it comes back
    assert "1 actors replaced (up again after" in output
    assert summary["log_prob_checks"] > 10
    assert find_checkpoint(tmp_path / "run").policy_version == summary["policy_version"]
    wait_for(lambda: not any(map(alive, children)), seconds=200)


@pytest.mark.usefixtures("no_ray")
def test_lock_step_is_the_same_in_every_mode(tmp_path: Path) -> None:
    """Catches an update that depends on where actors live, or on who was faster."""
    settings = [*SMALL, "actor.num_actors=2", "actor.max_policy_lag=0", "total_env_steps=600", "learner.num_threads=2"]
    settings += ["evaluation.random_seconds=10"]
    found = []
    for mode in ("inline", "local"):
        assert main(["train", *settings, f"mode={mode}", f"run_dir={tmp_path / mode}"]) == 0
        summary = read_summary(tmp_path / mode)
        assert summary["policy_lag"] == {"mean": 0, "max": 0}
        # The random policy plays in this process, or where the actors are.
        random = summary["random_return"], summary["random_return_ci95"]
        assert None not in random
        found.append((summary["policy_version"], summary["weights_sha256"], summary["env_steps"], random))
    assert found[0] == found[1]


def test_a_bad_answer_costs_one_slot_an_episode(tmp_path: Path) -> None:
    """Catches nonsense of an environment that reaches the weights, ends the run, or goes unreported."""
    env = ("env.id=" + SCRIPTED, 'env.kwargs={how: "raises,nan,shape,dtype,reward", at: 40}', "env.num_envs=8")
    assert main(["train", *SMALL, *env, "mode=inline", "total_env_steps=2000", f"run_dir={tmp_path / 'run'}"]) == 0
    summary = read_summary(tmp_path / "run")
    assert summary["env_faults"] >= 8
    assert summary["skipped_updates"] == summary["actor_restarts"] == 0
    log = (tmp_path / "run" / "run.log").read_text()
    lines = [line for line in log.splitlines() if "WARNING" in line]
    counted = [int(found[1]) for line in lines if (found := re.search(r"(\d+) more faults of environments", line))]
    assert len(lines) - len(counted) + sum(counted) == summary["env_faults"]
    for slot in range(8):
        # The environment's 40th step; its 6 resets count too.
        assert f"{SCRIPTED}: slot {slot}, step 46" in log
    for message in (
        "RuntimeError: lost the plot",
        "obs has a value that is not finite",
        "obs has shape (5,), must be (4,)",
        "obs has dtype <U1, must be float32",
        "reward inf is not finite",
    ):
        assert message in log
    assert all(p.isfinite().all() for p in find_checkpoint(tmp_path / "run").make_policy().parameters())


def test_an_environment_that_only_fails_ends_a_run_with_its_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a failed run whose last words are about something else than what failed, and one without a summary."""
    env = ("env.id=" + SCRIPTED, "env.kwargs={how: raises}", "env.num_envs=8", "mode=inline")
    assert main(["train", *SMALL, *env, f"run_dir={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err
    assert "shoal: the run failed: EnvironmentFault: " in error
    assert "lost the plot" in error
    assert "Traceback" not in error
    assert "lost the plot" in (tmp_path / "run" / "traceback.txt").read_text()
    assert read_summary(tmp_path / "run")["env_steps"] == 0
