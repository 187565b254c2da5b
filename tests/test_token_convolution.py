"""The first convolution from tokens, against the product of the box's patches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import shoal.policy.token_convolution as token_convolution
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.policy import ComponentPolicy, FastPolicy, TokenObservation
from torch import Tensor

NAMES = ["a", "b", "c"]
RAW: dict[str, object] = {"cnn1": {"sources": ["obs_shaper"]}, "obs_normalizer": None}


def observation(height: int = 11, width: int = 11, tokens: int = 40) -> TokenObservation:
    """Magnitudes and one categorical feature; one feature without a place."""
    return TokenObservation(
        width, height, tokens, [7.0, None, 10.0, 1.0], categorical_features=[(1, ["x", "y"])], global_coordinate=0xFE
    )


def draw(rng: np.random.Generator, shape: TokenObservation, rows: int) -> Tensor:
    """Tokens inside and outside the window, of known and unknown features, several in one place, and padding."""
    obs = rng.integers(0, 256, (rows, shape.num_tokens, 3), dtype=np.uint8)
    near = rng.random(obs.shape[:2]) < 0.8
    obs[near] = np.stack(
        [
            rng.integers(0, shape.height, near.sum()) << 4 | rng.integers(0, shape.width, near.sum()),
            rng.integers(0, 5, near.sum()),
            rng.integers(0, 4, near.sum()),
        ],
        -1,
    )
    obs[..., 0][rng.random(obs.shape[:2]) < 0.1] = 0xFE
    obs[..., 0][rng.random(obs.shape[:2]) < 0.2] = 0xFF
    return torch.from_numpy(obs)


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of those who have not installed it."""
    monkeypatch.setattr(token_convolution, "available", lambda: False)


