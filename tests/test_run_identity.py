"""Whether a run that goes on is the same one: wherever its files lie, and whatever they are named by."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rollouts import make_learner, tiny_policy
from service import SMALL
from shoal.deploy.cli import main
from shoal.deploy.settings.sections import Config
from shoal.deploy.training import resume
from shoal.deploy.training.resume import Origin, find_origin
from shoal.learner.checkpoint import Checkpoints, find_checkpoint

LEDGER = {"sampled": 0, "trained": 0, "in_flight": 0, "dropped": {}}


def save(run: Path, run_id: str = "first", **state: Any) -> None:
    """Save a checkpoint as a run in ``run`` does."""
    common = {"run_id": run_id, "session": 0, "ledger": LEDGER, "config": {}, "run_dir": str(run.resolve())}
    Checkpoints(run / "checkpoints").save(make_learner(tiny_policy()), common | state)


def go_on(run: Path | str, by: str = "auto") -> Origin:
    Path(run).mkdir(parents=True, exist_ok=True)
    return find_origin(dataclasses.replace(Config(), resume=by), Checkpoints(Path(run).absolute() / "checkpoints"))


def moved_behind_link(path: Path, storage: Path) -> None:
    """Move ``path`` to other storage, and leave a link to it."""
    storage.mkdir()
    shutil.move(path, storage / path.name)
    path.symlink_to(storage / path.name)


def link_checkpoints(run: Path) -> str:
    moved_behind_link(run / "checkpoints", run.parent / "scratch")
    return str(run)


def link_each_checkpoint(run: Path) -> str:
    moved_behind_link(find_checkpoint(run).path, run.parent / "scratch")
    return str(run)


def link_run(run: Path) -> str:
    moved_behind_link(run, run.parent / "scratch")
    return str(run)


def link_parent(run: Path) -> str:
    (run.parent / "other").symlink_to(run.parent)
    return str(run.parent / "other" / run.name)


def relative(run: Path) -> str:
    return os.path.relpath(run)


def move(run: Path) -> str:
    shutil.move(run, run.parent / "moved")
    return str(run.parent / "moved")


def move_and_begin_another(run: Path) -> str:
    shutil.move(run, run.parent / "moved")
    save(run, "another")
    return str(run.parent / "moved")


CHANGES = [
    link_checkpoints,
    link_each_checkpoint,
    link_run,
    link_parent,
    relative,
    move,
    move_and_begin_another,
]


@pytest.mark.parametrize("named", [False, True], ids=["auto", "by-name"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_whose_files_lie_elsewhere_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], str], named: bool
) -> None:
    """Catches ``checkpoints`` on other storage, a usual thing on clusters, or a run that was moved, that makes every
    resume a new run: its tracked curves split, its statistics and environments begin anew, and nothing says so."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run")
    where = change(tmp_path / "run")
    origin = go_on(where, where if named else "auto")
    assert (origin.run_id, origin.same_run, origin.session) == ("first", True, 1)


@pytest.mark.parametrize("place", ["runs", "runs/a/inside", "runs/a/checkpoints", "runs/b"])
def test_a_run_around_or_inside_the_one_that_it_goes_on_from_is_a_fork(tmp_path: Path, place: str) -> None:
    """Catches a run that takes the identity of another one because their directories lie in each other."""
    save(tmp_path / "runs" / "a")
    origin = go_on(tmp_path / place, str(tmp_path / "runs" / "a"))
    assert origin.run_id != "first"
    assert not origin.same_run


def test_a_copy_of_a_run_is_a_run_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches two runs that write into one of W&B's, because a copied directory has the run_id of the original; and an
    original, or a copy that has gone on, that is taken for the copy."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run)
    shutil.copytree(run, copy)
    for by in ("auto", str(copy)):
        caplog.clear()
        origin = go_on(copy, by)
        assert origin.run_id != "first"
        assert origin.same_run  # its files are all here: statistics and environments go on
        [said] = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert said == f"{copy} is a copy of {run}: it goes on as a run of its own, with the new run_id {origin.run_id}"
    save(copy, origin.run_id)
    assert go_on(copy).run_id == origin.run_id
    assert go_on(run).run_id == "first"
    assert sorted(path.name for path in copy.iterdir()) == ["checkpoints"]


def test_what_stays_of_a_copy_once_the_original_is_gone_is_the_run(tmp_path: Path) -> None:
    """Catches a run that is split by a move to another file system, which copies and removes."""
    save(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    assert go_on(tmp_path / "copy").run_id == "first"


def test_storage_that_is_mounted_twice_holds_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is taken for a copy of itself where its directory has two paths, which may have other devices
    and inodes; a link stands for the second mount here."""
    save(tmp_path / "run")
    (tmp_path / "mount").symlink_to(tmp_path)
    monkeypatch.setattr(Path, "resolve", lambda path: path)
    monkeypatch.setattr(Path, "samefile", lambda path, other: False)
    assert go_on(tmp_path / "mount" / "run").run_id == "first"


@pytest.mark.parametrize("run_dir", ["", "run", "\0", 7, None, "/proc/self", "/dev/null"])
def test_where_no_original_can_be_told_the_run_stays_the_same(tmp_path: Path, run_dir: Any) -> None:
    """Catches a checkpoint of an earlier version, or one that was edited, that cannot be resumed."""
    save(tmp_path / "run", run_dir=run_dir)
    assert go_on(tmp_path / "run").run_id == "first"


def test_a_copied_run_goes_on_exactly_beside_the_original(tmp_path: Path) -> None:
    """Catches checkpoints that do not say where the run lies; and a run that goes on from its storage or in a copy, but
    with its environments begun anew."""
    settings = ["mode=inline", "metrics.port=-1", "evaluation.random_seconds=0"]
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert main(["train", *SMALL, *settings, f"run_dir={run}", "total_env_steps=200"]) == 0
    link_checkpoints(run)
    shutil.copytree(run, copy)
    found = {}
    for path in (run, copy):
        assert main(["train", *SMALL, *settings, f"run_dir={path}", "total_env_steps=400"]) == 0
        assert "slots go on where they were" in (path / "run.log").read_text()
        found[path] = json.loads((path / "summary.json").read_text())["weights_sha256"], find_checkpoint(path)
    assert found[run][0] == found[copy][0]
    assert found[run][1].state["run_id"] != found[copy][1].state["run_id"]
    assert found[run][1].state["run_dir"] == str(run.resolve())


def test_ids_are_read_of_what_can_be_read(tmp_path: Path) -> None:
    """Catches an original with one damaged checkpoint that is overlooked, or ends the copy."""
    save(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "000000009"
    damaged.mkdir()
    (damaged / "state.json").write_text("[")
    assert resume._run_ids(tmp_path / "run") == {"first"}
