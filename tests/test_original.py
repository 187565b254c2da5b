"""Weights of the original policies become a run of ours: under whichever names, with the numbers they had."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import ACTION_NAMES, NORMALIZATIONS, ROLES, golden_state_dict
from rollouts import make_learner, random_batch
from safetensors.torch import save_file
from shoal.deploy import cli
from shoal.deploy.weights.import_weights import DESCRIPTIONS
from shoal.deploy.weights.original import OriginalError, read_original
from shoal.learner.checkpoint import find_checkpoint
from shoal.policy import FastPolicy
from shoal.policy.trajectory import TrajectorySpec

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPECTED = [key for key, *_ in ROLES]
_THEIRS = {"lstm": "_core_", "value_head": "_value_", "action_embeddings": "_action_embeds_"}


def fast_names(prefix=""):
    """As the original Fast: its layers below ``policy``, the LSTM beside it."""
    found = {}
    for key, tensor in golden_state_dict().items():
        found[f"{prefix}{key}" if key.startswith("lstm") else f"{prefix}policy.{key}"] = tensor
    return found


def component_names(deep=True):
    """As the original ComponentPolicy; ``deep`` with the modules that wrapped each layer."""
    found = {}
    for key, tensor in golden_state_dict().items():
        if key in ("actor_W", "actor_bias"):
            name = {"actor_W": "_action_.W", "actor_bias": "_action_.bias"}[key]
        else:
            layer, _, part = key.partition(".")
            wrapped = f"_net.{part}" if layer in _THEIRS else f"_net.0.{part}"
            name = f"{_THEIRS.get(layer, layer)}.{wrapped if deep else part}"
        found[f"components.{name}" if deep else name] = tensor
    return found


def with_buffers(state_dict, prefix):
    """The buffers that the originals saved beside their weights."""
    return {
        **state_dict,
        f"{prefix}obs_normalizer.obs_norm": torch.tensor(NORMALIZATIONS).float().view(1, 25, 1, 1),
        f"{prefix}_action_embeds_.active_indices": torch.arange(1, 20),
        "action_index_tensor": torch.zeros(19, 2, dtype=torch.int32),
        "cum_action_max_params": torch.zeros(8),
    }


STYLES = {
    "fast": (fast_names(), 0),
    "fast in an agent": ({**fast_names("policy."), "policy.policy.max_vec": torch.tensor(NORMALIZATIONS).float()}, 0),
    "fast, compiled": (fast_names("module._orig_mod."), 0),
    "component": (component_names(deep=False), 1),
    "component, wrapped": (component_names(), 1),
    "component with buffers": (with_buffers(component_names(), "components."), 1),
    "ours": (golden_state_dict(), 0),
}


@pytest.fixture
def mock(tmp_path):
    """The golden set's environment as a description file."""
    features = dict(zip(DESCRIPTIONS["metta-2025-08"]["features"], NORMALIZATIONS, strict=True))
    described = {"width": 11, "height": 11, "num_tokens": 200, "features": features, "actions": ACTION_NAMES}
    (tmp_path / "mock.json").write_text(json.dumps(described))
    return tmp_path / "mock.json"


