"""Both policies against numbers made by running the original ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_recipe import ACTION_NAMES, NORMALIZATIONS, ROLES, golden_state_dict
from networks import POLICIES
from shoal.policy import TokenObservation

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def make_golden(make, rows=0):
    """The golden policy; ``rows=1`` uses embedding rows from 1, as the original ComponentPolicy did."""
    observation = TokenObservation(11, 11, 200, NORMALIZATIONS)
    policy = make(observation, ACTION_NAMES, action_rows={name: i + rows for i, name in enumerate(ACTION_NAMES)})
    policy.load_state_dict(golden_state_dict())
    return policy


def test_weights_recipe(golden):
    """A drift of the recipe would make every other golden test meaningless."""
    check = np.load(golden / "weights_check.npz")
    for (_, role, _, _), weights in zip(ROLES, golden_state_dict().values(), strict=True):
        np.testing.assert_allclose(weights.double().norm(), check[f"l2/{role}"], rtol=1e-6)
        np.testing.assert_array_equal(weights.flatten()[:8], check[f"head/{role}"])


@every_policy
def test_parameter_count_and_names(make):
    """A missing layer, an extra bias, or a renamed key that would not load others' weights."""
    for names in (ACTION_NAMES, ["a"]):
        policy = make(TokenObservation(11, 11, 200, [1.0] * 25), names)
        assert sum(p.numel() for p in policy.parameters()) == 574_978
        assert set(policy.state_dict()) == {key for key, *_ in ROLES}


def test_names_have_the_originals_logits(golden):
    """Actions in another order: right logits under wrong names."""
    data = np.load(golden / "actions.npz")
    assert list(data["max_args"] + 1) == [
        sum(name.startswith(f"{kind}_") for name in ACTION_NAMES) for kind in data["names"]
    ]
    named = [f"{data['names'][kind]}_{argument}" for kind, argument in data["action_index_tensor"]]
    assert named == ACTION_NAMES
    kinds, arguments = data["action_index_tensor"].T
    # The cumulative sum is of the largest arguments, not of their numbers: each kind before adds one more.
    np.testing.assert_array_equal(kinds + data["cum_action_max_params"][kinds] + arguments, range(19))
    np.testing.assert_array_equal(data["action_to_logit"], range(19))


@every_policy
@pytest.mark.parametrize("rows", [0, 1])
@torch.no_grad()
def test_inference_steps(golden, make, rows):
    """Activations, token placement, the reset before the row, gate order, embedding rows: all of inference."""
    want = np.load(golden / "infer_real_nodup.npz")
    policy, state = make_golden(make, rows), None
    for t in range(6):
        is_first = torch.from_numpy(want["dones"][t] | want["truncateds"][t])
        output, state = policy.step(torch.from_numpy(want["obs"][t]), is_first, state)
        np.testing.assert_allclose(output.logits, want[f"logits_rows{rows}"][t], **CLOSE)
        np.testing.assert_allclose(output.logits.log_softmax(-1), want[f"logprobs_rows{rows}"][t], **CLOSE)
        np.testing.assert_allclose(output.value, want["values"][t], **CLOSE)
        np.testing.assert_allclose(state[0], want["h"][t], **CLOSE)
        np.testing.assert_allclose(state[1], want["c"][t], **CLOSE)


