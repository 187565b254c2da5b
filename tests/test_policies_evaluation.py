"""Several policies are evaluated together: during training, and in films."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from films import frames
from service import wait_for
from shoal.deploy.evaluation import evaluator as evaluator_module
from shoal.deploy.evaluation.evaluator import Evaluator, Taken, _play, training_side
from shoal.deploy.evaluation.job_process import JobFailed
from shoal.deploy.evaluation.table import Played, policies_lines, policies_to_json
from shoal.deploy.evaluation.teams import TeamsRecorder, TeamsSide, play_teams
from shoal.deploy.records.evaluations import Evaluations, read_evaluations
from shoal.deploy.settings.sections import EvaluationConfig
from shoal.envs.recording import CannotRecord
from shoal.learner.checkpoint import Checkpoint
from shoal.policy.weights import Weights, flatten_weights
from team_games import TeamGame
from team_setups import Setups

AGENTS = {"hunters": (0,), "runners": (1, 2)}
"""Their places in a game."""


def side_of(made: Setups, **settings: Any) -> TeamsSide:
    config = EvaluationConfig(**{"every_env_steps": 100, "episodes": 24, **settings})
    side = training_side(made.team, config, num_agents=3, seed=5, agents=AGENTS)
    assert isinstance(side, TeamsSide)
    return side


def weights_of(made: Setups, versions: tuple[int, int] = (3, 4)) -> dict[str, Weights]:
    return {
        name: flatten_weights(worker.learner.policy, version)
        for (name, worker), version in zip(made.workers.items(), versions, strict=True)
    }


def test_all_policies_play_with_their_own_weights() -> None:
    """Catches a policy that plays with the weights of none, of the other, or with its agents' places exchanged; games
    that differ from one evaluation to the next; and more slots than there are episodes."""
    made = Setups()
    # The most probable actions of new policies differ, their probabilities hardly.
    side = side_of(made, greedy=True).with_weights(weights_of(made))
    first = _play(side, 24, niceness=0)
    assert {name: own.episodes for name, own in first.items()} == {"hunters": 8, "runners": 16}
    # Of the runners one leaves after half of the game's 8 steps.
    assert sorted(set(first["hunters"].lengths.tolist())) == [8]
    assert sorted(set(first["runners"].lengths.tolist())) == [4, 8]
    again = _play(side, 24, niceness=0)
    before = {name: own.returns.tolist() for name, own in first.items()}
    assert {name: own.returns.tolist() for name, own in again.items()} == before
    other = copy.deepcopy(made.workers["hunters"].learner.policy)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(generator=generator)
    others = flatten_weights(other, 9)
    changed = _play(side.with_weights({**weights_of(made), "hunters": others}), 24, niceness=0)
    assert changed["runners"].returns.tolist() == before["runners"]
    assert changed["hunters"].returns.tolist() != before["hunters"]
    assert side_of(made, episodes=1).setup.num_envs == 3
    assert side_of(made, episodes=4).setup.num_envs == 6
    assert side_of(made, episodes=1000).setup.num_envs == 12
    assert all(each.greedy for each in side.sides.values())
    assert not any(each.greedy for each in side_of(made).sides.values())


class Here:
    """Jobs in this process."""

    def __init__(self) -> None:
        self.fails, self.without = False, ""
        self.found: Any = None

    def submit(self, job: Callable[[], Any]) -> None:
        if self.fails:
            raise JobFailed("the board fell off the table")
        self.found = job()
        if self.without:  # as of games that its agents do not enter
            self.found = {**self.found, self.without: self.found[self.without].of_agents(())}

    def poll(self, seconds: float) -> bool:
        return True

    def result(self) -> Any:
        return self.found

    def end(self) -> None: ...

    def kill(self) -> None: ...


def test_every_policy_has_its_own_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an evaluation that is due by the steps of one policy, results with the version or the steps of another,
    one policy's in the other's file, a failure that one of them does not count, and a best of them that is none."""
    monkeypatch.setattr(evaluator_module, "_LOOK_SECONDS", 0.01)
    made, jobs = Setups(), Here()
    weights = weights_of(made)
    steps = {"hunters": 60, "runners": 39}
    evaluations = {name: Evaluations(tmp_path / name / "evaluation.jsonl", name) for name in AGENTS}
    for name in AGENTS:
        (tmp_path / name).mkdir()
    looked: list[int] = []

    def newest() -> Mapping[str, Taken]:
        looked.append(sum(steps.values()))
        return {name: Taken(own, steps[name]) for name, own in weights.items()}

    evaluator = Evaluator(
        EvaluationConfig(every_env_steps=100, episodes=24, niceness=os.getpriority(os.PRIO_PROCESS, 0)),
        side_of(made),
        jobs,
        evaluations,
        session=1,
        newest=newest,
        env_steps=0,
        describe=dict,
        keep_best=None,
    )
    with evaluator:
        wait_for(lambda: looked.count(99) > 3)
        assert not any(own.count for own in evaluations.values())
        steps["runners"] = 40
        wait_for(lambda: all(own.count for own in evaluations.values()))
        jobs.fails = True
        steps["hunters"] = 161
        wait_for(lambda: all(own.failed for own in evaluations.values()))
        jobs.fails, jobs.without = False, "runners"
        steps["hunters"] = 261
        wait_for(lambda: evaluations["hunters"].count == 2)
    found = {name: read_evaluations(tmp_path / name / "evaluation.jsonl") for name in AGENTS}
    expected = play_teams(side_of(made).with_weights(weights), 24, processes=1).policies
    assert [len(results) for results in found.values()] == [2, 1]
    for name, (result, *_) in found.items():
        assert result.policy == name
        assert (result.session, result.env_steps) == (1, {"hunters": 60, "runners": 40}[name])
        assert result.policy_version == weights[name].policy_version
        assert result.episodes == expected[name].episodes
        assert result.mean_return == expected[name].mean
        assert result.mean_length == expected[name].mean_length
        assert (evaluations[name].last, evaluations[name].best) == (found[name][-1], None)
        assert evaluations[name].failed == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "evaluation of policy version 3 of hunters, 4 of runners failed: the board fell off the table",
        "runners: no agent of this policy was in a game of the evaluation",
    ]


