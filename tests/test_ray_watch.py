"""The watch over Ray's head and raylet, against real sockets in their place."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shoal.actors.ray_watch import RayWatch


class Places:
    """A head and a raylet, as far as a watch sees them."""

    def __init__(self, directory: Path) -> None:
        self.head, self.raylet = socket.socket(), socket.socket(socket.AF_UNIX)
        self.head.bind(("127.0.0.1", 0))
        self.path = str(directory / "raylet")
        self.raylet.bind(self.path)
        for place in (self.head, self.raylet):
            place.listen(1000)

    @property
    def address(self) -> str:
        host, port = self.head.getsockname()
        return f"{host}:{port}"

    def end(self, which: str) -> None:
        """As a kernel does with the sockets of a process that ended."""
        place = getattr(self, which)
        place.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                place.accept()[0].close()
        place.close()


@pytest.fixture
def places() -> Iterator[Places]:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # a short path: it is that of a socket
        made = Places(Path(directory))
        yield made
        made.head.close()
        made.raylet.close()


@pytest.fixture
def watch(places: Places) -> Iterator[RayWatch]:
    made = RayWatch(places.address, places.path, "Do something")
    yield made
    made.close()


@pytest.mark.parametrize("which", ["head", "raylet"])
def test_the_end_of_either_is_noticed_and_lets_everybody_go(
    places: Places, watch: RayWatch, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that waits on for a Ray that is gone, with nothing said."""
    told, never = threading.Event(), threading.Event()
    watch.tell(told.set)
    threading.Timer(0.1, places.end, [which]).start()
    assert watch.call(never.wait) is None
    assert told.is_set()
    assert watch.lost.is_set()
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("Ray is lost: ")
    assert {"head": places.path, "raylet": watch.why}[which] != ""
    assert said.endswith("the run saves and ends. Do something")
    later = threading.Event()
    watch.tell(later.set)
    assert later.is_set()
    assert watch.call(pytest.fail, "called although Ray is lost") is None
    never.set()


def test_nothing_is_put_where_the_raylet_has_just_ended(places: Places, watch: RayWatch) -> None:
    """Catches a ``ray.put`` between the raylet's end and the next look: it would stop every thread of the process."""
    assert watch.put(5, str) == "5"
    places.end("raylet")
    reached: list[float] = []
    assert watch.put(5, reached.append) == 5
    watch.pump(reached.append)(0.0)
    assert not reached


def fails(*_: object) -> None:
    raise LookupError("as ever")


@pytest.mark.parametrize(
    "act",
    [
        lambda watch: watch.call(fails),
        lambda watch: watch.put(1, fails),
        lambda watch: watch.pump(fails)(0.0),
    ],
    ids=["call", "put", "pump"],
)
def test_errors_that_follow_from_the_loss_are_not_raised(
    places: Places, watch: RayWatch, act: Callable[[RayWatch], object]
) -> None:
    """Catches a run that ends with an error of Ray's, unsaved, because that came before the watch looked."""
    with pytest.raises(LookupError):
        act(watch)
    assert not watch.lost.is_set()
    places.end("head")
    act(watch)
    assert watch.lost.is_set()


def test_what_lives_is_not_taken_for_dead(places: Places, watch: RayWatch) -> None:
    """Catches a run that ends because a raylet closed an idle connection, was busy, had its socket's name removed by a
    cleaner of /tmp, or because this process itself had no descriptor left."""
    connection, _ = places.raylet.accept()
    assert not watch.look()
    connection.close()
    assert not watch.look()
    again, _ = places.raylet.accept()
    os.unlink(places.path)
    assert not watch.look()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        assert not watch.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    again.close()


def test_a_raylet_that_takes_no_more_connections_lives(places: Places) -> None:
    """Catches a busy raylet that is taken for dead."""
    places.raylet.listen(0)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(places.path)
        watch = RayWatch(places.address, places.path, "")
        try:
            assert not watch.look()
        finally:
            watch.close()


def test_a_watch_that_is_closed_leaves_nothing_and_says_nothing(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a thread or a descriptor for every run of a notebook, and a warning when Ray is shut down in good
    order."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        watch = RayWatch(places.address, places.path, "")
        assert watch.call(int, "7") == 7
        watch.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    places.end("head")
    places.end("raylet")
    watch.look()
    assert not caplog.records
