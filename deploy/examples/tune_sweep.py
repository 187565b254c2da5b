"""A sweep with Ray Tune: trials are runs, which report as they train, and those that learn little are stopped early.

Every trial trains in its own process (``mode=inline``), on one core: Tune shares the machine among them. It needs
``pip install 'ray[tune]'``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import shoal
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler


class Report(shoal.Callback):
    """Tells Tune the mean return of the last episodes, every ``every`` environment steps.

    Tune ends a trial from outside, at a report; its checkpoints are in its run directory.
    """

    def __init__(self, every: int) -> None:
        self.every, self.next = every, every

    def on_update(self, run: shoal.RunningRun, update: shoal.Update) -> Mapping[str, float] | None:
        """Report."""
        if run.env_steps >= self.next and run.mean_return is not None:
            self.next += self.every
            tune.report({"mean_return": run.mean_return, "env_steps": run.env_steps})
        return None


def trial(sampled: Mapping[str, Any], *, settings: Mapping[str, Any], folder: Path) -> None:
    """One run, in the process of the trial."""
    name = tune.get_context().get_trial_id()
    steps = int(settings["total_env_steps"])
    shoal.train(
        "CartPole-v1",
        config={**settings, **sampled},
        run_dir=folder / name,
        callbacks=[Report(steps // 10)],
        progress=False,
    )


def main(trials: int = 4, run_dir: str = "runs/sweep", **settings: Any) -> dict[str, Any]:
    """Try learning rates and discounts, and return the best."""
    folder = Path(run_dir).resolve()
    defaults: dict[str, Any] = {"mode": "inline", "total_env_steps": 40_000}
    space = {"learner.learning_rate": tune.loguniform(1e-4, 1e-2), "learner.gamma": tune.choice([0.97, 0.99, 0.995])}
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        functools.partial(trial, settings={**defaults, **settings}, folder=folder),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="mean_return", mode="max", num_samples=trials, scheduler=ASHAScheduler(grace_period=2)
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    best = tuner.fit().get_best_result()
    assert best.metrics is not None
    assert best.config is not None
    print(f"best of {trials}: a return of {best.metrics['mean_return']:.1f} with {dict(best.config)}")
    return dict(best.config)


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
