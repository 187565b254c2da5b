"""``shoal bench learn`` from the command to its JSON line, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from service import shoal, start_shoal, wait_for

QUICK = ("--only", "cartpole", "--seeds", "1", "--budget-scale", "0.02")
INLINE = ("mode=inline", "env.num_envs=16", "actor.unroll_length=32")


def test_a_small_share_of_one_row(tmp_path: Path) -> None:
    """A benchmark that no longer fits the commands it runs, or what they write."""
    words = ("bench", "learn", *QUICK, "--json", "--out", tmp_path / "out", "--set", *INLINE)
    done = shoal(*words, cwd=tmp_path, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    (result,), (trial,) = told["results"], told["trials"]
    assert (result["row"], result["system"], result["seeds"], result["failed"]) == ("cartpole", "shoal", 1, 0)
    # Two thousand steps of CartPole teach nothing; all four numbers are about 20.
    assert result["reached"] == 0
    assert trial["reached"] is None
    assert all(8 <= value <= 200 for value in (result["random"], result["sampled"][0], result["greedy"][0]))
    assert trial["seconds"] > 0
    (line,) = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    curve = json.loads(line)["curve"]
    assert len(curve["mean"]) == len(curve["env_steps"]) == len(curve["seconds"])
    assert result["best"] is None or max(curve["mean"]) >= result["best"] >= 8

    again = shoal(*words, cwd=tmp_path, timeout=200)
    assert "seed 0: is there already" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["results"] == [result]


def test_an_interrupted_bench_leaves_no_run_behind(tmp_path: Path) -> None:
    """A training that goes on for hours after Ctrl-C, because it is in a session of its own."""
    words = ("bench", "learn", "--only", "cartpole", "--seeds", "2", "--out", tmp_path / "out", "--set", *INLINE)
    bench = start_shoal(*words, "total_env_steps=1000000000", cwd=tmp_path)
    metrics = tmp_path / "out" / "cartpole-shoal-0" / "run" / "metrics.jsonl"
    try:
        wait_for(metrics.exists, process=bench)
        bench.send_signal(signal.SIGINT)
        said, _ = bench.communicate(timeout=600)
    finally:
        bench.kill()
    assert bench.returncode == 130
    assert "Traceback" not in said
    # It ended in good order: it saved, and the second seed was never begun.
    assert json.loads((metrics.parent / "summary.json").read_text())["interrupted_by"] == "SIGTERM"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cartpole-shoal-0"]
    assert not running(str(tmp_path))


def running(marker: str) -> list[str]:
    """Commands of living processes that name ``marker``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if marker in command:
            found.append(command)
    return found
