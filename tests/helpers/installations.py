"""Virtual environments of their own that hold shoal as a user installs it, and clusters that are started from them.

An installation sees the libraries of the environment that runs the tests: no PYTHONPATH, and no other checkout that
happens to be installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


class Installation:
    """A virtual environment, and the command of it that starts shoal."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        self.command = [str(folder / "bin" / command[0]), *command[1:]]

    def install(self, wheel: Path) -> None:
        """Install a wheel without what it depends on."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--disable-pip-version-check", wheel], check=True, timeout=400)

    def see_libraries(self) -> None:
        """Find the packages of the environment that runs the tests; its .pth files, and so its shoal, stay unread."""
        site = self.folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "libraries.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))))

    def run(self, *arguments: object, cwd: Path, timeout: float = 800) -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            [*self.command, *map(str, arguments)],
            cwd=cwd,
            env=clean(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def clean() -> dict[str, str]:
    """The environment of a user's terminal: nothing says where shoal lies."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **token}


def build(kind: str, source: Path, folder: Path) -> Path:
    """A wheel, made by the hook that pip calls: ``wheel``, or ``editable`` for ``pip install -e``."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stderr, done.stderr
    return next(folder.glob("*.whl"))


@contextlib.contextmanager
def head(bare: Installation, folder: Path) -> Iterator[str]:
    """A Ray cluster of one node, whose processes start outside the project."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*bare.command, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2", f"--port={port}"]
    command += ["--include-dashboard=false", f"--object-store-memory={80 * 2**20}", "--block"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=clean(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=200)
