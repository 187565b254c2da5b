"""First episodes are truncated at spread lengths, so that slots do not reach the step limit together."""

from __future__ import annotations

from typing import Any

import clock_envs
import numpy as np
import pytest
from boundary_contract import Rollout
from clock_envs import LIMIT
from make_env import make_env
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings.load import CONFIGS, load_config
from shoal.envs.boundary import StaggeredEnvironment
from shoal.envs.registry import make_env_spec

SLOTS = 5
WAYS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"vectorization": "async"},
    "same step": {"autoreset_mode": "same_step"},
    "async same step": {"vectorization": "async", "autoreset_mode": "same_step"},
    "disabled": {"autoreset_mode": "disabled"},
}


def staggered(env_id: str = "clock_envs:Clock-v0", seed: int = 3, slots: int = SLOTS, **options: Any) -> Any:
    env = make_env(env_id, slots, 0, **options)
    assert isinstance(env, StaggeredEnvironment)
    env.stagger(np.random.SeedSequence(seed))
    return env


def ends_of(rollout: Rollout, slot: int) -> list[int]:
    return np.flatnonzero(rollout.terminated[slot] | rollout.truncated[slot]).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_slots_end_all_over_the_limit(way: str) -> None:
    """Catches slots that stay in step, a later episode that is cut, an end that is told as termination (no bootstrap),
    the observation of another step at the cut, and cut episodes that are counted or whole ones that are not."""
    env = staggered(**WAYS[way])
    rollout = Rollout(env, 70)
    env.close()
    period = LIMIT if env.spec.same_step else LIMIT + 1
    first = [ends_of(rollout, slot)[0] for slot in range(SLOTS)]
    assert np.diff(first).tolist() == [LIMIT // SLOTS] * (SLOTS - 1)
    assert 0 <= first[0] < LIMIT // SLOTS
    assert not rollout.terminated.any()
    for slot, end in enumerate(first):
        assert ends_of(rollout, slot) == list(range(end, 70, period))
        # A reset of its own is a step of the episode before.
        until = end + (not env.spec.same_step)
        assert rollout.short[slot].tolist() == [t <= until and end < LIMIT - 1 for t in range(70)]
        last = rollout.obs[slot, end + 1] if rollout.final_obs is None else rollout.final_obs[slot, end]
        assert last == end + 1


def test_the_last_slot_may_have_the_whole_limit() -> None:
    """Catches a whole first episode that is marked as cut."""
    found = [staggered(seed=seed, slots=2) for seed in range(60)]
    assert {bool(env.short_episode[0]) for env in found} == {True}
    assert {bool(env.short_episode[1]) for env in found} == {True, False}
    for env in found:
        env.close()


def test_what_ends_by_itself_is_not_cut_later() -> None:
    """Catches a cut in the second episode of a slot whose first ended before its cut, and a termination that becomes a
    truncation at the very step of the cut."""
    env = staggered(ends_at=7)
    rollout = Rollout(env, 40)
    env.close()
    for slot in range(SLOTS):
        ends = ends_of(rollout, slot)
        assert ends[0] <= 6
        assert rollout.truncated[slot].sum() == (ends[0] < 6)
        assert np.diff(ends).tolist() == [8] * (len(ends) - 1)


@pytest.mark.parametrize("ends_at", [0, 7])
def test_short_episodes_report_nothing(ends_at: int) -> None:
    """Catches scores of half an episode among the metrics, and those of first episodes that end before their cut,
    without those of the others."""
    env = staggered(ends_at=ends_at)
    rollout = Rollout(env, 2 * LIMIT + 1)
    scores = [numbers["score"] for _, numbers in env.reports.take().episodes]
    env.close()
    assert set(scores) == {float(ends_at or LIMIT)}
    ended = rollout.terminated | rollout.truncated
    assert len(scores) == (ended & ~rollout.short).sum()


def test_a_new_environment_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cut that outlives the episode that it was for, after a fault in it."""
    monkeypatch.setattr(clock_envs.Clock, "failed", False)
    env = staggered(slots=2, fails_at=2)
    rollout = Rollout(env, 2 * LIMIT)
    env.close()
    assert len(env.faults) == 1
    [slot] = [slot for slot in range(2) if rollout.is_first[slot, 2]]
    assert ends_of(rollout, slot)[0] == 2 + LIMIT - 1
    assert not rollout.short[slot, 2:].any()


@pytest.mark.parametrize("way", ["sync", "async", "disabled"])
def test_the_cuts_are_part_of_the_state(way: str) -> None:
    """Catches a resumed run whose first episodes are cut elsewhere, or counted."""
    plain, before, after = (staggered(**WAYS[way]) for _ in range(3))
    expected = Rollout(plain, 50)
    Rollout(before, 6)
    state = before.get_state()
    obs = np.zeros((SLOTS, 1), np.float32)
    after.reset(obs)
    assert after.set_state(state, obs) == {}
    after.reset = lambda first: None  # it goes on
    rest = Rollout(after, 44)
    for name in ("is_first", "truncated", "short"):
        column = getattr(expected, name)
        np.testing.assert_array_equal(getattr(rest, name)[:, 1:], column[:, 7:], err_msg=name)
    for env in (plain, before, after):
        env.close()


def test_slots_that_begin_anew_stay_staggered() -> None:
    """Catches a resumed run whose environments cannot tell their state, and end together from then on."""
    before, after = (staggered(hidden=True) for _ in range(2))
    Rollout(before, 6)
    obs = np.zeros((SLOTS, 1), np.float32)
    after.reset(obs)
    assert set(after.set_state(before.get_state(), obs)) == set(range(SLOTS))
    after.reset = lambda first: None  # it goes on
    rollout = Rollout(after, LIMIT)
    ends = [ends_of(rollout, slot)[0] for slot in range(SLOTS)]
    assert np.diff(ends).tolist() == [LIMIT // SLOTS] * (SLOTS - 1)
    assert rollout.short[0, 0]
    for env in (before, after):
        env.close()


def test_environments_without_a_limit_are_left_alone() -> None:
    """Catches a limit that was made up."""
    env = make_env("clock_envs:Clock", SLOTS, 0)
    assert isinstance(env, StaggeredEnvironment)
    env.stagger(np.random.SeedSequence(0))
    assert not env.short_episode.any()
    env.close()
    limited = {"wrappers": [{"gymnasium.wrappers:TimeLimit": {"max_episode_steps": 8}}]}
    env = staggered("clock_envs:Clock", **limited)
    assert env.short_episode.any()
    env.close()


def test_training_is_staggered_and_nothing_else() -> None:
    """Catches a setting that reaches nobody, evaluation of cut episodes, and actors that are cut alike."""
    config, problems = load_config([], ["env.id=clock_envs:Clock-v0", "env.num_envs=5"])
    assert not problems
    setup = make_worker_setup(config, make_env_spec(config.env.id), run_id="a-run")
    whole = setup.make_env(np.random.SeedSequence(0), whole_episodes=True)
    workers = [setup.make_worker(actor, restart) for actor, restart in ((0, 0), (0, 0), (1, 0), (0, 1))]
    played = [Rollout(worker.envs, LIMIT) for worker in workers]
    ends = [[ends_of(rollout, slot)[0] for slot in range(5)] for rollout in played]
    assert ends[0] == ends[1]
    assert any(each != ends[0] for each in ends)
    assert all(len(set(each)) == 5 for each in ends)
    assert not whole.short_episode.any()
    for env in (whole, *workers):
        env.close()


def test_the_original_is_not_staggered() -> None:
    """Catches runs with the settings of the original that have other episodes than it."""
    config, problems = load_config([CONFIGS / "original.yaml"], [])
    assert not problems
    assert not config.actor.stagger_episodes
