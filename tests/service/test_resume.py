"""What a resumed run says, keeps and takes over."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from service import SMALL, start_shoal, wait_for
from shoal.deploy.cli import main
from shoal.deploy.doctor import preflight
from shoal.deploy.settings.load import load_config
from shoal.learner.checkpoint import find_checkpoint


def arguments(run: Path, *settings: str) -> list[str]:
    return ["train", *SMALL, "mode=inline", "metrics.port=-1", f"run_dir={run}", *settings]


def said(run: Path) -> str:
    return (run / "run.log").read_text()


def test_a_resumed_run_says_so_and_a_fork_is_a_run_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a fork that writes into its parent's W&B run, a run that trains nothing and says Done, a changed
    initialization that means nothing, and the steps of the whole run beside the seconds of the last session.
    """
    run, fork = tmp_path / "run", tmp_path / "fork"
    assert main(arguments(run, "total_env_steps=400")) == 0
    first = find_checkpoint(run)
    assert "resumed" not in said(run)
    assert main(arguments(run, "total_env_steps=800")) == 0
    assert find_checkpoint(run).state["run_id"] == first.state["run_id"]
    assert f"resumed from {first.path} of this run, session 1" in said(run)
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["session_env_steps"] < summary["env_steps"]
    capsys.readouterr()

    assert main(arguments(run, "total_env_steps=800")) == 0
    out = capsys.readouterr().out
    assert "Nothing was trained: the run has its total_env_steps=800 already" in out
    assert "Done." not in out

    changed = "policy.initialization.lstm_bias=ones"
    assert main(arguments(fork, f"resume={run}", "total_env_steps=1200", changed)) == 0
    forked = find_checkpoint(fork)
    assert forked.state["run_id"] != first.state["run_id"]
    assert forked.state["ledger"]["trained"] >= 1200
    assert f"of run {first.state['run_id']}, as the new run {forked.state['run_id']}" in said(fork)
    assert "policy.initialization.lstm_bias=ones has no effect" in said(fork)
    assert "has no effect" not in said(run)
    # Weights are no run.
    state = json.loads((forked.path / "state.json").read_text())
    assert state["session"] == 3


def test_settings_that_changed_are_said_and_those_before_are_kept(tmp_path: Path) -> None:
    """Catches a run that goes on with another gamma and seed without a word, settings of its first versions that are
    lost, and words where nothing changed."""
    run, fork = tmp_path / "run", tmp_path / "fork"
    file = run / "config.yaml"

    def train(*settings: str, to: Path = run) -> list[str]:
        """Train, and return the warnings of this session about settings."""
        before = said(to) if to.exists() else ""
        assert main(arguments(to, *settings)) == 0
        warnings = [line.partition(" WARNING ")[2] for line in said(to).removeprefix(before).splitlines()]
        return [line.partition(": ")[2] for line in warnings if "settings" in line or "same game" in line]

    assert train("total_env_steps=400", "learner.gamma=0.9") == []
    first, version = load_config([file], [])[0], find_checkpoint(run).policy_version
    assert train("total_env_steps=400", "learner.gamma=0.9", "log.every_seconds=5") == []
    assert not (run / "configs").exists()

    since = f"settings changed since version {version}:"
    seed, steps, gamma, hint = train("total_env_steps=800", "seed=3")
    assert (seed, steps) == (f"{since} seed 0 -> 3", f"{since} total_env_steps 400 -> 800")
    assert gamma == f"{since} learner.gamma 0.9 -> 0.99 (the default)"
    kept = run / "configs" / f"until_{version}.yaml"
    assert str(kept) in hint
    assert load_config([kept], [])[0].learner == first.learner
    assert load_config([file], [])[0].seed == 3

    second = find_checkpoint(run).policy_version
    assert train("total_env_steps=800", "seed=3") == []
    again = train("total_env_steps=1200", "seed=3", "learner.gamma=0.8")
    assert again[-1] == f"settings changed since version {second}: learner.gamma 0.99 -> 0.8"
    assert sorted(path.name for path in (run / "configs").iterdir()) == sorted(
        f"until_{at}.yaml" for at in (version, second)
    )
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("learner.gamma</th>") + page.count("learner.gamma</td>") == 2

    forked = train(f"resume={run}", "total_env_steps=1600", "env.kwargs.delay=4", to=fork)
    assert forked[0] == f"settings differ from those of {find_checkpoint(run).path}: env.kwargs.delay (not set) -> 4"
    assert str(run / "config.yaml") in forked[-1]
    assert not any("same game" in line for line in forked)
    assert not (fork / "configs").exists()


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """Catches SIGHUP that ends a run in a tenth of a second, with nothing saved."""
    forever = ("total_env_steps=1000000000", "checkpoint.every_updates=1")
    process = start_shoal(*arguments(tmp_path / "run", *forever), cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("0*")), process=process)
    os.kill(process.pid, signal.SIGHUP)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGHUP, out
    assert "Interrupted; saved." in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted_by"] == "SIGHUP"
    assert find_checkpoint(tmp_path / "run").policy_version >= 0


def test_a_taken_port_is_no_reason_not_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the second of two runs on one machine that is refused; one that others reach has its port or none."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = tmp_path / "run"
        settings = [*SMALL, "mode=inline", f"run_dir={run}", "total_env_steps=200", f"metrics.port={port}"]
        assert main(["train", *settings]) == 0
        assert f"metrics.port: {port} is in use; the metrics of this run are at http://127.0.0.1:" in said(run)
        assert f"http://127.0.0.1:{port}" not in capsys.readouterr().out
    with socket.create_server(("0.0.0.0", 0)) as taken:
        config, _ = load_config(
            [], ["env.id=recall", f"metrics.port={taken.getsockname()[1]}", "metrics.address=0.0.0.0"]
        )
        [problem] = preflight.check(config, tmp_path / "other")
    assert problem.startswith("metrics.port: ")


@pytest.mark.parametrize("setting", ["RAY_TMPDIR", "TMPDIR"])
def test_a_path_too_long_for_a_socket_is_said_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Catches Ray's traceback about AF_UNIX in the middle of a start."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    config, _ = load_config([], ["env.id=recall", "metrics.port=-1"])
    assert preflight.check(config, tmp_path / "run") == []
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv(setting, str(long))
    [problem] = preflight.check(config, tmp_path / "run")
    assert problem.startswith(f"mode: Ray cannot start with {setting}={long}")
    inline, _ = load_config([], ["env.id=recall", "metrics.port=-1", "mode=inline"])
    assert preflight.check(inline, tmp_path / "run") == []


@pytest.mark.parametrize("kind", ["file", "dangling"])
@pytest.mark.parametrize("place", ["run/checkpoints", "run"])
def test_storage_that_is_not_mounted_is_said_before_the_start(tmp_path: Path, kind: str, place: str) -> None:
    """Catches a run that starts from version 0 beside its checkpoints and saves nothing."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    if kind == "file":
        (tmp_path / place).touch()
    else:
        (tmp_path / place).symlink_to(tmp_path / "nothing")
    config, _ = load_config([], ["env.id=recall", "metrics.port=-1", "mode=inline"])
    problems = preflight.check(config, tmp_path / "run")
    assert any(problem.startswith(("resume: ", "run_dir: ")) for problem in problems), problems
