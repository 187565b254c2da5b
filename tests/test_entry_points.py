"""Environments named by the class or function that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from make_env import make_env
from old_envs import Old, PresentVector
from shoal import given
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.registry import make_env_spec

CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"


class Still(gymnasium.Env[Any, Any]):
    """Shows its argument."""

    observation_space = spaces.Box(-10, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, shown: float = 1.0) -> None:
        self.shown = shown

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.full(1, self.shown, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.full(1, self.shown, np.float32), 0.0, False, False, {}


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    def give(make: Callable[..., Any], name: str = "somewhere:<lambda>") -> str:
        monkeypatch.setitem(given.environments, name, make)
        return name

    return give


def first_obs(env_id: str, **kwargs: Any) -> np.ndarray:
    env = make_env(env_id, 2, 0, **kwargs)
    obs = np.empty((2, *env.spec.obs_shape), env.spec.obs_dtype)
    env.reset(obs)
    env.close()
    return obs


def test_a_class_by_its_dotted_name() -> None:
    """Catches classes that nobody registered, which many packages have (crafter:Env)."""
    assert np.array_equal(first_obs(CARTPOLE), first_obs("CartPole-v1"))
    assert make_env_spec(CARTPOLE).env_id == CARTPOLE


def test_a_time_limit_may_be_given_as_for_registered_ones() -> None:
    """Catches a class without registration whose episodes never end."""
    env = make_env(CARTPOLE, 1, 0, max_episode_steps=1)
    obs = np.empty((1, 4), np.float32)
    env.reset(obs)
    assert env.first_environment().spec.max_episode_steps == 1  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_object_reaches_processes_of_its_own(give: Callable[..., str], vectorization: str) -> None:
    """Catches a lambda that worker processes look up by its name."""
    name = give(lambda **kwargs: Still(**kwargs))
    assert first_obs(name, vectorization=vectorization, shown=3.0).tolist() == [[3.0], [3.0]]


def test_a_function_may_make_a_registered_environment(give: Callable[..., str]) -> None:
    """Catches gymnasium's own wrappers and specs in the way of a second spec."""
    name = give(lambda: gymnasium.make("CartPole-v1"))
    assert np.array_equal(first_obs(name), first_obs("CartPole-v1"))


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("no_such_module:Env", "there is no module 'no_such_module' here; install the package that has it"),
        (
            "json:Nothing",
            "importing json registers no Nothing, and json has no class or function of that name",
        ),
        ("json:decoder", "'json:decoder' is no class with reset and step"),
        ("json:JSONDecoder", "'json:JSONDecoder' is no class with reset and step"),
        ("os:system", "'os:system' is no class .* annotate the function -> gymnasium.Env, register it"),
        ("old_envs:make_unannotated", "no function that says that it makes one: annotate the function"),
        ("old_envs:make_something", "no function that says that it makes one: annotate the function"),
        ("__main__:Lost", "was defined in a script or notebook, and Lost is not defined in this one"),
        ("gymnasium:partial(make)", r"was defined in a script or notebook, and partial\(make\) is not defined"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(env_id: str, expected: str) -> None:
    """Catches a checkpoint that cannot say what is missing."""
    with pytest.raises(EnvironmentNotFound, match=expected):
        make_env_spec(env_id)


@pytest.mark.parametrize("options", [AdapterOptions(), AdapterOptions(vectorization="native")])
def test_a_name_calls_no_function(tmp_path: Path, options: AdapterOptions) -> None:
    """Catches a checkpoint whose environment is a command."""
    with pytest.raises(EnvironmentNotFound, match="is no class with reset and step"):
        make_env_spec("os:mkdir", options, path=str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_something_else_than_an_environment_is_named(give: Callable[..., str]) -> None:
    """Catches an AttributeError deep in an adapter."""
    with pytest.raises(ValueError, match=r"somewhere:<lambda>: expected one environment from .*, got list, which is"):
        make_env_spec(give(list))
    with pytest.raises(ValueError, match=r"got PresentVector, which steps all slots.*set env.vectorization=native"):
        make_env_spec(give(lambda: PresentVector(num_envs=1, case="endless")))


def test_given_functions_make_environments_of_every_kind(give: Callable[..., str]) -> None:
    """Catches a vector, or an environment of before gymnasium, that only a name of a module could make."""
    assert first_obs(give(lambda: Old(seed=3)))[:, 0, 0, 0].tolist() == [30, 30]
    name = give(lambda num_envs, case: PresentVector(num_envs=num_envs, case=case))
    assert first_obs(name, vectorization="native", case="endless").shape == (2, 2)
