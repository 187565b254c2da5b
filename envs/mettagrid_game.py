"""What a MettaGrid environment plays: a game's configuration, and how the map of each episode is drawn.

``mission_game`` makes it of one of ``envs.missions``, ``own_game`` of a configuration of the user's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from shoal.envs.arguments import naming_bad_arguments, refuse_settings
from shoal.envs.boundary import DiscreteActions, EnvSpec, TokenSpace
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.entry_points import find_maker
from shoal.envs.missions import Map, Mission
from shoal.envs.surroundings import Surroundings
from shoal.envs.writers import short

PREFIX = "mettagrid:"
"""What ids of the user's own games begin with."""
_FORM = "mettagrid:package.module:function, where function(**env.kwargs) returns a mettagrid MettaGridConfig"
_GLOBAL = 0xFE
"""Coordinate byte of MettaGrid's tokens that belong to no cell."""
_WIDEST = 15
"""Rows and columns of a window have four bits each, and 0xFF is padding."""
_MOST_CATEGORIES = 64
"""A feature with more values than these is read as a magnitude: each category has a plane of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Game:
    """A configuration that does not change, and a map for every episode."""

    env_id: str
    config: Any
    """MettaGrid's ``GameConfig``; its own map builder is not used."""
    observation: TokenSpace
    draw_map: Callable[[np.random.Generator], Map]
    """Function that draws an episode's map, with a cell for each agent."""
    staggers: bool = True
    """Whether first episodes may be shortened, so that not all end together."""
    surroundings: Surroundings | None = None
    """Those that ``draw_map`` is called in, where it is other people's code."""

    @property
    def num_agents(self) -> int:
        """Agents of one simulation."""
        return int(self.config.num_agents)

    @property
    def max_steps(self) -> int:
        """Length of an episode in steps; 0 if nothing limits it."""
        return int(self.config.max_steps)

    @property
    def spec(self) -> EnvSpec:
        """Observations, actions and agents."""
        return EnvSpec(
            env_id=self.env_id,
            num_agents=self.num_agents,
            observation=self.observation,
            actions=DiscreteActions(names=(tuple(action.name for action in self.config.actions.actions()),)),
        )


