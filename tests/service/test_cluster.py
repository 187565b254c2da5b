"""``mode=cluster`` on a real Ray cluster of several nodes (raylets) on this machine, with faults injected for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import (
    SHARED,
    SMALL,
    actor_processes,
    alive,
    open_files,
    read_summary,
    recovered,
    shared_memory,
    shoal,
    start_shoal,
    ups,
    wait_for,
)
from shoal.actors.supervisor import REPORT_AFTER_SECONDS

STORE = 80 * 2**20
ROLLOUT = {"role": "rollout"}
TEAMS = (
    *("env.id=pettingzoo:beside_the_run:teams", "env.num_envs=12", "learner.batch_size=24"),
    *("policies.hunters.agents=[hunter_*]", "policies.runners.agents=[runner_*]"),
)
"""Two policies, in games of a module that ``teams_beside`` writes."""


class Nodes:
    """A head without CPUs, where the learner is, and rollout nodes of two CPUs each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.rollout: list[Any] = []
        self.runs: list[subprocess.Popen[str]] = []
        self.have(2)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        self.rollout.append(self.cluster.add_node(num_cpus=2, labels=ROLLOUT, object_store_memory=STORE))
        return self.rollout[-1]

    def start(self, tmp_path: Path, *more: str) -> subprocess.Popen[str]:
        """A run without an end."""
        endless = ("total_env_steps=1000000000", "max_seconds=800", "run_dir=run", "checkpoint.every_updates=5")
        self.runs.append(start_shoal("train", *settings(self, *endless, *more), cwd=tmp_path))
        return self.runs[-1]

    def have(self, number: int) -> None:
        """Exactly so many rollout nodes."""
        while len(self.rollout) < number:
            self.add()
        while len(self.rollout) > number:
            self.kill(self.rollout[-1])

    def kill(self, node: Any) -> None:
        """SIGKILL its raylet."""
        self.rollout.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def actors(self) -> dict[int, str]:
        """Node id by process id of every rollout actor in the cluster."""
        found = {}
        for node in (self.cluster.head_node, *self.rollout):
            raylet = node.all_processes["raylet"][0].process.pid
            found |= dict.fromkeys(actor_processes(raylet), node.node_id)
        return found

    def drain(self, node: Any) -> None:
        """As a cloud that takes a machine back, half a minute ahead."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address),
            *("--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"),
            *("--deadline-remaining-seconds", "30"),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[Nodes]:
    import ray

    ray.shutdown()
    memory = shared_memory()
    made = Nodes()
    yield made
    made.cluster.shutdown()
    assert shared_memory() <= memory


@pytest.fixture
def nodes(_cluster: Nodes) -> Iterator[Nodes]:
    """The cluster; no run is left on it, however the test ends."""
    yield _cluster
    for process in _cluster.runs:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _cluster.runs.clear()


def settings(nodes: Nodes, *more: str) -> list[str]:
    return [*SMALL, "mode=cluster", f"cluster.address={nodes.address}", "cluster.actor_labels={role: rollout}", *more]


def newest(tmp_path: Path) -> int:
    return max((int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("0*")), default=0)


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> str:
    process.send_signal(number)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    return output


def goes_on(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    """Updates are made from now on."""
    at = newest(tmp_path)
    wait_for(lambda: newest(tmp_path) > at + 20, process=process)


def come_up(tmp_path: Path, process: subprocess.Popen[str], number: int) -> None:
    """So many actors in all, the replaced ones included."""
    wait_for(lambda: ups(tmp_path / "run") == number, process=process)


def lets_go(process: subprocess.Popen[str], held: int) -> None:
    """Wait until the process has closed its connections to actors that are gone, some time after."""
    wait_for(lambda: open_files(process.pid) <= held, seconds=60, process=process)


def test_lock_step_gives_the_weights_of_inline_mode(nodes: Nodes, tmp_path: Path) -> None:
    """Catches an update that depends on where actors live."""
    nodes.have(2)
    lock_step = ("actor.num_actors=2", "actor.max_policy_lag=0", "total_env_steps=600")
    done = shoal("train", *settings(nodes, *lock_step), "run_dir=cluster", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    inline = shoal("train", *SMALL, *lock_step, "mode=inline", "run_dir=inline", cwd=tmp_path)
    assert inline.returncode == 0, inline.stdout + inline.stderr
    found = [read_summary(tmp_path / name) for name in ("cluster", "inline")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    assert found[0]["env_steps"] == found[1]["env_steps"]


def test_a_sink_works_in_the_process_of_the_run(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a sink that is made on another node, whose module is sent there, or that lacks lines of the run."""
    nodes.have(2)
    # All nodes are on this machine, where a path leads to one file.
    imported = tmp_path / "imported"
    (tmp_path / "notes.py").write_text(
        "import os, shoal\n"
        f"print(os.getpid(), file=open({str(imported)!r}, 'a'))\n"
        "class Notes(shoal.Sink):\n"
        "    def open(self, run): self.out = (run.directory / 'notes').open('w')\n"
        "    def write(self, line): print(os.getpid(), line['time'], file=self.out)\n"
        "    def close(self): self.out.close()\n"
    )
    more = ("actor.num_actors=2", "total_env_steps=600", "log.sinks=[notes:Notes]", "run_dir=run")
    process = start_shoal("train", *settings(nodes, *more), cwd=tmp_path)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "notes.py" not in said
    times = [json.loads(line)["time"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    noted = (tmp_path / "run" / "notes").read_text().splitlines()
    assert noted == [f"{process.pid} {time}" for time in times]
    assert noted
    assert imported.read_text().split() == [str(process.pid)]


def teams_beside(tmp_path: Path) -> None:
    """The module of ``TEAMS``, in the directory of the run alone."""
    pytest.importorskip("pettingzoo")
    (tmp_path / "beside_the_run.py").write_text("from team_games import teams\n")


def test_several_policies_have_the_weights_of_inline_mode(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a policy whose weights do not reach other nodes, a module of the user's that stays here, and an update
    that depends on where actors live."""
    nodes.have(2)
    teams_beside(tmp_path)
    lock_step = (*TEAMS, "actor.num_actors=2", "actor.max_policy_lag=0", "total_env_steps=800")
    lock_step += ("evaluation.random_seconds=0",)
    done = shoal("train", *settings(nodes, *lock_step), "run_dir=cluster", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    inline = shoal("train", *SMALL, *lock_step, "mode=inline", "run_dir=inline", cwd=tmp_path)
    assert inline.returncode == 0, inline.stdout + inline.stderr
    for policy in ("hunters", "runners"):
        found = [read_summary(tmp_path / name / "policies" / policy) for name in ("cluster", "inline")]
        assert found[0]["policy_version"] > 1
        assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
        assert found[0]["env_steps"] == found[1]["env_steps"]


@pytest.mark.slow
def test_an_actor_of_several_policies_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    """Catches an unroll that one policy waits for and another has given up, and steps that are lost from one ledger."""
    nodes.have(2)
    teams_beside(tmp_path)
    process = nodes.start(tmp_path, *TEAMS, "actor.num_actors=2")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 2, process=process)
    victim = next(iter(nodes.actors()))
    os.kill(victim, signal.SIGKILL)
    come_up(tmp_path, process, 3)
    goes_on(tmp_path, process)
    output = end(process)
    found = [read_summary(tmp_path / "run" / "policies" / policy) for policy in ("hunters", "runners")]
    for summary in found:
        assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == 1, output
        assert summary["lost_unrolls"] <= 1
    assert found[0]["lost_unrolls"] == found[1]["lost_unrolls"]
    assert found[0]["policy_version"] == pytest.approx(found[1]["policy_version"], abs=1)


@pytest.mark.slow
def test_learners_on_several_nodes_make_the_update_of_one(nodes: Nodes, tmp_path: Path) -> None:
    """Catches learners that meet on a loopback interface, or make another update than one learner would."""
    nodes.have(2)
    several = (*SHARED, "learner.num_learners=3", "learner.batch_size=24", "total_env_steps=2000")
    on_nodes = ("mode=cluster", f"cluster.address={nodes.address}", "cluster.learner_labels={role: rollout}")
    for name, where in (("cluster", on_nodes), ("inline", ("mode=inline",))):
        done = shoal("train", *several, *where, f"run_dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    found = [read_summary(tmp_path / name) for name in ("cluster", "inline")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]


@pytest.mark.slow
def test_a_node_dies_and_another_comes(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a run that ends, hangs or forgets its actors with a machine; actors that are said to have died by
    themselves, and a recovery as long as the wait for a machine; fault 3 of a rollout service."""
    nodes.have(2)
    process = nodes.start(tmp_path, "actor.num_actors=3", "cluster.autoscaling=true")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 3, process=process)
    before, held = nodes.actors(), open_files(process.pid)
    assert set(before.values()) == {node.node_id for node in nodes.rollout}  # and none beside the learner
    lost, log = nodes.rollout[0], tmp_path / "run" / "run.log"
    said = len(log.read_text())
    killed = time.monotonic()
    nodes.kill(lost)
    goes_on(tmp_path, process)
    gone = sum(node == lost.node_id for node in before.values())
    wait_for(lambda: log.read_text().count("(node_died)") >= gone, process=process)
    # One has no place; this is said after longer than a replacement needs.
    wait_for(lambda: "1 wait for a place" in log.read_text()[said:], process=process)
    back = nodes.add()
    come_up(tmp_path, process, 3 + gone)
    took = time.monotonic() - killed
    wait_for(lambda: len(there := nodes.actors()) == 3 and back.node_id in there.values(), process=process)
    goes_on(tmp_path, process)
    lets_go(process, held)
    output = end(process)
    summary = recovered(tmp_path / "run")
    assert summary["actor_recovery_seconds"]["count"] == gone, output
    # Until Ray knows that the node has ended, it may give an actor a place there.
    assert log.read_text().count("(node_died)") == summary["actor_restarts"] >= gone
    assert "(died)" not in log.read_text()
    # It has waited for a place for longer than it took to say so.
    assert summary["actor_recovery_seconds"]["max"] < took - REPORT_AFTER_SECONDS / 2
    assert summary["lost_unrolls"] <= summary["actor_restarts"]
    wait_for(lambda: not any(map(alive, before)), seconds=200)


@pytest.mark.slow
def test_half_of_the_actors_die_again_and_again(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a run that ends, waits, leaks or loses count when several die at once; fault 2."""
    nodes.have(2)
    process = nodes.start(tmp_path, "actor.num_actors=4")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 4, process=process)
    seen, held = set(nodes.actors()), open_files(process.pid)
    for number in (2, 4, 2):
        victims = sorted(nodes.actors())[:number]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        if number < 4:
            goes_on(tmp_path, process)
        come_up(tmp_path, process, len(seen) + number)
        seen |= set(nodes.actors())
    assert len(seen) == 12
    goes_on(tmp_path, process)
    lets_go(process, held)
    output = end(process)
    summary = recovered(tmp_path / "run")
    assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == 8, output
    assert summary["lost_unrolls"] <= 8
    # Not even a zombie.
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen), seconds=200)


@pytest.mark.slow
def test_actors_leave_a_draining_node(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a preemption notice that nobody heeds: unrolls are lost and it counts as a failure; fault 4."""
    nodes.have(2)
    process = nodes.start(tmp_path, "actor.num_actors=2", "actor.max_consecutive_failures=1")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 2, process=process)
    leaving, held = nodes.rollout[0].node_id, open_files(process.pid)
    leavers = sum(node == leaving for node in nodes.actors().values())
    nodes.drain(nodes.rollout[0])
    wait_for(lambda: len(there := nodes.actors()) == 2 and leaving not in there.values(), process=process)
    come_up(tmp_path, process, 2 + leavers)
    goes_on(tmp_path, process)
    lets_go(process, held)
    output = end(process)
    nodes.kill(nodes.rollout[0])
    summary = recovered(tmp_path / "run")
    assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == leavers, output
    assert summary["lost_unrolls"] == 0
    assert "leaves its node, which is draining" in output


@pytest.mark.slow
def test_an_actor_that_hangs_on_another_node_is_ended_there(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a stopped process that Ray's own ``kill`` cannot reach, and that keeps its core; fault 8."""
    nodes.have(2)
    process = nodes.start(tmp_path, "actor.num_actors=2", "actor.unroll_timeout_seconds=20")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 2, process=process)
    victim, held = next(iter(nodes.actors())), open_files(process.pid)
    os.kill(victim, signal.SIGSTOP)
    wait_for(lambda: not alive(victim), process=process)
    wait_for(lambda: len(there := nodes.actors()) == 2 and victim not in there, process=process)
    come_up(tmp_path, process, 3)
    goes_on(tmp_path, process)
    lets_go(process, held)
    output = end(process)
    summary = recovered(tmp_path / "run")
    assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == 1, output
    assert summary["lost_unrolls"] == 1


@pytest.mark.slow
def test_a_run_starts_with_the_actors_that_have_a_place(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a run that waits for the last node of an autoscaler, or takes waiting for a failure."""
    nodes.have(1)
    process = nodes.start(
        tmp_path, "actor.num_actors=4", "cluster.autoscaling=true", "actor.max_consecutive_failures=1"
    )
    wait_for(lambda: newest(tmp_path) and len(nodes.actors()) == 2, process=process)
    log = tmp_path / "run" / "run.log"
    wait_for(lambda: "2 of 4 actors are not up yet: 2 wait for a place" in log.read_text(), process=process)
    nodes.have(2)
    wait_for(lambda: len(nodes.actors()) == 4, process=process)
    goes_on(tmp_path, process)
    end(process)
    assert read_summary(tmp_path / "run")["actor_restarts"] == 0


class Hog:
    """Fills the object store of its node, and takes whatever others give back."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._fill)

    def fill(self) -> None:
        self._thread.start()

    def let_go(self) -> None:
        self._enough.set()
        self._thread.join()
        self._held.clear()

    def _fill(self) -> None:
        import numpy as np
        import ray

        while not self._enough.is_set():
            for size in (2**19, 2**17):  # the second is what an unroll might still fit in
                with contextlib.suppress(ray.exceptions.OutOfDiskError):
                    while not self._enough.is_set():
                        self._held.append(ray.put(np.zeros(size, np.uint8)))
            self._enough.wait(0.02)


@pytest.mark.slow
@pytest.mark.alone
def test_a_full_object_store_is_said_and_survived(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a full object store with a full disk that ends the run at once, corrupts data or is told as an error of
    the environment; fault 12."""
    import ray

    nodes.have(0)
    # Ray takes a disk for full from this share on; nodes that are started now believe theirs is.
    monkeypatch.setenv("RAY_local_fs_capacity_threshold", "0.0001")
    nodes.have(1)
    monkeypatch.delenv("RAY_local_fs_capacity_threshold")
    # Unrolls of less than 100 kB would not go through the object store.
    large = ("env.id=synthetic", "env.num_envs=16", "actor.unroll_length=16", "actor.num_actors=1")
    process = nodes.start(tmp_path, *large, "actor.max_consecutive_failures=100")
    wait_for(lambda: newest(tmp_path), process=process)
    held = open_files(process.pid)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    try:
        hog = ray.remote(num_cpus=0, label_selector=ROLLOUT)(Hog).remote()
        ray.get(hog.fill.remote())
        log = tmp_path / "run" / "run.log"
        wait_for(lambda: "(object_store): its node's object store is full" in log.read_text(), process=process)
        ray.get(hog.let_go.remote())
        goes_on(tmp_path, process)
        lets_go(process, held)
    finally:
        ray.shutdown()
    end(process)
    summary = recovered(tmp_path / "run")
    assert 1 <= summary["lost_unrolls"] <= summary["actor_restarts"]
    nodes.have(0)


@pytest.mark.slow
@pytest.mark.alone
def test_an_actor_that_eats_the_memory_is_told_apart(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kill by Ray's memory monitor that is told as any other death: nobody would know what to change;
    fault 13."""
    memory = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = int(memory["MemTotal:"]), int(memory["MemAvailable:"])
    if free < 9 * 2**20:
        pytest.skip("needs 9 GiB of free memory")  # the environment takes 4, the run 2, and more is left to others
    nodes.have(0)
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{(total - free + 4 * 2**20) / total:.3f}")
    nodes.have(2)
    monkeypatch.delenv("RAY_memory_usage_threshold")
    eats = ("env.id=service_envs:Scripted-v0", f'env.kwargs={{how: eats, at: 1500, marker: "{tmp_path / "marker"}"}}')
    process = nodes.start(tmp_path, *eats, "actor.num_actors=2")
    wait_for(lambda: newest(tmp_path) and ups(tmp_path / "run") == 2, process=process)
    held = open_files(process.pid)
    wait_for(lambda: ups(tmp_path / "run") >= 3, process=process)
    goes_on(tmp_path, process)
    lets_go(process, held)
    end(process)
    summary = recovered(tmp_path / "run")
    # Both nodes are this machine: the monitor of the other one may have ended its actor too.
    log = (tmp_path / "run" / "run.log").read_text()
    told = "s (oom): its node ran out of memory: use fewer slots (env.num_envs)"
    assert log.count(told) == summary["actor_restarts"] >= 1
    nodes.have(0)


def refused(*arguments: str, cwd: Path, **environment: str) -> str:
    """The last words of a run that refuses to start."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "train", *SMALL, "mode=cluster", "run_dir=run", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (cwd / "run" / "config.yaml").exists()
    return done.stderr


def test_what_a_cluster_cannot_do_is_said_before_anything_starts(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a run that waits for ever for what will never come, and a message that does not say what to change."""
    nodes.have(2)
    address = f"cluster.address={nodes.address}"
    assert "nobody answers at 127.0.0.1:1" in refused("cluster.address=127.0.0.1:1", cwd=tmp_path)
    assert "must be host:port" in refused("cluster.address=ray://somewhere", cwd=tmp_path)
    answer = refused(address, "cluster.actor_labels={role: rolout}", cwd=tmp_path)
    assert "no node carries role=rolout; the nodes carry role=rollout" in answer
    answer = refused(address, "actor.num_actors=5", cwd=tmp_path)
    assert "5 actors of 1 CPU do not fit, there is room for 4" in answer
    answer = refused(address, "cluster.actor_resources={arm: 1}", cwd=tmp_path)
    assert "do not fit, there is room for 0" in answer
    # Ray's processes lack what this one has.
    (tmp_path / "beside.py").write_text(
        "import sys\n"
        "if 'default_worker' in sys.argv[0]:\n"
        "    import only_here\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Cart(CartPoleEnv): pass\n"
    )
    answer = refused(address, "env.id=beside:Cart", "actor.num_actors=1", cwd=tmp_path)
    assert "beside:Cart needs the module 'only_here', which " in answer
    assert answer.count("env.id: nodes") == 1  # and neither the head, which has no CPU, nor each by itself
    teams_beside(tmp_path)
    answer = refused(address, *TEAMS, "learner.minibatches=12", cwd=tmp_path)
    assert "learner.minibatches: 12 do not divide the 8 segments that hunters has of each batch" in answer


@pytest.mark.timeout(1200)
def test_a_second_run_waits_for_the_first(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a wait that never ends or ends too early, that says nothing, or in vain, that Ctrl-C or SIGTERM do not
    end, and two that take the same places."""
    nodes.have(2)
    whole = ("actor.num_actors=2", "cluster.actor_cpus=2")  # both nodes
    first = nodes.start(tmp_path, *whole)
    come_up(tmp_path, first, 2)
    patient = ("cluster.wait_seconds=600", "run_dir=second")

    def waiting(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "waiting for other runs" in line)
        assert "0 of 600 s (cluster.wait_seconds): actor.num_actors: 2 actors of 2 CPU" in line
        assert "do not fit, there is room for 0" in line

    for number in (signal.SIGINT, signal.SIGTERM):
        given_up = start_shoal("train", *settings(nodes, *whole, *patient), cwd=tmp_path)
        nodes.runs.append(given_up)
        waiting(given_up)
        end(given_up, number)
        assert not (tmp_path / "second" / "config.yaml").exists()
    both = []
    for name in ("second", "third"):
        short = (*whole, patient[0], f"run_dir={name}", "total_env_steps=2000")
        both.append(start_shoal("train", *settings(nodes, *short), cwd=tmp_path))
        nodes.runs.append(both[-1])
        waiting(both[-1])
    assert first.poll() is None
    end(first)
    logs = [tmp_path / name / "run.log" for name in ("second", "third")]
    for process in both:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    # One after the other, each with all of its places from the first moment on.
    for log in logs:
        assert ups(log.parent) == 2
        assert read_summary(log.parent)["env_steps"] >= 2000
        assert "no place" not in log.read_text()
    # Nobody's end would make room for five.
    (tmp_path / "empty").mkdir()
    five = (f"cluster.address={nodes.address}", "actor.num_actors=5", patient[0])
    assert "5 actors of 1 CPU" in refused(*five, cwd=tmp_path / "empty")


def test_time_is_up_although_no_actor_ever_came(nodes: Nodes, tmp_path: Path) -> None:
    """Catches a run with a time limit that waits for its first batch for ever, and holds its place on the cluster."""
    nodes.have(2)
    waiting = (f"cluster.address={nodes.address}", "cluster.actor_labels={role: nobody}", "cluster.autoscaling=true")
    done = shoal("train", *SMALL, "mode=cluster", *waiting, "max_seconds=3", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(tmp_path / "run")
    assert (summary["env_steps"], summary["interrupted_by"]) == (0, None)


@pytest.mark.slow
def test_another_token_is_refused_in_words(tmp_path: Path) -> None:
    """Catches a traceback, or an endless wait, where the token is not the cluster's."""
    with head_with_token(tmp_path, "a" * 40) as address:
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 40}
        answer = refused(f"cluster.address={address}", cwd=tmp_path, **wrong)
        assert "does not let this process in" in answer
        assert "RAY_AUTH_TOKEN" in answer
        # With the right one it is past the door.
        right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
        assert "do not fit" in refused(f"cluster.address={address}", cwd=tmp_path, **right)


@contextlib.contextmanager
def head_with_token(tmp_path: Path, token: str) -> Iterator[str]:
    """A head of its own that wants ``token``."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=1", f"--port={port}"]
    command += ["--include-dashboard=false", f"--object-store-memory={STORE}", "--block"]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=200)
