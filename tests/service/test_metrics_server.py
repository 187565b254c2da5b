"""The metrics endpoint over real sockets and real TLS, beside clients that stall, flood, lie and leave."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import re
import resource
import signal
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from scraping import (
    HANG,
    TOKEN,
    Counting,
    ask,
    connect,
    dribble,
    ends,
    exchange,
    get,
    readings,
    received,
    statuses,
    trusting,
)
from service import SMALL, read_summary, start_shoal, wait_for
from shoal.deploy.monitoring import metrics_page, metrics_server
from shoal.deploy.monitoring.access import Access, AccessFiles
from shoal.deploy.monitoring.metrics_page import MAX_FORMATS, REUSE_SECONDS
from shoal.deploy.monitoring.metrics_server import MAX_CONNECTIONS, MetricsServer

# Requests and responses


def test_paths_and_methods(serve: Callable[..., MetricsServer]) -> None:
    """Catches a page at another path than promised, a method that is taken for GET, an answer without a length."""
    server = serve()
    status, headers, body = ask(server)
    assert (status, readings(body)) == (200, 1.0)
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert ask(server, "/healthz")[::2] == (200, b"alive\n")
    assert ask(server, "/readyz")[::2] == (200, b"ready\n")
    assert [ask(server, path)[0] for path in ("/", "/metric", "/metrics/", "/healthz/..")] == [404] * 4
    assert ask(server, "/metrics?name[]=x")[0] == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
        status, headers, _ = ask(server, method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method
    status, headers, body = ask(server, method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(ask(server)[2])
    assert headers["Server"] == "shoal"


def test_formats_are_those_of_the_client_library(
    serve: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a scraper that gets a format it did not ask for, or another's page from the cache."""
    server = serve()
    opened = "application/openmetrics-text; version=1.0.0"
    for _ in range(2):
        status, headers, body = ask(server, Accept=f"{opened},text/plain;q=0.5")
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, "application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
        status, headers, body = ask(server, Accept="text/plain")
        assert headers["Content-Type"].startswith("text/plain")
        assert b"# EOF" not in body
    _, headers, packed = ask(server, Accept_Encoding="gzip")
    assert (headers["Content-Encoding"], readings(gzip.decompress(packed)) >= 1) == ("gzip", True)
    assert "Content-Encoding" not in ask(server)[1]
    # A version of their own for each request, of one page.
    monkeypatch.setattr(metrics_page, "REUSE_SECONDS", HANG)
    for minor in range(50):
        assert ask(server, Accept=f"application/openmetrics-text; version=1.0.{minor}")[0] == 200
    assert len(server.page._rendered) <= MAX_FORMATS


BODY = get("/nowhere")
"""A request where a server that loses count of bodies sees one."""


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/x\r\nHost: localhost\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nno header\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nName : value\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: elsewhere\r\n\r\n",
        get("/metrics", Content_Length="5") + b"hello",
        get("/metrics", Content_Length="-1"),
        get("/metrics", Content_Length="+0"),
        get("/metrics", Transfer_Encoding="gzip, chunked") + b"0\r\n\r\n",
        bytes(range(1, 256)) + b"\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused(serve: Callable[..., MetricsServer], sent: bytes) -> None:
    """Catches a guess at what was meant, a body taken for the next request, and a server that such a client ends."""
    server = serve()
    assert statuses(exchange(server, sent)) == [400]
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        # Read as the first or the last says, what follows would be a second request.
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(BODY),
        b"Content-Length: %d\r\nContent-Length: 0\r\n\r\n" % len(BODY),
        b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(BODY), len(BODY)),
        b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(BODY),
        b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" % len(BODY),
        b"Content-Length: 0, %d\r\n\r\n" % len(BODY),
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % len(BODY),
        b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY),
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_no_body_is_taken_for_a_request(serve: Callable[..., MetricsServer], method: bytes, sent: bytes) -> None:
    """Catches request smuggling: two that read one stream, a proxy and this server, see different requests in it."""
    head = method + b" /healthz HTTP/1.1\r\nHost: localhost\r\n"
    server = serve()
    assert statuses(exchange(server, head + sent + BODY)) == [400]
    assert ask(server)[0] == 200


def test_a_repeated_length_of_zero_is_no_body(serve: Callable[..., MetricsServer]) -> None:
    """Catches a refusal of what is not ambiguous, and a connection that loses count after it."""
    twice = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"
    assert statuses(exchange(serve(), twice + get("/nowhere", Connection="close"))) == [200, 404]


