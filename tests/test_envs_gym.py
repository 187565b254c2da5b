"""Gymnasium environments: every space that is supported, and every way in which an environment breaks."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from shoal.envs.boundary import (
    ContinuousActions,
    DiscreteActions,
    EnvironmentFault,
    StepRows,
    TokenSpace,
    VectorSpace,
)
from shoal.envs.config import AdapterOptions, EnvConfig, EnvironmentNotFound
from shoal.envs.gym import GymEnvironment
from shoal.envs.play import play
from shoal.envs.reference import random_player
from shoal.envs.registry import make_vector_env

LARGEST = float(np.finfo(np.float32).max)


class SpaceEnv(gymnasium.Env[Any, Any]):
    """Observations sampled from a space; keeps the actions that reach it."""

    actions: ClassVar[list[Any]] = []

    def __init__(self, observation_space: Any = None, action_space: Any = None, tokens: Any = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,)) if observation_space is None else observation_space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        if tokens is not None:
            self.metadata = {"render_modes": [], "token_space": tokens}
        self.last: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        SpaceEnv.last = self.observation_space.sample()
        return SpaceEnv.last, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        SpaceEnv.actions.append(action)
        SpaceEnv.last = self.observation_space.sample()
        return SpaceEnv.last, 1.0, False, False, {}


class BrokenEnv(gymnasium.Env[np.ndarray, int]):
    """Counts its steps as observations; breaks at ``at``, in the way ``how``."""

    observation_space = spaces.Box(0, 50, (2,), dtype=np.float32)
    action_space = spaces.Discrete(2)
    resets = 0
    closed = 0

    def __init__(self, how: str = "", at: int = 12, length: int = 20) -> None:
        self.how, self.at, self.length = how, at, length
        self.count = 0
        self.poisoned = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        BrokenEnv.resets += 1
        if self.how == "reset always" or (self.how == "reset" and BrokenEnv.resets == 3):
            raise OSError("no map")
        self.count = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: int) -> Any:
        self.count += 1
        obs = np.full(2, self.count, dtype=np.float32)
        answer = [obs, 1.0, self.count == self.length, False, {}]
        if self.count != self.at:
            return tuple(answer)
        match self.how:
            case "raises":
                raise RuntimeError("lost the plot")
            case "short":
                return tuple(answer[:4])
            case "obs nan":
                answer[0] = np.array([0, np.nan], dtype=np.float32)
            case "obs shape":
                answer[0] = np.zeros(3, dtype=np.float32)
            case "obs dtype":
                answer[0] = np.array(["a", "b"])
            case "reward nan":
                answer[1] = float("nan")
            case "reward inf":
                answer[1] = np.float64("inf")
            case "reward huge":
                answer[1] = 1e38
            case "reward none":
                answer[1] = None
            case "terminated two":
                answer[2] = 2
            case "truncated none":
                answer[3] = None
            case "exits":
                sys.exit(3)
        return tuple(answer)

    def close(self) -> None:
        BrokenEnv.closed += 1


gymnasium.register("EnvsTestSpace-v0", SpaceEnv)
gymnasium.register("EnvsTestBroken-v0", BrokenEnv)


def make_rows(env: GymEnvironment) -> StepRows:
    slots = env.num_envs
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.zeros((slots, *env.spec.obs_shape), dtype=env.spec.obs_dtype)
    return StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2])


NESTED = spaces.Dict(
    {
        "z": spaces.Discrete(3, start=-1),
        "a": spaces.Tuple((spaces.MultiBinary((2, 2)), spaces.Box(-2, 2, (2, 3), dtype=np.float64))),
        "m": spaces.Dict({"inner": spaces.MultiDiscrete([2, 4])}),
    }
)


COMPOUND = (spaces.Dict, spaces.Tuple)


@pytest.mark.parametrize(
    "space",
    [
        NESTED,
        spaces.Discrete(5, start=2),
        spaces.MultiDiscrete([3, 2], start=[1, -1]),
        spaces.MultiBinary(4),
        spaces.Box(0, 255, (4, 3), dtype=np.uint8),
        spaces.Box(-np.inf, np.inf, (), dtype=np.float32),
        spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 9, (1,), dtype=np.int64))),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces_flatten_as_gymnasium_does(space: Any) -> None:
    """Catches parts in another order, a forgotten ``start``, or bytes that are cut."""
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space)
    found = env.spec.observation
    assert isinstance(found, VectorSpace)
    assert found.size == spaces.flatdim(space)
    assert len(found.names) == len(set(found.names)) == (found.size if isinstance(space, COMPOUND) else 0)
    rows = make_rows(env)
    env.reset(rows.obs)
    for _ in range(5):
        np.testing.assert_array_equal(rows.obs[0], spaces.flatten(space, SpaceEnv.last).astype(np.float32))
        env.step(np.zeros(1, dtype=np.int64), rows)
    assert env.faults == []
    env.close()


@pytest.mark.parametrize(
    ("space", "names"),
    [
        (
            NESTED,
            "a[0][0,0] a[0][0,1] a[0][1,0] a[0][1,1] a[1][0,0] a[1][0,1] a[1][0,2] a[1][1,0] a[1][1,1] a[1][1,2] "
            "m.inner[0]=0 m.inner[0]=1 m.inner[1]=0 m.inner[1]=1 m.inner[1]=2 m.inner[1]=3 z=-1 z=0 z=1",
        ),
        (spaces.Tuple((spaces.Box(0, 1, (2,)), spaces.Discrete(2))), "obs[0][0] obs[0][1] obs[1]=0 obs[1]=1"),
        (
            spaces.Dict({"position": spaces.Box(0, 1, (2,)), "fuel": spaces.Box(0, 1, ())}),
            "fuel position[0] position[1]",
        ),
        (spaces.Dict({"a": spaces.Box(0, 1, (1,)), "a[0]": spaces.Box(0, 1, ())}), "['a'][0] ['a[0]']"),
    ],
    ids=str,
)
def test_numbers_of_dicts_and_tuples_have_names(space: Any, names: str) -> None:
    """Catches names in another order than the numbers, and two numbers of one name."""
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space)
    assert isinstance(env.spec.observation, VectorSpace)
    assert env.spec.observation.names == tuple(names.split(" "))
    # The number that a name tells of is the one that changes with it.
    rows = make_rows(env)
    env.reset(rows.obs)
    if "position[1]" in names:
        assert rows.obs[0, 2] == SpaceEnv.last["position"][1]
    env.close()


def test_tokens_where_the_environment_says_so() -> None:
    """Catches tokens taken for numbers, and a declaration that does not fit its space."""
    tokens = {
        "width": 3,
        "height": 3,
        "num_tokens": 6,
        "feature_names": ("kind",),
        "feature_normalizations": (1.0,),
    }
    space = spaces.Box(0, 255, (6, 3), dtype=np.uint8)
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space, tokens=tokens)
    assert isinstance(env.spec.observation, TokenSpace)
    assert env.spec.obs_shape == (6, 3)
    env.close()
    with pytest.raises(ValueError, match="token_space"):
        GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space, tokens={**tokens, "num_tokens": 7})


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.OneOf([spaces.Discrete(2)]),
        spaces.Dict({"note": spaces.Text(3)}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces_without_a_fixed_size_are_refused(space: Any) -> None:
    """Catches a failure deep in the network instead of a word about the space."""
    with pytest.raises(ValueError, match=r"EnvsTestSpace-v0: obs.* (Text|Sequence|Graph|OneOf) space.*supported: Box"):
        GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space)


@pytest.mark.parametrize(
    ("space", "action", "reaches"),
    [
        (spaces.Discrete(3, start=5), np.array([2]), 7),
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), np.array([[2, 1]]), [3, 1]),
        (spaces.MultiBinary(3), np.array([[1, 0, 1]]), [1, 0, 1]),
        (spaces.Box(-1, 2, (2, 1)), np.array([[-3.0, 9.0]], dtype=np.float32), [[-1], [2]]),
        (spaces.Box(-np.inf, np.inf, (1,)), np.array([[50.0]], dtype=np.float32), [50.0]),
        (spaces.Box(5, np.inf, (2,)), np.array([[-1.0, 1.0]], dtype=np.float32), [5.0, 7.0]),
        (spaces.Box(-np.inf, -3, (2,)), np.array([[-1.0, 1.0]], dtype=np.float32), [-5.0, -3.0]),
        (spaces.Box(-5, np.inf, (2,)), np.array([[-1.0, 9.0]], dtype=np.float32), [-1.0, 9.0]),
        (spaces.Box(-LARGEST, LARGEST, (2,)), np.array([[-1.0, 0.5]], dtype=np.float32), [-1.0, 0.5]),
        (spaces.Box(0, LARGEST, (2,)), np.array([[-1.0, 1.0]], dtype=np.float32), [0.0, 2.0]),
        (spaces.Box(-2, 2, ()), np.array([[0.5]], dtype=np.float32), 1.0),
        (spaces.MultiDiscrete([3, 2], dtype=np.uint8), np.array([[2, 1]]), [2, 1]),
        (spaces.Discrete(3, dtype=np.int8), np.array([2]), 2),
    ],
    ids=str,
)
def test_actions_arrive(space: Any, action: np.ndarray, reaches: Any) -> None:
    """Catches a forgotten ``start``, an unclipped number, a lost shape; an action that stays at its only bound, or is
    the largest number there is; and a type that the space does not contain."""
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, action_space=space)
    assert env.spec.action_shape == action.shape[1:]
    assert isinstance(env.spec.actions, ContinuousActions if isinstance(space, spaces.Box) else DiscreteActions)
    rows = make_rows(env)
    env.reset(rows.obs)
    env.step(action.astype(env.spec.action_dtype), rows)
    assert space.contains(np.asarray(SpaceEnv.actions[-1], space.dtype))
    assert np.asarray(SpaceEnv.actions[-1]).dtype == space.dtype
    np.testing.assert_array_equal(SpaceEnv.actions[-1], reaches)
    env.close()


@pytest.mark.parametrize(
    "space",
    [spaces.Text(3), spaces.Dict({"a": spaces.Text(2)}), spaces.Box(0, 9, (2,), int), spaces.Box(-1, 1, (0,))],
)
def test_other_action_spaces_are_refused(space: Any) -> None:
    """Catches a head for something that has none, and a word that does not say what to do."""
    with pytest.raises(ValueError, match=r"EnvsTestSpace-v0: action space .* is not supported.*ActionWrapper"):
        GymEnvironment("EnvsTestSpace-v0", 1, 0, action_space=space)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (0,)), spaces.Dict({}), spaces.Tuple((spaces.Box(0, 1, (2, 0)),))])
def test_observations_of_nothing_are_refused(space: Any) -> None:
    """Catches numpy's word about an array without elements."""
    with pytest.raises(ValueError, match=r"EnvsTestSpace-v0: the observation space .* holds no number"):
        GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space)


