"""Callbacks: called at every event, with their numbers beside ours; what one raises is named, and nothing is lost."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import shoal
from service import read_summary
from service import shoal as command_line
from shoal.deploy.settings.sections import CallbackConfig
from shoal.deploy.training.callbacks import check_callbacks, make_callbacks

SMALL = {
    "env.id": "recall",
    "mode": "inline",
    "env.num_envs": 4,
    "actor.unroll_length": 8,
    "learner.epochs": 1,
    "learner.minibatches": 2,
    "evaluation.random_seconds": 0,
    "learner.batch_size": 16,
    "total_env_steps": 600,
    "checkpoint.every_updates": 5,
}


class Everything(shoal.Callback):
    """Notes each event; reads the metrics endpoint where it knows one."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.steps: list[int] = []
        self.returns = 0
        self.lengths: list[int] = []

    def on_start(self, run: Any) -> None:
        self.events.append("start")
        assert (run.env_steps, run.policy_version) == (0, 0)

    def on_update(self, run: Any, update: Any) -> Mapping[str, float]:
        self.events.append("update")
        self.steps.append(update.env_steps)
        assert update.policy_version == run.policy_version == len(self.steps)
        assert update.terms["entropy"] > 0
        return {"my/updates": len(self.steps), "half": 0.5, "flag": True}

    def on_episodes(self, run: Any, episodes: Any) -> None:
        self.events.append("episodes")
        self.returns += len(episodes.returns)
        self.lengths += episodes.lengths

    def on_checkpoint(self, run: Any, path: Path) -> Mapping[str, float]:
        self.events.append("checkpoint")
        assert (path / "manifest.json").is_file()
        return {"checkpoints": self.events.count("checkpoint")}

    def on_evaluation(self, run: Any, result: Any) -> None:
        self.events.append("evaluation")
        assert result.episodes >= 4

    def on_end(self, run: Any, summary: Mapping[str, Any]) -> Mapping[str, float]:
        self.events.append("end")
        assert summary["env_steps"] == self.steps[-1]
        return {"ended": 1}


