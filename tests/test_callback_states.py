"""Callbacks and the options that they set go on in a resumed run."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import shoal

SMALL: dict[str, Any] = {
    "env.id": "optioned_envs:Optioned-v0",
    "env.num_envs": 4,
    "mode": "inline",
    "actor.unroll_length": 6,
    "learner.batch_size": 4,
    "learner.epochs": 1,
    "learner.minibatches": 2,
    "policy.kind": "component",
    "policy.components": {"lstm": {"size": 8}},
    "evaluation.random_seconds": 0,
    "metrics.port": -1,
    "total_env_steps": 600,
}


class Grows(shoal.Callback):
    """A curriculum: a level more whenever so many episodes have ended; the run ends at an update."""

    def __init__(self, until: int = 10**9) -> None:
        self.until, self.level, self.seen, self.given = until, 0, 0, []
        self.last: deque[float] = deque(maxlen=3)

    def on_start(self, run: shoal.RunningRun) -> None:
        self.given.append(run.env_options)
        run.set_env_options({"level": self.level})

    def on_update(self, run: shoal.RunningRun, update: shoal.Update) -> None:
        if update.policy_version == self.until:
            run.stop()

    def on_episodes(self, run: shoal.RunningRun, episodes: shoal.EndedEpisodes) -> None:
        self.seen += len(episodes.returns)
        self.last.extend(episodes.lengths)
        if self.level != self.seen // 17:
            self.level = self.seen // 17
            run.set_env_options({"level": self.level})

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "seen": self.seen, "last": list(self.last), "lowest": float("-inf")}

    def load_state_dict(self, state: Any) -> None:
        assert state.pop("lowest") == float("-inf")
        self.level, self.seen = state["level"], state["seen"]
        self.last.extend(state["last"])


def train(run_dir: Path, *callbacks: shoal.Callback, **settings: Any) -> shoal.Run:
    return shoal.train(config=SMALL | settings, run_dir=run_dir, callbacks=callbacks, progress=False)


@pytest.mark.parametrize("until", [6, 9, 11, 14])
def test_a_curriculum_goes_on_as_if_nothing_had_happened(tmp_path: Path, until: int) -> None:
    """Catches a callback that begins anew, options that are lost, and those that episodes of the last version get
    before an update: a run that is resumed ends with other weights then."""
    whole = Grows()
    expected = train(tmp_path / "whole", whole).summary
    first, second = Grows(until), Grows()
    assert train(tmp_path / "parts", first).summary["policy_version"] == until < expected["policy_version"]
    summary = train(tmp_path / "parts", second).summary
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert vars(second) | {"given": []} == vars(whole) | {"given": []}
    assert (first.given, second.given) == ([None], [{"level": first.level}])
    assert whole.level > first.level > 0


def test_callbacks_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a state that another callback gets, of the same class or not, and one that is lost without a word."""

    class Counts(shoal.Callback):
        def __init__(self, step: int) -> None:
            self.step, self.count = step, 0

        def on_update(self, run: Any, update: Any) -> None:
            self.count += self.step

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: Any) -> None:
            self.count = state["count"]

    class Silent(shoal.Callback):
        def load_state_dict(self, state: Any) -> None:
            raise AssertionError("it has none")

    version = train(tmp_path / "run", Counts(1), Silent(), Counts(100), Grows(3)).summary["policy_version"]
    assert version == 3
    state = json.loads((tmp_path / "run" / "checkpoints" / "000000003" / "state.json").read_text())
    assert [each["state"].get("count") for each in state["callbacks"]] == [3, 300, None]
    one, hundred = Counts(1), Counts(100)
    with caplog.at_level(logging.WARNING):
        total = train(tmp_path / "run", one, Silent(), hundred).summary["policy_version"]
    assert (one.count, hundred.count) == (total, 100 * total)
    assert f"has a state of the callback {__name__}:Grows, which this run does not have" in caplog.text


