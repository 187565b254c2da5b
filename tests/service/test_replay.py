"""Recorded updates of whole runs, made again by the command: of one process, of several, and of a run that failed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from service import SHARED, read_summary, shoal, start_shoal, wait_for
from shoal.deploy.cli import main
from shoal.deploy.replay.table import verdict
from shoal.learner.checkpoint import find_checkpoint
from shoal.learner.plain_file import load_plain, save_plain
from shoal.learner.recorded_updates import RecordError, find_recorded, recorded_names
from shoal.learner.replay import replay
from shoal.policy.weights import flatten_weights

SETTINGS = (
    *SHARED,
    *("learner.epochs=2", "learner.minibatches=2", "learner.desired_kl=0.001", "learner.refresh_states=true"),
    *("evaluation.random_seconds=0", "seed=3", "recorder.keep_updates=4"),
)
LOSSES = '''
import shoal.learner.loss


def broken(inputs, first):
    """Raises in one update, and returns NaN in another."""
    terms = shoal.learner.loss.ppo_loss(inputs)
    print("said by the loss")
    unrolls = inputs.batch["unroll_index"] & (2**32 - 1)
    if (unrolls >= 6).any():
        raise ZeroDivisionError("of the user's")
    if first == "nan" and (unrolls == 4).all():
        return {**terms, "loss": terms["loss"] * float("nan")}
    return terms
'''


def said(run: Path, *options: str) -> dict[str, Any]:
    """What the command prints with --json, in a process of its own."""
    done = shoal("replay", run, *options, "--json", cwd=run.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def keys(version: int) -> list[str]:
    """The names of the last four updates."""
    return [str(version - back) for back in (3, 2, 1, 0)]


def test_a_run_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a recorder that no run has, records of another update than they say, and a second process that computes
    something else."""
    run = tmp_path / "run"
    assert main(["train", *SETTINGS, "mode=inline", f"run_dir={run}", "total_env_steps=1400"]) == 0
    version = read_summary(run)["policy_version"]
    assert version > 4
    listed = said(run)
    assert [one["update"] for one in listed["updates"]] == keys(version)
    assert listed["problems"] == {}
    checkpoint = find_checkpoint(run)
    assert listed["updates"][-1]["weights_hash"] == flatten_weights(checkpoint.make_policy(), 0).content_hash
    made = said(run, "--update", str(version))
    assert made["same"]
    assert made["replayed"]["weights_hash"] == listed["updates"][-1]["weights_hash"]
    assert len(made["segments"]) == made["num_segments"]
    assert {one["slot"] for one in made["segments"]} == set(range(8))
    assert {one["lag"] for one in made["segments"]} == {0}
    trained = checkpoint.state["ledger"]["trained"] - made["env_steps_before"]
    assert sum(one["steps"] for one in made["segments"]) == trained
    capsys.readouterr()
    assert main(["replay", str(run), "--update", str(version - 2), "--segments", "3"]) == 0
    output = capsys.readouterr().out
    assert "bit for bit" in output
    assert "the 3 segments with the largest gradients of" in output
    (run / "recorder" / f"{version:09d}.npz").write_bytes(b"no archive")
    assert main(["replay", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"{version}: {run / 'recorder'}" in output
    assert f"--update {version - 1}" in output
    assert main(["replay", str(run), "--update", str(version)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["replay", str(run), "--update", "99"]) == 2
    assert "update 99 is not recorded in" in capsys.readouterr().err


def test_another_result_is_said_and_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that says "the same" of everything."""
    run = tmp_path / "run"
    assert main(["train", *SETTINGS, "mode=inline", f"run_dir={run}", "total_env_steps=300"]) == 0
    name = list(recorded_names(run))[-1]
    path = find_recorded(run, name).path
    document = load_plain(path)
    document["shared"]["learning_rate_factor"] *= 0.9
    document["machine"]["torch"] = "0.1"
    save_plain(path, document)
    capsys.readouterr()
    assert main(["replay", str(run), "--update", name]) == 1
    output = capsys.readouterr().out
    assert "the weights after it differ: here" in output
    assert "numbers are rounded in another way by torch 0.1 there" in output


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "settings",
    [
        ("placement=colocated", "learner.num_learners=2"),
        ("placement=colocated", "learner.num_learners=3", "learner.batch_size=48"),
        # Each has two gradient threads, whose sums are added up: another order than that of four shards.
        (
            *("placement=disaggregated", "learner.num_learners=2", "learner.num_threads=2", "actor.num_actors=2"),
            *("actor.max_policy_lag=0", "learner.batch_size=32"),
        ),
    ],
    ids=["two", "three", "threads"],
)
def test_several_learners(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Catches a peer's part that is missing, is of another update, or is added up in another order."""
    run = tmp_path / "run"
    assert main(["train", *SETTINGS, "mode=local", f"run_dir={run}", "total_env_steps=1200", *settings]) == 0
    names = list(recorded_names(run))
    assert len(names) == 4
    for name in names:
        recorded = find_recorded(run, name)
        assert recorded.num_learners == int(settings[1].partition("=")[2])
        again = replay(recorded)
        assert again.is_same, verdict(again)
        assert len({(one.training_env_id, one.unroll_index) for one in again.contributions}) == recorded.num_segments


def test_a_run_that_fails_keeps_the_update_that_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches records that are lost on the day when they are needed: of an error in the user's loss, and of the update
    that was skipped before."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    run = tmp_path / "run"
    loss = ("learner.loss=my_losses:broken", "learner.loss_kwargs={first: nan}", "learner.batch_size=8")
    done = shoal("train", *SETTINGS, *loss, "mode=inline", f"run_dir={run}", "total_env_steps=9000", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ZeroDivisionError: of the user's" in done.stderr
    assert "shoal replay makes it again" in done.stderr
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(RecordError, match="there is no module 'my_losses' here"):
        replay(find_recorded(run, "2"))
    monkeypatch.syspath_prepend(tmp_path)
    outcomes = {name: find_recorded(run, name).outcome for name in recorded_names(run)}
    assert sorted(outcomes.values()) == ["failed", *["made"] * 4, "skipped"]
    for name in outcomes:
        again = replay(find_recorded(run, name))
        assert again.is_same, verdict(again)
    assert said(run, "--update", "2")["same"]  # a loss that prints does not disturb the answer


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_loses_nothing_and_a_kill_only_the_last_few(tmp_path: Path, blow: signal.Signals) -> None:
    """Catches records that are written only where a run ends well; and a run that is killed and leaves half a file."""
    run = tmp_path / "run"
    process = start_shoal(
        *("train", *SETTINGS, "mode=inline", "run_dir=run", "total_env_steps=1000000000", "checkpoint.every_updates=2"),
        cwd=tmp_path,
    )
    wait_for(lambda: len(list((run / "checkpoints").glob("0*"))) >= 3, process=process)
    os.kill(process.pid, blow)
    process.communicate(timeout=400)
    names = list(recorded_names(run))
    if blow == signal.SIGTERM:
        version = read_summary(run)["policy_version"]
        assert names == keys(version)
    else:
        assert names == ["1", "2"]  # with the first checkpoint; the next would come a minute later
    assert replay(find_recorded(run, names[-1])).is_same


def test_a_recorder_that_is_off_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches files that nobody wanted, and a sentence that does not say why there is none."""
    run = tmp_path / "run"
    off = ("recorder.keep_updates=0", "mode=inline", f"run_dir={run}", "total_env_steps=100")
    assert main(["train", *SETTINGS, *off]) == 0
    assert not (run / "recorder").exists()
    capsys.readouterr()
    assert main(["replay", str(run)]) == 2
    assert "unless recorder.keep_updates=0" in capsys.readouterr().err
