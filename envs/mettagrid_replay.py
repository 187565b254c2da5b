"""MettaGrid with each episode written as a replay for MettaScope, its viewer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shoal.envs.mettagrid import MettaGridEnvironment, make_game_config
from shoal.envs.missions import AGENT, ALTAR, EMPTY, MINE, WALL, Map, Mission

_LETTERS = {WALL: "#", EMPTY: ".", AGENT: "@", MINE: "m", ALTAR: "a"}
"""The first three are MettaGrid's own and cannot be changed."""


class ReplayedMettaGrid(MettaGridEnvironment):
    """``MettaGridEnvironment`` with one simulation: it has the same maps, steps and rewards for the same seed."""

    def __init__(
        self, mission: Mission, seed: int | np.random.SeedSequence, name_file: Callable[[int], Path], **kwargs: Any
    ) -> None:
        """Build the buffers, as in the base class.

        Args:
            mission: The mission to play.
            seed: As in the base class; this is the first simulation of that seed.
            name_file: The file of the k-th episode, from 0; replays end in ``.json.z``.
            **kwargs: For the base class.
        """
        super().__init__(mission, mission.num_agents, seed, **kwargs)
        self.files: list[Path] = []
        """Replay files of the episodes that have ended."""
        self._name_file = name_file
        self._config = make_game_config(mission)

    def _make_simulation(self, grid: Map, limit: int, seed: int) -> Any:
        from mettagrid.config.mettagrid_config import MettaGridConfig
        from mettagrid.map_builder.ascii import AsciiMapBuilder
        from mettagrid.simulator import Simulation
        from mettagrid.simulator.replay_log_writer import InMemoryReplayWriter

        # It warns of every name that no feature uses.
        logging.getLogger("ReplayLogWriter").setLevel(logging.ERROR)
        names = {name: letter for name, letter in _LETTERS.items() if (grid == name).any()}
        map_builder = AsciiMapBuilder.Config(
            map_data=[[_LETTERS[name] for name in row] for row in grid.tolist()],
            char_to_map_name={letter: name for name, letter in names.items()},
        )
        game = self._config.model_copy(update={"map_builder": map_builder, "max_steps": limit})
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

    def step(self) -> None:
        self._simulation.step()
        for replay in self._writer.get_completed_replays():
            self._env._keep(replay)
