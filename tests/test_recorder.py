"""The flight recorder: an update made again is the same to the last bit, and nothing that decides it is left out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import make_learner, random_batch, small_policy, state_of, tiny_policy
from shoal import given
from shoal.deploy.replay.table import lines, to_json
from shoal.learner import recorded_updates
from shoal.learner.config import RecorderConfig
from shoal.learner.learner import Learner, NonFiniteUpdate
from shoal.learner.learner_worker import not_finite
from shoal.learner.loss import LossInputs, ppo_loss
from shoal.learner.plain_file import load_plain, save_plain
from shoal.learner.recorded_updates import (
    RecordedUpdate,
    RecordedUpdates,
    RecordError,
    find_recorded,
    load_recorded,
    recorded_names,
)
from shoal.learner.recorder import Recorded, Recorder, copied
from shoal.learner.replay import replay
from shoal.policy.component import ComponentPolicy
from shoal.policy.config import RegularizationConfig
from shoal.policy.observation import VectorObservation
from shoal.policy.weights import flatten_weights
from tensordict import TensorDict

SLOTS = 6
EVERYTHING: dict[str, Any] = {
    "epochs": 2,
    "minibatches": 2,
    "batch_size": SLOTS,
    "learning_rate": 1e-3,
    "desired_kl": 1e-3,
    "normalize_values": True,
    "refresh_states": True,
    "schedules": {"learning_rate": {"kind": "cosine", "over_env_steps": 1000}},
    "regularization": RegularizationConfig(l2_init_coef=1e-2, clip_scale=1.01, l2_init_reference_every=2),
}


def noisy(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """A loss that draws from torch's stream."""
    terms = ppo_loss(inputs)
    terms["loss"] = terms["loss"] * (1 + torch.rand(()))
    return terms


@pytest.fixture(autouse=True)
def _loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(given.losses, "my_losses:noisy", noisy)


def normalized() -> ComponentPolicy:
    """A tiny policy with statistics."""
    torch.manual_seed(0)
    sizes = {"fc1": 6, "encoded_obs": 5, "lstm": 4, "critic_1": 6, "actor_1": 6}
    components = {name: {"size": size} for name, size in sizes.items()}
    return ComponentPolicy(
        *(VectorObservation(3), ["a", "b", "c"], 3),
        components=components,
        normalize_observations=True,
        normalize_values=True,
    )


def batches(count: int, policy: Any = None, **changes: Any) -> list[TensorDict]:
    """Unrolls of the same slots, one after the other, with states of ``policy``; by default of ``normalized``."""
    changes["state_shapes"] = state_of(policy or normalized())
    found = []
    for number in range(count):
        batch = random_batch(number, num_slots=SLOTS, policy_version=number, **changes)
        batch["unroll_index"][:] = number
        batch["obs"] *= 3 + number
        found.append(batch)
    return found


def recorded_run(
    run: Path,
    learner: Learner,
    flown: list[TensorDict],
    config: RecorderConfig | None = None,
    *,
    write_every: int = 100,
) -> list[str]:
    """Make updates and record them as the service does; the hash of the weights after each."""
    config = config or RecorderConfig()
    recorder = Recorder(config, keeps_weights=True)
    updates = RecordedUpdates(run / "recorder", keep=config.keep_updates, about={"run_id": "r", "num_agents": 1})
    hashes = []
    for number, batch in enumerate(flown, 1):
        recorder.begin(learner, batch)
        try:
            result = learner.update(batch)
        except NonFiniteUpdate as error:
            recorder.not_made("skipped", str(error), flatten_weights(learner.policy, 0).content_hash)
        except ZeroDivisionError as error:
            recorder.not_made("failed", f"{type(error).__name__}: {error}")
        else:
            hashes.append(flatten_weights(learner.policy, 0).content_hash)
            recorder.made(hashes[-1], result.terms)
        batch.zero_()  # as the next batch takes its place
        if number % write_every == 0:
            updates.write(learner, recorder, no_peers)
    updates.write(learner, recorder, no_peers)
    return hashes


