"""Sinks of the user's: found by name, tried before the run, and called in a thread of their own that harms nothing."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import shoal
from service import SHARED, SMALL, read_summary, start_shoal
from service import shoal as command_line
from shoal import given
from shoal.deploy.doctor import preflight
from shoal.deploy.monitoring.sinks import check_sinks
from shoal.deploy.settings.load import load_config, to_yaml
from shoal.deploy.settings.sections import CallbackConfig, LogConfig, SinkConfig
from shoal.deploy.training.callbacks import check_callbacks

NOTES = """
import json, os, threading
from pathlib import Path
import shoal

class Notes(shoal.Sink):
    def __init__(self, file):
        self.file = file

    def note(self, what, told):
        thread = threading.current_thread()
        said = {"what": what, "told": told, "pid": os.getpid(), "thread": [thread.ident, thread.name]}
        self.out.write(json.dumps(said) + chr(10))

    def open(self, run):
        self.out = (run.directory / self.file).open("a")
        self.note("open", [run.id, run.name, run.project, run.policy, run.config["seed"]])

    def write(self, line):
        self.note("write", dict(line))
        line.clear()

    def close(self):
        self.note("close", None)
        self.out.close()

class Exits(Notes):
    def write(self, line):
        raise SystemExit("enough")
"""
BY_NAME = "log.sinks=[{name: notes:Notes, kwargs: {file: one}}, {name: notes:Notes, kwargs: {file: two}}]"
NOTED = ("log.every_seconds=0.3", "log.project=mine", "run_dir=run", "evaluation.random_seconds=0")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_notes(run: Path, pid: int, session: int = 0) -> None:
    """Both sinks had all lines of the session, in order, in the run's process and their own threads."""
    wanted = [line for line in lines(run / "metrics.jsonl") if line["session"] == session]
    threads = set()
    for name in ("one", "two"):
        noted = [one for one in lines(run / name) if one["pid"] == pid]
        assert [one["what"] for one in noted] == ["open", *["write"] * len(wanted), "close"]
        assert [one["told"] for one in noted[1:-1]] == wanted
        assert noted[0]["told"][1:] == ["run", "mine", "", 0]
        [thread] = {tuple(one["thread"]) for one in noted}
        assert thread[1] == "log-notes:Notes"
        threads.add(thread[0])
    assert len(threads) == 2
    assert wanted[-1]["env_steps"] == read_summary(run)["env_steps"]
    assert len({one["told"][0] for one in lines(run / "one") if one["what"] == "open"}) == 1  # the id


@pytest.mark.parametrize(
    "settings",
    [
        (*SMALL, "mode=inline"),
        (*SMALL, "mode=local", "actor.num_actors=2"),
        (*SHARED, "mode=local", "placement=colocated", "learner.num_learners=2"),
    ],
    ids=["inline", "disaggregated", "colocated"],
)
def test_a_sink_gets_every_line_in_the_process_of_the_run(settings: tuple[str, ...], tmp_path: Path) -> None:
    """Catches a sink in an actor or a peer learner, one that is opened in another thread than it writes in (which
    sqlite3 refuses), one that hands its changes of a line to the next, and lines or a call that never come."""
    (tmp_path / "notes.py").write_text(NOTES)
    for session, steps in enumerate((1500, 3000)):
        more = (*NOTED, BY_NAME, f"total_env_steps={steps}")
        process = start_shoal("train", *settings, *more, cwd=tmp_path)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        check_notes(tmp_path / "run", process.pid, session)


