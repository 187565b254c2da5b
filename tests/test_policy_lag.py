"""``actor.max_policy_lag=auto``, and what follows from it for ``learner.desired_kl``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.placement.policy_lag import with_policy_lag
from shoal.deploy.placement.setups import make_learner_setup, make_worker_setup
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.envs.registry import make_env_spec


class Jointed(gymnasium.Env[Any, Any]):
    """Takes actions of as many numbers as it is told."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, joints: int = 6) -> None:
        self.action_space = spaces.Box(-1, 1, (joints,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3, np.float32), 0.0, True, False, {}


class Choosing(Jointed):
    def __init__(self) -> None:
        self.action_space = spaces.MultiDiscrete([3, 3])


gymnasium.register("Jointed-v0", Jointed)
gymnasium.register("Choosing-v0", Choosing)


def configured(*settings: str) -> Config:
    config, problems = load_config((), ["env.num_envs=16", *settings])
    assert not problems
    return config


@pytest.mark.parametrize(
    ("settings", "lag", "kl", "clip"),
    [
        (["env.id=Jointed-v0"], 0, 0.06, 0.2),
        (["env.id=Jointed-v0", "env.kwargs.joints=2"], 0, 0.02, 0.2),
        (["env.id=Jointed-v0", "env.kwargs.joints=1"], 1, 0.01, 0.1),
        (["env.id=CartPole-v1"], 1, 0.01, 0.1),
        (["env.id=Choosing-v0"], 1, 0.01, 0.1),
        # In one process nobody is behind, whatever the lag might be.
        (["env.id=Choosing-v0", "mode=inline"], 1, 0.02, 0.2),
        (["env.id=Jointed-v0", "mode=inline"], 1, 0.06, 0.2),
        (["env.id=Choosing-v0", "placement=colocated", "learner.num_learners=2", "env.num_envs=32"], 0, 0.02, 0.2),
        # On a cluster an update would wait for the slowest node.
        (["env.id=Jointed-v0", "mode=cluster"], 1, 0.01, 0.1),
        (["env.id=Jointed-v0", "actor.max_policy_lag=1"], 1, 0.01, 0.1),
        (["env.id=Jointed-v0", "actor.max_policy_lag=2", "learner.desired_kl=0.5"], 2, 0.5, 0.1),
        (["env.id=Jointed-v0", "learner.desired_kl=0"], 0, 0, 0.2),
        (["env.id=CartPole-v1", "learner.epochs=1"], 1, 0.01, 0.2),
        (["env.id=CartPole-v1", "learner.clip_coef=0.3"], 1, 0.01, 0.3),
        # Three actors have no equal share of a batch of four unrolls.
        (["env.id=Jointed-v0", "actor.num_actors=3", "learner.batch_size=64"], 1, 0.01, 0.1),
        (["env.id=Jointed-v0", "actor.num_actors=2", "learner.batch_size=64"], 0, 0.06, 0.2),
    ],
    ids=str,
)
def test_robots_are_trained_on_what_the_newest_version_did(
    settings: list[str], lag: int, kl: float, clip: float
) -> None:
    """Catches actions of six numbers that are a version behind a policy which moves six times as far, runs that
    wait for a share of a batch that no actor can give, and two updates that together move a policy twice as far."""
    config = configured(*settings)
    spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    config = with_policy_lag(config, spec)
    places = 4 if config.mode == "cluster" else None
    layout = choose_layout(config, Machine(cores=2, accelerator=False, actor_places=places))
    setup = make_learner_setup(config, layout, make_worker_setup(config, spec, run_id="a-run"), spec)
    assert (setup.max_policy_lag, setup.learner.desired_kl) == (lag, pytest.approx(kl))
    assert setup.learner.clip_coef == clip
    if lag == 0:
        assert layout.batch_size % (layout.num_actors * config.env.num_envs) == 0


def test_where_the_environment_is_not_known_nothing_is_in_lock_step() -> None:
    """Catches a layout that is refused before the environment was looked at."""
    assert with_policy_lag(configured("env.id=Jointed-v0")).actor.max_policy_lag == 1
    assert with_policy_lag(configured("actor.max_policy_lag=0")).actor.max_policy_lag == 0
