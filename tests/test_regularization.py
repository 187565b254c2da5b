"""Weight clipping and the L2-init loss: what is bounded, what is drawn to where, and that a resumed run knows it."""

from __future__ import annotations

import pytest
import torch
from rollouts import make_learner, random_batch, small_policy
from shoal.deploy.settings.load import load_config
from shoal.learner.checkpoint import Checkpoints, load_checkpoint
from shoal.learner.learner import NonFiniteUpdate
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.actions import Continuous
from shoal.policy.config import RegularizationConfig
from shoal.policy.regularization import WeightRegularizer
from shoal.policy.weights import flatten_weights
from torch import nn


def regularizer(policy=None, **settings):
    return WeightRegularizer(policy or small_policy(), RegularizationConfig(**settings))


@torch.no_grad()
def disturb(policy, scale=1.0):
    """Away from w0, where the loss and its gradient are zero."""
    for p in policy.parameters():
        p.add_(scale * torch.randn_like(p))


# Weight clipping


def test_weights_are_within_bounds_after_every_step():
    """A clip once per update, before the step, of what is excluded, or with another component's scale."""
    policy = small_policy()
    initial = {name: p.abs().max().item() for name, p in policy.named_parameters()}
    settings = RegularizationConfig(clip_scale=1.01, clip_floor=0.02, clip_overrides={"lstm": 0, "fc1": 0.5})
    learner = make_learner(
        policy, learning_rate=0.3, epochs=2, minibatches=2, batch_size=6, clip_coef=0.9, regularization=settings
    )
    bounds = learner.regularizer.bounds
    outside = []
    # Before each step the weights are as clipping left them after the step before.
    learner.optimizer.register_step_pre_hook(
        lambda *_: outside.append(
            {name for name, bound in bounds.items() if policy.get_parameter(name).abs().max() > bound}
        )
    )
    learner.update(random_batch(1, num_slots=6))
    assert len(outside) == 4
    assert outside[1:] == [set()] * 3
    for name, p in policy.named_parameters():
        largest = p.abs().max().item()
        if "bias" in name or name.startswith("lstm"):
            assert largest > 1.01 * initial[name] or initial[name] == 0, name
        else:
            assert largest <= (0.5 if name.startswith("fc1") else 1.01) * initial[name] + 1e-6, name


def test_bounds_are_of_magnitudes():
    """The original's defect: max(w) in place of max|w|, so that some initial weights lay outside their own bound."""
    policy = small_policy()
    with torch.no_grad():
        policy.fc1.weight.clamp_(max=0.1)
        policy.fc1.weight[3, 1] = -0.9
    assert regularizer(policy, clip_scale=2.0).bounds["fc1.weight"] == pytest.approx(1.8)


def test_parameters_that_start_at_zero_can_move():
    """A bound of 0 from max|w| at initialisation."""
    policy = small_policy()
    nn.init.zeros_(policy.fc1.weight)
    assert regularizer(policy, clip_scale=2.0, clip_floor=0.05).bounds["fc1.weight"] == 0.05


def test_a_value_head_that_is_rescaled_has_neither():
    """Catches values that move with their unit: PopArt makes the weights larger where the spread of returns falls, and
    a bound of the initial ones cuts them off, or the loss draws them back."""
    policy = small_policy()
    [name] = [name for name, p in policy.named_parameters() if p is policy.value_head.weight]
    assert name in regularizer(policy, clip_scale=1.0).bounds
    policy.normalize(observations=False, values=True)
    both = regularizer(policy, clip_scale=1.0, l2_init_coef=0.1)
    assert name not in both.bounds
    assert name not in both.l2_init_coefs
    assert len(both.bounds) == len(both.l2_init_coefs) > 5
    with pytest.raises(ValueError, match=r"learner\.normalize_values, which rescales the value head"):
        regularizer(policy, clip_overrides={name: 2.0})


def test_off_is_off():
    """Work in every step for what nobody asked for; weights clamped to a scale of 0."""
    policy = small_policy()
    before = flatten_weights(policy, 0).sha256
    off = regularizer(policy)
    off.clip_weights()
    assert off.l2_init_loss() is None
    assert off.bounds == off.l2_init_coefs == {}
    assert flatten_weights(policy, 0).sha256 == before


# The L2-init loss


