"""SB3's PPO, or sb3-contrib's RecurrentPPO, on one environment with settings in the notation of rl-baselines3-zoo. Run
by ``shoal bench learn --peer`` in an environment of its own."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Any

import gymnasium
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecNormalize,
    sync_envs_normalization,
)
from suite_env import Asked, make, tell

EVALUATED = 8
"""Environments that the trained policy plays in at once."""


class Recipe:
    """The zoo's settings: what the environment gets, and what is left for the algorithm."""

    def __init__(self, settings: dict[str, Any]) -> None:
        left = dict(settings)
        self.wrapper = left.pop("env_wrapper", {})
        self.num_envs = left.pop("n_envs", 1)
        self.normalize = left.pop("normalize", False)
        self.frame_stack = left.pop("frame_stack", 1)
        for name in ("learning_rate", "clip_range"):
            if isinstance(left.get(name), str):
                # Linear in what is left of training, down to 0.
                left[name] = partial(_times, float(left[name].removeprefix("lin_")))
        if "policy_kwargs" in left:
            kwargs = dict(left["policy_kwargs"])
            if "activation_fn" in kwargs:
                kwargs["activation_fn"] = getattr(torch.nn, kwargs["activation_fn"])
            left["policy_kwargs"] = kwargs
        self.algorithm = left

    def make(self, asked: Asked, num_envs: int, seed: int, directory: str | None) -> VecEnv:
        """``num_envs`` environments one after the other, as the zoo makes them; evaluated where not recorded."""
        envs: VecEnv = DummyVecEnv([partial(self._one, asked, directory)] * num_envs)
        envs.seed(seed)
        if self.normalize:
            gamma = self.algorithm.get("gamma", 0.99)
            training = directory is not None
            box = isinstance(envs.observation_space, gymnasium.spaces.Box)
            envs = VecNormalize(envs, training=training, norm_obs=box, norm_reward=training, gamma=gamma)
        return VecFrameStack(envs, self.frame_stack) if self.frame_stack > 1 else envs

    def _one(self, asked: Asked, directory: str | None) -> gymnasium.Env[Any, Any]:
        return Monitor(make(asked, wrapper=self.wrapper, directory=directory))


def _times(factor: float, left: float) -> float:
    return factor * left


def main() -> None:
    asked = Asked.of(sys.argv[2])
    algorithm = {"sb3-ppo": PPO, "sb3-recurrent": RecurrentPPO}[sys.argv[1]]
    recipe = Recipe(asked.settings)
    envs = recipe.make(asked, recipe.num_envs, asked.seed, asked.directory)
    model = algorithm(env=envs, seed=asked.seed, device="cpu", **recipe.algorithm)
    model.learn(asked.env_steps)
    ended = time.time()
    played = recipe.make(asked, EVALUATED, asked.seed + 1_000_000, None)
    sync_envs_normalization(envs, played)
    means = [evaluate_policy(model, played, asked.episodes, deterministic=greedy)[0] for greedy in (False, True)]
    tell(sampled=float(means[0]), greedy=float(means[1]), ended=ended)


if __name__ == "__main__":
    main()
