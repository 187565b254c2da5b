"""MettaGrid as a native vector environment: the simulations of all slots write into one shared set of buffers.

Made by ``envs.registry``. It never runs Python per agent, and per simulation only the call of its C++ step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from shoal.envs.boundary import DiscreteActions, EnvironmentFault, EnvSpec, StepRows, TokenSpace
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.missions import AGENT, Map, Mission, check_slots
from shoal.envs.plain_state import DoesNotFit, read_arrays, read_generator, to_plain


def _import_mettagrid(env_id: str) -> None:
    """Import the package without the handler and the level that it gives the root logger."""
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


def make_game_config(mission: Mission) -> Any:
    """The mission as mettagrid's ``GameConfig``; the map is not part of it, each episode draws its own."""
    _import_mettagrid(mission.env_id)
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


def make_spec(mission: Mission, game: Any | None = None) -> EnvSpec:
    """The mission's tokens and actions as an ``EnvSpec``."""
    game = make_game_config(mission) if game is None else game
    action_names = tuple(action.name for action in game.actions.actions())
    features = game.id_map().features()
    # mettagrid numbers features that this game never shows; they get no name. Its own scales hide what matters: 256
    # for an inventory of 1, and 10 for tags, which are category numbers.
    scales = {"agent:group": 1.0, "agent_id": float(mission.num_agents), "inv:ore": 1.0, "last_action": 1.0, "tag": 1.0}
    ids = {feature.name: feature.id for feature in features}
    names, normalizations = [""] * (max(ids.values()) + 1), [1.0] * (max(ids.values()) + 1)
    for name, scale in scales.items():
        names[ids[name]], normalizations[ids[name]] = name, scale
    tag_names = tuple(name.removeprefix("type:") for name in game.id_map().tag_names())
    return EnvSpec(
        env_id=mission.env_id,
        num_agents=mission.num_agents,
        observation=TokenSpace(
            width=game.obs.width,
            height=game.obs.height,
            num_tokens=game.obs.num_tokens,
            feature_names=tuple(names),
            feature_normalizations=tuple(normalizations),
            categorical_features=((ids["last_action"], action_names), (ids["tag"], tag_names)),
            global_coordinate=0xFE,
        ),
        actions=DiscreteActions(names=(action_names,)),
    )


