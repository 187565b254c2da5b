"""Both policies treat their weights alike: initialisation, clipping, L2-init, updates.

Equality of numbers; that two policies have methods of the same name says nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ACTIONS, OBSERVATIONS, POLICIES, assert_same, make_pair
from rollouts import make_learner, random_batch
from shoal.learner.weight_metrics import measure_weights
from shoal.policy import ComponentPolicy, FastPolicy, Initialization, TokenObservation, VectorObservation
from shoal.policy.config import RegularizationConfig
from shoal.policy.regularization import WeightRegularizer
from shoal.policy.weights import flatten_weights

ORIGINAL = TokenObservation(11, 11, 200, [1.0] * 25)
NAMES = [f"action_{i}" for i in range(19)]
CONFIG = RegularizationConfig(
    clip_scale=1.0,
    clip_overrides={"lstm": 0.5, "fc1": 0.0},
    l2_init_coef=0.01,
    l2_init_overrides={"critic_1": 3.0, "actor_W": 0.0},
)


def pair_with_regularizers():
    """Both policies, moved alike away from the weights that their regularizers hold as the initial ones."""
    found = []
    for policy in make_pair(ORIGINAL, NAMES):
        regularizer = WeightRegularizer(policy, CONFIG)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        found.append((policy, regularizer))
    return found


def assert_same_weights(one, other):
    for (name, p), (other_name, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name
        assert_same(p, q, name)


def test_parameter_count():
    """A layer too many or too few: 574,978 parameters each, whatever the number of actions."""
    for make in (FastPolicy, ComponentPolicy):
        assert sum(p.numel() for p in make(ORIGINAL, NAMES).parameters()) == 574_978


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("actions", ACTIONS)
def test_parameters_have_the_same_names_and_order(observation, actions):
    """Another order: flat weights that one publishes would land in other layers of the other."""
    fast, component = (make(OBSERVATIONS[observation], ACTIONS[actions]) for make in POLICIES.values())
    shapes = [[(name, p.shape) for name, p in policy.named_parameters()] for policy in (fast, component)]
    assert shapes[0] == shapes[1]
    assert list(fast.state_dict()) == list(component.state_dict())
    for one, other in ((fast, component), (component, fast)):
        one.load_state_dict(other.state_dict(), strict=True)
    assert flatten_weights(fast, 0).sha256 == flatten_weights(component, 0).sha256


@pytest.mark.parametrize(
    ("observation", "lstm_bias"), [*((o, "ones") for o in OBSERVATIONS), ("vector", "forget"), ("vector", "zeros")]
)
def test_equal_seeds_give_equal_weights(observation, lstm_bias):
    """An initialisation that depends on what was made before: one of the originals drew its LSTM twice."""
    streams, policies = [], []
    for make in POLICIES.values():
        torch.manual_seed(11)
        policies.append(make(OBSERVATIONS[observation], NAMES, initialization=Initialization(lstm_bias=lstm_bias)))
        streams.append(torch.rand(4))
    assert_same_weights(*policies)
    assert_same(*streams)
    again = FastPolicy(OBSERVATIONS[observation], NAMES)
    assert not torch.equal(again.fc1.weight, policies[0].fc1.weight)


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_one_components_weights_do_not_depend_on_the_others(make):
    """A wider table or another encoder that moves the weights of everything behind it."""
    found = []
    for observation, rows in ((ORIGINAL, 100), (ORIGINAL, 40), (VectorObservation(7), 100)):
        torch.manual_seed(2)
        found.append(dict(make(observation, NAMES, rows).named_parameters()))
    for name in ("encoded_obs.weight", "lstm.weight_hh_l1", "critic_1.weight", "value_head.weight", "actor_W"):
        assert_same(found[0][name], found[1][name], name)
        assert_same(found[0][name], found[2][name], name)
    assert_same(found[0]["cnn2.weight"], found[1]["cnn2.weight"])


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_initial_distributions(make):
    """Gains of sqrt(2) where the original has 1, biases other than its, an embedding table of another scale."""
    torch.manual_seed(0)
    policy = make(ORIGINAL, NAMES)
    for name, gain in (("cnn1", 1), ("cnn2", 1), ("fc1", 1), ("encoded_obs", 1), ("actor_1", 1), ("critic_1", 2**0.5)):
        layer = policy.get_submodule(name)
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(values, torch.full_like(values, gain), rtol=1e-4, atol=1e-4, msg=name)
        assert not layer.bias.any(), name
    assert abs(policy.value_head.weight.norm() - 1) < 1e-4
    for name, parameter in policy.lstm.named_parameters():
        if "weight" in name:
            values = torch.linalg.svdvals(parameter)
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)
        else:
            assert (parameter == 1).all()
    assert abs(policy.action_embeddings.weight.abs().max() - 0.1) < 1e-6
    bound = 512**-0.5
    assert 0.99 * bound < policy.actor_W.abs().max() <= bound
    assert abs(policy.actor_W.std() - bound / 3**0.5) < 0.01 * bound
    assert 0 < abs(policy.actor_bias) <= bound


def test_weight_clipping():
    """Bounds of one policy that are not the other's, or components that only one of them clips."""
    (fast, by_fast), (component, by_component) = pair_with_regularizers()
    assert by_fast.bounds == by_component.bounds
    assert "lstm.weight_hh_l0" in by_fast.bounds
    assert "fc1.weight" not in by_fast.bounds
    before = copy.deepcopy(fast)
    by_fast.clip_weights()
    by_component.clip_weights()
    assert_same_weights(fast, component)
    assert not torch.equal(fast.lstm.weight_hh_l0, before.lstm.weight_hh_l0)
    assert_same(fast.fc1.weight, before.fc1.weight)
    assert fast.cnn1.weight.abs().max() <= by_fast.bounds["cnn1.weight"]


