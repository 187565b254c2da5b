"""Memory by training_env_id, against acting one environment at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.memory import Memory


@pytest.fixture(params=["lstm", "gru", "linear", "own_cores:Leaky"])
def policy(request):
    torch.manual_seed(0)
    return FastPolicy(VectorObservation(3), ["a", "b"], core=request.param)


@torch.no_grad()
def test_each_environment_keeps_its_own_state(policy):
    """States mixed up when the set or order of environments changes between calls."""
    generator = torch.Generator().manual_seed(1)
    alone = {}
    for ids in [(7, 3, 9), (7, 3, 9), (9, 7), (3,), (4, 3, 7, 9), (7, 3, 9)]:
        obs = torch.randn(len(ids), 3, generator=generator)
        first = torch.rand(len(ids), generator=generator) < 0.2
        output = policy.act(obs, ids, first)
        for i, env_id in enumerate(ids):
            want, alone[env_id] = policy.step(obs[i : i + 1], first[i : i + 1], alone.get(env_id))
            torch.testing.assert_close(output.logits[i : i + 1], want.logits, atol=1e-5, rtol=1e-5)
    for env_id, state in policy.get_memory().items():
        for part, mine in zip(state, alone[env_id], strict=True):
            torch.testing.assert_close(part, mine[:, 0], atol=1e-5, rtol=1e-5)


def test_get_set_reset(policy):
    """A reset that forgets everyone, a set that aliases, a state that drags its graph along."""
    assert policy.has_memory()
    policy.act(torch.randn(2, 3), (1, 2), torch.zeros(2, dtype=torch.bool))
    saved = policy.get_memory()
    assert not any(part.requires_grad for state in saved.values() for part in state)
    policy.reset_memory([1])
    assert set(policy.get_memory()) == {2}
    policy.set_memory(saved)
    torch.testing.assert_close(policy.get_memory(), saved)
    policy.reset_memory()
    assert policy.get_memory() == {}
    with pytest.raises(ValueError, match="training_env_id 5"):
        policy.set_memory({5: (torch.zeros(1, 2), torch.zeros(1, 2))})
    with pytest.raises(ValueError, match="must differ"):
        policy.act(torch.randn(2, 3), (1, 1), torch.zeros(2, dtype=torch.bool))


def test_memory_is_no_part_of_the_weights(policy):
    """A checkpoint that carries one run's memory into another."""
    before = set(policy.state_dict())
    policy.act(torch.randn(2, 3), (1, 2), torch.zeros(2, dtype=torch.bool))
    assert set(policy.state_dict()) == before


def test_what_is_written_is_detached():
    """A graph that grows with every step, and gradients that flow from one unroll into the one before."""
    memory = Memory()
    state = tuple(torch.randn(2, 2, 3, requires_grad=True) * 2 for _ in "hc")
    memory.write((7, 8), state)
    assert not any(part.requires_grad for part in memory.read((7, 8)))
    memory.write((8, 9), state)
    assert not any(part.requires_grad for part in (*memory.read((7, 8, 9)), *memory.get()[7]))


def blocks_of(ids, start):
    """A state that says whose it is."""
    rows = torch.arange(len(ids), dtype=torch.float32) + start
    return rows.expand(2, len(ids))[..., None].repeat(1, 1, 3), -rows.expand(2, len(ids))[..., None].repeat(1, 1, 3)


class CountedId(int):
    """An id that counts how often it is looked at."""

    looked = 0

    def __eq__(self, other):
        CountedId.looked += 1
        return int(self) == int(other)

    def __hash__(self):
        CountedId.looked += 1
        return hash(int(self))


def test_groups_of_ids_are_kept_whole():
    """Work for every id at every step, or states copied to and fro, where groups of slots take turns."""
    memory = Memory()
    groups = [tuple(map(CountedId, ids)) for ids in ((1, 2, 3), (4, 5), (6,))]
    for ids in groups:
        memory.write(ids, blocks_of(ids, 0))
    CountedId.looked = 0
    for step in range(3):
        for ids in groups:
            state = blocks_of(ids, 10 * step)
            memory.write(ids, state)
            for part, kept in zip(state, memory.read(ids), strict=True):
                assert part.data_ptr() == kept.data_ptr()
    assert CountedId.looked == 0


some_ids = st.lists(st.integers(0, 6), unique=True, max_size=5)
calls = st.lists(st.tuples(st.sampled_from(["write", "write", "again", "read", "reset", "set", "forget"]), some_ids))


@given(calls)
def test_any_ids_in_any_order(calls):
    """A state lost, kept too long or given to another id where the ids of calls overlap in part."""
    memory, expected, tuples = Memory(), {}, [(0, 1), (2, 3, 4)]
    for number, (call, ids) in enumerate(calls):
        if call in ("write", "again"):
            # The same tuple objects come back again and again, as a rollout worker's do.
            ids = tuples[len(ids) % len(tuples)] if call == "again" else tuple(ids)
            tuples.append(ids)
            h, c = blocks_of(ids, 10 * number + 1)
            memory.write(ids, (h, c))
            expected |= {env_id: (h[:, row], c[:, row]) for row, env_id in enumerate(ids)}
        elif call == "reset":
            memory.reset(ids)
            expected = {env_id: state for env_id, state in expected.items() if env_id not in ids}
        elif call == "set":
            memory.set(expected := {env_id: state for env_id, state in expected.items() if env_id in ids})
        elif call == "forget":
            memory.reset()
            expected = {}
        for wanted in (tuple(ids), *tuples[-3:]):
            state = memory.read(wanted)
            assert (state is None) == (not expected)
            for row, env_id in enumerate(wanted if state else ()):
                for part, kept in zip(state, expected.get(env_id, torch.zeros(2, 2, 3)), strict=True):
                    assert torch.equal(part[:, row], kept)
        assert set(memory.get()) == set(expected)
        for env_id, parts in memory.get().items():
            assert all(torch.equal(part, kept) for part, kept in zip(parts, expected[env_id], strict=True))
