"""The random policy that a run is compared with: honest episodes that leave the run itself alone."""

from __future__ import annotations

import dataclasses
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from service import SMALL, make_setup
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluate import Side
from shoal.deploy.evaluation.evaluator import training_side
from shoal.deploy.evaluation.job_process import JobFailed
from shoal.deploy.monitoring.learning import Interval
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import EvaluationConfig
from shoal.deploy.training import random_play
from shoal.deploy.training.random_play import RandomPlay, RandomPlayer, Returns
from shoal.deploy.training.run import run
from shoal.envs.config import AdapterOptions


def never() -> bool:
    return False


class Moody(gymnasium.Env[np.ndarray, int]):
    """Draws from the process' own random streams, as it should not. An episode is as long as its reward; ``endless``
    has none, ``broken`` raises."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, endless: bool = False, broken: bool = False) -> None:
        self.endless, self.broken, self.steps = endless, broken, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self.broken:
            raise RuntimeError("out of sorts")
        self.steps, self.length = 0, random.randint(1, 9)
        return np.random.random(1).astype(np.float32), {}  # noqa: NPY002

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == self.length and not self.endless
        return np.random.random(1).astype(np.float32), 1.0, over, False, {}  # noqa: NPY002


class SlowToMake(Moody):
    """Takes a while to be made; the second one changes a setting of the process first, and waits for ``go_on``."""

    made = closed = 0
    threads: ClassVar[list[threading.Thread]] = []
    go_on = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        SlowToMake.made += 1
        SlowToMake.threads.append(threading.current_thread())
        if SlowToMake.made == 2:
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(2)
            assert SlowToMake.go_on.wait(60)

    def close(self) -> None:
        SlowToMake.closed += 1


gymnasium.register("RandomPlayMoody-v0", Moody)
gymnasium.register("RandomPlaySlowToMake-v0", SlowToMake)


def play(env_id: str, **kwargs: Any) -> RandomPlay:
    return RandomPlay(setup=make_setup(env_id, num_envs=4, **kwargs), num_agents=1, niceness=0)


def test_the_same_figures_and_an_interval_that_holds_the_truth() -> None:
    """Catches episodes that are cut short, an interval that says more than it knows, and a run's own seed in it."""
    first = play("recall").here(60.0, never)
    assert 0 < first[""].half_width < 0.06
    assert abs(first[""].mean - 0.25) < 1.5 * first[""].half_width
    assert play("recall").here(60.0, never) == first
    # Called as a job in another process it gives the same.
    assert play("recall")() == first


def test_long_episodes_count_as_often_as_short_ones() -> None:
    """Catches a mean over those that ended first: the reward of an episode here is its length."""
    random.seed(1)
    found = play("RandomPlayMoody-v0").here(60.0, never)[""]
    assert abs(found.mean - 5.0) < 2 * found.half_width < 1.0


def test_the_random_streams_of_the_process_stay_as_they_were() -> None:
    """Catches environments that train otherwise because a random policy played before them."""
    moody = play("RandomPlayMoody-v0")
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]  # noqa: NPY002
    assert moody.here(60.0, never)
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]  # noqa: NPY002
    assert after == states


def test_a_run_learns_the_same_with_and_without(tmp_path: Path) -> None:
    """Catches a random policy that plays in the run's own environments or draws from its streams."""
    found = []
    for seconds in (0, 60):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        settings = [*SMALL, "mode=inline", "env.id=RandomPlayMoody-v0", "total_env_steps=300"]
        config, problems = load_config((), [*settings, f"evaluation.random_seconds={seconds}"])
        assert not problems
        found.append(run(config, tmp_path / str(seconds)).summary)
    without, with_ = found
    assert with_["weights_sha256"] == without["weights_sha256"]
    assert (without["random_return"], without["learning"]["verdict"]) == (None, "unknown")
    assert with_["random_return"] == pytest.approx(5.0, abs=0.5)
    assert 0 < with_["random_return_ci95"] < 0.5


def test_episodes_that_never_end_end_the_play() -> None:
    """Catches a run that never begins, a figure of no episode, and a stop that waits."""
    begun = time.monotonic()
    assert play("RandomPlayMoody-v0", endless=True).here(0.3, never) is None
    assert time.monotonic() - begun < random_play._GRACE_SECONDS
    assert play("RandomPlayMoody-v0", endless=True).here(3600.0, lambda: True) is None
    assert time.monotonic() - begun < 2 * random_play._GRACE_SECONDS


