"""shoal: distributed rollouts and learning for recurrent reinforcement-learning policies.

What is listed in ``__all__`` is public. Names load on first use: ``import shoal`` imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.actors.ray_watch import RayLost
    from shoal.deploy.evaluation.job_process import JobFailed
    from shoal.deploy.library.acting import TrainedPolicy, load_policy
    from shoal.deploy.library.config import Config
    from shoal.deploy.library.exporting import CannotExport
    from shoal.deploy.library.minari_dataset import export_minari
    from shoal.deploy.library.onnx_file import export_onnx
    from shoal.deploy.library.runs import Run, evaluate, train
    from shoal.deploy.monitoring.sinks import LoggedRun, Sink
    from shoal.deploy.report.command import CannotReport
    from shoal.deploy.settings.load import ConfigError
    from shoal.deploy.training.callbacks import (
        Callback,
        CallbackFailed,
        EndedEpisodes,
        RunningPolicy,
        RunningRun,
        Update,
    )
    from shoal.deploy.training.options_schedule import OptionsSchedule
    from shoal.envs.boundary import EnvironmentFault
    from shoal.envs.play import Episodes
    from shoal.learner.checkpoint import CheckpointError
    from shoal.learner.loss import LossInputs, impala_loss, ppo_loss
    from shoal.policy import (
        ComponentPolicy,
        Core,
        DictObservation,
        FastPolicy,
        ImageObservation,
        PolicyOutput,
        RecurrentPolicy,
        TokenObservation,
        VectorObservation,
        zeroed,
    )

__all__ = [
    "Callback",
    "CallbackFailed",
    "CannotExport",
    "CannotReport",
    "CheckpointError",
    "ComponentPolicy",
    "Config",
    "ConfigError",
    "Core",
    "DictObservation",
    "EndedEpisodes",
    "EnvironmentFault",
    "Episodes",
    "FastPolicy",
    "ImageObservation",
    "JobFailed",
    "LoggedRun",
    "LossInputs",
    "OptionsSchedule",
    "PolicyOutput",
    "RayLost",
    "RecurrentPolicy",
    "Run",
    "RunningPolicy",
    "RunningRun",
    "Sink",
    "TokenObservation",
    "TrainedPolicy",
    "Update",
    "VectorObservation",
    "evaluate",
    "export_minari",
    "export_onnx",
    "impala_loss",
    "load_policy",
    "ppo_loss",
    "train",
    "zeroed",
]

_HOMES = {
    "Callback": "shoal.deploy.training.callbacks",
    "CallbackFailed": "shoal.deploy.training.callbacks",
    "CannotExport": "shoal.deploy.library.exporting",
    "CannotReport": "shoal.deploy.report.command",
    "CheckpointError": "shoal.learner.checkpoint",
    "Config": "shoal.deploy.library.config",
    "ConfigError": "shoal.deploy.settings.load",
    "EndedEpisodes": "shoal.deploy.training.callbacks",
    "EnvironmentFault": "shoal.envs.boundary",
    "Episodes": "shoal.envs.play",
    "JobFailed": "shoal.deploy.evaluation.job_process",
    "LoggedRun": "shoal.deploy.monitoring.sinks",
    "LossInputs": "shoal.learner.loss",
    "OptionsSchedule": "shoal.deploy.training.options_schedule",
    "RayLost": "shoal.actors.ray_watch",
    "Run": "shoal.deploy.library.runs",
    "RunningPolicy": "shoal.deploy.training.callbacks",
    "RunningRun": "shoal.deploy.training.callbacks",
    "Sink": "shoal.deploy.monitoring.sinks",
    "TrainedPolicy": "shoal.deploy.library.acting",
    "Update": "shoal.deploy.training.callbacks",
    "evaluate": "shoal.deploy.library.runs",
    "export_minari": "shoal.deploy.library.minari_dataset",
    "export_onnx": "shoal.deploy.library.onnx_file",
    "impala_loss": "shoal.learner.loss",
    "load_policy": "shoal.deploy.library.acting",
    "ppo_loss": "shoal.learner.loss",
    "train": "shoal.deploy.library.runs",
}
"""Modules of the names that do not come from ``shoal.policy``."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("shoal")  # as pyproject.toml has it
        except importlib.metadata.PackageNotFoundError:
            return "unknown"  # the code alone, as a run sends it to other nodes
    if name == "policy":
        return importlib.import_module("shoal.policy")
    if name not in __all__:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    # Libraries that come along draw random numbers as they are imported, and the program may have seeded the stream.
    state = random.getstate()
    try:
        return getattr(importlib.import_module(_HOMES.get(name, "shoal.policy")), name)
    finally:
        random.setstate(state)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
