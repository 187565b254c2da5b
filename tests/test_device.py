"""The device and the precision of the update."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import ACTIONS, OBSERVATIONS, assert_same, draw_is_first, draw_state, make_pair, observe
from rollouts import SMALL, make_learner, random_batch, random_columns, small_policy
from shoal.learner.batch import BatchAssembler
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath
from shoal.learner.device_choice import (
    NO_BFLOAT16,
    DeviceNotFound,
    check_device,
    check_precision,
    make_device_path,
    runs_bfloat16,
)
from shoal.learner.forward_pass import forward_pass
from shoal.learner.learner import Learner
from shoal.learner.parity_check import TOLERANCE, LogProbParityCheck
from shoal.policy.trajectory import TrajectoryHeader, from_bytes, to_bytes
from shoal.policy.weights import flatten_weights

gpu = pytest.mark.gpu
needs_bfloat16 = pytest.mark.skipif(not runs_bfloat16("cpu"), reason=NO_BFLOAT16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def trajectory(seed, num_slots=7, policy_version=0):
    header = TrajectoryHeader(run_id="r", actor=0, restart_index=0, sequence=seed, policy_version=policy_version)
    return from_bytes(SMALL, to_bytes(SMALL, header, random_columns(SMALL, num_slots, seed)))


def test_a_batch_is_its_trajectories_in_order():
    """Segments mixed up between trajectories, a stale buffer, another trajectory's version."""
    assembler = BatchAssembler(SMALL, 10)
    assembler.assemble([trajectory(8, 10)])
    parts = [trajectory(1, 3, policy_version=4), trajectory(2, 7, policy_version=5)]
    batch = assembler.assemble(parts)
    assert batch.batch_size == (10,)
    for name, column in parts[0].columns.items():
        whole = batch[name].numpy().astype(column.dtype)
        assert (whole[:3] == column).all(), name
        assert (whole[3:] == parts[1].columns[name]).all(), name
    assert batch["policy_version"].tolist() == [4] * 3 + [5] * 7
    assert batch["is_first"].dtype == torch.bool
    with pytest.raises(ValueError, match="expected 10 segments in a batch, got 6"):
        assembler.assemble([trajectory(1, 6)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_device_is_refused_with_the_alternatives():
    """A run that silently trains on the CPU, or ends in a stack of torch's."""
    config = LearnerConfig(device="cuda")
    assert check_device(config) == "device=cuda is not available here (found: cpu); use device=auto"
    with pytest.raises(DeviceNotFound, match="use device=auto"):
        make_device_path(config)
    assert check_device(LearnerConfig(device="auto")) is None


def test_the_cpu_path_copies_nothing_and_imports_no_cuda():
    """A copy of every batch, or CUDA code in the way of those who have none."""
    path = make_device_path(LearnerConfig(device="cpu", precision="float32"))
    batch = random_batch(0)
    assert path.to_device(batch) is batch
    assert path.describe() == "cpu"
    assert not path.pin_memory
    code = (
        "import sys; from shoal.learner.config import LearnerConfig; "
        "from shoal.learner.device_choice import make_device_path; import shoal.learner.training_loop; "
        "make_device_path(LearnerConfig(device='cpu')); sys.exit('shoal.learner.cuda' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "native", "exact"),
    [
        ("auto", "amx_tile", False),
        ("auto", "avx512_bf16", False),
        ("auto", None, True),
        ("float32", "amx_tile", True),
        ("bfloat16", None, False),
    ],
)
def test_precision_is_the_hardwares_unless_it_is_set(monkeypatch, precision, native, exact):
    """bfloat16 emulated in software, several times slower; units that are left idle; or a setting without effect."""
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(f"torch.cpu._is_{unit}_supported", lambda unit=unit: unit == native)
    monkeypatch.setattr("shoal.learner.device_choice.runs_bfloat16", lambda device: True)
    assert make_device_path(LearnerConfig(device="cpu", precision=precision)).is_exact == exact


def test_bfloat16_is_refused_where_the_processor_cannot_run_it(monkeypatch):
    """A run that ends in its first update with an error of oneDNN; or ``auto`` that takes bfloat16 there."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("shoal.learner.device_choice.runs_bfloat16", lambda device: False)
    config = LearnerConfig(device="cpu", precision="bfloat16")
    assert check_precision(config).endswith("use precision=auto or float32")
    with pytest.raises(DeviceNotFound, match="precision=bfloat16 is not available here"):
        make_device_path(config)
    assert make_device_path(LearnerConfig(device="cpu", precision="auto")).is_exact


def test_asking_the_processor_for_bfloat16_draws_no_random_numbers():
    """Other initial weights on every seed, only because the processor was asked."""
    before = torch.get_rng_state()
    runs_bfloat16.cache_clear()
    runs_bfloat16("cpu")
    assert torch.equal(torch.get_rng_state(), before)


@needs_bfloat16
def test_bfloat16_is_near_and_exact_is_exact():
    """A loss in bfloat16: probabilities and values must come back as float32. A parity check that reads rounding."""
    batch, policy = random_batch(0), small_policy()
    path = DevicePath(CPU, bfloat16=True)
    with torch.no_grad():
        want = forward_pass(policy, batch, DevicePath(CPU))
        rough = forward_pass(policy, batch, path)
        with path.exact():
            assert path.is_exact
            got = forward_pass(policy, batch, path)
    assert not path.is_exact
    assert rough.log_prob.dtype == rough.value.dtype == torch.float32
    assert 1e-4 < float((rough.log_prob - want.log_prob).abs().max()) < 0.05
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@needs_bfloat16
def test_the_canary_reads_rounding_though_updates_are_bfloat16():
    """False alarms on every machine with bfloat16."""
    learner = make_learner(small_policy(), precision="bfloat16")
    parity_check = LogProbParityCheck(learner.policy, learner.path, max_policy_lag=1, every=1)
    parity_check.remember(flatten_weights(learner.policy, 0))
    batch = random_batch(0).clone()
    with torch.no_grad():
        batch["behavior_log_prob"] = forward_pass(learner.policy, batch, DevicePath(CPU)).log_prob.T.contiguous()
    assert learner.update(batch).log_prob_error is None
    assert parity_check.check(batch) <= TOLERANCE


@needs_bfloat16
@pytest.mark.parametrize("sort", OBSERVATIONS)
def test_the_gradient_in_bfloat16_is_that_of_float32(sort):
    """A reset that bfloat16 misses, or a kernel of its own that is wrong: the gradient then points elsewhere. And the
    two policies round at the same places."""
    steps, rows = 12, 16
    obs, is_first = observe(OBSERVATIONS[sort], steps, rows), draw_is_first(steps, rows)
    found = {}
    for policy in make_pair(OBSERVATIONS[sort], ACTIONS["discrete"]):
        for bfloat16 in (False, True):
            with DevicePath(CPU, bfloat16=bfloat16).autocast():
                output, _ = policy.unroll(obs, is_first, draw_state(policy, rows), return_state=False)
            assert output.logits.dtype == output.value.dtype == torch.float32
            loss = output.logits.square().sum() + output.value.square().sum()
            found[policy.kind, bfloat16] = torch.autograd.grad(loss, list(policy.parameters()))
    for name, one, other in zip(
        dict(policy.named_parameters()), found["fast", True], found["component", True], strict=True
    ):
        assert_same(one, other, name)
    for name, rough, exact in zip(
        dict(policy.named_parameters()), found["fast", True], found["fast", False], strict=True
    ):
        assert rough.dtype == torch.float32
        assert float((rough - exact).norm() / exact.norm()) < 0.15, name


@gpu
@needs_cuda
def test_staging_equals_its_source():
    """Pinned buffers that are overwritten while they are copied."""
    path = make_device_path(LearnerConfig(device="cuda"))
    assembler = BatchAssembler(SMALL, 7, pin_memory=True)
    on_device = [path.to_device(assembler.assemble([trajectory(seed)])) for seed in range(4)]
    for seed, batch in enumerate(on_device):
        want = random_batch(seed)
        for name in ("obs", "reward", "action", "is_first", "initial_h"):
            assert torch.equal(batch[name].cpu(), want[name]), name


@gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_update_on_cuda_equals_the_cpu(precision):
    """Another result of the packed kernel, of the fused optimizer, or of a batch that was not there yet."""
    terms = []
    for device in ("cpu", "cuda"):
        config = LearnerConfig(device=device, precision=precision)
        path = make_device_path(config)
        learner = Learner(small_policy().to(path.device), config, path, num_threads=1, seed=0)
        for seed in range(2):
            result = learner.update(path.to_device(random_batch(seed)))
        terms.append(result.terms)
    assert terms[1]["loss"] == pytest.approx(terms[0]["loss"], rel=0.2 if precision == "bfloat16" else 2e-3, abs=1e-3)