def test_nothing_is_answered_after_an_error(serve: Callable[..., MetricsServer]) -> None:
    """Catches a request that is read where nobody knows any more where a request begins."""
    for bad in (b"nonsense\r\n\r\n", get("/healthz", Content_Length="1"), b"GET / HTTP/1.1\r\nno colon\r\n\r\n"):
        server = serve()
        assert statuses(exchange(server, get("/healthz") + bad + get("/readyz"))) == [200, 400]
        assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        get("/metrics", Cookie="a" * 100_000),
        b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        b"GET /metrics HTTP/1.1\r\n" + (b"A: " + b"b" * 1000 + b"\r\n") * 90 + b"\r\n",
        b"a" * 10_000_000,
    ],
)
def test_requests_without_an_end_are_refused(serve: Callable[..., MetricsServer], sent: bytes) -> None:
    """Catches memory that a client may fill."""
    server = serve()
    assert exchange(server, sent) == b""
    assert ask(server)[0] == 200


def test_one_connection_takes_many_requests(serve: Callable[..., MetricsServer]) -> None:
    """Catches keep-alive that is promised and not kept: a new handshake for every scrape, or an answer out of turn."""
    server = serve()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG)) as connection:
        used = set()
        for path in ("/metrics", "/nowhere", "/healthz", "/metrics"):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == (404 if path == "/nowhere" else 200)
            assert answer.read()
            assert connection.sock is not None
            used.add(connection.sock.getsockname())
        assert len(used) == 1
    sent = get("/healthz") + get("/readyz", Connection="close")
    assert re.findall(rb"alive|ready", exchange(server, sent)) == [b"alive", b"ready"]
    assert exchange(server, get("/healthz", version="1.0")).endswith(b"alive\n")


@pytest.mark.parametrize("address", ["::1", "::"])
def test_ipv6(serve: Callable[..., MetricsServer], address: str) -> None:
    """Catches an address in brackets that nobody can open, and :: that leaves IPv4 out."""
    try:
        server = serve(address=address)
    except OSError:
        pytest.skip("no IPv6 here")
    assert server.url == f"http://[{address}]:{server.port}/metrics"
    with urllib.request.urlopen(f"http://[::1]:{server.port}/metrics", timeout=HANG) as answer:
        assert answer.status == 200
    if address == "::" and socket.has_dualstack_ipv6():
        assert ask(server)[0] == 200


# Load


def test_a_page_is_made_once_for_many(serve: Callable[..., MetricsServer], counting: Counting) -> None:
    """Catches a reading of the whole run for every one of a thousand scrapes a second."""
    server = serve()
    start = time.monotonic()
    with ThreadPoolExecutor(10) as pool:
        pages = [future.result() for future in [pool.submit(ask, server) for _ in range(100)]]
    seconds = time.monotonic() - start
    assert {status for status, _, _ in pages} == {200}
    assert 1 <= counting.readings <= seconds / REUSE_SECONDS + 1


def test_counters_never_go_back(serve: Callable[..., MetricsServer]) -> None:
    """Catches a page from the cache that comes after a newer one: rate() takes it for a restart."""
    server = serve()
    stop = threading.Event()

    def scrape() -> list[float]:
        seen = []
        while not stop.is_set():
            seen.append(readings(ask(server)[2]))
        return seen

    with ThreadPoolExecutor(8) as pool:
        scrapes = [pool.submit(scrape) for _ in range(8)]
        newest = 0.0
        while newest < 4:
            # Whoever asks later, with another connection, gets no older page.
            page = readings(ask(server)[2])
            assert page >= newest
            newest = page
        stop.set()
        for future in scrapes:
            assert (seen := future.result()) == sorted(seen)