def first_layer(policy: FastPolicy, obs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients, where every output counts differently."""
    y = policy._convolve_tokens(obs)
    weights = torch.arange(y.numel()).view(y.shape).cos()
    return y, list(torch.autograd.grad((y * weights).sum(), list(policy.cnn1.parameters())))


@settings(max_examples=40)
@given(
    st.integers(1, 16), st.integers(1, 16), st.sampled_from([1, 2, 40]), st.integers(1, 5), st.integers(0, 2**32 - 1)
)
def test_it_equals_the_product_of_patches(height: int, width: int, tokens: int, rows: int, seed: int) -> None:
    """Catches patches that are off by one, padded columns that are read, numbers that stay from the row before, the
    first of several tokens in a place instead of the last."""
    shape = observation(height, width, tokens)
    policy = FastPolicy(shape, NAMES)
    obs = draw(np.random.default_rng(seed), shape, rows)
    y, gradients = first_layer(policy, obs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_numba(monkeypatch)
        expected, expected_gradients = first_layer(policy, obs)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4 * float(expected.detach().abs().max()))
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)


def test_it_is_what_runs() -> None:
    """Catches a kernel that is compared with itself: nothing else here would notice that it is never called."""
    policy, obs = FastPolicy(observation(), NAMES), draw(np.random.default_rng(0), observation(), 4)
    policy.to_box.forward = None  # type: ignore[assignment]
    policy.encode(obs).sum().backward()
    assert policy.cnn1.weight.grad is not None
    with torch.inference_mode():
        policy.encode(obs)
    component = ComponentPolicy(observation(), NAMES)
    component.obs_shaper.forward = component.obs_normalizer.forward = component.cnn1.forward = None
    component.encode(obs).sum().backward()


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("changes", [{}, {"cnn1": {"activation": "tanh", "size": 24}}, RAW])
def test_components_compute_the_same(numba: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a component that skips its activation or its normalizer, and an output that TensorDicts have and steps
    compute otherwise."""
    shape = observation()
    torch.manual_seed(0)
    policy = ComponentPolicy(shape, NAMES, components=changes)
    obs = draw(np.random.default_rng(1), shape, 6)
    if not numba:
        without_numba(monkeypatch)
    x, outputs = policy.encode_outputs(obs)
    assert torch.equal(x, policy.encode(obs))
    assert {"obs_shaper", "cnn1", "fc1"} <= set(outputs)
    box = outputs["obs_shaper"] if changes == RAW else outputs["obs_normalizer"]
    torch.testing.assert_close(outputs["cnn1"], policy.cnn1(box), rtol=1e-5, atol=1e-4)
    if not changes:
        torch.manual_seed(0)
        assert torch.equal(FastPolicy(shape, NAMES).encode(obs), x)


def test_equal_boxes_give_equal_bits() -> None:
    """Catches sums in the order of the tokens: an environment that lists its cells otherwise would act otherwise."""
    shape = observation(tokens=100)
    policy, rng = FastPolicy(shape, NAMES), np.random.default_rng(2)
    obs = np.full((8, 100, 3), 0xFF, np.uint8)
    for row in obs:
        cells = rng.permutation(121)[:100]
        row[:, 0], row[:, 1] = cells // 11 << 4 | cells % 11, 2 * rng.integers(0, 2, 100)
        row[:, 2] = rng.integers(0, 256, 100)
    shuffled = np.stack([rng.permutation(row) for row in obs])
    y, gradients = first_layer(policy, torch.from_numpy(obs))
    z, others = first_layer(policy, torch.from_numpy(shuffled))
    assert torch.equal(y, z)
    assert all(map(torch.equal, gradients, others))


def test_gradients_of_many_rows_keep_their_digits() -> None:
    """Catches one float32 sum over thousands of rows."""
    shape = observation()
    policy = FastPolicy(shape, NAMES)
    rows = 20_000
    obs = draw(np.random.default_rng(3), shape, 1).expand(rows, -1, -1)
    y = policy._convolve_tokens(obs)
    [gradient] = torch.autograd.grad(y.sum() * 0.1, [policy.cnn1.weight])
    [one] = torch.autograd.grad(policy._convolve_tokens(obs[:1]).double().sum() * 0.1, [policy.cnn1.weight])
    torch.testing.assert_close(gradient.double(), one.double() * rows, rtol=1e-5, atol=0)


def test_other_numbers_and_devices_take_the_box() -> None:
    """Catches a kernel that reads float64 as float32, or memory that is not there."""
    shape = observation()
    policy, obs = FastPolicy(shape, NAMES), draw(np.random.default_rng(4), shape, 4)
    expected = policy.encode(obs)
    doubled = copy.deepcopy(policy).double()
    box = doubled.to_box(obs).double()
    assert doubled._from_tokens.applies(obs, policy.cnn1)
    assert not doubled._from_tokens.applies(obs, doubled.cnn1)
    torch.testing.assert_close(
        doubled._convolve(box), policy._convolve(policy.to_box(obs)).double(), rtol=1e-4, atol=1e-4
    )
    assert not policy._from_tokens.applies(obs.to("meta"), policy.to("meta").cnn1)
    assert expected.shape == (4, 128)


def test_frozen_layers_and_rows_that_are_not_contiguous() -> None:
    """Catches a gradient that is computed for nobody, and strides that are taken for granted."""
    shape = observation()
    policy, obs = FastPolicy(shape, NAMES), draw(np.random.default_rng(5), shape, 12)
    expected = policy.encode(obs)
    policy.cnn1.requires_grad_(requires_grad=False)
    assert policy._convolve_tokens(obs).grad_fn is None
    every_other = torch.stack([obs, torch.zeros_like(obs)], 1)[:, 0]
    assert not every_other.is_contiguous()
    assert torch.equal(policy.encode(every_other), expected)


def test_a_machine_that_keeps_nothing_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a read-only installation of an account without a home, where numba finds no place for its cache."""
    import numba
    from shoal.policy import token_kernels

    compiled, asked = numba.njit, []

    def njit(signature: str, **options: object) -> object:
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(signature, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert token_kernels._compiled("i8(i8)")(lambda x: x + 1)(2) == 3
    assert asked == [True, False]