def test_a_play_that_is_given_up_leaves_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches environments that are still made, never closed, beside the training; and an environment's settings that
    the training has, or gets when the given-up thread comes back."""
    slow = play("RandomPlaySlowToMake-v0")
    SlowToMake.made = SlowToMake.closed = 0
    SlowToMake.threads.clear()
    monkeypatch.setattr(random_play, "_GRACE_SECONDS", 0.2)
    before = (torch.get_default_dtype(), torch.get_num_threads(), sys.stdout)
    assert slow.here(0.2, never) is None
    assert (torch.get_default_dtype(), torch.get_num_threads(), sys.stdout) == before
    torch.set_num_threads(3)
    try:
        SlowToMake.go_on.set()
        SlowToMake.threads[-1].join(30)
        assert not SlowToMake.threads[-1].is_alive()
        assert torch.get_num_threads() == 3
        assert (SlowToMake.made, SlowToMake.closed) == (2, 2)
    finally:
        torch.set_num_threads(before[1])


@pytest.mark.parametrize(("limit", "most"), [("max_seconds=3", 3.0), ("total_env_steps=100", 1.5)])
def test_a_run_whose_episodes_do_not_end_ends_itself(
    limit: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a minute of random play after the end of ``max_seconds``, and one of which nothing is said."""
    monkeypatch.setattr(random_play, "SECONDS_AFTER", most)
    settings = [*SMALL, "mode=inline", "env.id=RandomPlayMoody-v0", "env.kwargs={endless: true}", limit]
    config, problems = load_config((), [*settings, "evaluation.random_seconds=0.1"])
    assert not problems
    begun = time.monotonic()
    summary = run(config, tmp_path / "run", quiet=True).summary
    assert summary["random_return"] is None
    said = [record.getMessage() for record in caplog.records if "random actions" in record.getMessage()]
    if "max_seconds" in limit:
        assert time.monotonic() - begun < 30
        assert not said
    else:
        assert said == [
            "no episodes of random actions to compare with have ended yet: they are played for 2 s at most "
            "(evaluation.random_seconds=0 leaves them out)"
        ]


def test_what_was_played_to_its_end_is_not_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same hundred thousand steps once more, after a run whose environment never ends."""
    monkeypatch.setattr(random_play, "ENV_STEPS", 200)
    player = RandomPlayer(play("RandomPlayMoody-v0", endless=True), 60.0, pytest.fail, None)
    player.before(never)
    monkeypatch.setattr(RandomPlay, "here", pytest.fail)
    player.after(never)


def test_a_signal_ends_the_play_after_the_run() -> None:
    """Catches a Ctrl-C that is only obeyed a minute later, whoever plays."""
    begun = time.monotonic()
    for jobs in (None, Elsewhere()):
        player = RandomPlayer(play("RandomPlayMoody-v0", endless=True), 0.1, pytest.fail, jobs)
        player.before(never)
        asked: list[bool] = []

        def signalled(asked: list[bool] = asked) -> bool:
            asked.append(True)
            return len(asked) > 3

        player.after(signalled)
        assert len(asked) > 3
    assert time.monotonic() - begun < random_play.SECONDS_AFTER / 2


def test_an_environment_that_fails_costs_the_comparison_only(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that ends because of a comparison, or one that says nothing of why there is none."""
    setup = make_setup("RandomPlayMoody-v0", num_envs=4)
    broken = RandomPlay(setup=setup, num_agents=1, niceness=0)
    setup.env_kwargs["broken"] = True  # type: ignore[index]
    assert broken.here(60.0, never) == {}
    assert "the return of random actions could not be measured" in caplog.text
    assert "out of sorts" in caplog.text


class Elsewhere:
    """Jobs of another process, in this one: each takes until ``may_end``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.may_end, self.killed = error, threading.Event(), False

    def submit(self, job: Callable[[], Any]) -> None:
        self.job = job

    def poll(self, seconds: float) -> bool:
        return self.may_end.wait(seconds)

    def result(self) -> Any:
        self.may_end.wait()
        if self.error:
            raise self.error
        return {"": Interval(1.0, 0.5)}

    def end(self) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


def test_where_environments_live_elsewhere_training_does_not_wait(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a first update that waits for the comparison, a result that is lost, and a process that stays."""
    found: list[Returns] = []
    jobs = Elsewhere()
    player = RandomPlayer(play("recall"), 10.0, found.append, jobs)
    player.before(never)
    assert not found
    jobs.may_end.set()
    player.after(never)
    assert found == [{"": Interval(1.0, 0.5)}]
    player.close()
    assert jobs.killed
    jobs = Elsewhere(JobFailed("its process was killed"))
    player = RandomPlayer(play("recall"), 10.0, found.append, jobs)
    player.before(never)
    jobs.may_end.set()
    player._beside.join()
    caplog_before = caplog.text.count("are played for")
    player.after(never)
    assert len(found) == 1
    assert caplog.text.count("are played for") == caplog_before  # nothing is played by a process that failed
    assert "its process was killed" in caplog.text


def test_a_run_that_wants_no_comparison_plays_none() -> None:
    """Catches environments that are made though the setting says 0."""
    player = RandomPlayer(play("recall"), 0.0, pytest.fail, None)
    player.before(never)
    player.after(never)
    player.close()


class Alone(Moody):
    """Shares no process with another copy, as what draws on pygame's only display."""

    alive: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.alive.add(id(self))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert len(self.alive) == 1
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        self.alive.discard(id(self))


gymnasium.register("RandomPlayAlone-v0", Alone)


def test_environments_that_need_a_process_each_play_alone() -> None:
    """Catches random play with several copies in a process, of an environment that was given one for each."""
    alone = play("RandomPlayAlone-v0")
    assert isinstance(alone.setup, WorkerSetup)
    setup = dataclasses.replace(alone.setup, env_options=AdapterOptions(vectorization="async"))
    assert dataclasses.replace(alone, setup=setup).here(60.0, never)
    side = training_side(setup, EvaluationConfig(every_env_steps=1, episodes=32), num_agents=1, seed=0)
    assert isinstance(side, Side)
    assert (side.setup.num_envs, side.setup.env_options.vectorization) == (1, "sync")
