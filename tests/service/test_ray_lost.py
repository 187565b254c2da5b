"""Ray's head or raylet is killed under real runs: they say so, save, end with exit code 1, and go on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import (
    SHARED,
    SMALL,
    actor_processes,
    alive,
    descendants,
    learner_processes,
    read_summary,
    shoal,
    start_shoal,
    wait_for,
)
from shoal.deploy.settings.load import load_config
from shoal.deploy.training import run as training_run
from shoal.learner.training_loop import Saving

ENDLESS = ("total_env_steps=1000000000", "max_seconds=800", "checkpoint.every_updates=0", "run_dir=run")
LAYOUTS = {
    # Ray ends a process whose raylet ends while weights are put, a few milliseconds of every update: these updates are
    # long enough that the signal hardly ever falls there.
    "fed": (
        *(*SMALL, "actor.num_actors=2", "actor.unroll_length=64"),
        *("learner.batch_size=64", "learner.epochs=4"),
    ),
    # Ray keeps answers of 100 KiB and more in its store, which ends with the raylet.
    "stored": (*SMALL, "actor.num_actors=2", "env.num_envs=64", "actor.unroll_length=64", "learner.batch_size=128"),
    "colocated": (*SHARED, "placement=colocated", "learner.num_learners=2"),
    "several_fed": (
        *(*SHARED, "learner.batch_size=16", "placement=disaggregated"),
        *("learner.num_learners=2", "actor.num_actors=2"),
    ),
}


def trained(run: Path) -> bool:
    """Whether updates were made, as the history of metrics says."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    lines = text.split("\n")[:-1]  # without what is being written
    return bool(lines) and json.loads(lines[-1])["policy_version"] > 2


def process_of(pid: int, program: str) -> int:
    """The process below ``pid`` that runs ``program``."""
    [found] = [child for child, title in descendants(pid).items() if title.split(" ")[0].endswith(program)]
    return found


