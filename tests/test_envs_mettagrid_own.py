"""MettaGrid games of the user's: ``env.id=mettagrid:module:function``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shoal.deploy.settings.load import load_config
from shoal.deploy.training import run as training_run
from shoal.envs.boundary import DiscreteActions, StepRows, TokenSpace
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.mettagrid import MettaGridEnvironment
from shoal.envs.registry import make_env_spec, make_vector_env

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mettagrid") is None, reason="needs shoal[mettagrid]")

WELL = "mettagrid:metta_games:well"
ROOM = "mettagrid:mettagrid.config.mettagrid_config:MettaGridConfig.EmptyRoom"


def make(env_id: str, num_envs: int = 2, seed: int = 0, *, whole: bool = True, **kwargs: Any) -> MettaGridEnvironment:
    env = make_vector_env(env_id, num_envs, seed, None, whole, **kwargs)
    assert isinstance(env, MettaGridEnvironment)
    return env


def make_rows(env: MettaGridEnvironment) -> StepRows:
    slots = env.num_envs
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.zeros((slots, *env.spec.obs_shape), dtype=np.uint8)
    return StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2])


def played(env: MettaGridEnvironment, steps: int, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """The rows of random play."""
    rows, rng, found = make_rows(env), np.random.default_rng(seed), []
    assert isinstance(env.spec.actions, DiscreteActions)
    env.reset(rows.obs)
    found.append(tuple(array.copy() for array in rows[:5]))
    for _ in range(steps):
        env.step(rng.integers(len(env.spec.actions.names[0]), size=env.num_envs), rows)
        found.append(tuple(array.copy() for array in rows[:5]))
    return found


def same(one: list[tuple[np.ndarray, ...]], other: list[tuple[np.ndarray, ...]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(a, b) for rows, others in pairs for a, b in zip(rows, others, strict=True))


@pytest.mark.parametrize("name", ["well", "seeded", "generated"])
def test_it_is_mettagrids_own_simulation(name: str) -> None:
    """Catches another game than the configuration says, an action under another's name, and vibes that never change:
    MettaGrid takes them beside the action, and passes over those that come as one."""
    import metta_games
    from mettagrid.map_builder.ascii import AsciiMapBuilder
    from mettagrid.simulator import Simulation
    from shoal.envs.mettagrid_game import draw_map

    env = make(f"mettagrid:metta_games:{name}", 4, 5)
    rows = make_rows(env)
    env.reset(rows.obs)
    config = getattr(metta_games, name)()
    rng = np.random.default_rng(np.random.SeedSequence(5).spawn(2)[1])
    grid = draw_map(config.game, rng)
    letters = {found: chr(0x100 + index) for index, found in enumerate(np.unique(grid).tolist())}
    letters |= {found: letter for letter, found in metta_games.LETTERS.items()}
    config.game.map_builder = AsciiMapBuilder.Config(
        map_data=[[letters[found] for found in row] for row in grid.tolist()],
        char_to_map_name={letter: found for found, letter in letters.items()},
    )
    simulation = Simulation(config, seed=int(rng.integers(2**31)))
    names = env.spec.actions.names[0]  # type: ignore[union-attr]
    player, rewards = np.random.default_rng(1), 0.0
    for step in range(20):
        np.testing.assert_array_equal(rows.obs[2:], simulation._c_sim.observations(), err_msg=str(step))
        action = player.integers(len(names), size=4)
        env.step(action, rows)
        for agent, chosen in enumerate(action[2:]):
            is_vibe = names[chosen].startswith("change_vibe_")
            simulation._c_sim.actions()[agent] = simulation.action_ids["noop" if is_vibe else names[chosen]]
            simulation._c_sim.vibe_actions()[agent] = simulation.action_ids[names[chosen]] if is_vibe else 0
        simulation.step()
        np.testing.assert_array_equal(rows.reward[2:], simulation._c_sim.rewards())
        rewards += rows.reward.sum()
    # The configuration says that a time limit terminates.
    assert rows.terminated.all()
    assert not rows.truncated.any()
    env.step(action, rows)
    assert rows.is_first.all()
    env.close()
    space = env.spec.observation
    assert isinstance(space, TokenSpace)
    vibe = space.feature_names.index("vibe")
    assert dict(space.categorical_features)[vibe] == ("default", *(found.name for found in metta_games.VIBES[1:4]))


@pytest.mark.parametrize("name", ["well", "seeded", "generated"])
def test_a_seed_determines_the_maps_and_every_episode_has_another(name: str) -> None:
    """Catches places that an unseeded generator picks, and a builder's own seed that makes all maps one."""
    env_id = f"mettagrid:metta_games:{name}"
    once, again, other = (played(make(env_id, 8, seed), 65, 1) for seed in (3, 3, 4))
    assert same(once, again)
    assert not same(once, other)
    first = [obs for obs, is_first, *_ in once if is_first.all()]
    begun = [once[0][0], *first]
    assert len(begun) == 4
    maps = {obs[2 * game : 2 * game + 2].tobytes() for obs in begun for game in range(4)}
    assert len(maps) > 8


