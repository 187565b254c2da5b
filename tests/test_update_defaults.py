"""``learner.desired_kl=auto`` and ``learner.clip_coef=auto``: what follows for them from actions and lag."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from shoal.deploy.placement.layout import Machine, choose_layout
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
    ("settings", "kl", "clip"),
    [
        (["env.id=CartPole-v1"], 0.01, 0.1),
        (["env.id=Jointed-v0"], 0.06, 0.1),
        (["env.id=Jointed-v0", "env.kwargs.joints=2"], 0.02, 0.1),
        (["env.id=Choosing-v0"], 0.02, 0.1),
        (["env.id=Jointed-v0", "mode=cluster"], 0.06, 0.1),
        (["env.id=Jointed-v0", "actor.max_policy_lag=2"], 0.06, 0.1),
        # Nobody is behind in lock step, and in processes that act and learn in turn.
        (["env.id=Jointed-v0", "actor.max_policy_lag=0"], 0.06, 0.2),
        (["env.id=Choosing-v0", "mode=inline"], 0.02, 0.2),
        (["env.id=Choosing-v0", "placement=colocated", "learner.num_learners=2", "env.num_envs=32"], 0.02, 0.2),
        # With one pass the ratio is measured from the policy that acted.
        (["env.id=CartPole-v1", "learner.epochs=1"], 0.01, 0.2),
        (["env.id=CartPole-v1", "learner.clip_coef=0.3", "learner.desired_kl=0.5"], 0.5, 0.3),
        (["env.id=Jointed-v0", "learner.desired_kl=0", "learner.clip_coef=0"], 0, 0),
    ],
    ids=str,
)
def test_how_far_an_update_may_move_the_policy(settings: list[str], kl: float, clip: float) -> None:
    """Catches robots that move a sixth as far as they may, and two updates that together move a policy twice as far."""
    config = configured(*settings)
    spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    places = 4 if config.mode == "cluster" else None
    layout = choose_layout(config, Machine(cores=2, accelerator=False, actor_places=places))
    setup = make_learner_setup(config, layout, make_worker_setup(config, spec, run_id="a-run"), spec)
    assert (setup.learner.desired_kl, setup.learner.clip_coef) == (pytest.approx(kl), clip)
