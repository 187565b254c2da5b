"""What differs between two configurations, what a run that goes on says of it, and what it keeps."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from recorded_runs import config as recorded
from recorded_runs import lines, summary, write_run
from report_pages import report
from rollouts import make_learner, tiny_policy
from shoal.deploy.cli import main
from shoal.deploy.settings.differences import differences
from shoal.deploy.settings.earlier import changes_of, earlier_file, keep
from shoal.deploy.settings.load import dump, load_config, read_settings, to_dict
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.changed_settings import MOST_LINES, changed_settings, tell
from shoal.learner.checkpoint import Checkpoint, Checkpoints

LEDGER = {"sampled": 0, "trained": 0, "in_flight": 0, "dropped": {}}
SCHEDULE = "learner.schedules.clip_coef={kind: linear, end: 0.1}"


def settings(*arguments: str) -> dict[str, Any]:
    config, problems = load_config([], arguments)
    assert not problems
    return to_dict(config)


def said(*arguments: str, before: dict[str, Any] | None = None) -> list[str]:
    found = differences(to_dict(Config()) if before is None else before, settings(*arguments))
    return [str(change) for change in found.changed]


def checkpoint_of(run: Path, config: dict[str, Any], **state: Any) -> Checkpoint:
    """A checkpoint that a run with these settings saved."""
    common = {"run_id": "one", "session": 0, "ledger": LEDGER, "config": config, "run_dir": str(run)}
    Checkpoints(run / "checkpoints").save(make_learner(tiny_policy()), common | state)
    found = Checkpoints(run / "checkpoints").latest()
    assert found
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["learner.gamma=0.95", "seed=7"], ["seed 0 -> 7", "learner.gamma 0.99 -> 0.95"]),
        (["actor.num_actors=4"], ["actor.num_actors auto -> 4"]),
        (["env.kwargs={a: 1, b: ''}"], ["env.kwargs.a (not set) -> 1", 'env.kwargs.b (not set) -> ""']),
        (["env.wrappers=[m:W]"], ['env.wrappers [] -> ["m:W"]']),
        (["learner.refresh_states=true"], ["learner.refresh_states false -> true"]),
    ],
)
def test_each_setting_is_one_change(arguments: list[str], expected: list[str]) -> None:
    """Catches a change that is missed, told twice or told of a section, and equal settings that are told."""
    assert said(*arguments) == expected


def test_an_entry_of_a_mapping_is_there_as_a_whole() -> None:
    """Catches a schedule that is added and told in five lines, and one that is taken for a new setting of shoal."""
    (added,) = said(SCHEDULE)
    assert added.startswith('learner.schedules.clip_coef (not set) -> {"kind": "linear"')
    changed = said(SCHEDULE.replace("0.1", "0.2"), before=settings(SCHEDULE))
    assert changed == ["learner.schedules.clip_coef.end 0.1 -> 0.2"]


def test_the_form_of_a_value_is_no_change() -> None:
    """Catches tuples that differ from the lists of a file, whole floats from integers, and true that equals 1."""
    before = {"env": {"kwargs": {"sizes": (1, 2), "scale": 1.0, "on": True}}}
    after = {"env": {"kwargs": {"sizes": [1, 2], "scale": 1, "on": 1}}}
    assert [str(change) for change in differences(before, after).changed] == ["env.kwargs.on true -> 1"]


def test_settings_of_an_older_shoal_are_no_changes_of_the_user() -> None:
    """Catches thirty new defaults that are told as changes, and a new setting that was given and is not told."""
    older = to_dict(Config())
    for name in ("regularization", "loss_kwargs", "precision"):
        del older["learner"][name]
    del older["self_play"]
    older["learner"]["momentum"] = 0.9
    found = differences(older, settings("learner.precision=float32"))
    assert [str(change) for change in found.changed] == ["learner.precision (not set) -> float32"]
    assert {"learner.loss_kwargs", "self_play.share"} < set(found.new)
    assert found.gone == ("learner.momentum",)
    assert "\n" not in found.unknown()
    assert len(found.unknown()) < 300


def test_any_plain_data_is_compared() -> None:
    """Catches an exception, which would end a run, about a saved configuration of another form."""
    for junk in ({}, {"env": 5}, {"env": None, "learner": []}, {"learner": {"schedules": "x"}}, {"policies": {"a": 1}}):
        assert differences(junk, to_dict(Config())) or junk == {}
        differences(to_dict(Config()), junk)


def warned(caplog: pytest.LogCaptureFixture, run: Path, before: dict[str, Any], *arguments: str) -> list[str]:
    caplog.clear()
    saved = checkpoint_of(run, before)
    config, problems = load_config([], arguments)
    assert not problems
    tell(changed_settings(config, saved), saved, run)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_said_of_changed_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a change of what is learned that is silent, and words about where a run is kept and watched."""
    run = tmp_path / "run"
    before = settings("learner.gamma=0.9")
    quiet = ("metrics.port=0", "log.every_seconds=3", "run_dir=x", "checkpoint.keep=5", "max_seconds=9")
    assert warned(caplog, run, before, "learner.gamma=0.9", *quiet) == []
    first, second, hint = warned(caplog, run, before, "seed=1")
    assert first == "settings changed since version 0: seed 0 -> 1"
    assert second == "settings changed since version 0: learner.gamma 0.9 -> 0.99 (the default)"
    assert f"--config {earlier_file(run, 0)}" in hint
    (given,) = warned(caplog, run, before, "learner.gamma=0.8")
    assert given.endswith("learner.gamma 0.9 -> 0.8")


