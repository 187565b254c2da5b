"""The whole update against the same episodes trained one by one, and the parity check that watches the memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import shoal.learner.forward_pass
import shoal.policy.recurrent_policy
import torch
from fuzz import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rollouts import (
    ACTIONS,
    NoiseEnvironment,
    RecallWithTimeLimits,
    Rollouts,
    SameStepRecall,
    make_learner,
    make_policy,
    random_batch,
    small_policy,
    state_of,
    tiny_policy,
)
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass, log_prob_error, valid_transitions
from shoal.learner.learner import NonFiniteUpdate
from shoal.learner.parity_check import TOLERANCE, LogProbParityCheck
from shoal.policy.config import RegularizationConfig
from shoal.policy.lstm import LSTMCore
from shoal.policy.resets import plan_resets
from shoal.policy.weights import flatten_weights
from slow_reference import loss_by_episode

CPU = DevicePath(torch.device("cpu"))
FAULT_SEEN = 1e-2
"""The least error that a fault of the memory causes."""


def gradients(learner):
    """The gradients of the last step; ``max_grad_norm`` must be too large to clip."""
    return {name: p.grad.clone() for name, p in learner.policy.named_parameters()}


def assert_close(got, want, tolerance):
    """Per tensor, relative to its norm; a gradient that is zero but for rounding, relative to all of them."""
    total = float(torch.stack([w.norm() for w in want.values()]).norm())
    for name in want:
        error = float((got[name] - want[name]).norm())
        assert error <= tolerance * (float(want[name].norm()) + total / 100), name


FORMS = {
    "next_step": {},
    "same_step": {"same_step": True},
    "burn_in": {"burn_in": 5},
    "same_step_burn_in": {"same_step": True, "burn_in": 5},
}


def in_double(batch):
    """A copy with float64 in place of float32.

    Gradients are compared in double precision: float32's rounding, which differs between processors, decides which side
    of its kink a rectified unit near 0 is on, and advantages of a few transitions, normalized, magnify it to anything.
    """
    return batch.apply(lambda column: column.double() if column.is_floating_point() else column.clone())


SETTINGS = {
    "vtrace": {},
    "gae": {"advantage": "gae"},
    "bounds": {"rho_bar": 0.6, "c_bar": 1.4, "clip_coef": 0.3, "normalize_advantage": False, "advantage_lambda": 1.0},
    "impala": {"loss": "impala", "epochs": 1, "rho_bar": 0.6, "value_clip_coef": 0.0},
    "l2_init": {"regularization": RegularizationConfig(l2_init_coef=0.01)},
}


EVERY = [(which, form, "lstm") for which in SETTINGS for form in FORMS]
EVERY += [("vtrace", form, core) for form in FORMS for core in ("gru", "linear", "own_cores:Leaky")]


@pytest.mark.parametrize(("which", "form", "core"), EVERY)
@settings(max_examples=examples(2), phases=[Phase.generate])  # a seed does not shrink
@given(seed=st.integers(0, 2**31), num_slots=st.integers(1, 4))
def test_update_equals_episodes_trained_one_by_one(form, which, core, seed, num_slots):
    """Whatever leaks over a boundary or is averaged wrongly: target, loss, gradient, normalization, the state it starts
    from, the observation it bootstraps from."""
    policy = tiny_policy(core).double()
    batch = in_double(random_batch(seed, num_slots=num_slots, state_shapes=state_of(policy), **FORMS[form]))
    learner = make_learner(policy, max_grad_norm=1e9, **SETTINGS[which])
    w0 = {name: learner.regularizer.reference[name].clone() for name in learner.regularizer.l2_init_coefs}
    with torch.no_grad():  # away from w0, where the L2-init gradient is zero
        generator = torch.Generator().manual_seed(seed)
        for p in policy.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    loss, _ = loss_by_episode(policy, batch, learner.config, l2_init=w0 if which == "l2_init" else None)
    names, parameters = zip(*policy.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    result = learner.update(batch)
    assert result.terms["loss"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    assert result.env_steps == int(valid_transitions(batch).sum())
    assert_close(gradients(learner), want, tolerance=1e-9)


@pytest.mark.parametrize("burn_in", [0, 7])
@pytest.mark.parametrize("envs", [RecallWithTimeLimits, SameStepRecall])
@pytest.mark.parametrize("core", ["lstm", "linear", "own_cores:Leaky"])
def test_update_of_real_rollouts_equals_episodes_trained_one_by_one(envs, burn_in, core):
    """A column that the worker writes and the learner reads differently, which random batches cannot show."""
    rollouts = Rollouts(envs(6, 0), unroll_length=24, burn_in=burn_in, core=core)
    actor, policy = (make_policy(rollouts.observation, rollouts.actions, seed, core) for seed in (0, 1))
    rollouts.batch(actor, 0)
    batch = rollouts.batch(actor, 0)  # starts in mid-episode, from stored states
    assert batch["terminated"].any()
    assert batch["truncated"].any()
    assert not batch["is_first"][:, 0].all()
    policy, batch = policy.double(), in_double(batch)
    learner = make_learner(policy, max_grad_norm=1e9)
    loss, _ = loss_by_episode(policy, batch, learner.config)
    names, parameters = zip(*policy.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    learner.update(batch)
    assert_close(gradients(learner), want, tolerance=1e-9)


def test_epochs_train_on_the_targets_of_the_first():
    """Targets or old values computed anew for a batch that is used again; an optimizer step that is left out."""
    batch, policy = random_batch(5), small_policy()
    reference = copy.deepcopy(policy)
    learner = make_learner(policy, epochs=3, learning_rate=1e-3, adam_eps=1e-3)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, eps=1e-3)
    known = None
    for _ in range(3):
        loss, known = loss_by_episode(reference, batch, learner.config, known)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), learner.config.max_grad_norm)
        optimizer.step()
    learner.update(batch)
    assert learner.policy_version == 1
    before = small_policy().state_dict()
    moved = {name: p - before[name] for name, p in policy.state_dict().items()}
    want = {name: p - before[name] for name, p in reference.state_dict().items()}
    assert_close(moved, want, tolerance=5e-3)


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_gradient_threads_do_not_change_the_update(num_threads):
    """A shard weighed by its own count, normalized by itself, or given another shard's targets; 8 > 7 segments."""
    results = []
    for threads in (1, num_threads):
        learner = make_learner(small_policy().double(), num_threads=threads, max_grad_norm=1e9)
        terms = learner.update(in_double(random_batch(3))).terms
        learner.close()
        results.append((terms, gradients(learner)))
    assert_close(results[1][1], results[0][1], tolerance=1e-9)
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9, abs=1e-12)


