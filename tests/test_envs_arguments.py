"""The environment's own arguments beside the settings of ``env``, and wrappers with arguments of their own."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from make_env import make_env
from scripted_vectors import Rows
from shoal.deploy.evaluation.saved_run import trained_arguments
from shoal.envs.config import AdapterOptions, EnvConfig, split_options
from shoal.envs.registry import make_env_spec, make_vector_env
from shoal.envs.wrappers import find_wrappers
from shoal.learner.checkpoint import Checkpoint

COLLIDING = {"seed": 5, "num_envs": 6, "env_id": "town", "id": "x", "render_mode": "rgb_array", "options": {"a": 1}}


class Colliding(gymnasium.Env[np.ndarray, int]):
    """Its arguments have the names of ours and of gymnasium's; it shows two of them."""

    observation_space = spaces.Box(-100, 100, (3,), np.float32)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (as gymnasium has it)

    def __init__(
        self,
        seed: int = 0,
        num_envs: int = 0,
        env_id: str = "",
        id: str = "",
        render_mode: str | None = None,
        options: Any = None,
        wrappers: tuple[str, ...] = (),
        reseed_episodes: int = 0,
    ) -> None:
        self.render_mode = render_mode
        self.given = (seed, num_envs, env_id, id, render_mode, options)
        self.shown = np.array([seed, num_envs, len(wrappers) + reseed_episodes], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.shown, {}

    def step(self, action: int) -> Any:
        return self.shown, 0.0, False, False, {}


class CollidingVector(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """The same as a native vector."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int, seed: int = 0, env_id: str = "", options: Any = None) -> None:
        self.num_envs, self.given = num_envs, (seed, env_id, options)
        self.single_observation_space, self.single_action_space = spaces.Box(-9, 9, (1,)), spaces.Discrete(2)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.full((self.num_envs, 1), self.given[0], np.float32), {}


gymnasium.register("EnvsColliding-v0", Colliding, vector_entry_point=CollidingVector)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_arguments_with_the_names_of_ours_arrive(vectorization: str) -> None:
    """Catches "got multiple values for argument", and an argument that is taken for a setting of ours."""
    options = AdapterOptions(vectorization=vectorization)  # type: ignore[arg-type]
    env = make_vector_env("EnvsColliding-v0", 2, 0, options, **COLLIDING, wrappers=("a", "b"), reseed_episodes=1)
    rows = Rows(env).rows
    env.reset(rows.obs)
    assert rows.obs.tolist() == [[5, 6, 3]] * 2
    if vectorization == "sync":
        assert env.first_environment().unwrapped.given == tuple(COLLIDING.values())  # type: ignore[attr-defined]
    env.close()


def test_arguments_of_native_vectors_arrive() -> None:
    """Catches the same in a native vector, and a number of slots that is given twice."""
    native = AdapterOptions(vectorization="native")
    env = make_vector_env("EnvsColliding-v0", 2, 0, native, seed=7, env_id="town", options=3)
    assert env._vector.given == (7, "town", 3)  # type: ignore[attr-defined]
    env.close()
    with pytest.raises(ValueError, match=r"env.kwargs.num_envs is the number of slots.*set env.num_envs"):
        make_vector_env("EnvsColliding-v0", 2, 0, native, num_envs=3)


def test_arguments_of_games_arrive() -> None:
    """Catches the same for a factory of PettingZoo's games."""
    pytest.importorskip("pettingzoo")
    import scripted_games

    module = types.ModuleType("envs_test_games")
    given: list[Any] = []

    def factory(seed: int, num_envs: int, env_id: str) -> Any:
        given.append((seed, num_envs, env_id))
        return scripted_games.parallel_env()

    module.factory = factory  # type: ignore[attr-defined]
    sys.modules["envs_test_games"] = module
    env = make_vector_env("pettingzoo:envs_test_games:factory", 3, 0, seed=1, num_envs=2, env_id="town")
    env.close()
    assert given == [(1, 2, "town")]


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("CartPole-v1", "wrappers"),
        ("CartPole-v1", "vectorization"),
        ("recall", "slot_groups"),
        ("pettingzoo:scripted_games:parallel_env", "autoreset_mode"),
    ],
)
def test_settings_in_the_old_place_say_where_they_are_now(env_id: str, name: str) -> None:
    """Catches a setting that is passed over, or a bare TypeError, where it is written in ``env.kwargs`` as once."""
    if env_id.startswith("pettingzoo"):
        pytest.importorskip("pettingzoo")
    with pytest.raises(ValueError, match=rf"{env_id}: env.kwargs.{name} is no argument.*write env.{name}=async"):
        make_vector_env(env_id, 1, 0, **{name: "async"})


