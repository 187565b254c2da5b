"""The MettaGrid adapter's own: its tokens, its missions, its short cuts past mettagrid's objects."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from shoal.envs.boundary import StepRows, TokenSpace
from shoal.envs.config import EnvConfig, EnvironmentNotFound
from shoal.envs.mettagrid import MettaGridEnvironment
from shoal.envs.mettagrid_game import make_game_config, mission_game
from shoal.envs.missions import AGENT, MISSIONS
from shoal.envs.reference import random_return, scripted_return
from shoal.envs.registry import make_env_spec, make_vector_env

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mettagrid") is None, reason="needs shoal[mettagrid]")

FORAGE = MISSIONS["mettagrid/forage"]


def make_rows(env: MettaGridEnvironment) -> StepRows:
    slots = env.num_envs
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.zeros((slots, *env.spec.obs_shape), dtype=np.uint8)
    return StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2])


def test_equals_mettagrids_own_simulation() -> None:
    """Catches what the translated-once configuration and the shared buffers could change against ``Simulator``."""
    from mettagrid.config.mettagrid_config import MettaGridConfig
    from mettagrid.map_builder.ascii import AsciiMapBuilder
    from mettagrid.simulator import Simulator

    env = MettaGridEnvironment(mission_game(FORAGE), 16, 5, stagger=False)
    rows = make_rows(env)
    rng = np.random.default_rng(np.random.SeedSequence(5).spawn(2)[1])
    player = np.random.default_rng(1)
    env.reset(rows.obs)
    for _ in range(2):
        game = make_game_config(FORAGE)
        symbols = {"#": "wall", ".": "empty", "M": "mine", "A": "altar", "@": AGENT}
        by_name = {name: symbol for symbol, name in symbols.items()}
        lines = [[by_name[str(name)] for name in row] for row in FORAGE.make_map(rng)]
        game.map_builder = AsciiMapBuilder.Config(map_data=lines, char_to_map_name=symbols)
        simulation = Simulator().new_simulation(MettaGridConfig(game=game), seed=int(rng.integers(2**31)))
        np.testing.assert_array_equal(rows.obs[8:], simulation._c_sim.observations())
        for _ in range(FORAGE.max_steps):
            action = player.integers(5, size=16)
            env.step(action, rows)
            simulation._c_sim.actions()[:] = action[8:]
            simulation._c_sim.step()
            np.testing.assert_array_equal(rows.obs[8:], simulation._c_sim.observations())
            np.testing.assert_array_equal(rows.reward[8:], simulation._c_sim.rewards())
        assert rows.truncated.all()
        assert simulation.is_done()
        env.step(action, rows)
        assert rows.is_first.all()
    env.close()


def test_stagger_spreads_ends_and_marks_the_short_episodes() -> None:
    """Catches lock step, and short first episodes that pass for whole ones in the mean return."""
    env = MettaGridEnvironment(mission_game(FORAGE), 64, 0)
    rows = make_rows(env)
    env.reset(rows.obs)
    ends: list[list[int]] = [[] for _ in range(8)]
    for step in range(1, 2 * FORAGE.max_steps + 2):
        short = env.short_episode.copy()
        env.step(np.zeros(64, dtype=np.int64), rows)
        for simulation in np.flatnonzero(rows.truncated[::8]):
            ends[simulation].append(step)
            assert short[8 * simulation] == (len(ends[simulation]) == 1 and step < FORAGE.max_steps)
    env.close()
    firsts = sorted(simulation_ends[0] for simulation_ends in ends)
    assert np.diff(firsts).min() >= FORAGE.max_steps // 8 - 1
    # The next one is whole: max_steps after the call that began it.
    assert {simulation_ends[1] - simulation_ends[0] for simulation_ends in ends} == {FORAGE.max_steps + 1}


@pytest.mark.parametrize("env_id", list(MISSIONS))
def test_tokens_are_described(env_id: str) -> None:
    """Catches tokens that the policy would drop as unknown, or whose scale hides them."""
    mission = MISSIONS[env_id]
    env = MettaGridEnvironment(mission_game(mission), 2 * mission.num_agents, 0)
    space = env.spec.observation
    assert isinstance(space, TokenSpace)
    categories = dict(space.categorical_features)
    rows = make_rows(env)
    env.reset(rows.obs)
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(60):
        env.step(rng.integers(5, size=env.num_envs), rows)
        tokens = rows.obs[rows.obs[..., 0] != 0xFF].astype(int)
        assert (rows.obs[:, -1, 0] == 0xFF).all(), "the window has more tokens than fit"
        for feature, value in np.unique(tokens[:, 1:], axis=0).tolist():
            assert space.feature_names[feature]
            if feature in categories:
                assert value < len(categories[feature])
                seen.add(categories[feature][value])
            else:
                assert value / space.feature_normalizations[feature] <= 1
        inside = (tokens[:, 0] >> 4 < space.height) & (tokens[:, 0] & 15 < space.width)
        assert (inside | (tokens[:, 0] == space.global_coordinate)).all()
    env.close()
    assert seen >= {"agent", "mine", "wall", "noop", "move_east"}


@pytest.mark.parametrize("env_id", list(MISSIONS))
def test_recorded_returns(env_id: str) -> None:
    """Catches a mission whose recorded figures are of another version of it."""
    mission = MISSIONS[env_id]
    for recorded, measured in (
        (mission.random_return, random_return(env_id, episodes=256, seed=11, num_envs=32)),
        (mission.scripted_return, scripted_return(env_id, episodes=64, seed=11, num_envs=32)),
    ):
        assert measured is not None
        spread = (recorded[1] ** 2 + measured.standard_error**2) ** 0.5
        assert abs(recorded[0] - measured.mean) < 5 * spread + 0.02 * recorded[0]
    assert mission.scripted_return[0] > 10 * mission.random_return[0]


def test_actions_out_of_range_are_refused() -> None:
    """Catches a head with too many actions: mettagrid itself passes over them in silence."""
    env = MettaGridEnvironment(mission_game(FORAGE), 8, 0)
    rows = make_rows(env)
    env.reset(rows.obs)
    for action in (5, -1):
        with pytest.raises(ValueError, match=str(action)):
            env.step(np.full(8, action), rows)
    env.close()


@pytest.mark.parametrize(("num_envs", "nearest"), [(3, "8"), (12, "8 or 16"), (63, "56 or 64")])
def test_slots_must_fill_simulations(num_envs: int, nearest: str) -> None:
    """Catches a slot count that would leave agents without a slot, before any process starts."""
    match = rf"num_envs={num_envs} .* 8 agents .* nearest: {nearest}\b"
    with pytest.raises(ValueError, match=match):
        EnvConfig(id="mettagrid/forage", num_envs=num_envs)
    with pytest.raises(ValueError, match=match):
        make_vector_env("mettagrid/forage", num_envs, 0)


def test_import_leaves_the_root_logger_alone() -> None:
    """Catches mettagrid's import adding a handler and a level: every library's INFO lines would appear."""
    code = (
        "import logging; root = logging.getLogger(); before = (list(root.handlers), root.level)\n"
        "from shoal import envs; envs.make_env_spec('mettagrid/forage')\n"
        "assert (list(root.handlers), root.level) == before, (root.handlers, root.level)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare ModuleNotFoundError that leaves the user to guess."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mettagrid"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mettagrid", None)
    with pytest.raises(EnvironmentNotFound, match=r"mettagrid/forage.*pip install 'shoal\[mettagrid\]'"):
        make_env_spec("mettagrid/forage")


@pytest.mark.parametrize(
    ("env_id", "said"),
    [
        ("mettagrid/forge", "did you mean mettagrid/forage"),
        ("mettagrid/x", "Missions: mettagrid/forage, "),
        ("metagrid/forage", "did you mean mettagrid/forage"),
        ("recal", "did you mean recall"),
        ("recall?delay=soon", "recall.delay=soon"),
    ],
)
def test_unknown_id_is_explained(env_id: str, said: str) -> None:
    """Catches an error that does not say what to write instead."""
    with pytest.raises(EnvironmentNotFound, match=said):
        make_vector_env(env_id, 8, 0)
