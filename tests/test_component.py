"""ComponentPolicy as something to change: other components, other settings, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ACTIONS, OBSERVATIONS, assert_same, draw_is_first, make_pair, observe
from rollouts import make_learner, random_batch
from shoal.deploy.settings.load import load_config, to_dict
from shoal.policy import ComponentPolicy, FastPolicy, Initialization, VectorObservation
from shoal.policy.config import PolicyConfig, RegularizationConfig
from shoal.policy.graph import ComponentConfig, components_to_json, default_graph, resolve
from shoal.policy.resets import plan_resets
from shoal.policy.weights import flatten_weights, load_weights
from tensordict import TensorDict

TOKENS = OBSERVATIONS["tokens"]
NAMES = ["a", "b", "c"]
CHANGED = {
    "critic_1": {"size": 64},
    "my_fc": {"kind": "linear", "sources": ["fc1", "cnn1"], "size": 48, "activation": "tanh"},
    "encoded_obs": {"sources": ["my_fc", "fc1"]},
    "my_conv": {"kind": "conv", "sources": ["cnn1"], "size": 8, "kernel": 2},
    "cnn2": {"sources": ["my_conv"], "kernel": 2, "initialization": "uniform", "gain": 0.5},
    "lstm": {"size": 32},
    "action_embeddings": {"size": 5},
}


def problems_of(components, kind="component"):
    """The problems of a configuration, without the path that all have in common."""
    _, problems = load_config((), [f"policy.kind={kind}", f"policy.components={components}"])
    return [problem.removeprefix("policy.components") for problem in problems]


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ("{critic_1: {size: 0}}", ".critic_1.size: Input should be greater than or equal to 1 (got 0)"),
        ("{critic_1: {size: -3}}", ".critic_1.size: Input should be greater than or equal to 1 (got -3)"),
        ("{critic_1: {size: 99999999}}", "Input should be less than or equal to 65536 (got 99999999)"),
        ("{critic_1: {size: wide}}", ".critic_1.size: Input should be a valid integer"),
        ("{critic_1: {sise: 9}}", ".critic_1.sise: unknown key; did you mean policy.components.critic_1.size?"),
        ("{critic_1: {activation: gelu}}", "Input should be 'relu', 'tanh' or 'none' (got 'gelu'; did you mean relu?)"),
        ("{critic_1: {gain: 0}}", ".critic_1.gain: Input should be greater than 0 (got 0)"),
        ("{critic_1: 5}", ".critic_1: is a section of settings; set one of them, e.g. "),
        ("{critic_1: {kind: liner}}", ".critic_1.kind: 'liner' is unknown; there are tokens_to_box,"),
        ("{critic_1: {kind: liner}}", "(did you mean linear?)"),
        (
            "{critic_1: {kernel: 3}}",
            ".critic_1.kernel: a component of kind linear has no such setting; it has sources, ",
        ),
        ("{critic_1: {sources: [lstn]}}", ".critic_1.sources: 'lstn' is unknown; there are obs, obs_shaper,"),
        ("{critic_1: {sources: [lstn]}}", "(did you mean lstm?)"),
        ("{critic_1: {sources: []}}", ".critic_1.sources: a component of kind linear reads vector or box"),
        ("{cnn1: {sources: [fc1]}}", ".cnn1.sources: a cycle, cnn1 reads fc1 reads cnn2 reads cnn1"),
        ("{fc1: {sources: [fc1]}}", ".fc1.sources: a cycle, fc1 reads fc1"),
        ("{encoded_obs: {sources: [lstm]}}", ".encoded_obs.sources: a cycle, encoded_obs reads lstm"),
        (
            "{cnn2: {sources: [cnn1, obs_normalizer]}}",
            ".cnn2.sources: a component of kind conv reads raw box or box, got",
        ),
        ("{cnn2: {sources: [obs]}}", ".cnn2.sources: obs gives tokens, a component of kind conv reads raw box or box"),
        ("{critic_1: {sources: [lstm, fc1]}}", ".critic_1.sources: fc1 lies before the memory and critic_1 after it"),
        ("{actor: {sources: [lstm, actor_1]}}", ".actor.sources: actor_1 gives vector, a component of kind bilinear"),
        ("{mine: {kind: linear, sources: [fc1]}}", ".mine: nothing reads it; name it in some sources"),
        ("{encoded_obs: {sources: [cnn2]}}", ".fc1: nothing reads it; name it in some sources, or set it to null"),
        ("{mine: {sources: [fc1]}}", ".mine: a new component needs a kind, one of tokens_to_box,"),
        ("{mine: null}", ".mine: there is none to take out; there are obs_shaper,"),
        ("{lstm: null}", ".lstm: cannot be taken out"),
        ("{value_head: {size: 2}}", ".value_head.size: a value is one number, got 2"),
        ("{value_head: {kind: lstm}}", ".value_head.kind: lstm does not go by this name; of these kinds there is one"),
        ("{lstm: {kind: linear}}", ".lstm.kind: linear does not go by this name"),
        ("{Mine: {kind: linear, sources: [fc1]}}", ".Mine: a name is a lower-case letter, then"),
        ("{a.b: {kind: linear, sources: [fc1]}}", ".a.b: a name is a lower-case letter, then"),
        ("{logits: {kind: linear, sources: [fc1]}}", ".logits: the name is taken; choose another"),
    ],
)
def test_one_problem_is_one_line_that_names_it(components, expected):
    """A graph that fails while a run starts, or that runs and computes something else; a message without names."""
    [problem] = problems_of(components)
    assert expected in problem


def test_all_problems_come_at_once():
    """A first problem that hides the others, of other components and of other sections."""
    components = (
        "{fc1: {kind: x, size: 0}, critic_1: {sources: [y]}, cnn1: {sources: [cnn2]}, Z: {kind: linear}, "
        "obs_shaper: {activation: relu}, value_head: null}"
    )
    _, problems = load_config((), ["policy.kind=component", f"policy.components={components}", "learner.gamma=2"])
    starts = {problem.removeprefix("policy.components.").split(":")[0].split("=")[0] for problem in problems}
    assert {"fc1.size", "fc1.kind", "Z", "obs_shaper.activation", "value_head", "learner.gamma"} <= starts
    _, problems = load_config(
        (),
        [
            "policy.kind=component",
            "policy.components={critic_1: {sources: [y]}, cnn1: {sources: [cnn2]}, fc1: {sources: [fc1]}}",
        ],
    )
    assert [problem.split(":")[0].removeprefix("policy.components.") for problem in problems] == [
        "critic_1.sources",
        "cnn1.sources",
        "fc1.sources",
    ]


def test_components_of_the_fast_kind_are_refused():
    """Settings that are silently without effect."""
    [problem] = problems_of("{critic_1: {size: 512}}", kind="fast")
    assert problem == ": the kind fast is one fixed network; set policy.kind to component"


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_the_default_graph_is_valid_for_every_observation(observation):
    """A default that its own check refuses."""
    graph = resolve({}, OBSERVATIONS[observation])
    assert graph == default_graph(OBSERVATIONS[observation])


def test_what_only_some_observations_have_is_found_when_they_are_known():
    """Settings of a CNN that are accepted, and without effect, where observations are vectors."""
    assert problems_of("{cnn1: {size: 32}}") == []
    with pytest.raises(ValueError, match=r"components.cnn1: a new component needs a kind"):
        ComponentPolicy(VectorObservation(3), NAMES, components={"cnn1": {"size": 32}})


def test_settings_by_hand_are_checked_by_name():
    """A bad setting of a checkpoint or of a policy made by hand that fails far from its name, or not at all."""
    settings = {"critic_1": {"size": 0, "sise": 9}, "lstm": {"size": 32}}
    with pytest.raises(ValueError, match=r"critic_1.size: .*\(got 0\)\ncomponents.critic_1.sise: Unexpected"):
        ComponentPolicy(TOKENS, NAMES, components=settings)


def test_settings_become_the_network():
    """A setting that is read and not used."""
    text = str(CHANGED).replace("'", "")
    config, problems = load_config((), ["policy.kind=component", f"policy.components={text}"])
    assert problems == []
    assert components_to_json(config.policy.components) == CHANGED == to_dict(config)["policy"]["components"]
    policy = ComponentPolicy(TOKENS, NAMES, components=CHANGED)
    shapes = {name: tuple(p.shape) for name, p in policy.named_parameters()}
    assert shapes["critic_1.weight"] == (64, 32)
    assert shapes["my_conv.weight"] == (8, 64, 2, 2)
    assert shapes["cnn2.weight"] == (64, 8, 2, 2)
    assert shapes["my_fc.weight"] == (48, 128 + 64 * 9)
    assert shapes["encoded_obs.weight"] == (128, 48 + 128)
    assert shapes["lstm.weight_ih_l0"] == (4 * 32, 128)
    assert shapes["actor_W"] == (1, 512, 5)
    bound = 0.5 / (8 * 2 * 2) ** 0.5
    assert 0.9 * bound < policy.cnn2.weight.abs().max() <= bound
    td = TensorDict({"obs": observe(TOKENS, 4, 3), "is_first": draw_is_first(3, 4).T}, batch_size=[4, 3])
    result = policy(td)
    joined = torch.cat([result["fc1"], result["cnn1"].flatten(2)], -1)
    want = torch.nn.functional.linear(joined, policy.my_fc.weight, policy.my_fc.bias).tanh()
    torch.testing.assert_close(result["my_fc"], want, rtol=1e-4, atol=1e-5)
    assert result["lstm"].shape == (4, 3, 32)


def test_components_can_be_taken_out():
    """A component that is set to null and runs all the same, or still has parameters."""
    policy = ComponentPolicy(
        TOKENS, NAMES, components={"cnn2": None, "fc1": None, "encoded_obs": {"sources": ["cnn1"]}}
    )
    assert not {"cnn2.weight", "fc1.weight"} & set(policy.state_dict())
    assert policy.encoded_obs.in_features == 64 * 9
    policy.step(observe(TOKENS, 2), torch.ones(2, dtype=torch.bool))


def test_other_components_keep_their_initial_weights():
    """One component more, and every experiment that is compared with it starts from other weights."""
    torch.manual_seed(3)
    plain = dict(ComponentPolicy(TOKENS, NAMES).named_parameters())
    torch.manual_seed(3)
    changed = ComponentPolicy(TOKENS, NAMES, components=CHANGED)
    assert_same(plain["cnn1.weight"], changed.cnn1.weight)
    torch.manual_seed(3)
    other = ComponentPolicy(TOKENS, NAMES, components={"critic_1": {"size": 64}, "fc1": {"gain": 2.0}})
    for name, p in other.named_parameters():
        if name.split(".")[0] not in ("critic_1", "value_head"):
            assert_same(p / 2 if name == "fc1.weight" else p, plain[name], name)


def test_components_draw_from_streams_of_their_own():
    """Layers of one shape that start as copies of each other, or draws that what comes after the policy notices."""
    twins = {name: {"kind": "linear", "sources": ["fc1"], "size": 32} for name in ("left", "right")}
    policy = ComponentPolicy(TOKENS, NAMES, components={**twins, "encoded_obs": {"sources": list(twins)}})
    assert not torch.equal(policy.left.weight, policy.right.weight)
    after = []
    for components in ({}, CHANGED):
        torch.manual_seed(7)
        ComponentPolicy(TOKENS, NAMES, components=components)
        after.append(torch.rand(5))
    assert_same(*after)


def test_the_order_of_settings_does_not_matter():
    """Parameters, and with them the optimizer's moments, in the order of a YAML file."""
    shuffled = dict(reversed(CHANGED.items()))
    policies = []
    for components in (CHANGED, shuffled):
        torch.manual_seed(0)
        policies.append(ComponentPolicy(TOKENS, NAMES, components=components))
    assert flatten_weights(policies[0], 0).sha256 == flatten_weights(policies[1], 0).sha256
    assert list(policies[0].state_dict()) == list(policies[1].state_dict())