def test_checkpoints_that_mixed_both_are_split() -> None:
    """Catches a checkpoint of before that can no longer be evaluated."""
    mixed = {"vectorization": "async", "slot_groups": 3, "wrappers": ["a:B"], "delay": 4}
    own, options = split_options(mixed)
    assert own == {"delay": 4}
    assert options == AdapterOptions(vectorization="async", slot_groups=3, wrappers=["a:B"])


@pytest.mark.parametrize(
    ("env_id", "kind", "layout"),
    [
        ("EnvsColliding-v0", "vector", "none"),
        ("EnvsColliding-v0", "image", "channels_last"),
        ("EnvsColliding-v0", "tokens", "auto"),
        ("recall?delay=3", "vector", "auto"),
        ("mettagrid/forage", "tokens", "auto"),
    ],
)
def test_checkpoints_of_before_are_read_as_they_were_trained(env_id: str, kind: str, layout: str) -> None:
    """Catches a grey picture that was trained as numbers and is now an image, for which the policy has no encoder."""
    described = {"observation": {"kind": kind}}
    state = {"env_id": env_id, "env_kwargs": {"vectorization": "async", "delay": 4}, "policy": described}
    own, options = trained_arguments(Checkpoint(Path("x"), state))
    assert own == {"delay": 4}
    assert (options.vectorization, options.image_layout) == ("async", layout)
    now = {**state, "env_kwargs": {"vectorization": 1}, "env_options": {"image_layout": "channels_first"}}
    assert trained_arguments(Checkpoint(Path("x"), now)) == (
        {"vectorization": 1},
        AdapterOptions(image_layout="channels_first"),
    )
    # What "auto" read as numbers stays numbers, but where each of several policies was read in its own way.
    found = {
        bool(policies): trained_arguments(
            Checkpoint(Path("x"), {**now, "env_options": {}, "config": {"policies": policies}})
        )[1].image_layout
        for policies in ({}, {"a": {}})
    }
    assert found == {False: "none" if layout == "none" else "auto", True: "auto"}


