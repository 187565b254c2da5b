"""Optimizers of the user's choice, by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import make_learner
from rollouts import small_policy as make_policy
from shoal.deploy.settings.load import load_config
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.config import LearnerConfig
from shoal.learner.optimizer import check_optimizer
from shoal.learner.rollback import Rollback


def test_arguments_reach_the_class() -> None:
    """Catches a learning rate or an argument that is dropped on the way."""
    learner = make_learner(
        make_policy(), learning_rate=0.25, optimizer="torch.optim:SGD", optimizer_kwargs={"momentum": 0.5}
    )
    assert type(learner.optimizer) is torch.optim.SGD
    [group] = learner.optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optimizer": "torch.optim:Adamw"}, "torch.optim:Adamw: there is no such class here"),
        ({"optimizer": "no_such_pkg:Opt"}, "no_such_pkg:Opt: there is no such class here"),
        ({"optimizer": "torch.nn:Linear"}, "torch.nn:Linear: expected a subclass of torch.optim.Optimizer"),
        ({"optimizer": "torch.optim:SGD", "optimizer_kwargs": {"speed": 2}}, "unexpected keyword argument 'speed'"),
        ({"optimizer": "torch.optim:LBFGS"}, "torch.optim:LBFGS: step() raises TypeError"),
        ({"optimizer": "torch.optim:AdamW", "optimizer_kwargs": {"weight_decay": 0.1}}, ""),
        ({}, ""),
    ],
)
def test_what_does_not_fit_is_said_before_the_start(settings: dict[str, Any], expected: str) -> None:
    """Catches an optimizer that fails in the first update of every learner."""
    problem = check_optimizer(LearnerConfig(**settings))
    assert expected in problem
    assert bool(expected) == bool(problem)


def test_adam_takes_no_arguments_of_others() -> None:
    """Catches a weight decay that is set and has no effect."""
    [problem] = load_config((), ["learner.optimizer_kwargs={weight_decay: 0.1}"])[1]
    assert problem.startswith("learner.optimizer_kwargs={'weight_decay': 0.1} need an optimizer")


def stepped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", ["torch.optim:Adamax", "torch.optim:NAdam", "torch.optim:ASGD", "torch.optim:Rprop"])
def test_an_update_that_fails_leaves_no_trace(name: str) -> None:
    """Catches state of an optimizer, in tensors or in numbers, that goes on from a step that was undone."""
    policies = [make_policy(), make_policy()]
    undone, plain = (make_learner(policy, optimizer=name, learning_rate=1e-2) for policy in policies)
    plain.policy.load_state_dict(undone.policy.state_dict())
    for learner in (undone, plain):
        stepped(learner.optimizer)
    rollback = Rollback(list(undone.policy.parameters()), undone.optimizer)
    with contextlib.suppress(ZeroDivisionError), rollback.on(ZeroDivisionError):
        stepped(undone.optimizer)
        raise ZeroDivisionError
    for learner in (undone, plain):
        stepped(learner.optimizer)
    for one, two in zip(undone.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_resuming_keeps_moments_only_of_the_same_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches Adam's moments taken for those of another optimizer, and settings of the checkpoint that win over the
    run's own."""
    saved = make_learner(make_policy(), optimizer="torch.optim:RMSprop", learning_rate=1e-2)
    stepped(saved.optimizer)
    state = {"config": {"learner": {"optimizer": "torch.optim:RMSprop"}}}
    Checkpoints(tmp_path).save(saved, state)
    checkpoint = Checkpoints(tmp_path).latest()
    assert checkpoint is not None
    same = make_learner(make_policy(), optimizer="torch.optim:RMSprop", learning_rate=1e-3)
    checkpoint.restore(same)
    assert same.optimizer.param_groups[0]["lr"] == 1e-3
    first, restored = (next(iter(learner.optimizer.state.values())) for learner in (saved, same))
    assert torch.equal(first["square_avg"], restored["square_avg"])
    other = make_learner(make_policy(), learning_rate=1e-3)
    checkpoint.restore(other)
    assert not other.optimizer.state
    assert "was saved with the optimizer torch.optim:RMSprop; adam begins anew" in caplog.text
    stepped(other.optimizer)
