"""Runs with self-play: what is learned, what a summary says, what a resumed run goes on with, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
from service import read_summary
from shoal.deploy.cli import main
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.settings.load import load_config
from shoal.learner.checked_files import fingerprint
from shoal.learner.checkpoint import find_checkpoint
from shoal.learner.plain_file import load_plain, save_plain
from turn_games import Nim

NIM = "pettingzoo:turn_games:Nim"
SMALL = (
    *(f"env.id={NIM}", "env.num_envs=8", "actor.unroll_length=8", "learner.batch_size=16", "learner.minibatches=2"),
    *("metrics.port=-1", "evaluation.random_seconds=0", "self_play.every_updates=3", "self_play.pool_size=4"),
)


def play(run: Path, steps: int, *settings: str) -> dict[str, Any]:
    """A session up to so many steps; its summary."""
    assert main(["train", *SMALL, f"run_dir={run}", *settings, f"total_env_steps={steps}"]) == 0
    return read_summary(run)


def test_a_policy_that_plays_itself_beats_its_beginnings(tmp_path: Path) -> None:
    """Catches games that teach nothing: opponents that never change, do not play, or play with the trained weights. Of
    seven stones the first player wins by leaving four."""
    Nim.illegal.clear()
    run = shoal.train(
        NIM,
        config={
            "mode": "inline",
            "env.num_envs": 32,
            "env.kwargs": {"stones": 7},
            "actor.unroll_length": 16,
            "self_play": {"share": 1, "every_updates": 10},
        },
        total_env_steps=20_000,
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert not Nim.illegal
    assert run.summary["books_balance"]
    first, *_, newest = run.summary["self_play"]
    assert first["policy_version"] == 0
    assert first["win_share"] >= 0.75
    assert first["return_difference"] >= 1.0
    assert newest["policy_version"] >= 40
    policy = shoal.load_policy(run.run_dir, greedy=True)
    seen = {"observation": np.array([7, 1], np.float32), "action_mask": np.ones(3, np.int8)}
    assert policy.act(seen, is_first=True) + 1 == 3


@pytest.mark.parametrize("mode", ["inline", "local"])
@pytest.mark.usefixtures("no_ray")
def test_a_run_goes_on_with_its_pool(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches versions that do not reach actors in other processes, a pool that begins anew with a session, results and
    steps that are lost, and frozen steps among those that are trained."""
    run = tmp_path / "run"
    settings = (f"mode={mode}", "self_play.share=0.5")
    if mode == "local":
        settings += ("actor.num_actors=2", "learner.num_threads=1")
    first = play(run, 2000, *settings)
    assert "versions of itself, 1 of 2 agents frozen" in capsys.readouterr().out
    versions = [result["policy_version"] for result in first["self_play"]]
    last = first["policy_version"] - first["policy_version"] % 3
    assert versions == [last - 9, last - 6, last - 3, last]
    assert sum(result["games"] for result in first["self_play"]) >= 20
    # Three of six games: of eight agents there, three are frozen or wait; of the others all four are trained.
    assert 0.2 < first["opponent_env_steps"] / first["env_steps"] < 0.6
    assert first["episodes"] > 0
    assert first["mean_return"] is not None
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["opponent_version/newest"] == last
    assert metrics["opponent_version/newest-3"] == last - 9
    assert any(name.startswith("opponent_win_ratio/") for name in metrics)
    saved = load_plain(find_checkpoint(run).path / "opponents.npz")["members"]
    assert [member["policy_version"] for member in saved] == versions

    # Two updates more: of the first session's versions all but one are still there.
    second = play(run, 2000 + 3 * 16 * 8, *settings)
    assert [result["policy_version"] for result in second["self_play"]][:3] == versions[1:]
    for before, now in zip(first["self_play"][1:], second["self_play"], strict=False):
        assert now["games"] >= before["games"]
    if mode == "inline":
        assert second["slots_begun_anew"] == 0
    assert main(["evaluate", str(run), "--episodes", "8", "--json"]) == 0


def test_a_pool_that_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches opponents of another policy, or under another name, that are played without a word."""
    run = tmp_path / "run"
    play(run, 300, "mode=inline", "self_play.share=1")
    path = find_checkpoint(run).path
    file = path / "opponents.npz"
    pool = load_plain(file)
    pool["members"][0]["weights"] = pool["members"][0]["weights"][::-1].copy()
    save_plain(file, pool)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {file.name: fingerprint(file)}))
    arguments = ["train", *SMALL, f"run_dir={run}", "mode=inline", "total_env_steps=600"]
    capsys.readouterr()
    assert main([*arguments, "self_play.share=1"]) == 2
    assert "the numbers of version 0 are damaged; resume another checkpoint, or train on" in capsys.readouterr().err
    assert main([*arguments, "self_play.share=0"]) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mode=cluster",), "self_play.share: games against versions of the policy are played in mode=inline"),
        (("env.id=recall",), "self_play.share: games against versions of the policy need several agents"),
        (("env.num_envs=2", "self_play.share=0.5"), "make shares of 1 possible; choose one of these instead of 0.5"),
        (("mode=local", "learner.num_learners=2"), "self_play.share: the pool of versions belongs to one learner"),
        (("actor.reset_memory=never",), "every game begins with other agents, whose memory is not carried on"),
        (("self_play.share=1.5",), "self_play.share: Input should be less than or equal to 1"),
        (("self_play.draw=result",), "did you mean results?"),
    ],
)
def test_what_cannot_be_played_is_refused(settings: tuple[str, ...], words: str, tmp_path: Path, capsys: Any) -> None:
    """Catches a setting without effect, or one that fails after minutes."""
    arguments = ["train", *SMALL, "mode=inline", "self_play.share=1", *settings, f"run_dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_self_play_has_one_learner() -> None:
    """Catches several learners by default, each of which would have a pool of its own."""
    config, problems = load_config([], ["self_play.share=1", "env.id=mettagrid/forage"])
    assert not problems
    layout = choose_layout(config, Machine(cores=8, accelerator=False))
    assert (layout.placement, layout.num_learners) == ("disaggregated", 1)
    assert layout.why == "self-play has one learner"