@every_policy
@pytest.mark.parametrize("rows", [0, 1])
def test_training_forward_and_gradients(golden, make, rows):
    """BPTT shapes (time and batch swapped), and every parameter's gradient."""
    want = np.load(golden / "train_real_nodup.npz")
    policy = make_golden(make, rows)
    # The set is [batch 4, time 8]; ours is time-major.
    obs = torch.from_numpy(want["obs"]).transpose(0, 1)
    output, (h, c) = policy.unroll(obs, torch.zeros(8, 4, dtype=torch.bool))
    action = torch.from_numpy(want["action_index"]).T
    log_prob, entropy = policy.actions.evaluate(output.logits, action)
    for ours, name in [
        (output.logits.transpose(0, 1), f"logits_rows{rows}"),
        (log_prob.T, f"act_log_prob_rows{rows}"),
        (entropy.T, f"entropy_rows{rows}"),
        (output.value.T, "value"),
        (h, "h"),
        (c, "c"),
    ]:
        np.testing.assert_allclose(ours.detach(), want[name], err_msg=name, **CLOSE)
    value = output.value
    loss = value.sum() + 0.5 * value.square().sum() + log_prob.sum() + 0.1 * entropy.sum()
    np.testing.assert_allclose(loss.item(), want[f"loss_rows{rows}"], rtol=1e-4)
    if rows == 1:
        return  # the set has gradients for rows 0 only
    loss.backward()
    gradients = dict(policy.named_parameters())
    for key, role, *_ in ROLES:
        grad = gradients[key].grad
        np.testing.assert_allclose(grad.norm(), want[f"gradnorm_rows{rows}/{role}"], rtol=1e-3, atol=1e-4, err_msg=key)
        head = want[f"gradhead_rows{rows}/{role}"]
        np.testing.assert_allclose(grad.flatten()[: len(head)], head, rtol=1e-3, atol=1e-3, err_msg=key)


def reference_box(obs):
    """The rule in words: skip padding, unknown features and cells outside; else the last write wins."""
    box = np.zeros((25, 11, 11), dtype=np.float32)
    ignored = 0
    for coordinate, feature, value in obs:
        row, column = coordinate >> 4, coordinate & 15
        if coordinate == 255:
            continue
        if feature >= 25 or row >= 11 or column >= 11:
            ignored += 1
            continue
        box[feature, row, column] = value
    return box, ignored


def edge_cases():
    from pathlib import Path

    with np.load(Path(__file__).parent / "golden" / "edge_tokens.npz") as data:
        return {key[4:]: data[key] for key in data.files if key.startswith("obs/")}


@every_policy
@pytest.mark.parametrize("case", edge_cases())
def test_token_edge_cases(make, case):
    """Padding that erases, nibbles that wrap, 255 rewritten to 0, the caller's tensor written: the originals'."""
    obs = edge_cases()[case]
    before = obs.copy()
    shaper = make(TokenObservation(11, 11, 200, [1.0] * 25), ["a"]).to_box
    box, ignored = reference_box(obs[0].astype(int))
    np.testing.assert_array_equal(shaper(torch.from_numpy(obs))[0], box)
    assert shaper.count_ignored(obs) == ignored
    np.testing.assert_array_equal(obs, before)


# Of every case but layer0_cell00_then_padding, where all three lose a token: a version that followed our rule.
RIGHT = {
    **dict.fromkeys(["plain", "all_padding", "layer0_cell00_no_padding_after", "attr_25", "attr_254"], "component"),
    **dict.fromkeys(["duplicate_last_wins", "duplicate_last_zero", "value_zero_token"], "component"),
    **dict.fromkeys(["pad_coord_but_attr_value_set", "value_255", "attr_255"], "component"),
    **dict.fromkeys(["hi_nibble_11", "lo_nibble_11", "lo_nibble_15", "hi_nibble_15_lo_14"], "fast_seed"),
    "last_layer_hi_11": "fast_seed",
}


@every_policy
@pytest.mark.parametrize("case", RIGHT)
@torch.no_grad()
def test_token_cases_as_the_original_that_was_right(golden, make, case):
    """Our rule must differ from theirs only where theirs was wrong: in the box, and in what the network makes of it."""
    data = np.load(golden / "edge_tokens.npz")
    policy = make(TokenObservation(11, 11, 200, [1.0] * 25), ACTION_NAMES)
    policy.load_state_dict(golden_state_dict())
    obs = torch.from_numpy(data[f"obs/{case}"])
    np.testing.assert_array_equal(policy.to_box(obs)[0], data[f"box_{RIGHT[case]}/{case}"])
    output, _ = policy.step(obs, torch.ones(1, dtype=torch.bool))
    np.testing.assert_allclose(output.value, data[f"value_{RIGHT[case]}/{case}"], **CLOSE)


def test_every_edge_case_has_a_version_that_was_right_but_one():
    """A case that no test compares with a number of the originals."""
    assert set(edge_cases()) - set(RIGHT) == {"layer0_cell00_then_padding"}