def import_(capsys, *arguments, code=0):
    """The output of `shoal import`."""
    capsys.readouterr()
    assert cli.main(["import", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def save(path: Path, state_dict) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("style", STYLES)
def test_names_of_every_version_are_understood(style):
    """A layer that is left as it was initialised, because its name has another prefix."""
    saved, first_row = STYLES[style]
    original = read_original(saved, EXPECTED)
    assert original.first_row == first_row
    for key, want in golden_state_dict().items():
        assert torch.equal(original.weights[key], want), key


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("style", ["fast in an agent", "component, wrapped"])
@torch.no_grad()
def test_an_imported_policy_has_the_originals_numbers(style, suffix, golden, mock, tmp_path, capsys):
    """Embedding rows shifted by one, a normalization that is not the originals', another layer's weights."""
    saved, first_row = STYLES[style]
    kind = "component" if first_row else "fast"
    said = import_(
        capsys, save(tmp_path / f"w{suffix}", saved), "--out", tmp_path / "run", "--describe", mock, "--kind", kind
    )
    assert f"574,978 parameters, 19 actions in embedding rows {first_row}..{first_row + 18}" in said
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint.policy_version == 0
    policy, state = checkpoint.make_policy(), None
    assert (policy.kind, list(policy.action_rows)) == (kind, ACTION_NAMES)
    want = np.load(golden / "infer_real_nodup.npz")
    for t in range(6):
        is_first = torch.from_numpy(want["dones"][t] | want["truncateds"][t])
        output, state = policy.step(torch.from_numpy(want["obs"][t]), is_first, state)
        np.testing.assert_allclose(output.logits, want[f"logits_rows{first_row}"][t], **CLOSE)
        np.testing.assert_allclose(output.value, want["values"][t], **CLOSE)
        np.testing.assert_allclose(state[0], want["h"][t], **CLOSE)


def test_first_row_can_be_said(mock, tmp_path, capsys):
    """Weights whose names say nothing of who made them, read with the wrong rows and no way to change that."""
    file = save(tmp_path / "w.pt", golden_state_dict())
    import_(capsys, file, "--out", tmp_path / "one", "--describe", mock, "--first-row", 1)
    rows = find_checkpoint(tmp_path / "one").make_policy().action_rows
    assert list(rows.values()) == list(range(1, 20))
    buffers = save(tmp_path / "b.pt", STYLES["component with buffers"][0])
    import_(capsys, buffers, "--out", tmp_path / "two", "--describe", mock)
    assert "have rows [1, 2, 3" in import_(
        capsys, buffers, "--out", tmp_path / "three", "--describe", mock, "--first-row", 0, code=2
    )


def test_the_built_in_description_is_the_originals():
    """Another order of features or actions under the right weights."""
    described = DESCRIPTIONS["metta-2025-08"]
    assert list(described["features"].values()) == NORMALIZATIONS
    assert (described["width"], described["height"], described["num_tokens"]) == (11, 11, 200)
    assert len(described["actions"]) == 19
    assert described["actions"][9:12] == ["get_items_0", "move_0", "move_1"]
    assert described["actions"][-6:] == ["put_items_0", "rotate_0", "rotate_1", "rotate_2", "rotate_3", "swap_0"]


def change(state_dict, **changes):
    return {name: tensor for name, tensor in {**state_dict, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (change(fast_names(), **{"policy.fc1.bias": None}), "nothing was found for: fc1.bias"),
        (change(fast_names(), **{"policy.extra.weight": torch.ones(3)}), "nothing is known of: policy.extra.weight"),
        (change(fast_names(), **{"cnn1.bias": torch.ones(64)}), "cnn1.bias is policy.cnn1.bias or cnn1.bias"),
        (change(fast_names(), **{"policy.fc1.bias": torch.full((128,), torch.nan)}), "not finite: policy.fc1.bias"),
        ({"a": torch.ones(1)}, "nothing is known of: a"),
    ],
)
def test_what_is_not_clear_is_refused(saved, expected):
    """Weights that are half there; the rest would be a fresh network's."""
    with pytest.raises(OriginalError) as refused:
        read_original(saved, EXPECTED)
    assert expected in str(refused.value)


def test_shared_tensors_are_no_leftovers():
    """The cell beside the original LSTM, which shares its tensors, taken for something unknown."""
    saved = fast_names()
    saved["cell.weight_ih"] = saved["lstm.weight_ih_l0"]
    saved["lstm_alias.bias_ih_l0"] = saved["lstm.bias_ih_l0"].clone()
    assert set(read_original(saved, EXPECTED).weights) == set(EXPECTED)


class Payload:
    """A pickled policy: whatever it does when it is loaded."""

    def __reduce__(self):
        """Leave a trace."""
        return open, ("/tmp/shoal-import-was-here", "w")


def test_a_pickled_policy_is_refused_and_never_run(tmp_path, capsys):
    """Code in a file that is offered as weights."""
    trace = Path("/tmp/shoal-import-was-here")
    trace.unlink(missing_ok=True)
    file = tmp_path / "policy.pt"
    torch.save({"policy": Payload()}, file)
    said = import_(capsys, file, "--out", tmp_path / "run", code=2)
    assert "save only its tensors: torch.save(policy.state_dict(), 'weights.pt')" in said
    file.write_bytes(pickle.dumps(Payload()))
    import_(capsys, file, "--out", tmp_path / "run", code=2)
    assert not trace.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "expected the keys ['actions', 'features', 'height', 'num_tokens', 'width'], got list"),
        ("{width: 11}", "got ['width']"),
        ("{width: a, height: 11, num_tokens: 200, features: {}, actions: []}", "width: expected int, got 'a'"),
        ("{width: 11, height: 11, num_tokens: 200, features: {no: 1}, actions: [x]}", "False is no name; write it in"),
        ("{width: 11, height: 11, num_tokens: 200, features: {a: b}, actions: [x]}", "features.a: expected a normali"),
        ("{width: 11, height: 11, num_tokens: 200, features: {a: 0}, actions: [x]}", "must be positive"),
        (
            "{width: 11, height: 11, num_tokens: 200, features: {a: 1}, actions: [x]}",
            "cnn1.weight: expected (64, 1,",
        ),
        ("{width: [", "--describe"),
        ("{width: " + "9" * 5000 + "}", "--describe"),
        ("a: &a [1, 2]\nb: [*a, *a]", "aliases are not supported"),
        ("[" * 1000, "nested deeper than"),
        ("#" * 70_000, "expected at most 64 KiB"),
    ],
)
def test_a_bad_description_is_refused(text, expected, tmp_path, capsys):
    """A traceback, or a policy that reads other features than its weights."""
    file = save(tmp_path / "w.pt", fast_names())
    (tmp_path / "d.yaml").write_text(text)
    assert expected in import_(capsys, file, "--out", tmp_path / "r", "--describe", tmp_path / "d.yaml", code=2)


