"""Films and replays: what is in them, and what is said where there can be none."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from films import frames
from scripted_envs import choose, play_script
from shoal.envs.config import AdapterOptions
from shoal.envs.play import play
from shoal.envs.recording import CannotRecord, film, replay
from shoal.envs.reference import random_player
from shoal.envs.registry import make_vector_env

SEED = np.random.SeedSequence(3)


def always(action: int) -> Any:
    return lambda obs, is_first: np.full(len(obs), action)


def test_a_film_shows_every_step_from_the_reset_to_the_end(tmp_path: Path) -> None:
    """Catches a film without its first or last picture, one that runs on into the next episode, and wrong colours."""
    pytest.importorskip("imageio_ffmpeg")
    env = film(
        "evaluated_envs:Painted-v0",
        SEED,
        tmp_path / "new" / "films",
        "episode",
        {},
        AdapterOptions(vectorization="async"),
    )
    played = play(env, always(0), 3)
    env.close()
    assert played.lengths.tolist() == [3, 4, 3]
    assert [file.name for file in env.files] == ["episode-0.mp4", "episode-1.mp4", "episode-2.mp4"]
    assert sorted(env.files) == sorted((tmp_path / "new" / "films").iterdir())
    for file, length in zip(env.files, played.lengths.tolist(), strict=True):
        seen = frames(file, 34, 66)
        assert len(seen) == length + 1
        assert np.abs(seen.mean((1, 2, 3)) - 50 * np.arange(length + 1)).max() < 12


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
def test_a_render_mode_that_is_set_already_does_not_hinder(mode: str, tmp_path: Path) -> None:
    """Catches "got multiple values for argument" where the environment is trained with a render mode."""
    pytest.importorskip("imageio_ffmpeg")
    env = film("evaluated_envs:Painted-v0", SEED, tmp_path, "episode", {"render_mode": mode})
    play(env, always(0), 1)
    env.close()
    assert len(env.files) == 1


def test_episodes_without_an_end_are_filmed_up_to_the_cut(tmp_path: Path) -> None:
    """Catches a film that never ends, none at all, and one that runs on after the cut."""
    pytest.importorskip("imageio_ffmpeg")
    env = film("evaluated_envs:Painted-v0", SEED, tmp_path, "episode", {}, max_episode_steps=2)
    played = play(env, always(0), 2, max_episode_steps=2)
    env.close()
    assert played.lengths.tolist() == [2, 2]
    assert played.cut.all()
    assert [file.name for file in env.files] == ["episode-0.mp4", "episode-1.mp4"]
    assert [len(frames(file, 34, 66)) for file in env.files] == [3, 3]


def test_a_film_that_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    """Catches half a film under the name of a whole one."""
    pytest.importorskip("imageio_ffmpeg")
    env = film("evaluated_envs:Painted-v0", SEED, tmp_path, "episode", {})
    assert play(env, always(0), 10, max_env_steps=6).episodes == 1
    env.close()
    assert [file.name for file in tmp_path.iterdir()] == ["episode-0.mp4"]


def test_a_game_of_several_agents_is_one_film(tmp_path: Path) -> None:
    """Catches a film that ends with the first agent, or that no agent's end ends."""
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pettingzoo")
    env = film("pettingzoo:scripted_games:painted_game", SEED, tmp_path, "game", {})
    slots = env.num_envs
    played = play(env, lambda obs, _: np.array([choose(slot, row) for slot, row in enumerate(obs)]), 2 * slots)
    env.close()
    scripts = [play_script(slot, 3, 2) for slot in range(slots)]
    assert played.episodes == 2 * slots
    for k, file in enumerate(env.files):
        assert len(frames(file, 16, 16)) == 1 + max(len(episodes[k].rewards) for episodes in scripts)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "slots"),
    [
        ("evaluated_envs:Painted-v0", {"masked": True}, 1),
        ("pettingzoo:turn_games:Nim", {}, 2),
        ("pettingzoo:turn_games:Nim", {"masks": "info"}, 2),
    ],
)
def test_a_film_plays_legal_actions(env_id: str, kwargs: dict[str, Any], slots: int, tmp_path: Path) -> None:
    """Catches a film of a policy that does not see the mask: of games that illegal moves lose or break off."""
    pytest.importorskip("imageio_ffmpeg")
    if slots > 1:
        turn_games = pytest.importorskip("turn_games")
        turn_games.Nim.illegal.clear()
    env = film(env_id, SEED, tmp_path, "episode", kwargs)
    played = play(env, random_player(env.spec, np.random.default_rng(2)), 6 * slots)
    env.close()
    assert not env.faults
    assert len(env.files) == 6
    if slots > 1:
        assert not turn_games.Nim.illegal
        # Who takes the last stone wins, and the other one loses.
        assert set(played.by_environment(played.returns).tolist()) == {0.0}
    for file, length in zip(env.files, played.lengths[::slots].tolist(), strict=True):
        size = (34, 66) if slots == 1 else (16, 16)
        assert len(frames(file, *size)) == length + 1


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("mettagrid/forage", {}, "writes replays for its own viewer: --replay DIR"),
        ("recall", {}, "recall has nothing to show"),
        ("recall?delay=3", {}, "recall has nothing to show"),
        ("evaluated_envs:Wandering-v0", {}, "it has the render modes none, and rgb_array is needed"),
        ("evaluated_envs:Painted-v0", {"broken": True}, "cannot be rendered: DependencyNotInstalled: pip install"),
        ("evaluated_envs:Painted-v0", {"no": 1}, "unexpected keyword argument 'no'"),
    ],
)
def test_what_cannot_be_filmed_is_refused(env_id: str, kwargs: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """Catches an environment that plays to the end before somebody notices that there is nothing to see."""
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(CannotRecord, match="--video: ") as raised:
        film(env_id, SEED, tmp_path / "films", "episode", kwargs)
    assert expected in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the extra was not installed."""
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(CannotRecord, match=r"pip install 'shoal\[video\]'"):
        film("evaluated_envs:Painted-v0", SEED, tmp_path, "episode", {})


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Catches episodes played for files that have no place."""
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "file").touch()
    with pytest.raises(CannotRecord, match=r"--video: cannot write to .*file/films"):
        film("evaluated_envs:Painted-v0", SEED, tmp_path / "file" / "films", "episode", {})
    pytest.importorskip("mettagrid")
    with pytest.raises(CannotRecord, match=r"--replay: cannot write to .*file"):
        replay("mettagrid/forage", SEED, tmp_path / "file", "episode", {})


