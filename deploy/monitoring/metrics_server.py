"""The endpoint: ``/metrics``, ``/healthz`` and ``/readyz`` over HTTP or HTTPS, whatever its clients do.

Nothing here waits for the training loop, and it for nothing here. A connection has a thread of its own, in which its
TLS handshake happens, too; every wait for a client has an end; there are at most ``MAX_CONNECTIONS``, and whoever is
waited for longest goes when one more comes. A page is made once for all who ask within ``REUSE_SECONDS``.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import CollectorRegistry
from shoal.deploy.monitoring.access import Access

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
PATIENCE_SECONDS = 0.1
"""For a client to say something before it may have to make room."""
REQUEST_SECONDS = 5.0
"""For a TLS handshake, and for a request from its first byte to its last."""
IDLE_SECONDS = 120.0
"""For the next request of a connection: longer than any usual interval between scrapes."""
ANSWER_SECONDS = 10.0
"""For a client to take its answer."""
PAGE_SECONDS = 2.0
"""For a page that somebody else is making; one that takes longer is refused with 503, so that probes get through."""
REUSE_SECONDS = 0.25
REQUESTS_PER_SECOND = 50.0
"""Answered at most, the others wait their turn: each costs most of a millisecond of the processor, and a flood must not
take it from training."""
BURST_SECONDS = 0.5
"""For which a pause is made up by answering at once."""
MAX_REQUEST_BYTES = 16_384
MAX_FORMATS = 8
"""Of one page, which clients may ask for: a version in the Accept header makes another."""
CLOSE_SECONDS = 1.0
"""For answers under way when the server closes."""


class MetricsServer:
    """Serves from threads of its own until ``close``.

    ``/healthz`` says 200 as long as it is served. ``/readyz`` says 200, or 503 and the sentence that ``why_not_ready``
    gives. Both are for probes, which cannot keep secrets, and need no token; ``/metrics`` does where ``access`` is
    given, and then everything is HTTPS.

    Args:
        address: a name or an IPv4 or IPv6 address of this machine; ``::`` takes both.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken or the address is not this machine's.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        address: str,
        port: int,
        why_not_ready: Callable[[], str | None] = lambda: None,
        access: Access | None = None,
    ) -> None:
        self.page = Page(registry)
        self.why_not_ready, self.access = why_not_ready, access
        self._listener = listen(address, port)
        # A look every now and then at whether it shall end: no platform but Linux wakes an accept.
        self._listener.settimeout(0.2)
        self.port: int = self._listener.getsockname()[1]
        host = f"[{address}]" if ":" in address else address
        self.url = f"{'https' if access else 'http'}://{host}:{self.port}/metrics"
        self._closing = threading.Event()
        self._connections: set[_Connection] = set()
        self._changed = threading.Condition()
        self._next_turn = -math.inf
        self._told: set[type[Exception]] = set()
        self._thread = threading.Thread(target=self._accept, name="metrics-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving: answers under way get ``CLOSE_SECONDS``, clients that are waited for nothing."""
        self._closing.set()
        self._thread.join()
        self._listener.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        with self._changed:
            while self._connections:
                left = deadline - time.monotonic()
                for connection in self._connections:
                    if connection.waits_since is not None or left <= 0:
                        connection.abort()
                # Once all are aborted their threads end; one in a reading that hangs is left to its fate.
                if not self._changed.wait(max(left, 0.0) or CLOSE_SECONDS) and left <= 0:
                    break

    def wait_for_turn(self) -> None:
        """Return at most ``REQUESTS_PER_SECOND`` times a second, over all connections."""
        with self._changed:
            now = time.monotonic()
            self._next_turn = max(self._next_turn + 1 / REQUESTS_PER_SECOND, now - BURST_SECONDS)
            wait = self._next_turn - now
        if wait > 0:
            self._closing.wait(wait)

    @property
    def closing(self) -> bool:
        """Whether every connection shall end."""
        return self._closing.is_set()

    def tell(self, what: str, error: Exception) -> None:
        """Log an error, the first one of its kind: clients must not be able to fill a log."""
        if type(error) not in self._told:
            self._told.add(type(error))
            log.error("metrics: %s", what, exc_info=error)

    def forget(self, connection: _Connection) -> None:
        """It has ended."""
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                # Out of file descriptors, as a rule: others may be given back.
                self.tell("a connection could not be accepted", error)
                self._closing.wait(1.0)
                continue
            try:
                self._take_in(client)
            except (OSError, RuntimeError) as error:  # gone already; no thread to be had
                log.debug("metrics: a connection was dropped: %s", error)
                client.close()

    def _take_in(self, client: socket.socket) -> None:
        # Before anything is read: also a handshake that never comes has an end.
        client.settimeout(REQUEST_SECONDS)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.access:
            client = self.access.context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        connection = _Connection(client, self)
        with self._changed:
            self._make_room()
            if self._closing.is_set():
                client.close()
                return
            self._connections.add(connection)
        try:
            connection.start()
        except RuntimeError:
            self.forget(connection)
            client.close()
            raise

    def _make_room(self) -> None:
        while len(self._connections) >= MAX_CONNECTIONS and not self._closing.is_set():
            now = time.monotonic()
            waiting = [(c.waits_since, c) for c in self._connections if c.waits_since is not None]
            since, oldest = min(waiting, key=lambda pair: pair[0], default=(now, None))
            if oldest and now - since >= PATIENCE_SECONDS:
                oldest.abort()
                # It leaves by itself, within a moment; so that nobody counts it twice it is out from now on.
                self._connections.discard(oldest)
                return
            # All are being answered, or just came: one more waits in the kernel.
            self._changed.wait(max(PATIENCE_SECONDS - (now - since), 0.01))


def listen(address: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the port is taken or the address is not this machine's.
    """
    family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = address == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(place, family=family, backlog=64, dualstack_ipv6=both)


class Page:
    """What a registry says, made at most every ``REUSE_SECONDS``; several may ask at once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._made_at = float("-inf")
        self._families: list[Metric] = []
        self._rendered: dict[tuple[str, bool], bytes] = {}

    def render(self, accept: str, *, compress: bool) -> tuple[bytes, str]:
        """(the page, its content type) in the format that prometheus_client chooses for an Accept header.

        Raises:
            TimeoutError: it has been in the making for too long.
        """
        encode, content_type = choose_encoder(accept)
        if not self._lock.acquire(timeout=PAGE_SECONDS):
            raise TimeoutError("the metrics take too long to read")
        try:
            if time.monotonic() - self._made_at > REUSE_SECONDS:
                self._families = list(self._registry.collect())
                # From its end: whoever asks while it is made gets it, too.
                self._made_at = time.monotonic()
                self._rendered.clear()
            page = self._rendered.get((content_type, compress))
            if page is None:
                page = encode(_Families(self._families))
                if compress:
                    page = gzip.compress(page, compresslevel=1)
                if len(self._rendered) < MAX_FORMATS:
                    self._rendered[content_type, compress] = page
            return page, content_type
        finally:
            self._lock.release()


class _Families:
    """What an encoder asks of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Connection(threading.Thread):
    """One client, from its handshake to its last answer."""

    def __init__(self, client: socket.socket, server: MetricsServer) -> None:
        super().__init__(name="metrics-connection", daemon=True)
        self._client, self._server = client, server
        self.waits_since: float | None = time.monotonic()
        """When it began to wait for the client; None while it does something itself."""

    def run(self) -> None:
        # Whatever goes wrong between two machines: the client is gone, says nothing, or speaks something else.
        try:
            with contextlib.suppress(OSError):
                if isinstance(self._client, ssl.SSLSocket):
                    # Only who says something takes a turn: a handshake costs as much as an answer.
                    socket.socket.recv(self._client, 1, socket.MSG_PEEK)
                    self.take_turn()
                    self._client.do_handshake()
                _Conversation(self._client, self, self._server)
        finally:
            with contextlib.suppress(OSError):
                self._client.close()
            self._server.forget(self)

    def take_turn(self) -> None:
        """Wait for a turn; then for the client again. Meanwhile it need not make room."""
        self.waits_since = None
        self._server.wait_for_turn()
        self.waits_since = time.monotonic()

    def abort(self) -> None:
        """End every wait for the client; from any thread."""
        # Not SSLSocket's own, which would take the connection's state away under the feet of its thread.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._client, socket.SHUT_RDWR)


class _Requests(io.RawIOBase):
    """What a client sends; every request within its time and size.

    Raises:
        TimeoutError: it takes too long.
        LineTooLong: it is too large.
    """

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self.begin(REQUEST_SECONDS)

    def begin(self, first_byte_seconds: float) -> None:
        """A request may come."""
        self._begun = False
        self._deadline = time.monotonic() + first_byte_seconds
        self._left = MAX_REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            raise LineTooLong("request")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._client.settimeout(left)
        count = self._client.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        if not self._begun:
            self._begun = True
            self._deadline = time.monotonic() + REQUEST_SECONDS
        return count


class _Conversation(BaseHTTPRequestHandler):
    """The requests of one connection, by the standard library's parser."""

    protocol_version = "HTTP/1.1"
    # Of a request line that says none: the base class would answer it without a status.
    default_request_version = "HTTP/1.0"
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def __init__(self, client: socket.socket, connection: _Connection, server: MetricsServer) -> None:
        self._connection, self._metrics = connection, server
        super().__init__(client, ("", 0), None)  # type: ignore[arg-type]  # a server, which it never asks

    def setup(self) -> None:
        """Read with deadlines."""
        self.connection = self.request
        self._requests = _Requests(self.request)
        self.rfile = io.BufferedReader(self._requests)
        # One write for each answer.
        self.wfile = self._answers = io.BytesIO()

    def handle(self) -> None:
        """Requests until one side has enough."""
        self.close_connection = True
        wait = REQUEST_SECONDS
        while True:
            self._requests.begin(wait)
            try:
                self.handle_one_request()
            except LineTooLong:
                self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            self._send()
            if self.close_connection or self._metrics.closing:
                break
            wait = IDLE_SECONDS
        self._linger()

    def finish(self) -> None:
        """Whoever accepted it closes it."""

    def parse_request(self) -> bool:
        """As the base class, and more strictly: what is ambiguous is refused, and so is whatever only reads can ask."""
        self._connection.take_turn()
        parsed = super().parse_request()
        self._connection.waits_since = None
        if not parsed:
            return False
        if len(self.requestline.split()) != 3:
            self.send_error(HTTPStatus.BAD_REQUEST, "expected a method, a path and a version")
        elif self.headers.defects:
            self.send_error(HTTPStatus.BAD_REQUEST, "a header is malformed")
        elif self.command not in ("GET", "HEAD"):
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n", Allow="GET, HEAD", Connection="close")
        elif self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0") != "0":
            self.send_error(HTTPStatus.BAD_REQUEST, "no body is taken")
        else:
            return True
        return False

    def do_GET(self) -> None:
        """Answer by path; what fails here is told, once, and costs this answer alone."""
        try:
            self._answer_path()
        except Exception as error:  # noqa: BLE001  (whatever a reading raises)
            self._metrics.tell("a request failed", error)
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    do_HEAD = do_GET

    def _answer_path(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer_metrics()
            case "/healthz":
                self._answer(HTTPStatus.OK, "alive\n")
            case "/readyz":
                why_not = "the endpoint is closing" if self._metrics.closing else self._metrics.why_not_ready()
                status = HTTPStatus.SERVICE_UNAVAILABLE if why_not else HTTPStatus.OK
                self._answer(status, f"{why_not or 'ready'}\n")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz\n")

    def _answer_metrics(self) -> None:
        access = self._metrics.access
        if access and not access.admits(self.headers.get("Authorization")):
            self._answer(
                HTTPStatus.UNAUTHORIZED, "a bearer token is needed\n", WWW_Authenticate='Bearer realm="metrics"'
            )
            return
        accept = ",".join(self.headers.get_all("Accept", []))
        compress = gzip_accepted(self.headers.get("Accept-Encoding", ""))
        try:
            page, content_type = self._metrics.page.render(accept, compress=compress)
        except TimeoutError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
            return
        encoding = {"Content_Encoding": "gzip"} if compress else {}
        self._answer(HTTPStatus.OK, page, Content_Type=content_type, Vary="Accept, Accept-Encoding", **encoding)

    def _answer(self, status: HTTPStatus, body: str | bytes, **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        headers = {"Content_Type": "text/plain; charset=utf-8", **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send(self) -> None:
        answer = self._answers.getvalue()
        self._answers.seek(0)
        self._answers.truncate()
        if answer:
            self._connection.waits_since = time.monotonic()
            self.request.settimeout(ANSWER_SECONDS)
            self.request.sendall(answer)

    def _linger(self) -> None:
        """Take what is still under way for a moment: closing on it would take the answer from the client."""
        self._connection.waits_since = time.monotonic()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                self.request.settimeout(left)
                if not socket.socket.recv(self.request, 65536):
                    break

    def version_string(self) -> str:
        """No versions for whoever asks."""
        return "shoal"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody's log is filled by strangers."""
        log.debug("metrics: %s", format % arguments)
