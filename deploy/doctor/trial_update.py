"""One update with the user's loss, on a few rows of zeros: what would end a run at its first update is found before."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from shoal.actors.rollout import trajectory_spec
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec
from shoal.envs.raised import raised
from shoal.learner.batch import BatchAssembler
from shoal.learner.device_choice import make_device_path
from shoal.learner.learner import Learner, NonFiniteUpdate
from shoal.policy.trajectory import TrajectoryHeader, allocate, from_bytes, to_bytes

_SEGMENTS, _STEPS = 4, 3


def check_loss(config: Config, env: EnvSpec) -> str:
    """What is wrong with ``learner.loss``; "" where nothing is."""
    name = config.learner.loss
    try:
        with torch.random.fork_rng(devices=()):
            _update(config, env)
    except ValueError as error:
        return str(error) if str(error).startswith(name) else f"{name} raises ValueError: {error}"
    except NonFiniteUpdate as error:
        return f"{name}: the first update of a fresh policy is not finite: {error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's code: it raises anything)
        return f"{name} raises {raised(error)}"
    return ""


def _update(config: Config, env: EnvSpec) -> None:
    learner_config = dataclasses.replace(
        config.learner, device="cpu", batch_size=_SEGMENTS, minibatches=1, precision="float32", weight_metrics_every=0
    )
    setup = make_worker_setup(config, env, run_id="trial")
    policy = setup.make_policy(config.policy.initialization)
    spec = trajectory_spec(env, _STEPS, 0, policy.core.state_shapes, setup.carries_memory)
    columns = allocate(spec, _SEGMENTS)
    for column in columns.values():
        column[:] = 0
    columns["is_first"][:, 0] = 1
    # Returns that differ: value targets that never vary have no unit, and no loss.
    columns["reward"][:] = np.linspace(-1, 1, columns["reward"].size).reshape(columns["reward"].shape)
    if spec.num_mask:
        columns["action_mask"][:] = 1
    header = TrajectoryHeader(run_id="trial", actor=0, restart_index=0, sequence=0, policy_version=0, statistics={})
    trajectory = from_bytes(spec, to_bytes(spec, header, columns))
    batch = BatchAssembler(spec, _SEGMENTS).assemble([trajectory])
    learner = Learner(policy, learner_config, make_device_path(learner_config), total_env_steps=10**9, seed=0)
    learner.update(batch)