def test_the_wrapper_that_is_named_leaves_a_text_out() -> None:
    """Catches advice that does not work."""
    space = spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), np.uint8), mission=spaces.Text(9), way=spaces.Discrete(4))
    with pytest.raises(ValueError, match=r"obs\['mission'\] is a Text space") as refused:
        GymEnvironment("EnvsTestSpace-v0", 1, 0, observation_space=space)
    said = re.search(r"env.wrappers='(.*?)'", str(refused.value))
    assert said
    options = AdapterOptions(wrappers=yaml.safe_load(said[1]))
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, options, observation_space=space)
    assert "image" in env.spec.declared
    assert "mission" not in env.spec.declared
    env.close()


def test_random_actions_are_spread_over_the_bounds() -> None:
    """Catches actions in the environment's units, which are mapped onto its bounds once more: nearly all were 1000."""
    env = GymEnvironment("EnvsTestSpace-v0", 4, 0, action_space=spaces.Box(0, 1000, (1,)))
    SpaceEnv.actions.clear()
    play(env, random_player(env.spec, np.random.default_rng(0)), 4, max_env_steps=400)
    actions = np.concatenate(SpaceEnv.actions)
    assert abs(np.mean(actions) - 500) < 60
    assert abs(np.std(actions) - 289) < 40
    env.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "RuntimeError: lost the plot"),
        ("short", "must be .obs, reward"),
        ("obs nan", "obs has a value that is not finite, nan, at flat index 1"),
        ("obs shape", r"obs has shape \(3,\), must be \(2,\)"),
        ("obs dtype", "obs has dtype <U1, must be float32"),
        ("reward nan", "reward nan is not finite"),
        ("reward inf", "reward inf is not finite"),
        ("reward huge", r"reward 1e\+38"),
        ("reward none", "reward NoneType None is not a number"),
        ("terminated two", "terminated int 2 is not a bool"),
        ("truncated none", "truncated NoneType None is not a bool"),
        ("exits", "SystemExit: 3"),
    ],
)
def test_a_fault_costs_one_slot_one_transition(how: str, said: str) -> None:
    """Catches a broken environment that ends the run, poisons the batch, or is restarted without a word."""
    env = GymEnvironment("EnvsTestBroken-v0", 2, 0, how=how)
    rows = make_rows(env)
    env.reset(rows.obs)
    # The other slot is sound.
    env._vector.envs[1]._inner.env.unwrapped.how = ""
    BrokenEnv.closed = 0
    for step in range(1, 15):
        env.step(np.ones(2, dtype=np.int64), rows)
        assert not rows.is_first[1]
        assert rows.obs[1].tolist() == [step, step]
        if step == 12:
            assert rows.is_first[0]
            assert rows.obs[0].tolist() == [0, 0]
            assert rows.reward.tolist() == [0, 1]
            assert not (rows.terminated | rows.truncated).any()
            assert BrokenEnv.closed == 1
            (message,) = env.faults
            assert message.startswith("EnvsTestBroken-v0: slot 0, step 12 (seed ")

            assert re.search(said, message), message
        else:
            assert not rows.is_first[0]
    env.close()