def import_mettagrid(env_id: str) -> None:
    """Import the package without the handler and the level that it gives the root logger.

    Raises:
        EnvironmentNotFound: it is not installed.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        import mettagrid.config.mettagrid_config  # noqa: F401
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(
            f"{env_id} needs the package {error.name!r}, which is not installed: pip install 'shoal[mettagrid]'"
        ) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def mission_game(mission: Mission) -> Game:
    """A mission as a game.

    Raises:
        EnvironmentNotFound: MettaGrid is not installed.
    """
    config = make_game_config(mission)
    features = config.id_map().features()
    # MettaGrid numbers features that this game never shows; they get no name. Its own scales hide what matters: 256
    # for an inventory of 1, and 10 for tags, which are category numbers.
    scales = {"agent:group": 1.0, "agent_id": float(mission.num_agents), "inv:ore": 1.0, "last_action": 1.0, "tag": 1.0}
    observation = _tokens(config, {feature.id: (feature.name, scales.get(feature.name)) for feature in features})
    return Game(env_id=mission.env_id, config=config, observation=observation, draw_map=mission.make_map)


def own_game(env_id: str, kwargs: Mapping[str, Any]) -> Game:
    """The game of ``mettagrid:package.module:function``.

    Raises:
        EnvironmentNotFound: there is no such function, or MettaGrid is not installed.
        ValueError: it makes no configuration, or one of a game that cannot be played here.
    """
    import_mettagrid(env_id)
    expected = "a function that lies in a module that imports mettagrid"
    make = find_maker(env_id, env_id.removeprefix(PREFIX), _FORM, expected)
    refuse_settings(env_id, kwargs, make)
    surroundings = Surroundings(env_id)
    with surroundings, naming_bad_arguments(env_id, kwargs):
        made = make(**kwargs)
    config = _check(env_id, getattr(made, "game", made))
    features = config.id_map().features()
    observation = _tokens(config, {feature.id: (feature.name, _scale(config, feature)) for feature in features})
    return Game(
        env_id=env_id,
        config=config,
        observation=observation,
        draw_map=lambda rng: draw_map(config, rng),
        staggers=getattr(made, "desync_episodes", True),
        surroundings=surroundings,
    )


def make_game_config(mission: Mission) -> Any:
    """The mission as MettaGrid's ``GameConfig``; the map is not part of it, each episode draws its own."""
    import_mettagrid(mission.env_id)
    from mettagrid.config import action_config, obs_config
    from mettagrid.config import mettagrid_config as mg
    from mettagrid.config.game_value import StatValue
    from mettagrid.config.handler_config import Handler, actorHas, isNot, updateActor
    from mettagrid.config.mutation.stats_mutation import logActorAgentStat
    from mettagrid.config.reward_config import reward

    # Rewards are paid from statistics, not from inventories: a pile of delivered goods would be a token on every agent
    # that grows without bound and says nothing about what to do.
    take: list[Any] = [updateActor({"ore": 1}), logActorAgentStat("collected")]
    deliver: list[Any] = [updateActor({"ore": -1}), logActorAgentStat("delivered")]
    rewards = {"delivered": reward(StatValue(name="delivered"))}
    if mission.collect_reward:
        rewards["collected"] = reward(StatValue(name="collected"), weight=mission.collect_reward)
    return mg.GameConfig(
        num_agents=mission.num_agents,
        max_steps=mission.max_steps,
        episode_truncates=True,
        resource_names=["ore"],
        protocol_details_obs=False,
        obs=obs_config.ObsConfig(
            width=mission.window,
            height=mission.window,
            num_tokens=mission.num_tokens,
            # The completion percentage counts to a time limit that is none of the agents' business; the last reward
            # is a byte that truncates to 0 at these rewards. The last action reads 0 where it failed.
            global_obs=obs_config.GlobalObsConfig(episode_completion_pct=False, last_action=True, last_reward=False),
        ),
        actions=action_config.ActionsConfig(
            noop=action_config.NoopActionConfig(),
            move=action_config.MoveActionConfig(),
            change_vibe=action_config.ChangeVibeActionConfig(enabled=False),
        ),
        objects={
            "wall": mg.WallConfig(),
            "mine": mg.GridObjectConfig(
                name="mine", on_use_handler=Handler(filters=[isNot(actorHas({"ore": 1}))], mutations=take)
            ),
            "altar": mg.GridObjectConfig(
                name="altar", on_use_handler=Handler(filters=[actorHas({"ore": 1})], mutations=deliver)
            ),
        },
        agent=mg.AgentConfig(
            inventory=mg.InventoryConfig(limits={"ore": mg.ResourceLimitsConfig(base=1, max=1, resources=["ore"])}),
            rewards=rewards,
        ),
    )


def draw_map(config: Any, rng: np.random.Generator) -> Map:
    """An episode's map by the game's own map builder.

    A seed that the builder has counts as in MettaGrid's ``Simulator``: each episode has another one.
    """
    from mettagrid.map_builder.map_builder import HasSeed

    builder_config = config.map_builder
    has_seed = isinstance(builder_config, HasSeed)
    if has_seed:
        builder_config = builder_config.model_copy(update={"seed": int(rng.integers(2**31))})
    builder = builder_config.create()
    if not has_seed:
        # Where the map has more places than there are agents, it would take those of an unseeded generator.
        builder.shuffle_spawn_indices = rng.shuffle
    return np.asarray(builder.build_for_num_agents(config.num_agents).grid)


