"""The benchmark of the encoders of images still runs, and measures the networks of the documentation's table."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import get_args

import pytest
import torch
from shoal.policy.observation import ImageEncoder

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "encoders.py"))
PAGE = Path(__file__).parents[2] / "deploy" / "docs" / "networks.md"


def test_the_bench_runs_to_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a benchmark that no longer fits the code it measures, and a table of other networks."""
    threads = torch.get_num_threads()
    try:
        BENCH["main"](["--rounds=1", "--json"])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["encoders"]
    assert set(found) == set(get_args(ImageEncoder))
    assert found["small"]["acting"] == [1.0, 1.0, 1.0]
    for encoder, row in found.items():
        assert all(math.isfinite(number) and number > 0 for number in row["acting"] + row["forward and backward"])
        assert f"| `{encoder}` | {row['parameters']:,} | {row['in convolutions']:,} |" in PAGE.read_text()