def test_l2_init_gradient_by_finite_differences():
    """The original's defect: a constant without a gradient. Or a wrong factor, or a pull to zero instead of to w0."""
    policy = small_policy().double()
    factors = {"critic_1": 2.0, "fc1": 0}
    loss = regularizer(policy, l2_init_coef=0.3, l2_init_overrides=factors).l2_init_loss
    assert loss().item() == 0
    disturb(policy)
    loss().backward()
    step = 1e-3  # central differences of a quadratic are exact whatever the step
    for name in ("critic_1.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l1", "actor_W", "action_embeddings.weight"):
        p = policy.get_parameter(name)
        flat = p.detach().view(-1)
        for i in (0, 17, 300):
            here = flat[i].item()
            values = []
            for there in (here - step, here + step):
                flat[i] = there
                values.append(loss().item())
            flat[i] = here
            assert (values[1] - values[0]) / (2 * step) == pytest.approx(p.grad.view(-1)[i].item(), rel=1e-6)
    assert policy.fc1.weight.grad is None
    assert policy.critic_1.bias.grad is None


def test_l2_init_pulls_back_in_a_real_update():
    """A loss that is reported and never reaches the optimizer."""
    distances = []
    for coef in (0.0, 10.0):
        policy = small_policy()
        settings = RegularizationConfig(l2_init_coef=coef)
        learner = make_learner(policy, learning_rate=1e-3, max_grad_norm=1e9, regularization=settings)
        disturb(policy, 0.1)
        for _ in range(3):
            learner.update(random_batch(1))
        reference = learner.regularizer.reference
        distances.append({name: (p - reference[name]).norm() for name, p in policy.named_parameters()})
    for name in ("fc1.weight", "lstm.weight_hh_l0", "actor_1.weight"):
        assert distances[1][name] < 0.99 * distances[0][name], name


def test_the_reference_moves_with_the_policy_versions(tmp_path):
    """Moved by this process's count, before the update, by a refused update, with the bounds, or not saved."""
    settings = RegularizationConfig(l2_init_coef=1e-3, clip_scale=3.0, l2_init_reference_every=2)
    learner = make_learner(small_policy(), regularization=settings)
    bounds = learner.regularizer.bounds

    def reference_is(weights):
        return all(torch.equal(w0, weights[name]) for name, w0 in learner.regularizer.reference.items())

    history = [{name: p.clone() for name, p in learner.policy.state_dict().items()}]
    for version in (1, 2, 3):
        learner.update(random_batch(version))
        history.append({name: p.clone() for name, p in learner.policy.state_dict().items()})
        assert reference_is(history[0 if version == 1 else 2]), version
    path = Checkpoints(tmp_path).save(learner, {})
    learner = make_learner(small_policy(seed=5), regularization=settings)
    load_checkpoint(path).restore(learner)
    assert reference_is(history[2])
    bad = random_batch(4)
    bad["reward"][:] = float("nan")
    with pytest.raises(NonFiniteUpdate):
        learner.update(bad)
    assert reference_is(history[2])
    learner.update(random_batch(4))
    assert reference_is(learner.policy.state_dict())
    assert not reference_is(history[3])
    assert learner.regularizer.bounds == bounds


# Names


def test_norms_biases_and_log_stds_are_free_unless_asked():
    """A clipped log-std, which fixes the exploration in silence; an exclusion that cannot be lifted or widened."""
    policy = FastPolicy(VectorObservation(3), Continuous(("x", "y")))
    usual = regularizer(policy, clip_scale=1.0, l2_init_coef=1.0)
    assert usual.bounds.keys() == usual.l2_init_coefs.keys()
    assert not any("bias" in name or "log_std" in name for name in usual.bounds)
    assert {"fc1.weight", "lstm.weight_hh_l1", "actor_W", "action_embeddings.weight"} < usual.bounds.keys()
    all_of_them = dict(policy.named_parameters()).keys()
    assert regularizer(policy, clip_scale=1.0, l2_init_coef=1.0, exclude=[]).bounds.keys() == all_of_them
    chosen = regularizer(policy, clip_scale=1.0, exclude=["critic_1", "lstm.weight_ih_l0", "*bias*", "*_W", "*log_std"])
    assert usual.bounds.keys() - chosen.bounds.keys() == {"critic_1.weight", "lstm.weight_ih_l0", "actor_W"}
    normed = nn.ModuleDict({"norm1": nn.LayerNorm(3), "fc": nn.Linear(3, 3)})
    assert regularizer(normed, clip_scale=1.0).bounds.keys() == {"fc.weight"}


