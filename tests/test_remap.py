"""Features and actions by name: weights of one environment in another that orders, names or has them differently."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from named_envs import ACTIONS, FEATURES, VALUES, Hills
from rollouts import make_learner, make_policy
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.deploy.cli import main
from shoal.deploy.evaluation.evaluate import evaluate, evaluation_setup
from shoal.deploy.settings.load import load_config, to_dict
from shoal.envs.registry import make_env_spec
from shoal.learner.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from shoal.learner.described_policy import describe_policy
from shoal.policy import FastPolicy, ImageObservation, RecurrentPolicy, TokenObservation, VectorObservation
from shoal.policy.actions import Actions, Continuous, Discrete
from shoal.policy.config import Initialization
from shoal.policy.make import make_policy as make_any_policy
from shoal.policy.observation import Observation
from shoal.policy.remap import NameMap, Remapping, remap
from shoal.policy.tokens import TokensToBox


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to rounding: a matrix product may round a logit differently at another position."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def specification(**kwargs: Any) -> tuple[Observation, Actions]:
    spec = make_env_spec("Hills-v0", **kwargs)
    return observation_of(spec), actions_of(spec)


def in_environment(
    policy: RecurrentPolicy,
    presented: tuple[Observation, Actions],
    names: Remapping | None = None,
    kind: str = "fast",
) -> RecurrentPolicy:
    """The same weights behind another environment's order."""
    described = json.loads(json.dumps(describe_policy(policy)))
    interface = remap(described, *presented, names or Remapping())
    moved = make_any_policy(
        kind,
        interface.observation,
        interface.actions,
        described["embedding_rows"],
        action_rows=interface.action_rows,
        trained_observation=interface.trained_observation,
    )
    moved.load_state_dict(policy.state_dict())
    return moved


def mapping(features: tuple[str, ...] = (), actions: tuple[str, ...] = ()) -> Remapping:
    return Remapping(NameMap(features, "--map-feature"), NameMap(actions, "--map-action"))


@torch.no_grad()
def says(policy: RecurrentPolicy, *observations: np.ndarray) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Logits by action name and value of one slot's observations in turn, and the state after them."""
    state, said = None, []
    for t, obs in enumerate(observations):
        output, state = policy.step(torch.from_numpy(obs)[None], torch.tensor([t == 0]), state)
        said.append(
            {**dict(zip(policy.actions.flat_names, output.logits[0].tolist(), strict=False)), "": float(output.value)}
        )
    assert state is not None
    return said, torch.stack(state)


def walk(seed: int, moves: list[str], **kwargs: Any) -> list[np.ndarray]:
    """The observations of a walk through one world."""
    env = Hills(**kwargs)
    return [env.reset(seed=seed)[0], *(env.step(env.actions.index(move))[0] for move in moves)]


def decided_policy(observation: Observation, actions: Actions) -> FastPolicy:
    """A policy that does something else in another world."""
    torch.manual_seed(5)
    policy = FastPolicy(observation, actions, initialization=Initialization(lstm_bias="zeros"))
    with torch.no_grad():
        for layer in (policy.cnn1, policy.cnn2, policy.fc1, policy.encoded_obs):
            layer.weight.mul_(2)
        for weight in (policy.lstm.weight_ih_l0, policy.lstm.weight_ih_l1, policy.actor_W):
            weight.mul_(3)
        policy.action_embeddings.weight.mul_(10)
    return policy


TRAINED = specification()
POLICY = decided_policy(*TRAINED)


