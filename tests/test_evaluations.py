"""The best weights of a run and the record of evaluations: two files of one fact."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
from rollouts import make_learner, small_policy
from shoal.deploy.evaluation.evaluate import evaluation_setup
from shoal.deploy.evaluation.evaluator import kept_state
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations, read_evaluations
from shoal.deploy.report.recorded_run import read_run
from shoal.learner.checkpoint import Checkpoints
from shoal.policy.weights import flatten_weights


def result(policy_version: int, mean: float) -> EvaluationResult:
    return EvaluationResult(
        time=1.0,
        session=0,
        policy_version=policy_version,
        env_steps=10 * policy_version,
        episodes=8,
        mean_return=mean,
        return_ci95=None,
        mean_length=4.0,
    )


@pytest.fixture
def best(tmp_path):
    """``RUN/best`` with version 27."""
    best = Checkpoints(tmp_path / "best")
    keep(best, result(27, 0.36))
    return best


def keep(best, found):
    learner = make_learner(small_policy())
    weights = dataclasses.replace(flatten_weights(learner.policy, 0), policy_version=found.policy_version)
    best.save(learner, {"evaluation": found.to_json()}, weights)


def evaluations_of(tmp_path, *results):
    evaluations = Evaluations(tmp_path / "evaluation.jsonl")
    for one in results:
        evaluations.add(one)
    return Evaluations(tmp_path / "evaluation.jsonl")


def test_a_best_that_was_recorded_and_not_kept_is_none(tmp_path, best):
    """Killed between the two: the record and the summary name version 51, RUN/best holds version 27 for ever."""
    evaluations = evaluations_of(tmp_path, result(27, 0.36), result(51, 0.75))
    assert evaluations.best.policy_version == 51
    evaluations.reconcile(kept_state(best))
    assert evaluations.best == result(27, 0.36)
    assert evaluations.is_best(result(60, 0.5))


def test_a_best_that_was_kept_and_not_recorded_is_recorded(tmp_path, best):
    """Killed between the two, in the other order."""
    evaluations = evaluations_of(tmp_path, result(20, 0.3))
    evaluations.reconcile(kept_state(best))
    assert evaluations.best == result(27, 0.36)
    assert read_evaluations(tmp_path / "evaluation.jsonl") == [result(20, 0.3), result(27, 0.36)]
    evaluations.reconcile(kept_state(best))
    assert len(read_evaluations(tmp_path / "evaluation.jsonl")) == 2


def test_what_was_half_kept_is_removed_and_what_is_damaged_passed_over(tmp_path, best):
    """A directory of a killed process that stays for ever; a damaged best that ends the next session."""
    (tmp_path / "best" / ".incomplete-x").mkdir()
    keep(best, result(40, 0.5))
    shutil.rmtree(tmp_path / "best" / "000000040" / "state.json", ignore_errors=True)
    (tmp_path / "best" / "000000040" / "state.json").write_text("[]")
    (tmp_path / "best" / ".incomplete-y").mkdir()
    evaluations = evaluations_of(tmp_path, result(27, 0.36), result(40, 0.5))
    evaluations.reconcile(kept_state(best))
    assert evaluations.best == result(27, 0.36)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["000000027", "000000040"]
    shutil.rmtree(tmp_path / "best")
    (tmp_path / "best").symlink_to(tmp_path / "nothing")
    evaluations.reconcile(kept_state(best))
    assert evaluations.best is None
    assert evaluations.is_best(result(41, 0.1))


def test_a_best_that_could_not_be_kept_leaves_the_one_before(tmp_path):
    """A full disk: everything that is worse than what nobody has any more is then not kept either."""
    evaluations = Evaluations(tmp_path / "evaluation.jsonl")
    evaluations.add(result(1, 0.2))
    evaluations.add(result(2, 0.9), kept=False)
    assert (evaluations.best, evaluations.last) == (result(1, 0.2), result(2, 0.9))
    assert evaluations.is_best(result(3, 0.5))


def test_none_of_several_policies_is_the_best(tmp_path):
    """What a policy won against opponents that were worse than ever, shown as its best; lines without its name; and
    files of runs of one policy that have another key."""
    evaluations = Evaluations(tmp_path / "evaluation.jsonl", "hunters")
    found = [result(version, mean)._replace(policy="hunters") for version, mean in ((1, 5.0), (2, 0.2))]
    for one in found:
        evaluations.add(one)
    assert (evaluations.best, evaluations.last) == (None, found[1])
    again = Evaluations(tmp_path / "evaluation.jsonl", "hunters")
    assert (again.best, again.last) == (None, found[1])
    assert read_evaluations(tmp_path / "evaluation.jsonl") == found
    assert "policy" not in result(1, 5.0).to_json()


def test_lines_that_no_run_wrote_are_passed_over(tmp_path):
    """Numbers that are believed for their names: a report or a summary that fails on them."""
    good = result(1, 0.2).to_json()
    forged = (
        {"mean_return": "0.9"},
        {"policy": 3},
        {"policy_version": 1.5},
        {"episodes": True},
        {"env_steps": None},
        {"more": 1},
    )
    lines = [good, *({**good, **change} for change in forged), [], None, 3]
    text = "\n".join(json.dumps(line) for line in lines) + "\n" + json.dumps({**good, "mean_length": 1e999}) + "\n"
    (tmp_path / "evaluation.jsonl").write_text(text + "[" * 100_000 + "\n")
    assert read_evaluations(tmp_path / "evaluation.jsonl") == [result(1, 0.2)]


SAVED = {
    "config": {"env": {"num_envs": 4}, "actor": {"unroll_length": 8}, "policy": {}},
    "env_id": "",
    "env_kwargs": {},
    "mean_return": None,
}


@pytest.mark.parametrize(
    "forged",
    [
        {"config": []},
        {"config": {"env": {}, "actor": {"unroll_length": 8}, "policy": {}}},
        {"config": {"env": {"num_envs": 4}, "actor": None, "policy": {}}},
        {"env_id": None},
        {"env_kwargs": "x"},
        {"mean_return": "3"},
    ],
)
def test_a_state_of_another_shape_is_refused_by_evaluate(tmp_path, forged):
    """A KeyError or TypeError in the face of who only wants to play a policy."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_learner(small_policy()), {**SAVED, **forged})
    with pytest.raises(ValueError, match="was not saved by a run"):
        evaluation_setup(checkpoints.latest(), num_envs=None, seed=0)
    checkpoints.save(make_learner(small_policy()), SAVED)
    with pytest.raises(ValueError, match="was imported for no environment"):
        evaluation_setup(checkpoints.latest(), num_envs=None, seed=0)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log", "evaluation.jsonl"])
def test_a_pipe_in_a_run_directory_is_refused_by_report(tmp_path, name):
    """A report that waits for ever for somebody to write."""
    (tmp_path / "config.yaml").write_text("")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is no regular file"):
        read_run(tmp_path)


def test_a_pipe_in_place_of_the_results_is_no_wait(tmp_path):
    """A resumed run, or a report, that waits for ever for somebody to write into it."""
    os.mkfifo(tmp_path / "evaluation.jsonl")
    with pytest.raises(OSError, match="is no regular file"):
        Evaluations(tmp_path / "evaluation.jsonl")


def test_of_a_file_without_end_the_last_part_is_read(tmp_path, monkeypatch, caplog):
    """Gigabytes that are read at once before a run goes on."""
    evaluations = Evaluations(tmp_path / "evaluation.jsonl")
    for version in range(20):
        evaluations.add(result(version, 0.1 * version))
    monkeypatch.setattr("shoal.deploy.records.evaluations.MOST_BYTES", 1000)
    found = read_evaluations(tmp_path / "evaluation.jsonl")
    assert 1 < len(found) < 10
    assert found[-1].policy_version == 19
    assert "only results in its last part are read" in caplog.text
