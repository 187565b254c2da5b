"""Who may read the metrics: TLS and a bearer token, from files that may be replaced while a run goes on."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import logging
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Identity = tuple[tuple[int, int, int], ...]


class AccessError(ValueError):
    """A file that cannot be used; the message names it and says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AccessFiles:
    """Where certificate, key and token are."""

    certificate: Path
    """The chain, PEM."""
    key: Path
    """PEM, without a passphrase."""
    token: Path
    """One word; space around it does not count."""


def problems(files: AccessFiles) -> dict[str, str]:
    """What keeps the files from being used: sentences, by field of ``AccessFiles``."""
    found = {}
    for field, load in (("token", lambda: load_token(files.token)), ("certificate", lambda: load_context(files))):
        try:
            load()
        except AccessError as error:
            found[field] = str(error)
    return found


def load_token(path: Path) -> bytes:
    """The token.

    Raises:
        AccessError: there is none, it is no single word, or others than owner and group may read it.
    """
    try:
        _check_private(path)
        words = path.read_bytes().split()
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from error
    if len(words) != 1 or not re.fullmatch(rb"[!-~]+", words[0]):
        held = "is empty" if not words else "holds more than one word of plain ASCII"
        raise AccessError(f"{path} {held}; make a token with: openssl rand -hex 32 > {path}")
    return words[0]


def load_context(files: AccessFiles) -> ssl.SSLContext:
    """For serving TLS, 1.2 or newer.

    Raises:
        AccessError: certificate or key cannot be read, is none, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (files.certificate, files.key):
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise AccessError(f"{path} cannot be read: {error.strerror}") from error
    _check_private(files.key)
    try:
        # Without the function OpenSSL would ask the terminal.
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except _Encrypted as error:
        raise AccessError(f"{files.key} has a passphrase; nobody is there to type it: store the key without") from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise AccessError(f"{files.key} is not the key of the certificate {files.certificate}") from error
        raise AccessError(
            f"{files.certificate} and {files.key} are no certificate and key in PEM: {error.reason or error}"
        ) from error
    return context


class _Encrypted(Exception):
    pass


def _no_passphrase() -> str:
    raise _Encrypted


def _check_private(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IROTH:
        raise AccessError(
            f"{path} can be read by everybody on this machine (mode {mode:o}): chmod o-rwx {path} "
            "(a secret's volume in Kubernetes: defaultMode: 0440)"
        )


class Access:
    """TLS and token as the files have them now; what cannot be used is told once, and what was there before stays.

    Raises:
        AccessError: a file cannot be used.
    """

    def __init__(self, files: AccessFiles) -> None:
        self._token = _Current((files.token,), lambda: load_token(files.token))
        self._context = _Current((files.certificate, files.key), lambda: load_context(files))

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        return self._context.value

    def admits(self, authorization: str | None) -> bool:
        """Whether a header ``Authorization: Bearer TOKEN`` has the token; takes as long for any wrong one."""
        scheme, _, given = (authorization or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.value)
        return same and scheme.lower() == "bearer"


class _Current(Generic[_T]):
    """What ``load`` makes of files, made again when one of them is another than before."""

    def __init__(self, paths: tuple[Path, ...], load: Callable[[], _T]) -> None:
        self._paths, self._load = paths, load
        self._lock = threading.Lock()
        # First: what is written between the two is then seen at the next look.
        self._seen = self._identity()
        self._value = load()

    @property
    def value(self) -> _T:
        with self._lock:
            if (identity := self._identity()) != self._seen:
                self._seen = identity
                try:
                    self._value = self._load()
                    log.info("metrics: %s was read again", self._paths[0])
                except AccessError as error:
                    log.warning("metrics: %s; what was there before stays in use", error)
            return self._value

    def _identity(self) -> _Identity | None:
        try:
            found = [os.stat(path) for path in self._paths]
        except OSError:
            return None
        return tuple((s.st_ino, s.st_mtime_ns, s.st_size) for s in found)


def exposed(address: str) -> bool:
    """Whether others than this machine may reach a server that listens there."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return True
    return not all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for ip in found)
