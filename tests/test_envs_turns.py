"""Games in which agents take turns."""

from __future__ import annotations

import numpy as np
import pytest
from make_env import make_env
from scripted_vectors import Rows

ID = "pettingzoo:turn_games:Nim"


@pytest.mark.parametrize("masks", ["obs", "info", "none"])
def test_one_agent_acts_while_the_others_have_no_choice(masks: str) -> None:
    """Catches actions of waiting agents that reach the game or count as choices, masks of the wrong agent, and rewards
    that come to the agent whose turn it is instead of whom they are for."""
    env = make_env(ID, 4, 0, stones=5, masks=masks)
    rows = Rows(env).rows
    env.reset(rows.obs)
    legal = [1, 1, 1]
    waits = [1, 0, 0]
    assert env.action_mask.tolist() == [legal, waits] * 2
    assert rows.obs.tolist() == [[5, 1], [5, 0]] * 2
    # The first game: 3, then 2 wins. The second: 1, 3, 1. Those who wait say 2, which would always end the game.
    env.step(np.array([2, 2, 0, 2]), rows)
    assert rows.obs.tolist() == [[2, 0], [2, 1], [4, 0], [4, 1]]
    assert env.action_mask.tolist() == [waits, [1, 1, int(masks == "none")], waits, legal]
    assert not rows.terminated.any()
    env.step(np.array([2, 1, 2, 2]), rows)
    assert rows.terminated.tolist() == [True, True, False, False]
    assert rows.reward.tolist() == [-1, 1, 0, 0]
    assert rows.obs[:2, 0].tolist() == [0, 0]
    env.step(np.array([0, 0, 0, 2]), rows)
    assert rows.is_first.tolist() == [True, True, False, False]
    assert rows.terminated.tolist() == [False, False, True, True]
    assert rows.reward.tolist() == [0, 0, 1, -1]
    assert env.action_mask[:2].tolist() == [legal, waits]
    env.close()
