"""FastPolicy against numbers made by running the original policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_recipe import ACTION_NAMES, NORMALIZATIONS, ROLES, golden_state_dict

from policy import FastPolicy, TokenObservation
from policy.tokens import TokensToBox

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_policy(rows=0):
    """The golden policy; ``rows=1`` uses embedding rows from 1, as ComponentPolicy did."""
    observation = TokenObservation(11, 11, 200, NORMALIZATIONS)
    policy = FastPolicy(observation, ACTION_NAMES, action_rows={name: i + rows for i, name in enumerate(ACTION_NAMES)})
    policy.load_state_dict(golden_state_dict())
    return policy


def test_weights_recipe(golden):
    """A drift of the recipe would make every other golden test meaningless."""
    check = np.load(golden / "weights_check.npz")
    for (_, role, _, _), weights in zip(ROLES, golden_state_dict().values(), strict=True):
        np.testing.assert_allclose(weights.double().norm(), check[f"l2/{role}"], rtol=1e-6)
        np.testing.assert_array_equal(weights.flatten()[:8], check[f"head/{role}"])


def test_parameter_count_and_names():
    """A missing layer, an extra bias, or a renamed key that would not load others' weights."""
    policy = FastPolicy(TokenObservation(11, 11, 200, [1.0] * 25), ACTION_NAMES)
    assert sum(p.numel() for p in policy.parameters()) == 574_978
    assert set(policy.state_dict()) == {key for key, *_ in ROLES}
    assert sum(p.numel() for p in FastPolicy(TokenObservation(11, 11, 200, [1.0] * 25), ["a"]).parameters()) == 574_978


@pytest.mark.parametrize("rows", [0, 1])
@torch.no_grad()
def test_inference_steps(golden, rows):
    """Activations, token placement, the reset before the row, gate order, embedding rows: all of inference."""
    want = np.load(golden / "infer_real_nodup.npz")
    policy, state = make_policy(rows), None
    for t in range(6):
        is_first = torch.from_numpy(want["dones"][t] | want["truncateds"][t])
        output, state = policy.step(torch.from_numpy(want["obs"][t]), is_first, state)
        np.testing.assert_allclose(output.logits, want[f"logits_rows{rows}"][t], **CLOSE)
        np.testing.assert_allclose(output.logits.log_softmax(-1), want[f"logprobs_rows{rows}"][t], **CLOSE)
        np.testing.assert_allclose(output.value, want["values"][t], **CLOSE)
        np.testing.assert_allclose(state[0], want["h"][t], **CLOSE)
        np.testing.assert_allclose(state[1], want["c"][t], **CLOSE)


@pytest.mark.parametrize("rows", [0, 1])
def test_training_forward_and_gradients(golden, rows):
    """BPTT shapes (time and batch swapped), and every parameter's gradient."""
    want = np.load(golden / "train_real_nodup.npz")
    policy = make_policy(rows)
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


@pytest.mark.parametrize("case", edge_cases())
def test_token_edge_cases(case):
    """Padding that erases, nibbles that wrap, 255 rewritten to 0, the caller's tensor written: the originals'."""
    obs = edge_cases()[case]
    before = obs.copy()
    shaper = TokensToBox(TokenObservation(11, 11, 200, [1.0] * 25))
    box, ignored = reference_box(obs[0].astype(int))
    np.testing.assert_array_equal(shaper(torch.from_numpy(obs))[0], box)
    assert shaper.count_ignored(torch.from_numpy(obs)) == ignored
    np.testing.assert_array_equal(obs, before)


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "all_padding",
        "layer0_cell00_no_padding_after",
        "attr_25",
        "attr_254",
        "duplicate_last_wins",
        "duplicate_last_zero",
        "value_zero_token",
    ],
)
def test_token_cases_where_the_originals_were_right(golden, case):
    """Our rule must differ from theirs only where theirs was wrong."""
    data = np.load(golden / "edge_tokens.npz")
    shaper = TokensToBox(TokenObservation(11, 11, 200, [1.0] * 25))
    np.testing.assert_array_equal(shaper(torch.from_numpy(data[f"obs/{case}"]))[0], data[f"box_component/{case}"])
