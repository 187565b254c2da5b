"""What is in a film."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest


def frames(file: Path, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    done = subprocess.run(
        [ffmpeg, "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True
    )
    assert f"{width}x{height}".encode() in done.stderr
    assert b"10 fps" in done.stderr
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
