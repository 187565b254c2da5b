"""The metrics endpoint: bytes that are no request, odd requests, clients that leave in the middle."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import trustme
from hypothesis import strategies as st
from scraping import TOKEN, Counting, ask, start_server, trusting, write_files
from shoal.deploy.monitoring.access import Access
from shoal.deploy.monitoring.metrics_server import MAX_CONNECTIONS, MetricsServer

from attacks import Attack
from attacks.edits import byte_edits, edited, texts

WAIT = 0.2
"""Seconds for an answer where none may come: the server waits for the rest of such a request."""
EXPECTED = {200, 400, 401, 404, 405, 413, 431}
"""Never 500: no request is an error of the server."""
SPARE = 4
"""Descriptors and threads that the process may have beyond those at the start and one for each connection."""

_TARGETS = (
    "/metrics",
    "/healthz",
    "/readyz",
    "*",
    "//",
    "/metrics?x=%ff",
    "http://h/metrics",
    "/" + "a" * 9000,
    "\xff",
)
_HEADERS = (
    *("Accept", "Accept-Encoding", "Authorization", "Content-Length", "Transfer-Encoding", "Connection", "Host"),
    *("Expect", "Upgrade", "Range", "Cookie", "X"),
)
_VALUES = (
    *(f"Bearer {TOKEN}", f"Bearer {TOKEN}\xe9", "Basic eDp5", "gzip", "gzip;q=x", "gzip;q=0, *", "chunked", "close"),
    *(
        "application/openmetrics-text; version=1.0.0",
        "text/plain;version=1.0.0;escaping=values;q=nan",
        "*/*;q=",
        ";;,,=",
    ),
    *("application/openmetrics-text; version=", "text/plain; escaping=allow-utf-8", "-1", "0", "99999999999999999999"),
    *("100-continue", "h2c", "bytes=0-", "a" * 20_000, "\x00", "1, 2"),
)
_requests = st.fixed_dictionaries(
    {
        "method": st.sampled_from((*["GET"] * 12, "HEAD", "POST", "OPTIONS", "PRI", "get", "")) | texts,
        "target": st.sampled_from(("/metrics",) * 12 + _TARGETS) | texts,
        "version": st.sampled_from((*["HTTP/1.1"] * 12, "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "")) | texts,
        "headers": st.lists(
            st.tuples(st.sampled_from(_HEADERS) | texts, st.sampled_from(_VALUES) | texts).map(list), max_size=5
        ),
    },
    optional={
        "homeless": st.just(True),
        "body": st.text(max_size=60),
        "bytes": byte_edits,
        "line": st.sampled_from(("\n", "\r", "\r\n\r\n")),
    },
)


class Metrics:
    """What a client may send; one server in the clear, and one with TLS and a token."""

    attacks = st.fixed_dictionaries(
        {"requests": st.lists(_requests, max_size=4)},
        optional={
            "junk": st.binary(max_size=300).map(bytes.hex),
            "tls": st.sampled_from(("spoken", "broken")),
            "leaves": st.sampled_from(("at once", "reset", "half")),
            "pieces": st.integers(2, 5),
        },
    )

    def __init__(self, plain: MetricsServer, guarded: MetricsServer, tls: ssl.SSLContext) -> None:
        self._plain, self._guarded, self._tls = plain, guarded, tls
        self._check()
        self._at_start = _descriptors(), threading.active_count()

    def attempt(self, attack: Attack) -> str:
        """Send it, and see that the answers are answers and that the server serves on."""
        tls = attack.get("tls")
        server = self._guarded if tls else self._plain
        sent = b"".join(map(_written, attack["requests"])) + bytes.fromhex(attack.get("junk", ""))
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            if tls == "spoken":
                with contextlib.suppress(ssl.SSLError):
                    client = stack.enter_context(self._tls.wrap_socket(client, server_hostname="localhost"))
            answer = _exchanged(client, sent, attack)
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
        assert set(statuses) <= EXPECTED, f"status {statuses}"
        if tls == "broken":
            assert b"readings" not in answer
        if answer and not tls:
            assert statuses, f"no answer of HTTP: {answer[:80]!r}"
        self._check()
        descriptors, threads = _descriptors(), threading.active_count()
        assert descriptors <= self._at_start[0] + 2 * MAX_CONNECTIONS + SPARE, "descriptors leak"
        assert threads <= self._at_start[1] + SPARE, "threads leak"
        return "taken" if 200 in statuses else "refused"

    def _check(self) -> None:
        """The next good request of somebody else."""
        assert ask(self._plain)[0] == 200
        assert ask(self._guarded, "/healthz", tls=self._tls)[0] == 200


def _written(request: Attack) -> bytes:
    end = request.get("line", "\r\n")
    lines = [f"{request['method']} {request['target']} {request['version']}"]
    if not request.get("homeless"):
        lines.append("Host: localhost")
    lines += [f"{name}: {value}" for name, value in request["headers"]]
    data = (end.join([*lines, "", ""]) + request.get("body", "")).encode("latin-1", "replace")
    return edited(data, request.get("bytes", ()))


def _exchanged(client: socket.socket, sent: bytes, attack: Attack) -> bytes:
    """What comes back; the server may have heard enough before all is sent."""
    pieces = attack.get("pieces", 1)
    size = max(1, -(-len(sent) // pieces))
    with contextlib.suppress(OSError):
        for begin in range(0, len(sent), size):
            client.sendall(sent[begin : begin + size])
    match attack.get("leaves"):
        case "at once":
            return b""
        case "reset":
            linger_for_nothing = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_nothing)
            return b""
        case "half":
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_WR)
    found = b""
    client.settimeout(WAIT)
    until = time.monotonic() + 10 * WAIT
    with contextlib.suppress(OSError):
        while time.monotonic() < until and (part := client.recv(65536)):
            found += part
    return found


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Metrics]:
    """Certificates are written to ``directory``."""
    authority = trustme.CA()
    for name in ("tls.crt", "tls.key", "token"):
        (directory / name).unlink(missing_ok=True)
    files = write_files(authority, directory)
    with (
        contextlib.closing(start_server(Counting())) as plain,
        contextlib.closing(start_server(Counting(), access=Access(files))) as guarded,
    ):
        yield Metrics(plain, guarded, trusting(authority))
