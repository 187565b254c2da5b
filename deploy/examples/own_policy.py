"""A policy of one's own: encoder and heads of plain PyTorch around shoal's memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import shoal
import torch
import yaml
from torch import Tensor, nn


class Narrow(shoal.RecurrentPolicy):
    """One layer before the core, one layer for each head; for vectors and one discrete choice.

    ``RecurrentPolicy`` adds memory, steps, and unrolls with resets inside. It asks for a core,
    which ``make_core`` makes as ``policy.core`` says, and for the three methods below, in which no row may depend on
    another. ``network_input`` and ``in_reward_units`` make it independent of the units of observations and rewards.
    """

    def __init__(
        self,
        observation: Any,
        actions: Any,
        embedding_rows: int,
        *,
        action_rows: Mapping[str, int] | None = None,
        trained_observation: Any = None,
        initialization: Any = None,  # shoal's own policies read it
        core: str = "lstm",
        core_kwargs: Mapping[str, Any] | None = None,
        size: int = 32,
    ) -> None:
        super().__init__(
            observation,
            actions,
            embedding_rows,
            action_rows=action_rows,
            trained_observation=trained_observation,
            hidden=size,
            core=core,
            core_kwargs=core_kwargs,
        )
        [columns] = self.trained_observation.shape
        self.body = nn.Linear(columns, size)
        self.make_core(size)
        self.actor = nn.Linear(size, self.num_known_actions)
        self.value_head = nn.Linear(size, 1)

    def encode(self, obs: Tensor) -> Tensor:
        """[N, observation] -> [N, size]."""
        return torch.tanh(self.body(self.network_input(obs)))

    def heads(self, core: Tensor) -> shoal.PolicyOutput:
        """[N, size] -> logits [N, actions], value [N]."""
        return shoal.PolicyOutput(self.logits(core), self.in_reward_units(self.value_head(core).squeeze(-1)))

    def logits(self, core: Tensor) -> Tensor:
        """[N, size] -> logits [N, actions]: the part of ``heads`` that acting needs."""
        return self.in_order(self.actor(core))


def main(**settings: Any) -> shoal.Run:
    """Train it on CartPole."""
    run = shoal.train(
        "CartPole-v1",
        config={
            "policy": {"kind": Narrow, "kwargs": {"size": 48}},
            "total_env_steps": 200_000,
            "env.num_envs": 16,
            "actor.unroll_length": 32,
        },
        **settings,
    )
    parameters = sum(parameter.numel() for parameter in run.policy.network.parameters())
    print(f"{type(run.policy.network).__name__} with {parameters:,} parameters: {run.summary['mean_return']}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