def test_other_refusals(tmp_path, capsys, mock):
    """An error that does not say what to do, or a run that is written over."""
    file = save(tmp_path / "w.pt", STYLES["fast in an agent"][0])
    out = ("--out", tmp_path / "run")
    assert "neither a file nor one of metta-2025-08" in import_(capsys, file, *out, "--describe", "nothing", code=2)
    assert "No such file" in import_(capsys, tmp_path / "none.pt", *out, code=2)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors")
    assert "no safetensors file" in import_(capsys, bad, *out, code=2)
    assert "is no state_dict" in import_(capsys, save(tmp_path / "list.pt", [torch.ones(1)]), *out, code=2)
    assert "nowhere" in import_(capsys, file, *out, "--env", "nowhere", code=2)
    changed = save(tmp_path / "norm.pt", {**fast_names(), "policy.max_vec": torch.ones(25)})
    assert "were trained with the normalizations" in import_(capsys, changed, *out, code=2)
    assert not (tmp_path / "run").exists()
    import_(capsys, file, *out)
    assert "holds checkpoints already" in import_(capsys, file, *out, code=2)
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "name one with --env" in capsys.readouterr().err


def test_an_imported_run_can_be_trained_on(tmp_path, capsys, mock):
    """An import that nothing can continue: no optimizer, no books, or an L2-init loss that pulls to random weights."""
    import_(capsys, save(tmp_path / "w.pt", fast_names()), "--out", tmp_path / "run", "--describe", mock)
    checkpoint = find_checkpoint(tmp_path / "run")
    policy = FastPolicy(checkpoint.make_policy().observation, ACTION_NAMES)
    learner = make_learner(policy, learning_rate=1e-5)
    checkpoint.restore(learner)
    for key, want in golden_state_dict().items():
        assert torch.equal(learner.regularizer.reference[key], want), key
        assert torch.equal(policy.state_dict()[key], want), key
    assert learner.optimizer.param_groups[0]["lr"] == 1e-5
    spec = TrajectorySpec(4, (200, 3), "uint8", (), "int64")
    learner.update(random_batch(0, spec=spec))
    moved = (policy.critic_1.weight - golden_state_dict()["critic_1.weight"]).abs().max()
    assert 0 < moved < 2e-5
    assert checkpoint.state["ledger"]["sampled"] == 0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_file_is_not_read(suffix, tmp_path, capsys):
    """An import that waits for ever for a pipe, or reads a device until the memory is full."""
    out = ("--out", tmp_path / "run")
    os.mkfifo(pipe := tmp_path / f"pipe{suffix}")
    (device := tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for path in (pipe, device):
        assert f"{path} is no regular file" in import_(capsys, path, *out, code=2)
    os.mkfifo(tmp_path / "d.yaml")
    file = save(tmp_path / "w.pt", fast_names())
    assert "neither a file nor" in import_(capsys, file, *out, "--describe", tmp_path / "d.yaml", code=2)
    assert not (tmp_path / "run").exists()


def test_tensors_are_no_larger_than_their_file(tmp_path, capsys):
    """A file of kilobytes that takes gigabytes, and damage that is taken for code."""
    out = ("--out", tmp_path / "run")
    wide = save(tmp_path / "wide.pt", fast_names() | {"policy.max_vec": torch.ones(1).expand(10**12)})
    assert "policy.max_vec would be larger than the file" in import_(capsys, wide, *out, code=2)
    sound = save(tmp_path / "w.pt", fast_names())
    with zipfile.ZipFile(sound) as parts, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            packed.writestr(part.filename, parts.read(part))
    assert "is compressed" in import_(capsys, tmp_path / "z.pt", *out, code=2)
    (tmp_path / "half.pt").write_bytes(sound.read_bytes()[:5000])
    assert "is damaged, or no file of torch.save" in import_(capsys, tmp_path / "half.pt", *out, code=2)
    assert not (tmp_path / "run").exists()