@pytest.mark.parametrize("name", ["forward", "memory", "train", "observation", "graph", "step", "to_box", "parameters"])
def test_names_of_the_policys_own_are_refused(name):
    """A component that takes the place of a method or a field of the policy."""
    components = {name: {"kind": "linear", "sources": ["fc1"]}, "encoded_obs": {"sources": [name]}}
    with pytest.raises(ValueError, match=rf"components\.{name}: the name is taken"):
        ComponentPolicy(TOKENS, NAMES, components=components)


@pytest.mark.parametrize("half", ["encode", "encode without numba", "heads"])
def test_each_half_runs_only_what_it_needs(half, monkeypatch):
    """Heads that run in the encoder, or the encoder a second time for every head: twice the work."""
    monkeypatch.setattr("shoal.policy.token_convolution.available", lambda: half == "encode")
    policy = ComponentPolicy(TOKENS, NAMES, components=CHANGED)
    ran = []
    for name, module in policy.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    if half.startswith("encode"):
        policy.encode(observe(TOKENS, 2))
        expected = ["obs_shaper", "obs_normalizer", "cnn1", "my_conv", "cnn2", "fc1", "my_fc", "encoded_obs"]
        if half == "encode":  # from the tokens
            expected = expected[3:]
    else:
        policy.heads(torch.zeros(2, 32))
        expected = ["critic_1", "value_head", "actor_1", "action_embeddings"]
    assert len(ran) == len(set(ran))
    assert set(ran) == set(expected)


