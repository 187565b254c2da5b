"""The arithmetic of ``shoal bench learn``: when a curve reached its threshold, and what several seeds say together."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from shoal.deploy.cli import BENCHMARKS
from shoal.deploy.settings.load import load_config
from shoal.envs.config import AdapterOptions

LINE = {"session": 0, "policy_version": 1}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which lie beside it and import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("learn", "suite.curve", "suite.peers", "suite.picture", "suite.rows", "suite.table", "suite.trial")
        yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("learn", "suite", "peers"):
                del sys.modules[name]


def test_a_mean_is_of_a_hundred_episodes_and_of_the_latest(bench):
    """A window that is too short or too long, that reaches back further than it must, or begins before it is full."""
    episodes = np.array([60, 30, 20, 0, 100, 250])
    returns = np.array([0.0, 30.0, 60.0, 0.0, 500.0, 2500.0])
    curve = bench.curve.moving_mean(np.arange(1, 7) * 1000, np.arange(1, 7) * 2.0, episodes, returns)
    assert curve.env_steps.tolist() == [3000, 4000, 5000, 6000]
    assert curve.seconds.tolist() == [6.0, 8.0, 10.0, 12.0]
    # 110 episodes; the same; the last hundred alone; the last 250 alone, which cannot be told apart.
    assert curve.mean.tolist() == pytest.approx([90 / 110, 90 / 110, 5.0, 10.0])


def test_reached_is_the_first_time_within_the_budget(bench):
    """The best or the last time, or a time when the steps were used up, taken for the first."""
    steps, seconds = np.array([100, 200, 300, 400]), np.array([1.0, 2.5, 3.0, 9.0])
    curve = bench.curve.Curve(steps, seconds, np.array([1.0, 5.0, 4.0, 6.0]))
    assert curve.reached(5.0, 400) == (200, 2.5)
    assert curve.reached(5.5, 400) == (400, 9.0)
    assert curve.reached(5.5, 399) is None
    assert curve.reached(-1.0, 400) == (100, 1.0)
    assert curve.best(399) == 5.0
    assert curve.best(99) is None
    assert curve.rate == pytest.approx(300 / 8)


def test_a_run_of_ours_is_read_from_its_metrics(bench, tmp_path):
    """A mean since the line before taken for one of all episodes, a null for a return, seconds from the wrong start."""
    lines = [
        {"time": 1005.0, "env_steps": 0, "episode_return/count": 0, "episode_return/mean": None},
        {"time": 1010.0, "env_steps": 800, "episode_return/count": 80, "episode_return/mean": 10.0},
        {"time": 1011.0, "env_steps": 900, "episode_return/count": 80, "episode_return/mean": None},
        {"time": 1012.0, "env_steps": 2000, "episode_return/count": 120, "episode_return/mean": 40.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({**LINE, **line}) + "\n" for line in lines))
    curve = bench.curve.of_run(tmp_path, began=1000.0)
    assert curve.to_json() == {"env_steps": [2000], "seconds": [12.0], "mean": [pytest.approx((800 + 1600) / 120)]}
    assert bench.curve.of_run(tmp_path / "nothing", began=0.0).reached(0.0, 10**9) is None


def test_a_peer_is_read_from_its_environments(bench, tmp_path):
    """Environments added up in the order of their files, and steps counted twice because they are told as totals."""
    for name, late in (("a", 0.5), ("b", 0.0)):
        lines = [f"{100 + late} 0 0 0"]
        lines += [f"{100 + k + late} {k * 10} 1 {k}" for k in range(1, 61)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    curve = bench.curve.of_episodes(tmp_path, began=90.0)
    assert len(curve.mean) == 21
    assert curve.env_steps[0] == 1000
    assert curve.seconds[0] == 60.5
    assert curve.mean[0] == pytest.approx(25.5)
    assert curve.env_steps[-1] == 1200
    (tmp_path / "empty").mkdir()
    assert len(bench.curve.of_episodes(tmp_path / "empty", began=90.0).mean) == 0


def a_trial(bench: Any, seed: int, **found: Any) -> Any:
    asked = bench.trial.Asked(system="shoal", row="cartpole", seed=seed, budget=1000, threshold=475)
    return bench.trial.Trial(asked=asked, **found)


def test_seeds_together(bench):
    """Seeds that failed or never got there left out of the count, or taken into the median; an interval of one seed."""
    reached = bench.curve.Reached
    trials = [
        a_trial(bench, 0, reached=reached(100, 3.0), sampled=480.0, greedy=500.0, random=20.0),
        a_trial(bench, 1, reached=reached(300, 5.0), sampled=490.0, greedy=500.0, random=22.0),
        a_trial(bench, 2, sampled=500.0, random=24.0),
        a_trial(bench, 3, error="ended with 1"),
    ]
    (found,) = bench.table.results(trials)
    assert (found.reached, found.seeds, found.failed) == (2, 4, 1)
    assert found.env_steps == (200, 100, 300)
    assert found.seconds == (4.0, 3.0, 5.0)
    # t of two degrees of freedom at 95%: 4.303.
    assert found.sampled == (490.0, pytest.approx(4.3026527 * 10 / 3**0.5))
    assert found.greedy == (500.0, 0.0)
    assert found.random == 22.0
    (single,) = bench.table.results(trials[2:3])
    assert single.sampled == (500.0, None)
    assert single.env_steps is None
    rows = bench.table.as_markdown([found, single], bench.rows.ROWS).splitlines()
    assert len({line.count("|") for line in rows}) == 1
    assert "2 of 4, 1 failed | 200 [100 .. 300]" in rows[2]


def test_systems_and_settings_are_told_apart(bench):
    """Two ways to train averaged as if they were seeds of one."""
    others = [
        bench.trial.Asked(system="shoal", row="cartpole", seed=0, budget=1000, threshold=475, settings=("a=1",)),
        bench.trial.Asked(system="sb3-ppo", row="cartpole", seed=0, budget=1000, threshold=475),
        bench.trial.Asked(system="shoal", row="cartpole", seed=0, budget=500, threshold=475),
    ]
    trials = [a_trial(bench, 0), *(bench.trial.Trial(asked=asked) for asked in others), a_trial(bench, 1)]
    assert [one.seeds for one in bench.table.results(trials)] == [2, 1, 1, 1]


def test_a_trial_comes_back_from_its_line(bench, tmp_path):
    """A run that is trained again because its line is not recognised, or a failure that hides the later success."""
    curve = bench.curve.Curve(np.array([1, 2]), np.array([0.5, 1.0]), np.array([3.0, 4.0]))
    good = a_trial(bench, 0, reached=bench.curve.Reached(2, 1.0), best=4.0, curve=curve)
    lines = [a_trial(bench, 0, error="ended with 1"), good]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(trial.to_json()) + "\n" for trial in lines))
    (back,) = bench.learn.load([tmp_path, tmp_path / "nothing"])
    assert back.to_json() == good.to_json()
    assert back.asked == good.asked


def test_what_is_there_is_not_trained_again(bench, tmp_path, capsys):
    """Hours of training repeated; a failure that ends the others, or is kept as the result."""
    made = []

    def trainer(row: Any, asked: Any, directory: Path) -> Any:
        made.append((asked.seed, directory.name))
        directory.mkdir()
        if asked.seed == 1 and len(made) < 3:
            raise bench.learn.Failed("ended with 1; it said last: no")
        return bench.trial.Trial(asked=asked, sampled=1.0)

    planned = [a_trial(bench, seed).asked for seed in range(2)]
    assert bench.learn.work(planned, {"shoal": trainer}, tmp_path) == 1
    assert bench.learn.work(planned, {"shoal": trainer}, tmp_path) == 0
    assert made == [(0, "cartpole-shoal-0"), (1, "cartpole-shoal-1"), (1, "cartpole-shoal-1-1")]
    assert [trial.error for trial in bench.learn.load([tmp_path])] == ["", ""]
    said = capsys.readouterr().out
    assert "seed 1: failed: ended with 1; it said last: no" in said
    assert "seed 0: is there already" in said


def options(**given: Any) -> argparse.Namespace:
    told = {"only": ["forage"], "seeds": None, "budget_scale": 1.0, "recipe": None, "set": [], "peer": []}
    return argparse.Namespace(**{**told, **given})


def test_rows_keep_their_recipe_unless_another_is_asked_for(bench, monkeypatch):
    """A recipe lost or forced on everybody; a peer that is handed our settings; a row that needs what is not there."""
    monkeypatch.setattr(bench.learn, "missing", lambda row: "")
    (own, *others), _ = bench.learn.plan(options())
    assert own.recipe == "forage"
    assert len(others) == bench.rows.ROWS["forage"].seeds - 1
    (asked,), _ = bench.learn.plan(options(recipe="", seeds=1, set=["a=1"], budget_scale=0.1))
    assert (asked.recipe, asked.settings, asked.budget) == ("", ("a=1",), 250_000)
    planned, skipped = bench.learn.plan(options(only=["forage", "recall"], peer=["sb3-ppo"], seeds=1, set=["a=1"]))
    assert [(one.row, one.settings) for one in planned] == [("recall", ())]
    assert list(skipped) == ["forage, sb3-ppo"]
    monkeypatch.undo()
    absent = bench.rows.Row(name="x", env_id="x", threshold=0, env_steps=1, seeds=1, needs=("no_such_module", "json"))
    assert bench.rows.missing(absent) == "there is no module no_such_module: pip install 'shoal[suite]'"


def test_every_row_is_a_command_that_is_valid(bench, tmp_path):
    """A row whose settings, written as words of a command, mean something else or nothing."""
    for row in bench.rows.ROWS.values():
        asked = bench.trial.Asked(
            system="shoal", row=row.name, seed=3, budget=77, threshold=row.threshold, recipe=row.recipe
        )
        words = bench.trial.command(row, asked, tmp_path)
        recipes = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        config, problems = load_config(recipes, words[1 + 2 * len(recipes) :])
        assert problems == []
        assert (config.env.id, config.env.kwargs) == (row.env_id, {})
        assert config.env.options == AdapterOptions(**row.env_options)
        assert (config.seed, config.total_env_steps, config.run_dir) == (3, 77, str(tmp_path))


def test_recommended_settings_are_of_rows_that_exist(bench):
    """A row of the suite renamed, and a peer that silently has no settings for it any more."""
    told = yaml.safe_load((BENCHMARKS / "suite" / "recommended.yaml").read_text())
    assert told.keys() == bench.peers.PEERS.keys()
    for settings in told.values():
        assert settings.keys() <= bench.rows.ROWS.keys()
        assert all("entry" in one for one in settings.values())
    assert bench.rows.ROWS.keys() - told["sb3-ppo"].keys() == {"forage"}


def test_curves_together_are_drawn_where_all_seeds_have_points(bench):
    """A mean over fewer seeds at the ends than in the middle, which would bend the curve."""
    low = bench.curve.Curve(np.array([0, 100]), np.array([0.0, 1.0]), np.array([0.0, 10.0]))
    high = bench.curve.Curve(np.array([50, 200]), np.array([0.0, 1.0]), np.array([20.0, 20.0]))
    drawn = bench.picture.together([low, high])
    assert (drawn.env_steps[0], drawn.env_steps[-1]) == (50, 100)
    assert (drawn.mean[0], drawn.low[0], drawn.high[0]) == (12.5, 5.0, 20.0)
    apart = bench.curve.Curve(np.array([300, 400]), np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    assert bench.picture.together([low, apart]) is None
