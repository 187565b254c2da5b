"""Environments named by the class or function that makes them, also with the interface of before gymnasium."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import numpy as np
import pytest
from scripted_vectors import Rows
from shoal.envs.boundary import DiscreteActions, ImageSpace, VectorSpace
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.registry import make_env_spec, make_vector_env

SYNC, ASYNC, NATIVE = (AdapterOptions(vectorization=how) for how in ("sync", "async", "native"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("old_envs:Present", SYNC),
        ("old_envs:make_present", SYNC),
        ("old_envs:Present", ASYNC),
        ("old_envs:PresentVector", NATIVE),
        ("old_envs:OldEnvsOwn-v0", SYNC),
    ],
)
def test_a_class_or_a_function_needs_no_id(env_id: str, options: AdapterOptions) -> None:
    """Catches a module of one's own that is needed only to register what exists."""
    env = make_vector_env(env_id, 2, 0, options, case="ends late")
    rows = Rows(env).rows
    env.reset(rows.obs)
    env.step(np.zeros(2, np.int64), rows)
    assert rows.obs.tolist() == [[1, 2], [1, 2]]
    assert env.faults == []
    env.close()


@pytest.mark.parametrize("options", [SYNC, ASYNC])
@pytest.mark.parametrize("cut", ["", "discount", "limit"])
def test_the_old_interface_is_understood(cut: str, options: AdapterOptions) -> None:
    """Catches crafter's kind: spaces that are tuples, a reset without ``info``, one flag for both ends."""
    if options is ASYNC and cut != "discount":
        pytest.skip("the same in a process")
    env = make_vector_env("old_envs:Old", 2, 0, options, cut=cut, seed=2)
    assert env.spec.observation == ImageSpace(height=9, width=9, channels=3)
    assert env.spec.actions == DiscreteActions(names=(("action_0", "action_1", "action_2", "action_3"),))
    rows = Rows(env).rows
    env.reset(rows.obs)
    seen = [rows.obs[0, 0, 0, 0].item()]
    for step in range(1, 5):
        env.step(np.zeros(2, np.int64), rows)
        seen.append(rows.obs[0, 0, 0, 0].item())
        assert rows.terminated.tolist() == [step == 3 and not cut] * 2
        assert rows.truncated.tolist() == [step == 3 and bool(cut)] * 2
        assert rows.is_first.tolist() == [step == 4] * 2
    assert seen == [20, 21, 22, 23, 20]
    assert env.faults == []
    env.close()


def test_old_environments_are_seeded_where_they_can_be() -> None:
    """Catches slots that all play the same episode."""
    env = make_vector_env("old_envs:OldSeeded", 8, 0)
    rows = Rows(env).rows
    env.reset(rows.obs)
    env.close()
    assert len(set(rows.obs[:, 0, 0, 0].tolist())) > 1


def test_nested_old_spaces_are_understood() -> None:
    """Catches a dictionary of old spaces that is refused."""
    spec = make_env_spec("old_envs:Nested")
    assert spec.observation == VectorSpace(size=5, names=("a=0", "a=1", "a=2", "b[0]", "b[1]"), categorical=(0, 1, 2))


def test_old_flags_are_no_choice() -> None:
    """Catches the old gym's MultiBinary(3) read as one of three, and its spaces refused where the class is one of
    gymnasium's."""
    spec = make_env_spec("old_envs:Flags")
    assert spec.observation == VectorSpace(size=3, categorical=(0, 1, 2), stored="uint8")
    assert isinstance(spec.actions, DiscreteActions)
    assert [len(names) for names in spec.actions.names] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("env_id", "options", "said"),
    [
        ("old_envs:Unfinished", SYNC, "Unfinished: the observation space is NoneType None, must be a space"),
        ("old_envs:Nothing", SYNC, "old_envs:Nothing' is no class with reset and step"),
        ("old_envs:Bare", SYNC, "from .*Bare.*, which is no environment: it has no observation_space, action_space"),
        ("old_envs:Odd", SYNC, "the action space is str 'anything', must be a space of gymnasium"),
        ("old_envs:Presnt", SYNC, "did you mean old_envs:Present"),
        ("old_envs:zzzzzz", SYNC, "importing old_envs registers no zzzzzz, .* of that name; there are old_envs:"),
        ("no_such_module:Env", SYNC, "there is no module 'no_such_module'"),
        ("old_envs:Present", NATIVE, "must be a gymnasium.vector.VectorEnv|unexpected keyword argument 'num_envs'"),
        ("old_envs:CartPole-v1", SYNC, "old_envs does not register CartPole-v1.*gymnasium's own: write CartPole-v1"),
        ("json:Pendulum-v1", SYNC, "json does not register Pendulum-v1.*my_module:function"),
    ],
)
def test_what_is_named_wrongly_is_refused(env_id: str, options: AdapterOptions, said: str) -> None:
    """Catches gymnasium's own environment trained in place of another library's of the same name."""
    with pytest.raises(ValueError, match=said):
        make_env_spec(env_id, options, **({"case": "endless"} if "Presen" in env_id else {}))


def test_a_library_of_vectors_is_no_registry() -> None:
    """Catches envpool's kind: its ids are gymnasium's, and it makes them by a function."""
    module: Any = types.ModuleType("envs_test_pool")
    module.make_gymnasium = lambda task_id, num_envs: None
    sys.modules["envs_test_pool"] = module
    with pytest.raises(EnvironmentNotFound, match="envs_test_pool does not register CartPole-v1") as caught:
        make_vector_env("envs_test_pool:CartPole-v1", 4, 0)
    assert re.search("write a function of yours", str(caught.value))
