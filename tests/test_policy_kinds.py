"""Policy classes of the user's: found by name, and refused with a sentence where they do not fit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import shoal
import torch
from shoal.learner.described_policy import describe_policy
from shoal.policy import ImageObservation, VectorObservation
from shoal.policy.actions import Continuous, Discrete
from shoal.policy.kinds import check_policy, find_policy
from shoal.policy.make import make_policy
from shoal.policy.observation import Observation
from shoal.policy.recurrent_policy import PolicyOutput, RecurrentPolicy
from torch import Tensor, nn

VECTOR = VectorObservation(5)
CHOICE = Discrete((("left", "right", "stay"),))
HERE = "policy_kinds_of_the_user"


class Own(RecurrentPolicy):
    """As small as a policy can be: every part is the user's."""

    def __init__(
        self,
        observation: Observation,
        actions: Any,
        embedding_rows: int,
        *,
        action_rows: Any = None,
        initialization: Any = None,
        trained_observation: Any = None,
        size: int = 24,
        layers: int = 2,
    ) -> None:
        super().__init__(
            observation,
            actions,
            embedding_rows,
            action_rows=action_rows,
            trained_observation=trained_observation,
            hidden=size,
        )
        columns = self.num_known_actions * (2 if isinstance(self.actions, Continuous) else 1)
        self.body = nn.Linear(5, size)
        self.lstm = nn.LSTM(size, size, num_layers=layers)
        self.head = nn.Linear(size, columns)
        self.critic = nn.Linear(size, 1)

    def encode(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.body(self.trained_columns(obs)))

    def heads(self, core: Tensor) -> PolicyOutput:
        return PolicyOutput(self.logits(core), self.critic(core).squeeze(-1))

    def logits(self, core: Tensor) -> Tensor:
        return self.head(core)


class Noisy(Own):
    def encode(self, obs: Tensor) -> Tensor:
        return super().encode(obs) + torch.randn(())


class SeesOthers(Own):
    """Normalises over the rows that it is given: an unroll has others than a step."""

    def encode(self, obs: Tensor) -> Tensor:
        return super().encode(obs - obs.mean(0))


class OtherAct(Own):
    def logits(self, core: Tensor) -> Tensor:
        return 2 * self.head(core)

    def heads(self, core: Tensor) -> PolicyOutput:
        return PolicyOutput(self.head(core), self.critic(core).squeeze(-1))


class ValueColumn(Own):
    def heads(self, core: Tensor) -> PolicyOutput:
        return PolicyOutput(self.logits(core), self.critic(core))


class TooFewLogits(Own):
    def logits(self, core: Tensor) -> Tensor:
        return self.head(core)[:, :2]


class Breaks(Own):
    def encode(self, obs: Tensor) -> Tensor:
        return self.body(obs[:, :2])


class NotANumber(Own):
    def logits(self, core: Tensor) -> Tensor:
        return self.head(core) * torch.nan


class Strange(nn.Module):
    pass


class TakesNothing(RecurrentPolicy):
    def __init__(self) -> None:
        raise AssertionError("it is not even tried")


class NoCore(Own):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        del self.lstm


class OtherCore(Own):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.lstm = nn.Identity()  # type: ignore[assignment]


