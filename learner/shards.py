"""Shards: the parts of a batch whose gradients are computed apart and added in shard order.

The result does not depend on which shard was ready first. Shards are computed one after the other, or each by a
gradient thread of its own (with one torch thread, so that no thread spins on another), or by several learners.
"""

# B segments

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

T = TypeVar("T")


class Shards:
    """Cuts batches, divides shards into minibatches and runs functions over them.

    Args:
        num_shards: largest number of parts that a batch is cut into.
        first_shard: number of the first one among the shards of all learners.
        num_threads: gradient threads; 1 runs everything in the caller's thread.
        seed: of the run; each shard draws from a stream of its own.
    """

    def __init__(self, *, num_shards: int, first_shard: int, num_threads: int, seed: int, device: torch.device) -> None:
        self._device = device
        self._threads = (
            ThreadPoolExecutor(num_threads, "gradient", torch.set_num_threads, (1,)) if num_threads > 1 else None
        )
        self.place = {"num_shards": num_shards, "first_shard": first_shard, "num_threads": num_threads}
        """The arguments, as plain data."""
        streams = range(first_shard, first_shard + num_shards)
        self._generators = [torch.Generator().manual_seed(_stream_seed(seed, stream)) for stream in streams]

    def cut(self, batch: TensorDict, minibatches: int) -> list[TensorDict]:
        """The shards of a batch [B], as views; each has at least ``minibatches`` segments."""
        most = batch.shape[0] // minibatches
        return [batch[rows] for rows in _ranges(batch.shape[0], min(len(self._generators), most))]

    def minibatches(self, sizes: Sequence[int], epochs: int, minibatches: int) -> Iterator[list[Tensor | None]]:
        """Yield for every optimizer step the segments of each shard, as indices; None stands for the whole shard.

        Every segment comes once per epoch. Each shard of ``sizes`` segments is divided by a random stream of its own:
        which segments share an optimizer step does not depend on how many processes the shards are spread over.
        """
        for _ in range(epochs):
            if minibatches == 1:
                yield [None] * len(sizes)
                continue
            orders = [
                torch.randperm(size, generator=generator).to(self._device)
                for size, generator in zip(sizes, self._generators, strict=False)
            ]
            split = [order.tensor_split(minibatches) for order in orders]
            yield from map(list, zip(*split, strict=True))

    def map(self, function: Callable[..., T], *arguments: Sequence[Any]) -> list[T]:
        """The results of ``function`` for every shard, in shard order."""
        if self._threads is None:
            return [function(*each) for each in zip(*arguments, strict=True)]
        return list(self._threads.map(function, *arguments))

    def random_state(self) -> list[Tensor]:
        """States of the streams that divide shards."""
        return [generator.get_state() for generator in self._generators]

    def load_random_state(self, states: Sequence[Tensor]) -> None:
        """Continue the streams of ``random_state``; shards that did not exist then keep fresh ones."""
        for generator, saved in zip(self._generators, states, strict=False):
            generator.set_state(saved.cpu())

    def close(self) -> None:
        """End the gradient threads."""
        if self._threads is not None:
            self._threads.shutdown()


def add(parts: list[Tensor]) -> Tensor:
    """The sum of ``parts`` in shard order; it overwrites the first one."""
    for more in parts[1:]:
        parts[0] += more
    return parts[0]


def rows_of(batch: TensorDict, index: Tensor | None) -> TensorDict:
    """Segments ``index`` of a shard; the whole shard for None."""
    if index is None:
        return batch
    # Not batch[index], which moves a row of bytes one by one: five times as slow.
    columns = cast(Mapping[str, Tensor], dict(batch.items()))
    return TensorDict({name: column.index_select(0, index) for name, column in columns.items()}, index.shape)


def _ranges(total: int, parts: int) -> list[slice]:
    """``parts`` contiguous slices of nearly equal size that cover ``total``; at most ``total`` of them."""
    parts = min(parts, total)
    edges = [total * i // parts for i in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _stream_seed(seed: int, stream: int) -> int:
    """A seed for one of several independent streams of one run."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0] >> 1)