class MettaGridEnvironment:
    """``num_envs / mission.num_agents`` simulations; slot ``s * num_agents + a`` is agent ``a`` of simulation ``s``."""

    def __init__(
        self,
        mission: Mission,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        stagger: bool = True,
    ) -> None:
        """Build the buffers; ``reset`` builds the simulations.

        Args:
            mission: What to play.
            num_envs: Slots, a multiple of ``mission.num_agents``.
            seed: Determines maps and simulations; every simulation has a stream of its own.
            stagger: Spread the simulations over the phases of an episode by truncating the first episode of each at a
                different step. Otherwise all episodes of a worker would start and end on the same steps for ever, and
                every batch would show one phase of them. Slots in such an episode are marked in ``short_episode``.
        """
        check_slots(mission, num_envs)
        game = make_game_config(mission)
        from mettagrid.config import mettagrid_c_config
        from mettagrid.mettagrid_c import MettaGrid

        self.spec = make_spec(mission, game)
        self.num_envs = num_envs
        """Agents per simulation."""
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        """[B]: the slot's current episode was shortened by ``stagger``, so its return is not that of a full episode."""

        self._mission = mission
        self._stagger = stagger
        self._simulation = MettaGrid
        # Simulation objects would translate the configuration anew for every episode, at four times the cost of the
        # rest of a reset. It does not change, so it is translated once.
        self._game, renames = mettagrid_c_config.convert_to_cpp_game_config(game)
        self._agent_names: list[str] = renames[AGENT]
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        self._rngs = [np.random.default_rng(child) for child in sequence.spawn(num_envs // mission.num_agents)]
        self._num_actions = len(game.actions.actions())

        self._obs = np.zeros((num_envs, *self.spec.obs_shape), dtype=np.uint8)
        self._is_first = np.zeros(num_envs, dtype=bool)
        self._reward = np.zeros(num_envs, dtype=np.float32)
        self._terminated = np.zeros(num_envs, dtype=bool)
        self._truncated = np.zeros(num_envs, dtype=bool)
        self._action = np.zeros(num_envs, dtype=np.int32)
        self._vibe_action = np.zeros(num_envs, dtype=np.int32)
        self._advance: list[Callable[[], None]] = []
        self._step = 0
        # The simulation does not say its state. It follows from its map, its seed and these.
        self._played = np.zeros((mission.max_steps, num_envs), dtype=np.int32)
        """The actions of the last steps; those of step s, from 1, are in row s % max_steps."""
        self._beginnings: list[tuple[int, int, Any]] = [(0, 0, None)] * len(self._rngs)
        """Of each simulation's episode: the step in which it began, its limit, the stream that it was drawn from."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape]."""
        limits = self._first_limits()
        self._advance = [functools.partial(self._begin, index, limit) for index, limit in enumerate(limits)]
        for advance in tuple(self._advance):
            advance()
        np.copyto(obs, self._obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` int64 [B] and fill ``rows``."""
        # The simulation silently ignores actions out of range.
        if action.min() < 0 or action.max() >= self._num_actions:
            raise ValueError(
                f"{self.spec.env_id}: actions from {action.min()} to {action.max()}, must be 0..{self._num_actions - 1}"
            )
        self._action[:] = action
        self._is_first.fill(False)
        self._step += 1
        self._played[self._step % len(self._played)] = self._action
        try:
            for advance in self._advance:
                advance()
        except Exception as error:
            raise EnvironmentFault(
                f"{self.spec.env_id}: step {self._step} raised {type(error).__name__}: {error}"
            ) from error
        if not np.isfinite(self._reward).all():
            slot = int(np.flatnonzero(~np.isfinite(self._reward))[0])
            raise EnvironmentFault(f"{self.spec.env_id}: slot {slot}, step {self._step}: reward {self._reward[slot]}")
        np.copyto(rows.obs, self._obs)
        np.copyto(rows.is_first, self._is_first)
        np.copyto(rows.reward, self._reward)
        np.copyto(rows.terminated, self._terminated)
        np.copyto(rows.truncated, self._truncated)
        # All agents of a simulation end together, so its first agent's flags suffice.
        agents = self._mission.num_agents
        ended = self._terminated[::agents] | self._truncated[::agents]
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                self._advance[index] = functools.partial(self._begin, index, self._mission.max_steps)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``: what episodes were drawn from, and their actions."""
        agents, found = self._mission.num_agents, []
        for index, (begun, limit, stream) in enumerate(self._beginnings):
            slots = slice(index * agents, (index + 1) * agents)
            ended = bool(self._terminated[slots.start] | self._truncated[slots.start])
            steps = np.arange(self._step if ended else begun, self._step) + 1
            found.append(
                {
                    "random": to_plain(self._rngs[index] if ended else _generator(stream)),
                    "limit": limit,
                    "ended": ended,
                    "actions": self._played[steps % len(self._played), slots],
                    "obs": self._obs[slots].copy(),
                }
            )
        return {"simulations": found}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: the episodes are played again so far."""
        agents, failed = self._mission.num_agents, dict[int, str]()
        saved = state.get("simulations") if isinstance(state, dict) else None
        # As if all had gone on since their episodes began, none of which is longer than this.
        self._step = len(self._played)
        for index, fresh in enumerate(list(self._rngs)):
            slots = slice(index * agents, (index + 1) * agents)
            try:
                if not isinstance(saved, list) or len(saved) != len(self._rngs):
                    raise DoesNotFit("it is the state of other simulations")
                self._replay(index, slots, saved[index])
            except DoesNotFit as error:
                self._rngs[index] = fresh
                self._begin(index, self._mission.max_steps)
                obs[slots] = self._obs[slots]
                failed |= dict.fromkeys(range(slots.start, slots.stop), str(error))
        return failed

    def _replay(self, index: int, slots: slice, state: Any) -> None:
        """Play a simulation's episode again, up to the step in which its state was taken.

        Raises:
            DoesNotFit: it is no such state, or the episode was another one.
        """
        longest, now = self._mission.max_steps, self._step
        generator = read_generator(state.get("random") if isinstance(state, dict) else None)
        limit, actions = state.get("limit"), state.get("actions")
        seen = read_arrays(state, {"obs": self._obs[slots]})["obs"]
        if type(limit) is not int or not 1 <= limit <= longest or not isinstance(state.get("ended"), bool):
            raise DoesNotFit(f"the limit of an episode is {limit!r}, must be 1 to {longest}")
        shaped = isinstance(actions, np.ndarray) and actions.ndim == 2 and len(actions) <= limit
        read_arrays({"actions": actions}, {"actions": self._played[: len(actions) if shaped else 0, slots]})
        if actions.size and (actions.min() < 0 or actions.max() >= self._num_actions):
            raise DoesNotFit("an action is out of range")
        self._rngs[index] = generator
        if state["ended"]:
            self._terminated[slots] = True
            self.short_episode[slots] = limit < longest
            self._beginnings[index] = (now, limit, None)
            self._advance[index] = functools.partial(self._begin, index, longest)
            return
        self._step = now - len(actions)
        self._begin(index, limit)
        for action in actions:
            self._step += 1
            self._played[self._step % longest, slots] = self._action[slots] = action
            self._is_first[slots] = False
            try:
                self._advance[index]()
            except Exception as error:
                self._step = now
                raise DoesNotFit(f"playing it again raised {type(error).__name__}: {error}") from error
        if self._terminated[slots.start] or self._truncated[slots.start] or not np.array_equal(self._obs[slots], seen):
            raise DoesNotFit("its episode, played again, came to other observations: was another version of it saved?")

    def close(self) -> None:
        """Release the simulations."""
        self._advance.clear()

    def _begin(self, index: int, limit: int) -> None:
        """Put a new simulation in place of the one that ended, and write its first observations."""
        rng = self._rngs[index]
        self._beginnings[index] = (self._step, limit, rng.bit_generator.state)
        grid = self._mission.make_map(rng)
        simulation = self._make_simulation(grid, limit, int(rng.integers(2**31)))
        agents = self._mission.num_agents
        slots = slice(index * agents, (index + 1) * agents)
        self._reward[slots] = 0.0
        self._terminated[slots] = False
        self._truncated[slots] = False
        self._is_first[slots] = True
        self.short_episode[slots] = limit < self._mission.max_steps
        simulation.set_buffers(
            self._obs[slots],
            self._terminated[slots],
            self._truncated[slots],
            self._reward[slots],
            self._action[slots],
            self._vibe_action[slots],
        )
        self._advance[index] = simulation.step

    def _make_simulation(self, grid: Map, limit: int, seed: int) -> Any:
        """Create an episode's simulation; ``limit`` is its length in steps."""
        names = grid.astype(object)
        # Every agent has a configuration of its own under a name of its own.
        names[names == AGENT] = self._agent_names
        self._game.max_steps = limit
        return self._simulation(self._game, names.tolist(), seed)

    def _first_limits(self) -> list[int]:
        """Steps of each simulation's first episode: evenly spread, from a phase that differs between workers."""
        count, longest = len(self._rngs), self._mission.max_steps
        if not self._stagger:
            return [longest] * count
        phase = 1.0 - self._rngs[0].random()
        return [max(1, round(longest * (index + phase) / count)) for index in range(count)]


def _generator(state: Any) -> np.random.Generator:
    generator = np.random.default_rng(0)
    generator.bit_generator.state = state
    return generator