def no_peers(attempts: Any) -> list[Recorded]:
    raise AssertionError("one learner asks nobody")


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "everything": (normalized, EVERYTHING, {}),
    "noise": (normalized, {**EVERYTHING, "loss": "my_losses:noisy"}, {}),
    "shards": (small_policy, {"epochs": 2, "minibatches": 2, "num_shards": 3, "num_threads": 2}, {}),
    "impala": (small_policy, {"loss": "impala", "epochs": 1, "value_clip_coef": 0.0, "num_shards": 2}, {}),
    "burn-in": (lambda: tiny_policy("gru"), {"epochs": 2}, {"burn_in": 5, "same_step": True}),
    "own core": (lambda: tiny_policy("own_cores:Leaky"), {"desired_kl": 0.01}, {}),
    "own optimizer": (small_policy, {"optimizer": "own_optimizers:Descent", "epochs": 2, "minibatches": 2}, {}),
    "AdamW": (
        normalized,
        {
            "optimizer": "torch.optim:AdamW",
            "optimizer_kwargs": {"amsgrad": True},
            "epochs": 3,
            "normalize_values": True,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_made_again_is_the_same_to_the_last_bit(tmp_path: Path, case: str) -> None:
    """Catches anything that decides an update and is not recorded, is of another moment, or shares memory with what
    goes on: the first update, which gives values their unit, and the fourth alike."""
    make, settings, changes = CASES[case]
    policy = make()
    learner = make_learner(policy, **settings)
    hashes = recorded_run(tmp_path, learner, batches(4, policy, **changes), RecorderConfig(keep_updates=4))
    learner.close()
    assert len(set(hashes)) == 4
    assert list(recorded_names(tmp_path)) == ["1", "2", "3", "4"]
    torch.manual_seed(12345)
    for version, expected in enumerate(hashes, 1):
        recorded = find_recorded(tmp_path, str(version))
        assert recorded.weights_hash == expected
        again = replay(recorded)
        assert again.is_same, version
        assert again.result is not None
        assert again.result.terms == recorded.terms
        assert len(again.contributions) == SLOTS


def of_shared(*path: Any) -> Callable[[RecordedUpdate], Any]:
    def find(recorded: RecordedUpdate) -> Any:
        found: Any = recorded.shared
        for part in path:
            found = found[part]
        return found

    return find


def _own(*path: Any) -> Callable[[RecordedUpdate], Any]:
    def find(recorded: RecordedUpdate) -> Any:
        found: Any = recorded.parts[0].own
        for part in path:
            found = found[part]
        return found

    return find


TENSORS: dict[str, Callable[[RecordedUpdate], Any]] = {
    "weights": of_shared("policy", "fc1.weight"),
    "mean of observations in the policy": of_shared("policy", "vector_normalizer.mean"),
    "Adam's first moment": of_shared("optimizer", "state", 0, "exp_avg"),
    "Adam's second moment": of_shared("optimizer", "state", 0, "exp_avg_sq"),
    "Adam's steps": of_shared("optimizer", "state", 0, "step"),
    "w0": of_shared("regularizer", "reference/fc1.weight"),
    "clip bounds": of_shared("regularizer", "initial_max/fc1.weight"),
    "statistics of observations": of_shared("statistics", "observations", "deviations"),
    "statistics of values": of_shared("statistics", "values", "averages"),
    "refreshed states": _own("start_states", "state", "h"),
    "whose states are refreshed": _own("start_states", "unroll"),
    "rewards": lambda recorded: recorded.parts[0].batch["reward"],
    "episode boundaries": lambda recorded: recorded.parts[0].batch["is_first"],
    "stored states": lambda recorded: recorded.parts[0].batch["initial_h"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that can decide an update."""
    run = tmp_path_factory.mktemp("whole")
    given.losses["my_losses:noisy"] = noisy
    recorded_run(run, make_learner(normalized(), loss="my_losses:noisy", **EVERYTHING), batches(3))
    del given.losses["my_losses:noisy"]
    return run


@pytest.mark.parametrize("piece", TENSORS)
def test_every_piece_counts(whole: Path, piece: str) -> None:
    """Catches a piece that is recorded and not used when the update is made again: a hash that says "the same" of
    anything."""
    recorded = find_recorded(whole, "3")
    tensor = TENSORS[piece](recorded)
    if piece == "stored states":  # used where the refreshed state is not that of the unroll before
        _own("start_states", "unroll")(recorded).fill_(-9)
        expected = replay(recorded).weights_hash
        tensor += 0.5
        assert replay(recorded).weights_hash != expected
        return
    if tensor.dtype == torch.bool:
        tensor[:, 3] = ~tensor[:, 3]
    elif piece == "clip bounds":
        tensor /= 100
    else:
        tensor += 1
    assert not replay(recorded).is_same


@pytest.mark.parametrize("piece", ["env_steps", "learning_rate_factor", "value_coef_factor", "minibatches", "torch"])
def test_every_number_and_stream_counts(whole: Path, piece: str) -> None:
    """Catches a schedule, an adapted rate or a random stream that begins anew."""
    recorded = find_recorded(whole, "3")
    if piece in ("minibatches", "torch"):
        streams = recorded.parts[0].own["random"]
        other = torch.Generator().manual_seed(99).get_state()
        streams[piece] = [other for _ in streams[piece]] if piece == "minibatches" else other
    else:
        recorded.shared[piece] = recorded.shared[piece] * 0.5 if piece.endswith("_factor") else 1
    assert not replay(recorded).is_same


def test_parts_add_up_to_the_update() -> None:
    """Catches a part that is normalized or counted by itself, and not as one of the whole batch."""
    batch = random_batch(3, num_slots=SLOTS)
    learner = make_learner(small_policy(), max_grad_norm=1e9)
    parts = learner.contributions(batch)
    before = flatten_weights(learner.policy, 0).content_hash
    result = learner.update(batch)
    assert before != flatten_weights(learner.policy, 0).content_hash
    assert sum(one.steps for one in parts) == result.env_steps
    for name in parts[0].terms:
        assert sum(one.terms[name] for one in parts) == pytest.approx(result.terms[name], rel=1e-5, abs=1e-6), name
    assert len({one.training_env_id for one in parts}) == SLOTS


def test_a_part_is_the_update_of_that_segment_alone() -> None:
    """Catches a gradient, a ratio or an advantage of another segment. Without normalization a part is the update of the
    segment alone, by its share of the steps."""
    batch = random_batch(4, num_slots=4)
    settings: dict[str, Any] = {"max_grad_norm": 1e9, "normalize_advantage": False, "rho_bar": 0.8}
    parts = make_learner(small_policy(), **settings).contributions(batch)
    total = sum(one.steps for one in parts)
    for row, part in enumerate(parts):
        alone = make_learner(small_policy(), **settings)
        segment = batch[row : row + 1]
        prepared = alone._prepare(segment, None, None)
        ratio = (prepared.forward.log_prob.detach() - segment["behavior_log_prob"].T).exp()[prepared.valid].numpy()
        advantage = prepared.targets.advantage[prepared.valid].numpy()
        result = alone.update(segment)
        share = part.steps / total
        assert part.steps == result.env_steps
        assert part.grad_norm == pytest.approx(result.terms["grad_norm"] * share, rel=1e-4)
        assert part.terms["value_loss"] == pytest.approx(result.terms["value_loss"] * share, rel=1e-4)
        assert part.ratio_mean == pytest.approx(ratio.mean(), rel=1e-5)
        assert part.ratio_max == pytest.approx(ratio.max(), rel=1e-5)
        assert part.vtrace_weight == pytest.approx(np.minimum(ratio, 0.8).mean(), rel=1e-5)
        assert part.advantage_mean == pytest.approx(advantage.mean(), rel=1e-4, abs=1e-6)
        assert abs(part.advantage_largest) == pytest.approx(np.abs(advantage).max(), rel=1e-5)


def test_the_segment_that_breaks_an_update_is_named(tmp_path: Path) -> None:
    """Catches a skipped update that is not recorded, is not skipped again, or whose one bad segment turns the numbers
    of all into NaN."""
    flown = batches(3)
    flown[1]["reward"][5, 2] = math.inf
    hashes = recorded_run(tmp_path, make_learner(normalized(), **EVERYTHING), flown)
    assert len(hashes) == 2
    assert list(recorded_names(tmp_path)) == ["1", "2-skipped-1", "2"]
    again = replay(find_recorded(tmp_path, "2-skipped-1"))
    assert again.is_same
    assert again.outcome == "skipped"
    assert again.weights_hash == hashes[0]
    broken = [not math.isfinite(one.grad_norm) for one in again.contributions]
    assert broken == [row == 5 for row in range(SLOTS)]
    assert replay(find_recorded(tmp_path, "2")).is_same
    said = lines(again, 3)
    assert "skipped again" in said[-1]
    assert json.loads(json.dumps(to_json(again)))["segments"][5]["grad_norm"] in ("nan", "inf")


def test_an_update_in_which_the_loss_raises_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the update that ended a run, which is not among those that ended well."""

    def raising(inputs: LossInputs) -> dict[str, torch.Tensor]:
        if inputs.batch["unroll_index"].max() == 2:
            raise ZeroDivisionError("mine")
        return ppo_loss(inputs)

    monkeypatch.setitem(given.losses, "my_losses:raising", raising)
    recorded_run(
        tmp_path,
        make_learner(tiny_policy(), loss="my_losses:raising"),
        batches(3, tiny_policy()),
    )
    recorded = find_recorded(tmp_path, "3")
    assert (recorded.name, recorded.outcome) == ("3-failed-2", "failed")
    again = replay(recorded)
    assert again.is_same
    assert again.error == again.why_not_told == "ZeroDivisionError: mine"
    assert "no segment's part can be told: ZeroDivisionError: mine" in "\n".join(lines(again, 3))
    del given.losses["my_losses:raising"]
    with pytest.raises(RecordError, match=r"my_losses:raising: there is no module"):
        replay(recorded)


def test_weights_that_are_not_finite_fail_again(tmp_path: Path) -> None:
    """Catches a replay that calls an update made which ended the run: only its weights were not finite."""
    learner = make_learner(
        tiny_policy(), optimizer="torch.optim:Adam", optimizer_kwargs={"eps": 0.0}, epochs=1, minibatches=1
    )
    [batch] = batches(1, learner.policy)
    recorder = Recorder(RecorderConfig(), keeps_weights=True)
    recorder.begin(learner, batch)
    learner.update(batch)
    assert not np.isfinite(flatten_weights(learner.policy, 0).flat).all()
    recorder.not_made("failed", f"NonFiniteUpdate: {not_finite(1)}")
    updates = RecordedUpdates(tmp_path / "recorder", keep=1, about={"run_id": "r", "num_agents": 1})
    updates.write(learner, recorder, no_peers)
    again = replay(find_recorded(tmp_path, "1"))
    assert (again.outcome, again.result, again.error) == ("failed", None, not_finite(1))


def test_what_fails_while_updates_are_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run without a summary, and with actors that go on, because a broken GPU raises at every copy."""

    def broken(value: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(recorded_updates, "_to_plain", broken)
    learner = make_learner(tiny_policy())
    recorded_run(tmp_path, learner, batches(1, learner.policy))
    assert "could not be written to" in caplog.text
    assert "RuntimeError: CUDA error" in caplog.text


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_few_are_kept_within_the_bytes(tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    """Catches memory or files that grow with the run, and an update that is larger than allowed and kept all the same,
    or left out in silence."""
    learner = make_learner(tiny_policy())
    flown = batches(6, learner.policy)
    for one in flown[1::2]:
        one["reward"][0, 0] = math.nan
    recorded_run(tmp_path, learner, flown, RecorderConfig(keep_updates=keep), write_every=2)
    names = list(recorded_names(tmp_path))
    assert [name for name in names if "-" not in name] == ["1", "2", "3"][-keep:]
    assert [name for name in names if "-" in name] == ["2-skipped-1", "3-skipped-3", "4-skipped-5"][-keep:]

    recorder = Recorder(RecorderConfig(), keeps_weights=True)
    recorder.begin(learner, flown[0])
    assert recorder._begun is not None
    size = recorder._begun.num_bytes
    found = tensors_of(recorder._begun)
    assert size == sum(tensor.nbytes for tensor in found)
    bounded = Recorder(RecorderConfig(keep_updates=9, max_bytes=keep * size + size // 2), keeps_weights=True)
    for _ in range(7):
        bounded.begin(learner, flown[0])
        bounded.made("", {})
    assert len(bounded.unwritten()) == keep
    for config, warnings in ((RecorderConfig(max_bytes=size - 1), 1), (RecorderConfig(keep_updates=0), 0)):
        caplog.clear()
        off = Recorder(config, keeps_weights=True)
        for _ in range(2):
            off.begin(learner, flown[0])
            off.made("", {})
        assert off.unwritten() == []
        assert [record.getMessage() for record in caplog.records] == [
            f"updates are not recorded: one has {size:,} bytes, more than recorder.max_bytes={size - 1:,}"
        ] * warnings


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_written_last_is_kept_whatever_the_clock_says(tmp_path: Path, keep: int) -> None:
    """Catches an update that is removed as soon as it is written, because the clock was set back since the last ones,
    or because the run goes on from an older version; the log has named its file by then."""
    learner = make_learner(tiny_policy())
    flown = batches(5, learner.policy)
    for one in flown[1::2]:
        one["reward"][0, 0] = math.nan
    config = RecorderConfig(keep_updates=keep)
    recorded_run(tmp_path, learner, flown, config)
    for path in (tmp_path / "recorder").iterdir():
        os.utime(path, (2e9, 2e9))
    (tmp_path / "recorder" / "000000099.npz").write_bytes(b"damaged")
    again = make_learner(tiny_policy())
    flown = batches(3, learner.policy)
    flown[1]["reward"][0, 0] = math.nan
    recorded_run(tmp_path, again, flown, config)
    names = list(recorded_names(tmp_path))
    assert [name for name in names if "-" not in name] == ["1", "2"][-keep:]
    assert "2-skipped-1" in names
    assert len(names) == 2 * keep
    assert find_recorded(tmp_path, "2").policy_version == 1


def tensors_of(recorded: Recorded) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif isinstance(value, list):
            for part in value:
                visit(part)

    visit([recorded.shared, recorded.own, recorded.batch])
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one small update; copied, never written to."""
    run = tmp_path_factory.mktemp("small")
    recorded_run(run, make_learner(tiny_policy()), batches(1, tiny_policy()))
    return run / "recorder" / "000000001.npz"


def test_files_are_complete_or_absent_and_as_readable_as_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a torn file under its name, one that only its owner may read, what a killed run was writing, and a full
    disk that ends the training."""
    learner = make_learner(tiny_policy())
    place = tmp_path / "recorder"
    place.mkdir()
    (place / ".incomplete-123").touch()
    before = os.umask(0o027)
    try:
        recorded_run(tmp_path, learner, batches(1, learner.policy))
    finally:
        os.umask(before)
    [path] = place.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "recorder").touch()
    recorded_run(tmp_path / "file", learner, batches(2, learner.policy))
    assert "recorded updates could not be written to" in caplog.text


def test_a_flipped_byte_anywhere_changes_nothing_or_is_refused(small: Path, tmp_path: Path) -> None:
    """Catches damage that is read as numbers. What no reader looks at, such as the time of writing, may differ."""
    data = small.read_bytes()
    sound = load_recorded(small)
    chance = random.Random(0)
    places = [
        *range(0, 400, 11),
        *(chance.randrange(len(data)) for _ in range(80)),
        *range(len(data) - 300, len(data), 11),
    ]
    refused = 0
    path = tmp_path / small.name
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
        try:
            found = load_recorded(path)
        except RecordError as error:
            refused += str(path) in str(error)
        else:
            assert same(dataclasses.asdict(found), {**dataclasses.asdict(sound), "path": path}), place
    assert refused > len(places) / 2
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(RecordError, match="is damaged"):
            load_recorded(path)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.view(-1), b.view(-1)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, key: value}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (changed("format_version", 99), "has format 99; this version of shoal reads 1"),
        (changed("policy_version", -1), "policy_version must be a count"),
        (changed("outcome", "lucky"), "outcome must be one of made, skipped, failed, got 'lucky'"),
        (changed("parts", {}), "parts must be list"),
        (changed("num_learners", 3), "it lacks the part of learners 1, 2"),
        (changed("shared", {}), "its state lacks policy, optimizer"),
        (changed("num_learners", 10**12), "1000000000000 learners with 1 threads made it"),
        (changed("num_learners", 0), "0 learners with 1 threads made it"),
        (changed("torch_threads", 0), "1 learners with 0 threads made it"),
        (changed("parts", [{"rank": []}]), "its parts must be of learners"),
        (changed("parts", [{"rank": 0, "batch": {}}]), "a part of it has no batch"),
        (changed("config", {"epochs": "many"}), "is no recorded update of this version of shoal"),
        (lambda document: {"kind": "rollouts"}, "is no recorded update: another program"),
    ],
)
def test_what_no_run_wrote_is_refused_in_words(
    small: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    """Catches a forged or foreign file that ends in a traceback, or is made again as if it were whole."""
    path = tmp_path / "000000001.npz"
    save_plain(path, damage(load_plain(small)))
    with pytest.raises(RecordError, match=words):
        load_recorded(path)


def test_what_is_not_there_or_no_archive_is_said(small: Path, tmp_path: Path) -> None:
    """Catches a pickle that is run, a pipe that is waited for, and a run without recorded updates that ends in a
    traceback."""
    path = tmp_path / "000000001.npz"
    with pytest.raises(RecordError, match="is missing"):
        load_recorded(path)
    path.write_bytes(pickle.dumps({"format_version": 1}))
    with pytest.raises(RecordError, match="is damaged"):
        load_recorded(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecordError, match="is no regular file"):
        load_recorded(path)
    with pytest.raises(RecordError, match="there is nothing of that name"):
        find_recorded(tmp_path / "nowhere", "1")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RecordError, match=r"unless recorder\.keep_updates=0"):
        find_recorded(tmp_path, "1")
    with pytest.raises(RecordError, match=r"update 7 is not recorded in .*; there are: 1"):
        find_recorded(small.parent.parent, "7")


def test_another_policy_under_the_same_name_is_refused(small: Path) -> None:
    """Catches weights that are poured into a network of another shape with a traceback."""
    recorded = load_recorded(small)
    recorded.policy["components"] = {**recorded.policy["components"], "fc1": {"size": 9}}
    with pytest.raises(RecordError, match="of another policy, loss or optimizer than is found here"):
        replay(recorded)


def test_a_learner_that_is_read_is_not_changed(whole: Path) -> None:
    """Catches a replay that moves what it was read from: twice the same record, twice the same update."""
    recorded = find_recorded(whole, "2")
    before = copied(recorded.shared)
    assert replay(recorded).is_same
    assert same(before, recorded.shared)
    assert replay(recorded).is_same
