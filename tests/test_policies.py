"""Several policies in the same games: whose agents are whose, what each sees and ships, and what all share."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from metric_sources import make_sources
from prometheus_client import CollectorRegistry, generate_latest
from scripted_vectors import Rows
from shoal.actors.pool import InlinePool
from shoal.deploy.cli import main
from shoal.deploy.doctor.examine import _layout as layout_lines
from shoal.deploy.monitoring.catalogue import CATALOGUE, INFO
from shoal.deploy.monitoring.collector import RunCollector
from shoal.deploy.monitoring.learning import Interval, Recorded, judge
from shoal.deploy.placement.layout import Machine
from shoal.deploy.settings.load import load_config
from shoal.deploy.training.random_play import RandomPlay
from shoal.envs.boundary import VectorSpace
from shoal.envs.config import AdapterOptions
from shoal.envs.registry import make_env_spec
from shoal.envs.teams import Team, TeamsEnvironment, divide_agents
from shoal.learner.checkpoint import Checkpoint, CheckpointError, Checkpoints, find_checkpoint, find_saved
from team_games import CODES, HUNTERS, RUNNERS
from team_setups import ID, PATTERNS, POLICIES, Setups, configured


def make_teams(slots: int = 6, **kwargs: Any) -> TeamsEnvironment:
    return TeamsEnvironment(ID, slots, 0, AdapterOptions(), False, kwargs, PATTERNS)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"hunters": ["hunter_*"], "runners": ["runner_0"]}, "runner_1 of pettingzoo:x belongs to no policy"),
        (
            {"hunters": ["*_0"], "runners": ["runner_*"]},
            "agent runner_0 of pettingzoo:x belongs to hunters and",
        ),
        ({"all": ["*"], "none": ["swimmer_*"]}, "policies.none.agents: no agent of pettingzoo:x is named swimmer_*"),
    ],
)
def test_every_agent_belongs_to_one_policy(patterns: dict[str, list[str]], words: str) -> None:
    """Catches agents that nobody trains, that two policies train, and a policy without agents, found out too late."""
    with pytest.raises(ValueError) as error:
        divide_agents(patterns, "pettingzoo:x", (*HUNTERS, *RUNNERS))
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_agents_are_found_by_their_names() -> None:
    """Catches agents given out by their place in the game, and names read as regular expressions."""
    agents = ("b_1", "a", "b.1", "b_2")
    found = divide_agents({"x": ["b_?"], "y": ["a", "b.1"]}, "pettingzoo:x", agents)
    assert found == {"x": (0, 3), "y": (1, 2)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["learner.num_learners=2"],
            "learner.num_learners: does not work with policies=hunters, runners: num_learners=2",
        ),
        (["placement=colocated"], "placement: does not work with policies"),
        (["actor.reset_memory=never"], "actor.reset_memory: does not work with policies"),
        (["self_play.share=0.5"], "self_play.share: does not work with policies"),
        (["policy.map_actions=[a=b]"], "policy.map_actions: does not work with policies"),
        (["policies.hunters.agents=[]"], "policies.hunters.agents: "),
        (["policies={a/b: {agents: [x]}, c: {agents: [y]}}"], "policies.a/b: "),
    ],
)
def test_what_does_not_work_with_policies_is_refused(settings: list[str], words: str) -> None:
    """Catches settings that are read by one of several policies, or by none, and runs that fail in the middle."""
    _, problems = load_config([], [*POLICIES, *settings])
    assert [problem for problem in problems if problem.startswith(words)], problems


def test_one_policy_needs_no_policies() -> None:
    """Catches a run of several policies that has one, with its files and metrics in other places."""
    _, problems = load_config([], [f"env.id={ID}", "policies.all.agents=['*']"])
    assert [problem for problem in problems if "policies: all alone is one policy for all agents" in problem]


ONE_MISTAKE = {
    "policies.hunters.agents=hunter_*": "policies.hunters.agents: Input should be a valid list",
    "policies.hunters.agents=[]": "policies.hunters.agents: List should have at least 1 item",
    "policies.hunters.agents=[1]": "policies.hunters.agents: Input should be a valid string",
    "policies.hunters=[hunter_*]": "policies.hunters: is a section of settings; set one of them, e.g. policies.hun",
    "policies.hunters={}": "policies.hunters.agents: must be given, there is no default",
    "policies.hunters.agent=[hunter_*]": "policies.hunters.agent: unknown key; did you mean policies.hunters.agents?",
    "policies.hun/ters.agents=[hunter_*]": "policies.hun/ters: a policy's name is that of a folder",
    "policies.hunters.agents=[huntr_*]": "policies.hunters.agents: no agent of pettingzoo:team_games:teams is named",
    "seed=1": "policies: runners alone is one policy for all agents",
}


@pytest.mark.parametrize("mistake", ONE_MISTAKE)
def test_one_mistake_is_one_problem(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches three more problems that follow from it, each of which looks like something to mend."""
    settings = (f"env.id={ID}", "env.num_envs=12", "policies.runners.agents=[runner_*]", mistake, "mode=inline")
    for command in ("train", "doctor"):
        assert main([command, *settings, "metrics.port=-1", f"run_dir={tmp_path / 'run'}"]) == 2
        first, problem = capsys.readouterr().err.splitlines()
        assert first == "shoal: 1 problem, nothing was started:"
        assert problem.startswith(f"  {ONE_MISTAKE[mistake]}")


