"""A head that keeps what it knows in Redis ends under a run, and is started again (Ray's GCS fault tolerance)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import SMALL, read_summary, start_shoal, wait_for

REDIS = shutil.which("redis-server")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def trained(run: Path) -> bool:
    """Whether updates were made, as the history of metrics says."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").is_file() else []
    return bool(lines) and json.loads(lines[-1])["policy_version"] > 2


def ray(*arguments: object, **environment: str) -> None:
    ray_itself = Path(sys.executable).with_name("ray")
    command = [str(ray_itself), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def server_of(port: int) -> tuple[int, list[str], dict[str, str]]:
    """Number, command and environment of the process that serves a head's address."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text().split("\0")[:-1]
            if words and words[0].endswith("/gcs_server") and f"--gcs_server_port={port}" in words:
                pairs = (pair.partition("=") for pair in (entry / "environ").read_text().split("\0")[:-1])
                return int(entry.name), words, {name: value for name, _, value in pairs}
    raise AssertionError(f"no gcs_server has the port {port}")


@pytest.fixture
def head() -> Iterator[int]:
    """The port of a head with a Redis."""
    assert REDIS is not None
    port, redis_port = free_port(), free_port()
    redis = subprocess.Popen(
        [REDIS, "--port", str(redis_port), "--save", "", "--dir", "/tmp"], stdout=subprocess.DEVNULL
    )
    try:
        start = ("start", "--head", f"--port={port}", "--num-cpus=8", "--include-dashboard=false")
        ray(*start, RAY_REDIS_ADDRESS=f"127.0.0.1:{redis_port}", RAY_external_storage_namespace="shoal")
        yield port
    finally:
        ray("stop", "--force")
        redis.kill()
        redis.wait()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(REDIS is None, reason="there is no redis-server: apt-get install redis-server")
def test_a_run_outlives_a_head_that_is_started_again(head: int, tmp_path: Path) -> None:
    """Catches a run that ends with its head although the cluster brings that back."""
    settings = ("mode=cluster", f"cluster.address=127.0.0.1:{head}", "cluster.head_may_return=true")
    ends = ("total_env_steps=1e9", "max_seconds=60", "run_dir=run", "checkpoint.every_updates=0")
    process = start_shoal("train", *SMALL, *settings, *ends, "log.every_seconds=0.5", cwd=tmp_path)
    log = tmp_path / "run" / "run.log"
    wait_for(lambda: trained(tmp_path / "run"), process=process)
    number, words, environment = server_of(head)
    os.kill(number, signal.SIGKILL)
    wait_for(lambda: "does not answer any more" in log.read_text(), process=process)
    wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("0*")), process=process)
    time.sleep(5)
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "Ray's head answers again" in log.read_text(), process=process)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        summary = read_summary(tmp_path / "run")
        assert summary["stopped_by"] == "max_seconds", output
        assert summary["books_balance"]
    finally:
        server.kill()
        server.wait()
