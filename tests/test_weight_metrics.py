"""The weight metrics against their definitions, and that reading them leaves training alone."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from rollouts import SMALL, RecallWithTimeLimits, Rollouts, make_learner, make_policy, random_batch, small_policy
from service import SMALL as SMALL_RUN
from shoal.deploy.cli import main
from shoal.learner.activations import SAMPLE_ROWS, ActivationSampler
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass, valid_transitions
from shoal.learner.weight_metrics import dormant_units_ratio, effective_rank, measure_weights
from shoal.policy import ComponentPolicy, TokenObservation
from shoal.policy.config import RegularizationConfig
from shoal.policy.regularization import WeightRegularizer
from shoal.policy.weights import flatten_weights

LAYERS = {"cnn1", "cnn2", "fc1", "encoded_obs", "lstm", "critic_1", "actor_1"}


def read(policy, change=None, **settings):
    """A reading after ``change`` of the initial weights."""
    regularizer = WeightRegularizer(policy, RegularizationConfig(**settings))
    if change:
        with torch.no_grad():
            change(policy)
    return measure_weights(regularizer, {})


# From parameters


@pytest.mark.parametrize(
    ("values", "rank"),
    [([1.0] * 100, 99), ([1.0] * 10, 10), ([99.5, 0.5], 1), ([98.5, 1.5], 2), ([5.0, 0, 0], 1), ([0.0, 0, 0], 0)],
)
def test_effective_rank(values, rank):
    """A count that is off by one, that squares the singular values, or that gives a zero matrix a rank."""
    assert effective_rank(torch.tensor(values)) == rank


def test_norms_and_distances_are_those_of_the_whole_component():
    """A component's last tensor in place of all, biases left out, a distance to zero or to another component's w0."""
    policy = small_policy()
    w0 = {name: p.detach().double().clone() for name, p in policy.named_parameters()}
    found = read(policy, lambda p: p.load_state_dict(small_policy(3).state_dict()))
    parts = {name.split(".")[0] for name in w0}
    assert found.norm.keys() == found.distance_to_init.keys() == parts
    for part in parts:
        mine = {name: p.detach().double() for name, p in policy.named_parameters() if name.split(".")[0] == part}
        norm = sum(p.square().sum() for p in mine.values()).sqrt().item()
        distance = sum((p - w0[name]).square().sum() for name, p in mine.items()).sqrt().item()
        initial = sum(w0[name].square().sum() for name in mine).sqrt().item()
        assert found.norm[part] == pytest.approx(norm, rel=1e-5)
        assert found.distance_to_init[part] == pytest.approx(distance, rel=1e-5)
        assert found.relative_distance_to_init[part] == pytest.approx(distance / initial, rel=1e-5)


def test_a_component_is_as_weak_as_its_weakest_matrix():
    """The first of the LSTM's four matrices taken for all; a collapse that a mean hides; a vector called a matrix."""

    def collapse(policy):
        u, s, v = torch.linalg.svd(policy.lstm.weight_hh_l1, full_matrices=False)
        s[3:] = 1e-4
        policy.lstm.weight_hh_l1.copy_(u * s @ v)

    before, after = read(small_policy()), read(small_policy(), collapse)
    assert before.effective_rank["lstm"] > 120
    assert after.effective_rank["lstm"] == 3
    assert after.condition_number["lstm"] == pytest.approx(1e4, rel=0.01)
    assert before.condition_number["critic_1"] == pytest.approx(1, rel=1e-4)
    assert before.effective_rank.keys() == before.condition_number.keys()
    assert before.effective_rank["actor_W"] == 16
    assert not {"value_head", "actor_bias"} & before.effective_rank.keys()


def test_ranks_of_convolutions_are_of_outputs_by_inputs():
    """A decomposition of every 5x5 kernel by itself, which says nothing of the layer."""
    policy = make_policy(TokenObservation(11, 11, 9, [1.0] * 5), ["a", "b"])
    found = read(policy, lambda p: p.cnn1.weight[4:].zero_())
    assert (found.effective_rank["cnn1"], found.effective_rank["cnn2"]) == (4, 64)


def test_clipped_fraction():
    """Weights strictly inside counted, negative ones left out, a share of all weights instead of the bounded ones."""

    def push(policy):
        policy.fc1.weight.view(-1)[:6] = 7.0
        policy.fc1.weight.view(-1)[6:9] = -7.0
        policy.critic_1.weight.fill_(1.0)
        regularizer.clip_weights()

    policy = small_policy()
    settings = {"clip_scale": 2.0, "clip_overrides": {"actor_*": 0, "action_embeddings": 0}}
    regularizer = WeightRegularizer(policy, RegularizationConfig(**settings))
    with torch.no_grad():
        push(policy)
    found = measure_weights(regularizer, {}).clipped_fraction
    assert found.keys() == {"fc1", "encoded_obs", "lstm", "critic_1", "value_head"}
    assert found["fc1"] == pytest.approx(9 / policy.fc1.weight.numel())
    assert found["critic_1"] == 1
    assert found["lstm"] == 0
    assert read(small_policy()).clipped_fraction == {}


# From activations


