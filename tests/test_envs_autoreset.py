"""The three autoreset modes of gymnasium, in one process, in several and native: the same episodes in the same rows."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from make_env import env_spec, make_env
from scripted_envs import Episode, choose, play_script
from scripted_vectors import ID, MODES, Rows, make
from shoal.envs.boundary import EnvironmentFault, VectorEnvironment
from shoal.envs.gym import GymEnvironment
from shoal.envs.native import NativeEnvironment

STEPS = 120


def reconstruct(env: VectorEnvironment, steps: int = STEPS) -> tuple[list[list[Episode]], int]:
    """Finished episodes by slot, from nothing but the rows and what the contract says of them; and valid transitions.

    An episode of which no more than ``is_first`` without a flag is known was cut by a fault, and is not there.
    """
    rows = Rows(env).rows
    env.reset(rows.obs)
    rows.is_first[:] = True
    episodes: list[list[Episode]] = [[] for _ in range(env.num_envs)]
    present = [([tuple(rows.obs[slot].tolist())], []) for slot in range(env.num_envs)]
    num_valid = 0
    for _ in range(steps):
        action = np.array([choose(slot, rows.obs[slot]) for slot in range(env.num_envs)])
        if rows.final_obs is not None:
            rows.final_obs[:] = 77
        env.step(action, rows)
        for slot in range(env.num_envs):
            obs, ended = tuple(rows.obs[slot].tolist()), bool(rows.terminated[slot] or rows.truncated[slot])
            states, rewards = present[slot]
            if rows.is_first[slot] and not ended:
                assert rows.reward[slot] == 0
                present[slot] = ([obs], [])
                continue
            num_valid += 1
            rewards.append(float(rows.reward[slot]))
            states.append(obs)
            if rows.final_obs is not None:
                assert bool(rows.is_first[slot]) == ended
                last = tuple(rows.final_obs[slot].tolist())
                assert ended or last == (77,) * len(obs), "final_obs was written where no episode ended"
                if ended:
                    states[-1] = last
            if ended:
                episodes[slot].append(Episode(states, rewards, bool(rows.terminated[slot]), bool(rows.truncated[slot])))
                present[slot] = ([obs], [])
    assert env.faults == []
    return episodes, num_valid


def check_against_script(env: VectorEnvironment, salt: int, steps: int = STEPS) -> list[list[Episode]]:
    """The environment's own log and the rows tell of the same episodes, and no transition is void that need not be."""
    try:
        episodes, num_valid = reconstruct(env, steps)
    finally:
        env.close()
    for slot, found in enumerate(episodes):
        assert len(found) > 5
        assert found == play_script(slot, salt, len(found))
    ends = sum(len(found) for found in episodes)
    total = env.num_envs * steps
    # In the next-step form an end in the very last step has its void transition after it.
    assert num_valid == total if env.spec.same_step else total - ends <= num_valid <= total - ends + env.num_envs
    return episodes


