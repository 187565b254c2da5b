"""Makes a recorded update again: by the learner's own code, with as many learners, shards and threads as in the run.

Several learners are threads of this process, which add up their gradients in the order of their ranks.
"""

# B segments

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from shoal.learner.contributions import Contribution
from shoal.learner.described_policy import make_described_policy
from shoal.learner.device_choice import check_device, check_precision, make_device_path
from shoal.learner.group import LearnerLost
from shoal.learner.learner import Learner, NonFiniteUpdate, UpdateResult
from shoal.learner.learner_worker import not_finite
from shoal.learner.recorded_updates import RecordedUpdate, RecordError, machine
from shoal.learner.recorder import Outcome, copied
from shoal.policy.weights import flatten_weights
from tensordict import TensorDict
from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """A recorded update that was made again."""

    recorded: RecordedUpdate
    contributions: list[Contribution]
    """Every segment's, before the update, by learner and row of its batch; empty where they cannot be told."""
    why_not_told: str
    """The error that one segment alone raised, in the user's loss perhaps; empty where there was none."""
    outcome: Outcome
    result: UpdateResult | None
    """Rank 0's; None where the update was not made."""
    error: str
    """Why it was not made."""
    weights_hash: str
    """Content hash of the weights after it."""
    machine: dict[str, str]
    """``recorded_updates.machine``, here."""

    @property
    def is_same(self) -> bool:
        """Whether it ended as it did in the run: the same weights, to the last bit, or the same error."""
        if self.outcome != self.recorded.outcome:
            return False
        if self.outcome == "failed":
            return self.error == self.recorded.error
        return self.weights_hash == self.recorded.weights_hash


def replay(recorded: RecordedUpdate) -> Replay:
    """Make an update again.

    Raises:
        RecordError: the policy, the loss or another part that it names is not here, or is another one than recorded.
    """
    threads = torch.get_num_threads()
    learners: list[Learner] = []
    try:
        torch.set_num_threads(recorded.torch_threads)
        with _as_sentences(recorded):
            learners += (_make_learner(recorded, rank) for rank in range(recorded.num_learners))
            _load(learners, recorded)
        batches = [_batch(part.batch, learners[0]) for part in recorded.parts]
        found: list[list[Contribution]] = []
        why_not_told = ""
        try:
            found = _together(learners, lambda rank: learners[rank].contributions(batches[rank]))
        except Exception as failed:  # noqa: BLE001  (the user's loss or policy may raise any)
            why_not_told = f"{type(failed).__name__}: {failed}"
        # Values may have got their first unit, and a loss may have drawn random numbers.
        _load(learners, recorded)
        outcome: Outcome = "made"
        result, error = None, ""
        try:
            result, *_ = _together(learners, lambda rank: learners[rank].update(batches[rank]))
        except NonFiniteUpdate as refused:
            outcome, error = "skipped", str(refused)
        except Exception as failed:  # noqa: BLE001  (the user's loss, policy or optimizer may raise any)
            outcome, error = "failed", f"{type(failed).__name__}: {failed}"
        weights = flatten_weights(learners[0].policy, learners[0].policy_version)
        if outcome == "made" and not np.isfinite(weights.flat).all():
            outcome, result, error = "failed", None, not_finite(weights.policy_version)
        return Replay(
            recorded=recorded,
            contributions=[one for of_learner in found for one in of_learner],
            why_not_told=why_not_told,
            outcome=outcome,
            result=result,
            error=error,
            weights_hash=weights.content_hash,
            machine=machine(learners[0]),
        )
    finally:
        for learner in learners:
            learner.close()
        torch.set_num_threads(threads)


@contextmanager
def _as_sentences(recorded: RecordedUpdate) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise RecordError(
            f"{recorded.path} holds an update of another policy, loss or optimizer than is found here under the names "
            f"{recorded.policy.get('kind')}, {recorded.config.loss} and {recorded.config.optimizer}: {error}"
        ) from error


def _make_learner(recorded: RecordedUpdate, rank: int) -> Learner:
    config = recorded.config
    if check_device(config):
        config = dataclasses.replace(config, device="auto")
    if check_precision(config):
        config = dataclasses.replace(config, precision="auto")
    path = make_device_path(config)
    with torch.random.fork_rng(devices=[]):
        policy = make_described_policy(recorded.policy, recorded.observation).to(path.device)
    place = recorded.parts[rank].own["shards"]
    learner = Learner(policy, config, path, **place, total_env_steps=recorded.total_env_steps or None, seed=0)
    path.prepare(policy)
    return learner


def _load(learners: Sequence[Learner], recorded: RecordedUpdate) -> None:
    # What is loaded must not share memory with the record, which is loaded twice.
    for learner, part in zip(learners, recorded.parts, strict=True):
        shared = copied(recorded.shared)
        _keep_kinds(shared["optimizer"], learner.optimizer)
        learner.load_shared_state(shared)
        learner.load_own_state(copied(part.own))


def _keep_kinds(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Make tuples of the lists that JSON made of them."""
    for saved, own in zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True):
        saved.update({name: tuple(saved[name]) for name, value in own.items() if isinstance(value, tuple)})


def _batch(columns: dict[str, Tensor], learner: Learner) -> TensorDict:
    return learner.path.to_device(TensorDict(dict(columns), batch_size=[len(columns["reward"])]))


def _together(learners: Sequence[Learner], function: Callable[[int], T]) -> list[T]:
    """The results of ``function`` for every rank, each in a thread of its own where there are several.

    Raises:
        Exception: what the first learner to fail raised.
    """
    if len(learners) == 1:
        return [function(0)]
    meeting = _Meeting(len(learners))
    for rank, learner in enumerate(learners):
        learner.group = _Member(rank, meeting)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(learners), "learner", torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(meeting.attend, function, rank) for rank in range(len(learners))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, LearnerLost)):
        raise error
    return [future.result() for future in futures]


class _Meeting:
    """Where the learners of this process add up."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size)

    def attend(self, function: Callable[[int], T], rank: int) -> T:
        """The function's result; after an error nobody waits for this learner."""
        try:
            return function(rank)
        except BaseException:
            self.barrier.abort()
            raise


class _Member:
    """``learner.group.Group``: one learner's place in a meeting."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.size = rank, meeting.size
        self.seconds = 0.0
        self._meeting = meeting

    def sum_(self, x: Tensor) -> None:
        """As ``LearnerGroup.sum_``."""
        meeting = self._meeting
        meeting.given[self.rank] = x
        try:
            meeting.barrier.wait()
            total = meeting.given[0].clone()
            for other in meeting.given[1:]:
                total += other
            meeting.barrier.wait()  # all have read before any writes
        except threading.BrokenBarrierError as error:
            raise LearnerLost("another learner raised an error") from error
        x.copy_(total)
        meeting.barrier.wait()  # nobody gives the next tensor before all have written
