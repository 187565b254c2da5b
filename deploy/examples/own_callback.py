"""A callback of one's own: numbers beside shoal's, and an end when the task is solved."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import shoal


class StopWhenSolved(shoal.Callback):
    """Writes the share of successful episodes, and ends the run once it is high."""

    def __init__(self, success: float = 1.0, share: float = 0.95, window: int = 500) -> None:
        self.success, self.share = success, share
        self.outcomes: deque[bool] = deque(maxlen=window)

    def on_episodes(self, run: Any, episodes: Any) -> Mapping[str, float]:
        """Add the episodes of an update; the share goes to metrics.jsonl as ``callback/success``."""
        self.outcomes.extend(returned >= self.success for returned in episodes.returns)
        share = sum(self.outcomes) / len(self.outcomes)
        if len(self.outcomes) == self.outcomes.maxlen and share >= self.share:
            run.stop()
        return {"success": share}

    def on_checkpoint(self, run: Any, path: Any) -> None:
        """Say what was saved."""
        print(f"saved {path.name} at {run.env_steps:,} steps")


def main(**settings: Any) -> shoal.Run:
    """Train on a memory task until it is solved."""
    run = shoal.train(config="recall", callbacks=[StopWhenSolved()], **settings)
    print(f"ended by {run.summary['stopped_by'] or 'its last step'} after {run.summary['env_steps']:,} steps")
    return run


if __name__ == "__main__":
    main(**dict(word.split("=", 1) for word in sys.argv[1:]))
