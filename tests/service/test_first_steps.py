"""``shoal doctor`` tries the environment before it says ``ready``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shoal.deploy.cli import main
from shoal.deploy.doctor import first_steps as trying
from shoal.deploy.doctor.first_steps import first_steps
from shoal.deploy.settings.load import load_config


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ResetRaises", "RuntimeError: no ROM"),
        ("NoSeed", "unexpected keyword argument 'seed'"),
        ("FourValues", r"step answered tuple .*must be \(obs, reward, terminated, truncated, info\)"),
        ("WordReward", "reward str 'one' is not a number"),
        ("VectorReward", "is not a number: a policy is trained with one number; a wrapper makes one of several"),
        ("NoObservation", r"obs is NoneType None, must be numbers of shape \(3,\)"),
        ("FailsAtTheSeventh", "ValueError: sometimes"),
        ("Dies", "exited with code 3"),
    ],
)
def test_an_environment_that_cannot_be_played_is_not_ready(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches ``ready``, exit code 0 and a traceback where the first steps of a run fail."""
    told = ["doctor", "--measure", f"env.id=sick_envs:{name}", f"run_dir={tmp_path / 'run'}", "metrics.port=-1"]
    assert main(told) == 2
    printed = capsys.readouterr()
    assert "1 problem" in printed.err
    assert re.search(rf"env\.id: sick_envs:{name}: .*{said}", printed.err), printed.err
    assert "Traceback" not in printed.err
    assert "ready" not in printed.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "doing"),
    [
        ("HangsWhenMade", "making it, with its first reset,"),
        ("HangsInReset", "making it, with its first reset,"),
        ("HangsInStep", "step 1"),
    ],
)
def test_an_environment_that_does_not_come_back_is_told_and_ended(
    name: str, doing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a doctor that waits for good, and a process that stays behind."""
    monkeypatch.setattr(trying, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr(trying, "START_SECONDS", 60.0)  # importing torch takes long on a machine at work
    kill, ended = trying.JobProcess.kill, []

    def killed(process: trying.JobProcess[trying.Found]) -> None:
        kill(process)
        ended.append(process.pid)

    monkeypatch.setattr(trying.JobProcess, "kill", killed)
    assert main(["doctor", f"env.id=sick_envs:{name}", "metrics.port=-1"]) == 2
    assert f"env.id: sick_envs:{name}: {doing} has not ended after 3 s" in capsys.readouterr().err
    assert ended == [None]


def test_what_can_be_played_is_ready_and_what_it_does_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches illegal actions, which no run takes; warnings that only a run would have; and an environment that is
    refused because it prints or ends early."""
    for name, remark in (("Healthy", ""), ("Masked", ""), ("Outside", "obs is out of its space at flat index 0: 5.0")):
        assert main(["doctor", f"env.id=sick_envs:{name}", "metrics.port=-1"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"tried +200 random steps: 2\d episodes ended", said)
        assert said.endswith("ready\n")
        assert remark in said
        assert ("warns" in said) == bool(remark)


def test_games_of_several_policies_are_tried_whole() -> None:
    """Catches agents of one policy that wait for those of the others."""
    pytest.importorskip("pettingzoo")
    policies = ["policies.a.agents=['seeker']", "policies.b.agents=['hider']"]
    config, problems = load_config([], ["env.id=pettingzoo:shoal.deploy.examples.policies:Ring", *policies])
    assert not problems
    found = first_steps(config)
    assert (found.tried.steps, found.problems) == (trying.STEPS, ())
    assert found.tried.episodes
    assert {name: group.agents for name, group in found.tried.teams.items()} == {"a": ("seeker",), "b": ("hider",)}


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an environment that takes a minute to make, made several times before ``ready``."""
    monkeypatch.setenv("SICK_ENVS_MADE", str(tmp_path / "made"))
    assert main(["doctor", "env.id=sick_envs:Counted", "metrics.port=-1"]) == 0
    assert (tmp_path / "made").read_text() == "made\n"
    assert "ready" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["env.id=sick_envs:Endless"], "no episode ended\n  no time limit  unless .*env.kwargs.max_episode_steps=N"),
        (["env.id=sick_envs:Endless", "env.kwargs.max_episode_steps=7"], "ended; at most 7 steps in an episode\n"),
        (["env.id=sick_envs:Healthy"], "2. episodes ended\nlayout"),
    ],
)
def test_episodes_that_do_not_end_are_told(settings: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run whose episodes never end, which no line told of; and advice that does not help."""
    assert main(["doctor", *settings, "metrics.port=-1"]) == 0
    assert re.search(said, capsys.readouterr().out)
