"""Optimizers of the user's choice, by name."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import shoal
import torch
from own_optimizers import Descent
from rollouts import make_learner
from rollouts import small_policy as make_policy
from shoal import given
from shoal.deploy.doctor import preflight
from shoal.deploy.settings.load import load_config
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.config import LearnerConfig
from shoal.learner.optimizer import check_optimizer
from shoal.learner.rollback import Rollback


class NeedsSpeed(Descent):
    def __init__(self, params: Any, lr: float, speed: float) -> None:
        super().__init__(params, lr)


class Refuses(Descent):
    def __init__(self, params: Any, lr: float) -> None:
        raise RuntimeError("no GPU here")


class KeepsFunction(Descent):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["course"] = lambda step: step


class KeepsSet(Descent):
    def step(self, closure: Any = None) -> None:
        super().step()
        self.state[self.param_groups[0]["params"][0]]["seen"] = {1, 2}


class Forgets(Descent):
    def load_state_dict(self, state_dict: Any) -> None:
        raise KeyError("moments")


class Diverges(Descent):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.div_(0)


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
        ({"optimizer": "torch.optim:Adamw"}, "torch.optim:Adamw: torch.optim has no class Adamw"),
        ({"optimizer": "no_such_pkg:Opt"}, "no_such_pkg:Opt: there is no module 'no_such_pkg' here; install"),
        ({"optimizer": "__main__:Gone"}, "it was defined in a script or notebook, and Gone is not defined in this one"),
        ({"optimizer": "torch.nn:Linear"}, "torch.nn:Linear: expected a subclass of torch.optim.Optimizer"),
        ({"optimizer": "torch.optim:SGD", "optimizer_kwargs": {"speed": 2}}, "unexpected keyword argument 'speed'"),
        ({"optimizer": f"{__name__}:NeedsSpeed"}, "'speed'. Its __init__ takes (params, lr) and learner.optimizer_kw"),
        ({"optimizer": f"{__name__}:Refuses"}, "its __init__ raises RuntimeError: no GPU here"),
        ({"optimizer": f"{__name__}:KeepsFunction"}, "state_dict()['param_groups'][0]['course'] is a function; checkp"),
        ({"optimizer": f"{__name__}:KeepsSet"}, "state_dict()['state'][0]['seen'] is a set; checkpoints hold tensors"),
        ({"optimizer": f"{__name__}:Forgets"}, "Forgets does not go on from a checkpoint: KeyError: 'moments'"),
        ({"optimizer": f"{__name__}:Diverges"}, "weights are not finite after a step with finite gradients"),
        ({"optimizer": "own_optimizers:Descent", "optimizer_kwargs": {"momentum": 0.5}}, ""),
        ({"optimizer": "torch.optim:Muon"}, "Muon"),  # for matrices alone
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


OPTIMIZERS = [
    "torch.optim:Adamax",
    "torch.optim:NAdam",
    "torch.optim:ASGD",
    "torch.optim:Rprop",
    "own_optimizers:Descent",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
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


def test_a_module_that_cannot_be_imported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of the user's module in place of a problem of the settings."""
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('half written')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = check_optimizer(LearnerConfig(optimizer="broken_optimizers:Mine"))
    assert problem == "broken_optimizers:Mine: its module cannot be imported: RuntimeError: half written"


@pytest.mark.parametrize(
    ("optimizer", "got"),
    [
        (
            torch.nn.Linear,
            "got torch.nn.modules.linear:Linear; give the class, and its arguments as learner.optimizer_",
        ),
        (torch.optim.SGD([torch.zeros(1)], lr=1.0), "got an object of SGD; give the class"),
        (lambda params, lr: torch.optim.SGD(params, lr), "got an object of function; give the class"),
    ],
)
def test_what_is_no_class_of_optimizers_is_refused(optimizer: Any, got: str) -> None:
    """Catches a wrong object that fails only in a learner, or two complaints about one mistake."""
    with pytest.raises(shoal.ConfigError) as refused:
        shoal.Config(learner={"optimizer": optimizer, "optimizer_kwargs": {"momentum": 0.5}})
    [problem] = refused.value.problems
    assert problem.startswith("learner.optimizer: expected a subclass of torch.optim.Optimizer, ")
    assert got in problem


def test_arguments_that_no_checkpoint_holds_are_refused() -> None:
    """Catches advice about environments where the arguments are an optimizer's."""
    with pytest.raises(shoal.ConfigError, match=r"learner.optimizer_kwargs.lock: expected plain data") as refused:
        shoal.Config(learner={"optimizer": Descent, "optimizer_kwargs": {"lock": threading.Lock()}})
    assert "environment" not in str(refused.value)


def local_class() -> type[torch.optim.Optimizer]:
    """A class that no import finds, as those of a notebook."""

    class Local(Descent):
        pass

    return Local


def test_a_class_is_named_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a class that its name does not lead to, and one that the check before a start looks for in vain."""
    monkeypatch.setattr(given, "optimizers", {})
    assert shoal.Config(learner={"optimizer": torch.optim.AdamW}).learner.optimizer == "torch.optim.adamw:AdamW"
    assert shoal.Config(learner={"optimizer": Descent}).learner.optimizer == "own_optimizers:Descent"
    assert not given.optimizers
    cls = local_class()
    settings = {"optimizer": cls, "optimizer_kwargs": {"momentum": 0.5}}
    config = shoal.Config(env="recall", mode="inline", learner=settings, metrics={"port": -1})
    name = config.learner.optimizer
    assert name == f"{__name__}:local_class.<locals>.Local"
    assert preflight.check(config, tmp_path / "run") == []
    assert type(make_learner(make_policy(), optimizer=name).optimizer) is cls
    config = shoal.Config(env="recall", mode="inline", learner={**settings, "optimizer_kwargs": {"speed": 1}})
    [problem] = preflight.check(config, tmp_path / "run")
    assert problem.startswith(f"learner.optimizer: {name}: got an unexpected keyword argument 'speed'. Its __init__")
