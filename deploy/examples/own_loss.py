"""A loss of one's own, with an auxiliary task: the memory also predicts the reward of the step."""

from __future__ import annotations

import sys
from typing import Any

import shoal
import yaml
from torch import Tensor, nn


class Predicting(shoal.FastPolicy):
    """Fast with a further head, which only the loss reads."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.reward_head = nn.Linear(self.core.hidden_size, 1)


def with_reward_prediction(inputs: shoal.LossInputs, coefficient: float = 0.1) -> dict[str, Tensor]:
    """PPO's terms, and ``coefficient`` times the squared error of the predicted reward.

    A loss takes everything that it may need in ``inputs`` and returns scalars by name, of which ``loss`` is minimized.
    ``inputs.mean`` leaves out the steps that only lead from one episode to the next.
    """
    terms = shoal.ppo_loss(inputs)
    assert isinstance(inputs.policy, Predicting)
    predicted = inputs.policy.reward_head(inputs.core).squeeze(-1)
    terms["reward_error"] = inputs.mean((predicted - inputs.batch["reward"].T).square())
    terms["loss"] = terms["loss"] + coefficient * terms["reward_error"]
    return terms


def main(**settings: Any) -> shoal.Run:
    """Train it on CartPole."""
    run = shoal.train(
        "CartPole-v1",
        policy=Predicting,
        loss=with_reward_prediction,
        config={"learner.loss_kwargs": {"coefficient": 0.2}, "total_env_steps": 100_000},
        **settings,
    )
    print(f"with reward prediction: {run.summary['mean_return']}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
