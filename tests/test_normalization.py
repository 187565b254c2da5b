"""Observations and values in units of their own spread: statistics against numpy's, and learning without units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import shoal.learner.normalization
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import POLICIES
from rollouts import SMALL, NoiseEnvironment, Rollouts, make_learner, random_batch
from shoal.envs.boundary import ContinuousActions, EnvSpec, VectorSpace
from shoal.learner.checkpoint import CheckpointError, Checkpoints, load_checkpoint
from shoal.learner.forward_pass import valid_transitions
from shoal.learner.learner import NonFiniteUpdate
from shoal.learner.parity_check import TOLERANCE
from shoal.policy import VectorObservation
from shoal.policy.config import Initialization
from shoal.policy.normalization import LIMIT
from shoal.policy.weights import flatten_weights, load_weights

NAMES = ["a", "b", "c"]
STEPS = {"epochs": 2, "minibatches": 2, "max_grad_norm": 0.5}
ONE_STEP = {**STEPS, "epochs": 1, "minibatches": 1}
"""Where only the statistics are looked at: they are of the batch, however many optimizer steps it gets."""


def make_policy(kind="fast", observation=None, *, observations=True, values=True, seed=0, **arguments):
    torch.manual_seed(seed)
    return POLICIES[kind](
        observation or VectorObservation(3),
        NAMES,
        3,
        initialization=Initialization(),
        normalize_observations=observations,
        normalize_values=values,
        **arguments,
    )


def in_units(batch, *, reward=1.0, obs=1.0, shift=0.0):
    """The same batch, its numbers given in other units."""
    changed = batch.clone()
    changed["reward"] *= reward
    changed["obs"] = changed["obs"] * obs + shift
    return changed


def acted_with(policy, batch):
    """The batch with the log-probabilities of ``policy``: what an actor with these weights reports."""
    changed = batch.clone()
    with torch.no_grad():
        output, _ = policy.unroll(batch["obs"].transpose(0, 1), batch["is_first"].T)
        log_prob, _ = policy.actions.evaluate(output.logits[:-1], batch["action"].T)
    changed["initial_h"].zero_()
    changed["initial_c"].zero_()
    changed["behavior_log_prob"] = log_prob.T.contiguous()
    return changed


def trained(batches, policy=None, units=None, **options):
    """A learner after one update with each batch, in ``units``; actions were drawn with the weights of the time."""
    learner = make_learner(policy or make_policy(), num_shards=2, **{**STEPS, **options})
    for number, batch in enumerate(batches):
        batch = acted_with(learner.policy, in_units(batch, **(units or {})))
        batch["policy_version"][:] = number
        result = learner.update(batch)
        assert result.log_prob_error is not None
        assert result.log_prob_error < TOLERANCE
    return learner


def batches(count=4):
    return [random_batch(seed, num_slots=8) for seed in range(count)]


@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=20, deadline=None)
@given(
    mean=st.floats(-1e6, 1e6),
    std=st.floats(1e-4, 1e6),
    more_mean=st.floats(-1e6, 1e6),
    ratio=st.floats(1e-2, 1e2),
)
def test_moving_value_statistics_leave_values_as_they_are(kind, mean, std, more_mean, ratio):
    """Catches PopArt's rescaling with a wrong sign, or one without the mean."""
    policy = make_policy(kind)
    core = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    policy.double()
    policy.value_scale.rescale(policy.value_head, mean, std)
    before = policy.heads(core.double()).value
    policy.value_scale.rescale(policy.value_head, more_mean, std * ratio)
    after = policy.heads(core.double()).value
    assert before.std() > 0
    torch.testing.assert_close(
        after, before, rtol=0, atol=1e-9 * (float(before.detach().abs().max()) + abs(more_mean) + std)
    )