def test_many_changes_are_counted_and_the_environment_comes_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a wall of lines, in which another game goes unnoticed."""
    numbers = ("epochs", "minibatches", "batch_size", "rho_bar", "c_bar", "clip_coef", "value_coef", "entropy_coef")
    more = ("max_grad_norm", "adam_eps", "learning_rate", "max_skipped_updates", "value_clip_coef")
    given = [f"learner.{name}={6 if name != 'batch_size' else 48}" for name in (*numbers, *more)]
    found = warned(caplog, tmp_path / "run", to_dict(Config()), *given, "seed=1", "env.kwargs.delay=3")
    assert "env.kwargs.delay (not set) -> 3" in found[0]
    assert found[MOST_LINES] == "settings changed since version 0: and 3 more"
    assert "are not of the same game" in found[MOST_LINES + 1]
    assert len(found) == MOST_LINES + 2


def test_imported_weights_had_no_settings(tmp_path: Path) -> None:
    """Catches weights of another trainer, whose run is told that it differs from the defaults."""
    saved = checkpoint_of(tmp_path / "run", to_dict(Config()), imported_from="weights.pt")
    assert not changed_settings(load_config([], ["learner.gamma=0.5"])[0], saved)


def test_settings_that_trained_a_version_are_kept(tmp_path: Path) -> None:
    """Catches the ``config.yaml`` of a session that trained nothing in place of the settings that did."""
    trained = settings("actor.max_policy_lag=2")
    (tmp_path / "config.yaml").write_text(dump(settings("learner.gamma=0.5")))
    keep(tmp_path, 6, trained)
    assert read_settings(earlier_file(tmp_path, 6)) == trained


def test_a_session_that_trained_nothing_takes_no_settings_away(tmp_path: Path) -> None:
    """Catches settings that trained a version and are replaced by those of a session that only saved it again."""
    for gamma in (0.9, 0.8):
        (tmp_path / "config.yaml").write_text(dump(now := settings(f"learner.gamma={gamma}")))
        keep(tmp_path, 5, now)
    assert read_settings(earlier_file(tmp_path, 5))["learner"]["gamma"] == 0.9


def test_a_run_that_lost_versions_lost_their_settings(tmp_path: Path) -> None:
    """Catches changes at versions that are no longer in the run, out of order."""
    for version, gamma in ((3, 0.9), (8, 0.8), (5, 0.7)):
        (tmp_path / "config.yaml").write_text(dump(now := settings(f"learner.gamma={gamma}")))
        keep(tmp_path, version, now)
    (tmp_path / "config.yaml").write_text(dump(settings()))
    (tmp_path / "configs" / "until_x.yaml").write_text("")
    found = [(at.version, *map(str, at.differences.changed)) for at in changes_of(tmp_path)]
    assert found == [(3, "learner.gamma 0.9 -> 0.7"), (5, "learner.gamma 0.7 -> 0.99")]


def test_the_report_says_where_settings_changed(tmp_path: Path) -> None:
    """Catches a page that shows the last settings as those of the whole run."""
    last = lines()[-1]
    run = write_run(tmp_path / "run", settings=recorded(learner__gamma=0.95), ended=summary(last))
    assert "Settings that changed" not in report(run).text
    before = copy.deepcopy(yaml.safe_load((run / "config.yaml").read_text()))
    before["learner"]["gamma"] = 0.5
    (run / "configs").mkdir()
    (run / "configs" / "until_1200.yaml").write_text(yaml.safe_dump(before))
    text = " ".join(report(run).text.split())
    assert "Settings that changed" in text
    assert "1,200 learner.gamma 0.5 0.95" in text


def test_config_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches sides that are exchanged, defaults that are taken for a side, and bad input that is compared."""

    def diff(*named: object) -> tuple[int, str, str]:
        code = main(["config", "diff", *map(str, named)])
        return code, *capsys.readouterr()

    for name, gamma in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(settings(f"learner.gamma={gamma}")))
    a, b = tmp_path / "a", tmp_path / "b"
    assert diff(a, b) == (0, "learner.gamma 0.5 -> 0.6\n", "")
    assert diff(a, b / "config.yaml") == diff(a, b)
    assert diff(a, a) == (0, "no setting differs\n", "")
    assert diff(a) == (0, "learner.gamma 0.99 -> 0.5\n", "")
    assert diff("seed=3", "learner.gamma=0.4") == (0, "seed 0 -> 3\nlearner.gamma 0.99 -> 0.4\n", "")
    assert diff(a, "seed=3") == (0, "seed 0 -> 3\nlearner.gamma 0.5 -> 0.99\n", "")
    assert diff("seed=3", a) == diff(a, "seed=3")
    for refused in ([a, b, "seed=3"], [tmp_path], [tmp_path / "none"], [a, "sed=3"]):
        code, out, err = diff(*refused)
        assert (code, out) == (2, "")
        assert "nothing was started" in err
