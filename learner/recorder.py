"""The flight recorder of one learner: the last updates in memory, each with everything that decided it.

Copies are made before an update. Nothing is written while updates go well (``learner.recorded_updates`` writes).
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

from shoal.learner.config import RecorderConfig
from shoal.learner.learner import Learner
from tensordict import TensorDict
from torch import Tensor

log = logging.getLogger(__name__)

Outcome = Literal["made", "skipped", "failed"]
"""``failed``: something raised an error in the middle of the update, or the new weights were not finite."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Recorded:
    """One update in memory, as it began, and what became of it."""

    attempt: int
    """``Learner.attempts`` before it; updates of the learners of one group that have the same one belong together."""
    policy_version: int
    """The version that it makes."""
    rank: int
    num_learners: int
    shared: dict[str, Any] | None
    """Copy of ``Learner.shared_state``; None in peer learners, where it is the same as in rank 0."""
    own: dict[str, Any]
    """Copy of ``Learner.own_state``."""
    batch: dict[str, Tensor]
    """Copy of this learner's batch, by column."""
    num_bytes: int
    outcome: Outcome = "failed"
    weights_hash: str = ""
    """Content hash of the weights after it; empty where it failed."""
    error: str = ""
    terms: dict[str, float] = dataclasses.field(default_factory=dict)
    """``UpdateResult.terms``."""
    written: bool = False

    def on_cpu(self) -> Recorded:
        """The same in this machine's memory."""
        return dataclasses.replace(self, batch=_mapped(self.batch, Tensor.cpu), own=_mapped(self.own, Tensor.cpu))


class Recorder:
    """Keeps the last updates of one learner, and those that were skipped or failed until they are written.

    Args:
        keeps_weights: whether this is rank 0, which keeps what all learners share.
        policy: the policy's name, where several are trained: the warning begins with it.
    """

    def __init__(self, config: RecorderConfig, *, keeps_weights: bool, policy: str = "") -> None:
        self.config = config
        self._keeps_weights, self._policy = keeps_weights, policy
        self._made: deque[Recorded] = deque()
        self._not_made: list[Recorded] = []
        self._begun: Recorded | None = None
        self._w0: tuple[int, dict[str, Tensor]] = (-1, {})
        """The copy of w0 that updates share, which begin with the same, and its generation."""
        self._warned = False

    def begin(self, learner: Learner, batch: TensorDict) -> None:
        """Copy what the update of ``batch`` [B] begins with."""
        self._begun = None
        if not self.config.keep_updates:
            return
        shared, own = learner.shared_state() if self._keeps_weights else None, learner.own_state()
        columns = dict(batch.items())
        num_bytes = sum(x.nbytes for x in _tensors([shared, own, columns]))
        if num_bytes > self.config.max_bytes:
            if not self._warned:
                log.warning(
                    "%supdates are not recorded: one has %s bytes, more than recorder.max_bytes=%s",
                    f"{self._policy}: " if self._policy else "",
                    f"{num_bytes:,}",
                    f"{self.config.max_bytes:,}",
                )
                self._warned = True
            return
        if shared is not None:
            generation = learner.regularizer.generation
            if generation != self._w0[0]:
                self._w0 = generation, copied(shared["regularizer"])
            shared = {**copied({**shared, "regularizer": None}), "regularizer": self._w0[1]}
        self._begun = Recorded(
            attempt=learner.attempts,
            policy_version=learner.policy_version + 1,
            rank=0 if learner.group is None else learner.group.rank,
            num_learners=1 if learner.group is None else learner.group.size,
            shared=shared,
            own=copied(own),
            batch=copied(columns),
            num_bytes=num_bytes,
        )

    def made(self, weights_hash: str, terms: Mapping[str, float]) -> None:
        """The update was made; updates before the last ``keep_updates`` are forgotten."""
        if self._begun is None:
            return
        self._begun.outcome, self._begun.weights_hash, self._begun.terms = "made", weights_hash, dict(terms)
        self._made.append(self._begun)
        self._begun = None
        config, size = self.config, sum(one.num_bytes for one in self._made)
        while len(self._made) > config.keep_updates or size > config.max_bytes:
            size -= self._made.popleft().num_bytes

    def not_made(self, outcome: Outcome, error: str, weights_hash: str = "") -> None:
        """The update was skipped or failed; ``weights_hash`` is that of the weights, which are as before it."""
        if self._begun is None:
            return
        self._begun.outcome, self._begun.error, self._begun.weights_hash = outcome, error, weights_hash
        self._not_made.append(self._begun)
        self._begun = None
        # Where none can be written, as on a full disk, memory stays bounded.
        del self._not_made[: -self.config.keep_updates]

    def forget(self) -> None:
        """The update was given up, because a learner was lost; it cannot be made again."""
        self._begun = None

    def unwritten(self) -> list[Recorded]:
        """Everything that was not written yet, in the order of time."""
        return sorted((one for one in (*self._made, *self._not_made) if not one.written), key=lambda one: one.attempt)

    def was_written(self, attempts: Collection[int]) -> None:
        """These are in files, or with rank 0, which writes them."""
        for one in self._made:
            one.written = one.written or one.attempt in attempts
        self._not_made = [one for one in self._not_made if one.attempt not in attempts]


def copied(value: Any) -> Any:
    """A copy of mappings, lists and tuples that shares no tensor with the original."""
    return _mapped(value, lambda tensor: tensor.detach().clone())


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, function) for part in value]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
