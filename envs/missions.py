"""The MettaGrid missions: tasks, maps, and the recorded returns of a random and a scripted player.

Plain data and numpy: ``envs.mettagrid_game`` turns a mission into a game, ``envs.config`` checks slots against it.
It never imports mettagrid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Map = np.ndarray
"""Object names by cell: dtype str, [height, width]."""

AGENT, ALTAR, EMPTY, MINE, WALL = "agent.agent", "altar", "empty", "mine", "wall"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mission:
    """Agents carry ore, one piece at a time, from mines to altars; +1 to the agent that delivers it.

    Moving into a mine with empty hands takes a piece, moving into an altar with a piece delivers it. Mines never run
    out. Nothing ends an episode but its time limit, which is a truncation. Each episode has a new map.
    """

    env_id: str
    description: str
    num_agents: int
    max_steps: int
    """Length of an episode in steps."""
    make_map: Callable[[np.random.Generator], Map]
    """Function that draws an episode's map, with exactly ``num_agents`` cells named ``agent.agent``."""
    collect_reward: float = 0.0
    """Reward for taking a piece of ore; the recorded returns include it."""
    window: int = 11
    """Side of the square that an agent sees, itself in the centre."""
    num_tokens: int = 200
    random_return: tuple[float, float]
    """Return per agent and episode of uniformly random actions, and its standard error."""
    scripted_return: tuple[float, float]
    """The same for ``envs.reference.WindowPlayer``, which sees what an agent sees and remembers only its heading and,
    in the corridor, the altars' end. It plays well but not optimally.

    Reproduce both with ``python -m shoal.envs.reference ENV_ID``.
    """


def open_field(rng: np.random.Generator, *, side: int, agents: int, mines: int, altars: int, walls: int) -> Map:
    """A walled square with everything scattered over it."""
    inner = side - 2
    names = [AGENT] * agents + [MINE] * mines + [ALTAR] * altars + [WALL] * walls
    cells = np.full(inner * inner, EMPTY, dtype="<U16")
    cells[rng.permutation(inner * inner)[: len(names)]] = names
    grid = np.full((side, side), WALL, dtype="<U16")
    grid[1:-1, 1:-1] = cells.reshape(inner, inner)
    return grid


def corridor(rng: np.random.Generator, *, reach: int, agents: int) -> Map:
    """A hall three cells wide: mines in the middle, altars at one end, nothing at the other, which end by chance.

    The ends lie ``reach`` cells from the middle, outside the window of an agent that takes ore.
    """
    grid = np.full((5, 2 * reach + 3), WALL, dtype="<U16")
    grid[1:-1, 1:-1] = EMPTY
    middle = reach + 1
    grid[2, middle] = MINE
    grid[1:4, 1 if rng.integers(2) else -2] = ALTAR
    starts = [(row, col) for row in (1, 2, 3) for col in range(middle - 2, middle + 3) if grid[row, col] == EMPTY]
    for index in rng.permutation(len(starts))[:agents]:
        grid[starts[index]] = AGENT
    return grid


def _mission(make_map: Callable[..., Map], num_agents: int, **layout: int) -> Callable[[np.random.Generator], Map]:
    return lambda rng: make_map(rng, agents=num_agents, **layout)


MISSIONS: dict[str, Mission] = {
    mission.env_id: mission
    for mission in (
        Mission(
            env_id="mettagrid/forage",
            description="Eight agents on a walled 13x13 field with 4 mines and 3 altars; a window shows part of it.",
            num_agents=8,
            max_steps=200,
            make_map=_mission(open_field, 8, side=13, mines=4, altars=3, walls=0),
            random_return=(0.829, 0.028),
            scripted_return=(32.30, 0.87),
        ),
        Mission(
            env_id="mettagrid/forage_sparse",
            description="Eight agents on a walled 21x21 field with 4 mines, 3 altars, 24 blocks; most is unseen.",
            num_agents=8,
            max_steps=300,
            make_map=_mission(open_field, 8, side=21, mines=4, altars=3, walls=24),
            random_return=(0.276, 0.015),
            scripted_return=(23.70, 0.99),
        ),
        Mission(
            env_id="mettagrid/corridor",
            description=(
                "Four agents in a long hall: one mine in the middle, altars at one of the two ends, out of sight of "
                "the mine. The scripted player remembers which end it was; without that it earns 6.2."
            ),
            num_agents=4,
            max_steps=200,
            make_map=_mission(corridor, 4, reach=8),
            random_return=(0.263, 0.010),
            scripted_return=(9.59, 0.03),
        ),
    )
}


def check_slots(env_id: str, num_agents: int, num_envs: int) -> None:
    """Raise ValueError unless ``num_envs`` slots make whole simulations."""
    if num_envs < 1 or num_envs % num_agents:
        nearest = nearest_slots(num_agents, num_envs)
        raise ValueError(
            f"num_envs={num_envs} must be a multiple of the {num_agents} agents of {env_id}; nearest: {nearest}"
        )


def nearest_slots(num_agents: int, num_envs: int) -> str:
    """The numbers of slots nearest to ``num_envs`` that make whole games of ``num_agents``, in words."""
    below, above = num_envs // num_agents * num_agents, -(-num_envs // num_agents) * num_agents
    return f"{below} or {above}" if 0 < below < above else f"{max(above, num_agents)}"
