"""`shoal report` of several runs: groups, their means and intervals, and what differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import RATE, config, lines, summary, write_run
from report_pages import report
from shoal.deploy.report.comparison import band, group_runs
from shoal.deploy.report.recorded_run import read_run

T_95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622}
"""Two-sided 95% points of Student's t by degrees of freedom, from the tables."""


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_bands_against_the_formula(count: int) -> None:
    """Catches an interval of the wrong quantile or of n instead of n - 1, and x that not all runs have."""
    rng = np.random.default_rng(count)
    curves = []
    for _ in range(count):
        x = np.sort(rng.uniform(0, 100, size=40))
        curves.append((x, np.cumsum(rng.normal(size=40))))
    found = band(curves, points=50)
    assert found is not None
    assert found.half_width is not None
    assert found.x[0] == max(x[0] for x, _ in curves)
    assert found.x[-1] == min(x[-1] for x, _ in curves)
    for at, mean, half in zip(found.x, found.mean, found.half_width, strict=True):
        values = []
        for x, y in curves:
            # The straight line between the neighbours.
            after = next(i for i in range(len(x)) if x[i] >= at)
            before = max(0, after - 1)
            part = (at - x[before]) / (x[after] - x[before]) if after > before else 0.0
            values.append(y[before] + part * (y[after] - y[before]))
        center = sum(values) / count
        spread = math.sqrt(sum((v - center) ** 2 for v in values) / (count - 1))
        assert mean == pytest.approx(center, abs=1e-9)
        assert half == pytest.approx(T_95[count - 1] * spread / math.sqrt(count), rel=1e-4)


def test_a_band_only_where_all_have_data() -> None:
    """Catches runs that do not overlap, or have no point, and are averaged all the same."""
    ones = np.ones(3)
    assert band([(np.array([0.0, 1, 2]), ones), (np.array([3.0, 4, 5]), ones)]) is None
    assert band([(np.array([0.0, 1, 2]), ones), (np.zeros(0), np.zeros(0))]) is None
    alone = band([(np.array([0.0, 1, 2]), ones)])
    assert alone is not None
    assert alone.half_width is None


def test_runs_that_differ_in_their_seed_are_a_group(tmp_path: Path) -> None:
    """Catches groups split by settings that change nothing, groups that hide one that does, a difference not shown."""
    changes: list[dict[str, Any]] = [
        {"seed": 0},
        {"seed": 1, "run_dir": "elsewhere", "metrics__port": 9464, "log__every_seconds": 1.0, "resume": "never"},
        {"seed": 0, "learner__learning_rate": 0.003},
        {"seed": 2},
        {"seed": 0, "env__kwargs": {"size": 3}},
    ]
    paths = [write_run(tmp_path / str(i), settings=config(**c)) for i, c in enumerate(changes)]
    runs = [read_run(path) for path in paths]
    groups = group_runs(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["0", "1", "3"], ["2"], ["4"]]
    assert [dict(group.settings) for group in groups] == [
        {"env.kwargs": "{}", "learner.learning_rate": "0.001", "env.kwargs.size": "-"},
        {"env.kwargs": "{}", "learner.learning_rate": "0.003", "env.kwargs.size": "-"},
        {"env.kwargs": "-", "learner.learning_rate": "0.001", "env.kwargs.size": "3"},
    ]
    assert groups[0].seeds == ["0", "1", "2"]


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    """Catches a mean, an interval or a difference in the tables that is not that of the final returns."""
    finals = {"0.001": (20.0, 22.0, 27.0), "0.003": (10.0, 11.0, 15.0)}
    paths = []
    for rate, returns in finals.items():
        for seed, final in enumerate(returns):
            written = lines(20, returns=lambda p, final=final: final * min(1.0, p / 1.8))
            settings = config(seed=seed, learner__learning_rate=rate)
            path = tmp_path / f"{rate}-{seed}"
            paths.append(write_run(path, written, settings=settings, ended=summary(written[-1])))
    page = report(*paths, out=tmp_path / "page.html")
    for returns in finals.values():
        mean, spread = sum(returns) / 3, np.std(returns, ddof=1)
        assert f"{mean:.4g} \u00b1 {T_95[2] * spread / math.sqrt(3):.2g}" in page.text
    assert "6 runs with 2 different settings" in page.text
    assert "more than chance explains" in page.text
    x, y = page.curve("return", "A: learning_rate=0.001")
    assert x[-1] == 1_800_000
    assert y[-1] == pytest.approx(23.0)
    trace = next(t for t in page.figures["return"]["data"] if t.get("name") == "A: learning_rate=0.001")
    assert trace["customdata"][-1] == pytest.approx(T_95[2] * np.std(finals["0.001"], ddof=1) / math.sqrt(3), rel=1e-4)
    lower, upper = page.figures["return"]["data"][:2]
    assert (lower["y"][-1], upper["y"][-1]) == pytest.approx(
        (23 - trace["customdata"][-1], 23 + trace["customdata"][-1])
    )
    assert page.curve("speed", "A: learning_rate=0.001")[1] == pytest.approx([RATE] * 300)
    assert "learner.learning_rate 0.001 0.003" in page.text


def test_groups_over_time(tmp_path: Path) -> None:
    """Catches a group whose time is that of one of its runs, and one clock for groups of different speed."""
    slow = lines()
    for entry in slow:
        entry |= {"seconds": 3 * entry["seconds"], "time": 2 * entry["seconds"] + entry["time"]}
    runs = [
        write_run(tmp_path / "0", settings=config(seed=0)),
        write_run(tmp_path / "1", slow, settings=config(seed=1)),
        write_run(tmp_path / "2", slow, settings=config(learner__learning_rate=0.1)),
    ]
    figure = report(*runs).figures["return"]
    mean_of = {"A": 2.0, "B": 3.0}
    for trace, minutes in zip(figure["data"], figure["axes"]["time"]["x"], strict=True):
        if trace.get("name", "")[:1] in mean_of and trace["mode"] == "lines":
            factor = mean_of[trace["name"][:1]]
            assert minutes == pytest.approx([factor * steps / RATE / 60 for steps in trace["x"]], rel=1e-3)
            del mean_of[trace["name"][:1]]
    assert not mean_of


def test_seeds_alone_and_single_runs(tmp_path: Path) -> None:
    """Catches a group of one that needs an interval, a seed counted twice without a word, wrong plurals."""
    paths = [write_run(tmp_path / str(i), settings=config(seed=i // 2)) for i in range(3)]
    text = report(*paths, out=tmp_path / "seeds.html").text
    assert "3 runs, all with the same settings but the seed" in text
    assert "seed 0 more than once" in text
    other = write_run(tmp_path / "other", settings=config(learner__learning_rate=1))
    text = report(paths[0], other, out=tmp_path / "single.html").text
    assert "cannot be said of single runs" in text
    assert "nan" not in text.lower().split()
