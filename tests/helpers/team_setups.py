"""Two policies in the games of ``team_games``: their settings, learners and queues, as a run makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from shoal.actors.teams import TeamSetup
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.deploy.placement.setups import make_worker_setup, patterns_of, team_shares
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.learner.learner_worker import LearnerWorker
from shoal.learner.policy_queues import PolicyQueues
from shoal.policy.weights import flatten_weights

ID = "pettingzoo:team_games:teams"
PATTERNS = {"hunters": ("hunter_*",), "runners": ("runner_*",)}
POLICIES = (f"env.id={ID}", "policies.hunters.agents=[hunter_*]", "policies.runners.agents=[runner_*]")
SMALL = (
    *(*POLICIES, "env.num_envs=12", "actor.unroll_length=6", "learner.minibatches=2", "mode=inline"),
    *(
        "policy.kind=component",
        "policy.components={lstm: {size: 16}}",
        "metrics.port=-1",
        "evaluation.random_seconds=0",
    ),
)


def configured(*settings: str) -> Config:
    config, problems = load_config([], [*SMALL, *settings])
    assert not problems
    return config


class Setups:
    """The learners of both policies and their common setup, as a run makes them."""

    def __init__(self, *settings: str) -> None:
        config = configured(*settings)
        layout = choose_layout(config, Machine(cores=2, accelerator=False))
        shares = team_shares(config, layout)
        self.setups: dict[str, LearnerSetup] = {
            name: own.setup(config, layout, make_worker_setup(config, own.spec, run_id="a-run"))
            for name, own in shares.items()
        }
        self.workers: dict[str, LearnerWorker] = {
            name: setup.make_learner_worker(shares[name].part(config, layout)) for name, setup in self.setups.items()
        }
        self.team = TeamSetup(
            agents=patterns_of(config), setups={name: setup.worker for name, setup in self.setups.items()}
        )
        self.queues = PolicyQueues({name: worker.queue for name, worker in self.workers.items()})

    def weights(self) -> list[Any]:
        return [flatten_weights(worker.learner.policy, 0) for worker in self.workers.values()]

    def rollouts(self, count: int) -> list[list[np.ndarray]]:
        """Unrolls of one actor, with copies of what it ships."""
        worker = self.team.make_worker(0, 0)
        found = [[part.copy() for part in worker.rollout(self.weights())] for _ in range(count)]
        worker.close()
        return found
