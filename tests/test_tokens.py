"""Token placement beyond the golden set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.policy import FastPolicy, TokenObservation, VectorObservation
from shoal.policy.observation import observation_from_json, observation_to_json
from shoal.policy.tokens import TokensToBox, last_write

OBSERVATION = TokenObservation(
    7,
    5,
    30,
    [2.0, None, 10.0],
    ["hp", "tag", "ore"],
    categorical_features=[(1, ["wall", "mine"])],
    global_coordinate=0xFE,
)


def reference(obs):
    """Box and ignored count of one row, token by token."""
    plane_of = {(0, None): 0, (2, None): 1, (1, 0): 2, (1, 1): 3}
    box, ignored = np.zeros((4, 5, 7), np.float32), 0
    for coordinate, feature, value in obs.astype(int):
        if coordinate == 0xFF:
            continue
        row, column = (2, 3) if coordinate == 0xFE else (coordinate >> 4, coordinate & 15)
        plane = plane_of.get((feature, None), plane_of.get((feature, value)))
        if plane is None or row >= 5 or column >= 7:
            ignored += 1
            continue
        box[plane, row, column] = 1.0 if feature == 1 else np.float32(value) / np.float32([2.0, 0, 10.0][feature])
    return box, ignored


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_boxes_equal_the_token_by_token_reference(seed):
    """Wrapped nibbles, tokens leaking into the neighbouring row of the batch, categorical values on a wrong plane."""
    rng = np.random.default_rng(seed)
    obs = rng.integers(0, 256, (3, 30, 3), dtype=np.uint8)
    near = rng.random((3, 30)) < 0.7
    obs[near] = np.stack(
        [
            rng.integers(0, 5, near.sum()) << 4 | rng.integers(0, 8, near.sum()),
            rng.integers(0, 4, near.sum()),
            rng.integers(0, 3, near.sum()),
        ],
        -1,
    ).astype(np.uint8)
    obs[..., 0][rng.random((3, 30)) < 0.1] = 0xFE
    shaper = TokensToBox(OBSERVATION)
    want = [reference(row) for row in obs]
    tensor = torch.from_numpy(obs)
    np.testing.assert_array_equal(shaper(tensor), np.stack([box for box, _ in want]))
    assert shaper.count_ignored(tensor.numpy()) == sum(ignored for _, ignored in want)


def draw_tokens(rng, rows):
    """uint8 [rows, 30, 3]: cells written twice, padding with numbers in it, tokens outside, unknown and global ones."""
    obs = rng.integers(0, 256, (rows, 30, 3), dtype=np.uint8)
    obs[:, :24, 0] = rng.integers(0, 5, (rows, 24)) << 4 | rng.integers(0, 7, (rows, 24))
    obs[:, :24, 1:] = rng.integers(0, 3, (rows, 24, 2))
    obs[:, ::5, 0] = 0xFF
    obs[:, 1::7, 0] = 0xFE
    return obs


@pytest.mark.parametrize("remapped", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_convolutions_are_those_of_the_box(seed, remapped):
    """Patches cut at another stride, weights in another order of cells and planes, padding that erases a cell, tokens
    of a remapped environment in the planes of its own order: in the values or in the gradient."""
    trained = OBSERVATION
    if remapped:  # the same tokens mean the same; the weights know the features in another order, and one less
        norms, names = [10.0, 1.0, None], ["ore", "unseen", "tag"]
        trained = TokenObservation(7, 5, 30, norms, names, [(2, ["mine", "wall"])], 0xFE)
    torch.manual_seed(seed)
    policy = FastPolicy(OBSERVATION, ["a", "b"], trained_observation=trained).double()
    rng = np.random.default_rng(seed)
    obs = draw_tokens(rng, 6)
    box = torch.from_numpy(np.stack([reference(row)[0] for row in obs])).double()  # hp, ore, wall, mine
    if remapped:
        box = torch.stack([box[:, 1], torch.zeros_like(box[:, 0]), box[:, 3], box[:, 2]], 1)
    layers = [policy.cnn1, policy.cnn2]
    want = F.pad(box, (0, 1))  # 7 columns, patches of 5 every 3
    for layer in layers:
        want = F.relu(F.conv2d(want, layer.weight, layer.bias, layer.stride))
    want = F.relu(policy.encoded_obs(F.relu(policy.fc1(want.flatten(1)))))
    got = policy.encode(torch.from_numpy(obs))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # the table's quotients are float32
    weight = torch.from_numpy(rng.standard_normal(want.shape))
    parameters = [p for layer in layers for p in layer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), parameters) for y in (got, want)]
    assert all((part != 0).any() for part in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_last_write_wins_in_any_order_of_writes(seed):
    """A GPU scatters in no defined order: two tokens of one cell would give now one, now the other."""
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(rng.integers(0, 8, 40))
    value = torch.from_numpy(rng.standard_normal(40))
    want = np.zeros(8)
    for i, v in zip(index.tolist(), value.tolist(), strict=True):
        want[i] = v
    agreed = value[last_write(index, 8)]
    shuffled = torch.from_numpy(rng.permutation(40))
    box = torch.zeros(8, dtype=torch.float64).scatter_(0, index[shuffled], agreed[shuffled])
    np.testing.assert_array_equal(box, want)


def test_observation_survives_json():
    """A checkpoint that restores another observation than it was trained with."""
    import json

    for observation in (
        OBSERVATION,
        dataclasses.replace(OBSERVATION, left_out=[(0, None), (1, 1)]),
        VectorObservation(2, ["x", "y"]),
    ):
        assert observation_from_json(json.loads(json.dumps(observation_to_json(observation)))) == observation


@pytest.mark.parametrize("size", [1, 3, 5, 8, 11, 13, 16])
def test_every_cell_of_every_window_reaches_the_network(size):
    """A stride that drops the last columns: cells the policy can never see."""
    policy = FastPolicy(TokenObservation(size, size, size * size, [1.0]), ["a", "b"])
    cells = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    obs = torch.full((1, size * size, 3), 0, dtype=torch.uint8)
    obs[0, :, 0] = (cells[:, 0] << 4 | cells[:, 1]).byte()
    obs[0, :, 2] = 1
    box = policy.to_box(obs)
    # 0xFF is padding, so a 16x16 window cannot name its last cell.
    assert box.sum() == size * size - (size == 16)
    box.requires_grad_()
    features = policy.cnn2(policy.cnn1(torch.nn.functional.pad(box, policy._pad)))
    features.sum().backward()
    assert (box.grad != 0).all()


def test_bad_observations_are_refused():
    """A zero normalization becomes NaN and ends in a crash of the sampler, far from its cause."""
    with pytest.raises(ValueError, match="must be positive"):
        TokenObservation(11, 11, 200, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"1\.\.16"):
        TokenObservation(17, 11, 200, [1.0])
    with pytest.raises(ValueError, match="embedding_rows to 101"):
        FastPolicy(TokenObservation(11, 11, 200, [1.0]), [f"a{i}" for i in range(101)])
    with pytest.raises(ValueError, match="one entry per column"):
        VectorObservation(2, ["x"])