def test_l2_init_loss_and_gradient():
    """A loss that is a constant in one of them, as the original ComponentPolicy's was, or of other weights."""
    (fast, by_fast), (component, by_component) = pair_with_regularizers()
    losses = [by_fast.l2_init_loss(), by_component.l2_init_loss()]
    assert_same(*losses)
    assert losses[0] > 0
    for loss in losses:
        loss.backward()
    for name, p in fast.named_parameters():
        assert_same(p.grad, component.get_parameter(name).grad, name)
    moved = fast.critic_1.weight - by_fast.reference["critic_1.weight"]
    torch.testing.assert_close(fast.critic_1.weight.grad, 2 * 0.01 * 3 * moved)
    assert fast.actor_W.grad is None


def test_reference_update():
    """A reference that moves in one of them only (the original ComponentPolicy's update did nothing)."""
    for policy, regularizer in pair_with_regularizers():
        regularizer.update_l2_init_reference()
        assert regularizer.l2_init_loss() == 0
        assert_same(regularizer.reference["fc1.weight"], policy.fc1.weight)


def test_weight_metrics():
    """Metrics of other components, or none (the original ComponentPolicy returned nothing)."""
    (_, by_fast), (_, by_component) = pair_with_regularizers()
    fast, component = measure_weights(by_fast, {}), measure_weights(by_component, {})
    assert fast == component
    assert {"cnn1", "lstm", "critic_1", "actor_W"} <= set(fast.effective_rank)
    assert min(fast.distance_to_init.values()) > 0


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"num_threads": 2}])
def test_updates(settings):
    """Policies that begin alike and are other policies after an update: another loss, gradient, clipping or order."""
    hashes = []
    for policy in make_pair(VectorObservation(3), ["a", "b", "c"]):
        learner = make_learner(policy, regularization=CONFIG, **settings)
        terms = [learner.update(random_batch(seed)).terms for seed in range(2)]
        hashes.append((flatten_weights(policy, 0).sha256, terms))
        learner.close()
    assert hashes[0] == hashes[1]
