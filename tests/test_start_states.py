"""From which memory training starts: stored, burned in or refreshed; and the measure of its staleness."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from rollouts import (
    ACTIONS,
    RUN,
    SMALL,
    NoiseEnvironment,
    RecallWithTimeLimits,
    Rollouts,
    make_learner,
    make_policy,
    random_columns,
)
from shoal.learner.batch import BatchAssembler
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass, log_prob_error
from shoal.learner.parity_check import TOLERANCE
from shoal.learner.start_states import RefreshedStates, StalenessProbe, burned_in, final_state, stored_state, with_state
from shoal.policy.trajectory import TrajectoryHeader, from_bytes, to_bytes
from slow_reference import start_state

CPU = DevicePath(torch.device("cpu"))


class Endless(NoiseEnvironment):
    """No episode ends: what remembers longest."""

    def step(self, action, rows):
        """Random observations."""
        super().step(action, rows)
        rows.is_first[:] = rows.terminated[:] = rows.truncated[:] = False
        self._ended[:] = False


CORES = ["lstm", "gru", "linear", "own_cores:Leaky"]


def make(envs=Endless, unroll_length=12, burn_in=0, num_envs=4, core="lstm"):
    envs = envs(num_envs, ACTIONS["discrete"]) if issubclass(envs, NoiseEnvironment) else envs(num_envs, 0)
    rollouts = Rollouts(envs, unroll_length=unroll_length, burn_in=burn_in, core=core)
    return rollouts, make_policy(rollouts.observation, rollouts.actions, core=core)


def distance(state, other):
    return max(float((a - b).abs().max()) for a, b in zip(state, other, strict=True))


@pytest.mark.parametrize("envs", [Endless, RecallWithTimeLimits])
@pytest.mark.parametrize(("burn_in", "core"), [(1, "lstm"), (12, "lstm"), *((5, core) for core in CORES)])
def test_burn_in_of_the_acting_weights_gives_the_stored_state(envs, burn_in, core):
    """Burn-in rows one off, of another slot, with a reset too many or too few, or from the state after them."""
    rollouts, policy = make(envs, burn_in=burn_in, core=core)
    for _ in range(3):
        batch = rollouts.batch(policy, 0)
        goes_on = ~batch["is_first"][:, 0]  # else the state is zeroed, whatever it is
        states = (burned_in(policy, batch, CPU), stored_state(policy.core, batch))
        for got, want in zip(*states, strict=True):
            torch.testing.assert_close(got[:, goes_on], want[:, goes_on], atol=1e-5, rtol=1e-5)
    assert goes_on.any()
    assert float(stored_state(policy.core, batch)[0].abs().max()) > 0.05


@pytest.mark.parametrize("core", CORES)
def test_burn_in_of_other_weights_equals_stepping_through_it(core):
    """A state that the newest weights did not make."""
    rollouts, policy = make(RecallWithTimeLimits, burn_in=7, core=core)
    other = make_policy(rollouts.observation, rollouts.actions, seed=1, core=core)
    rollouts.batch(policy, 0)
    batch = rollouts.batch(policy, 0)
    got = burned_in(other, batch, CPU)
    for b in range(batch.shape[0]):
        want = start_state(other, batch, b)
        assert distance([part[:, b : b + 1] for part in got], want) < 1e-5
    assert distance(got, stored_state(policy.core, batch)) > 0.01


def test_the_canary_compares_with_the_stored_state_whatever_training_starts_from():
    """A false alarm, or a blind parity check, where training starts from another state than acting did."""
    rollouts, policy = make(burn_in=5)
    learner = make_learner(policy, learning_rate=1e-2)
    for version in range(2):
        batch = rollouts.batch(policy, version)
        assert log_prob_error(forward_pass(policy, batch, CPU).log_prob, batch).item() <= TOLERANCE
        assert learner.update(batch).log_prob_error is None


def test_a_refreshed_state_is_the_one_that_the_new_weights_give():
    """A state of the weights before the update, of another slot, or of an unroll that is not the one before."""
    rollouts, policy = make(RecallWithTimeLimits, num_envs=5)
    learner = make_learner(policy, learning_rate=1e-2, refresh_states=True)
    before = rollouts.batch(policy, 0).clone()
    learner.update(before)
    want = final_state(policy, before, CPU)
    after = rollouts.batch(policy, 1).clone()
    used = learner.with_start_states(after)
    assert distance(stored_state(policy.core, used), want) < 1e-6
    assert distance(stored_state(policy.core, after), want) > 1e-3
    assert used["obs"] is after["obs"]
    learner.update(after)
    rollouts.batch(policy, 2)  # lost on its way
    late = rollouts.batch(policy, 2)
    assert distance(stored_state(policy.core, learner.with_start_states(late)), stored_state(policy.core, late)) == 0


def test_refreshed_states_find_their_slots():
    """Rows exchanged when slots come in another order, in parts, or for the first time."""
    rng = np.random.default_rng(0)
    kept = {}
    rollouts, policy = make(num_envs=6)
    table, template = RefreshedStates(policy.core), rollouts.batch(policy, 0).clone()
    for index in range(30):
        chosen = rng.choice(6, rng.integers(1, 7), replace=False)
        batch = template[torch.from_numpy(chosen)].clone()
        batch["unroll_index"][:] = index
        h, _ = stored_state(policy.core, table.apply(batch))
        for row, env_id in enumerate(batch["training_env_id"].tolist()):
            known = env_id in kept and kept[env_id][0] == index - 1
            want = kept[env_id][1] if known else stored_state(policy.core, batch)[0][:, row]
            assert torch.equal(h[:, row], want)
        state = torch.randn(2, 2, len(chosen), 128).unbind(0)
        table.keep(batch, state)
        kept |= {e: (index, state[0][:, row]) for row, e in enumerate(batch["training_env_id"].tolist())}


def test_refreshing_does_not_change_an_update_without_lag_of_memory():
    """An option that changes what is trained rather than where it starts: episodes that begin with the unroll."""
    rollouts, policy = make(RecallWithTimeLimits)
    other = copy.deepcopy(policy)
    batch = rollouts.batch(policy, 0)
    results = [
        make_learner(which, refresh_states=refresh).update(batch) for which, refresh in ((policy, False), (other, True))
    ]
    assert results[0].terms == results[1].terms


def test_staleness_is_nought_for_fresh_states_and_grows_with_the_distance_of_the_weights():
    """A measure that compares other slots, other unrolls, or two states of the same old weights."""
    rollouts, policy = make(burn_in=6)
    readings = {}
    for scale in (0.0, 0.01, 0.1):
        newest = copy.deepcopy(policy)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in newest.parameters():
                p.add_(scale * p.abs().mean() * torch.randn(p.shape, generator=generator))
        probe = StalenessProbe(CPU, every=1, segments=3)
        batch = rollouts.batch(policy, 0)
        assert probe.measure(newest, batch, batch) == {}
        batch = rollouts.batch(policy, 0)
        readings[scale] = probe.measure(newest, batch, with_state(newest.core, batch, burned_in(newest, batch, CPU)))
    assert all(reading["used"] <= reading["stored"] for reading in readings.values())
    readings = {scale: reading["stored"] for scale, reading in readings.items()}
    assert readings[0.0] < 1e-5
    assert 1e-4 < readings[0.01] < readings[0.1]


def test_staleness_of_refreshed_states_is_less_than_of_stored_ones():
    """Readings of the two kinds exchanged, or an option that does not freshen."""
    rollouts, policy = make(num_envs=8)
    learner = make_learner(policy, learning_rate=1e-2, refresh_states=True)
    readings = [learner.update(rollouts.batch(policy, version)).staleness for version in range(4)]
    assert readings[0] == {}
    assert readings[1]["used"] < 0.5 * readings[1]["stored"]
    assert readings[1]["stored"] > 1e-3


def test_an_unroll_follows_the_one_before_of_the_same_incarnation():
    """The state of an actor that died taken for its successor's, whose sequence numbers begin anew."""
    payload = [
        to_bytes(SMALL, TrajectoryHeader(run_id=RUN, actor=0, restart_index=i, sequence=s, policy_version=0), columns)
        for columns in [random_columns(SMALL, 2, 0)]
        for i, s in ((0, 3), (0, 4), (1, 4))
    ]
    assembler = BatchAssembler(SMALL, 2)
    index = [assembler.assemble([from_bytes(SMALL, p)])["unroll_index"].clone() for p in payload]
    assert torch.equal(index[0] + 1, index[1])
    assert not (index[0] + 1 == index[2]).any()