def test_a_sink_that_exits_costs_the_run_nothing(tmp_path: Path) -> None:
    """Catches SystemExit, which ends a thread without a word, and a sink that is not closed after it."""
    (tmp_path / "notes.py").write_text(NOTES)
    done = command_line(
        *("train", *SMALL, "mode=inline", *NOTED, "total_env_steps=1500"),
        "log.sinks=[{name: notes:Exits, kwargs: {file: one}}]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = "log.sinks: notes:Exits failed and gets no more lines; metrics.jsonl has them all: SystemExit: enough"
    assert done.stderr.count(expected) == 1
    assert [one["what"] for one in lines(tmp_path / "run" / "one")] == ["open", "close"]


HEAD = "import shoal\nclass Mine(shoal.Sink):\n    "
WRITES = "\n    def write(self, line): pass\n"


@pytest.mark.parametrize(
    ("code", "sink", "expected"),
    [
        ("", "no_such_sinks:Mine", "no_such_sinks:Mine: there is no module 'no_such_sinks' here; install the package"),
        ("import no_such_tracker", "mine:Mine", "mine:Mine: there is no module 'no_such_tracker' here; install"),
        ("", "mine:Mine", "mine:Mine: mine has no class Mine"),
        ("1 / 0", "mine:Mine", "mine:Mine: mine cannot be imported: ZeroDivisionError: division by zero ("),
        ("raise SystemExit('no')", "mine:Mine", "mine:Mine: mine ends the program (exit 'no') where it"),
        ("int('x')", "mine:Mine", "mine:Mine: mine cannot be imported: ValueError: invalid literal for int"),
        ("def Mine(): pass", "mine:Mine", "mine:Mine: expected a subclass of shoal.Sink, got <function Mine at"),
        ("class Mine:" + WRITES, "mine:Mine", "mine:Mine: expected a subclass of shoal.Sink, got <class 'mine.Mine'>"),
        (HEAD + "pass", "mine:Mine", "mine:Mine: is a shoal.Sink that does not define write"),
        (
            HEAD + "def __init__(self, file): pass" + WRITES,
            "mine:Mine",
            "mine:Mine: missing a required argument: 'file'; its kwargs are {}",
        ),
        (
            HEAD + "pass" + WRITES,
            "{name: mine:Mine, kwargs: {a: 1}}",
            "mine:Mine: got an unexpected keyword argument 'a'; its kwargs are {'a': 1}",
        ),
        (
            HEAD + "def __init__(self, a): raise KeyError('no a')" + WRITES,
            "{name: mine:Mine, kwargs: {a: 1}}",
            "mine:Mine cannot be made with the kwargs {'a': 1}: KeyError: 'no a' (",
        ),
        (
            HEAD + "def __init__(self): raise SystemExit(3)" + WRITES,
            "mine:Mine",
            "mine:Mine cannot be made with the kwargs {}: SystemExit: 3 (",
        ),
        (HEAD + "def write(self): pass", "mine:Mine", "mine:Mine: write must take (line): too many positional"),
        (HEAD + "def open(self): pass" + WRITES, "mine:Mine", "mine:Mine: open must take (run): too many positional"),
        (HEAD + "async def close(self): pass" + WRITES, "mine:Mine", "mine:Mine: close is a coroutine function, which"),
    ],
)
def test_what_is_wrong_with_a_sink_is_said_before_the_run(
    code: str, sink: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, a sink that fails at its first line a day later, and a problem that hides the others."""
    (tmp_path / "mine.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    settings = ["env.id=no_such_environment", "metrics.port=-1", f"log.sinks=[{sink}]", "callbacks=[mine:Nothing]"]
    config, problems = load_config((), settings)
    assert problems == []
    found = preflight.check(config, tmp_path / "run")
    assert {problem.partition(":")[0] for problem in found} == {"env.id", "log.sinks", "callbacks"}
    [problem] = [problem for problem in found if problem.startswith("log.sinks")]
    assert problem.startswith(f"log.sinks: {expected}")
    assert "\n" not in problem


def test_what_does_not_tell_its_arguments_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches builtins and compiled functions that are refused because they have no signature."""
    (tmp_path / "compiled.py").write_text(
        "import shoal\nclass Mine(shoal.Sink):\n    write = staticmethod(max)\n    def __init__(self, a): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(max)
    assert check_sinks(LogConfig(sinks=[SinkConfig(name="compiled:Mine", kwargs={"a": 1})])) == []
    assert check_callbacks([CallbackConfig(name="builtins:max", kwargs={"key": 1})]) == []


def test_sinks_that_cannot_be_opened_are_all_said(tmp_path: Path) -> None:
    """Catches a run that is started without its sink, the second problem told after the first is mended, and a sink
    that stays open."""
    (tmp_path / "notes.py").write_text(
        NOTES
        + "class NoServer(Notes):\n    def open(self, run): raise ConnectionError('no server')\n"
        + "class NoKey(Notes):\n    def open(self, run): raise SystemExit('no key')\n"
    )
    names = ("Notes", "NoServer", "NoKey")
    sinks = ", ".join(f"{{name: notes:{name}, kwargs: {{file: {name}}}}}" for name in names)
    done = command_line("train", *SMALL, "mode=inline", *NOTED, f"log.sinks=[{sinks}]", cwd=tmp_path)
    assert done.returncode == 2
    assert "log.sinks: notes:NoServer cannot be started: ConnectionError: no server (" in done.stderr
    assert "log.sinks: notes:NoKey cannot be started: " in done.stderr
    assert "SystemExit: no key (" in done.stderr
    assert "Traceback" not in done.stderr
    assert [one["what"] for one in lines(tmp_path / "run" / "Notes")] == ["open", "close"]
    assert not (tmp_path / "run" / "config.yaml").exists()


class Kept(shoal.Sink):
    """A class that no other process finds by its name."""

    seen: ClassVar[list[tuple[str, list[Any]]]] = []

    def __init__(self, word: str = "none") -> None:
        self.word = word

    def open(self, run: shoal.LoggedRun) -> None:
        self.lines: list[Any] = []
        self.seen.append((self.word, self.lines))

    def write(self, line: Any) -> None:
        self.lines.append(line["env_steps"])


def test_classes_in_place_of_names(tmp_path: Path) -> None:
    """Catches a class of a notebook that its own process does not find, one whose arguments are lost, and an instance,
    which several policies would share."""
    Kept.seen.clear()
    config = shoal.Config(env="recall", mode="inline", log={"sinks": [Kept, {"name": Kept, "kwargs": {"word": "two"}}]})
    shoal.train(config=config, run_dir=tmp_path / "run", total_env_steps=1000, progress=False)
    assert [word for word, _ in Kept.seen] == ["none", "two"]
    assert all(steps[-1] >= 1000 for _, steps in Kept.seen)
    assert f"{Kept.__module__}:Kept" in (tmp_path / "run" / "config.yaml").read_text()
    given.sinks.pop(f"{Kept.__module__}:Kept", None)
    for wrong in (Kept(), dict, 5, {"name": Kept()}):
        with pytest.raises(shoal.ConfigError, match=r"log\.sinks: expected a subclass of shoal\.Sink, got .*; give"):
            shoal.Config(log={"sinks": [wrong]})


def test_names_and_mappings_are_written_and_read_back(tmp_path: Path) -> None:
    """Catches settings of a run that the next session does not read, and those of older runs, which are names alone."""
    config, problems = load_config((), ["log.sinks=[tensorboard, {name: a.b:C, kwargs: {size: 3}}]"])
    assert problems == []
    assert config.log.sinks == [SinkConfig(name="tensorboard"), SinkConfig(name="a.b:C", kwargs={"size": 3})]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")], []) == (config, [])
