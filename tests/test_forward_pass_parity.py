"""FastPolicy and ComponentPolicy compute the same numbers, bit for bit: inference, training, memory, TensorDicts."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ACTIONS, OBSERVATIONS, POLICIES, assert_same, draw_is_first, draw_state, make_pair, observe
from shoal.policy.resets import plan_resets
from tensordict import TensorDict

T, B = 9, 6
every_policy = pytest.mark.parametrize("kind", POLICIES)
every_network = pytest.mark.parametrize(
    ("observation", "actions"),
    [*((o, "discrete") for o in OBSERVATIONS), ("tokens", "several"), ("tokens", "continuous"), ("vector", "several")],
)


def pair(observation, actions, **settings):
    return make_pair(OBSERVATIONS[observation], ACTIONS[actions], **settings)


def one(kind, observation="tokens", actions="discrete"):
    return dict(zip(POLICIES, pair(observation, actions), strict=True))[kind]


@every_network
def test_inference(observation, actions):
    """A missing activation, another normalization, a state that is not reset: one of them acts as another policy."""
    policies = pair(observation, actions)
    obs, is_first = observe(OBSERVATIONS[observation], T, B), draw_is_first(T, B)
    states = [draw_state(policies[0], B)] * 2
    spaces = ACTIONS[actions]
    uniform = torch.rand(T, B, spaces.num_uniform, generator=torch.Generator().manual_seed(1))
    for t in range(T):
        outputs = []
        for i, policy in enumerate(policies):
            output, states[i] = policy.step(obs[t], is_first[t], states[i])
            action, log_prob = spaces.sample(output.logits, 1 - uniform[t])
            outputs.append((output.logits, output.value, action, log_prob, spaces.mode(output.logits), *states[i]))
        for fast, component in zip(*outputs, strict=True):
            assert_same(fast, component, f"step {t}")
    assert outputs[0][0].std() > 0.01, "logits that hardly depend on the row prove nothing"


@every_network
@pytest.mark.parametrize("return_state", [True, False])
def test_training(observation, actions, return_state):
    """Time and batch exchanged, a reset that is lost, a gradient that goes another way."""
    policies, spaces = pair(observation, actions), ACTIONS[actions]
    obs, is_first = observe(OBSERVATIONS[observation], T, B), draw_is_first(T, B)
    state = draw_state(policies[0], B)
    action = spaces.sample(torch.zeros(T, B, 5 if actions != "continuous" else 4), torch.rand(T, B, 2))[0]
    found = []
    for policy in policies:
        output, final = policy.unroll(obs, is_first, state, return_state=return_state)
        log_prob, entropy = spaces.evaluate(output.logits, action)
        loss = output.value.square().mean() + log_prob.mean() + 0.1 * entropy.mean()
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        found.append((output.logits, output.value, log_prob, entropy, *(final or ()), *gradients))
    for fast, component in zip(*found, strict=True):
        assert_same(fast, component)
    names = [name for name, _ in policies[0].named_parameters()]
    for name, gradient in zip(names, found[0][-len(names) :], strict=True):
        # Of several choices or means, one number added to all moves something; to all logits of one choice, nothing.
        assert gradient.abs().max() > 0 or name == "actor_bias", name


def test_final_rows():
    """Last observations of the same-step form that only one of the policies values."""
    policies, observation = pair("tokens", "discrete"), OBSERVATIONS["tokens"]
    is_first = draw_is_first(T, B)
    t, b = is_first[1:].nonzero(as_tuple=True)
    plan = plan_resets(is_first.numpy(), (t.numpy(), b.numpy()))
    obs, final_obs = observe(observation, T, B), observe(observation, len(t), seed=1)
    fast, component = (p.unroll(obs, is_first, plan=plan, final_obs=final_obs, return_state=False)[0] for p in policies)
    assert_same(fast.final_value, component.final_value)
    assert_same(fast.logits, component.logits)
    assert len(fast.final_value) == len(t) > 3


@every_policy
def test_training_is_stepping(kind):
    """An unroll that is not what its actor did: a state not carried, not reset, or T and B exchanged in the BPTT."""
    policy, observation = one(kind), OBSERVATIONS["tokens"]
    obs, is_first = observe(observation, T, B), draw_is_first(T, B)
    state = draw_state(policy, B)
    with torch.no_grad():
        unrolled, final = policy.unroll(obs, is_first, state)
        for t in range(T):
            output, state = policy.step(obs[t], is_first[t], state)
            torch.testing.assert_close(unrolled.logits[t], output.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(unrolled.value[t], output.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-5)


@every_policy
def test_embedding_rows_follow_names(kind):
    """Rows by position, or shifted by one: the right weights for other actions."""
    names = ACTIONS["discrete"].names[0]
    observation = OBSERVATIONS["tokens"]
    plain = one(kind)
    rows = {name: 7 - i for i, name in enumerate(names)}
    moved = type(plain)(observation, names, action_rows=rows)
    state_dict = plain.state_dict()
    table = state_dict["action_embeddings.weight"]
    state_dict["action_embeddings.weight"] = table.clone()
    state_dict["action_embeddings.weight"][list(rows.values())] = table[: len(names)]
    moved.load_state_dict(state_dict)
    assert moved.action_rows == rows
    obs, is_first = observe(observation, B), torch.ones(B, dtype=torch.bool)
    # A matrix product may round a row's sums differently at another position in the table: near, not bit for bit.
    want, got = plain.step(obs, is_first)[0].logits, moved.step(obs, is_first)[0].logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert want.std(1).min() > 1e-3, "logits that hardly differ between actions would hide exchanged rows"


@every_policy
def test_memory_is_kept_by_training_env_id(kind):
    """States that follow the position in the batch instead of the slot, or that outlive their episode."""
    policy, observation = one(kind), OBSERVATIONS["tokens"]
    ids, order = list(range(100, 100 + B)), torch.Generator().manual_seed(3)
    obs, is_first = observe(observation, T, B), draw_is_first(T, B)
    is_first[0] = True
    state = None
    for t in range(T):
        want, state = policy.step(obs[t], is_first[t], state)
        # In another order each time, and in two parts.
        shuffled = torch.randperm(B, generator=order)
        for part in (shuffled[:2], shuffled[2:]):
            got = policy.act(obs[t][part], [ids[i] for i in part], is_first[t][part])
            torch.testing.assert_close(got.logits, want.logits[part], rtol=1e-4, atol=1e-5)
    memory = policy.get_memory()
    assert set(memory) == set(ids)
    assert policy.has_memory()
    for row, env_id in enumerate(ids):
        torch.testing.assert_close(memory[env_id], (state[0][:, row], state[1][:, row]), rtol=1e-4, atol=1e-5)
        assert not any(part.requires_grad for part in memory[env_id])
    policy.reset_memory([100])
    assert set(policy.get_memory()) == set(ids[1:])
    policy.set_memory(memory)
    assert_same(policy.get_memory()[103][1], memory[103][1])
    policy.reset_memory()
    assert policy.get_memory() == {}


@every_policy
def test_the_state_of_a_step_is_detached(kind):
    """A graph that grows with every step acted, and gradients into the past of another batch."""
    policy = one(kind)
    obs, is_first = observe(OBSERVATIONS["tokens"], B), torch.zeros(B, dtype=torch.bool)
    _, state = policy.step(obs, is_first)
    assert not any(part.requires_grad for part in state)
    td = TensorDict({"obs": obs, "is_first": is_first, "training_env_id": torch.arange(B)}, batch_size=[B])
    result = policy(td)
    assert not result["next_h"].requires_grad
    assert result["logits"].requires_grad


# The TensorDict interface.


def training_td(observation):
    is_first = draw_is_first(T, B)
    td = TensorDict({"obs": observe(observation, T, B).transpose(0, 1), "is_first": is_first.T}, batch_size=[B, T])
    return td, td["obs"].transpose(0, 1), is_first


@every_network
@every_policy
def test_training_forward_is_the_unroll(kind, observation, actions):
    """[B, T] read as [T, B], a state not taken from row 0, `bptt` and `batch` exchanged or of the flat shape."""
    policy = one(kind, observation, actions)
    td, obs, is_first = training_td(OBSERVATIONS[observation])
    for state in (None, draw_state(policy, B)):
        if state is not None:
            td["initial_h"], td["initial_c"] = (p.transpose(0, 1)[:, None].expand(B, T, 2, 128) for p in state)
        result = policy(td)
        want, _ = policy.unroll(obs, is_first, state, return_state=False)
        assert result.batch_size == (B, T)
        assert_same(result["logits"], want.logits.transpose(0, 1))
        assert_same(result["value"], want.value.T)
        for key, number in (("bptt", T), ("batch", B)):
            assert_same(result[key], torch.full((B, T), number, dtype=torch.int64), key)
    want.logits.sum().backward()
    by_unroll = [p.grad.clone() if p.grad is not None else None for p in policy.parameters()]
    policy.zero_grad()
    result["logits"].sum().backward()
    for name, expected in zip(dict(policy.named_parameters()), by_unroll, strict=True):
        assert_same(policy.get_parameter(name).grad, expected, name)


@every_policy
@torch.no_grad()
def test_acting_forward_is_the_step(kind):
    """Acting through a TensorDict with another state, or with memory that is not kept."""
    policy, observation = one(kind), OBSERVATIONS["tokens"]
    obs, is_first = observe(observation, B), draw_is_first(2, B)[1]
    state = draw_state(policy, B)
    td = TensorDict({"obs": obs, "is_first": is_first}, batch_size=[B])
    assert_same(policy(td)["logits"], policy.step(obs, is_first)[0].logits)
    td["initial_h"], td["initial_c"] = (part.transpose(0, 1) for part in state)
    result = policy(td)
    want, after = policy.step(obs, is_first, state)
    assert_same(result["logits"], want.logits)
    assert_same(result["value"], want.value)
    assert_same(result["next_h"].transpose(0, 1), after[0])
    assert_same(result["next_c"].transpose(0, 1), after[1])
    assert_same(result["bptt"], torch.ones(B, dtype=torch.int64))
    assert_same(result["batch"], torch.full((B,), B))
    assert policy.get_memory() == {}


@every_policy
@torch.no_grad()
def test_acting_forward_keeps_memory_by_training_env_id(kind):
    """Resets or ids that the TensorDict carries and nobody reads."""
    policy, observation = one(kind), OBSERVATIONS["tokens"]
    twin = copy.deepcopy(policy)
    obs, is_first = observe(observation, T, B), draw_is_first(T, B)
    ids = torch.arange(B) * 2**32
    for t in range(T):
        order = torch.arange(B).roll(t)
        td = TensorDict(
            {"obs": obs[t][order], "is_first": is_first[t][order], "training_env_id": ids[order]}, batch_size=[B]
        )
        result = policy(td)
        want = twin.act(obs[t], ids.tolist(), is_first[t])
        torch.testing.assert_close(result["logits"], want.logits[order], rtol=1e-4, atol=1e-5)
    assert set(policy.get_memory()) == set(ids.tolist())


@every_policy
def test_the_callers_tensors_are_not_written(kind):
    """255 rewritten to 0 in the caller's observations, keys added to the caller's TensorDict."""
    policy = one(kind)
    td, _, _ = training_td(OBSERVATIONS["tokens"])
    before = td.clone()
    policy(td)
    assert set(td.keys()) == {"obs", "is_first"}
    assert (td == before).all()
    acting = TensorDict({"obs": td["obs"][:, 0], "is_first": td["is_first"][:, 0]}, batch_size=[B]).lock_()
    policy(acting)
    assert (acting == TensorDict({"obs": before["obs"][:, 0], "is_first": before["is_first"][:, 0]}, [B])).all()


@every_policy
def test_other_batch_shapes_are_refused(kind):
    """A third batch dimension that is silently flattened into the second."""
    with pytest.raises(ValueError, match=r"\[B\] or \[B, T\], got batch size \(2, 3, 4\)"):
        one(kind)(TensorDict({}, batch_size=[2, 3, 4]))


def test_activations_of_every_component():
    """An activation under another name, of other rows, or before its nonlinearity."""
    policy, observation = one("component"), OBSERVATIONS["tokens"]
    td, obs, _ = training_td(observation)
    result = policy(td)
    for name in policy.graph:
        assert result[name].shape[:2] == (B, T), name
    flat = obs.flatten(0, 1)
    box = policy.to_box(flat)
    assert_same(result["obs_shaper"].transpose(0, 1).flatten(0, 1), box)
    norms = torch.tensor(observation.feature_normalizations).view(25, 1, 1)
    assert_same(result["obs_normalizer"].transpose(0, 1).flatten(0, 1), box / norms)
    conv = torch.nn.functional.conv2d
    cnn1 = conv(box / norms, policy.cnn1.weight, policy.cnn1.bias, stride=3).relu()
    cnn2 = conv(cnn1, policy.cnn2.weight, policy.cnn2.bias).relu()
    linear = torch.nn.functional.linear
    fc1 = linear(cnn2.flatten(1), policy.fc1.weight, policy.fc1.bias).relu()
    encoded = linear(fc1, policy.encoded_obs.weight, policy.encoded_obs.bias).relu()
    for name, want in (("cnn1", cnn1), ("cnn2", cnn2), ("fc1", fc1), ("encoded_obs", encoded)):
        got = result[name].transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    core = result["lstm"]
    critic = linear(core, policy.critic_1.weight, policy.critic_1.bias).tanh()
    actor = linear(core, policy.actor_1.weight, policy.actor_1.bias).relu()
    torch.testing.assert_close(result["critic_1"], critic, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["actor_1"], actor, rtol=1e-4, atol=1e-5)
    assert_same(result["value_head"].squeeze(-1), result["value"])
    assert_same(result["actor"], result["logits"])
    assert_same(result["action_embeddings"][2, 3], policy.action_embeddings.weight[:5])
