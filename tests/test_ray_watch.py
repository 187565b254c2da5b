"""The watch over Ray's head and raylet, against real sockets in their place."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from shoal.actors import ray_watch
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


@pytest.mark.parametrize("full", [ObjectStoreFullError, OutOfDiskError])
@pytest.mark.parametrize("times", [3, 10**9])
def test_weights_wait_for_room_in_the_store(
    watch: RayWatch,
    full: type[Exception],
    times: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a run that ends unsaved, with an update in hand, because the store of its machine was full."""
    monkeypatch.setattr(ray_watch, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(ray_watch, "ROOM_SECONDS", 0.3 if times > 3 else 600.0)
    tries = itertools.count()

    def put(value: str) -> str:
        if next(tries) < times:
            raise full("no room")
        return f"stored {value}"

    assert watch.put("weights", put, (ObjectStoreFullError, OutOfDiskError)) == (
        "stored weights" if times == 3 else "weights"
    )
    assert watch.lost.is_set() == (times > 3)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("Ray's object store on this machine has no room (no room")
    assert len(said) == 1 + (times > 3)
    assert times == 3 or "object store on this machine has had no room for" in said[1]


def test_what_is_under_way_is_known_until_it_returns(places: Places, watch: RayWatch) -> None:
    """Catches a process that is disconnected from a lost Ray under a call of ours: what that call does next starts a
    Ray of its own, in vain, and Ray ends the process a minute later."""
    left, pumping, pumped = threading.Event(), threading.Event(), threading.Event()

    def pump(_: float) -> None:
        pumping.set()
        pumped.wait()

    guarded = watch.pump(pump)
    pumps = threading.Thread(target=guarded, args=(0.0,), daemon=True)
    pumps.start()
    pumping.wait()
    threading.Timer(0.1, places.end, ["head"]).start()
    assert watch.call(left.wait) is None
    assert not watch.settle(0.01)
    left.set()
    assert not watch.settle(0.2)
    pumped.set()
    assert watch.settle(60.0)
    pumps.join()
    pumped.clear()
    guarded(0.0)  # would wait for ever
    assert watch.call(pytest.fail) is None


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


@contextlib.contextmanager
def out_of_reach(places: Places) -> Iterator[Callable[[], None]]:
    """Nobody accepts connections any more, as behind a network that is down; yields what ends that."""
    places.head.listen(0)
    host, port = places.head.getsockname()
    waiting: list[socket.socket] = []
    for _ in range(4):
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex((host, port))

    def end() -> None:
        places.head.listen(1000)
        places.head.setblocking(False)
        for each in waiting:
            each.close()
        with contextlib.suppress(BlockingIOError):
            while True:
                places.head.accept()[0].close()

    yield end
    for each in waiting:
        each.close()


@pytest.fixture
def patient(places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], RayWatch]]:
    """Makes a watch that looks when it is asked, of a Ray with that tolerance beyond the time for saving."""
    monkeypatch.setattr(ray_watch, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 3600.0)
    made: list[RayWatch] = []

    def make(patience: float) -> RayWatch:
        made.append(RayWatch(places.address, places.path, "Do something", ray_watch.SAVING_SECONDS + patience))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_head_that_is_out_of_reach_for_a_while_ends_no_run(
    places: Places, patient: Callable[[float], RayWatch], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends for a network that was down for ten seconds, which Ray itself bears for a minute; and
    nothing saved meanwhile."""
    watch, warned = patient(3600.0), Counter[str]()
    watch.warn(lambda: warned.update(["warned"]))
    watch.tell(lambda: warned.update(["lost"]))
    with out_of_reach(places) as end:
        assert not watch.look()
        assert not watch.look()
        assert warned == Counter(warned=1)
        end()
    assert not watch.look()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "does not answer any more" in said[0]
    assert "the run ends if that lasts for 3600 s" in said[0]
    assert said[1] == "Ray's head answers again"
    places.end("head")  # a closed port is not waited for
    assert watch.look()
    assert warned == Counter(warned=1, lost=1)


def test_a_head_that_is_started_again_is_waited_for(
    places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends with its head where the cluster starts that again, which Ray bears for a minute."""
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 3600.0)
    patience = ray_watch.SAVING_SECONDS + 3600.0
    port = int(places.address.rpartition(":")[2])
    watch, warned = RayWatch(places.address, places.path, "", patience, head_may_return=True), Counter[str]()
    watch.warn(lambda: warned.update(["warned"]))
    try:
        places.end("head")
        assert not watch.look()
        assert not watch.look()
        assert warned == Counter(warned=1)
        with socket.create_server(("127.0.0.1", port)):
            assert not watch.look()
        assert caplog.records[-1].getMessage() == "Ray's head answers again"
        monkeypatch.setattr(watch, "_patience", 0.0)
        assert watch.look()
    finally:
        watch.close()


def test_a_name_that_is_not_found_is_no_end_of_the_head(
    places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that takes names out of reach for a lost head, or a head whose name went with its pod for one that
    lives: Ray ends the process a minute later, unsaved."""
    monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(ray_watch, "ANSWER_SECONDS", 0.2)
    found, known = socket.getaddrinfo, True

    def find(host: str, *arguments: Any, **kwargs: Any) -> Any:
        if host == "head.test" and not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found("127.0.0.1" if host == "head.test" else host, *arguments, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", find)
    address = f"head.test:{places.address.rpartition(':')[2]}"
    patience = ray_watch.SAVING_SECONDS + 3600.0
    watch = RayWatch(address, places.path, "", patience)
    try:
        assert not watch.look()
        known = False
        assert not watch.look()
        assert not caplog.records
        with out_of_reach(places):
            assert not watch.look()
            assert "does not answer any more" in caplog.records[-1].getMessage()
        assert not watch.look()
        places.end("head")
        assert watch.look()
    finally:
        watch.close()


def test_a_head_that_stays_out_of_reach_is_lost(places: Places, patient: Callable[[float], RayWatch]) -> None:
    """Catches a run that waits until Ray ends its process."""
    watch = patient(0.0)
    with out_of_reach(places):
        assert watch.look()
    assert "does not answer any more" in watch.why


def test_an_error_is_raised_when_the_head_is_back(
    places: Places, patient: Callable[[float], RayWatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error of somebody else's that is taken for the loss of a head that came back."""
    watch = patient(3600.0)
    with out_of_reach(places) as end:
        assert not watch.look()
        monkeypatch.setattr(ray_watch, "LOOK_SECONDS", 0.05)
        threading.Timer(0.5, end).start()
        with pytest.raises(LookupError):
            watch.call(fails)
    assert not watch.lost.is_set()


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


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_ray_that_ends_with_an_interrupted_run_is_no_error(
    interrupted: bool, places: Places, watch: RayWatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches "Ray is lost" after SIGTERM to the process group, as schedulers send it; and silence without one."""
    caplog.set_level("INFO")
    watch.expect_end(lambda: interrupted)
    places.end("raylet")
    assert watch.lost.wait(30)
    (level,) = {record.levelname for record in caplog.records if "Ray is lost" in record.getMessage()}
    assert level == ("INFO" if interrupted else "ERROR")
