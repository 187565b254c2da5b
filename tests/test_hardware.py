"""Cores under a quota of processor time."""

from __future__ import annotations

import os

import pytest
from shoal.deploy.placement import hardware

ALL = len(os.sched_getaffinity(0))


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups as files: ``groups(own, {path: text})``."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for path, text in files.items():
            (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / path).write_text(text)
        monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "fs")
        return hardware.available_cores()

    return make


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2, id="docker --cpus=2"),
        pytest.param("0::/pod/c\n", {"cpu.max": "max 100000\n", "pod/cpu.max": "350000 100000\n"}, 3, id="a pod"),
        pytest.param("0::/host/path\n", {"cpu.max": "400000 100000\n"}, 4, id="a path of the host"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 64, id="no limit"),
        pytest.param("0::/\n", {}, 64, id="no such file"),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, 64, id="another format"),
        pytest.param(
            "4:memory:/a\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "600000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            6,
            id="version 1",
        ),
        pytest.param(
            "3:cpu,cpuacct:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            64,
            id="version 1, no limit",
        ),
    ],
)
def test_a_quota_bounds_the_cores(groups, own, files, cores):
    """One learner per core of a host of 64, on two cores' worth of time."""
    assert groups(own, files) == cores


def test_where_nothing_is_said_it_is_what_the_process_may_run_on(monkeypatch, tmp_path):
    """A machine without control groups that has no cores."""
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "none")
    assert hardware.available_cores() == ALL
