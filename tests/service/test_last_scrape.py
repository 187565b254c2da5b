"""A run that is done is scraped once more, so that Prometheus knows."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scraping import HANG, ask
from service import SMALL, start_shoal, wait_for
from shoal.deploy.monitoring.metrics_server import MetricsServer


def scraping_every(seconds: float, server: MetricsServer, stop: threading.Event) -> threading.Thread:
    def scrape() -> None:
        while not stop.wait(seconds):
            ask(server)

    thread = threading.Thread(target=scrape)
    thread.start()
    return thread


def test_the_end_is_scraped_where_somebody_scrapes(serve: Callable[..., MetricsServer]) -> None:
    """Catches a run that is gone before Prometheus knows that it is done, and one that waits for nobody."""
    server, stop = serve(), threading.Event()
    assert not server.wait_for_scrape(60.0)  # nobody ever asked
    ask(server)
    assert not server.wait_for_scrape(60.0)  # somebody had a look
    thread = scraping_every(0.5, server, stop)
    try:
        wait_for(lambda: len(server._scraped) == 2 and server._scraped[1] - server._scraped[0] < 2.0)
        assert server.wait_for_scrape(60.0)
        assert not server.wait_for_scrape(60.0, give_up=lambda: True)
        assert not server.wait_for_scrape(0.0)
    finally:
        stop.set()
        thread.join()
    began, interval = time.monotonic(), server._scraped[1] - server._scraped[0]
    assert not server.wait_for_scrape(60.0)  # nobody asks any more
    assert time.monotonic() - began < 1.5 * interval + 10.0


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_says_that_it_is_done(interrupted: bool, tmp_path: Path) -> None:
    """Catches an alert for every run that ends; and a run that was interrupted and is taken for one that is done."""
    steps = f"total_env_steps={10**9 if interrupted else 4000}"
    settings = ("mode=inline", *SMALL, steps, "metrics.port=0", "metrics.address=127.0.0.1", "run_dir=run")
    process = start_shoal("train", *settings, cwd=tmp_path)
    assert process.stdout is not None
    url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\S+/metrics", line)))
    with process.stdout, ThreadPoolExecutor(1) as reader:
        said = reader.submit(process.stdout.read)
        seen: list[str] = []
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=HANG) as answer:
                seen += re.findall(r"^shoal_run_finished (\S+)$", answer.read().decode(), re.M)
            if interrupted and len(seen) == 3:
                process.send_signal(signal.SIGTERM)
                seen.append("told")
            time.sleep(0.3)
        assert process.returncode == (143 if interrupted else 0), said.result()
    assert set(seen) == ({"0.0", "told"} if interrupted else {"0.0", "1.0"})


def test_a_signal_in_the_wait_for_the_last_scrape_interrupts_nothing(tmp_path: Path) -> None:
    """Catches a run that is done, and that a launcher starts again because it exited with 143."""
    settings = ("mode=inline", *SMALL, "total_env_steps=4000", "metrics.port=0", "run_dir=run")
    process = start_shoal("train", *settings, cwd=tmp_path)
    assert process.stdout is not None
    url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\S+/metrics", line)))
    with process.stdout, ThreadPoolExecutor(1) as reader:
        said = reader.submit(process.stdout.read)
        while process.poll() is None and not (tmp_path / "run" / "summary.json").exists():
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=HANG) as answer:
                answer.read()
            time.sleep(1.0)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 0, said.result()
