"""Episodes as Minari datasets, read by Minari."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
from echo_envs import CASES, HOWS, even, mask
from shoal.deploy.cli import main
from shoal.deploy.evaluation.evaluate import PolicyPlayer
from shoal.deploy.library.exporting import CannotExport

minari = pytest.importorskip("minari")
pytest.importorskip("PIL")

SMALL = {
    "mode": "inline",
    "total_env_steps": 64,
    "env.num_envs": 2,
    "actor.unroll_length": 8,
    "learner.epochs": 1,
    "learner.minibatches": 2,
    "evaluation.random_seconds": 0,
    "learner.batch_size": 4,
    "progress": False,
}


@pytest.fixture(autouse=True)
def _datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))


def train(folder: Path, how: str, case: str, **options: Any) -> Path:
    name = "pettingzoo:echo_envs:parallel_env" if how == "pettingzoo" else "echo_envs:Echo-v0"
    if how != "pettingzoo":
        options["env.vectorization"] = how
    settings = {"env.id": name, "env.kwargs": {"case": case}, **options, **SMALL}
    return Path(shoal.train(run_dir=folder / "run", **settings).run_dir)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["parts", "mask in info"])
def test_minari_reads_what_the_environment_gave(how: str, autoreset: str, case: str, tmp_path: Path) -> None:
    """Catches the first observation of the next episode as the last of this one, steps that only reset, and actions in
    the policy's terms."""
    if how in ("native", "pettingzoo") and autoreset != "next_step":
        pytest.skip("they reset in a way of their own")
    if how == "native" and case == "parts":
        pytest.skip("the native vector of these tests has no Dicts of choices")
    options = {} if autoreset == "next_step" else {"env.autoreset_mode": autoreset}
    written = shoal.export_minari(train(tmp_path, how, case, **options), "echo/test-v0", episodes=6)
    dataset, declared = minari.load_dataset("echo/test-v0"), CASES[case]
    assert (len(dataset), dataset.total_steps) == (written.episodes, written.steps) == (6, 24)
    assert dataset.observation_space == declared.space
    assert dataset.action_space == declared.action
    assert sorted(one["slot"] for one in dataset.storage.get_episode_metadata(range(6))) == [0, 0, 0, 1, 1, 1]
    for episode in dataset:
        if case == "parts":
            for part, values in episode.observations.items():
                np.testing.assert_array_equal(values, np.stack([declared.obs(t)[part] for t in range(5)]))
        else:
            np.testing.assert_array_equal(episode.observations, np.stack([even(t) for t in range(5)]))
            masks = np.stack([*(mask(t) for t in range(4)), np.ones(5)]).astype(bool)
            np.testing.assert_array_equal(episode.infos["action_mask"], masks)
            assert masks[np.arange(4), episode.actions - declared.action.start].all()  # type: ignore[attr-defined]
        assert all(declared.action.contains(action) for action in episode.actions)
        assert episode.rewards.tolist() == [0.5, 1.0, 1.5, 2.0]
        assert episode.terminations.tolist() == [False] * 3 + [True]
        assert not episode.truncations.any()
    assert written.mean_return == 5.0


def test_an_episode_without_end_is_truncated(tmp_path: Path) -> None:
    """Catches an export that never ends, and an episode that says nothing about where it was cut."""
    run = train(tmp_path, "sync", "endless")
    shoal.export_minari(run, "echo-v0", episodes=4, max_episode_steps=7)
    episodes = list(minari.load_dataset("echo-v0"))
    assert [len(one.rewards) for one in episodes] == [7] * 4
    assert all(one.truncations.tolist() == [False] * 6 + [True] for one in episodes)
    assert all(not one.terminations.any() for one in episodes)
    assert [one.observations[-1].tolist() for one in episodes] == [even(7).tolist()] * 4


def test_the_environment_is_recovered_and_episodes_are_those_of_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dataset that cannot make its environment again, and one whose episodes another seed would give."""
    run = shoal.train("Pendulum-v1", run_dir=tmp_path / "run", **{"env.kwargs": {"g": 5.0}}, **SMALL).run_dir
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        assert main(["export", str(run), "--minari", f"{name}-v0", "--episodes", "3", "--seed", str(seed)]) == 0
    assert "a-v0: 4 episodes, 800 steps, return -" in capsys.readouterr().out
    a, b, c = (minari.load_dataset(f"{name}-v0") for name in "abc")
    with a.recover_environment() as env:
        assert env.unwrapped.g == 5.0
        for episode in a:
            env.reset()
            env.unwrapped.state = np.array([np.arctan2(*episode.observations[0][1::-1]), episode.observations[0][2]])
            for action, reward in zip(episode.actions[:20], episode.rewards, strict=False):
                assert env.step(action)[1] == pytest.approx(reward, abs=1e-3)
    assert all((x.actions == y.actions).all() for x, y in zip(a, b, strict=True))
    assert any((x.actions != y.actions).any() for x, y in zip(a, c, strict=True))


def test_what_cannot_be_written_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches half of a dataset under its full name, and tracebacks of Minari's."""
    run = train(tmp_path, "sync", "endless")
    shoal.export_minari(run, "echo-v0", episodes=2, max_episode_steps=3)
    refused = {
        "echo-v0": "already: give another version",
        "echo": "names no Minari dataset: expected name-v0",
        "e/cho-v0": "a namespace has at least two characters",
    }
    for name, why in refused.items():
        assert main(["export", str(run), "--minari", name]) == 2
        assert why in capsys.readouterr().err
    assert main(["export", str(run), "--minari", "x-v0", "--episodes", "0"]) == 2
    assert "episodes=0 must be at least 1" in capsys.readouterr().err
    from minari.dataset._storages.arrow_storage import ArrowStorage

    written: list[int] = []

    def full(self: Any, episodes: Any, before: Any = ArrowStorage.update_episodes) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(1)
        before(self, episodes)

    with monkeypatch.context() as patched:
        patched.setattr(ArrowStorage, "update_episodes", full)
        assert main(["export", str(run), "--minari", "full-v0", "--max-episode-steps", "3"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["echo-v0"]
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(CannotExport, match=r"pip install 'shoal\[minari\]'"):
        shoal.export_minari(run, "more-v0")


@pytest.mark.parametrize(("mode", "resets"), [("episode", 6), ("never", 2)])
def test_the_memory_is_carried_as_in_training(
    mode: str, resets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a dataset of a policy whose memory was zeroed at every episode, which it never was in training."""
    run = train(tmp_path, "sync", "informs", **{"actor.reset_memory": mode})
    seen: list[int] = []

    def spy(self: Any, obs: Any, is_first: Any, *masks: Any, before: Any = PolicyPlayer.__call__) -> Any:
        seen.append(int(is_first.sum()))
        return before(self, obs, is_first, *masks)

    monkeypatch.setattr(PolicyPlayer, "__call__", spy)
    assert shoal.export_minari(run, "echo-v0", episodes=6).episodes == 6
    assert sum(seen) == resets
