"""Runs of several policies: what each learns, what a run tells of each, and what a resumed one goes on with."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
import torch
from service import shoal as command_line
from shoal.deploy.cli import main
from shoal.deploy.settings.earlier import changes_of
from shoal.learner.checkpoint import find_checkpoint, find_saved
from team_games import RUNNERS, best_return

ID = "pettingzoo:team_games:teams"
SMALL = (
    *(f"env.id={ID}", "policies.hunters.agents=[hunter_*]", "policies.runners.agents=[runner_*]", "env.num_envs=12"),
    *("actor.unroll_length=8", "learner.minibatches=2", "metrics.port=-1", "policy.kind=component"),
    *("policy.components={lstm: {size: 16}, critic_1: {size: 32}}", "checkpoint.every_updates=2"),
    *("learner.epochs=1", "evaluation.random_seconds=0"),
)
NAMES = ["hunters", "runners"]


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert list(summary["policies"]) == NAMES
    assert summary["books_balance"]
    return summary


def play(run: Path, steps: int, *settings: str) -> dict[str, Any]:
    """A session up to so many steps; its summary."""
    assert main(["train", *SMALL, "mode=inline", f"run_dir={run}", *settings, f"total_env_steps={steps}"]) == 0
    return summary_of(run)


def check_random_play(summary: dict[str, Any]) -> None:
    """A random hunter is right in one of three steps; runners in one of four, of eight steps and of four."""
    for name, expected in {"hunters": 8 / 3, "runners": (2 + 1) / 2}.items():
        told = summary["policies"][name]
        assert told["random_return"] == pytest.approx(expected, abs=2 * told["random_return_ci95"])
        assert 0 < told["random_return_ci95"] < 0.25


def weights_of(run: Path, policy: str) -> dict[str, torch.Tensor]:
    return find_checkpoint(find_saved(run).path / policy).load_weights()


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_settings_before_are_kept_for_each_policy(tmp_path: Path) -> None:
    """Catches a report of one of several policies that shows the last settings as those of the whole run."""
    run = tmp_path / "run"
    play(run, 200)
    version = find_saved(run).policy_version
    play(run, 400, "learner.gamma=0.9")
    assert f"settings changed since version {version}: learner.gamma 0.99 -> 0.9" in (run / "run.log").read_text()
    for directory in (run, *(run / "policies" / name for name in NAMES)):
        ((at, found),) = changes_of(directory)
        assert (at, [str(change) for change in found.changed]) == (
            version,
            ["total_env_steps 200 -> 400", "learner.gamma 0.99 -> 0.9"],
        )


def test_each_policy_learns_from_its_own_agents_alone(tmp_path: Path) -> None:
    """Catches a gradient, a statistic of observations or of values, a learning rate or a random stream that reads rows
    of the other policy, or that random play before the run shares with it: with the observations of one team poisoned
    and without random play the other's weights are the same to the bit."""
    runs = {}
    for name, kwargs, seconds in (("plain", {}, 60), ("poisoned", {"poisoned": "runner", "poison": 7.0}, 0)):
        runs[name] = tmp_path / name
        summary = play(runs[name], 800, f"env.kwargs={json.dumps(kwargs)}", f"evaluation.random_seconds={seconds}")
        for policy in NAMES:
            told = summary["policies"][policy]
            assert (told["random_return"] is None) == (seconds == 0)
            assert seconds or told["learning"]["verdict"] == "unknown"
    assert is_same(weights_of(runs["plain"], "hunters"), weights_of(runs["poisoned"], "hunters"))
    assert not is_same(weights_of(runs["plain"], "runners"), weights_of(runs["poisoned"], "runners"))