def _check(env_id: str, config: Any) -> Any:
    """``config``, if it is that of a game that can be played here."""
    from mettagrid.config.mettagrid_config import GameConfig

    if not isinstance(config, GameConfig):
        raise ValueError(f"{env_id}: the function returned {short(config)}; write {_FORM}")
    obs, features = config.obs, config.id_map().features()
    found = (
        (obs.token_dim != 3, f"game.obs.token_dim is {obs.token_dim}, must be 3"),
        (
            max(obs.width, obs.height) > _WIDEST,
            f"game.obs is {obs.width} cells wide and {obs.height} high, must be {_WIDEST} at most",
        ),
        (len(features) > 256, f"the game has {len(features)} features; a token's feature is a byte: 256 at most"),
        (config.talk.enabled, "game.talk.enabled: what agents say to each other is no part of their observations"),
        (not config.actions.actions(), "game.actions: the agents have no action"),
        (
            config.actions.change_vibe.enabled and not config.actions.noop.enabled,
            "game.actions.noop is off, but an agent that changes its vibe does nothing else: leave it on, or turn "
            "change_vibe off",
        ),
    )
    if problems := [problem for wrong, problem in found if wrong]:
        raise ValueError(f"{env_id}: {'; '.join(problems)}")
    return config


def _tokens(config: Any, features: Mapping[int, tuple[str, float | None]]) -> TokenSpace:
    """The tokens, from (name, scale) by feature id; what has no scale is never shown."""
    ids = {name: feature for feature, (name, scale) in features.items() if scale is not None}
    names, scales = [""] * (max(features) + 1), [1.0] * (max(features) + 1)
    for name, feature in ids.items():
        names[feature], scales[feature] = name, features[feature][1] or 1.0
    actions = tuple(action.name for action in config.actions.actions())
    values = {
        "last_action": actions,
        "tag": tuple(name.removeprefix("type:") for name in config.id_map().tag_names()),
        "vibe": tuple(config.vibe_names),
    }
    categories = {ids[name]: found for name, found in values.items() if name in ids}
    return TokenSpace(
        width=config.obs.width,
        height=config.obs.height,
        num_tokens=config.obs.num_tokens,
        feature_names=tuple(names),
        feature_normalizations=tuple(scales),
        categorical_features=tuple(
            (feature, found) for feature, found in sorted(categories.items()) if 0 < len(found) <= _MOST_CATEGORIES
        ),
        global_coordinate=_GLOBAL,
    )


def _scale(config: Any, feature: Any) -> float | None:
    """The value of a feature that becomes 1; None for one that the game never shows.

    MettaGrid's own are the ranges of a byte, or 10 for what may have a hundred values: what a game has few of would
    hardly be seen.
    """
    shown, name = config.obs.global_obs, feature.name
    off = {
        "episode_completion_pct": not shown.episode_completion_pct,
        "last_action": not shown.last_action,
        "last_reward": not shown.last_reward,
        "goal": not shown.goal_obs,
    }
    if off.get(name) or (name.startswith("lp:") and not shown.local_position):
        return None
    if name.startswith("inv:"):
        most = _most_held(config, name.removeprefix("inv:"))
        return float(feature.normalization if most is None else min(max(most, 1), feature.normalization))
    largest = {
        "agent:group": max(agent.team_id for agent in _agents(config)),
        "agent_id": config.num_agents,
        "last_action": len(config.actions.actions()) - 1,
        "tag": len(config.id_map().tag_names()) - 1,
        "vibe": len(config.vibe_names) - 1,
    }
    return float(max(largest[name], 1)) if name in largest else float(feature.normalization)


def _agents(config: Any) -> Iterable[Any]:
    return config.agents or [config.agent]


def _most_held(config: Any, resource: str) -> int | None:
    """How much of a resource an agent or an object can hold; None for what is no resource, such as a higher digit."""
    if resource not in config.resource_names:
        return None
    plain = type(config.agent.inventory)()
    inventories = [agent.inventory for agent in _agents(config)]
    # Every object has an inventory; one that nobody has written anything about is none of the game's.
    inventories += [each.inventory for each in config.objects.values() if each.inventory != plain]
    return max(_limit(inventory, resource) for inventory in inventories)


def _limit(inventory: Any, resource: str) -> int:
    for limit in inventory.limits.values():
        if resource in limit.resources:
            return int(limit.max if limit.modifiers else min(limit.base, limit.max))
    return int(inventory.default_limit)
