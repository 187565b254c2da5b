"""Games in which agents take turns, trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shoal
from turn_games import Nim

ID = "pettingzoo:turn_games:Nim"


def test_a_policy_learns_to_win(tmp_path: Path) -> None:
    """Catches turns that cannot be learned from: of five stones the first player takes one, and then always wins."""
    Nim.illegal.clear()
    run = shoal.train(
        ID,
        config={"mode": "inline", "env.num_envs": 32, "env.kwargs": {"stones": 5}, "actor.unroll_length": 16},
        total_env_steps=20_000,
        run_dir=tmp_path / "run",
        progress=False,
    )
    assert not Nim.illegal
    assert run.summary["books_balance"]
    policy = shoal.load_policy(run.run_dir, greedy=True)
    seen = {"observation": np.array([5, 1], np.float32), "action_mask": np.ones(3, np.int8)}
    assert policy.act(seen, is_first=True) == 0
