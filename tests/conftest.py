"""The ground of every test: a private HOME, a short temporary directory for Ray, one thread for each process."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Before torch or Ray is imported by anything: both read the environment once. Subprocesses inherit it.
# Directly under /tmp: Ray puts its sockets below, and the path of an AF_UNIX socket ends at 107 bytes.
SCRATCH = Path(tempfile.mkdtemp(prefix="shoal-", dir="/tmp"))
RAY_TEMP = SCRATCH / "ray"
RAY_TEMP.mkdir()
# This checkout as `shoal`, installed or not, also where another checkout is installed.
SOURCE = SCRATCH / "source"
SOURCE.mkdir()
(SOURCE / "shoal").symlink_to(ROOT)
HELPERS = ROOT / "tests" / "helpers"
sys.path[:0] = [str(SOURCE), str(HELPERS)]
os.environ.update(
    HOME=str(SCRATCH),  # Ray writes its token to ~/.ray
    RAY_TMPDIR=str(SCRATCH),  # Ray itself appends "ray"
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # at Ray's own 15 a worker gets next to nothing beside a test that is busy
    # At Ray's own limits its processes end each other where the machine is busy.
    RAY_agent_register_timeout_ms="300000",
    RAY_worker_register_timeout_seconds="300",
    OMP_NUM_THREADS="1",
    # Ray's workers and our own subprocesses import this checkout and the environments of tests.
    PYTHONPATH=os.pathsep.join(filter(None, (str(SOURCE), str(HELPERS), os.environ.get("PYTHONPATH")))),
)
# Started in the background by a script, pytest inherits SIGINT ignored, and by nohup SIGHUP; all that tests start would
# ignore them, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# A token or an address of the developer's own cluster must not reach the tests.
for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
    os.environ.pop(name, None)
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


pytest.register_assert_rewrite("boundary_contract")
# Time is not asserted: a machine that is busy with other things would fail a property, or the making of its cases.
# The same cases in every run of the same tests, so that a case that nobody has seen fails where somebody looks for one:
# SHOAL_FUZZ draws new ones.
settings.register_profile(
    "shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="SHOAL_FUZZ" not in os.environ
)
settings.load_profile("shoal")
LAST_BEGIN = float(os.environ.get("SHOAL_LAST_BEGIN", "inf"))
"""Seconds since 1970 after which no test begins."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave out what would begin too late: a run that is cut off says nothing of any test."""
    if time.time() > LAST_BEGIN:
        pytest.skip("not run: no time was left (SHOAL_LAST_BEGIN)")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Results and timings that do not depend on the number of cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers that were made once, by running the original policies."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def counting() -> Any:
    """A collector that counts its readings."""
    from scraping import Counting

    return Counting()


@pytest.fixture
def serve(counting: Any) -> Iterator[Callable[..., Any]]:
    """Starts metrics servers and closes them; by default of ``counting``, at a free port of this machine."""
    from scraping import start_server

    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            contextlib.closing(start_server(**{"collector": counting, **options}))
        )


@pytest.fixture(scope="session")
def authority() -> Any:
    """The authority that signs the certificates of tests."""
    import trustme

    return trustme.CA()


@pytest.fixture
def access_files(authority: Any, tmp_path: Path) -> Any:
    """Certificate, key and token as somebody would make them."""
    from scraping import write_files

    return write_files(authority, tmp_path)


@pytest.fixture(scope="session")
def _ray_at_end() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def ray_session(_ray_at_end: None) -> None:
    """A running Ray with four logical CPUs: one for all the tests that ask, started when it is not running."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",  # one of our own, beside any other that this machine runs
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=150 * 1024**2,
            _temp_dir=str(RAY_TEMP),
        )


@pytest.fixture
def no_ray(_ray_at_end: None) -> Iterator[None]:
    """For tests whose subject starts Ray itself: none is running before, none after."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()