class Add(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Adds a number."""

    def __init__(self, env: Any, number: int, scale: int = 1) -> None:
        super().__init__(env)
        self.number, self.scale = number, scale
        self.observation_space = spaces.Box(-1e4, 1e4, env.observation_space.shape)

    def observation(self, observation: Any) -> Any:
        return (observation + self.number) * self.scale


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_wrappers_take_arguments_in_order(vectorization: str) -> None:
    """Catches arguments that are dropped, and wrappers outermost first."""
    module = types.ModuleType("envs_test_adders")
    module.Add = Add  # type: ignore[attr-defined]
    sys.modules["envs_test_adders"] = module
    options = AdapterOptions(
        vectorization=vectorization,  # type: ignore[arg-type]
        wrappers=[
            {"envs_test_adders:Add": {"number": 1, "scale": 10}},
            {"envs_test_adders:Add": {"number": 3}},
            "gymnasium.wrappers:FlattenObservation",
            {"gymnasium.wrappers:FrameStackObservation": {"stack_size": 2}},
        ],
    )
    env = make_vector_env("EnvsColliding-v0", 1, 0, options, seed=4)
    rows = Rows(env).rows
    env.reset(rows.obs)
    assert env.spec.obs_shape == (6,)
    assert rows.obs[0].tolist() == [53, 13, 13] * 2
    env.close()


def test_games_are_wrapped() -> None:
    """Catches wrappers that are passed over for PettingZoo's games."""
    pytest.importorskip("pettingzoo")
    module = types.ModuleType("envs_test_game_wrappers")
    wrapped: list[Any] = []

    def wrap(game: Any, colour: str) -> Any:
        wrapped.append((game, colour))
        return game

    module.wrap = wrap  # type: ignore[attr-defined]
    sys.modules["envs_test_game_wrappers"] = module
    options = {"wrappers": [{"envs_test_game_wrappers:wrap": {"colour": "red"}}]}
    env = make_env("pettingzoo:scripted_games:parallel_env", 6, 0, **options)
    env.reset(Rows(env).rows.obs)
    env.close()
    assert [colour for _, colour in wrapped] == ["red"] * 2


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        ("gymnasium.wrappers:NormalizeObservation", "set policy.normalize_observations=true"),
        ({"gymnasium.wrappers:NormalizeReward": {"gamma": 0.9}}, "set learner.normalize_values=true"),
        ({"gymnasium.wrappers:Nothing": {}}, "no wrapper 'gymnasium.wrappers:Nothing'"),
        ("gymnasium:__name__", "cannot be called"),
        (
            {"gymnasium.wrappers:FrameStackObservation": {"size": 4}},
            r"FrameStackObservation\(size=4\) cannot wrap.*size",
        ),
        ({"gymnasium.wrappers:FrameStackObservation": {"stack_size": -1}}, r"\(stack_size=-1\) cannot wrap"),
    ],
)
def test_wrappers_that_cannot_be_used_are_refused(wrapper: Any, said: str) -> None:
    """Catches statistics that every slot learns for itself, and a traceback for a wrong name or argument."""
    with pytest.raises(ValueError, match=said):
        make_env_spec("CartPole-v1", AdapterOptions(wrappers=[wrapper]))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("os:system", {"command": "touch {file}"}),
        ("subprocess:call", {"args": "touch {file}", "shell": True}),
        ("subprocess:Popen", {"args": "touch {file}", "shell": True}),
        ("builtins:open", {"file": "{file}", "mode": "w"}),
        ("pathlib:Path.touch", {}),
        ("runpy:run_path", {"path_name": "{file}"}),
        ("functools:partial", {}),
    ],
)
@pytest.mark.parametrize("how", ["wrapper", "game"])
def test_names_call_nothing_but_makers(how: str, name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    """Catches a checkpoint whose environment is a command: it is called where somebody only evaluates a run."""
    pytest.importorskip("pettingzoo")
    file = tmp_path / "called"
    given = {key: value.format(file=file) if isinstance(value, str) else value for key, value in arguments.items()}
    env_id, options = "CartPole-v1", AdapterOptions(wrappers=[{name: given}])
    if how == "game":
        env_id, options = f"pettingzoo:{name}", AdapterOptions()
    with pytest.raises(ValueError, match=r"is no wrapper|no wrapper '|makes no game|write pettingzoo|has no attribute"):
        make_env_spec(env_id, options, **(given if how == "game" else {}))
    assert not file.exists()


@pytest.mark.parametrize("wrapper", ["name", 3, {}, {"a:B": {}, "c:D": {}}, {"a:B": 1}, ":B", "a:"])
def test_wrappers_of_another_form_are_refused_before_anything_starts(wrapper: Any) -> None:
    """Catches a wrapper that is written in a way that nobody would understand later."""
    with pytest.raises(ValueError, match="wrappers"):
        EnvConfig(id="CartPole-v1", wrappers=[wrapper])


def test_a_subclass_of_a_normaliser_is_one_too() -> None:
    """Catches only the very class being refused."""
    module = types.ModuleType("envs_test_normalisers")
    module.Mine = type("Mine", (gymnasium.wrappers.NormalizeReward,), {})  # type: ignore[attr-defined]
    sys.modules["envs_test_normalisers"] = module
    with pytest.raises(ValueError, match="learns statistics in every slot"):
        find_wrappers(["envs_test_normalisers:Mine"], "E")