def ended_well(tmp_path: Path, process: subprocess.Popen[str], missing: str) -> dict[str, Any]:
    """The summary of a run that lost Ray, after what all of them must have done."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    assert re.search(rf"ERROR: Ray is lost: .*{missing}.*; the run saves and ends", output), output
    assert "Ended early, because Ray was lost; saved." in output
    assert "Traceback" not in output
    run = tmp_path / "run"
    assert "ERROR shoal.actors.ray_watch: Ray is lost: " in (run / "run.log").read_text()
    summary = read_summary(run)
    assert (summary["stopped_by"], summary["interrupted_by"]) == ("ray_lost", None)
    [checkpoint] = (run / "checkpoints").glob("0*")  # none but the last one was asked for
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["policy_version"] == summary["policy_version"] == summary["session_updates"] > 2
    assert state["ledger"]["trained"] == summary["env_steps"] > 0
    assert summary["weights_sha256"]
    return summary


def goes_on(tmp_path: Path, lost: dict[str, Any], *settings: str) -> None:
    """A resumed run trains on from there, and its books balance."""
    done = shoal("train", *settings, f"total_env_steps={lost['env_steps'] + 300}", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(tmp_path / "run")
    assert summary["stopped_by"] is None
    assert summary["policy_version"] == lost["policy_version"] + summary["session_updates"]
    assert summary["env_steps"] == lost["env_steps"] + summary["session_env_steps"] >= lost["env_steps"] + 300


def loses(
    tmp_path: Path, layout: tuple[str, ...], program: str, missing: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    settings = (*layout, "mode=local", "log.every_seconds=0.5")
    process = start_shoal("train", *settings, *ENDLESS, cwd=tmp_path)
    wait_for(lambda: trained(tmp_path / "run"), process=process)
    below = set(descendants(process.pid))
    os.kill(process_of(process.pid, program), signal.SIGKILL)
    lost = ended_well(tmp_path, process, missing)
    # All of Ray's, too, which were started for this run.
    wait_for(lambda: not any(map(alive, below)), seconds=200)
    return lost, settings


def test_a_run_whose_head_is_killed_saves_and_goes_on(tmp_path: Path) -> None:
    """Catches a run that waits a minute for its head and is then ended by Ray: unsaved, without a word or a summary."""
    lost, settings = loses(tmp_path, LAYOUTS["fed"], "/gcs_server", r"head \(GCS\)")
    goes_on(tmp_path, lost, *settings)


@pytest.mark.parametrize("layout", ["fed", "stored"])
def test_a_run_whose_raylet_is_killed_saves_and_goes_on(tmp_path: Path, layout: str) -> None:
    """Catches a run whose next weights are put, or whose next unroll is read, where no raylet is: Ray ends the whole
    process, unsaved."""
    lost, settings = loses(tmp_path, LAYOUTS[layout], "/raylet", "raylet of this machine")
    goes_on(tmp_path, lost, *settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "program", "missing"), [("colocated", "/gcs_server", "GCS"), ("several_fed", "/raylet", "raylet")]
)
def test_several_learners_save_what_they_trained(tmp_path: Path, layout: str, program: str, missing: str) -> None:
    """Catches a learner that waits for peers behind a Ray that is gone, or forgets the steps that these trained."""
    lost, settings = loses(tmp_path, LAYOUTS[layout], program, missing)
    goes_on(tmp_path, lost, *settings)


@pytest.mark.slow
def test_a_peer_that_hangs_keeps_no_lost_run_waiting(tmp_path: Path) -> None:
    """Catches an update that waits for a learner that does not answer, until Ray ends the process, unsaved: where a
    machine goes away without a word, the head on it is lost too."""
    settings = (*LAYOUTS["colocated"], "mode=local", "log.every_seconds=0.5")
    process = start_shoal("train", *settings, *ENDLESS, cwd=tmp_path)
    wait_for(lambda: trained(tmp_path / "run"), process=process)
    [peer] = learner_processes(process.pid)
    os.kill(peer, signal.SIGSTOP)
    try:
        wait_for(lambda: "no update was made for" in (tmp_path / "run" / "run.log").read_text(), process=process)
        os.kill(process_of(process.pid, "/gcs_server"), signal.SIGKILL)
        lost = ended_well(tmp_path, process, "GCS")
    finally:
        os.kill(peer, signal.SIGKILL)
    assert set(lost["ledger"]["dropped"]) <= {"learner_lost", "shutdown"}
    goes_on(tmp_path, lost, *settings)


@pytest.mark.parametrize(
    ("program", "missing"), [("/gcs_server", r"head \(GCS\)"), ("/raylet", "raylet of this machine")]
)
def test_a_run_whose_ray_dies_while_it_starts_says_so(tmp_path: Path, program: str, missing: str) -> None:
    """Catches half a minute of nothing and then Ray's own words, or an end by Ray itself without a summary."""
    process = start_shoal("train", *LAYOUTS["fed"], "mode=local", *ENDLESS, cwd=tmp_path)

    def found() -> list[int]:
        return [pid for pid, title in descendants(process.pid).items() if title.split(" ")[0].endswith(program)]

    wait_for(lambda: bool(found()), process=process)
    os.kill(found()[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    assert re.search(rf"Ray is lost: .*{missing}", output), output
    summary = read_summary(tmp_path / "run")
    assert (summary["stopped_by"], summary["session_updates"], summary["env_steps"]) == ("ray_lost", 0, 0)
    assert summary["books_balance"]


def test_a_checkpoint_that_is_asked_for_follows_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run whose head is out of reach and which has saved nothing when Ray ends its process."""
    saving: list[Saving] = []

    def made(**parts: Any) -> Saving:
        saving.append(Saving(**parts))
        saving[0].asked.set()
        return saving[0]

    monkeypatch.setattr(training_run, "Saving", made)
    settings = ("mode=inline", "total_env_steps=400", "checkpoint.every_updates=0", "checkpoint.keep=9")
    config, problems = load_config((), [*SMALL, *settings, "actor.num_actors=2"])
    assert problems == []
    summary = training_run.run(config, tmp_path / "run", quiet=True, owns_process=False).summary
    found = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("0*"))
    assert found == [1, summary["policy_version"]]
    assert not saving[0].asked.is_set()


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """A head without CPUs, where the learner is, and a node for the actors."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    store = 80 * 2**20
    head = {"num_cpus": 0, "object_store_memory": store, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, labels={"role": "rollout"}, object_store_memory=store)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_run_on_a_cluster_whose_head_is_killed_saves_and_goes_on(tmp_path: Path) -> None:
    """Catches the same where Ray is not the run's own: the machine of the head is lost, others are there."""
    layout = (*LAYOUTS["fed"], "mode=cluster", "cluster.actor_labels={role: rollout}", "log.every_seconds=0.5")
    with two_nodes() as cluster:
        process = start_shoal("train", *layout, f"cluster.address={cluster.address}", *ENDLESS, cwd=tmp_path)
        wait_for(lambda: trained(tmp_path / "run"), process=process)
        processes = cluster.head_node.all_processes
        for kind in ("gcs_server", "raylet"):
            os.kill(processes[kind][0].process.pid, signal.SIGKILL)
        lost = ended_well(tmp_path, process, "")
        assert not alive(process.pid)
    with two_nodes() as cluster:
        goes_on(tmp_path, lost, *layout, f"cluster.address={cluster.address}")


STARTED = """
    import time
    from shoal.deploy.cluster.ray_session import local

    how = {"num_actors": 1, "num_learners": 0, "unroll_bytes": 1, "accelerator": False, "owns_process": True}
    with local(**how, gone=print):
        print("up", flush=True)
        time.sleep(100)
"""


def test_sigterm_before_a_run_trains_ends_it_like_any_other_time(tmp_path: Path) -> None:
    """Catches an exit with Ray's 15, which no launcher takes for an interruption, and processes that stay."""
    command = [sys.executable, "-c", textwrap.dedent(STARTED)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert (process.returncode, output) == (143, "")
    wait_for(lambda: not any(map(alive, below)), seconds=200)


NOTEBOOK = """
    import os, signal, sys, threading, time
    import shoal
    from service import descendants

    class Killer(shoal.Callback):
        def on_update(self, run, update):
            if update.policy_version == 5:
                for pid, title in descendants(os.getpid()).items():
                    if title.split(" ")[0].endswith("/gcs_server"):
                        os.kill(pid, signal.SIGKILL)

    if __name__ == "__main__":
        import ray

        if sys.argv.pop(1) == "ours":
            ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
        settings = dict(argument.split("=") for argument in sys.argv[1:])
        settings = {name: int(value) if value.lstrip("-").isdigit() else value for name, value in settings.items()}
        try:
            shoal.train(config=settings, run_dir="run", total_env_steps=10**9, callbacks=[Killer()], progress=False)
        except RuntimeError as error:
            print(type(error).__name__)
        assert not ray.is_initialized()
        lost = time.monotonic()
        run = shoal.train(config=settings, run_dir="run", total_env_steps=4000, progress=False)
        assert run.summary["session_env_steps"] < run.summary["env_steps"] >= 4000
        kept = ("ray-", "rollout-")
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(kept)]
        time.sleep(max(lost + 1.5 * float(os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"]) - time.monotonic(), 0))
        print("lives")
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["the run's", "ours"])
def test_a_notebook_outlives_its_head_and_trains_again(whose: str, tmp_path: Path) -> None:
    """Catches an interpreter that Ray ends a minute after the run, one that is connected to a Ray that is gone, and
    threads that stay."""
    script = tmp_path / "notebook.py"
    script.write_text(textwrap.dedent(NOTEBOOK))
    command = [sys.executable, str(script), whose, *LAYOUTS["fed"], "mode=local"]
    # Ray would end the process this long after the loss; of itself, after 60 s.
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["RayLost", "lives"]
    assert read_summary(tmp_path / "run")["stopped_by"] is None


HOLDER = """
    import sys, time
    import ray

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    held = ray.remote(num_cpus=2)(type("Held", (), {"up": lambda self: True})).remote()
    print(ray.get(held.up.remote()), flush=True)
    time.sleep(600)
"""

WAITER = """
    import os, sys, time
    import ray
    import shoal

    settings = dict(argument.split("=") for argument in sys.argv[1:])
    settings |= {"actor.num_actors": 2, "cluster.wait_seconds": 600, "cluster.autoscaling": False}
    try:
        shoal.train(config=settings, run_dir="run", total_env_steps=1000)
    except Exception as error:
        print(type(error).__name__, str(error), flush=True)
    assert not ray.is_initialized()
    time.sleep(1.5 * float(os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"]))
    print("lives")
"""


@pytest.mark.slow
def test_a_notebook_outlives_a_head_that_it_waits_for_a_place_of(tmp_path: Path) -> None:
    """Catches a wait without an end, in a question that has no time limit, and an interpreter that Ray ends for it."""
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    with two_nodes() as cluster, contextlib.ExitStack() as stack:

        def begin(program: str, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            return process

        holder = begin(HOLDER, cluster.address)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        waiter = begin(WAITER, "env.id=CartPole-v1", "mode=cluster", f"cluster.address={cluster.address}")
        assert waiter.stdout is not None
        assert any("waiting for other runs" in line for line in waiter.stdout)
        os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
        output = waiter.communicate(timeout=500)[0]
        assert waiter.returncode == 0, output
        why, lives = output.splitlines()[-2:]
        assert why.startswith("RayLost Ray is lost: "), output
        assert lives == "lives", output


@pytest.mark.slow
def test_a_run_that_nothing_arrives_at_says_so(tmp_path: Path) -> None:
    """Catches minutes in which no update is made and nothing is said: actors hang, and are not replaced yet."""
    settings = (*LAYOUTS["fed"], "mode=local", "log.every_seconds=0.5", "metrics.port=0")
    process = start_shoal("train", *settings, *ENDLESS, cwd=tmp_path)
    log = tmp_path / "run" / "run.log"
    wait_for(lambda: trained(tmp_path / "run"), process=process)
    assert "no update was made" not in log.read_text()
    actors = actor_processes(process.pid)
    for actor in actors:
        os.kill(actor, signal.SIGSTOP)
    wait_for(lambda: "no update was made for" in log.read_text(), process=process)
    for actor in actors:
        os.kill(actor, signal.SIGCONT)
    wait_for(lambda: "updates are made again" in log.read_text(), process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    [said] = re.findall("WARNING: (no update was made for .*)", output)
    assert "2 of 2 actors are up" in said
    assert read_summary(tmp_path / "run")["actor_restarts"] == 0
