"""How far back a policy remembers: its return where the memory reaches back only some steps (``--memory-horizon``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from shoal.deploy.evaluation.evaluate import Side, compare, horizon_label
from shoal.deploy.evaluation.table import Played, mean_interval
from shoal.deploy.monitoring.intervals import Difference

HORIZONS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Steps that are played unless others are asked for."""


def horizon_sides(side: Side, horizons: Sequence[int]) -> list[Side]:
    """The policy of ``side`` with a memory of so many steps, in the same environments with the same seeds.

    Raises:
        ValueError: a horizon is negative, or ``side`` itself does not play with its whole memory.
    """
    if side.memory_horizon is not None:
        raise ValueError("--memory-horizon compares with the whole memory: leave out --zero-memory")
    if wrong := [steps for steps in horizons if steps < 0]:
        raise ValueError(f"--memory-horizon: {wrong[0]} steps must not be negative")
    return [
        dataclasses.replace(side, label=horizon_label(steps), memory_horizon=steps) for steps in sorted(set(horizons))
    ]


def conclusion(own: Played, cut: Sequence[Played]) -> str:
    """What the returns say, in a sentence."""
    found = {played.side.memory_horizon or 0: compare(own.episodes, played.episodes) for played in cut}
    needed = [steps for steps, difference in found.items() if _lacks(difference)]
    enough = [steps for steps in found if not needed or steps > max(needed)]
    if not needed:
        return "memory: without it the return is the same, within noise"
    if needed == [0] and not enough:
        return "memory: without it the return is lower"
    if not enough:
        return f"memory: more than {horizon_label(max(needed))} are remembered: without them the return is lower"
    verb = "is" if min(enough) == 1 else "are"
    return (
        f"memory: {horizon_label(min(enough))} {verb} enough for the whole return, within noise; with fewer it is lower"
    )


def _lacks(difference: Difference) -> bool:
    return difference.is_beyond_noise and difference.mean > 0


def to_record(own: Played, cut: Sequence[Played]) -> dict[str, Any]:
    """Plain data: the returns of the whole memory and of each horizon, with half of their 95% intervals."""
    checkpoint = own.side.checkpoint
    assert checkpoint is not None
    return {
        "policy_version": checkpoint.policy_version,
        "env_id": own.side.setup.env_id,
        "actions": own.side.manner,
        "seed": own.side.setup.seed,
        "episodes": own.episodes.episodes,
        "whole": _numbers(own),
        "horizons": [{"steps": played.side.memory_horizon, **_numbers(played)} for played in cut],
    }


def _numbers(played: Played) -> dict[str, float | None]:
    mean, half_width = mean_interval(played.episodes)
    return {"mean_return": mean, "return_ci95": None if math.isnan(half_width) else half_width}