def test_doctor_measures_no_update_of_several_policies() -> None:
    """Catches a measurement that makes one policy for agents whose spaces differ, on this machine or on a cluster."""
    for machine in (Machine(cores=4, accelerator=False), Machine(cores=4, accelerator=False, actor_places=2)):
        lines = layout_lines(configured(), machine, [4, 8], measure=True)
        assert "every policy has one learner" in lines[1]
        assert "not measured: that is done with the update of one policy" in lines[-1]


def test_spaces_that_differ_are_refused_with_what_to_set() -> None:
    """Catches a sentence that does not lead to policies, and agents of one policy that need different networks."""
    with pytest.raises(ValueError, match=r"need the same observation_space; .* of their own \(policies\)"):
        make_env_spec(ID, AdapterOptions())
    with pytest.raises(ValueError, match="the agents of policy 'all' share it and need the same"):
        TeamsEnvironment(ID, 6, 0, AdapterOptions(), False, {}, {"all": ["hunter_0", "runner_0"], "r": ["runner_1"]})


@pytest.mark.parametrize("masked", [False, True])
def test_every_team_has_the_rows_of_its_own_agents(masked: bool) -> None:
    """Catches rows in the wrong team or order, actions given to other agents, and a game stepped once per team: with
    the right actions every agent is rewarded, at every step that it is in the game."""
    whole = make_teams(6, masked=masked)
    teams = list(whole.teams.values())
    assert [(team.num_envs, team.spec.num_agents) for team in teams] == [(2, 1), (4, 2)]
    assert [team.spec.observation for team in teams] == [VectorSpace(size=3), VectorSpace(size=6)]
    rows = [Rows(team).rows for team in teams]
    for team, own in zip(teams, rows, strict=True):
        team.reset(own.obs)
        own.is_first[:] = True
    lengths = np.zeros(4, int)
    for step in range(20):
        for team, own, code in zip(teams, rows, CODES.values(), strict=True):
            if masked:
                shown = own.obs[:, :code].argmax(1)
                playing = own.obs.any(1)
                assert not team.action_mask[np.flatnonzero(playing), (shown[playing] + 1) % code].any()
            team.step_begin(own.obs[:, :code].argmax(1))
        for team, own in zip(teams, rows, strict=True):
            team.step_end(own)
        assert whole.steps == step + 1
        for own in rows:
            np.testing.assert_array_equal(own.reward, ~own.is_first)
        lengths += ~rows[1].is_first
    whole.close()
    assert whole.games.faults == []
    # Runner 0 leaves in the middle: of 20 steps two games and the beginning of a third.
    assert lengths.tolist() == [10, 18, 10, 18]