def last_metrics(run: Path, policy: str) -> dict[str, Any]:
    lines = (run / "policies" / policy / "metrics.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_schedules_end_with_the_run(tmp_path: Path) -> None:
    """Catches a learning rate that is 0 long before the run ends, because a policy counts its own steps alone and other
    agents leave their games early; and one that is still high at the end. The runners have two thirds of the slots and,
    as they are caught after a quarter of a game, a third of the steps."""
    play(tmp_path, 3000, 'env.kwargs={"caught": 2}', "learner.desired_kl=0", "learner.learning_rate=1e-3")
    found = [last_metrics(tmp_path, name) for name in NAMES]
    assert found[0]["learning_rate"] == found[1]["learning_rate"]
    # The last round began at most a round before the end.
    rounds = min(line["policy_version"] for line in found)
    assert 0 < found[0]["learning_rate"] <= 1e-3 * 2 / rounds


def test_a_policy_whose_agents_are_out_of_their_games_stays_as_it_is(tmp_path: Path) -> None:
    """Catches updates by an optimizer's momentum alone, versions of them, and a learning rate that such updates raise:
    all games are in step, and the runners leave them in the first of four unrolls."""
    settings = ('env.kwargs={"steps": 31, "caught": 7}', "learner.batch_size=12", "checkpoint.every_updates=0")
    hunters, runners = play(tmp_path, 3000, *settings)["policies"].values()
    assert runners["policy_version"] == -(-hunters["policy_version"] // 4) >= 3
    # Eight runners for seven steps in each of their updates. With its reset a game is four unrolls long.
    assert runners["env_steps"] == 56 * runners["policy_version"]
    assert runners["skipped_updates"] == 0
    assert np.isfinite(last_metrics(tmp_path, "runners")["loss/loss"])


def test_a_run_goes_on_with_both_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches books that are one for both, a policy that begins anew or under another name, steps that are counted for
    the wrong one, what is of the run told by each of them, and evaluation of one policy with the agents of the other,
    from the command line or from Python; evaluations during training that are of one policy, that callbacks, metrics or
    summaries never hear of or that a resumed run forgets, and a best of them; and games of which there is no film."""
    run = tmp_path / "run"
    evaluated = ("evaluation.every_env_steps=200", "evaluation.episodes=24", "evaluation.niceness=0")
    callback = "callbacks=[{name: 'team_games:UntilEvaluated'}]"
    first = play(run, 10**9, *evaluated, callback, "max_seconds=600", "checkpoint.every_updates=0")
    assert first["stopped_by"] == "callback"
    steps = first["env_steps"] + 500
    for name in NAMES:
        own = first["policies"][name]["evaluation"]
        results = [json.loads(line) for line in (run / "policies" / name / "evaluation.jsonl").read_text().splitlines()]
        assert own == {"made": len(results), "failed": 0, "last": results[-1], "best": None}
        assert results[0]["policy"] == name
        assert results[0]["episodes"] == {"hunters": 8, "runners": 16}[name]
        recorded = last_metrics(run, name)
        assert recorded["evaluation_return"] == recorded["callback/evaluated"] == results[-1]["mean_return"]
        assert recorded["evaluation_best_return"] is None
        assert recorded["evaluation_env_steps"] == results[-1]["env_steps"] <= first["policies"][name]["env_steps"]
    assert not (run / "best").exists()
    second = play(run, steps, "evaluation.random_seconds=10")
    check_random_play(second)
    history = [json.loads((run / "policies" / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in NAMES]
    assert [line["random_return"] for line in history] == [
        pytest.approx(second["policies"][name]["random_return"]) for name in NAMES
    ]
    for name in NAMES:
        one, other = first["policies"][name], second["policies"][name]
        assert other["evaluation"] == {**one["evaluation"], "made": 0}
        for summary in (one, other):
            ledger = summary["ledger"]
            assert summary["books_balance"]
            assert ledger["sampled"] == ledger["trained"] + ledger["in_flight"] + sum(ledger["dropped"].values())
        assert other["policy_version"] > one["policy_version"] > 0
        assert other["env_steps"] == one["env_steps"] + other["session_env_steps"]
        assert json.loads((run / "policies" / name / "summary.json").read_text()) == other
        assert (run / "policies" / name / "metrics.jsonl").exists()
    assert second["env_steps"] == sum(second["policies"][name]["env_steps"] for name in NAMES) >= steps
    hunters, runners = (second["policies"][name]["env_steps"] for name in NAMES)
    # One hunter for eight steps, and runners for eight and for four.
    assert hunters < runners < 2 * hunters
    printed = capsys.readouterr().out
    # What each has, and once for each of the two runs where both lie.
    assert [printed.count(part) for part in ("hunters: Done", "runners: Done", "play it")] == [2, 2, 2]
    assert all(f"{name}: evaluation: return " in printed for name in NAMES)
    films = ["--video", str(tmp_path / "films")] if importlib.util.find_spec("imageio_ffmpeg") else []
    options = ["--episodes", "24", "--processes", "1", *films]
    assert main(["evaluate", str(run), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(run), *options]) == 0
    said = capsys.readouterr().out
    assert len(found["recordings"]) == len(films) // 2
    for film in found["recordings"]:
        assert list((tmp_path / "films").iterdir()) == [Path(film["file"])]
        assert list(film["returns"]) == NAMES
        returns = ", ".join(f"{name} {mean:.3f}" for name, mean in film["returns"].items())
        assert f"  {film['file']}  return {returns}, 8 steps" in said.splitlines()
    assert list(found["policies"]) == NAMES
    assert [found["policies"][name]["episodes"] for name in NAMES] == [8, 16]
    assert found["policies"]["hunters"]["max_length"] == 8
    assert found["policies"]["runners"]["min_length"] == 4
    played = shoal.evaluate(run, 24, processes=1)
    assert played.episodes == 24
    assert list(played.policies) == NAMES
    for name, own in played.policies.items():
        assert own.policies == {}
        assert own.mean == found["policies"][name]["mean_return"]
        assert own.episodes == found["policies"][name]["episodes"]
    for setting in ({"env": ID}, {"memory_horizon": 0}):
        with pytest.raises(
            ValueError, match=f"{next(iter(setting))}: is for one policy, and .* has several, hunters, "
        ):
            shoal.evaluate(run, 24, **setting)
    assert main(["evaluate", str(run), "--vs", "random"]) == 2
    assert "--vs: is for one policy" in capsys.readouterr().err
    assert main(["train", *SMALL, "mode=inline", f"run_dir={run}", "policies.others.agents=[x]"]) == 2
    assert "policies.others.agents: no agent of" in capsys.readouterr().err
    renamed = [word.replace("policies.hunters", "policies.seekers") for word in SMALL]
    assert main(["train", *renamed, "mode=inline", f"run_dir={run}"]) == 2
    assert "holds the policies hunters, runners, and policies names seekers, runners" in capsys.readouterr().err
    policy = shoal.load_policy(find_saved(run).path / "hunters")
    assert policy.act(np.eye(3, dtype=np.float32)[0], is_first=True) in range(3)


def test_trackers_have_a_run_for_every_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches policies whose lines go into one run of a tracker, under the same keys, and lines that are lost because
    the run of one policy ended that of another: with the trackers themselves, without a network."""
    for tracker in ("wandb", "trackio"):
        pytest.importorskip(tracker, reason=f"needs pip install 'shoal[{tracker}]'")
    # In a process of its own: trackio reads its folder when it is imported.
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    settings = ("mode=inline", "total_env_steps=1500", "log.sinks=[wandb, trackio]", "log.every_seconds=0.5")
    done = command_line("train", *SMALL, *settings, "log.name=mine", f"run_dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [database] = (tmp_path / "trackio").glob("shoal.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    names = sorted({name for name, _, _ in rows})
    assert [name.rpartition("-")[0] for name in names] == ["mine-hunters", "mine-runners"]
    for policy, name in zip(NAMES, names, strict=True):
        lines = [json.loads(line) for line in (run / "policies" / policy / "metrics.jsonl").read_text().splitlines()]
        wanted = [
            (line["env_steps"], line["loss/policy_loss"]) for line in lines if line.get("loss/policy_loss") is not None
        ]
        stored = [(step, json.loads(metrics)) for each, step, metrics in rows if each == name]
        assert [(step, line["loss/policy_loss"]) for step, line in stored if "loss/policy_loss" in line] == wanted
        [data] = (run / "policies" / policy / "wandb").glob("offline-run-*/*.wandb")
        assert data.read_bytes().count(b"loss/policy_loss") >= len(wanted) > 1


@pytest.mark.slow
def test_both_policies_find_their_best_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches updates that teach one policy alone, or with the rewards of the other."""
    run = tmp_path / "run"
    summary = play(
        run,
        12_000,
        "env.num_envs=24",
        "seed=1",
        "evaluation.random_seconds=10",
        "learner.epochs=4",
        "learner.learning_rate=0.003",
        "learner.gamma=0.5",
    )
    assert [summary["policies"][name]["learning"]["verdict"] for name in NAMES] == ["better", "better"]
    said = capsys.readouterr().out
    assert all(re.search(rf"{name}: .*?\n  return .*; a random policy gets", said, re.DOTALL) for name in NAMES)
    assert main(["evaluate", str(run), "--episodes", "96", "--greedy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["policies"]
    best = {"hunters": best_return("hunter_0"), "runners": sum(map(best_return, RUNNERS)) / 2}
    for name in NAMES:
        assert found[name]["mean_return"] > 0.9 * best[name]


@pytest.mark.usefixtures("no_ray")
def test_actors_in_other_processes_feed_both_policies(tmp_path: Path) -> None:
    """Catches weights of one policy that never reach the actors, and trajectories that reach one learner alone."""
    run = tmp_path / "run"
    settings = ("mode=local", "actor.num_actors=2", "total_env_steps=3000", "evaluation.random_seconds=10")
    assert main(["train", *SMALL, *settings, f"run_dir={run}"]) == 0
    summary = summary_of(run)
    check_random_play(summary)
    for name in NAMES:
        own = summary["policies"][name]
        assert own["books_balance"]
        assert own["policy_version"] >= 4
        assert own["max_log_prob_error"] < 1e-4
