"""Checkpoints: complete and verified, or not used at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
from rollouts import make_learner, random_batch, small_policy
from shoal.learner.checkpoint import CheckpointError, Checkpoints, find_checkpoint, load_checkpoint
from shoal.policy import FastPolicy, TokenObservation
from shoal.policy.actions import Continuous, Discrete
from shoal.policy.config import RegularizationConfig
from shoal.policy.weights import flatten_weights

FILES = ["weights.safetensors", "regularizer.safetensors", "optimizer.pt", "state.json", "manifest.json"]
BALANCED = {"sampled": 9, "trained": 5, "in_flight": 1, "dropped": {"stale": 3}}
REGULARIZATION = RegularizationConfig(l2_init_coef=1e-3, clip_scale=3.0)


def trained(updates=2, **settings):
    learner = make_learner(small_policy(), regularization=REGULARIZATION, **settings)
    for seed in range(updates):
        learner.update(random_batch(seed))
    return learner


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A directory with checkpoints of versions 1, 2 and 3; copied, never written to."""
    directory = tmp_path_factory.mktemp("three")
    checkpoints, learner = Checkpoints(directory, keep=3), trained(0)
    for seed in range(3):
        learner.update(random_batch(seed))
        checkpoints.save(learner, {"note": seed})
    return directory


@pytest.fixture
def directory(three, tmp_path):
    shutil.copytree(three, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def same_weights(a, b):
    return flatten_weights(a, 0).sha256 == flatten_weights(b, 0).sha256


def test_training_continues_bit_for_bit(tmp_path):
    """Moments, step counts, w0, clip bounds, a random stream or the place in a schedule that a resumed run lacks."""
    schedules = {"learning_rate": {"kind": "cosine", "over_env_steps": 1000}}
    settings = {"minibatches": 7, "batch_size": 7, "epochs": 2, "schedules": schedules}
    learner = trained(3, **settings)
    assert learner.env_steps
    ledger = {**BALANCED, "sampled": learner.env_steps + 4, "trained": learner.env_steps}
    path = Checkpoints(tmp_path).save(learner, {"ledger": ledger})
    torch_stream = torch.get_rng_state()
    expected_noise = torch.rand(3)
    steps = learner.update(random_batch(9)).all_env_steps

    resumed = make_learner(small_policy(seed=77), regularization=REGULARIZATION, seed=5, **settings)
    checkpoint = load_checkpoint(path)
    checkpoint.restore(resumed)
    assert torch.equal(torch.get_rng_state(), torch_stream)
    assert torch.equal(torch.rand(3), expected_noise)
    assert checkpoint.policy_version == resumed.policy_version == 3
    assert checkpoint.state["ledger"] == ledger
    assert resumed.env_steps == learner.env_steps - steps == ledger["trained"]
    for name, w0 in make_learner(small_policy()).regularizer.reference.items():
        assert torch.equal(resumed.regularizer.reference[name], w0), name
    assert resumed.regularizer.bounds == learner.regularizer.bounds
    resumed.update(random_batch(9))
    assert same_weights(resumed.policy, learner.policy)


def test_a_checkpoint_on_other_storage_is_replaced_and_removed_as_a_link(directory, tmp_path):
    """Catches a link to a checkpoint that is never removed, and that keeps the same version from being saved again."""
    (tmp_path / "storage").mkdir()
    for name in ("000000001", "000000003"):
        shutil.move(directory / name, tmp_path / "storage" / name)
        (directory / name).symlink_to(tmp_path / "storage" / name)
    checkpoints, learner = Checkpoints(directory, keep=2), trained(3)
    for _ in range(2):
        assert checkpoints.save(learner, {}) == directory / "000000003"
        assert sorted(path.name for path in directory.iterdir()) == ["000000002", "000000003"]
    for name in ("000000001", "000000003"):
        assert load_checkpoint(tmp_path / "storage" / name)


@pytest.mark.parametrize(
    ("observation", "actions"),
    [
        (
            TokenObservation(5, 5, 9, [1.0, None, 3.0], ["a", "b", "c"], [(1, ["x", "y"])], 0xFE),
            Discrete((("n", "s"),)),
        ),
        (TokenObservation(3, 3, 4, [1.0]), Discrete((("a", "b"), ("c", "d")), scalar=False)),
        (TokenObservation(3, 3, 4, [1.0]), Continuous(("x",))),
    ],
)
def test_the_policy_is_rebuilt_from_the_checkpoint_alone(tmp_path, observation, actions):
    """A name, an embedding row or a space that is not saved: `evaluate` would play with another policy."""
    names = actions.flat_names
    policy = FastPolicy(observation, actions, 30, action_rows={name: 20 - i for i, name in enumerate(names)})
    path = Checkpoints(tmp_path).save(make_learner(policy), {})
    rebuilt = load_checkpoint(path).make_policy()
    assert (rebuilt.observation, rebuilt.actions, rebuilt.action_rows) == (observation, actions, policy.action_rows)
    obs = torch.randint(0, 255, (6, *observation.shape), dtype=torch.uint8)
    first = torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.step(obs, first), policy.step(obs, first), rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "empty"])
