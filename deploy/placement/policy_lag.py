"""What ``actor.max_policy_lag=auto`` means for an environment."""

from __future__ import annotations

import dataclasses

from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import ContinuousActions, EnvSpec


def with_policy_lag(config: Config, spec: EnvSpec | None = None) -> Config:
    """The configuration with a number in place of ``auto``; ``spec`` is the environment's, None where it is not known.

    The more numbers an action has, the further from 1 is the ratio of its densities under two versions: of data that is
    one version old much is clipped before anything was learned from it. Lock step is for one machine: on a cluster
    every update would wait for the slowest node, or for one that is gone.
    """
    if config.actor.max_policy_lag != "auto":
        return config
    lag = 0 if spec is not None and _in_lock_step(config, spec) else 1
    return dataclasses.replace(config, actor=dataclasses.replace(config.actor, max_policy_lag=lag))


def _in_lock_step(config: Config, spec: EnvSpec) -> bool:
    several = isinstance(spec.actions, ContinuousActions) and len(spec.actions.names) > 1
    actors, batch = config.actor.num_actors, config.learner.batch_size
    # Every actor gives an update the same number of unrolls.
    fits = "auto" in (actors, batch) or int(batch) % (config.env.num_envs * int(actors)) == 0
    # In one process nobody is behind in any case.
    return several and fits and config.mode == "local" and not config.policies
