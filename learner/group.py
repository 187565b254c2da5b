"""Learners that share one update: each has a part of the batch, all add up their gradients and make the same step.

They talk over ``torch.distributed``: gloo between CPUs, NCCL between GPUs (several GPUs have not been tried). A new
group is made whenever a learner comes or goes; rank 0 is the run's own process, and its state is copied to the others.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import io
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not in its __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

LOOK = datetime.timedelta(seconds=0.5)
"""How often who waits for the others looks whether anybody can still be reached."""
SIOCGIFADDR = 0x8915 if sys.platform == "linux" else 0xC0206921
"""The ioctl request for an interface's address, on Linux and on systems derived from BSD."""


class LearnerLost(RuntimeError):
    """Another learner of the group died, hung or gave up; this update is not made."""


class Group(Protocol):
    """The learners that make every update together, as one of them sees them."""

    rank: int
    """This learner's place."""
    size: int
    """Number of learners."""
    seconds: float
    """Seconds spent in adding up and in waiting for slower learners."""

    def sum_(self, x: Tensor) -> None:
        """Add ``x`` over all learners, in place and in the order of their ranks.

        Raises:
            LearnerLost: another learner did not take part.
        """


class LearnerGroup:
    """This process's place among the learners; one group per process at a time.

    Args:
        device: the learner's device; between GPUs tensors are added up with NCCL.
        store: the meeting point of the members; made by ``open_store`` on rank 0, by ``join_store`` elsewhere.
        generation: number of this group in the run.
        rank: this learner's place, 0 in the run's own process.
        size: number of learners.
        timeout_seconds: longest time to wait for the others.
        out_of_reach: set when nobody can be reached any more: who waits for the others then gets ``LearnerLost``.

    Raises:
        LearnerLost: not all members came within that time.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: torch.device,
        generation: int,
        rank: int,
        size: int,
        timeout_seconds: float,
        out_of_reach: threading.Event | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._out_of_reach = out_of_reach or threading.Event()
        self._is_left_behind = False
        """What others were asked for may go on until its time limit."""
        self.seconds = 0.0
        """Seconds spent in adding up and in waiting for slower learners."""
        with _lost("joining"):
            dist.init_process_group(
                # Plain data travels as CPU tensors in either case.
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(str(generation), store),
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_seconds),
            )

    def sum_(self, x: Tensor) -> None:
        """Add ``x`` over all learners, in place and in the order of their ranks: the bits are those of one learner that
        adds the same shards, whatever the transport does.

        Raises:
            LearnerLost: another learner did not take part.
        """
        start = time.perf_counter()
        with _lost("adding up"):
            if self.size <= 2:
                self._wait(x, dist.all_reduce(x, async_op=True))  # a + b is b + a
            else:
                self._sum_in_order(x)
        self.seconds += time.perf_counter() - start

    def _sum_in_order(self, x: Tensor) -> None:
        """Every learner adds one part of ``x`` and gives the others its sum: the traffic of an all-reduce.

        An all-reduce itself adds in an order that differs from part to part, and so does the rounding.
        """
        part = -(-x.numel() // self.size)
        mine = x.new_zeros(self.size * part)
        mine[: x.numel()] = x.reshape(-1)
        parts = torch.empty_like(mine)
        self._wait(x, dist.all_to_all_single(parts, mine, async_op=True))
        total, *others = parts.split(part)
        for other in others:
            total += other
        self._wait(x, dist.all_gather(list(mine.split(part)), total.clone(), async_op=True))
        x.copy_(mine[: x.numel()].view_as(x))

    def broadcast(self, state: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's ``state`` (tensors and plain data), in every learner.

        Raises:
            LearnerLost: another learner did not take part.
        """
        buffer = io.BytesIO()
        if self.rank == 0:
            torch.save(state, buffer)
        payload = torch.frombuffer(bytearray(buffer.getvalue() or b"\0"), dtype=torch.uint8)
        size = torch.tensor([len(payload)])
        with _lost("sharing the weights"):
            self._wait(size, dist.broadcast(size, 0, async_op=True))
            if self.rank:
                payload = torch.empty(int(size), dtype=torch.uint8)
            self._wait(payload, dist.broadcast(payload, 0, async_op=True))
        if self.rank == 0:
            return state
        loaded: dict[str, Any] = torch.load(io.BytesIO(payload.numpy().tobytes()), weights_only=True)
        return loaded

    def _wait(self, x: Tensor, work: dist.Work) -> None:
        """Wait for what was asked of the others with ``x``.

        Raises:
            LearnerLost: nobody can be reached any more.
            RuntimeError: another learner did not take part.
        """
        if x.is_cuda:
            work.wait()  # the device waits, not this thread
            return
        while True:
            try:
                work.wait(LOOK)
                return
            except RuntimeError:  # it has failed, or is not done yet
                if work.is_completed():
                    work.wait()
                    return
            if self._out_of_reach.is_set():
                self._is_left_behind = True
                raise LearnerLost("a learner was waited for, and nobody can be reached any more")

    def close(self) -> None:
        """Leave the group; a learner that still waits for this one gets ``LearnerLost`` at once."""
        if not dist.is_initialized():
            return
        if self._is_left_behind:
            # It waits for what is under way.
            threading.Thread(target=dist.destroy_process_group, name="learner-group-end", daemon=True).start()
        else:
            dist.destroy_process_group()


def open_store(address: str, timeout_seconds: float) -> TCPStore:
    """The meeting point of a group, on a free port of this machine (``store.port``)."""
    return TCPStore(
        address, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_seconds)
    )


def join_store(address: str, port: int, timeout_seconds: float) -> TCPStore:
    """The meeting point that rank 0 opened."""
    return TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_seconds))


def use_interface(address: str) -> None:
    """Meet the others on the network interface of ``address`` (IPv4), whatever this machine's name resolves to.

    Where no interface has that address gloo chooses; GLOO_SOCKET_IFNAME, if set, has precedence.
    """
    if name := _interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


@contextlib.contextmanager
def _lost(doing: str) -> Iterator[None]:
    try:
        yield
    except LearnerLost:
        raise
    except RuntimeError as error:  # all errors of torch.distributed are of this class
        raise LearnerLost(f"a learner was lost while {doing}: {error}") from error
