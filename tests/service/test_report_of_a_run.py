"""`shoal report` of a run that has run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_pages import Document
from service import SMALL
from shoal.deploy.cli import main


def test_a_real_run(tmp_path: Path) -> None:
    """Catches a name or a format that the run writes and the report does not know."""
    run = tmp_path / "run"
    settings = [f"run_dir={run}", "total_env_steps=4000", "log.every_seconds=0.05", "learner.weight_metrics_every=2"]
    assert main(["train", "mode=inline", *SMALL, *settings]) == 0
    assert main(["report", str(run)]) == 0
    page = Document((run / "report.html").read_text(encoding="utf-8"))
    written = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    said = json.loads((run / "summary.json").read_text())
    x, y = page.curve("return", "while training, last 256 episodes")
    assert y == pytest.approx([e["mean_return"] for e in written if e["mean_return"] is not None], rel=1e-5)
    assert y[-1] == pytest.approx(said["mean_return"], rel=1e-5)
    assert x[-1] == said["env_steps"]
    for key in (
        "speed",
        "learner-time",
        "actor-time",
        "lag",
        "parity_check",
        "entropy",
        "gradient",
        "weight-norm",
        "actors",
        "processor",
        "resident-memory",
    ):
        assert key in page.figures, sorted(page.figures)
    for moment in zip(*(trace["y"] for trace in page.figures["learner-time"]["data"]), strict=True):
        assert sum(moment) == pytest.approx(1, abs=1e-4)
    assert "It ended as it should" in page.text
    assert "balance" in page.text
    assert "recall" in page.text
    known = {name for entry in written for name, value in entry.items() if value is not None}
    table = page.text.partition("Last value of every metric")[2]
    assert [name for name in known if name not in table] == []