def test_a_changed_network_steps_as_it_unrolls():
    """Custom components that see other rows in training than while acting."""
    policy = ComponentPolicy(TOKENS, NAMES, components=CHANGED)
    obs, is_first = observe(TOKENS, 6, 4), draw_is_first(6, 4)
    with torch.no_grad():
        unrolled, _ = policy.unroll(obs, is_first, plan=plan_resets(is_first.numpy()), return_state=False)
        state = None
        for t in range(6):
            output, state = policy.step(obs[t], is_first[t], state)
            torch.testing.assert_close(unrolled.logits[t], output.logits, rtol=1e-4, atol=1e-5)


def test_clipping_and_l2_init_by_component():
    """Bounds and scales that custom components do not get, or that others get in their place."""
    components = {"my_fc": {"kind": "linear", "sources": ["fc1"], "size": 48}, "encoded_obs": {"sources": ["my_fc"]}}
    policy = ComponentPolicy(VectorObservation(3), NAMES, components=components)
    config = RegularizationConfig(clip_overrides={"my_fc": 0.5}, l2_init_coef=1e-3, l2_init_overrides={"my_fc": 2.0})
    largest = float(policy.my_fc.weight.detach().abs().max())
    learner = make_learner(policy, regularization=config)
    assert learner.regularizer.bounds == {"my_fc.weight": pytest.approx(0.5 * largest)}
    learner.update(random_batch(0))
    assert policy.my_fc.weight.abs().max() <= 0.5 * largest < policy.fc1.weight.abs().max()
    with pytest.raises(ValueError, match=r"my_fd.*did you mean 'my_fc'"):
        make_learner(policy, regularization=RegularizationConfig(clip_overrides={"my_fd": 1.0}))


