"""Access to the metrics, readiness, and the file that announces a run to Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from scraping import TOKEN, ask, exchange, get, trusting, write_files
from service import SMALL
from shoal.deploy.cli import main
from shoal.deploy.monitoring import endpoint
from shoal.deploy.monitoring.access import Access, AccessError, AccessFiles, exposed, load_context, load_token, problems
from shoal.deploy.monitoring.metrics_server import MetricsServer
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import MetricsConfig
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics

# Access


def test_only_the_token_opens_the_page(
    serve: Callable[..., MetricsServer], access_files: AccessFiles, authority: trustme.CA
) -> None:
    """Catches metrics that anybody reads, a probe that needs a secret, and a 401 that does not say what is missing."""
    server, tls = serve(access=Access(access_files)), trusting(authority)
    assert server.url.startswith("https://")
    assert ask(server, tls=tls, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(server, tls=tls, Authorization=f"bearer  {TOKEN} ")[0] == 200
    assert ask(server, tls=tls)[0] == 401
    wrong = (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer \xe9")
    for given in wrong:
        status, headers, body = ask(server, tls=tls, Authorization=given)
        assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="metrics"'), given
        assert b"readings" not in body
    assert [ask(server, path, tls=tls)[0] for path in ("/healthz", "/readyz", "/nowhere")] == [200, 200, 404]


def test_plain_text_gets_nothing_from_a_tls_port(
    serve: Callable[..., MetricsServer], access_files: AccessFiles, authority: trustme.CA
) -> None:
    """Catches a page, or a token, that travels in clear text; a server that garbage ends."""
    server = serve(access=Access(access_files))
    for sent in (get("/metrics", Authorization=f"Bearer {TOKEN}"), os.urandom(2000)):
        assert b"readings" not in exchange(server, sent)
    assert ask(server, tls=trusting(authority), Authorization=f"Bearer {TOKEN}")[0] == 200


def test_files_may_be_replaced(
    serve: Callable[..., MetricsServer], access_files: AccessFiles, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Catches a token or certificate that is rotated, and a run that goes on with the old one, or with none."""
    server = serve(access=Access(access_files))
    other = trustme.CA()
    write_files(other, tmp_path)
    (tmp_path / "new").touch(mode=0o600)
    (tmp_path / "new").write_text("battery-staple")
    os.replace(tmp_path / "new", access_files.token)
    tls = trusting(other)
    assert ask(server, tls=tls, Authorization=f"Bearer {TOKEN}")[0] == 401
    assert ask(server, tls=tls, Authorization="Bearer battery-staple")[0] == 200
    access_files.token.write_text("")
    access_files.certificate.write_text("half a certi")
    for _ in range(3):
        assert ask(server, tls=tls, Authorization="Bearer ")[0] == 401
        assert ask(server, tls=tls, Authorization="Bearer battery-staple")[0] == 200
    assert caplog.text.count("stays in use") == 2
    access_files.token.unlink()
    assert ask(server, tls=tls, Authorization="Bearer battery-staple")[0] == 200


@pytest.mark.parametrize("content", [b"", b"  \n", b"two words", b"\xff\xfe", b"caf\xc3\xa9"])
def test_a_token_is_one_word(tmp_path: Path, content: bytes) -> None:
    """Catches an empty file that makes the empty token right."""
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(AccessError, match=re.escape(f"{path} ")):
        load_token(path)


def test_files_that_cannot_be_used_are_named(access_files: AccessFiles, authority: trustme.CA, tmp_path: Path) -> None:
    """Catches a run that starts without what it was told to keep, and a question that waits on nobody's terminal."""
    assert problems(access_files) == {}
    (tmp_path / "other").mkdir()
    other = write_files(authority, tmp_path / "other")

    def said(**changed: Path) -> dict[str, str]:
        names = {"certificate": access_files.certificate, "key": access_files.key, "token": access_files.token}
        return problems(AccessFiles(**{**names, **changed}))

    assert "is not the key of the certificate" in said(key=other.key)["certificate"]
    assert "no certificate and key in PEM" in said(certificate=access_files.token)["certificate"]
    gone, large = tmp_path / "gone", tmp_path / "large"
    os.mkfifo(tmp_path / "pipe")
    large.touch(mode=0o600)
    large.write_bytes(b"x" * (2**20 + 1))
    for field in ("certificate", "key", "token"):
        assert f"{gone} cannot be read: No such file" in "".join(said(**{field: gone}).values())
        for endless in (Path("/dev/zero"), tmp_path / "pipe"):
            assert f"{endless} cannot be read: expected a regular file" in "".join(said(**{field: endless}).values())
        assert f"{large} is larger than 1024 KiB" in "".join(said(**{field: large}).values())
    for path in (other.key, other.token):
        path.chmod(0o644)
    found = said(key=other.key, certificate=other.certificate, token=other.token)
    assert all("chmod o-rwx" in sentence for sentence in found.values())
    assert set(found) == {"certificate", "token"}
    encrypted = tmp_path / "encrypted"
    encrypted.touch(mode=0o600)
    encrypted.write_bytes(_encrypted(access_files.key.read_bytes()))
    assert "has a passphrase" in said(key=encrypted)["certificate"]
    with pytest.raises(AccessError, match="passphrase"):
        load_context(AccessFiles(certificate=access_files.certificate, key=encrypted, token=access_files.token))


