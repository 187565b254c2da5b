"""Shared by tests of the metrics endpoint: a collector, clients good and bad, certificates and tokens."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import trustme
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from shoal.deploy.monitoring.access import AccessFiles
from shoal.deploy.monitoring.metrics_server import MetricsServer

HANG = 60.0
"""Ends a test that hangs; shorter than what the server grants an idle client."""
TOKEN = "correct-horse"


class Counting(Collector):
    """A counter of how often it was read."""

    def __init__(self) -> None:
        self.readings = 0

    def collect(self) -> Iterator[Metric]:
        self.readings += 1
        yield CounterMetricFamily("readings", "Readings so far.", value=self.readings)

    def describe(self) -> list[Metric]:
        return []


def start_server(collector: Collector, *, address: str = "127.0.0.1", **options: object) -> MetricsServer:
    """At a free port."""
    registry = CollectorRegistry()
    registry.register(collector)
    return MetricsServer(registry, address=address, port=0, **options)


def write_files(authority: trustme.CA, folder: Path) -> AccessFiles:
    made = authority.issue_cert("localhost", "127.0.0.1")
    files = AccessFiles(certificate=folder / "tls.crt", key=folder / "tls.key", token=folder / "token")
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    for path, content in ((files.key, made.private_key_pem.bytes()), (files.token, f"{TOKEN}\n".encode())):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return files


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def ask(
    server: MetricsServer,
    path: str = "/metrics",
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, Message, bytes]:
    """(status, headers, body) of one request with a connection of its own."""
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    options = {"context": tls} if tls else {}
    with contextlib.closing(kind("127.0.0.1", server.port, timeout=HANG, **options)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=HANG)


def exchange(server: MetricsServer, sent: bytes) -> bytes:
    """All that comes back until the server ends the connection."""
    with connect(server) as client:
        with contextlib.suppress(OSError):  # it may have heard enough
            client.sendall(sent)
        return received(client)


def get(path: str, *, version: str = "1.1", **headers: str) -> bytes:
    """A request as bytes, for tests that send it themselves."""
    lines = [f"GET {path} HTTP/{version}", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def statuses(answer: bytes) -> list[int]:
    """The statuses of all answers in what a server sent."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def received(client: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            found += part
    return found


def readings(page: bytes) -> float:
    [family] = text_string_to_metric_families(page.decode())
    [sample] = family.samples
    return float(sample.value)


def ends(function: Callable[[], object]) -> None:
    """Run in a thread that must come back."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(HANG)
    assert not thread.is_alive(), "it hangs"


def dribble(client: socket.socket, stop: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for byte in b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"slow" * 100_000:
            if stop.wait(0.02):
                return
            client.send(bytes([byte]))
