"""A curriculum by environment steps, in settings alone: options of the environment's resets that change on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.deploy.training.callbacks import Callback, RunningRun, Update


class OptionsSchedule(Callback):
    """Sets ``reset(options=...)`` of the episodes that begin from certain trained environment steps on.

    ::

        callbacks:
          - name: shoal:OptionsSchedule
            kwargs: {options: {0: {size: 5}, 100000: {size: 9}}}

    Args:
        options: the options by the environment steps, trained in the whole run, from which they hold. A number is also
            taken as text, as JSON has it.

    Raises:
        ValueError: it is empty, or a key is no number of steps.
        TypeError: the options are no mappings.
    """

    def __init__(self, options: Mapping[int | str, Mapping[str, Any]]) -> None:
        if not options:
            raise ValueError("options is empty; give {STEPS: {NAME: VALUE}}, e.g. {0: {size: 5}, 100000: {size: 9}}")
        found: dict[int, dict[str, Any]] = {}
        for key, value in options.items():
            steps = _steps(key)
            if not isinstance(value, Mapping):
                raise TypeError(f"options of {steps:,} steps: expected a mapping of options by name, got {value!r}")
            if steps in found:
                raise ValueError(f"options has {steps:,} steps twice")
            found[steps] = dict(value)
        self._options = dict(sorted(found.items()))

    def on_start(self, run: RunningRun) -> None:
        """Set those of the steps that the run begins with."""
        self._set(run)

    def on_update(self, run: RunningRun, update: Update) -> None:
        """Set the next ones, once it is their turn."""
        self._set(run)

    def _set(self, run: RunningRun) -> None:
        # Of several policies any one's steps are those of the same games.
        done = max(policy.env_steps for policy in run.policies.values())
        reached = [options for steps, options in self._options.items() if steps <= done]
        if reached and reached[-1] != run.env_options:
            run.set_env_options(reached[-1])


def _steps(key: int | str) -> int:
    try:
        steps = int(str(key).replace("_", ""))
    except ValueError:
        steps = -1
    if steps < 0 or isinstance(key, (bool, float)):
        raise ValueError(f"options: expected a number of environment steps, 0 or more, got {key!r}")
    return steps
