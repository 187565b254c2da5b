"""The progress of a run as a person sees it, on a terminal and in a file."""

from __future__ import annotations

import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest
from service import SMALL, command
from shoal.deploy.cli import main
from shoal.deploy.training.progress import Curve, _lines_of_run, _sparkline, _summary_lines

LINE = re.compile(
    r"\[\d\d:\d\d\] steps [\d,]+/[\d,]+  return (-|-?[\d.]+)  sampled/s [\d,]+  trained/s [\d,]+  lag [\d.]+  "
    r"policy_loss -?[\d.]+  value_loss [\d.]+  entropy [\d.]+  eta [\d:-]+"
)


def test_plain_lines_are_numbers_in_one_order(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log that says nothing, terminal codes in a file, and rates of a short run that are 0."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks and continuous integration have it
    assert (
        main(
            [
                "train",
                "mode=inline",
                *SMALL,
                "total_env_steps=1000",
                "evaluation.random_seconds=5",
                f"run_dir={tmp_path / 'run'}",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert "\x1b" not in out
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert lines
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert "trained/s 0 " not in lines[-1]
    assert out.index("Training Fast") < out.index(lines[0]) < out.index("Done.")
    for part in ("a random policy gets", "ledger      balances", "shoal evaluate", "bottleneck  "):
        assert part in out


def test_time_that_is_nearly_up_is_what_is_left(tmp_path: Path, capfd: Any) -> None:
    """Catches a run that says it needs another day, and then that it is done, when its time ends in a second."""
    endless = ("total_env_steps=1000000000", "max_seconds=3")
    assert main(["train", "mode=inline", *SMALL, *endless, f"run_dir={tmp_path / 'run'}"]) == 0
    out = capfd.readouterr().out
    last = [line for line in out.splitlines() if line.startswith("[")][-1]
    assert last.endswith("eta 00:00")
    assert "Done: time is up (max_seconds)." in out


def test_the_live_view_shows_what_matters(tmp_path: Path) -> None:
    """Catches a view that fails on a real terminal, and log records that tear it apart."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="100", LINES="40")
        env = ("env.id=service_envs:Scripted-v0", "env.kwargs={how: raises, at: 100}")
        run = ("mode=inline", f"run_dir={tmp_path / 'run'}", "total_env_steps=3000")
        argv = command("train", *SMALL, *env, *run)
        os.execv(argv[0], argv)
    out = b""
    try:
        while piece := os.read(terminal, 2**16):
            out += piece
    except OSError:  # what Linux answers once the other side is closed
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, out.decode()
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode().replace("\r", "")).split("steps  ")
    assert len(frames) > 3
    last = frames[-1]
    for label in ("time", "return", "steps/s", "lag", "loss", "memory", "actors", "bottleneck", "curve"):
        assert re.search(rf"^ *{label}  ", last, re.MULTILINE), last
    for part in ("elapsed", "left", "policy", "value", "entropy", "right: ", "1 alive", "Done."):
        assert part in last
    # The cursor goes up over the view before a record is written, never through it.
    assert re.search(r"\x1b\[2K(\x1b\[[0-9;]*m)?WARNING: service_envs:Scripted-v0: slot", out.decode())


def test_the_summary_says_what_went_wrong() -> None:
    """Catches good words for a run that was interrupted, lost steps or saw no episode end."""
    summary = {
        "mean_return": None,
        "return_ci95": None,
        "random_return": None,
        "random_return_ci95": None,
        "learning": {"advice": ""},
        "ledger": {"sampled": 10, "trained": 4, "in_flight": 0, "dropped": {"stale": 5}},
        "stopped_by": "signal",
        "interrupted_by": "SIGINT",
        "env_steps": 4,
        "wall_seconds": 3700.0,
        "env_steps_per_second": 1.0,
        "session_env_steps": 4,
        "session_updates": 1,
        "policy_version": 1,
        "books_balance": False,
        "max_log_prob_error": 0.02,
        "log_prob_checks": 3,
        "actor_restarts": 2,
        "actor_recovery_seconds": {"count": 2, "mean": 4.25, "max": 6.0},
        "env_faults": 7,
        "limit": {"stage": "learner", "sentence": "updates take 90% of the learner's time"},
    }
    lines = [*_summary_lines(summary, 100, is_whole=False), *_lines_of_run(summary, Path("runs/x"))]
    text = "\n".join(lines)
    parts = (
        "Interrupted",
        "no episode ended",
        "DOES NOT BALANCE",
        "5 dropped (stale)",
        "2 actors replaced (up again after 4.2 s, 6.0 s at most)",
        "updates take",
        "shoal evaluate runs/x",
    )
    for part in parts:
        assert part in text
    assert "4 environment steps in 1:01:40 (1/s), 1 updates\n" in text
    assert "MEMORY IS WRONG" in text
    summary |= {"mean_return": 3.0, "random_return": 1.5, "books_balance": True, "max_log_prob_error": 1e-6}
    text = "\n".join(_summary_lines(summary, 100, is_whole=False))
    assert "3.000; a random policy gets 1.500, 2.0 times as much" in text
    assert "WRONG" not in text
    assert "learning" not in text
    summary |= {"return_ci95": 0.25, "random_return_ci95": 0.125, "learning": {"advice": "after 100 steps"}}
    text = "\n".join(_summary_lines(summary, 100, is_whole=False))
    assert "3.000 +- 0.250; a random policy gets 1.500 +- 0.125, 2.0 times as much" in text
    assert "  learning    after 100 steps\n" in text
    # Of a resumed run: its own steps beside its own time.
    summary |= {"env_steps": 40_161, "policy_version": 320, "session_updates": 2, "interrupted_by": None}
    summary["ledger"] |= {"trained": 40_161}
    text = "\n".join(_summary_lines(summary, 40_100, is_whole=True))
    assert "Done.\n" in text
    assert "4 environment steps in 1:01:40 (1/s), 2 updates; the whole run 40,161 in 320 updates\n" in text
    text = "\n".join(_summary_lines({**summary, "session_env_steps": 0}, 40_000, is_whole=True))
    assert text.startswith("Nothing was trained: the run has its total_env_steps=40,000 already")


def test_the_curve_is_drawn_between_its_ends() -> None:
    """Catches a constant curve that divides by zero, and a long one that does not fit the line."""
    assert _sparkline([1.0], 10).startswith("▁")
    assert _sparkline([0.0, 1.0], 10).startswith("▁█")
    assert len(_sparkline([float(i) for i in range(1000)], 20).split()[0]) <= 20


def test_the_curve_of_a_long_run_stays_short() -> None:
    """Catches a list that grows with every second of a run of weeks, and a curve that is bent by being thinned."""
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
    points = curve.points
    assert Curve.MOST_POINTS // 2 <= len(points) < Curve.MOST_POINTS
    size = round(points[1] - points[0])
    assert points == [(2 * i + 1) * size / 2 - 0.5 for i in range(len(points))]  # means of equal stretches
    assert 100_000 - len(points) * size < size