class WithCore(Own):
    """Makes the core that the settings name."""

    def __init__(self, *arguments: Any, core: str = "lstm", core_kwargs: Any = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        del self.lstm
        self.core_name, self.core_kwargs = core, core_kwargs
        self.make_core(24)


class IgnoresCore(Own):
    """Takes the setting and does something else."""

    def __init__(self, *arguments: Any, core: str = "lstm", core_kwargs: Any = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module under a name that an import finds."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def made(name: str, observation: Observation = VECTOR, actions: Any = CHOICE, **kwargs: Any) -> RecurrentPolicy:
    return make_policy(f"{HERE}:{name}", observation, actions, 10, kwargs=kwargs)


@pytest.mark.parametrize("actions", [CHOICE, Continuous(("a", "b")), Discrete((("a", "b"), ("c", "d", "e")), False)])
def test_a_policy_of_the_users_passes(actions: Any) -> None:
    """Catches a check that refuses what works, or that leaves something behind."""
    policy = made("Own", actions=actions, size=32)
    before, was_training = torch.random.get_rng_state(), policy.training
    check_policy(policy)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (policy.training, policy.get_memory()) == (was_training, {})
    assert (policy.kind, policy.kwargs, policy.lstm.hidden_size) == (f"{HERE}:Own", {"size": 32}, 32)


@pytest.mark.parametrize("observation", [VECTOR, ImageObservation(36, 36, 3)])
def test_a_subclass_of_fast_passes(observation: Observation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that only fits policies made from nothing."""
    monkeypatch.setattr(sys.modules[HERE], "Mine", type("Mine", (shoal.FastPolicy,), {}), raising=False)
    check_policy(made("Mine", observation))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Noisy", "step gives other logits than act"),
        ("SeesOthers", "unroll gives other logits than step"),
        ("OtherAct", "step gives other logits than act"),
        ("ValueColumn", r"value of step for 3 observations has shape \[3, 1\], must be \[3\]"),
        ("TooFewLogits", r"logits of act for 3 observations has shape \[3, 2\], must be \[3, 3\], 3 logits"),
        ("Breaks", r"fails on observations \[5\]: RuntimeError"),
        ("NotANumber", "step gives other logits than act"),
        ("NoCore", r"it has no core: its __init__ must make one with self.make_core\(inputs\)"),
        ("OtherCore", "expected a shoal.Core as self.core, or a torch.nn.LSTM as self.lstm, got Identity"),
        ("Strange", r"expected a subclass of shoal.RecurrentPolicy, got <class '.*Strange'>"),
        ("TakesNothing", r"Its __init__ takes \(observation, actions, embedding_rows"),
        ("Absent", f"{HERE} has no class Absent"),
        ("VECTOR", "expected a subclass of shoal.RecurrentPolicy, got VectorObservation"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(name: str, expected: str) -> None:
    """Catches a policy whose learner trains another function than its actors act by, and messages that name nothing."""
    with pytest.raises(ValueError, match=expected) as caught:
        check_policy(made(name))
    assert f"policy {HERE}:{name}: " in str(caught.value) or f"policy {HERE}:{name} " in str(caught.value)


def test_a_missing_package_is_named() -> None:
    """Catches a checkpoint of somebody's class that cannot say what to install."""
    with pytest.raises(ValueError, match=r"policy no_such_pkg.nets:Net: there is no module 'no_such_pkg' here"):
        find_policy("no_such_pkg.nets:Net")
    with pytest.raises(ValueError, match="was defined in a script or notebook, and Net is not defined in this one"):
        find_policy("__main__:Net")


def test_arguments_are_the_classes_own() -> None:
    """Catches arguments that replace those every policy is given, or that nobody takes."""
    with pytest.raises(ValueError, match=r"policy.kwargs has action_rows, which every policy is given"):
        made("Own", action_rows={})
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        made("Own", colour="red")


@pytest.mark.parametrize("layers", [1, 3])
def test_an_lstm_of_the_users_own_is_a_core_as_it_is(layers: int) -> None:
    """Catches a core that draws other weights than the user's layer had, or that has a fixed number of layers."""
    torch.manual_seed(3)
    policy = made("Own", layers=layers)
    check_policy(policy)
    torch.manual_seed(3)
    wanted = Own(VECTOR, CHOICE, 10, layers=layers)
    assert policy.core is policy.lstm
    assert policy.core.state_shapes == {"h": (layers, 24), "c": (layers, 24)}
    for (name, one), (other, two) in zip(policy.named_parameters(), wanted.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two)


def test_an_lstm_that_steps_do_not_compute_is_refused() -> None:
    """Catches a layer whose steps would be those of another."""
    for settings in ({"bidirectional": True}, {"batch_first": True}, {"bias": False}, {"proj_size": 3}):
        policy = Own(VECTOR, CHOICE, 10)
        with pytest.raises(ValueError, match=r"self.lstm must be time-major, with biases, and without dropout"):
            policy.lstm = nn.LSTM(24, 24, **settings)  # type: ignore[arg-type]


def test_policies_of_ones_own_take_the_core_that_is_set_or_refuse_it() -> None:
    """Catches a setting without effect, and a policy that is given arguments that it never asked for."""
    core = "own_cores:Leaky"
    policy = make_policy(f"{HERE}:WithCore", VECTOR, CHOICE, 10, core=core, core_kwargs={"halves": 3})
    check_policy(policy)
    assert policy.core.state_shapes == {"trace": (1, 3, 8), "age": (1, 1)}
    assert describe_policy(policy)["core"] == core
    for name, expected in (
        ("Own", "it makes a core of its own, so policy.core=own_cores:Leaky .* without effect"),
        ("IgnoresCore", r"its core is of LSTMCore, where policy.core=own_cores:Leaky; make it with self.make_core"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_policy(f"{HERE}:{name}", VECTOR, CHOICE, 10, core=core)