def test_a_policy_that_is_in_no_game_has_no_numbers() -> None:
    """Catches a traceback about an empty array where nothing is wrong with those who played."""
    made = Setups()
    side = side_of(made).with_weights(weights_of(made))
    played = play_teams(side, 24, processes=1).policies
    checkpoint = Checkpoint(Path("run"), {"policy_version": 4, "mean_return": 1.5})
    found = {
        name: Played(dataclasses.replace(side.sides[name], checkpoint=checkpoint), own)
        for name, own in (("hunters", played["hunters"].of_agents(())), ("runners", played["runners"]))
    }
    said = policies_lines(found)
    assert "  games     8, each" in said[1]
    assert "  hunters  none of its agents was in a game" in said
    told = json.loads(json.dumps(policies_to_json(checkpoint, found)))["policies"]
    assert (told["hunters"]["episodes"], told["hunters"]["mean_return"]) == (0, None)
    assert told["runners"]["episodes"] == 16


def test_a_game_of_several_policies_is_one_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a film of each policy, one that ends with the first agent, agents that act at random or against their
    masks in it, and returns that are those of other agents."""
    pytest.importorskip("imageio_ffmpeg")
    made = Setups('env.kwargs={"masked": true}')
    earned: list[dict[str, float]] = []
    step = TeamGame.step

    def noted(self: TeamGame, actions: dict[str, Any]) -> Any:
        answers = step(self, actions)
        if self.render_mode == "rgb_array":
            earned.append(answers[1])
        return answers

    monkeypatch.setattr(TeamGame, "step", noted)
    side = side_of(made).with_weights(weights_of(made, (7, 12)))
    recorder = TeamsRecorder(side, tmp_path / "films")
    films = recorder.record(2)
    recorder.close()
    assert [film.file.name for film in films] == [f"version-000000012-episode-{game}.mp4" for game in range(2)]
    assert sorted(film.file for film in films) == sorted((tmp_path / "films").iterdir())
    assert len(earned) == 16
    for game, film in enumerate(films):
        seen = frames(film.file, 16, 16)
        assert film.length == 8
        assert np.abs(seen.mean((1, 2, 3)) - 20 * np.arange(9)).max() < 12
        total = {
            agent: sum(rewards.get(agent, 0.0) for rewards in earned[8 * game : 8 * game + 8])
            for agent in ("hunter_0", "runner_0", "runner_1")
        }
        runners = (total["runner_0"] + total["runner_1"]) / 2
        assert film.returns == {"hunters": total["hunter_0"], "runners": runners}
    again = TeamsRecorder(side, tmp_path / "again")
    assert [film.returns for film in again.record(2)] == [film.returns for film in films]
    again.close()


def test_a_game_without_pictures_is_no_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches games that are played before somebody notices that there is nothing to see."""
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(TeamGame, "metadata", {"name": "teams"})
    with pytest.raises(CannotRecord, match="team_games:teams does not render pictures: it has the render modes none"):
        TeamsRecorder(side_of(Setups()), tmp_path / "films")
    assert not (tmp_path / "films").exists()