def test_a_reading_that_hangs_costs_its_page(
    serve: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a probe that fails, and a server that is lost, because one metric does not come."""
    monkeypatch.setattr(metrics_page, "PAGE_SECONDS", 0.5)
    go_on = threading.Event()

    class Hanging(Collector):
        def collect(self) -> Iterator[Metric]:
            go_on.wait(HANG)
            yield CounterMetricFamily("readings", "Readings so far.", value=1)

        def describe(self) -> list[Metric]:
            return []

    server = serve(collector=Hanging())
    with ThreadPoolExecutor(2) as pool:
        for page in [pool.submit(ask, server) for _ in range(2)]:
            assert ask(server, "/healthz")[0] == 200
            assert page.result()[::2] == (503, b"the metrics take too long to read\n")
    assert sum(thread.name == "metrics-page" for thread in threading.enumerate()) == 1
    go_on.set()
    wait_for(lambda: ask(server)[0] == 200)


def test_a_reading_that_fails_costs_its_page(
    serve: Callable[..., MetricsServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a server that a collector ends, a traceback that goes to whoever asks, a log that is full of it."""

    class Failing(Collector):
        def collect(self) -> Iterator[Metric]:
            raise RuntimeError("secret")

        def describe(self) -> list[Metric]:
            return []

    server = serve(collector=Failing())
    for _ in range(3):
        status, _, body = ask(server)
        assert (status, b"secret" in body) == (500, False)
    assert ask(server, "/healthz")[0] == 200
    assert caplog.text.count("RuntimeError: secret") == 1


# Clients that stall


def test_slow_senders_are_not_waited_for(serve: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the slowloris: requests that never end, byte by byte, on every connection there may be."""
    monkeypatch.setattr(metrics_server, "IDLE_SECONDS", 2.0)
    server, stop = serve(), threading.Event()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(2 * MAX_CONNECTIONS)]
        threads = [threading.Thread(target=dribble, args=(client, stop), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert ask(server)[0] == 200
        # None of them is kept, though none of them stops.
        for client in clients:
            assert received(client) == b""
        stop.set()
        for thread in threads:
            thread.join(HANG)


def test_stalled_handshakes_are_not_waited_for(
    serve: Callable[..., MetricsServer],
    access_files: AccessFiles,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a handshake in the thread that accepts: one client that says nothing, and nobody is answered."""
    monkeypatch.setattr(metrics_server, "IDLE_SECONDS", 2.0)
    server = serve(access=Access(access_files))
    tls, allowed = trusting(authority), {"Authorization": f"Bearer {TOKEN}"}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(2 * MAX_CONNECTIONS)]
        for client in clients[::2]:
            with contextlib.suppress(OSError):  # it may have had to make room
                client.send(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a greeting
        for _ in range(5):
            assert ask(server, tls=tls, **allowed)[0] == 200
        for client in clients:
            assert received(client) == b""


def test_readers_that_stop_reading_are_not_waited_for(
    serve: Callable[..., MetricsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an answer that nobody takes, and the thread that holds it for ever."""
    monkeypatch.setattr(metrics_server, "ANSWER_SECONDS", 0.5)

    class Large(Collector):
        def collect(self) -> Iterator[Metric]:
            yield CounterMetricFamily("large", "x" * 20_000_000, value=1)

        def describe(self) -> list[Metric]:
            return []

    server = serve(collector=Large())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(3)]
        for client in clients:
            client.sendall(get("/metrics"))
        wait_for(lambda: len(server._answers) == 3)
        assert ask(server, "/healthz")[0] == 200
        wait_for(lambda: not server._answers)
        for client in clients:
            assert len(received(client)) < 20_000_000


def test_who_was_silent_longest_makes_room(serve: Callable[..., MetricsServer]) -> None:
    """Catches connections without number, and a scrape that is refused because idle ones have all the places."""
    server = serve()
    with contextlib.ExitStack() as stack:

        def alive(client: socket.socket) -> bool:
            client.sendall(get("/healthz"))
            return client.recv(65536).endswith(b"alive\n")

        idle = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        assert all(alive(client) for client in idle)
        # The first speaks once more, so that the second is the one.
        assert alive(idle[0])
        assert alive(stack.enter_context(connect(server)))
        assert idle[1].recv(1) == b""
        assert all(alive(client) for client in (idle[0], *idle[2:]))


def test_thousands_of_idle_connections_cost_few(serve: Callable[..., MetricsServer]) -> None:
    """Catches file descriptors of a training process that go to clients, and a scrape behind all of them."""
    server, num_idle = serve(), 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * num_idle), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(num_idle):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", server.port))
        for _ in range(3):
            assert ask(server)[0] == 200
            assert len(server._connections) <= MAX_CONNECTIONS
    assert ask(server)[0] == 200


def test_a_process_out_of_file_descriptors_serves_again(
    serve: Callable[..., MetricsServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a loop that spins on a connection it cannot accept, with the processor of training and a line each."""
    server = serve()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        client, probe = stack.enter_context(socket.socket()), stack.enter_context(socket.socket())
        client.settimeout(HANG)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + 1, hard))
        client.connect(("127.0.0.1", server.port))
        client.sendall(get("/healthz"))
        wait_for(lambda: "could not be accepted" in caplog.text)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.recv(65536).endswith(b"alive\n")
    assert caplog.text.count("could not be accepted") == 1


def test_a_flood_waits_its_turn(serve: Callable[..., MetricsServer]) -> None:
    """Catches a server that answers as fast as it is asked, with the processor that training needs."""
    server, rate = serve(), metrics_server.REQUESTS_PER_SECOND
    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        statuses = [future.result()[0] for future in [pool.submit(ask, server, "/healthz") for _ in range(60)]]
    assert statuses == [200] * 60
    # Never more than so many in so long: a slow machine makes it longer.
    assert time.monotonic() - start >= (60 - 1 - metrics_server.BURST) / rate


# The end


def test_closing_waits_for_nobody(serve: Callable[..., MetricsServer], access_files: AccessFiles) -> None:
    """Catches a run that cannot end while somebody is connected to its metrics."""
    in_clear = (b"", b"GET /me", get("/metrics")[:-2], get("/healthz"))
    greetings = (b"", b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01")
    for access, sent in ((None, in_clear), (Access(access_files), greetings)):
        server = serve(access=access)
        with contextlib.ExitStack() as stack:
            for part in sent:
                stack.enter_context(connect(server)).send(part)
            wait_for(lambda server=server: len(server._connections) == 4)
            start = time.monotonic()
            ends(server.close)
            assert time.monotonic() - start < 10
            with pytest.raises(ConnectionRefusedError):
                connect(server)
        server.close()


@pytest.mark.parametrize("in_time", [True, False])
def test_a_scrape_at_the_end_is_answered_or_closed(serve: Callable[..., MetricsServer], in_time: bool) -> None:
    """Catches a scrape that hangs because the run ended meanwhile, half a page, a run that waits for a page."""
    go_on, begun = threading.Event(), threading.Event()

    class Slow(Collector):
        def collect(self) -> Iterator[Metric]:
            begun.set()
            go_on.wait(HANG)
            yield CounterMetricFamily("readings", "Readings so far.", value=1)

        def describe(self) -> list[Metric]:
            return []

    server = serve(collector=Slow())
    with connect(server) as client:
        client.sendall(get("/metrics"))
        assert begun.wait(HANG)
        if in_time:
            closing = threading.Thread(target=server.close)
            closing.start()
            wait_for(lambda: server._closing.is_set())
            go_on.set()
            closing.join(HANG)
            assert not closing.is_alive()
            # A slow machine may take longer than it is given.
            answer = received(client)
            assert answer == b"" or readings(answer.partition(b"\r\n\r\n")[2]) == 1
        else:
            ends(server.close)
            assert received(client) == b""
            go_on.set()


# A whole run


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_under_hostile_clients(tmp_path: Path, access_files: AccessFiles, authority: trustme.CA) -> None:
    """Catches training that stops, steps that are lost, or metrics that are gone because of who else is connected."""
    small = [setting for setting in SMALL if not setting.startswith("metrics.")]
    settings = [
        f"metrics.tls_certificate={access_files.certificate}",
        f"metrics.tls_key={access_files.key}",
        "metrics.port=0",
    ]
    settings += [f"metrics.token_file={access_files.token}", "run_dir=run", "mode=inline", "total_env_steps=1000000000"]
    settings += ["max_seconds=600", "log.every_seconds=0.5"]
    process = start_shoal("train", *small, *settings, cwd=tmp_path)
    assert process.stdout is not None
    port = None
    for line in process.stdout:
        if found := re.search(r"https://127\.0\.0\.1:(\d+)/metrics", line):
            port = int(found[1])
            break
    assert port is not None
    reader = ThreadPoolExecutor(1)
    said = reader.submit(process.stdout.read)
    stop, tls = threading.Event(), trusting(authority)
    plain = ssl.create_default_context()
    plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE

    def until_stopped(attack: Callable[[], object]) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                attack()

    def request(**headers: str) -> int:
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=tls, timeout=HANG)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers=headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def silent() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=HANG):
            stop.wait(0.5)

    def slow() -> None:
        with plain.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=HANG)) as client:
            dribble(client, stop)

    def garbage() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=HANG) as client:
            client.sendall(os.urandom(5000))
            client.recv(1)

    attacks: list[Callable[[], object]] = [silent] * 40 + [slow] * 4 + [garbage, request]
    threads = [threading.Thread(target=until_stopped, args=(attack,), daemon=True) for attack in attacks]
    for thread in threads:
        thread.start()
    try:
        answered = []
        while process.poll() is None and len(answered) < 10:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answered.append(request(Authorization=f"Bearer {TOKEN}"))
        history = tmp_path / "run" / "metrics.jsonl"

        def trained() -> bool:
            assert process.poll() is None
            steps = re.findall(r'"env_steps": (\d+)', history.read_text()) if history.exists() else []
            return bool(steps) and int(steps[-1]) >= 4_000

        wait_for(trained)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() is not None)
    finally:
        stop.set()
        for thread in threads:
            thread.join(HANG)
        process.kill()
        process.wait(HANG)
        text = said.result(HANG)
        reader.shutdown()
        process.stdout.close()
    assert process.returncode == 130, text
    assert answered == [200] * 10
    assert read_summary(tmp_path / "run")["env_steps"] >= 4_000
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 100, log