def test_gradient_threads_are_deterministic():
    """Gradients added in the order in which threads finish."""
    weights = []
    for _ in range(2):
        learner = make_learner(small_policy(), num_threads=3)
        learner.update(random_batch(3))
        learner.close()
        weights.append(flatten_weights(learner.policy, 1).sha256)
    assert weights[0] == weights[1]


def test_void_transitions_have_no_influence():
    """An action, reward or probability of a transition that no action caused, in loss, normalization or gradient."""
    changed = random_batch(4)
    void = ~valid_transitions(changed)
    assert void.any()
    changed["reward"][void] = 1e6
    changed["behavior_log_prob"][void] = -200.0  # a ratio beyond float32
    changed["action"][void] = (changed["action"][void] + 1) % 3
    found = []
    for batch in (random_batch(4), changed):
        learner = make_learner(small_policy(), max_grad_norm=1e9)
        found.append((learner.update(batch).terms, gradients(learner)))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_each_segment_is_used_once_per_epoch():
    """Minibatches drawn with replacement, a remainder that is dropped, the same order in every epoch."""
    learner = make_learner(small_policy(), batch_size=12, epochs=3, minibatches=4)
    parts = [index.tolist() for (index,) in learner._shards.minibatches([12], 3, 4)]
    assert [len(part) for part in parts] == [3] * 12
    epochs = [[segment for part in parts[i : i + 4] for segment in part] for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_minibatches_average_to_the_batch():
    """A minibatch that takes other segments' targets: with a rate of nearly 0 the steps' mean is the batch's."""
    batch = random_batch(6, num_slots=8)
    for flag in ("is_first", "terminated", "truncated"):  # equal counts, so that means of means are means
        batch[flag].zero_()
    settings = {"normalize_advantage": False, "learning_rate": 1e-20, "max_grad_norm": 1e9}
    whole = make_learner(small_policy(), epochs=2, **settings).update(batch).terms
    parts = make_learner(small_policy(), batch_size=8, minibatches=4, epochs=2, **settings).update(batch).terms
    for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("multiple", [{}, {"epochs": 2}, {"epochs": 2, "minibatches": 7, "batch_size": 7}])
@pytest.mark.parametrize("column", ["reward", "behavior_log_prob", "obs"])
def test_a_refused_update_changes_nothing(column, multiple):
    """Weights or moments poisoned, or moved by the earlier steps of an update that is refused in a later one."""
    learner = make_learner(small_policy(), **multiple)
    learner.update(random_batch(1))
    before = copy.deepcopy((learner.policy.state_dict(), learner.optimizer.state_dict()["state"]))
    batch = random_batch(2)
    b, t = valid_transitions(batch).nonzero()[0].tolist()
    batch[column][b, t] = float("nan")
    with pytest.raises(NonFiniteUpdate, match="policy version 1"):
        learner.update(batch)
    after = (learner.policy.state_dict(), learner.optimizer.state_dict()["state"])
    assert learner.policy_version == 1
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    learner.update(random_batch(1))
    assert all(p.isfinite().all() for p in learner.policy.parameters())


def test_a_batch_without_valid_transitions_is_survived():
    """A mean over nothing: NaN weights, or a warning that ends the run."""
    learner = make_learner(small_policy())
    batch = random_batch(1)
    batch["is_first"][:] = True
    batch["terminated"][:] = batch["truncated"][:] = False
    assert learner.update(batch).env_steps == 0
    assert all(p.isfinite().all() for p in learner.policy.parameters())


# The parity check


def recall(num_envs=6, seed=0, **settings):
    """Rollouts of episodes of 6 to 10 steps in unrolls of 32, half of them ended by a time limit, and their learner."""
    rollouts = Rollouts(RecallWithTimeLimits(num_envs, seed))
    return rollouts, make_learner(make_policy(rollouts.observation, rollouts.actions), **settings)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_canary_is_silent_where_the_memory_is_right(num_threads):
    """Any difference between acting and training: reset, stored state, weights on the wire, arithmetic."""
    rollouts, learner = recall(learning_rate=1e-3, num_threads=num_threads)
    for version in range(4):
        batch = rollouts.batch(learner.policy, version)
        assert batch["is_first"][:, 1:-1].any()
        error = learner.update(batch).log_prob_error
        assert error <= TOLERANCE / 10
    learner.close()


def test_the_canary_reads_fresh_segments_only():
    """An alarm about weights that are known to differ."""
    rollouts, learner = recall(learning_rate=1e-2)
    batch = rollouts.batch(learner.policy, 0)
    assert learner.update(batch).log_prob_error <= TOLERANCE
    assert learner.update(batch).log_prob_error is None
    mixed = rollouts.batch(learner.policy, 2)
    mixed["policy_version"][0] = 1
    mixed["behavior_log_prob"][0] -= 1.0
    assert learner.update(mixed).log_prob_error <= TOLERANCE


def _late(is_first):
    late = np.zeros_like(is_first)
    late[1:] = is_first[:-1]
    return late


def _early(is_first):
    early = np.zeros_like(is_first)
    early[:-1] = is_first[1:]
    return early


@pytest.mark.parametrize("break_reset", [_late, _early, np.zeros_like], ids=["late", "early", "never"])
def test_the_canary_jumps_when_the_learner_resets_wrongly(monkeypatch, break_reset):
    """The parity check is blind: resets inside an unroll that come one step off in training."""
    rollouts, learner_ = recall()
    monkeypatch.setattr(
        shoal.learner.forward_pass, "plan_resets", lambda is_first, _: plan_resets(break_reset(is_first))
    )
    assert learner_.update(rollouts.batch(learner_.policy, 0)).log_prob_error > FAULT_SEEN


def test_the_canary_jumps_when_the_actor_resets_late(monkeypatch):
    """The parity check is blind: an actor that zeroes the state after the first observation was consumed."""
    rollouts, learner = recall()
    before, step = [torch.zeros(6, dtype=torch.bool)], LSTMCore.step

    def late(core, x, is_first, state):
        before.append(is_first.clone())
        return step(core, x, before[-2], state)

    monkeypatch.setattr(LSTMCore, "step", late)
    assert learner.update(rollouts.batch(learner.policy, 0)).log_prob_error > FAULT_SEEN


def test_the_canary_jumps_when_truncations_do_not_reset(monkeypatch):
    """The parity check is blind: an actor that resets its memory on terminated only."""
    rollouts, learner = recall()
    calls, step = [], LSTMCore.step

    def terminated_only(core, x, is_first, state):
        calls.append(None)
        is_first = is_first.clone()
        if len(calls) > 1:
            is_first[1::2] = False  # the slots whose episodes are truncated
        return step(core, x, is_first, state)

    monkeypatch.setattr(LSTMCore, "step", terminated_only)
    batch = rollouts.batch(learner.policy, 0)
    log_prob = forward_pass(learner.policy, batch, CPU).log_prob
    by_slot = [log_prob_error(log_prob, batch, [b]).item() for b in range(6)]
    assert min(by_slot[1::2]) > FAULT_SEEN
    assert max(by_slot[0::2]) <= TOLERANCE
    assert learner.update(batch).log_prob_error > FAULT_SEEN


@pytest.mark.parametrize("fault", ["no stored state", "another slot's state", "h and c exchanged", "shifted actions"])
def test_the_canary_jumps_when_the_batch_is_wrong(fault):
    """The parity check is blind: faults of the way from the actor's memory to the learner's."""
    rollouts, learner = recall()
    rollouts.batch(learner.policy, 0)
    batch = rollouts.batch(learner.policy, 0).clone()
    if fault == "no stored state":
        batch["initial_h"].zero_()
        batch["initial_c"].zero_()
    elif fault == "another slot's state":
        batch["initial_h"], batch["initial_c"] = batch["initial_h"].roll(1, 0), batch["initial_c"].roll(1, 0)
    elif fault == "h and c exchanged":
        batch["initial_h"], batch["initial_c"] = batch["initial_c"].clone(), batch["initial_h"].clone()
    else:
        batch["action"] = batch["action"].roll(1, 1)
    assert learner.update(batch).log_prob_error > FAULT_SEEN


@pytest.mark.parametrize("core", ["gru", "linear", "own_cores:Leaky"])
def test_the_canary_watches_every_core(core, monkeypatch):
    """The parity check is blind to another core, or sounds a false alarm: states that go to another slot, and resets
    that come late in training."""
    envs = RecallWithTimeLimits(6, 0)
    rollouts = Rollouts(envs, core=core)
    policy = make_policy(rollouts.observation, rollouts.actions, core=core)
    rollouts.batch(policy, 0)
    batch = rollouts.batch(policy, 0)
    right = forward_pass(policy, batch, CPU).log_prob
    assert log_prob_error(right, batch).item() < TOLERANCE / 10
    exchanged = batch.clone()
    for name in policy.core.state_shapes:
        exchanged[f"initial_{name}"] = exchanged[f"initial_{name}"].roll(1, 0)
    assert log_prob_error(forward_pass(policy, exchanged, CPU).log_prob, batch).item() > 10 * TOLERANCE
    late = batch.clone()
    late["is_first"] = torch.from_numpy(_late(batch["is_first"].T.numpy()).T.copy())
    late["truncated"] = torch.zeros_like(batch["truncated"])
    assert log_prob_error(forward_pass(policy, late, CPU).log_prob, batch).item() > 10 * TOLERANCE


def test_the_lagged_canary_compares_with_the_weights_that_acted():
    """A check against the newest weights, of versions that are forgotten, or that never sees a fault under lag."""
    rollouts, learner = recall(learning_rate=1e-2)
    parity_check = LogProbParityCheck(learner.policy, CPU, max_policy_lag=2, every=2, segments=4)
    for version in range(3):
        parity_check.remember(flatten_weights(learner.policy, version))
        batch = rollouts.batch(learner.policy, version)
        if version == 1:
            old = batch.clone()
        if version < 2:
            learner.update(batch)
    assert log_prob_error(forward_pass(learner.policy, old, CPU).log_prob, old).item() > FAULT_SEEN
    assert parity_check.check(old) is None  # every second batch
    assert parity_check.check(old) <= TOLERANCE
    # Another share of the segments every time: a fault in one slot is found within a round.
    old["behavior_log_prob"][1] -= 0.5
    readings = [parity_check.check(old) for _ in range(4)]
    assert readings[0] is readings[2] is None
    assert max(readings[1], readings[3]) > 0.4
    for version in (3, 4):
        parity_check.remember(flatten_weights(learner.policy, version))
    assert parity_check.check(old) is None
    assert parity_check.check(old) is None  # version 1 is out of reach, and its weights gone


@pytest.mark.parametrize("kind", ACTIONS)
def test_training_evaluates_actions_as_acting_did(kind):
    """Sampling and evaluation of a distribution that disagree, a sum over choices that is lost."""
    rollouts = Rollouts(NoiseEnvironment(5, ACTIONS[kind]))
    policy = make_policy(rollouts.observation, rollouts.actions)
    for _ in range(2):
        batch = rollouts.batch(policy, 0)
        evaluation = forward_pass(policy, batch, CPU)
        assert evaluation.value.shape == evaluation.next_value.shape == (32, 5)
        assert log_prob_error(evaluation.log_prob, batch).item() <= TOLERANCE
    assert make_learner(policy).update(batch).log_prob_error <= TOLERANCE