def test_every_event_comes_and_numbers_are_written(tmp_path: Path) -> None:
    """Catches an event that never comes or comes twice, and numbers that only one of our outputs has."""
    seen = Everything()
    run = shoal.train(config=SMALL, run_dir=tmp_path / "run", callbacks=[seen], progress=False)
    summary = read_summary(tmp_path / "run")
    assert (seen.events[0], seen.events[-1]) == ("start", "end")
    assert seen.events.count("update") == summary["policy_version"]
    assert seen.events.count("end") == 1
    assert seen.events.count("checkpoint") == -(-summary["policy_version"] // 5)
    assert seen.returns == summary["episodes"]
    assert seen.steps[-1] == run.summary["env_steps"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = {name: value for name, value in last.items() if name.startswith("callback/")}
    assert found == {
        "callback/my/updates": summary["policy_version"],
        "callback/half": 0.5,
        "callback/flag": 1,
        "callback/checkpoints": seen.events.count("checkpoint"),
        "callback/ended": 1,
    }


def test_evaluations_are_told(tmp_path: Path) -> None:
    """Catches evaluations that callbacks never hear of: they come from another thread."""

    class UntilEvaluated(Everything):
        def on_evaluation(self, run: Any, result: Any) -> None:
            super().on_evaluation(run, result)
            run.stop()

    seen = UntilEvaluated()
    more = {"evaluation.every_env_steps": 100, "evaluation.episodes": 4, "total_env_steps": 10**9}
    run = shoal.train(config=SMALL, run_dir=tmp_path / "run", callbacks=[seen], progress=False, max_seconds=200, **more)
    assert seen.events.count("evaluation") == 1
    assert run.summary["stopped_by"] == "callback"


def test_numbers_are_served(tmp_path: Path) -> None:
    """Catches names that Prometheus would refuse, and numbers that are not there."""
    pages: list[str] = []

    class Reads(shoal.Callback):
        def on_update(self, run: Any, update: Any) -> Mapping[str, float]:
            if update.policy_version == 3:
                port = json.loads(Path(run.config.metrics.file_sd).read_text())[0]["targets"][0]
                with urllib.request.urlopen(f"http://{port}/metrics", timeout=30) as answer:
                    pages.append(answer.read().decode())
            return {"my/number": update.policy_version}

    shoal.train(
        config=SMALL,
        run_dir=tmp_path / "run",
        callbacks=[Reads()],
        progress=False,
        **{"metrics.file_sd": tmp_path / "sd.json"},
    )
    assert 'shoal_callback{name="my/number"} 2.0' in pages[0]


class OfEach(shoal.Callback):
    """Notes what it is told of which of several policies, and sets how long games are."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.steps: dict[str, int] = {}
        self.returns: dict[str, int] = {}
        self.paths: list[Path] = []
        self.summary: Mapping[str, Any] = {}

    def on_start(self, run: Any) -> None:
        self.events.append(("start", ""))
        assert list(run.policies) == ["hunters", "runners"]
        assert run.run_dir.name == "run"

    def on_update(self, run: Any, update: Any) -> Mapping[str, float]:
        self.events.append(("update", update.policy))
        own = run.policies[update.policy]
        self.steps[update.policy] = update.env_steps
        assert update.policy_version == own.policy_version == self.events.count(("update", update.policy))
        assert update.env_steps == own.env_steps < run.env_steps
        # All have had their update before any is told.
        assert {each.policy_version for each in run.policies.values()} == {run.policy_version}
        assert own.policy.actions.flat_names == run.policies[update.policy].policy.actions.flat_names
        if len(self.events) > 9 and update.policy == "runners":
            run.stop()
        return {"steps": update.env_steps}

    def on_episodes(self, run: Any, episodes: Any) -> None:
        self.events.append(("episodes", episodes.policy))
        self.returns[episodes.policy] = self.returns.get(episodes.policy, 0) + len(episodes.returns)

    def on_checkpoint(self, run: Any, path: Path) -> Mapping[str, float]:
        self.paths.append(path)
        return {"checkpoints": len(self.paths)}

    def on_end(self, run: Any, summary: Mapping[str, Any]) -> None:
        self.events.append(("end", ""))
        self.summary = summary


GAMES = {
    **SMALL,
    "env.id": "pettingzoo:team_games:teams",
    "env.num_envs": 12,
    "learner.batch_size": 24,
    "learner.minibatches": 2,
    "policies": {"hunters": {"agents": ["hunter_*"]}, "runners": {"agents": ["runner_*"]}},
    "total_env_steps": 10**9,
}


def test_each_of_several_policies_is_told(tmp_path: Path) -> None:
    """Catches an update that is told as another policy's, events that come once per policy where there is one, numbers
    that end up with another policy, and a wish to stop that nobody heeds."""
    pytest.importorskip("pettingzoo")
    seen = OfEach()
    run = shoal.train(config=GAMES, run_dir=tmp_path / "run", callbacks=[seen], progress=False, max_seconds=200)
    assert run.summary["stopped_by"] == "callback"
    assert seen.summary == run.summary
    assert [seen.events.count((name, "")) for name in ("start", "end")] == [1, 1]
    updates = [policy for event, policy in seen.events if event == "update"]
    assert updates == ["hunters", "runners"] * (len(updates) // 2)
    assert [path.name for path in seen.paths] == [f"{run.summary['policy_version']:09d}"]
    for name in ("hunters", "runners"):
        summary = read_summary(tmp_path / "run" / "policies" / name)
        assert updates.count(name) == summary["policy_version"]
        assert seen.steps[name] == summary["env_steps"]
        assert seen.returns[name] == summary["episodes"] > 0
        last = json.loads((tmp_path / "run" / "policies" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["callback/steps"] == summary["env_steps"]
        assert last["callback/checkpoints"] == 1
    assert seen.steps["hunters"] != seen.steps["runners"]


def test_what_several_policies_have_each_for_itself_is_asked_of_one(tmp_path: Path) -> None:
    """Catches the network or the return of one policy that is taken for those of all; and the environments' options
    that reach no game, or that one policy's older weights take back."""
    pytest.importorskip("pettingzoo")

    class Asks(shoal.Callback):
        lengths: ClassVar[list[int]] = []

        def on_start(self, run: Any) -> None:
            run.set_env_options({"steps": 4})

        def on_episodes(self, run: Any, episodes: Any) -> None:
            self.lengths += episodes.lengths
            if len(self.lengths) > 100:
                assert run.mean_return

    with pytest.raises(shoal.CallbackFailed, match=r"this run trains hunters, runners: ask for run.policies\[NAME\]"):
        shoal.train(config=GAMES, run_dir=tmp_path / "run", callbacks=[Asks()], progress=False, max_seconds=200)
    # Runner 0 leaves after half of a game. The first games had begun before.
    assert set(Asks.lengths[-50:]) == {4, 2}


class Lengthens(shoal.Callback):
    """Makes episodes longer in its third update; ends the run at versions 8 and 16."""

    def __init__(self) -> None:
        self.count, self.given, self.lengths = 0, {}, []

    def on_start(self, run: Any) -> None:
        self.given = run.env_options

    def on_update(self, run: Any, update: Any) -> None:
        self.count += 1
        if self.count == 3:
            run.set_env_options({"steps": 6})
        if update.policy_version in (8, 16):
            run.stop()

    def on_episodes(self, run: Any, episodes: Any) -> None:
        self.lengths += episodes.lengths

    def state_dict(self) -> Mapping[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("layout", ["local", "colocated", "several policies"])
def test_options_and_states_go_on_in_every_layout(tmp_path: Path, layout: str) -> None:
    """Catches a curriculum that is lost in a resumed run whose actors are processes of their own, or whose games
    several policies play: only in one process was it kept."""
    alone = {**SMALL, "env.id": "optioned_envs:Lasting", "mode": "local", "total_env_steps": 10**9}
    shared = {name: value for name, value in alone.items() if name != "learner.batch_size"}
    settings = {
        "local": alone | {"actor.num_actors": 2},
        "colocated": shared | {"placement": "colocated", "learner.num_learners": 2},
        "several policies": GAMES,
    }[layout]
    if layout == "several policies":
        pytest.importorskip("pettingzoo")
    first, second = Lengthens(), Lengthens()
    for callback in (first, second):
        arguments: Any = {"config": settings, "run_dir": tmp_path / "run", "callbacks": [callback]}
        assert shoal.train(**arguments, progress=False, max_seconds=200).summary["stopped_by"] == "callback"
    assert (first.given, second.given) == (None, {"steps": 6})
    assert second.count > first.count >= 8
    # The first episodes of new actors had begun before. Runner 0 leaves after half of a game.
    assert len(second.lengths) > 20
    assert set(second.lengths[16:]) <= {6, 3}
    assert 6 in second.lengths


class Breaks(shoal.Callback):
    """Raises in its third update, or answers something else."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.count, self.ended = answer, 0, False

    def on_update(self, run: Any, update: Any) -> Any:
        self.count += 1
        if self.count < 3:
            return None
        if self.answer is None:
            raise ZeroDivisionError("my own mistake")
        return self.answer

    def on_end(self, run: Any, summary: Mapping[str, Any]) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "Breaks.on_update: ZeroDivisionError: my own mistake"),
        ([1], "Breaks.on_update: TypeError: expected a mapping of numbers by name, or None, got"),
        ({"ok": "fast"}, "Breaks.on_update: ValueError: could not convert string to float"),
        ({"2bad": 1}, "the name '2bad' must be a letter and at most 63"),
        (
            {f"n{number}": 1 for number in range(101)},
            "'n100' is one name too many: the callbacks of a run may name 100",
        ),
    ],
)
def test_a_callback_that_fails_ends_the_run_with_its_name(tmp_path: Path, answer: Any, expected: str) -> None:
    """Catches an error that is swallowed, that loses what was trained, or that does not say whose it is."""
    broken = Breaks(answer)
    with pytest.raises(shoal.CallbackFailed, match=r".*") as caught:
        shoal.train(config=SMALL, run_dir=tmp_path / "run", callbacks=[broken], progress=False)
    assert expected in str(caught.value)
    assert isinstance(caught.value.__cause__, Exception)
    assert broken.ended
    assert shoal.load_policy(tmp_path / "run").network.kind == "fast"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000003"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["books_balance"]


def test_callbacks_named_in_the_settings(tmp_path: Path) -> None:
    """Catches names that are resolved elsewhere than the user's environments, problems told after the start, and a
    traceback of a module that raises while it is imported."""
    (tmp_path / "mine.py").write_text(
        "import shoal\n"
        "class Stop(shoal.Callback):\n"
        "    def __init__(self, at): self.at = at\n"
        "    def on_update(self, run, update):\n"
        "        if update.policy_version == self.at: run.stop()\n"
        "        return {'version': update.policy_version}\n"
    )
    (tmp_path / "wrong.py").write_text("raise RuntimeError('no licence')\n")
    settings = [f"{name}={value}" for name, value in SMALL.items()] + ["run_dir=run", "metrics.port=-1"]
    done = command_line("train", *settings, "callbacks=[{name: mine:Stop, kwargs: {at: 4}}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Done: a callback ended it." in done.stdout
    assert read_summary(tmp_path / "run")["policy_version"] == 4
    for callbacks, expected in (
        ("[mine:Stop]", "callbacks: mine:Stop: missing a required argument: 'at'"),
        ("[mine:Go]", "callbacks: mine:Go: mine has no Go"),
        ("[wrong:Go]", "callbacks: wrong:Go: wrong cannot be imported: RuntimeError: no licence ("),
        ("[no_such_module:Go]", "callbacks: no_such_module:Go: there is no module 'no_such_module' here"),
    ):
        done = command_line("train", *settings, f"callbacks={callbacks}", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert expected in done.stderr


def test_a_callback_that_exits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that ends with the user's exit code and without a word, when a callback's module is imported
    or the callback is made."""
    (tmp_path / "exits_at_import.py").write_text("raise SystemExit('no')\n")
    (tmp_path / "exits_when_made.py").write_text("class Go:\n    def __init__(self): raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    at_import, when_made = CallbackConfig(name="exits_at_import:Go"), CallbackConfig(name="exits_when_made:Go")
    [problem] = check_callbacks([at_import, when_made])
    assert problem.startswith(
        "callbacks: exits_at_import:Go: exits_at_import ends the program (exit 'no') where it is "
    )
    with pytest.raises(ValueError, match=r"^callbacks: exits_when_made:Go: SystemExit: 3"):
        make_callbacks([when_made], [])


def test_something_else_than_a_callback_is_refused(tmp_path: Path) -> None:
    """Catches a class given in place of an instance, whose methods would lack themselves."""
    with pytest.raises(shoal.ConfigError, match=r"expected a shoal.Callback, got .*Everything.*; give an instance"):
        shoal.train(config=SMALL, run_dir=tmp_path / "run", callbacks=[Everything])  # type: ignore[list-item]
