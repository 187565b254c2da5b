"""MettaGrid with each episode written as a replay for MettaScope, its viewer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shoal.envs.mettagrid import MettaGridEnvironment
from shoal.envs.mettagrid_game import Game
from shoal.envs.missions import AGENT, EMPTY, WALL, Map

_LETTERS = {WALL: "#", EMPTY: ".", AGENT: "@"}
"""MettaGrid's own, which cannot be changed."""
_FIRST_LETTER = 0x100
"""Other names get letters from here on."""


class ReplayedMettaGrid(MettaGridEnvironment):
    """``MettaGridEnvironment`` with one simulation: it has the same maps, steps and rewards for the same seed."""

    def __init__(
        self, game: Game, seed: int | np.random.SeedSequence, name_file: Callable[[int], Path], **kwargs: Any
    ) -> None:
        """Build the buffers, as in the base class.

        Args:
            game: The game to play.
            seed: As in the base class; this is the first simulation of that seed.
            name_file: The file of the k-th episode, from 0; replays end in ``.json.z``.
            **kwargs: For the base class.
        """
        super().__init__(game, game.num_agents, seed, **kwargs)
        self.files: list[Path] = []
        """Replay files of the episodes that have ended."""
        self._name_file = name_file

    def _make_simulation(self, grid: Map, limit: int, seed: int) -> Any:
        from mettagrid.config.mettagrid_config import MettaGridConfig
        from mettagrid.map_builder.ascii import AsciiMapBuilder
        from mettagrid.simulator import Simulation
        from mettagrid.simulator.replay_log_writer import InMemoryReplayWriter

        # It warns of every name that no feature uses.
        logging.getLogger("ReplayLogWriter").setLevel(logging.ERROR)
        found = np.unique(grid).tolist()
        letters = {name: _LETTERS.get(name, chr(_FIRST_LETTER + index)) for index, name in enumerate(found)}
        map_builder = AsciiMapBuilder.Config(
            map_data=[[letters[name] for name in row] for row in grid.tolist()],
            char_to_map_name={letter: name for name, letter in letters.items()},
        )
        game = self._game.config.model_copy(update={"map_builder": map_builder, "max_steps": limit})
        writer = InMemoryReplayWriter()
        label = f"{self.spec.env_id}, episode {len(self.files)}"
        return _Replayed(
            Simulation(MettaGridConfig(label=label, game=game), seed=seed, event_handlers=[writer]), writer, self
        )

    def _keep(self, replay: Any) -> None:
        file = self._name_file(len(self.files)).absolute()
        replay.write_replay(str(file))
        self.files.append(file)


class _Replayed:
    """A simulation as ``MettaGridEnvironment`` steps it."""

    def __init__(self, simulation: Any, writer: Any, env: ReplayedMettaGrid) -> None:
        self._simulation, self._writer, self._env = simulation, writer, env

    def set_buffers(self, *buffers: np.ndarray) -> None:
        self._simulation._c_sim.set_buffers(*buffers)

    def get_game_stat(self, name: str) -> float | None:
        value: float | None = self._simulation._c_sim.get_game_stat(name)
        return value

    def get_episode_stats(self) -> Any:
        return self._simulation.episode_stats

    def step(self) -> None:
        self._simulation.step()
        for replay in self._writer.get_completed_replays():
            self._env._keep(replay)
