"""The metrics endpoint of one run: its server, and the file that announces it to Prometheus."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from shoal.deploy.monitoring.access import Access, AccessFiles, exposed
from shoal.deploy.monitoring.catalogue import Sources
from shoal.deploy.monitoring.collector import make_registry
from shoal.deploy.monitoring.metrics_server import MetricsServer
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.settings.sections import MetricsConfig

log = logging.getLogger(__name__)


def access_files(config: MetricsConfig) -> AccessFiles | None:
    """Return the files of certificate, key and token; None if everybody may read the metrics."""
    if not config.token_file:
        return None
    return AccessFiles(Path(config.tls_certificate), Path(config.tls_key), Path(config.token_file))


@contextlib.contextmanager
def served(
    config: MetricsConfig, sources: Sources | Mapping[str, Sources], readiness: Readiness, *, run: str
) -> Iterator[MetricsServer | None]:
    """Serve the metrics while the block runs; yield None if ``metrics.port`` is -1.

    Where another run on this machine has the port, it is a free one, and the log says which. That is for runs that only
    this machine sees: who reaches them from elsewhere knows the port and no other.

    Args:
        run: the name of the run in Prometheus (label ``run``, with ``metrics.file_sd``).

    Raises:
        OSError: the port is taken, or the address does not belong to this machine.
        AccessError: a file cannot be used.
    """
    if config.port < 0:
        yield None
        return
    files = access_files(config)
    start = functools.partial(
        MetricsServer,
        make_registry(sources),
        address=config.address,
        why_not_ready=readiness.why_not,
        access=Access(files) if files else None,
    )
    try:
        server = start(port=config.port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or exposed(config.address):
            raise
        server = start(port=0)
        log.warning("metrics.port: %d is in use; the metrics of this run are at %s", config.port, server.url)
    if files is None and exposed(config.address):
        log.warning(
            "metrics: whoever reaches port %d of this machine may read what is trained, how far it is, and which "
            "versions run here (metrics.address=%s); let only Prometheus reach it, or set metrics.tls_certificate, "
            "metrics.tls_key and metrics.token_file",
            server.port,
            config.address,
        )
    with contextlib.closing(server), _announced(config, server.port, run, encrypted=files is not None):
        yield server


@contextlib.contextmanager
def _announced(config: MetricsConfig, port: int, run: str, *, encrypted: bool) -> Iterator[None]:
    """Write the file of ``metrics.file_sd``; delete it after the block."""
    if not config.file_sd:
        yield
        return
    path = Path(config.file_sd)
    host = reachable(config.address)
    labels = {"run": run} | ({"__scheme__": "https"} if encrypted else {})
    target = {"targets": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], "labels": labels}
    # Prometheus may read at any moment, so the complete file gets its name at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps([target]) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        log.warning("metrics.file_sd: %s cannot be written, Prometheus will not find this run: %s", path, error)
    try:
        yield
    finally:
        # Another run may have written its own announcement since.
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text()) == [target]:
                path.unlink()


def reachable(address: str) -> str:
    """Return the address at which other machines find a server that listens on ``address``."""
    if address not in ("0.0.0.0", "::"):
        return address
    family, elsewhere = (
        (socket.AF_INET6, "2001:db8::1") if address == "::" and socket.has_ipv6 else (socket.AF_INET, "192.0.2.1")
    )
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it looks up the route to an address that nobody has.
        probe.connect((elsewhere, 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()
