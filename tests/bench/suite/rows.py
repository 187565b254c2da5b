"""The environments of the suite: the mean return that counts as learned, and the environment steps allowed for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

SEVERAL, MANY = 3, 5
"""Seeds of a row: many where a run takes less than five minutes on two cores."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One environment."""

    name: str
    env_id: str
    threshold: float
    """Of the mean return of at least ``curve.EPISODES`` episodes, in the environment's own units."""
    env_steps: int
    """The budget: what is reached later does not count."""
    seeds: int
    env_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of ``env`` besides its defaults."""
    recipe: str = ""
    """A configuration by name, where the default settings are not meant for the environment."""
    needs: tuple[str, ...] = ()
    """Modules that make the environment."""
    extra: str = "suite"
    """The extra of shoal that installs them."""
    aim: bool = False
    """An aim, because exploration decides: it is reported like the others and not asked for."""


FLAT_VIEW = {"wrappers": ["minigrid.wrappers:ImgObsWrapper", "gymnasium.wrappers:FlattenObservation"]}
"""MiniGrid's view of 7 x 7 cells as 147 numbers: its bytes are codes of objects, colours and states, not brightness.
What is left out is constant (the mission, a text), or in the view (the direction: the view turns with the agent).
"""

ROWS = {
    row.name: row
    for row in (
        Row(name="cartpole", env_id="CartPole-v1", threshold=475, env_steps=100_000, seeds=MANY),
        Row(
            # Returns are at most 1: a reward of 1 / 200 for each of 200 steps.
            name="cartpole-positions",
            env_id="popgym:popgym-PositionOnlyCartPoleEasy-v0",
            threshold=0.9,
            env_steps=200_000,
            seeds=MANY,
            needs=("popgym",),
        ),
        Row(name="acrobot", env_id="Acrobot-v1", threshold=-100, env_steps=300_000, seeds=MANY),
        Row(name="pendulum", env_id="Pendulum-v1", threshold=-250, env_steps=500_000, seeds=MANY),
        Row(
            name="lunarlander",
            env_id="LunarLander-v3",
            threshold=200,
            env_steps=1_500_000,
            seeds=SEVERAL,
            needs=("Box2D",),
        ),
        Row(
            name="mountaincar",
            env_id="MountainCarContinuous-v0",
            threshold=90,
            env_steps=500_000,
            seeds=MANY,
            aim=True,
        ),
        Row(
            name="bipedalwalker",
            env_id="BipedalWalker-v3",
            threshold=250,
            env_steps=5_000_000,
            seeds=SEVERAL,
            needs=("Box2D",),
            aim=True,
        ),
        Row(
            name="invertedpendulum",
            env_id="InvertedPendulum-v5",
            threshold=950,
            env_steps=300_000,
            seeds=MANY,
            needs=("mujoco",),
        ),
        Row(
            name="hopper",
            env_id="Hopper-v5",
            threshold=2_000,
            env_steps=1_500_000,
            seeds=SEVERAL,
            needs=("mujoco",),
        ),
        Row(
            name="halfcheetah",
            env_id="HalfCheetah-v5",
            threshold=2_000,
            env_steps=1_500_000,
            seeds=SEVERAL,
            needs=("mujoco",),
        ),
        Row(
            name="minigrid-empty",
            env_id="minigrid:MiniGrid-Empty-5x5-v0",
            env_options=FLAT_VIEW,
            threshold=0.9,
            env_steps=100_000,
            seeds=MANY,
            needs=("minigrid",),
        ),
        Row(
            name="minigrid-doorkey",
            env_id="minigrid:MiniGrid-DoorKey-5x5-v0",
            env_options=FLAT_VIEW,
            threshold=0.9,
            env_steps=500_000,
            seeds=SEVERAL,
            needs=("minigrid",),
        ),
        Row(
            name="minigrid-memory",
            env_id="minigrid:MiniGrid-MemoryS7-v0",
            env_options=FLAT_VIEW,
            threshold=0.9,
            env_steps=2_000_000,
            seeds=SEVERAL,
            needs=("minigrid",),
        ),
        Row(
            # Returns lie between -1 and 1; without memory the best is -0.5.
            name="repeat-previous",
            env_id="popgym:popgym-RepeatPreviousEasy-v0",
            threshold=0.9,
            env_steps=600_000,
            seeds=MANY,
            needs=("popgym",),
        ),
        Row(name="recall", env_id="recall", threshold=0.9, env_steps=400_000, seeds=MANY),
        Row(
            name="pong",
            env_id="ale_py:ALE/Pong-v5",
            env_options={"vectorization": "native"},
            threshold=18,
            env_steps=10_000_000,
            seeds=1,
            needs=("ale_py",),
        ),
        Row(
            name="forage",
            env_id="mettagrid/forage",
            threshold=18,
            env_steps=2_500_000,
            seeds=MANY,
            recipe="forage",
            needs=("mettagrid",),
            extra="mettagrid",
        ),
    )
}


def missing(row: Row) -> str:
    """What to install before ``row`` can be played here; empty where nothing is missing."""
    absent = [module for module in row.needs if importlib.util.find_spec(module) is None]
    return f"there is no module {' or '.join(absent)}: pip install 'shoal[{row.extra}]'" if absent else ""