def test_first_episodes_are_spread_unless_the_configuration_says_otherwise() -> None:
    """Catches lock step, and a ``desync_episodes=False`` that is passed over."""

    def ends(env: MettaGridEnvironment) -> set[int]:
        return {step for step, rows in enumerate(played(env, 20)) if (rows[3] | rows[4]).any()}

    assert len(ends(make(WELL, 8, whole=False))) > 2
    assert ends(make(f"{WELL}_together", 8, whole=False)) == {20}


@pytest.mark.parametrize(("env_id", "kwargs"), [(WELL, {}), (ROOM, {"num_agents": 2})])
def test_tokens_are_described(env_id: str, kwargs: dict[str, Any]) -> None:
    """Catches tokens that the policy would drop as unknown, and a scale that hides a feature."""
    env = make(env_id, 4, **kwargs)
    space = env.spec.observation
    assert isinstance(space, TokenSpace)
    categories = dict(space.categorical_features)
    largest: dict[str, float] = {}
    for obs, *_ in played(env, 60):
        tokens = obs[obs[..., 0] != 0xFF].astype(int)
        for feature, value in np.unique(tokens[:, 1:], axis=0).tolist():
            name = space.feature_names[feature]
            assert name
            if feature in categories:
                assert value < len(categories[feature])
            else:
                largest[name] = max(largest.get(name, 0.0), value / space.feature_normalizations[feature])
        inside = (tokens[:, 0] >> 4 < space.height) & (tokens[:, 0] & 15 < space.width)
        assert (inside | (tokens[:, 0] == space.global_coordinate)).all()
    assert max(largest.values()) <= 1
    if env_id == WELL:
        assert space.feature_normalizations[space.feature_names.index("inv:water")] == 5
        assert largest["inv:water"] > 0
        assert "episode_completion_pct" in space.feature_names
        assert "goal" not in space.feature_names
        assert not any(name.startswith("lp:") for name in space.feature_names)
    else:
        # 152 vibes and their actions are magnitudes: a plane each would be most of the input.
        assert set(categories) == {space.feature_names.index("tag")}


def test_episodes_without_a_limit() -> None:
    """Catches a limit of 0 steps taken for one, and episodes that a statistic of the game ends for ever or never."""
    env = make("mettagrid:metta_games:endless", 4, whole=False)
    rows = played(env, 300)
    assert not any((each[1] | each[3] | each[4]).any() for each in rows[1:])
    assert not env.short_episode.any()
    state = env.get_state()
    obs = np.zeros_like(rows[0][0])
    failed = env.set_state(state, obs)
    assert set(failed) == {0, 1, 2, 3}
    assert "more than" in failed[0]

    env = make("mettagrid:metta_games:endless", 4, sips=3)
    sips = np.zeros(2)
    ends = 0
    for _, is_first, reward, terminated, truncated in played(env, 300)[1:]:
        sips = np.where(is_first[::2], 0, sips) + reward.reshape(2, 2).sum(1)
        np.testing.assert_array_equal(truncated.reshape(2, 2).any(1), sips >= 3)
        np.testing.assert_array_equal(truncated[::2], truncated[1::2])
        assert not terminated.any()
        ends += int(truncated[::2].sum())
    assert ends > 2


def test_an_agent_that_changes_its_vibe_does_nothing_else() -> None:
    """Catches a vibe in the place of the action: MettaGrid then counts no action at all."""
    env = make("mettagrid:metta_games:idle")
    rows = make_rows(env)
    env.reset(rows.obs)
    names = env.spec.actions.names[0]  # type: ignore[union-attr]
    for name, paid in (("noop", 1), ("change_vibe_carbon_a", 1), ("move_north", 0)):
        env.step(np.full(2, names.index(name)), rows)
        assert rows.reward.tolist() == [paid, paid], name


def test_what_a_game_counts_is_reported_at_the_end() -> None:
    """Catches numbers of another agent or episode, and the engine's own, of which there are many, before the game's."""
    env = make(WELL, 4)
    rows, rng, sips, told = make_rows(env), np.random.default_rng(0), np.zeros(4), 0
    env.reset(rows.obs)
    for _ in range(65):
        env.step(rng.integers(9, size=4), rows)
        sips = np.where(rows.is_first, 0, sips + rows.reward)
        episodes = dict(env.reports.take().episodes)
        assert set(episodes) == set(np.flatnonzero(rows.terminated).tolist())
        for slot, numbers in episodes.items():
            game = slot // 2 * 2
            assert numbers["sips"] == sips[slot]
            assert numbers.get("game.sips", 0) == sips[game : game + 2].sum()
            assert "action.noop.success" in numbers
            told += sips[slot]
    assert told > 0


