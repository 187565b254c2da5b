"""The plasticity benchmark still runs, and pays for what it says."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
from shoal.envs.boundary import StepRows

BENCH = runpy.run_path(str(Path(__file__).parent / "bench" / "plasticity.py"))


def test_the_bench_runs_to_its_json_line(capsys):
    """A benchmark that no longer fits the code it measures; a variant without a number."""
    BENCH["main"](["--phases=2", "--updates=1", "--seeds=1", "--last=1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["variants"]
    assert found.keys() == BENCH["VARIANTS"].keys()
    assert all(math.isfinite(number) for row in found.values() for spread in row.values() for number in spread)
    assert found["plain"]["distance"] > found["l2_init"]["distance"]


def test_a_phase_asks_for_one_action_per_pattern_and_the_next_for_others():
    """A reward for another pattern's action, or a task that never changes."""
    envs = BENCH["ShiftingPatterns"](200, 0)
    rows = StepRows(np.zeros((200, 16), np.float32), *(np.zeros(200, kind) for kind in (bool, np.float32, bool, bool)))
    envs.reset(rows.obs)
    asked = []
    for _ in range(2):
        answers = {}
        for action in range(4):
            for _ in range(3):
                shown = rows.obs.copy()
                envs.step(np.full(200, action), rows)
                for pattern, reward in zip(shown, rows.reward, strict=True):
                    answers.setdefault((pattern.tobytes(), action), set()).add(float(reward))
        assert len(answers) == 16 * 4
        assert all(len(rewards) == 1 for rewards in answers.values())
        paid = {key for key, rewards in answers.items() if rewards == {1.0}}
        assert len(paid) == 16
        asked.append(paid)
        envs.shift()
    assert asked[0] != asked[1]
