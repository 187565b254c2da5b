"""The metrics endpoint: ``/metrics``, ``/healthz`` and ``/readyz``, which tornado serves from a thread of its own.

Tornado parses requests and refuses ambiguous ones, bodies and oversized headers; it ends idle connections and serves
TLS. The limits that it has no setting for are here: connections, connections and requests per second, and the time
that a client may take to read its answer. Training never waits for this thread, nor this thread for training.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client.exposition import gzip_accepted
from prometheus_client.registry import CollectorRegistry
from shoal.deploy.monitoring.access import Access
from shoal.deploy.monitoring.metrics_page import REUSE_SECONDS, MetricsPage
from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest, ResponseStartLine
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.log import gen_log

log = logging.getLogger(__name__)

THREAD = "metrics-server"
MAX_CONNECTIONS = 64
"""One more closes the connection that has been silent for longest."""
IDLE_SECONDS = 120.0
"""Time limit of a TLS handshake and a complete request header: longer than any usual interval between scrapes."""
ANSWER_SECONDS = 10.0
"""Time limit for a client to read its answer."""
MAX_REQUEST_BYTES = 16_384
CONNECTIONS_PER_SECOND = 300.0
"""A client has MAX_CONNECTIONS / CONNECTIONS_PER_SECOND to send its request in a flood."""
REQUESTS_PER_SECOND = 50.0
"""Each costs most of a millisecond of the processor; a flood must not take it from training."""
BURST = 25
"""Requests, or connections, that are served at once after a pause."""
CLOSE_SECONDS = 1.0
"""Time limit of answers under way when the server closes."""

Answer = tuple[HTTPStatus, bytes, dict[str, str]]
"""Status, body, headers beside the usual ones."""


class MetricsServer:
    """Serves until ``close``.

    ``/healthz`` answers 200 as long as the process lives. ``/readyz`` answers 200, or 503 with the sentence that
    ``why_not_ready`` returns. Probes cannot keep secrets, so neither asks for the token; ``/metrics`` does if
    ``access`` is given, and then all three are HTTPS.

    Args:
        address: a host name or an IPv4 or IPv6 address of this machine; ``::`` takes both.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address does not belong to this machine.
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
        self.page = MetricsPage(registry)
        self._why_not_ready, self._access = why_not_ready, access
        self._listener = listen(address, port)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        host = f"[{address}]" if ":" in address else address
        self.url = f"{'https' if access else 'http'}://{host}:{self.port}/metrics"
        self._connections: dict[IOStream, bool] = {}
        """True for connections with a request to answer; the others come in the order of their last answers."""
        self._answers: set[asyncio.Task[None]] = set()
        self._request_pace, self._connection_pace = _Pace(REQUESTS_PER_SECOND), _Pace(CONNECTIONS_PER_SECOND)
        self._reported: set[type[Exception]] = set()
        gen_log.addFilter(_not_from_here)
        self._scraped: deque[float] = deque(maxlen=2)
        """When the last scrapes were answered; only the server's thread adds to it."""
        self._loop, self._closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def wait_for_scrape(self, most_seconds: float, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until what is true now has been scraped, where somebody scrapes in regular intervals.

        Args:
            most_seconds: wait no longer; nor one and a half of the intervals between the last two scrapes.
            give_up: asked again and again.

        Returns:
            Whether there was a scrape.
        """
        began = time.monotonic()
        scraped = list(self._scraped)
        if len(scraped) < 2:
            return False
        interval = scraped[1] - scraped[0]
        until = min(began + most_seconds, scraped[1] + 1.5 * interval + REUSE_SECONDS)
        while time.monotonic() < until and not give_up():
            # A page may be as old as this.
            if self._scraped[-1] > began + REUSE_SECONDS:
                return True
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """Stop serving: answers under way get ``CLOSE_SECONDS``, clients that are waited for get none."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = HTTPServer(
            self._start_answer,
            idle_connection_timeout=IDLE_SECONDS,
            max_header_size=MAX_REQUEST_BYTES,
            max_body_size=0,
        )
        accepting = asyncio.create_task(self._accept(server))
        await self._closing.wait()
        accepting.cancel()
        await asyncio.wait([accepting])
        self._listener.close()
        for stream, busy in self._connections.items():
            if not busy:
                stream.close()
        if self._answers:
            await asyncio.wait(self._answers, timeout=CLOSE_SECONDS)
        for task in self._answers:
            task.cancel()
        self.page.close()
        await server.close_all_connections()

    async def _accept(self, server: HTTPServer) -> None:
        # Tornado's own loop has no limit, and spins where the process has no file descriptor left.
        while True:
            await self._connection_pace.wait()
            try:
                client, address = await self._loop.sock_accept(self._listener)
            except ConnectionError:
                continue
            except OSError as error:
                self._report("a connection could not be accepted", error)
                await asyncio.sleep(1.0)
                continue
            try:
                await self._make_room()
                stream = self._make_stream(client)
            except BaseException as error:
                client.close()
                if not isinstance(error, OSError):
                    raise
                continue
            self._connections[stream] = False
            server.handle_stream(stream, address)

    def _make_stream(self, client: socket.socket) -> IOStream:
        if not self._access:
            return IOStream(client, max_buffer_size=2 * MAX_REQUEST_BYTES)
        # The certificate as it is now. The handshake happens when the client's part of it arrives.
        encrypted = self._access.context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        return SSLIOStream(encrypted, max_buffer_size=2 * MAX_REQUEST_BYTES)

    async def _make_room(self) -> None:
        while True:
            self._connections = {stream: busy for stream, busy in self._connections.items() if not stream.closed()}
            if len(self._connections) < MAX_CONNECTIONS:
                return
            if silent := next((stream for stream, busy in self._connections.items() if not busy), None):
                silent.close()
            else:
                await asyncio.sleep(0.05)

    def _start_answer(self, request: HTTPServerRequest) -> None:
        task = self._loop.create_task(self._answer(request))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, request: HTTPServerRequest) -> None:
        connection = request.connection
        assert isinstance(connection, HTTP1Connection)
        stream = connection.stream
        self._connections[stream] = True
        try:
            await self._request_pace.wait()
            try:
                status, body, headers = await self._route(request)
            except Exception as error:  # noqa: BLE001  (whatever a collector raises costs one answer)
                self._report("a request failed", error)
                status, body, headers = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "a metric could not be read")
            headers = {"Server": "shoal", "Content-Length": str(len(body)), **headers}
            sent = connection.write_headers(
                ResponseStartLine("", status.value, status.phrase),
                HTTPHeaders(headers),
                b"" if request.method == "HEAD" else body,
            )
            await asyncio.wait_for(sent, ANSWER_SECONDS)
            if request.path == "/metrics" and status == HTTPStatus.OK:
                self._scraped.append(time.monotonic())
            connection.finish()
            del self._connections[stream]
            self._connections[stream] = False
        except (TimeoutError, StreamClosedError, asyncio.CancelledError):
            connection.close()

    async def _route(self, request: HTTPServerRequest) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", Allow="GET, HEAD")
        if "Transfer-Encoding" in request.headers:
            return _text(HTTPStatus.BAD_REQUEST, "a request has no body here")
        match request.path:
            case "/metrics":
                return await self._metrics(request.headers)
            case "/healthz":
                return _text(HTTPStatus.OK, "alive")
            case "/readyz":
                why_not = self._why_not_ready()
                return _text(HTTPStatus.SERVICE_UNAVAILABLE if why_not else HTTPStatus.OK, why_not or "ready")
        return _text(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz")

    async def _metrics(self, headers: HTTPHeaders) -> Answer:
        if self._access and not self._access.admits(headers.get("Authorization")):
            challenge = {"WWW-Authenticate": 'Bearer realm="metrics"'}
            return _text(HTTPStatus.UNAUTHORIZED, "a bearer token is needed", **challenge)
        compress = gzip_accepted(headers.get("Accept-Encoding", ""))
        try:
            body, content_type = await self.page.render(headers.get("Accept", ""), compress=compress)
        except TimeoutError:
            return _text(HTTPStatus.SERVICE_UNAVAILABLE, "the metrics take too long to read")
        encoding = {"Content-Encoding": "gzip"} if compress else {}
        return HTTPStatus.OK, body, {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding", **encoding}

    def _report(self, what: str, error: Exception) -> None:
        """Log the first error of each type: clients must not be able to fill a log."""
        if type(error) not in self._reported:
            self._reported.add(type(error))
            log.error("metrics: %s", what, exc_info=error)


class _Pace:
    """Lets callers of ``wait`` through at most ``rate`` times a second, and ``BURST`` at once after a pause."""

    def __init__(self, rate: float) -> None:
        self._interval, self._next = 1 / rate, -math.inf

    async def wait(self) -> None:
        now = asyncio.get_running_loop().time()
        self._next = max(self._next + self._interval, now - BURST * self._interval)
        if self._next > now:
            await asyncio.sleep(self._next - now)


def _text(status: HTTPStatus, sentence: str, **headers: str) -> Answer:
    return status, f"{sentence}\n".encode(), {"Content-Type": "text/plain; charset=utf-8", **headers}


def _not_from_here(record: logging.LogRecord) -> bool:
    """Tornado logs a line for each failed handshake; other servers in this process keep theirs."""
    return record.threadName != THREAD


def listen(address: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: the port is taken, or the address does not belong to this machine.
    """
    family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = address == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(place, family=family, backlog=128, dualstack_ipv6=both)