def test_fault_in_reset_is_replaced() -> None:
    """Catches a fault in an automatic reset: the slot answers is_first as it would have, from a new environment."""
    BrokenEnv.resets = 0
    env = GymEnvironment("EnvsTestBroken-v0", 2, 0, how="reset", length=3)
    rows = make_rows(env)
    env.reset(rows.obs)
    for _ in range(4):
        env.step(np.ones(2, dtype=np.int64), rows)
    assert rows.is_first.all()
    assert rows.reward.tolist() == [0, 0]
    assert len(env.faults) == 1
    assert "slot 0" in env.faults[0]
    assert "OSError: no map" in env.faults[0]
    env.close()


@pytest.mark.parametrize(("how", "at"), [("reset always", 99), ("obs nan", 1), ("raises", 5)])
def test_environment_that_always_breaks_is_given_up(how: str, at: int) -> None:
    """Catches an endless loop of restarts that produces no data."""
    env = GymEnvironment("EnvsTestBroken-v0", 1, 0, how=how, at=at)
    rows = make_rows(env)

    def play() -> None:
        env.reset(rows.obs)
        for _ in range(30):
            env.step(np.ones(1, dtype=np.int64), rows)

    with pytest.raises(EnvironmentFault, match=r"EnvsTestBroken-v0: slot 0.*3 faults in a row"):
        play()
    env.close()


