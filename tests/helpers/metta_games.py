"""Configurations of MettaGrid games as a user writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mettagrid.config import mettagrid_config as mg
from mettagrid.config.handler_config import Handler, actorHas, isNot, updateActor
from mettagrid.config.mutation.stats_mutation import logActorAgentStat, logStat
from mettagrid.config.reward_config import reward
from mettagrid.config.vibes import VIBES
from mettagrid.map_builder.ascii import AsciiMapBuilder
from mettagrid.map_builder.map_builder import GameMap, MapBuilder, MapBuilderConfig
from mettagrid.map_builder.random_map import RandomMapBuilder
from mettagrid.mapgen.mapgen import MapGen
from mettagrid.mapgen.scenes.random import Random

LETTERS = {"#": "wall", ".": "empty", "@": "agent.agent", "w": "well"}
ROWS = (
    "#########",
    "#@.@.@.@#",
    "#...w...#",
    "#@.@.@.@#",
    "#########",
)


def well(num_agents: int = 2, max_steps: int = 20, rows: tuple[str, ...] = ROWS, **game: Any) -> mg.MettaGridConfig:
    """Agents drink at a well, each sip a reward; the map has more places to start at than agents."""
    drink: list[Any] = [updateActor({"water": 1}), logActorAgentStat("sips"), logStat("sips")]
    settings = {
        "num_agents": num_agents,
        "max_steps": max_steps,
        "resource_names": ["water"],
        "obs": mg.ObsConfig(width=7, height=5, num_tokens=60),
        "actions": mg.ActionsConfig(change_vibe=mg.ChangeVibeActionConfig(vibes=VIBES[:4])),
        "objects": {
            "wall": mg.WallConfig(),
            "well": mg.GridObjectConfig(
                name="well", on_use_handler=Handler(filters=[isNot(actorHas({"water": 5}))], mutations=drink)
            ),
        },
        "agent": mg.AgentConfig(
            inventory=mg.InventoryConfig(limits={"water": mg.ResourceLimitsConfig(base=5, max=5, resources=["water"])}),
            rewards={"sips": reward(mg.StatValue(name="sips"))},
        ),
        "map_builder": AsciiMapBuilder.Config(map_data=[list(row) for row in rows], char_to_map_name=LETTERS),
    }
    return mg.MettaGridConfig(game=mg.GameConfig(**{**settings, **game}))


def seeded(seed: int | None = 7) -> mg.MettaGridConfig:
    """A map builder with a seed of its own."""
    found = well()
    found.game.map_builder = RandomMapBuilder.Config(agents=2, width=11, height=11, objects={"well": 3}, seed=seed)
    return found


def generated() -> mg.MettaGridConfig:
    """A map of nested scenes, which have a generator each."""
    found = well()
    scene = Random.Config(objects={"well": 2}, agents=2)
    found.game.map_builder = MapGen.Config(width=10, height=10, instance=scene)
    return found


def endless(sips: float | None = None) -> mg.MettaGridConfig:
    """Episodes without a limit; with ``sips`` they end once so many have been drunk."""
    return well(max_steps=0, end_episode_on_game_stats={} if sips is None else {"sips": sips})


def idle() -> mg.MettaGridConfig:
    """A reward for each time that an agent does nothing."""
    found = well()
    found.game.agent.rewards = {"idle": reward(mg.StatValue(name="action.noop.success"))}
    return found


class LoudConfig(MapBuilderConfig["Loud"]):
    """That of a map builder of one's own."""


class Loud(MapBuilder[LoudConfig]):
    """Prints, and changes how numpy treats errors."""

    def build(self) -> GameMap:
        """A map with two agents."""
        print("a map is drawn")
        np.seterr(all="raise")
        return GameMap(np.array([["agent.agent", "well", "agent.agent"]]))


def loud() -> mg.MettaGridConfig:
    """A function and a map builder that do what code of others does."""
    print("the game is made")
    return well(map_builder=LoudConfig())


def crowded() -> mg.MettaGridConfig:
    """More agents than places."""
    return well(num_agents=9)


def unknown_object() -> mg.MettaGridConfig:
    """A map with an object that the game does not have."""
    rows = [list("#####"), list("#@.@#"), list("#.c.#"), list("#####")]
    builder = AsciiMapBuilder.Config(map_data=rows, char_to_map_name={**LETTERS, "c": "chest"})
    return well(map_builder=builder)


def wide() -> mg.MettaGridConfig:
    """A window that a token's coordinate has no room for."""
    return well(obs=mg.ObsConfig(width=17, height=17))


def talking() -> mg.MettaGridConfig:
    """Agents that talk."""
    return well(talk=mg.TalkConfig(enabled=True))


def quiet_hands() -> mg.MettaGridConfig:
    """Vibes without the action that does nothing."""
    return well(actions=mg.ActionsConfig(noop=mg.NoopActionConfig(enabled=False)))


def nothing() -> mg.MettaGridConfig | None:
    """No configuration."""
    return None


def breaks() -> mg.MettaGridConfig:
    """Raises."""
    raise RuntimeError("the map is in another castle")


def well_together() -> mg.MettaGridConfig:
    """First episodes of full length."""
    return well().model_copy(update={"desync_episodes": False})