@pytest.mark.parametrize("masks", ["obs", "info"])
def test_policies_take_turns_by_their_masks(masks: str) -> None:
    """Catches masks of the other policy's agent, and the action of one who waits that reaches the game."""
    patterns = {"one": ["first"], "two": ["second"]}
    whole = TeamsEnvironment("pettingzoo:turn_games:Nim", 2, 0, AdapterOptions(), False, {"masks": masks}, patterns)
    teams = list(whole.teams.values())
    rows = [Rows(team).rows for team in teams]
    for team, own in zip(teams, rows, strict=True):
        team.reset(own.obs)
    legal, waits = [[1, 1, 1]], [[1, 0, 0]]
    assert [team.action_mask.tolist() for team in teams] == [legal, waits]
    # Of five stones: three, then the last two, which win.
    for actions, told in (((2, 2), [waits, [[1, 1, 0]]]), ((0, 1), None)):
        for team, action in zip(teams, actions, strict=True):
            team.step_begin(np.array([action]))
        for team, own in zip(teams, rows, strict=True):
            team.step_end(own)
        assert told is None or [team.action_mask.tolist() for team in teams] == told
    assert [own.reward.tolist() for own in rows] == [[-1], [1]]
    assert all(own.terminated.all() for own in rows)
    whole.close()


def test_games_are_not_stepped_before_all_have_acted() -> None:
    """Catches a team whose agents act twice, or with the actions of the step before."""
    whole = make_teams(3)
    hunters, runners = whole.teams.values()
    rows = Rows(hunters).rows
    hunters.reset(rows.obs)
    hunters.step_begin(np.zeros(1, np.int64))
    with pytest.raises(RuntimeError, match="before every team had acted"):
        hunters.step_end(rows)
    assert isinstance(runners, Team)
    whole.close()


def test_one_unroll_has_a_trajectory_for_every_policy() -> None:
    """Catches trajectories with rows of another policy's agents, of another length, or with another version; and steps
    that are counted twice, or not at all."""
    made = Setups()
    unrolls = made.rollouts(3)
    for number, parts in enumerate(unrolls):
        for worker, part in zip(made.workers.values(), parts, strict=True):
            assert worker.queue.read(part).header.sequence == number
        assert len(parts) == 2
    sizes = [worker.queue.read(part).env_steps for worker, part in zip(made.workers.values(), unrolls[0], strict=True)]
    # Six steps of games of eight: four hunters for six, and of eight runners four for six and four for four.
    assert sizes == [24, 40]


@pytest.mark.parametrize("settings", [(), ("env.reset_options={steps: 4}",)])
def test_first_games_have_the_options_of_settings_or_of_the_first_weights(settings: tuple[str, ...]) -> None:
    """Catches first games without options, and a team whose first row is that of a game which another one reset."""
    made = Setups(*settings)
    worker = made.team.make_worker(0, 0)
    given = None if settings else {"steps": 4}
    parts = worker.rollout([dataclasses.replace(one, env_options=given) for one in made.weights()])
    for (name, own), part in zip(made.workers.items(), parts, strict=True):
        columns = own.queue.read(part).columns
        shown = columns["obs"][:, :-1].argmax(-1)
        right = (columns["action"] == shown) & (columns["is_first"][:, 1:] == 0)
        np.testing.assert_array_equal(columns["reward"], right)
        if name == "hunters":
            assert columns["terminated"].argmax(1).tolist() == [3] * 4
    worker.close()


def test_no_policy_reads_what_another_sees() -> None:
    """Catches observations, random streams and memories that cross from one team to the other: with the runners'
    observations changed, the hunters' trajectories are the same to the bit."""
    plain, poisoned = (
        Setups(f"env.kwargs={json.dumps(kwargs)}").rollouts(4)
        for kwargs in ({"poison": 0.0}, {"poisoned": "runner", "poison": 7.0})
    )
    made = Setups()
    hunters, runners = (worker.queue for worker in made.workers.values())
    for one, other in zip(plain, poisoned, strict=True):
        ours, theirs = hunters.read(one[0]), hunters.read(other[0])
        for name, column in ours.columns.items():
            np.testing.assert_array_equal(column, theirs.columns[name], err_msg=name)
        assert not np.array_equal(runners.read(one[1]).columns["obs"], runners.read(other[1]).columns["obs"])