@pytest.mark.parametrize("salt", range(4))
@pytest.mark.parametrize("kind", ["box", "dict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorization", ["sync", "native"])
def test_episodes_are_those_of_the_script(vectorization: str, mode: str, kind: str, salt: int) -> None:
    """Catches a final observation that is the next episode's first, a reset a step late, an end by truncation that is
    none, and a void transition that counts or a real one that does not.
    """
    episodes = check_against_script(make(vectorization, mode, salt=salt, kind=kind), salt)
    ends = {(episode.terminated, episode.truncated) for found in episodes for episode in found}
    assert ends >= {(True, False), (False, True)}, "the script is too tame to tell"


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_those_of_the_script_in_processes(mode: str) -> None:
    """Catches, in worker processes: a spurious second reset after the first, answers that come a step late, and a final
    observation that was overwritten in memory shared with the worker.
    """
    check_against_script(make("async", mode, salt=5, kind="dict"), 5)


@pytest.mark.parametrize("final", ["stacked", "no mask"])
@pytest.mark.parametrize("kind", ["box", "dict"])
def test_native_final_observations_of_every_form(final: str, kind: str) -> None:
    """Catches a form of ``final_obs`` that is misread: one array for all slots, with rows of no meaning, or no mask."""
    check_against_script(make("native", "same_step", salt=2, kind=kind, final=final), 2)


def test_the_next_step_form_is_the_default() -> None:
    """Catches a default that changes the rows of every environment there is."""
    assert not env_spec("CartPole-v1").same_step
    assert env_spec("CartPole-v1", autoreset_mode="disabled").same_step


@pytest.mark.parametrize(
    ("mode", "kwargs", "said"),
    [
        ("SAME_STEP", {"final": "none"}, r"declares .*SAME_STEP, but delivered no infos\['final_obs'\]"),
        ("NEXT_STEP", {"declares": AutoresetMode.SAME_STEP}, r"declares .*SAME_STEP, but delivered no"),
        (
            "SAME_STEP",
            {"declares": AutoresetMode.NEXT_STEP},
            r"declares .*NEXT_STEP, but delivered infos\['final_obs'\]",
        ),
        (
            "SAME_STEP",
            {"declares": AutoresetMode.NEXT_STEP, "final": "none"},
            r"declares .*NEXT_STEP, but answered reward .* in the step after the end",
        ),
        ("SAME_STEP", {"declares": AutoresetMode.DISABLED}, r"declares .*DISABLED, but delivered infos\['final_obs'\]"),
        ("DISABLED", {"how": "resets all"}, r"declares .*DISABLED, but reset.*changed the observation of a slot"),
    ],
)
def test_a_mode_that_is_not_kept_is_a_fault(mode: str, kwargs: dict[str, Any], said: str) -> None:
    """Catches silence where an environment resets otherwise than it says: memory would cross episodes unseen."""
    env = make("native", mode, **kwargs)
    with pytest.raises(EnvironmentFault, match=rf"ScriptedLog-v0: slot \d, step \d+: .*{said}"):
        reconstruct(env)


@pytest.mark.parametrize(
    ("declares", "said"),
    [
        (None, "ScriptedVector does not declare how it resets.*metadata"),
        ("sometimes", "'sometimes', must be one of next_step, same_step, disabled"),
        (7, "int 7, must be one of next_step"),
    ],
)
def test_a_mode_that_is_not_declared_is_refused(declares: Any, said: str) -> None:
    """Catches assuming a mode where the metadata name none."""
    with pytest.raises(ValueError, match=said):
        make("native", "next_step", declares=declares)


@pytest.mark.parametrize("declares", ["SAME_STEP", "SameStep", "same_step"])
def test_a_mode_may_be_declared_by_name(declares: str) -> None:
    """Catches a mode that is refused because it is written as its enumeration's value."""
    env = make("native", "same_step", declares=declares)
    assert env.spec.same_step
    env.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "all slots, step 4: step raised RuntimeError: 100% lost"),
        ("short", r"all slots, step 4: step answered .*must be \(obs, reward"),
        ("obs nan", "slot 1, step 4: obs has a value that is not finite, nan, at flat index 2"),
        ("obs shape", r"all slots, step 4: obs has shape \(3, 2\), must be \(3, 3\)"),
        ("obs dtype", "all slots, step 4: obs has dtype <U8, must be float32"),
        ("reward nan", "slot 1, step 4: reward nan is not finite"),
        ("reward huge", r"slot 0, step 4: reward 1e\+30"),
        ("reward shape", r"all slots, step 4: reward is float64 \(3, 2\), must be numbers \(3,\)"),
        ("terminated two", "slot 0, step 4: terminated is [23], must be a bool"),
        ("truncated shape", r"all slots, step 4: truncated is bool \(1,\), must be bool \(3,\)"),
    ],
)
def test_a_native_fault_names_slot_step_and_field(how: str, said: str) -> None:
    """Catches numbers from a broken native environment that reach the weights, for want of a guard around its slots."""
    env = make("native", "next_step", how=how, at=4)
    with pytest.raises(EnvironmentFault, match=f"ScriptedLog-v0: {said}"):
        reconstruct(env)
    env.close()