def test_a_games_code_keeps_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a map builder that prints into ``evaluate --json``, or changes numpy for everybody."""
    before = np.geterr()
    env = make("mettagrid:metta_games:loud")
    played(env, 25)
    assert np.geterr() == before
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "prints: the game is made" in shown.err
    assert "prints: a map is drawn" in shown.err
    assert env.reports.counts["printed"] == 3


@pytest.mark.parametrize("name", ["well", "seeded", "generated"])
def test_a_state_goes_on(name: str) -> None:
    """Catches a resumed episode on another map, from another place or with other vibes."""
    env_id = f"mettagrid:metta_games:{name}"
    env, fresh = make(env_id, 8, 3, whole=False), make(env_id, 8, 4, whole=False)
    rows, rng = make_rows(env), np.random.default_rng(0)
    count = len(env.spec.actions.names[0])  # type: ignore[union-attr]
    env.reset(rows.obs)
    for _ in range(33):
        env.step(rng.integers(count, size=8), rows)
    others = make_rows(fresh)
    fresh.reset(others.obs)
    assert fresh.set_state(env.get_state(), others.obs) == {}
    for _ in range(50):
        action = rng.integers(count, size=8)
        env.step(action, rows)
        fresh.step(action, others)
        for one, other in zip(rows[:5], others[:5], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("env_id", "error", "said"),
    [
        ("mettagrid:metta_games", EnvironmentNotFound, r"write mettagrid:package.module:function"),
        ("mettagrid:no_games:make", EnvironmentNotFound, r"no module 'no_games' here"),
        ("mettagrid:metta_games:wel", EnvironmentNotFound, r"has no attribute 'wel'"),
        ("mettagrid:metta_games:ROWS", ValueError, r"ROWS is tuple .*write mettagrid:"),
        ("mettagrid:os:system", ValueError, r"system makes no game: .* imports mettagrid"),
        ("mettagrid:metta_games:nothing", ValueError, r"returned NoneType None; write mettagrid:"),
        ("mettagrid:metta_games:wide", ValueError, r"17 cells wide and 17 high, must be 15 at most"),
        ("mettagrid:metta_games:talking", ValueError, r"game\.talk\.enabled"),
        ("mettagrid:metta_games:quiet_hands", ValueError, r"game\.actions\.noop is off"),
        ("mettagrid:metta_games:crowded", ValueError, r"no episode can begin: .*9 exceeds .* 8"),
        ("mettagrid:metta_games:unknown_object", ValueError, r"no episode can begin: .*chest"),
    ],
)
def test_what_cannot_be_played_is_said(env_id: str, error: type[Exception], said: str) -> None:
    """Catches an error from deep inside MettaGrid, or none until an actor has died of it."""
    with pytest.raises(error, match=said):
        make_env_spec(env_id)


def test_arguments_are_the_functions_own() -> None:
    """Catches arguments that go to the adapter, and a wrong one that is not named."""
    assert make_env_spec(WELL, num_agents=3).num_agents == 3
    with pytest.raises(ValueError, match="agents"):
        make_env_spec(WELL, agents=3)
    with pytest.raises(ValueError, match=r"env\.kwargs\.wrappers .*write env\.wrappers"):
        make_env_spec("mettagrid:metta_games:seeded", wrappers=[])
    with pytest.raises(ValueError, match=r"num_envs=3 must be a multiple of the 2 agents of mettagrid:"):
        make(WELL, 3)


def test_a_run_trains_it(tmp_path: Path) -> None:
    """Catches a game that only the adapter plays: its slots, spec, checkpoint and books in a run."""
    settings = [
        *(f"env.id={WELL}", "env.num_envs=6", "env.kwargs={num_agents: 3}", "mode=inline", "metrics.port=-1"),
        *("actor.unroll_length=8", "learner.batch_size=6", "learner.epochs=1", "learner.minibatches=2"),
        *("evaluation.random_seconds=0", "total_env_steps=600", "policy.kind=component"),
    ]
    config, problems = load_config((), settings)
    assert problems == []
    summary = training_run.run(config, tmp_path / "run", quiet=True, owns_process=False).summary
    assert summary["books_balance"]
    assert summary["env_steps"] >= 600
    assert summary["episodes"] > 0
