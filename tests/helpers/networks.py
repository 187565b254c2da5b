"""Tests of both policies share these: every sort of observation and action, and pairs of equal networks."""

from __future__ import annotations

import numpy as np
import torch
from shoal.policy import ComponentPolicy, FastPolicy, ImageObservation, TokenObservation, VectorObservation
from shoal.policy.actions import Continuous, Discrete

POLICIES = {"fast": FastPolicy, "component": ComponentPolicy}

OBSERVATIONS = {
    "tokens": TokenObservation(11, 11, 40, [float(i % 7 + 1) for i in range(25)]),
    # 7x5 is no size that the stride of 3 covers; a plane per value; a coordinate of its own.
    "odd tokens": TokenObservation(7, 5, 20, [2.0, None, 4.0], ["hp", "tag", "ore"], [(1, ["x", "y"])], 0xFE),
    "small image": ImageObservation(9, 12, 3),
    "picture": ImageObservation(40, 44, 3),
    "residual image": ImageObservation(11, 6, 3, encoder="residual"),
    "vector": VectorObservation(5),
}
ACTIONS = {
    "discrete": Discrete((("n", "s", "e", "w", "stay"),)),
    "several": Discrete((("n", "s", "e"), ("up", "down")), scalar=False),
    "continuous": Continuous(("x", "y")),
}


def make_pair(observation, actions, seed=0, **settings):
    """FastPolicy and ComponentPolicy with the same weights, which matter as much as in trained ones."""
    torch.manual_seed(seed)
    fast = FastPolicy(observation, actions, **settings)
    with torch.no_grad():
        for name, scale in (("action_embeddings.weight", 10), ("actor_W", 3), ("encoded_obs.weight", 3)):
            fast.get_parameter(name).mul_(scale)
    component = ComponentPolicy(observation, actions, **settings)
    component.load_state_dict(fast.state_dict())
    return fast, component


def observe(observation, *batch, seed=0):
    """Random observations [*batch, ...]; of tokens half have no place, and many are padding."""
    rng = np.random.default_rng(seed)
    if isinstance(observation, VectorObservation):
        return torch.from_numpy(rng.standard_normal((*batch, *observation.shape), np.float32))
    if isinstance(observation, ImageObservation):
        return torch.from_numpy(rng.integers(0, 256, (*batch, *observation.shape), np.uint8))
    obs = rng.integers(0, 256, (*batch, *observation.shape), np.uint8)
    inside = rng.integers(0, observation.height, obs.shape[:-1]) << 4
    inside += rng.integers(0, observation.width, obs.shape[:-1])
    kind = rng.random(obs.shape[:-1])
    obs[..., 0] = np.where(kind < 0.6, inside, np.where(kind < 0.8, 0xFF, obs[..., 0]))
    obs[..., 1] %= len(observation.feature_normalizations) + 1
    return torch.from_numpy(obs)


def draw_is_first(steps, rows, seed=0):
    """Flags bool [T, B] with resets inside, on row 0 of some, and none at all in the last row."""
    is_first = np.random.default_rng(seed).random((steps, rows)) < 0.25
    is_first[0, ::2] = True
    is_first[:, -1] = False
    return torch.from_numpy(is_first)


def draw_state(policy, rows, seed=0):
    """A state (h, c) [L, B, H] as an unroll may begin with."""
    generator = torch.Generator().manual_seed(seed)
    shape = policy.initial_state(rows)[0].shape
    return torch.randn(shape, generator=generator).tanh(), torch.randn(shape, generator=generator)


def assert_same(one, other, what=""):
    """Equal bit for bit, also where a tensor is missing on both sides."""
    if one is None or other is None:
        assert one is other, what
        return
    assert one.shape == other.shape, (what, one.shape, other.shape)
    assert one.dtype == other.dtype, what
    assert torch.equal(one, other), f"{what}: {(one - other).abs().max()}"
