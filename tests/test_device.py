"""Where the update runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from rollouts import SMALL, random_batch, random_columns, small_policy

from learner.batch import BatchAssembler
from learner.config import LearnerConfig
from learner.device import DevicePath
from learner.device_choice import DeviceNotFound, check_device, make_device_path
from learner.learner import Learner, evaluate
from policy.trajectory import TrajectoryHeader, from_bytes, to_bytes

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def trajectory(seed, num_slots=7, policy_version=0):
    header = TrajectoryHeader(run_id="r", actor=0, incarnation=0, sequence=seed, policy_version=policy_version)
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
    path = make_device_path(LearnerConfig(device="cpu", autocast=True))
    batch = random_batch(0)
    assert path.to_device(batch) is batch
    assert path.describe() == "cpu"
    assert not path.pin_memory
    evaluate(small_policy(), batch, path)  # autocast is for accelerators
    code = (
        "import sys; from learner.config import LearnerConfig; from learner.device_choice import make_device_path;"
        "import learner.train; make_device_path(LearnerConfig(device='cpu')); sys.exit('learner.cuda' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_autocast_runs_and_stays_near():
    """A loss in bfloat16: probabilities and values must come back as float32."""
    config = LearnerConfig(device="cpu")
    batch, policy = random_batch(0), small_policy()
    with torch.no_grad():
        exact = evaluate(policy, batch, make_device_path(config))
        rough = evaluate(policy, batch, DevicePath(torch.device("cpu"), autocast=True))
    assert rough.log_prob.dtype == rough.value.dtype == torch.float32
    assert 0 < float((rough.log_prob - exact.log_prob).abs().max()) < 0.3


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
@pytest.mark.parametrize("autocast", [False, True])
def test_an_update_on_cuda_equals_the_cpu(autocast):
    """Another result of the packed kernel, of the fused optimizer, or of a batch that was not there yet."""
    terms = []
    for device in ("cpu", "cuda"):
        config = LearnerConfig(device=device, autocast=autocast)
        path = make_device_path(config)
        learner = Learner(small_policy().to(path.device), config, path, num_threads=1, seed=0)
        for seed in range(2):
            result = learner.update(path.to_device(random_batch(seed)))
        terms.append(result.terms)
    assert terms[1]["loss"] == pytest.approx(terms[0]["loss"], rel=0.2 if autocast else 2e-3, abs=1e-3)