class Bad(shoal.Callback):
    """Has a state that is none, or does not take it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def load_state_dict(self, state: Any) -> None:
        raise KeyError("count")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (RuntimeError("my own mistake"), "Bad.state_dict: RuntimeError: my own mistake"),
        ([1], r"Bad.state_dict: TypeError: expected a mapping of plain data, got \[1\]"),
        ({"seen": deque()}, "Bad.state_dict: TypeError: Object of type deque is not JSON serializable"),
        ({"all": "x" * 2**20}, r"Bad.state_dict: ValueError: a state of 1,048,587 bytes; .* 1,048,576 at most"),
    ],
)
def test_a_state_that_cannot_be_kept_ends_the_run_saved(tmp_path: Path, state: Any, said: str) -> None:
    """Catches a checkpoint that is lost with the state, a state that is lost without a word, and one that fills the
    disk."""
    with pytest.raises(shoal.CallbackFailed, match=said):
        train(tmp_path / "run", Bad(state), **{"checkpoint.every_updates": 4})
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("0*")] == ["000000004"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy_version"] == 4


def test_a_state_that_does_not_fit_is_said_before_the_start(tmp_path: Path) -> None:
    """Catches a run that trains on with a callback that has lost its place."""
    train(tmp_path / "run", Bad({"count": 1}), Grows(2))
    with pytest.raises(
        shoal.ConfigError, match=r"Bad.load_state_dict: KeyError: 'count'; to begin it anew, leave it out"
    ):
        train(tmp_path / "run", Bad({}))


@pytest.mark.parametrize("states", [None, "x", [1], [{"name": "a"}], [{"name": ["a"], "state": {}}], {"a": 1}])
@pytest.mark.parametrize("options", [3, {"#": "object"}, [1]])
def test_contents_that_no_run_saves_are_no_states(tmp_path: Path, states: Any, options: Any) -> None:
    """Catches an error from deep inside for a checkpoint that was damaged or forged."""
    from shoal.deploy.settings.load import load_config
    from shoal.deploy.training.callbacks import restore_callbacks
    from shoal.deploy.training.resume import Origin, restore_options

    class Worker:
        env_options = first_options = None

    saved = {"callbacks": states, "episode_options": options, "config": {"env": {"id": "recall"}}}
    restore_callbacks([Grows()], saved)
    config, _ = load_config((), ["env.id=recall"])
    worker: Any = Worker()
    restore_options(config, Origin(checkpoint=None, run_id="a", session=1, run_state=saved), worker)
    assert worker.env_options is None
    assert worker.first_options is None


class Lengths(shoal.Callback):
    """The lengths of the episodes of each update."""

    def __init__(self) -> None:
        self.found: list[tuple[int, set[int]]] = []
        self.begun_with: Any = None

    def on_update(self, run: shoal.RunningRun, update: shoal.Update) -> None:
        self.begun_with = self.begun_with or run.env_options

    def on_episodes(self, run: shoal.RunningRun, episodes: shoal.EndedEpisodes) -> None:
        self.found.append((run.env_steps, set(episodes.lengths)))


def test_options_by_environment_steps(tmp_path: Path) -> None:
    """Catches a schedule that is late, that a resumed run begins again, or that loses its numbers in JSON."""
    schedule = {"name": "shoal:OptionsSchedule", "kwargs": {"options": {"0": {"steps": 2}, 300: {"steps": 5}}}}
    settings = {"env.id": "optioned_envs:Lasting", "callbacks": [schedule]}
    lengths = Lengths()
    train(tmp_path / "run", lengths, **settings, total_env_steps=500)
    early = {length for steps, found in lengths.found if steps <= 300 for length in found}
    # The version after the 300th step begins with them, and episodes of two steps are then under way.
    late = {length for steps, found in lengths.found if steps >= 300 + 3 * 24 for length in found}
    assert (early, late) == ({2}, {5})
    again = Lengths()
    train(tmp_path / "run", again, **settings, total_env_steps=700)
    assert again.begun_with == {"steps": 5}
    assert {length for _, found in again.found for length in found} == {5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "options is empty"),
        ({"soon": {"steps": 2}}, "expected a number of environment steps, 0 or more, got 'soon'"),
        ({-1: {"steps": 2}}, "got -1"),
        ({1.5: {"steps": 2}}, "got 1.5"),
        ({0: 5}, "expected a mapping of options by name, got 5"),
        ({0: {"steps": 2}, "0": {"steps": 3}}, "options has 0 steps twice"),
    ],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    """Catches a curriculum that never begins."""
    with pytest.raises((ValueError, TypeError), match=message):
        shoal.OptionsSchedule(options)