def _encrypted(key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"a passphrase"),
    )


@pytest.mark.parametrize(
    ("address", "others"),
    [("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("0.0.0.0", True), ("::", True), ("10.0.0.7", True)],
)
def test_who_can_reach_an_address(address: str, others: bool) -> None:
    """Catches a warning that never comes, or comes for everybody."""
    assert exposed(address) == others


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("token_file",), "tls_certificate and tls_key must be set, too"),
        (("tls_certificate", "tls_key"), "token_file must be set, too"),
        (("tls_certificate", "token_file"), "tls_key must be set, too"),
    ],
)
def test_tls_and_token_go_together(given: tuple[str, ...], missing: str) -> None:
    """Catches a token in clear text, and encrypted metrics that anybody reads."""
    _, found = load_config([], [f"metrics.{name}=/x" for name in given])
    [problem] = found
    assert problem.startswith(f"metrics.{given[0]}=/x")
    assert missing in problem


def test_bad_files_stop_a_run_before_it_starts(
    access_files: AccessFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that fails, or serves everybody, after everything was started."""
    access_files.token.write_text("")
    access_files.certificate.write_text("")
    settings = [f"metrics.tls_certificate={access_files.certificate}", f"metrics.tls_key={access_files.key}"]
    settings += [f"metrics.token_file={access_files.token}", f"metrics.file_sd={tmp_path / 'gone' / 'run.json'}"]
    small = [setting for setting in SMALL if not setting.startswith("metrics.")]
    run = tmp_path / "run"
    assert main(["train", *small, "mode=inline", "metrics.port=0", f"run_dir={run}", *settings]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    for line in ("metrics.token_file: ", "metrics.tls_certificate: ", "metrics.file_sd: "):
        assert f"  {line}" in said
    assert not run.exists()


# Readiness


def test_readiness() -> None:
    """Catches a run that is called ready while it does nothing, or not ready while it trains."""
    statistics, asked, alive = RunStatistics(Ledger()), threading.Event(), [0]

    def why_not(limit: float = 300.0) -> str | None:
        ready = Readiness(
            statistics=statistics,
            actors_alive=lambda: alive[0],
            stopping=asked.is_set,
            max_update_age_seconds=limit,
        )
        return ready.why_not()

    assert why_not() == "no actor can make unrolls"
    alive[0] = 1
    assert why_not() == "there was no update yet"
    statistics.stamp_update()
    assert why_not() is None
    assert re.fullmatch(
        r"the last update was \d+ seconds ago; metrics.max_update_age_seconds allows 1e-09", why_not(1e-9)
    )
    asked.set()
    assert why_not() == "the run is ending"
    asked.clear()
    statistics.end()
    assert why_not() == "the run is ending"


def test_an_unready_run_says_why(serve: Callable[..., MetricsServer]) -> None:
    """Catches a 503 without a reason, and one that makes the page itself unreadable."""
    why: list[str | None] = ["there was no update yet"]
    server = serve(why_not_ready=lambda: why[0])
    assert ask(server, "/readyz")[::2] == (503, b"there was no update yet\n")
    assert ask(server)[0] == ask(server, "/healthz")[0] == 200
    why[0] = None
    assert ask(server, "/readyz")[0] == 200


# Warnings and announcements


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_an_open_port_is_told(sources_of_a_run: object, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches metrics that others read without anybody having been told, and a warning that nobody needs."""
    with serving(MetricsConfig(port=0, address=address), sources_of_a_run):
        pass
    assert ("whoever reaches port" in caplog.text) == (address == "0.0.0.0")


def test_prometheus_is_told_where(sources_of_a_run: object, tmp_path: Path) -> None:
    """Catches an address that nobody can reach, a file that outlives the run, and another run's file that goes."""
    path = tmp_path / "run.json"
    with serving(MetricsConfig(port=0, file_sd=str(path)), sources_of_a_run) as server:
        expected = {"targets": [f"127.0.0.1:{server.port}"], "labels": {"run": "forage"}}
        assert json.loads(path.read_text()) == [expected]
        assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert not path.exists()
    with serving(MetricsConfig(port=0, file_sd=str(path)), sources_of_a_run):
        path.write_text("[]")
    assert path.read_text() == "[]"
    assert endpoint.reachable("0.0.0.0") != "0.0.0.0"
    assert endpoint.reachable("10.0.0.7") == "10.0.0.7"


def test_a_port_of_minus_one_serves_nothing(sources_of_a_run: object, tmp_path: Path) -> None:
    """Catches a port that is opened all the same, or announced."""
    with serving(MetricsConfig(port=-1, file_sd=str(tmp_path / "x.json")), sources_of_a_run) as server:
        assert server is None
        assert not list(tmp_path.iterdir())


@pytest.fixture
def sources_of_a_run() -> object:
    from metric_sources import make_sources

    return make_sources()


def serving(config: MetricsConfig, sources: object) -> contextlib.AbstractContextManager[MetricsServer]:
    ready = Readiness(
        statistics=RunStatistics(Ledger()), actors_alive=lambda: 1, stopping=lambda: False, max_update_age_seconds=1.0
    )
    return endpoint.served(config, sources, ready, run="forage")  # type: ignore[arg-type, return-value]
