"""Notices that Ray's head or this machine's raylet has ended, which Ray tells nobody.

Ray's calls then wait for up to a minute, or hold the whole process, and in the end Ray ends the process. A run that
knows of it saves and ends before.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 0.5
"""Pause between two looks that must both fail."""
ANSWER_SECONDS = 5.0
"""How long a head may take to accept a connection: its kernel does so however busy it is."""
TOLERANCE_SECONDS = 60.0
"""How long Ray lets a head be out of reach before it ends the process, if it is not told otherwise."""
ROOM_SECONDS = 60.0
"""How long the object store may have no room for new weights."""
SAVING_SECONDS = 15.0
"""Of these, what is left for saving when the run ends."""
_GONE = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOENT,
        errno.ETIMEDOUT,
    }
)
"""Errors that say something about the other side; any other is this process's own, such as a lack of descriptors."""

Value = TypeVar("Value")


class RayLost(RuntimeError):
    """Ray's head or the raylet of this machine ended under the run."""


class Missing(NamedTuple):
    """What is not found."""

    what: str
    """The beginning of a sentence."""
    may_return: bool
    """It does not answer, and nothing says that it has ended: the network may be down."""


class RayWatch:
    """Looks once a second, from a thread of its own, and keeps others from waiting for a Ray that is gone.

    Args:
        head: ``host:port`` of the head (GCS). It gets a new connection every time: it may be on another machine, which
            ends without a word.
        raylet: path of the raylet's socket; empty where there is none. One connection is held, which the kernel closes
            when the raylet ends.
        advice: what to do, at the end of the warning.
        tolerance: seconds that Ray lets a head be out of reach.
        head_may_return: whether one that has ended may be started again with what it knew (GCS fault tolerance).
    """

    def __init__(
        self,
        head: str,
        raylet: str,
        advice: str,
        tolerance: float = TOLERANCE_SECONDS,
        *,
        head_may_return: bool = False,
    ) -> None:
        self.lost = threading.Event()
        self.why = ""
        """The warning, once Ray is lost."""
        self.head, self._raylet_path, self._advice = head, raylet, advice
        self._patience = max(tolerance - SAVING_SECONDS, 0.0)
        self._head_may_return = head_may_return
        self._head_places: list[tuple[Any, ...]] = []
        """Where the head's name was found last, as ``socket.getaddrinfo`` answers."""
        self._missing_since: float | None = None
        """Monotonic time since when the head has been out of reach."""
        self._raylet: socket.socket | None = None
        if raylet:
            with contextlib.suppress(OSError):  # tried again, and judged, at the next look
                self._raylet = _connect_local(raylet)
        self._looking, self._lock = threading.Lock(), threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._waiting: set[threading.Event] = set()
        self._calls = 0
        """Calls of Ray's that are under way, waited for or not."""
        self._interrupted: Callable[[], bool] = lambda: False
        self._told: list[Callable[[], object]] = []
        self._warned: list[Callable[[], object]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="ray-watch", daemon=True)
        self._thread.start()

    def tell(self, told: Callable[[], object]) -> None:
        """Call ``told`` when Ray is lost, from any thread; at once if it is."""
        with self._lock:
            self._told.append(told)
            lost = self.lost.is_set()
        if lost:
            told()

    def expect_end(self, interrupted: Callable[[], bool]) -> None:
        """Take the end of Ray for no fault while ``interrupted()``: a signal to a whole process group, or a scheduler,
        ends Ray with the run."""
        self._interrupted = interrupted

    def warn(self, warned: Callable[[], object]) -> None:
        """Call ``warned``, from another thread, whenever the head begins to be out of reach: Ray may be lost soon."""
        with self._lock:
            self._warned.append(warned)

    def look(self) -> bool:
        """Return whether Ray is lost: one of the two was not found twice in a row, and cannot come back in time."""
        with self._looking:
            begun = time.monotonic()
            missing = None if self.lost.is_set() else self._missing()
            if missing and not self._closed.wait(AGAIN_SECONDS):
                missing = self._missing()
            if not self._closed.is_set() and not self.lost.is_set():
                self._judge(missing, begun)
        return self.lost.is_set()

    def _judge(self, missing: Missing | None, begun: float) -> None:
        if missing is None:
            if self._missing_since is not None:
                log.warning("Ray's head answers again")
            self._missing_since = None
            return
        first = self._missing_since is None
        self._missing_since = begun if self._missing_since is None else self._missing_since
        if not missing.may_return or time.monotonic() - self._missing_since >= self._patience:
            self.lose(missing.what)
        elif first:
            log.warning(
                "%s; a checkpoint is saved after the next update, and the run ends if that lasts for %.0f s",
                missing.what,
                self._patience,
            )
            with self._lock:
                warned = list(self._warned)
            for each in warned:
                each()

    def _is_lost_in_the_end(self) -> bool:
        """Whether Ray is lost, after a wait for a head that is out of reach."""
        while not self.look():
            if self._missing_since is None:
                return False
            self.lost.wait(LOOK_SECONDS)
        return True

    def call(self, function: Callable[..., Value], *arguments: Any) -> Value | None:
        """The value of a call that may wait for Ray. Where Ray is lost, None at once: the call is left to its thread.

        Raises:
            BaseException: what the call raised, unless that is because Ray is lost.
        """
        values: list[Value] = []
        errors: list[BaseException] = []
        settled = threading.Event()

        def work() -> None:
            try:
                values.append(function(*arguments))
            except BaseException as error:  # noqa: BLE001  (raised by who waits)
                errors.append(error)
            finally:
                self._end_call()
            settled.set()

        if not self._begin_call(settled):
            return None
        threading.Thread(target=work, name="ray-call", daemon=True).start()
        settled.wait()
        with self._lock:
            self._waiting.discard(settled)
        if self.lost.is_set() or (errors and self._is_lost_in_the_end()):
            return None
        if errors:
            raise errors[0]
        return values[0]

    def _begin_call(self, *waiting: threading.Event) -> bool:
        """Whether a call may be made, which ``_end_call`` then follows: not where Ray is lost.

        ``waiting`` are set when Ray is lost.
        """
        with self._lock:
            if self.lost.is_set():
                return False
            self._calls += 1
            self._waiting.update(waiting)
        return True

    def _end_call(self) -> None:
        with self._returned:
            self._calls -= 1
            self._returned.notify_all()

    def settle(self, seconds: float) -> bool:
        """Whether all calls have returned that were under way when Ray was lost, after a wait of at most ``seconds``.

        No other begins where Ray is lost.
        """
        with self._returned:
            return self._returned.wait_for(lambda: self._calls == 0, seconds)

    def put(self, value: Any, put: Callable[[Any], Any], no_room: tuple[type[Exception], ...] = ()) -> Any:
        """``put(value)``; where Ray is lost the value itself, which nobody will fetch.

        Ray's own ``put`` would hold the whole process, all threads of it, where there is no raylet. Where its store has
        no room for the value, nor a disk to spill to (errors of the classes ``no_room``), it is tried again for
        ``ROOM_SECONDS``; then Ray is called lost.
        """
        full_since: float | None = None
        while not self.out_of_reach():
            try:
                return put(value)
            except no_room as error:
                now = time.monotonic()
                if full_since is None:
                    full_since = now
                    log.warning("Ray's object store on this machine has no room (%s); tried again", _first_line(error))
                elif now - full_since > ROOM_SECONDS:
                    self.lose(f"its object store on this machine has had no room for {ROOM_SECONDS:.0f} s")
                self.lost.wait(AGAIN_SECONDS)
            except Exception:
                if self._is_lost_in_the_end():
                    break
                raise
        return value

    def pump(self, pump: Callable[[float], None]) -> Callable[[float], None]:
        """``pump`` of a pool, which does nothing where Ray is lost.

        The run then ends for that reason, and not for the errors that follow from it.
        """

        def guarded(timeout: float) -> None:
            if self.out_of_reach() or not self._begin_call():
                time.sleep(timeout)
                return
            try:
                pump(timeout)
            except Exception:
                if not self._is_lost_in_the_end():
                    raise
            finally:
                self._end_call()

        return guarded

    def close(self) -> None:
        """End the thread; from now on Ray may end."""
        self._closed.set()
        self._thread.join()
        if self._raylet is not None:
            self._raylet.close()
            self._raylet = None

    def out_of_reach(self) -> bool:
        """Return whether Ray is lost or its raylet is, by a glance that costs a microsecond."""
        return self.lost.is_set() or (self._raylet is not None and _is_closed(self._raylet) and self.look())

    def _keep_looking(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            if self.look():
                return

    def _missing(self) -> Missing | None:
        """What is not found; None where all is well."""
        if self._raylet_path and (self._raylet is None or _is_closed(self._raylet)):
            try:
                fresh = _connect_local(self._raylet_path)
            except OSError as error:
                if error.errno in _GONE:
                    what = "the raylet of this machine, the process through which Ray is reached, has ended"
                    return Missing(what, may_return=False)
            else:
                before, self._raylet = self._raylet, fresh
                if before is not None:
                    before.close()
        try:
            self._reach_head()
        except OSError as error:
            # A time limit of Python's own has no number.
            if isinstance(error, TimeoutError) or error.errno in _GONE:
                what = f"Ray's head (GCS) at {self.head} does not answer any more ({error})"
                # A refusal comes from its machine: no process has the port any more.
                has_ended = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)
                return Missing(what, may_return=self._head_may_return or not has_ended)
        return None

    def _reach_head(self) -> None:
        """Connect to the head, where its name is found now; where it is not, where it was found last.

        Kubernetes takes the name of a head away with its pod, which says nothing yet: names may be out of reach while
        the head is not.

        Raises:
            OSError: that does not succeed.
        """
        host, _, port = self.head.rpartition(":")
        try:
            self._head_places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except socket.gaierror:
            if not self._head_places:
                raise
        errors = []
        for family, kind, protocol, _, place in self._head_places:
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(ANSWER_SECONDS)
                try:
                    connection.connect(place)
                except OSError as error:
                    errors.append(error)
                else:
                    return
        raise errors[0]

    def lose(self, missing: str) -> None:
        """Call Ray lost, unless it is: what is ``missing`` is the rest of a sentence after "Ray is lost: "."""
        with self._lock:
            if self.why:
                return
            self.why = f"Ray is lost: {missing}"
        if self._interrupted():
            log.info("%s; the run was interrupted and ends in any case", self.why)
        else:
            log.error("%s; the run saves and ends. %s", self.why, self._advice)
        with self._lock:
            self.lost.set()
            waiting, told = list(self._waiting), list(self._told)
        for settled in waiting:
            settled.set()
        for each in told:
            each()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _connect_local(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        # A busy raylet that has not taken the last ones yet is not waited for.
        connection.setblocking(False)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the other side has closed it; it never sends anything."""
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