def test_copies_are_independent():
    """A copy that runs the original's components (closures over self): the check's copy would follow training."""
    policy, _ = make_pair(TOKENS, ACTIONS["discrete"])[::-1]
    copied = copy.deepcopy(policy)
    obs, is_first = observe(TOKENS, 3), torch.ones(3, dtype=torch.bool)
    before = copied.step(obs, is_first)[0]
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
    assert not policy.encode(obs).any()
    after = copied.step(obs, is_first)[0]
    assert_same(before.logits, after.logits)
    load_weights(policy, flatten_weights(copied, 0))
    assert_same(policy.step(obs, is_first)[0].value, after.value)


def test_moving_moves_everything():
    """A table or a scale that stays behind on the CPU, or in float32."""
    moved = ComponentPolicy(TOKENS, NAMES, components=CHANGED).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}
    fast = FastPolicy(TOKENS, NAMES).to("meta")
    buffers = {name.split(".")[-1] for name, _ in fast.named_buffers()}
    assert buffers <= {name.split(".")[-1] for name, _ in moved.named_buffers()}


def test_initialization_settings_reach_the_lstm():
    """`policy.initialization` that only one kind of policy knows."""
    zeros = ComponentPolicy(TOKENS, NAMES, initialization=Initialization(lstm_bias="zeros"))
    assert not any(p.any() for name, p in zeros.lstm.named_parameters() if "bias" in name)


def test_every_problem_is_listed_with_what_was_meant():
    """A misspelt component that hides a misspelt source, so that mending takes a round for each."""
    components = {"critic1": ComponentConfig(size=3), "mine": ComponentConfig(kind="linear", sources=("fc2",))}
    with pytest.raises(ValueError, match=r"critic1: a new.*mean critic_1\?\)\n.*mine.sources: 'fc2' is.*mean fc1\?\)"):
        PolicyConfig(kind="component", components=components)