def test_a_delivery_is_taken_by_all_queues_or_by_none() -> None:
    """Catches queues that have different unrolls, so that one waits for ever while the other is full; an actor admitted
    by one alone; and steps of a refused delivery that are counted."""
    made = Setups()
    queues = [worker.queue for worker in made.workers.values()]
    assert made.queues.admit([0]) is None, "no weights yet"
    for worker in made.workers.values():
        worker.publish()
    actor = made.team.make_worker(0, 0)
    admitted = made.queues.admit([0])
    assert admitted is not None
    parts = actor.rollout(admitted[1])
    broken = parts[1].copy()
    broken[len(broken) // 2] ^= 1
    assert made.queues.deliver(0, [parts[0], broken])
    assert [queue.ledger.sampled for queue in queues] == [0, 0]
    assert [queue.lags() for queue in queues] == [[], []]
    assert made.queues.admit([0]) is not None
    made.queues.abandon(0)
    assert [queue.lost_unrolls for queue in queues] == [1, 1]
    assert made.queues.admit([0]) is not None
    assert made.queues.deliver(0, parts) is None
    assert made.queues.deliver(0, parts), "nobody was admitted to it"
    assert made.queues.admit([0]) is not None
    assert "again" in (made.queues.deliver(0, parts) or ""), "a duplicate"
    assert [queue.refused["duplicate"] for queue in queues] == [1, 1]
    assert [queue.ledger.sampled for queue in queues] == [24, 40]
    assert [queue.imbalance() for queue in queues] == [0, 0]
    actor.close()


def test_unrolls_of_all_policies_are_replaced_with_their_actor() -> None:
    """Catches a fault of the games that leaves one policy waiting for its unroll."""
    made = Setups('env.kwargs={"fails_at": 5}')
    for worker in made.workers.values():
        worker.publish()
    pool = InlinePool(made.team, range(1), made.queues, max_consecutive_failures=5)
    for _ in range(4):
        pool.pump(0.0)
    pool.close()
    assert pool.restarts == {"error": 1}
    assert [worker.queue.lost_unrolls for worker in made.workers.values()] == [1, 1]
    taken = [worker.queue.queued_segments for worker in made.workers.values()]
    assert taken[0] > 0
    assert taken[1] == 2 * taken[0]
    assert all(worker.queue.imbalance() == 0 for worker in made.workers.values())


@pytest.mark.parametrize(
    ("masked", "hunters", "runners"), [(False, 8 / 3, (4 + 8) / 4 / 2), (True, 8 / 2, (4 + 8) / 3 / 2)]
)
def test_the_return_of_random_actions_is_that_of_each_policys_agents(
    masked: bool, hunters: float, runners: float
) -> None:
    """Catches returns of the other policy's agents, or of all; actions that a mask forbids; agents given out in the
    order of the policies; and games that go on at random for the run's own policy only."""
    for policies in ((), ("policies={runners: {agents: [runner_*]}, hunters: {agents: [hunter_*]}}",)):
        made = Setups(f'env.kwargs={{"masked": {json.dumps(masked)}}}', *policies)
        play = RandomPlay(setup=made.team, num_agents=3, niceness=0)
        found = play.here(60.0, lambda: False)
        assert found.keys() == {"hunters", "runners"}
        for name, mean in {"hunters": hunters, "runners": runners}.items():
            assert 0 < found[name].half_width < 0.25
            assert abs(found[name].mean - mean) < 1.5 * found[name].half_width
        # As a job in another process.
        assert cloudpickle.loads(cloudpickle.dumps(play))() == found


def test_what_the_others_have_learned_may_be_why() -> None:
    """Catches a policy that is blamed for being beaten by others that learn, against which random play says little."""
    run = Recorded(
        share_done=0.5, returned=Interval(1.0, 0.1), random=Interval(2.0, 0.1), movement=5.0, among_others=True
    )
    assert "a random policy's among random ones, which may be because the others" in judge(run, expect_after=0.2).advice
    assert "others" not in judge(dataclasses.replace(run, among_others=False), expect_after=0.2).advice


def save(made: Setups, directory: Path, version: int = 3) -> Path:
    for worker in made.workers.values():
        worker.learner.policy_version = version
    policies = {name: (worker.learner, {"mark": name}) for name, worker in made.workers.items()}
    return Checkpoints(directory).save_policies(policies, {"run_id": "a-run"})


def test_a_checkpoint_has_the_policies_of_a_run_each_for_itself(tmp_path: Path) -> None:
    """Catches weights under another policy's name, a policy that cannot be found alone, and one taken for the run."""
    made = Setups()
    path = save(made, tmp_path / "checkpoints")
    found = find_saved(tmp_path)
    assert list(found.policies) == ["hunters", "runners"]
    assert found.policy_version == 3
    for name, worker in made.workers.items():
        own = find_checkpoint(path / name)
        assert own.state["mark"] == name
        for key, value in worker.learner.policy.state_dict().items():
            np.testing.assert_array_equal(own.load_weights()[key].numpy(), value.numpy())
    with pytest.raises(
        CheckpointError,
        match=f"several policies, hunters, runners: shoal evaluate .* the folder of one, such as {path}",
    ):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["weights", "gone", "swapped", "renamed"])
