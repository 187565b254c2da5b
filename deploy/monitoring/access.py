"""Access to the metrics: TLS and a bearer token, from files that may be replaced while a run goes on."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, NoReturn, TypeVar

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 2**20

_T = TypeVar("_T")


class AccessError(ValueError):
    """A file cannot be used; the message names it and says what to change."""


class AccessFiles(NamedTuple):
    """A PEM certificate (chain), its PEM key without a passphrase, and a token: one word."""

    certificate: Path
    key: Path
    token: Path


def problems(files: AccessFiles) -> dict[str, str]:
    """Return why files cannot be used: a sentence for each such field of ``AccessFiles``."""
    found = {}
    for field, load in (("token", lambda: load_token(files.token)), ("certificate", lambda: load_context(files))):
        try:
            load()
        except AccessError as error:
            found[field] = str(error)
    return found


def load_token(path: Path) -> bytes:
    """Return the token.

    Raises:
        AccessError: the file has no token, or more than a single word, or everybody may read it.
    """
    words = _read(path, private=True).split()
    if len(words) != 1 or not re.fullmatch(rb"[!-~]+", words[0]):
        held = "is empty" if not words else "holds more than one word of plain ASCII"
        raise AccessError(f"{path} {held}; make a token with: openssl rand -hex 32 > {path}")
    return words[0]


def load_context(files: AccessFiles) -> ssl.SSLContext:
    """Return a context that serves TLS 1.2 or newer.

    Raises:
        AccessError: the certificate or the key cannot be read or used, or they do not belong together.
    """

    def no_passphrase() -> NoReturn:  # without it OpenSSL asks the terminal
        raise AccessError(f"{files.key} has a passphrase; nobody is there to type it: store the key without")

    _read(files.certificate)
    _read(files.key, private=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key, password=no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise AccessError(f"{files.key} is not the key of the certificate {files.certificate}") from error
        both = f"{files.certificate} and {files.key}"
        raise AccessError(f"{both} are no certificate and key in PEM: {error.reason or error}") from error
    return context


def _read(path: Path, *, private: bool = False) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe waits, and some devices never end
            raise AccessError(f"{path} cannot be read: expected a regular file, got a directory, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise AccessError(f"{path} is larger than {MAX_FILE_BYTES // 1024} KiB; is it the right file?")
    if private and mode & stat.S_IROTH:
        raise AccessError(
            f"{path} can be read by everybody on this machine (mode {stat.S_IMODE(mode):o}): chmod o-rwx {path} "
            "(a secret's volume in Kubernetes: defaultMode: 0440)"
        )
    return content


class Access:
    """TLS and token as the files are now. A new file that cannot be used is logged once; the old content stays in use.

    Raises:
        AccessError: a file cannot be used.
    """

    def __init__(self, files: AccessFiles) -> None:
        self._token = _Reloaded((files.token,), lambda: load_token(files.token))
        self._context = _Reloaded((files.certificate, files.key), lambda: load_context(files))

    @property
    def context(self) -> ssl.SSLContext:
        """The context for the next connection."""
        return self._context.current()

    def admits(self, authorization: str | None) -> bool:
        """Return whether the header is ``Bearer TOKEN``; the time it takes does not depend on the given token."""
        scheme, _, given = (authorization or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.current())
        return same and scheme.lower() == "bearer"


class _Reloaded(Generic[_T]):
    """A value loaded from files, and loaded again when one of them has changed."""

    def __init__(self, paths: tuple[Path, ...], load: Callable[[], _T]) -> None:
        self._paths, self._load = paths, load
        # Before loading: the next look then sees what is written between the two.
        self._seen = self._identity()
        self._value = load()

    def current(self) -> _T:
        if (identity := self._identity()) != self._seen:
            self._seen = identity
            try:
                self._value = self._load()
                log.info("metrics: %s was read again", self._paths[0])
            except AccessError as error:
                log.warning("metrics: %s; what was there before stays in use", error)
        return self._value

    def _identity(self) -> list[tuple[int, int, int]] | None:
        try:
            found = [path.stat() for path in self._paths]
        except OSError:
            return None
        return [(s.st_ino, s.st_mtime_ns, s.st_size) for s in found]


def exposed(address: str) -> bool:
    """Return whether other machines may reach a server that listens on ``address``."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return True
    return not all(ipaddress.ip_address(ip.partition("%")[0]).is_loopback for ip in found)