def test_cartpole_of_gymnasium_runs_natively() -> None:
    """Catches an adapter that fits none but our own native environments; the limit of the id's registration holds."""
    env = make_env("CartPole-v1", 4, 0, vectorization="native")
    assert isinstance(env, NativeEnvironment)
    rows = Rows(env).rows
    env.reset(rows.obs)
    lengths = np.zeros(4, int)
    seen = set()
    for _ in range(600):
        # Keeps the pole up for as long as it may.
        env.step((rows.obs[:, 2] * 3 + rows.obs[:, 3] + rows.obs[:, 1] * 0.3 + rows.obs[:, 0] * 0.1 > 0) * 1, rows)
        lengths = np.where(rows.is_first, 0, lengths + 1)
        seen |= set(lengths[rows.truncated].tolist())
    env.close()
    assert seen == {500}


def test_native_seeds_repeat_and_differ() -> None:
    """Catches a native environment that is not seeded, or is seeded anew by every reset."""
    firsts = []
    for seed in (1, 1, 2):
        env = make_env("CartPole-v1", 2, np.random.SeedSequence(seed), vectorization="native")
        for _ in range(2):
            firsts.append(np.zeros((2, 4), np.float32))
            env.reset(firsts[-1])
        env.close()
    same = {(i, j) for i, j in itertools.combinations(range(6), 2) if np.array_equal(firsts[i], firsts[j])}
    assert same == {(0, 2), (1, 3)}


@pytest.mark.parametrize(
    ("env_id", "kwargs", "said"),
    [
        (ID, {"vectorization": "parallel"}, "vectorization\n.*'sync', 'async' or 'native'"),
        (ID, {"vectorization": None}, "vectorization\n.*'sync', 'async' or 'native'"),
        ("Pendulum-v1", {"vectorization": "native"}, "Pendulum-v1: .*registered with a vector_entry_point.*leave"),
        (
            ID,
            {"vectorization": "native", "wrappers": ["gymnasium.wrappers:ClipReward"]},
            "ClipReward wraps one environment, .*: name gymnasium.wrappers.vector:ClipReward, or set",
        ),
        ("EnvsTestWrapped-v0", {"vectorization": "native"}, "registered with wrappers of single environments"),
        (
            "CartPole-v1",
            {"vectorization": "native", "autoreset_mode": "disabled"},
            "autoreset_mode: a native vector declares its own; leave it out",
        ),
        (ID, {"autoreset_mode": "later"}, "autoreset_mode\n.*'next_step', 'same_step' or 'disabled'"),
        ("recall", {"vectorization": "async"}, "recall: .*vectorization"),
        ("mettagrid/forage", {"vectorization": "native"}, "mettagrid/forage: .*vectorization"),
        ("EnvsTestThree-v0", {"vectorization": "native"}, "env.num_envs=8, but its vector environment has 3 slots"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(env_id: str, kwargs: dict[str, Any], said: str) -> None:
    """Catches a traceback, or an argument that is passed over in silence."""
    with pytest.raises(ValueError, match=said):
        make_env(env_id, 8, 0, **kwargs)


def test_guards_hold_in_every_mode() -> None:
    """Catches a restarted slot that is no void transition in the same-step form, or restarts its neighbours."""
    for mode in MODES:
        env = make("sync", mode, slots=2, how="raises", at=20)
        assert isinstance(env, GymEnvironment)
        rows = Rows(env).rows
        env.reset(rows.obs)
        env._vector.envs[0]._inner.env.unwrapped.how = ""  # type: ignore[union-attr]
        valid, faulty = 0, []
        while not faulty:
            env.step(np.zeros(2, int), rows)
            ended = rows.terminated | rows.truncated
            valid += int(not rows.is_first[1] or ended[1])
            faulty = env.faults
        assert valid == 19
        assert "slot 1, step" in faulty[0]
        assert rows.is_first[1]
        assert not ended[1]
        assert rows.reward[1] == 0
        # Episode 0 of a new environment.
        assert rows.obs[1].tolist() == list(play_script(1, 0, 1)[0].states[0])
        env.close()


gymnasium.register(
    "EnvsTestWrapped-v0",
    "scripted_envs:ScriptedLog",
    vector_entry_point="scripted_envs:ScriptedVector",
    additional_wrappers=(gymnasium.wrappers.ClipReward.wrapper_spec(min_reward=0),),
)
gymnasium.register("EnvsTestThree-v0", vector_entry_point=lambda num_envs: gymnasium.make_vec(ID, 3))