def test_a_checkpoint_with_one_damaged_policy_is_none(tmp_path: Path, how: str) -> None:
    """Catches a checkpoint of which one policy is new and the other damaged, missing, or that of another time."""
    made = Setups()
    before = save(made, tmp_path, version=2)
    path = save(made, tmp_path, version=3)
    match how:
        case "weights":
            file = path / "runners" / "weights.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"x")
        case "gone":
            (path / "runners" / "manifest.json").unlink()
        case "swapped":
            for file in (before / "runners").iterdir():
                (path / "runners" / file.name).write_bytes(file.read_bytes())
        case "renamed":
            state = json.loads((path / "state.json").read_text())
            (path / "state.json").write_text(json.dumps(state | {"policies": ["hunters", "others"]}))
    latest = Checkpoints(tmp_path).latest()
    assert isinstance(latest, Checkpoint)
    assert latest.path == before
    assert list(latest.policies) == ["hunters", "runners"]


def test_metrics_have_the_policy_as_a_label() -> None:
    """Catches metrics of one policy that are told of both, series of the same name twice, a label where there is one
    policy, and numbers of the whole run that come once for every policy, so that their sum is wrong."""
    found = [make_sources(), make_sources()]
    found[1].trajectory_queue.ledger.trained += 7
    found[1].trajectory_queue.ledger.sampled += 7
    found[1] = dataclasses.replace(found[1], callback_numbers=lambda: {"success": 0.25})
    page = generate_latest(registry_of(dict(zip(PATTERNS, found, strict=True)))).decode()
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    assert len(lines) == len({line.rpartition(" ")[0] for line in lines})
    of_run = {entry.name for entry in CATALOGUE if entry.of_run} | set(INFO)
    for line in lines:
        assert ("policy=" not in line) == (re.split("[{ ]", line)[0] in of_run), line
    assert len([line for line in lines if line.startswith("shoal_actors_alive")]) == 1
    hunters, runners = ([line for line in lines if f'policy="{name}"' in line] for name in PATTERNS)
    assert [line.replace("runners", "hunters").rpartition(" ")[0] for line in runners] == [
        line.rpartition(" ")[0] for line in hunters
    ]
    trained = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("shoal_trained_env_steps_total{")]
    assert trained == [60.0, 67.0]
    # Of one policy, whatever it is named.
    assert {line for line in lines if line.startswith("shoal_callback{")} == {
        'shoal_callback{name="success",policy="hunters"} 0.5',
        'shoal_callback{name="success",policy="runners"} 0.25',
    }
    alone = generate_latest(registry_of(found[0])).decode()
    assert 'policy="' not in alone


def registry_of(sources: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(RunCollector(sources))
    return registry