def test_overrides_are_by_component_parameter_or_pattern_and_the_last_counts():
    """A key that reaches too far, not far enough, or loses to one that stands before it."""
    overrides = {"*": 0, "lstm": 2.0, "lstm.weight_hh_*": 3.0, "lstm.weight_hh_l1": 0, "critic*": 5.0}
    some = regularizer(l2_init_coef=0.1, l2_init_overrides=overrides, clip_overrides={"fc1": 1.0})
    assert some.l2_init_coefs == pytest.approx(
        {"lstm.weight_ih_l0": 0.2, "lstm.weight_ih_l1": 0.2, "lstm.weight_hh_l0": 0.3, "critic_1.weight": 0.5}
    )
    assert some.bounds.keys() == {"fc1.weight"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_overrides": {"lstn": 1.0}}, r"clip_overrides names \['lstn'\].*did you mean 'lstm'\?.*'value_head'"),
        ({"l2_init_overrides": {"lstm.weight": 1.0}}, r"l2_init_overrides names \['lstm\.weight'\]"),
        ({"clip_overrides": {"*.bais": 1.0}}, r"clip_overrides names \['\*\.bais'\]"),
        ({"clip_overrides": {"fc1.bias": 1.0}}, r"names \['fc1\.bias'\].*exclude=\[.*leaves these out"),
        ({"exclude": ["critic"]}, r"exclude names \['critic'\].*did you mean 'critic_1'"),
    ],
)
def test_a_name_without_effect_is_refused(settings, message):
    """A misspelt name that silently keeps the default."""
    with pytest.raises(ValueError, match=message):
        regularizer(**settings)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("clip_scale=-1", "clip_scale: Input should be greater than or equal to 0 (got -1)"),
        ("clip_floor=.nan", "clip_floor: Input should be a finite number (got nan)"),
        ("l2_init_coef=.inf", "l2_init_coef: Input should be a finite number (got inf)"),
        ("l2_init_reference_every=-3", "l2_init_reference_every: Input should be greater than or equal to 0 (got -3)"),
        ("l2_init_reference_every=2.5", "l2_init_reference_every: Input should be a valid integer"),
        ("clip_overrides={lstm: -2}", "clip_overrides.lstm: Input should be greater than or equal to 0 (got -2)"),
        ("l2_init_overrides={lstm: .nan}", "l2_init_overrides.lstm: Input should be a finite number (got nan)"),
        ("exclude=lstm", "exclude: "),
    ],
)
def test_a_bad_number_is_one_problem_with_its_path(setting, problem):
    """A bound below zero, a coefficient that pushes away from w0, a NaN that no update survives."""
    problems = load_config((), [f"learner.regularization.{setting}"])[1]
    assert len(problems) == 1
    assert problems[0].startswith(f"learner.regularization.{problem}")


# Checkpoints


def saved(tmp_path, **settings):
    """A trained learner and its checkpoint."""
    learner = make_learner(small_policy(), regularization=RegularizationConfig(**settings))
    for seed in range(2):
        learner.update(random_batch(seed))
    return learner, load_checkpoint(Checkpoints(tmp_path).save(learner, {}))


def test_a_fresh_process_resumes_with_the_same_w0_and_bounds(tmp_path):
    """The original's defect: w0 of a resumed run was what the new process drew."""
    settings = {"l2_init_coef": 0.1, "clip_scale": 1.1}
    learner, checkpoint = saved(tmp_path, **settings)
    w0 = dict(small_policy().named_parameters())
    # Another process has drawn other weights.
    resumed = make_learner(small_policy(seed=77), regularization=RegularizationConfig(**settings))
    checkpoint.restore(resumed)
    assert all(torch.equal(resumed.regularizer.reference[name], p) for name, p in w0.items())
    assert resumed.regularizer.bounds == learner.regularizer.bounds
    for each in (learner, resumed):
        each.update(random_batch(9))
    assert flatten_weights(resumed.policy, 0).sha256 == flatten_weights(learner.policy, 0).sha256


def test_a_run_that_is_resumed_with_other_settings_still_knows_where_it_began(tmp_path):
    """Features that are turned on, widened or scaled at a resume and then measure from the weights of that moment."""
    _, checkpoint = saved(tmp_path)
    settings = RegularizationConfig(clip_scale=1.5, l2_init_coef=1.0, exclude=[])
    resumed = make_learner(small_policy(seed=77), regularization=settings)
    checkpoint.restore(resumed)
    policy = small_policy()
    assert resumed.regularizer.bounds == regularizer(policy, clip_scale=1.5, exclude=[]).bounds
    squares = sum((p - policy.get_parameter(name)).square().sum() for name, p in resumed.policy.named_parameters())
    assert resumed.regularizer.l2_init_loss().item() == pytest.approx(squares.item(), rel=1e-5)


@pytest.mark.parametrize("key", ["reference/fc1.bias", "initial_max/fc1.bias"])
def test_a_checkpoint_without_a_parameter_is_refused(key):
    """A stack of KeyError, or a run whose w0 is half of one and half of another."""
    other, this = regularizer(small_policy(1)), regularizer(small_policy(2))
    before = {name: w0.clone() for name, w0 in this.reference.items()}
    state = other.state_dict()
    del state[key]
    with pytest.raises(
        ValueError, match=r"initial weights do not fit this policy: expected shape \(128,\) for fc1\.bias"
    ):
        this.load_state_dict(state)
    torch.testing.assert_close(this.reference, before, rtol=0, atol=0)