@pytest.mark.parametrize("num_shards", [1, 3])
def test_statistics_are_those_of_all_valid_observations(num_shards):
    """Catches masked rows that count, row T counted twice, shards merged with wrong weights."""
    learner = make_learner(make_policy(), num_shards=num_shards)
    given = [in_units(batch, obs=[2.0, 0.1, 30.0][i % 3], shift=float(i)) for i, batch in enumerate(batches(5))]
    rows = []
    for batch in given:
        learner.update(batch)
        rows.append(batch["obs"][:, :-1][valid_transitions(batch)])
    seen = torch.cat(rows).double().numpy()
    assert len(seen) < sum(batch["obs"][:, :-1, 0].numel() for batch in given)
    normalizer = learner.policy.vector_normalizer
    np.testing.assert_allclose(normalizer.mean.numpy(), seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(1 / normalizer.scale.numpy(), seen.std(0), rtol=1e-5)


def test_value_statistics_follow_the_targets():
    """Catches a scale of values that stays at its first size while returns grow."""
    learner = trained(batches(2), **ONE_STEP)
    first = float(learner.policy.value_scale.std)
    for batch in batches(40):
        learner.update(in_units(batch, reward=50.0))
    assert 20 < float(learner.policy.value_scale.std) / first < 100


UNITS = {
    "milli-rewards": {"reward": 2.0**-10},
    "kilo-rewards": {"reward": 2.0**10},
    "milli-observations": {"obs": 2.0**-10},
    "kilo-observations": {"obs": 2.0**10},
}


@pytest.mark.parametrize("units", UNITS)
def test_powers_of_two_change_nothing(units):
    """Catches an epsilon, a bound or a first update in units of the reward or of an observation."""
    one, other = trained(batches()), trained(batches(), units=UNITS[units])
    moved = 0.0
    fresh = dict(make_policy().named_parameters())
    for name, parameter in one.policy.named_parameters():
        if name == "actor_bias":  # it adds the same to every logit: its gradient is rounding, which Adam scales up
            continue
        torch.testing.assert_close(dict(other.policy.named_parameters())[name], parameter, rtol=1e-4, atol=2e-5)
        moved = max(moved, float((parameter - fresh[name]).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("units", [{"reward": 1000.0}, {"reward": 0.001}, {"obs": 1000.0}, {"shift": 1000.0}])
def test_other_units_give_nearly_the_same_policy(units):
    """As above, where the numbers themselves are rounded: they differ by a tenth of what was learned at most, and by a
    third at least without normalization."""
    fresh = make_policy()
    one, other = trained(batches(2)), trained(batches(2), units=units)
    probe = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    is_first = torch.ones(64, dtype=torch.bool)
    with torch.no_grad():
        here = one.policy.step(probe, is_first)[0]
        moved = float((here.logits - fresh.step(probe, is_first)[0].logits).abs().max())
        there = other.policy.step(probe * units.get("obs", 1.0) + units.get("shift", 0.0), is_first)[0]
    assert moved > 1e-2
    torch.testing.assert_close(there.logits, here.logits, rtol=0, atol=0.2 * moved)
    value = there.value / units.get("reward", 1.0)
    torch.testing.assert_close(value, here.value, rtol=0, atol=0.02 * float(here.value.std()) + 1e-3)


def test_without_normalization_units_matter():
    """The tests above can fail: in units of the reward the policy's gradient is another."""
    plain = {"observations": False, "values": False}
    one = trained(batches(1), make_policy(**plain))
    other = trained(batches(1), make_policy(**plain), units={"reward": 2.0**10})
    differences = [
        float((a - b).detach().abs().max())
        for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    ]
    assert max(differences) > 1e-3


def test_actors_and_learner_agree_while_statistics_move():
    """Catches weights published without their statistics, and statistics that move within an update."""
    envs = NoiseEnvironment(8, ContinuousActions(names=("x",), low=(-1.0,), high=(1.0,)))
    envs.spec = EnvSpec(env_id="noise", observation=VectorSpace(size=3), actions=envs.spec.actions)
    rollouts = Rollouts(envs, unroll_length=12)
    torch.manual_seed(0)
    policy = POLICIES["fast"](
        rollouts.observation, rollouts.actions, initialization=Initialization(), normalize_observations=True
    )
    rollouts.worker.policy = copy.deepcopy(policy).eval().requires_grad_(False)
    learner = make_learner(policy, **STEPS)
    scales = set()
    for version in range(4):
        error = learner.update(rollouts.batch(policy, version)).log_prob_error
        assert error is not None
        assert error < TOLERANCE
        scales.add(float(policy.vector_normalizer.scale[0]))
    assert len(scales) == 4


def test_forgotten_statistics_are_seen_by_the_parity_check():
    """The mutation that the test above is about: actors with weights whose statistics were not published."""
    learner = trained(batches(3))
    actor = make_policy()
    published = flatten_weights(learner.policy, 3)
    parameters = sum(p.numel() for p in actor.parameters())
    assert published.flat.size == parameters + 3 + 3 + 1 + 1
    forgotten = copy.deepcopy(published.flat)
    forgotten[parameters:] = flatten_weights(actor, 0).flat[parameters:]
    load_weights(actor, type(published)(3, forgotten, ""))
    with torch.no_grad():  # a policy that has learned something
        for policy in (actor, learner.policy):
            policy.actor_W.mul_(30)
    batch = acted_with(actor, random_batch(9, num_slots=8))
    batch["policy_version"][:] = 3
    error = learner.update(batch).log_prob_error
    assert error is not None
    assert error > TOLERANCE


def test_a_skipped_update_moves_no_statistics():
    """Catches statistics that keep the batch of an update that was undone."""
    learner = trained(batches(2))
    before = flatten_weights(learner.policy, 0).content_hash, learner.statistics.value_std
    state = copy.deepcopy(learner.statistics.state_dict())
    broken = random_batch(7, num_slots=8)
    broken["reward"][0, 0] = torch.nan
    with pytest.raises(NonFiniteUpdate):
        learner.update(broken)
    assert (flatten_weights(learner.policy, 0).content_hash, learner.statistics.value_std) == before
    for part, tensors in learner.statistics.state_dict().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, state[part][name]), (part, name)


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_first_update_leaves_values_without_unit(first):
    """Catches the first unit of values, which is taken before the steps, outliving them."""
    learner = make_learner(make_policy(), **(STEPS if first else {}))
    broken = random_batch(7, num_slots=8)
    broken["obs"][0, 0] = torch.nan
    with pytest.raises(NonFiniteUpdate):
        learner.update(broken)
    assert float(learner.policy.value_scale.std) == 0
    learner.update(random_batch(8, num_slots=8))
    assert np.isfinite(flatten_weights(learner.policy, 1).flat).all()
    assert float(learner.policy.value_scale.std) > 0


def test_rewards_that_are_all_zero():
    """Catches a division by the spread of targets that do not spread."""
    learner = make_learner(make_policy(), **STEPS)
    for batch in batches(3):
        learner.update(in_units(batch, reward=0.0))
    assert np.isfinite(flatten_weights(learner.policy, 3).flat).all()
    assert learner.statistics.value_std == 0
    learner.update(batches(1)[0])
    assert learner.statistics.value_std > 0


def column(batch, change):
    changed = batch.clone()
    changed["obs"][..., 0] = change(changed["obs"][..., 0])
    return changed


def test_a_constant_column_is_zero(monkeypatch, caplog):
    """Catches 1 / 0, a constant that float32's rounding blows up, and a column that says nothing without a word."""
    monkeypatch.setattr(shoal.learner.normalization, "MANY", 100)
    learner = trained([column(batch, lambda x: torch.full_like(x, 1000.1)) for batch in batches()])
    assert float(learner.policy.vector_normalizer.scale[0]) == 0
    x = learner.policy.network_input(torch.tensor([[1000.1, 0.0, 0.0], [5.0, 0.0, 0.0]]))
    assert x[:, 0].tolist() == [0, 0]
    assert [record.message for record in caplog.records] == [
        "observations obs[0] never varied in 100 steps; the network sees 0 in their place"
    ]


@pytest.mark.parametrize("huge", [1e30, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("known", [0, 1])
def test_a_huge_reading_spoils_no_beginning(huge, known, caplog):
    """Catches a reading that is broken before anything is known of its column, and makes all others 0 for the rest of
    the run, without a word."""
    learner = make_learner(make_policy(), **ONE_STEP)
    reference = trained(batches(8), **ONE_STEP).policy.vector_normalizer.scale
    for batch in batches(known):
        learner.update(column(batch, lambda x: torch.full_like(x, 3.0)))  # constant so far
    first, *others = batches(8)
    slot, t = valid_transitions(first).nonzero()[0].tolist()
    first["obs"][slot, t, :2] = huge
    for batch in (first, *others):
        learner.update(batch)
    ratio = (learner.policy.vector_normalizer.scale / reference).tolist()
    assert 0.02 < ratio[0] < 2, ratio
    assert 0.02 < ratio[1] < 2, ratio
    assert "had values over 100 standard deviations" in caplog.text


@pytest.mark.parametrize("huge", [1e30, float(np.finfo(np.float32).max)])
def test_a_huge_reading_spoils_nothing(huge, caplog):
    """Catches one broken reading that makes all others 0 for the rest of the run, or overflows."""
    learner = trained(batches(4), **ONE_STEP)
    before = learner.policy.vector_normalizer.scale.clone()
    broken = random_batch(20, num_slots=8)
    slot, t = valid_transitions(broken).nonzero()[0].tolist()
    broken["obs"][slot, t, 1] = huge
    learner.update(broken)
    assert np.isfinite(flatten_weights(learner.policy, 0).flat).all()
    ratio = (learner.policy.vector_normalizer.scale / before).tolist()
    assert ratio[0] == pytest.approx(1, abs=0.1)
    assert "observations obs[1] had values over 100 standard deviations" in caplog.text
    assert 0.05 < ratio[1] < 1
    assert float(learner.policy.network_input(broken["obs"].reshape(-1, 3)).abs().max()) == LIMIT


def test_a_spread_that_grows_is_followed():
    """Catches a bound on outliers that keeps the statistics where they began."""
    learner = trained(batches(2), **ONE_STEP)
    for batch in batches(30):
        learner.update(in_units(batch, obs=1e5))
    assert 1 / float(learner.policy.vector_normalizer.scale[0]) > 2e4


def test_categorical_columns_stay_as_they_are():
    """Catches one-hot codes that are divided by the spread of a rare code."""
    observation = VectorObservation(3, None, (1,))
    learner = trained(batches(2), make_policy(observation=observation))
    x = torch.tensor([[0.3, 1.0, 0.0]])
    assert learner.policy.network_input(x)[0, 1] == 1
    assert learner.policy.network_input(x)[0, 0] != x[0, 0]
    assert make_policy(observation=VectorObservation(3, None, (0, 1, 2))).vector_normalizer is None


def test_an_absent_column_is_at_its_mean_and_keeps_its_statistics():
    """Catches a remapped environment without a column, whose 0 would be far from what the network knows as 0."""
    observation = VectorObservation(3, ("x", "y", "z"))
    learner = trained([in_units(batch, shift=50.0) for batch in batches(2)], make_policy(observation=observation))
    fewer = make_policy(
        observation=VectorObservation(2, ("z", "x")),
        action_rows={"a": 0, "b": 1, "c": 2},
        trained_observation=observation,
    )
    fewer.load_state_dict(learner.policy.state_dict())
    whole = torch.tensor([[49.0, 7.0, 52.0]])
    want = learner.policy.network_input(whole)
    want[0, 1] = 0
    torch.testing.assert_close(fewer.network_input(whole[:, [2, 0]]), want)
    other = make_learner(fewer, **STEPS)
    other.statistics.load_state_dict(learner.statistics.state_dict())
    batch = random_batch(5, num_slots=8, obs_shape=(2,))
    other.update(in_units(batch, shift=50.0))
    moved = (fewer.vector_normalizer.mean != learner.policy.vector_normalizer.mean).tolist()
    assert moved == [True, False, True]


def test_a_checkpoint_continues_the_statistics(tmp_path):
    """Catches statistics that begin anew in a resumed run, or that give its next update other weights."""
    first = trained(batches(3))
    path = Checkpoints(tmp_path).save(first, {})
    second = make_learner(make_policy(seed=5), num_shards=2, **STEPS)
    load_checkpoint(path).restore(second)
    assert second.statistics.value_std == first.statistics.value_std
    for learner in (first, second):
        learner.update(random_batch(30, num_slots=8))
    assert flatten_weights(first.policy, 0).sha256 == flatten_weights(second.policy, 0).sha256
    played = load_checkpoint(path).make_policy()
    obs, is_first = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)
    second.policy.load_state_dict(played.state_dict())
    assert torch.equal(played.step(obs, is_first)[0].value, second.policy.step(obs, is_first)[0].value)


def test_resuming_without_values_in_units_keeps_the_values(tmp_path):
    """Catches an older or imported policy whose values change because they are now learned in other units."""
    old = trained(batches(2), make_policy(values=False))
    path = Checkpoints(tmp_path).save(old, {})
    new = make_learner(make_policy(seed=5), num_shards=2, **STEPS)
    load_checkpoint(path).restore(new)
    obs, is_first = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(new.policy.step(obs, is_first)[0].value, old.policy.step(obs, is_first)[0].value)
    new.update(random_batch(30, num_slots=8))
    assert float(new.policy.value_scale.std) != 1


@pytest.mark.parametrize("saved", [True, False])
def test_observations_are_normalized_as_in_training_or_refused(tmp_path, saved):
    """Catches statistics that do not fit: a policy that is resumed seeing its observations in other units."""
    path = Checkpoints(tmp_path).save(trained(batches(1), make_policy(observations=saved)), {})
    with pytest.raises(CheckpointError, match=f"policy.normalize_observations={str(saved).lower()}"):
        load_checkpoint(path).restore(make_learner(make_policy(observations=not saved)))
    assert SMALL.obs_shape == (3,)
