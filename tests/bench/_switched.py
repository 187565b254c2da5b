"""``shoal`` whose runs write their history only while the file exists that ``SHOAL_BENCH_SWITCH`` names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import shoal.deploy.training.run
from shoal.deploy.cli import main
from shoal.deploy.monitoring.history import MetricsHistory

SWITCH = Path(os.environ["SHOAL_BENCH_SWITCH"])


class Switched(MetricsHistory):
    """Neither reads the catalogue nor writes while it is off."""

    def _write(self) -> None:
        if SWITCH.exists():
            super()._write()


if __name__ == "__main__":
    shoal.deploy.training.run.MetricsHistory = Switched  # a run makes its own
    sys.exit(main())