@pytest.mark.parametrize(
    ("env_id", "said"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("no_such_package.envs:Thing-v0", "no module 'no_such_package'.*install"),
        ("MiniGrid-MemoryS7-v0", "install minigrid and write minigrid:MiniGrid-MemoryS7-v0"),
        ("Nothing/LikeThis-v0", r"package\.module:Env-v0"),
    ],
)
def test_unknown_id_says_what_to_do(env_id: str, said: str) -> None:
    """Catches an error that does not say what to write or install."""
    with pytest.raises(EnvironmentNotFound, match=said):
        GymEnvironment(env_id, 1, 0)


def test_importing_envs_imports_no_environment_library() -> None:
    """Catches an import at the top: mettagrid is an extra, and gymnasium slow to load."""

    code = "import sys, envs; assert not {'gymnasium', 'mettagrid', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"id": ""}, "id\n.*input_value=''"),
        ({"num_envs": 0}, "num_envs\n.*=0"),
        ({"num_envs": True}, "num_envs\n.*=True"),
    ],
)
def test_config_names_the_bad_value(kwargs: dict[str, Any], said: str) -> None:
    """Catches bad settings before any process starts."""
    with pytest.raises(ValueError, match=said):
        EnvConfig(**kwargs)


@pytest.mark.parametrize("env_id", ["recall", "mettagrid/forage", "CartPole-v1"])
def test_unknown_argument_is_named(env_id: str) -> None:
    """Catches a bare TypeError from deep inside for a misspelt ``env.kwargs``."""
    with pytest.raises(ValueError, match=f"{env_id}.*colour"):
        make_vector_env(env_id, 8, 0, colour=1)


def test_wrappers_are_applied_in_order() -> None:
    """Catches wrappers that are ignored: MiniGrid's text can only be dropped by one."""
    names = ["gymnasium.wrappers:FlattenObservation", "envs_test_wrappers:Double"]
    module = types.ModuleType("envs_test_wrappers")
    wide = spaces.Box(-10, 10, (2,))
    transform = gymnasium.wrappers.TransformObservation
    module.Double = lambda env: transform(env, lambda obs: 2 * obs, wide)  # type: ignore[attr-defined]
    sys.modules["envs_test_wrappers"] = module
    space = spaces.Box(-5, 5, (2, 1))
    env = GymEnvironment("EnvsTestSpace-v0", 1, 0, AdapterOptions(wrappers=names), observation_space=space)
    rows = make_rows(env)
    env.reset(rows.obs)
    env.close()
    np.testing.assert_array_equal(rows.obs[0], 2 * SpaceEnv.last[:, 0])
    assert env.faults == []
    with pytest.raises(ValueError, match=r"no wrapper 'gymnasium.wrappers:Nothing'"):
        GymEnvironment("EnvsTestSpace-v0", 1, 0, AdapterOptions(wrappers=["gymnasium.wrappers:Nothing"]))