@settings(max_examples=15)
@given(
    st.permutations([*FEATURES, "", ""]),
    st.permutations(VALUES),
    st.permutations(ACTIONS),
    st.booleans(),
    st.sampled_from(["fast", "component"]),
    st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_the_order_of_an_environment_changes_nothing(
    features: list[str],
    values: list[str],
    actions: list[str],
    backwards: bool,
    kind: str,
    moves: list[str],
    seed: int,
) -> None:
    """Catches planes, scales or embedding rows by position: the same row means another action, ids of the new
    environment are read with the table of the trained one, its normalizations land on trained planes.
    """
    order = {"features": tuple(features), "values": tuple(values), "actions": tuple(actions)}
    moved = in_environment(POLICY, specification(**order, scale=2.0), kind=kind)
    said, state = says(POLICY, *walk(seed, moves))
    here, state_here = says(moved, *walk(seed, moves, **order, backwards=backwards))
    assert here == said
    assert list(here[0])[:-1] == list(actions)
    assert torch.equal(state_here, state)


def test_nothing_is_moved_where_nothing_is_different() -> None:
    """Catches a look-up per step, or a table that differs, where environment and weights agree."""
    trained, presented = TokensToBox(TRAINED[0]), TokensToBox(TRAINED[0], TRAINED[0])
    assert torch.equal(trained._plane, presented._plane)
    assert torch.equal(trained._magnitude, presented._magnitude)
    vector = make_policy(VectorObservation(2, ("x", "y")), Continuous(("a", "b")))
    again = in_environment(vector, (vector.observation, vector.actions))
    assert (again._columns, again._order) == (None, None)


def saved(directory: Path, policy: RecurrentPolicy = POLICY, **kwargs: Any) -> Checkpoint:
    """A checkpoint as a run in ``Hills(**kwargs)`` saves it."""
    config, problems = load_config([], ["env.id=Hills-v0", "env.num_envs=8", "learner.batch_size=8"])
    assert not problems
    state = {"config": to_dict(config), "env_id": "Hills-v0", "env_kwargs": kwargs, "mean_return": None}
    books = {"sampled": 0, "trained": 0, "in_flight": 0, "dropped": {}}
    state |= {"run_id": "test", "session": 0, "ledger": books}
    Checkpoints(directory / "checkpoints").save(make_learner(policy), state)
    return find_checkpoint(directory)


def episodes(checkpoint: Checkpoint, **how: Any) -> tuple[float, list[tuple[Any, ...]]]:
    """The mean return of greedy play, and every step of it."""
    Hills.history.clear()
    setup = evaluation_setup(checkpoint, num_envs=None, seed=3, **how)
    returns = evaluate(checkpoint, setup, episodes=16, greedy=True)
    return returns.mean, list(Hills.history)


OTHER = {
    "features": ("tag", "", "hp", "ore"),
    "values": ("altar", "wall", "mine"),
    "actions": ("east", "stay", "west", "north", "south"),
}


def test_episodes_are_the_same_in_an_environment_with_another_order(tmp_path: Path) -> None:
    """Catches an evaluation that plays with the environment's order, or that refuses one which is only permuted."""
    checkpoint = saved(tmp_path)
    mean, steps = episodes(checkpoint)
    assert len({step[-1] for step in steps}) > 2
    assert episodes(checkpoint, env_id="Hills-v0", env_kwargs=OTHER) == (mean, steps)
    # The environment of the run itself may have got another order since.
    assert episodes(saved(tmp_path / "since", features=OTHER["features"])) == (mean, steps)


def test_an_actor_still_needs_the_environment_of_the_run(tmp_path: Path) -> None:
    """Catches a machine with another version of the environment, whose order the run's tables do not know."""
    setup = evaluation_setup(saved(tmp_path), num_envs=2, seed=0, env_id="Hills-v0", env_kwargs=OTHER)
    setup.make_env(np.random.SeedSequence(0)).close()
    for kwargs in ({}, {**OTHER, "actions": ACTIONS}, {**OTHER, "called": {"hp": "health"}}):
        with pytest.raises(ValueError, match="same versions installed on every machine"):
            dataclasses.replace(setup, env_kwargs=kwargs).make_env(np.random.SeedSequence(0))


def test_what_only_one_side_knows_is_refused_with_both_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches play with planes that stay empty, or actions on the row of another, for want of a word; and a refusal
    that does not say what to write.
    """
    saved(tmp_path)
    kwargs = [
        'called={"hp": "health", "mine": "quarry", "north": "up", "tag": "tags"}',
        'features=["tag", "ore", "hp", "fog"]',
    ]
    kwargs += ['actions=["east", "north", "west", "south", "jump", "stay"]']
    assert main(["evaluate", str(tmp_path), "--env", "Hills-v0", *(f"--env-kwargs={text}" for text in kwargs)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "only the policy knows: hp, tag:wall, tag:mine, tag:altar\n" in said
    assert "only the environment knows: health, fog, tags:wall (like tag:wall?), tags:quarry" in said
    assert "only the policy knows: north\n" in said
    assert "only the environment knows: up, jump\n" in said
    assert "--map-feature ENVIRONMENT=TRAINED" in said
    assert "--map-action ENVIRONMENT=TRAINED" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--map-feature", "hpp=hp"], "the environment has no 'hpp' among its features hp, ore, tag"),
        (["--map-feature", "hp=hq"], "the policy has no 'hq' among its features hp, ore, tag"),
        (["--map-feature", "=hp"], "only the environment knows: hp"),
        (["--map-feature", "hp="], "only the policy knows: hp"),
        (["--map-feature", "hp=tag:wall", "--map-feature", "=hp"], "one is a magnitude, one a category"),
        (["--map-feature", "hp=tag", "--map-feature", "tag=hp"], "only the environment knows: hp (like"),
        (
            ["--map-feature", "tag:wall=tag:wall", "--map-feature", "tag:mine=hp", "--map-feature", "hp=tag:mine"],
            "one is a magnitude, one a category",
        ),
        (["--map-feature", "hp"], "--map-feature: ['hp'] must be of the form ENVIRONMENT=TRAINED"),
        (["--map-feature", "hp=ore", "--map-feature", "hp=hp"], "--map-feature: hp is mapped twice"),
        (["--map-action", "jump=stay"], "the environment has no 'jump' among its actions"),
        (["--map-action", "stay=", "--map-action", "=stay"], "'stay' cannot be left out"),
        (["--env-kwargs", "scale"], "--env-kwargs: 'scale' must be of the form NAME=VALUE"),
    ],
)
def test_bad_mappings_are_refused(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mapping that does nothing, because of a spelling mistake, or that cannot be meant."""
    saved(tmp_path)
    assert main(["evaluate", str(tmp_path), *options]) == 2
    assert expected in capsys.readouterr().err


def test_mapped_names_play_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mapping in the wrong direction, one that is lost between the command line and the policy, and one of a
    whole categorical feature that forgets its values.
    """
    checkpoint = saved(tmp_path)
    mean, steps = episodes(checkpoint)
    called = {"hp": "health", "tag": "kind", "mine": "quarry", "west": "left", "east": "west"}
    renamed = mapping(("health=hp", "kind=tag", "kind:quarry=tag:mine"), ("left=west", "west=east"))
    assert episodes(checkpoint, env_id="Hills-v0", env_kwargs={**OTHER, "called": called}, remapping=renamed) == (
        mean,
        steps,
    )
    options = ["--map-feature", "health=hp", "--map-feature", "ore=ore"]
    kwargs = ["--env-kwargs", 'called={"hp": "health"}', "--num-envs", "8", "--episodes", "16", "--seed", "3"]
    assert main(["evaluate", str(tmp_path), "--env", "Hills-v0", "--greedy", "--json", *options, *kwargs]) == 0
    assert json.loads(capsys.readouterr().out)["mean_return"] == mean


def test_what_is_left_out_changes_nothing_and_counts_nothing() -> None:
    """Catches new features on somebody's plane, an alarm of ignored tokens that were left out on purpose, and silence
    about those that nobody expected.
    """
    kwargs: dict[str, Any] = {"features": ("fog", "tag", "ore", "hp"), "values": ("mine", "wall", "altar")}
    called = {"mine": "shop", "hp": "ore2"}
    here = specification(**kwargs, called=called)
    names = ("fog=", "tag:shop=", "=tag:mine", "ore2=", "=hp")
    moved = in_environment(POLICY, here, mapping(names))
    seen = walk(5, ["north", "east"], **kwargs)
    trained = walk(5, ["north", "east"])
    for obs in trained:
        obs[(obs[:, 1] == 0) | ((obs[:, 1] == 2) & (obs[:, 2] == 1))] = 255  # hp, and mines
    assert says(moved, *seen)[0] == says(POLICY, *trained)[0]
    tokens = torch.from_numpy(np.stack(seen))
    assert moved.to_box.count_ignored(tokens.numpy()) == 0
    tokens[0, 30:34] = torch.tensor([[0x11, 9, 1], [0x11, 1, 77], [0x77, 2, 1], [0x77, 0, 1]])
    assert moved.to_box.count_ignored(tokens.numpy()) == 3
    # One name, two meanings.
    other = in_environment(POLICY, TRAINED, mapping(("hp=", "=hp")))
    assert isinstance(TRAINED[0], TokenObservation)
    assert isinstance(other.observation, TokenObservation)
    assert {feature for feature, _, _ in TRAINED[0].planes_of(other.observation)} == {1, 2}
    full = walk(5, ["north", "east"])
    without = [obs.copy() for obs in full]
    for obs in without:
        obs[obs[:, 1] == 0] = 255
    assert says(other, *full)[0] == says(POLICY, *without)[0]


def test_two_may_stand_for_one() -> None:
    """Catches an action or feature that is new and looks like a known one, and is refused or takes its place."""
    order = {"features": ("ore", "tag", "crystal", "hp"), "actions": (*ACTIONS, "jump")}
    moved = in_environment(POLICY, specification(**order), mapping(("crystal=ore",), ("jump=stay",)))
    seen, trained = walk(5, ["north"], **order), walk(5, ["north"])
    for obs in seen:
        obs[::2, 1][obs[::2, 1] == 0] = 2  # some of the ore is crystal here
    output, _ = moved.step(torch.from_numpy(np.stack(seen)), torch.ones(2, dtype=torch.bool))
    expected, _ = POLICY.step(torch.from_numpy(np.stack(trained)), torch.ones(2, dtype=torch.bool))
    assert_near(output.logits, expected.logits[:, [0, 1, 2, 3, 4, 0]])


def test_one_cannot_stand_for_two() -> None:
    """Catches values of one feature mapped into two, of which the second would silently have no plane."""
    actions = Discrete((("a",),))
    trained = TokenObservation(5, 5, 9, [None] * 2, ["a", "b"], [(0, ["x", "y"]), (1, ["z"])])
    presented = TokenObservation(5, 5, 9, [None], ["c"], [(0, ["x", "z"])])
    described = describe_policy(FastPolicy(trained, actions))
    with pytest.raises(ValueError, match="c cannot stand for both a and b"):
        remap(described, presented, actions, mapping(("c:x=a:x", "c:z=b:z", "=a:y")))
    assert remap(described, presented, actions, mapping(("c:x=a:x", "c:z=a:y", "=b"))).observation.shape == (9, 3)


def test_an_action_that_is_absent_is_never_taken(tmp_path: Path) -> None:
    """Catches a row that is dropped from the checkpoint, so that the next environment cannot have it back."""
    fewer = ("south", "east", "stay")
    moved = in_environment(POLICY, specification(actions=fewer), mapping(actions=("=north", "=west")))
    assert moved.actions == Discrete((fewer,))
    seen = walk(1, ["south"])
    back = in_environment(moved, TRAINED)
    assert says(back, *seen)[0] == says(POLICY, *seen)[0]
    kept = {name: logit for name, logit in says(POLICY, *seen)[0][0].items() if name not in ("north", "west")}
    assert says(moved, *seen)[0][0] == kept


def test_numbers_follow_their_names() -> None:
    """Catches columns by position, and one that is absent read as another."""
    trained = VectorObservation(4, ("x", "y", "speed", "fuel"))
    policy = make_policy(trained, Discrete((ACTIONS,)))
    here = VectorObservation(4, ("fuel", "heat", "y", "velocity"))
    moved = in_environment(policy, (here, policy.actions), mapping(("velocity=speed", "heat=", "=x")))
    seen = np.array([4, 9, 2, 3], np.float32)
    assert says(moved, seen)[0] == says(policy, np.array([0, 2, 3, 4], np.float32))[0]
    permuted = in_environment(policy, (VectorObservation(4, ("y", "x", "fuel", "speed")), policy.actions))
    assert says(permuted, np.array([2, 1, 4, 3], np.float32))[0] == says(policy, np.array([1, 2, 3, 4], np.float32))[0]
    # As a gymnasium environment declares them.
    declared = [
        observation_of(make_env_spec("Gauges-v0", parts=parts)) for parts in (("fuel", "heat"), ("heat", "fuel"))
    ]
    gauges = make_policy(declared[0], policy.actions)
    turned = in_environment(gauges, (declared[1], policy.actions))
    assert says(turned, np.array([3, 4, 1, 2], np.float32))[0] == says(gauges, np.array([1, 2, 3, 4], np.float32))[0]
    # Names with an = in them.
    kinds = make_policy(VectorObservation(2, ("kind=0", "kind=1")), Discrete((ACTIONS,)))
    sorts = in_environment(
        kinds,
        (VectorObservation(2, ("sort=1", "sort=2")), kinds.actions),
        mapping(("sort=2=kind=0", "sort=1=", "=kind=1")),
    )
    assert says(sorts, np.array([9, 1], np.float32))[0] == says(kinds, np.array([1, 0], np.float32))[0]
    with pytest.raises(ValueError, match=r"(?s)knows: speed.*knows: heat, velocity"):
        in_environment(policy, (VectorObservation(5, ("fuel", "heat", "y", "x", "velocity")), policy.actions))
    with pytest.raises(ValueError, match="two of"):
        in_environment(policy, (here, policy.actions), mapping(("velocity=speed", "heat=speed", "=x")))


def test_several_choices_follow_their_names() -> None:
    """Catches names that are matched over the bounds of a choice, where both have a "no"."""
    actions = Discrete((("no", "left", "right"), ("no", "fire")), scalar=False)
    policy = make_policy(VectorObservation(2), actions)
    other = Discrete((("right", "no", "left"), ("fire", "no")), scalar=False)
    obs = np.ones(2, np.float32)
    moved = in_environment(policy, (policy.observation, other))
    assert says(moved, obs)[0] == says(policy, obs)[0]
    assert moved.actions == other
    renamed = Discrete((("right", "no", "up"), ("fire", "no")), scalar=False)
    assert (
        says(in_environment(policy, (policy.observation, renamed), mapping(actions=("0:up=0:left",))), obs)[0]
        == says(policy, obs)[0]
    )
    with pytest.raises(ValueError, match="choice 0 cannot take"):
        in_environment(policy, (policy.observation, renamed), mapping(actions=("0:up=1:fire", "=0:left")))
    with pytest.raises(ValueError, match="trained with 2 choices"):
        in_environment(policy, (policy.observation, Discrete((("no",),))))
    with pytest.raises(ValueError, match="trained with Discrete"):
        in_environment(policy, (policy.observation, Continuous(("no",))))


def test_means_and_deviations_follow_their_names(tmp_path: Path) -> None:
    """Catches log standard deviations by position: exploration of one joint on another."""
    policy = make_policy(VectorObservation(2), Continuous(("hip", "knee", "ankle")))
    with torch.no_grad():
        policy.actor_log_std.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    obs, first = torch.ones(1, 2), torch.ones(1, dtype=torch.bool)
    logits = policy.step(obs, first)[0].logits
    order = [2, 0, 1]
    moved = in_environment(policy, (policy.observation, Continuous(("ankle", "hip", "knee"))))
    assert_near(moved.step(obs, first)[0].logits, logits[:, [*order, *(3 + i for i in order)]])
    fewer = in_environment(
        moved, (policy.observation, Continuous(("foot", "hip"))), mapping(actions=("foot=ankle", "=knee"))
    )
    assert_near(fewer.step(obs, first)[0].logits, logits[:, [2, 0, 5, 3]])
    # The checkpoint of the fewer still has all three.
    rebuilt = saved(tmp_path, fewer).make_policy()
    assert_near(rebuilt.step(obs, first)[0].logits, logits[:, [2, 0, 5, 3]])
    back = in_environment(fewer, (policy.observation, policy.actions))
    assert_near(back.step(obs, first)[0].logits, logits)


@pytest.mark.parametrize(
    ("trained", "presented", "expected"),
    [
        (TokenObservation(5, 5, 9, [1.0]), TokenObservation(5, 7, 9, [1.0]), "window of 5x5 cells.*5x7"),
        (TokenObservation(5, 5, 9, [1.0, 2.0]), TokenObservation(5, 5, 9, [2.0, 1.0]), "without a name"),
        (TokenObservation(5, 5, 9, [1.0], ["a"]), TokenObservation(5, 5, 9, [1.0]), "without a name"),
        (TokenObservation(5, 5, 9, [1.0] * 2, ["a"] * 2), TokenObservation(5, 5, 9, [1.0] * 3, ["a"] * 3), "two of"),
        (TokenObservation(5, 5, 9, [1.0]), VectorObservation(3), "trained with TokenObservation"),
        (ImageObservation(8, 8, 3), ImageObservation(8, 9, 3), "trained with ImageObservation"),
        (VectorObservation(3), VectorObservation(4), "trained with 3 numbers"),
        (VectorObservation(1, ["a"]), VectorObservation(1), "names none"),
    ],
)
def test_what_no_name_can_bring_together_is_refused(
    trained: Observation, presented: Observation, expected: str
) -> None:
    """Catches a guess by position, and an error of the network's far from its cause."""
    actions = Discrete((("a",),))
    described = describe_policy(FastPolicy(trained, actions))
    with pytest.raises(ValueError, match=expected):
        remap(described, presented, actions, Remapping())
    if getattr(trained, "names", None) is None and getattr(trained, "feature_names", None) is None:
        with pytest.raises(ValueError, match="no names"):
            remap(described, trained, actions, mapping(("a=a",)))
    assert remap(described, trained, actions, Remapping()).observation == trained


def train(run: Path, *settings: str, steps: int, **kwargs: Any) -> dict[str, Any]:
    """A small inline run in ``Hills(**kwargs)``; its summary."""
    fixed = [
        "mode=inline",
        "metrics.port=-1",
        "env.id=Hills-v0",
        "env.num_envs=4",
        "actor.unroll_length=4",
        "learner.num_threads=1",
        "learner.learning_rate=1e-5",
    ]
    fixed += [
        "evaluation.random_seconds=0",
        "learner.batch_size=8",
        "learner.epochs=1",
        "learner.minibatches=2",
        "actor.num_actors=1",
        f"env.kwargs={json.dumps(kwargs)}",
        f"total_env_steps={steps}",
    ]
    assert main(["train", *fixed, f"run_dir={run}", *settings]) == 0
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_a_resumed_run_reads_another_order_with_its_own_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a learner or actors that take the order of the new environment for that of the weights, and a checkpoint
    that forgets which order its weights have: wrong at the second resume.
    """
    saved(tmp_path / "first")
    resume = f"resume={tmp_path / 'first'}"
    same = train(tmp_path / "same", resume, steps=150)
    # Features alone: every number of the training itself is the same.
    reads = {"features": OTHER["features"], "values": OTHER["values"]}
    assert train(tmp_path / "other", resume, steps=150, **reads)["weights_sha256"] == same["weights_sha256"]
    end = find_checkpoint(tmp_path / "same")
    played = episodes(end)
    assert len({step[-1] for step in played[1]}) > 2
    # Long enough already: it only reads, says what it read with, and saves.
    mapped = ["policy.map_features=[health=hp]", "policy.map_actions=[up=north]"]
    called = {"north": "up", "hp": "health"}
    train(tmp_path / "third", f"resume={tmp_path / 'other'}", *mapped, steps=150, **OTHER, called=called)
    third = find_checkpoint(tmp_path / "third")
    # In its own environment it plays with the run's own mapping, elsewhere without one.
    assert episodes(third) == episodes(third, env_id="Hills-v0") == played
    train(tmp_path / "back", f"resume={tmp_path / 'third'}", steps=150)
    assert find_checkpoint(tmp_path / "back").state["policy"] == end.state["policy"]
    assert episodes(find_checkpoint(tmp_path / "back")) == played
    capsys.readouterr()
    command = [
        "train",
        "mode=inline",
        "env.id=Hills-v0",
        "metrics.port=-1",
        f"env.kwargs={json.dumps({'called': called})}",
    ]
    assert main([*command, resume, f"run_dir={tmp_path / 'bad'}"]) == 2
    said = capsys.readouterr().err
    assert "only the environment knows: health" in said
    assert "policy.map_actions ENVIRONMENT=TRAINED, e.g. up=" in said
    assert not (tmp_path / "bad" / "config.yaml").exists()
    assert main([*command, f"run_dir={tmp_path / 'bad'}", "policy.map_features=[health=hp]"]) == 2
    assert "nothing is resumed" in capsys.readouterr().err
    assert main([*command, "policy.map_features=[health]", "policy.map_actions=[up]"]) == 2
    assert capsys.readouterr().err.count("must be of the form ENVIRONMENT=TRAINED") == 2