def test_a_damaged_file_is_refused_and_the_one_before_taken(directory, name, damage, caplog):
    """Weights that are not what was saved, or a fresh start that nobody asked for."""
    file = directory / "000000003" / name
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    file.write_bytes({"flipped": data, "truncated": data[:-1], "missing": b"", "empty": b""}[damage])
    if damage == "missing":
        file.unlink()
    with pytest.raises(CheckpointError, match="000000003"):
        load_checkpoint(directory / "000000003")
    assert Checkpoints(directory).latest().policy_version == 2
    assert "trying the one before" in caplog.text


def test_a_flipped_byte_anywhere_is_refused(directory):
    """A byte that no hash covers; the manifest itself holds the hashes."""
    for name in ("manifest.json", "state.json", "weights.safetensors"):
        file = directory / "000000001" / name
        data = file.read_bytes()
        for place in range(0, len(data), max(len(data) // 60, 1)):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_checkpoint(directory / "000000001")
        file.write_bytes(data)
    assert load_checkpoint(directory / "000000001").policy_version == 1


def test_never_fresh_in_silence(directory):
    """A run that starts again from nothing because all of its checkpoints are damaged."""
    for path in directory.iterdir():
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*000000003.*000000002.*000000001"):
        Checkpoints(directory).latest()
    assert Checkpoints(directory / "nothing-here").latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(directory / "nothing-here")


def test_find_checkpoint_takes_a_run_its_checkpoints_or_one_of_them(directory):
    """A path that the command line offers and refuses."""
    for path in (directory.parent, directory, directory / "000000003"):
        assert find_checkpoint(path).policy_version == 3


def rewrite(path, name, data):
    """Change a file and the manifest with it, as somebody who means it would."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_another_format_is_refused(directory):
    """A later version's checkpoint that is read as if it were ours."""
    path = directory / "000000003"
    state = json.loads((path / "state.json").read_text())
    rewrite(path, "state.json", json.dumps({**state, "format_version": 3}).encode())
    with pytest.raises(CheckpointError, match="has format 3; this version reads 2"):
        load_checkpoint(path)


def test_another_policy_is_refused(directory):
    """Weights of other shapes: an error that says so, not a stack of tensor sizes alone."""
    other = make_learner(FastPolicy(TokenObservation(3, 3, 4, [1.0]), ["a"]))
    with pytest.raises(CheckpointError, match="another policy than this run's config"):
        load_checkpoint(directory / "000000003").restore(other)


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        """The command."""
        return os.system, ("touch /tmp/shoal-was-here",)


def test_a_pickle_is_never_run(directory):
    """Code in a checkpoint; weights are left as they were."""
    Path("/tmp/shoal-was-here").unlink(missing_ok=True)
    learner = trained(0)
    before = flatten_weights(learner.policy, 0).sha256
    for data in (pickle.dumps(Payload()), pickle.dumps({"optimizer": Payload(), "random": {}}), b"junk"):
        rewrite(directory / "000000003", "optimizer.pt", data)
        with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
            load_checkpoint(directory / "000000003").restore(learner)
    assert not Path("/tmp/shoal-was-here").exists()
    assert flatten_weights(learner.policy, 0).sha256 == before


def test_the_newest_are_kept(directory):
    """A disk that fills up, or a newest checkpoint without a predecessor."""
    learner = trained(4)
    Checkpoints(directory, keep=2).save(learner, {})
    assert sorted(path.name for path in directory.iterdir()) == ["000000003", "000000004"]
    with pytest.raises(ValueError, match="keep=1"):
        Checkpoints(directory, keep=1)


def test_what_is_half_written_is_ignored_and_cleared_away(directory):
    """Temporary directories of killed processes that are loaded, or that pile up."""
    shutil.copytree(directory / "000000003", directory / ".incomplete-x")
    (directory / "notes").mkdir()
    assert Checkpoints(directory).latest().policy_version == 3
    Checkpoints(directory, keep=4).save(trained(4), {})
    assert sorted(path.name for path in directory.iterdir()) == [*(f"{v:09d}" for v in range(1, 5)), "notes"]


def test_a_version_saved_twice_is_there_throughout(directory, monkeypatch):
    """A replacement that deletes the old one first: a kill in between would lose the run."""
    checkpoints, learner = Checkpoints(directory, keep=3), trained(3)
    checkpoints.save(learner, {"note": "again"})
    assert checkpoints.latest().state["note"] == "again"
    assert len(list(directory.iterdir())) == 3
    for old in ("000000001", "000000002"):
        shutil.rmtree(directory / old)
    rename = os.rename

    def end_before_the_successor_has_its_name(source, target):
        if Path(source).name.startswith(".incomplete-"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", end_before_the_successor_has_its_name)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(learner, {"note": "never"})
    monkeypatch.undo()
    assert checkpoints.latest().state["note"] == "again"
    checkpoints.save(learner, {"note": "third"})
    assert [path.name for path in directory.iterdir()] == ["000000003"]
    assert checkpoints.latest().state["note"] == "third"


def test_a_full_disk_leaves_the_others(directory, monkeypatch):
    """An error in mid-write that damages or removes what was there."""
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Checkpoints(directory).save(trained(4), {})
    assert sorted(path.name for path in directory.iterdir()) == ["000000001", "000000002", "000000003"]


def test_the_last_saved_is_the_newest_whatever_its_version(tmp_path):
    """RUN/best after a resume from an older checkpoint: a better policy of a lower version deleted, or not loaded."""
    best, learner = Checkpoints(tmp_path), trained(3)
    weights = flatten_weights(learner.policy, 0)
    for version, mean in ((380, 2), (395, 3), (350, 99)):
        best.save(learner, {"mean": mean}, dataclasses.replace(weights, policy_version=version))
        assert Checkpoints(tmp_path).latest().state["mean"] == mean
    best.save(learner, {"mean": 100}, dataclasses.replace(weights, policy_version=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000010", "000000350", "000000395"]
    assert find_checkpoint(tmp_path).policy_version == 10


@pytest.mark.parametrize("damaged_file", ["weights.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoints_do_not_push_out_good_ones(directory, damaged_file):
    """Retention by name: what was just saved is deleted for two newer ones that nobody can load."""
    for version in ("000000002", "000000003"):
        (directory / version / damaged_file).write_bytes(b"damaged")
    learner = trained(1)
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.latest().policy_version == 1
    learner.policy_version = 1
    learner.update(random_batch(5))
    learner.policy_version = 20  # lower than none of the damaged ones' successors, and then lower than they are
    for version in (20, 2):
        learner.policy_version = version
        path = checkpoints.save(learner, {"again": version})
        assert load_checkpoint(path).policy_version == version
        assert Checkpoints(directory).latest().state["again"] == version
    assert len(list(directory.iterdir())) == 2


@pytest.mark.parametrize("text", ["[]", "null", "3", '"weights.safetensors"', "[" * 100_000, "{", "\xff"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_of_another_kind_is_refused_and_the_one_before_taken(directory, name, text):
    """A validator that assumes an object: AttributeError, and no word of the checkpoint before."""
    path = directory / "000000003"
    if name == "manifest.json":
        (path / name).write_text(text)
    else:
        rewrite(path, name, text.encode())
    with pytest.raises(CheckpointError, match="000000003"):
        load_checkpoint(path)
    assert Checkpoints(directory).latest().policy_version == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "dangling"])
def test_a_file_that_is_none_is_refused_at_once(directory, name, kind):
    """A pipe that nobody writes to, or a device without an end: the start hangs."""
    file = directory / "000000003" / name
    file.unlink()
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "directory":
            file.mkdir()
        case "dangling":
            file.symlink_to("nothing")
    with pytest.raises(CheckpointError, match="000000003"):
        find_checkpoint(directory / "000000003")
    assert Checkpoints(directory).latest().policy_version == 2


@pytest.mark.parametrize(
    "forged",
    [
        {"policy_version": -5},
        {"policy_version": True},
        {"policy_version": "3"},
        {"policy_version": 1e300},
        {"policy": []},
        {"session": -1},
        {"run_id": 7},
        {"ledger": []},
        {"ledger": {**BALANCED, "trained": 6}},
        {"ledger": {**BALANCED, "sampled": 8, "in_flight": 0.0}},
        {"ledger": {**BALANCED, "sampled": 0, "trained": -4}},
        {"ledger": {**BALANCED, "dropped": {"stale": None}}},
        {"ledger": {"sampled": 9, "trained": 9, "in_flight": 0}},
    ],
)
def test_numbers_that_no_run_saves_are_refused(directory, forged):
    """Content that is believed for its shape: a run that resumes with version -5, or with books that do not balance."""
    path = directory / "000000003"
    state = {**json.loads((path / "state.json").read_text()), "ledger": BALANCED, "run_id": "x", "session": 0}
    rewrite(path, "state.json", json.dumps(state).encode())
    assert load_checkpoint(path).policy_version == 3
    rewrite(path, "state.json", json.dumps({**state, **forged}).encode())
    with pytest.raises(CheckpointError, match=next(iter(forged))):
        load_checkpoint(path)
    assert Checkpoints(directory).latest().policy_version == 2


@pytest.mark.parametrize("kind", ["file", "dangling", "link to a file"])
def test_a_directory_that_is_none_is_not_an_empty_one(tmp_path, kind):
    """Storage that is not mounted: a fresh run that saves nothing."""
    directory = tmp_path / "run" / "checkpoints"
    directory.parent.mkdir()
    if kind == "file":
        directory.write_text("")
    else:
        (tmp_path / "other").write_text("")
        directory.symlink_to(tmp_path / ("nothing" if kind == "dangling" else "other"))
    for find in (Checkpoints(directory).latest, lambda: find_checkpoint(directory.parent)):
        with pytest.raises(CheckpointError, match="is the storage mounted"):
            find()


@pytest.mark.parametrize("limit", [2_000, 20_000, 200_000])
def test_a_disk_that_is_full_at_any_file_is_an_oserror(directory, limit):
    """Errors of safetensors and torch that are no OSError: the run ends, although a failed save is only counted."""
    learner = trained(4)
    sizes = [file.stat().st_size for file in (directory / "000000003").iterdir()]
    assert min(sizes) < limit < max(sizes)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # as a full disk: a write in the middle fails
    try:
        with pytest.raises(OSError, match=r"No space|too large|IoError|unexpected pos|write"):
            Checkpoints(directory).save(learner, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in directory.iterdir()) == ["000000001", "000000002", "000000003"]


@pytest.mark.parametrize(("umask", "directory_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, directory_mode, file_mode):
    """A checkpoint that another account cannot evaluate, or one that everybody can read though the umask says no."""
    before = os.umask(umask)
    try:
        path = Checkpoints(tmp_path / "checkpoints").save(trained(1), {})
    finally:
        os.umask(before)
    assert [stat.S_IMODE(place.stat().st_mode) for place in (path.parent, path)] == [directory_mode] * 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {file_mode}