def test_a_replay_is_of_the_episode_that_was_played(tmp_path: Path) -> None:
    """Catches a replay of another map or with other actions, a wrong length, rewards that are not the agents'."""
    pytest.importorskip("mettagrid")
    env = replay("mettagrid/forage", SEED, tmp_path, "episode", {})
    slots = env.num_envs
    found = play(env, random_player(env.spec, np.random.default_rng(0)), 2 * slots)
    env.close()
    plain = make_vector_env("mettagrid/forage", slots, SEED, None, True)
    expected = play(plain, random_player(plain.spec, np.random.default_rng(0)), 2 * slots)
    plain.close()
    assert found.returns.tolist() == expected.returns.tolist()
    assert found.starts().tolist() == expected.starts().tolist()
    assert sorted(env.files) == sorted(tmp_path.iterdir())
    for k, file in enumerate(env.files):
        data = json.loads(zlib.decompress(file.read_bytes()))
        assert data["num_agents"] == slots
        assert data["max_steps"] == expected.lengths[0]
        assert data["map_size"] == [13, 13]
        returns = expected.returns[expected.number == k]
        assert data["infos"]["episode_rewards"] == pytest.approx(returns.tolist())
        agents = [thing for thing in data["objects"] if thing["type_name"] == "agent"]
        assert len(agents) == slots
        assert all(len(agent["location"]) > 20 for agent in agents)


def test_only_mettagrid_writes_replays(tmp_path: Path) -> None:
    """Catches a traceback, or an empty directory, for every other environment."""
    with pytest.raises(CannotRecord, match=r"only MettaGrid's games do; .* --video DIR"):
        replay("evaluated_envs:Painted-v0", SEED, tmp_path / "replays", "episode", {})
    assert not list(tmp_path.iterdir())
