"""Runs of several policies: what reports, checkpoints, commands and summaries say where it is not the usual case."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import config, lines, summary, write_run
from rollouts import make_learner, small_policy
from shoal.deploy.doctor import preflight
from shoal.deploy.evaluation.evaluate import evaluation_setup
from shoal.deploy.report import headline
from shoal.deploy.report.comparison import group_runs
from shoal.deploy.report.recorded_run import RecordedRun, read_run
from shoal.deploy.settings.load import load_config
from shoal.deploy.training.summary import together
from shoal.learner.checked_files import fingerprint
from shoal.learner.checkpoint import CheckpointError, Checkpoints, find_checkpoint, find_saved
from shoal.learner.recorded_updates import RecordError, recorded_names

NAMES = ("hunters", "runners")
POLICIES = ("policies.hunters.agents=[hunter_*]", "policies.runners.agents=[runner_*]")
CONFIG = {
    "env": {"num_envs": 12},
    "actor": {"unroll_length": 8},
    "policy": {},
    "policies": {"hunters": {"agents": ["hunter_*"]}, "runners": {"agents": ["runner_*"]}},
}
LEDGER = {"sampled": 9, "trained": 5, "in_flight": 1, "dropped": {"stale": 3}}
RUN = {"run_id": "a-run", "session": 0, "ledger": LEDGER, "config": CONFIG}
OWN = {**RUN, "env_id": "pettingzoo:team_games:teams", "env_kwargs": {}, "mean_return": 1.0}


def recorded(tmp_path: Path, *, trained: int | None, failed: bool = False, **settings: Any) -> dict[str, RecordedRun]:
    """A run of two policies as its directory has it, ``trained`` steps of all in its summary; each as it is read."""
    run, written = tmp_path / "run", lines(10)
    for name in NAMES:
        ended = (
            summary(written[-1], policy=name, weights_sha256=None if failed else "0") if trained is not None else None
        )
        write_run(
            run / "policies" / name, written, settings=config(policies=CONFIG["policies"], **settings), ended=ended
        )
        (run / "policies" / name / "run.log").unlink()
    (run / "config.yaml").write_text("")
    (run / "run.log").write_text("2026-11-30 04:00:00,000 WARNING shoal.x: the board fell off the table\n")
    if trained is not None:
        (run / "summary.json").write_text(json.dumps({"env_steps": trained}))
        os.utime(run / "summary.json", (2e9, 2e9))
    if failed:
        (run / "traceback.txt").write_text("Traceback\nOSError: no board\n")
        os.utime(run / "traceback.txt", (2e9 + 1, 2e9 + 1))
    return {name: read_run(run / "policies" / name) for name in NAMES}


def ending(run: RecordedRun) -> str:
    return " ".join(note.text for note in headline.lead(run))


def test_a_failed_run_failed_for_each_of_its_policies(tmp_path: Path) -> None:
    """Catches a traceback and a log that are looked for in the folder of a policy, so that a crash is told as well."""
    for run in recorded(tmp_path, trained=1_800_000, failed=True).values():
        assert run.failure == "OSError: no board"
        assert run.complaints.warnings == 1
        assert "It failed after 1,800,000 of the 2,500,000 environment steps asked for, 900,000 of them" in ending(run)


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (
            2_500_000,
            "It ended as it should: all of the 2,500,000 environment steps asked for were trained on, 900,000 of them",
        ),
        (
            1_800_000,
            "It ended with 1,800,000 of the 2,500,000 environment steps asked for, 900,000 of them of this policy.",
        ),
        (None, "with 900,000 environment steps of this policy."),
    ],
)
def test_a_policys_steps_are_no_share_of_the_runs_goal(tmp_path: Path, trained: int | None, said: str) -> None:
    """Catches a finished run that is told as ended too soon, because its goal is of all policies together."""
    for run in recorded(tmp_path, trained=trained, max_seconds=0.0).values():
        assert said in ending(run)


def test_a_failure_that_a_program_was_given_is_told(tmp_path: Path) -> None:
    """Catches a run that failed under shoal.train, which writes no traceback, told as one that ended well."""
    written = lines(10)
    run = read_run(write_run(tmp_path / "run", written, ended=summary(written[-1], weights_sha256=None)))
    assert "It failed after" in ending(run)


def test_a_run_in_a_folder_named_policies_is_a_run(tmp_path: Path) -> None:
    """Catches seeds that are told apart by a setting that nobody made, because of the name of their folder."""
    runs = [write_run(tmp_path / "policies" / f"run{seed}", settings=config(seed=seed)) for seed in (0, 1)]
    groups = group_runs([read_run(path) for path in runs])
    assert [group.seeds for group in groups] == [["0", "1"]]
    assert [run.policy for group in groups for run in group.runs] == ["", ""]
    both = recorded(tmp_path, trained=2_500_000)
    assert [list(group.settings.values()) for group in group_runs(list(both.values()))] == [["hunters"], ["runners"]]


def save(run: Path, own: dict[str, Any] | None = None, whole: dict[str, Any] | None = None, version: int = 3) -> Path:
    """A checkpoint of two policies of equal spaces."""
    policies = {}
    for name in NAMES:
        policies[name] = (make_learner(small_policy()), OWN if own is None else own)
        policies[name][0].policy_version = version
    return Checkpoints(run / "checkpoints").save_policies(policies, RUN if whole is None else whole)


def test_a_policys_folder_names_what_to_use(tmp_path: Path) -> None:
    """Catches sentences that send a user to wait for checkpoints and records that will never lie there."""
    run, folder = tmp_path / "run", tmp_path / "run" / "policies" / "hunters"
    (folder / "recorder").mkdir(parents=True)
    for directory in (run, folder):
        (directory / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="the run has saved none yet"):
        find_saved(folder)
    path = save(run)
    with pytest.raises(CheckpointError) as error:
        find_saved(folder)
    assert f"shoal evaluate {run} plays them all, and {path / 'hunters'} is for shoal.load_policy" in str(error.value)
    other = tmp_path / "run" / "policies" / "other"
    other.mkdir()
    (other / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="the run has saved none yet"):
        find_saved(other)
    with pytest.raises(RecordError, match="a run writes them when it ends"):
        recorded_names(run)
    (folder / "recorder" / "000000001.npz").write_bytes(b"")
    with pytest.raises(RecordError) as record:
        recorded_names(run)
    assert str(record.value).endswith(f"name one, as shoal replay {folder}")
    assert list(recorded_names(folder)) == ["1"]


def test_one_of_several_policies_does_not_play_the_others_agents(tmp_path: Path) -> None:
    """Catches a number of games in which one policy also played the agents of the other, told without a word."""
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=f"shoal evaluate {tmp_path} plays them together"):
        find_checkpoint(tmp_path)
    for env_id in (None, OWN["env_id"]):
        with pytest.raises(ValueError, match=f"shoal evaluate {path} plays each with its own policy"):
            evaluation_setup(find_checkpoint(path / "hunters"), num_envs=None, seed=0, env_id=env_id)
    # In another environment it plays whom the user wants it to.
    with pytest.raises(ValueError, match="nowhere"):
        evaluation_setup(find_checkpoint(path / "hunters"), num_envs=None, seed=0, env_id="nowhere:Game-v0")


def reseal(path: Path, *names: str) -> None:
    """Write a manifest of these files, as one who forges a checkpoint would."""
    (path / "manifest.json").write_text(json.dumps({name: fingerprint(path / name) for name in names}))


def test_a_policys_folder_holds_one_policy(tmp_path: Path) -> None:
    """Catches a folder of policies where a policy is expected, which has no weights, and folders in folders that are
    followed until Python gives up."""
    inner = save(tmp_path / "inner")
    path = save(tmp_path / "run")
    for file in (path / "hunters").iterdir():
        file.unlink()
    (path / "hunters").rmdir()
    os.rename(inner, path / "hunters")
    reseal(path, "state.json", *(f"{name}/manifest.json" for name in NAMES))
    with pytest.raises(CheckpointError, match="hunters is no complete checkpoint"):
        find_saved(path)
    # A link to itself makes folders without an end.
    (path / "hunters" / "hunters" / "manifest.json").unlink()
    for file in (path / "hunters" / "hunters").iterdir():
        file.unlink()
    (path / "hunters" / "hunters").rmdir()
    (path / "hunters" / "hunters").symlink_to(path / "hunters")
    with pytest.raises(CheckpointError):
        find_saved(path / "hunters")


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (("seekers", "runners"), {}, "holds the policies hunters, runners, and policies names seekers, runners"),
        ((), {}, "holds the policies hunters, runners, and policies names none"),
        (NAMES, {"session": None}, "hunters was not saved by a run: its state lacks session"),
        (NAMES, {"ledger": None, "config": None}, "hunters was not saved by a run: its state lacks ledger, config"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_what_resume_refuses_is_said_before_the_start(
    tmp_path: Path, names: tuple[str, ...], own: dict[str, None], said: str, resume: str
) -> None:
    """Catches a doctor that says ready where the run is refused, and a KeyError in the middle of its start."""
    path = save(tmp_path / "run", {name: value for name, value in OWN.items() if name not in own})
    settings = [
        f"policies.{name}.agents=[{agents}]" for name, agents in zip(names, ("hunter_*", "runner_*"), strict=False)
    ]
    run_dir = tmp_path / "run"
    if resume == "path":
        settings.append(f"resume={path}")
        run_dir = tmp_path / "new"
    found, problems = load_config([], [f"env.id={OWN['env_id']}", "env.num_envs=12", "mode=inline", *settings])
    assert not problems
    (told,) = [problem for problem in preflight.check(found, run_dir) if problem.startswith("resume: ")]
    assert said in told


def test_names_that_differ_in_case_only_are_refused() -> None:
    """Catches two policies that write into one folder where a disk ignores case."""
    _, problems = load_config(
        [], ["env.id=pettingzoo:team_games:teams", "policies.a.agents=[x]", "policies.A.agents=[y]"]
    )
    assert [problem for problem in problems if problem.startswith("policies: a and A differ in case only")]
    _, problems = load_config([], ["env.id=pettingzoo:team_games:teams", *POLICIES])
    assert not problems


def test_the_summary_of_a_run_has_what_is_of_all_policies() -> None:
    """Catches a ledger, faults and skipped updates that a run of several policies does not tell, unrolls that are
    counted once for every policy, and a mean of returns that have none."""
    shared = {"lost_unrolls": 2, "refused_trajectories": {"duplicate": 1}, "actor_restarts": 3}
    one: dict[str, Any] = {
        **dict.fromkeys(("env_id", "seed", "policy_kind", "wall_seconds", "stopped_by", "interrupted_by", "versions")),
        **shared,
        "actor_recovery_seconds": {"count": 3},
        "env_steps": 5,
        "session_env_steps": 5,
        "env_steps_per_second": 2.5,
        "policy_version": 4,
        "episodes": 7,
        "env_faults": 2,
        "skipped_updates": 1,
        "books_balance": True,
        "ledger": LEDGER,
        "mean_return": 3.0,
        "limit": None,
    }
    other = {**one, "env_faults": 0, "ledger": {"sampled": 4, "trained": 2, "in_flight": 0, "dropped": {"restart": 2}}}
    found = together({"hunters": one, "runners": other})
    assert found["ledger"] == {"sampled": 13, "trained": 7, "in_flight": 1, "dropped": {"restart": 2, "stale": 3}}
    assert {name: found[name] for name in shared} == shared
    assert [found[name] for name in ("env_faults", "skipped_updates", "episodes", "env_steps")] == [2, 2, 14, 10]
    assert "mean_return" not in found
    assert found["policies"] == {"hunters": one, "runners": other}