def test_dormant_units_ratio():
    """A unit of both signs that seems to average out, a threshold that is absolute, a layer's own mean forgotten."""
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (100,), generator=rng) * 2.0 - 1
    layer = torch.stack([signs, torch.ones(100), torch.full((100,), 0.019), torch.full((100,), 0.013)], 1)
    # mean |activation| 0.508, times 0.025: 0.0127
    assert dormant_units_ratio({"fc1": layer, "fc2": layer * 1e-4}) == {"fc1": 0, "fc2": 0}
    layer[:, 3] = 0.012
    assert dormant_units_ratio({"fc1": layer, "fc2": layer * 1e4}) == {"fc1": 0.25, "fc2": 0.25}
    assert dormant_units_ratio({"fc1": torch.zeros(5, 3)}) == {"fc1": 1}
    channels = torch.zeros(10, 4, 3, 3)
    channels[:, 0] = 1.0
    channels[:, 1, 2, 2] = 1.0  # active at one place: not dormant
    channels[0, 2, 0, 0] = 0.1
    assert dormant_units_ratio({"cnn1": channels}) == {"cnn1": 0.5}
    assert dormant_units_ratio({}) == {}


def token_batch():
    """[40] random segments of tokens, and the policy of them."""
    observation = TokenObservation(5, 5, 6, [1.0] * 3)
    spec = dataclasses.replace(SMALL, obs_shape=observation.shape, obs_dtype="uint8")
    batch = random_batch(0, spec=spec, num_slots=40)
    batch["obs"][:] = torch.from_numpy(np.random.default_rng(0).integers(0, 5, batch["obs"].shape, dtype=np.uint8))
    return batch, make_policy(observation, ["a", "b", "c"])


@pytest.mark.parametrize("kind", ["fast", "component"])
def test_dead_units_are_found_in_every_layer(kind):
    """A layer left out, another layer's outputs under its name, outputs before the activation."""
    batch, policy = token_batch()
    if kind == "component":
        fast, policy = policy, ComponentPolicy(policy.observation, policy.actions)
        policy.load_state_dict(fast.state_dict())
    sampler = ActivationSampler(policy)
    alive = dormant_units_ratio(sampler.sample(batch))
    assert alive.keys() == LAYERS
    with torch.no_grad():
        for i, layer in enumerate((policy.cnn1, policy.cnn2, policy.fc1, policy.encoded_obs, policy.actor_1)):
            layer.bias[: 8 + i] = -1e3
            layer.weight[: 8 + i] = 0
        policy.critic_1.weight[:100] = policy.critic_1.bias[:100] = 0
    dead = dormant_units_ratio(sampler.sample(batch))
    for i, (name, units) in enumerate(
        [("cnn1", 64), ("cnn2", 64), ("fc1", 128), ("encoded_obs", 128), ("actor_1", 512)]
    ):
        assert dead[name] >= (8 + i) / units, name
        assert dead[name] <= alive[name] + (8 + i) / units + 0.2, name
    assert dead["critic_1"] == pytest.approx(alive["critic_1"] + 100 / 1024, abs=0.02)


def test_samples_are_what_training_computes():
    """Segments from zero states or without resets, rows of void transitions, another segment's rows."""
    rollouts = Rollouts(RecallWithTimeLimits(12, 0), unroll_length=128)
    policy = make_policy(rollouts.observation, rollouts.actions)
    rollouts.batch(policy, 0)
    batch = rollouts.batch(policy, 0)  # starts in mid-episode
    sample = ActivationSampler(policy).sample(batch)
    chosen = slice(None, None, 3)
    mask = valid_transitions(batch)[chosen]
    assert not mask.all()
    assert len(sample["fc1"]) == mask.sum() <= SAMPLE_ROWS
    with torch.no_grad():
        value = forward_pass(policy, batch[chosen], DevicePath(torch.device("cpu"))).value.T[mask]
        got = policy.value_head(sample["critic_1"]).squeeze(-1)
        fc1 = torch.relu(policy.fc1(batch["obs"][chosen, :-1][mask]))
    torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sample["fc1"], fc1, rtol=1e-4, atol=1e-5)


def test_reading_changes_nothing():
    """A reading that draws random numbers, writes to the memory or the weights, or looks at weights of long ago."""
    batch, policy = token_batch()
    learner = make_learner(policy, learning_rate=1e-2, epochs=2, minibatches=2, batch_size=40)
    policy.act(batch["obs"][:, 0], range(40), batch["is_first"][:, 0])
    memory = copy.deepcopy(policy.get_memory())
    random_state = copy.deepcopy(learner.random_state())
    before = flatten_weights(policy, 0).sha256
    sampler = ActivationSampler(policy)
    first = sampler.sample(batch)
    measure_weights(learner.regularizer, first)
    assert flatten_weights(policy, 0).sha256 == before
    torch.testing.assert_close(policy.get_memory(), memory, rtol=0, atol=0)
    torch.testing.assert_close(learner.random_state(), random_state, rtol=0, atol=0)
    learner.update(batch)
    later = sampler.sample(batch)
    fresh = ActivationSampler(policy).sample(batch)
    for name in LAYERS:
        assert not torch.equal(first[name], later[name]), name
        assert torch.equal(later[name], fresh[name]), name


@pytest.mark.parametrize("every", [0, 3])
def test_the_training_loop_reads_them_every_so_many_updates(every, tmp_path, monkeypatch):
    """Readings in every update, or never; a setting that is not obeyed."""
    versions = []
    monkeypatch.setattr(
        "shoal.learner.training_loop.measure_weights", lambda *args: versions.append(1) or measure_weights(*args)
    )
    arguments = [*SMALL_RUN, "mode=inline", "total_env_steps=800", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *arguments, f"learner.weight_metrics_every={every}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["policy_version"] == 7
    assert len(versions) == (0 if every == 0 else 3)
    assert ("weight_metrics" in summary["stage_seconds"]) == bool(every)
