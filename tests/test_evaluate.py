"""A policy as a player."""

from __future__ import annotations

import numpy as np
import torch

from deploy.evaluate import PolicyPlayer
from envs.play import play
from envs.registry import make_vector_env
from policy import FastPolicy, VectorObservation


def make_policy() -> FastPolicy:
    torch.manual_seed(0)
    policy = FastPolicy(VectorObservation(5), ["0", "1", "2", "3"])
    with torch.no_grad():
        policy.actor_W.mul_(200)
    return policy


def test_zeroed_memory_is_no_memory() -> None:
    """Catches a baseline without memory that remembers all the same, and play with memory that forgets."""
    obs, again = np.zeros((8, 5), np.float32), np.zeros(8, bool)
    for zero_memory in (False, True):
        player = PolicyPlayer(make_policy(), seed=0, zero_memory=zero_memory)
        states = []
        for _ in range(3):
            player(obs, again)
            states.append(torch.stack([h for h, _ in player._policy.get_memory().values()]))
        assert torch.equal(states[0], states[2]) == zero_memory


def test_memory_is_reset_between_episodes() -> None:
    """Catches evaluation that carries one episode's state into the next."""
    obs = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    player = PolicyPlayer(make_policy(), seed=0)
    player(obs, np.ones(4, bool))
    first = player._policy.get_memory()
    player(obs, np.zeros(4, bool))
    player(obs, np.array([True, False, True, False]))
    now = player._policy.get_memory()
    assert [bool(torch.allclose(now[i][0], first[i][0], atol=1e-6)) for i in range(4)] == [True, False, True, False]


def test_greedy_play_does_not_sample() -> None:
    """Catches greedy play that samples, and sampled play that does not."""
    obs, first = np.zeros((400, 5), np.float32), np.ones(400, bool)
    assert len(set(PolicyPlayer(make_policy(), seed=0, greedy=True)(obs, first).tolist())) == 1
    assert len(set(PolicyPlayer(make_policy(), seed=0)(obs, first).tolist())) > 1


def test_play_counts_whole_episodes_of_every_slot_alike() -> None:
    """Catches short episodes that weigh more because they end first."""
    env = make_vector_env("recall", 16, 0, min_delay=1, max_delay=20)
    returns = play(env, lambda obs, is_first: np.zeros(16, np.int64), 64)
    assert returns.episodes == 64
    assert 1 <= returns.mean_length - 2 <= 20
    assert play(env, lambda obs, is_first: np.zeros(16, np.int64), 10**6, max_env_steps=16).episodes == 0
