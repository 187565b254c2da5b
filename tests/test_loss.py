"""Losses of the user's own: what they see, how their terms add up, and what is said of those that do not fit."""

from __future__ import annotations

import functools
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import shoal
import torch
from rollouts import make_learner, random_batch, small_policy
from service import SMALL
from shoal import given
from shoal.actors.user_code import give_loss
from shoal.deploy.doctor import preflight
from shoal.deploy.settings.load import load_config
from shoal.deploy.training import progress
from shoal.learner.forward_pass import valid_transitions
from torch import Tensor, nn


def with_critic_of_obs(inputs: shoal.LossInputs, coefficient: float = 0.5) -> dict[str, Tensor]:
    """PPO and a layer of the policy that only this loss reads."""
    terms = shoal.ppo_loss(inputs)
    assert inputs.core is not None
    guess = inputs.policy.guess(inputs.core).squeeze(-1)
    terms["guess_error"] = inputs.mean((guess - inputs.batch["reward"].T).square())
    terms["loss"] = terms["loss"] + coefficient * terms["guess_error"]
    return terms


class Entropic:
    """A class whose objects are called."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, inputs: shoal.LossInputs) -> dict[str, Tensor]:
        return {"loss": -self.scale * inputs.mean(inputs.entropy)}


def named(loss: Any) -> str:
    return f"{__name__}:{loss.__qualname__}"


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "losses_of_a_user", sys.modules[__name__])


def guessing_policy() -> Any:
    policy: Any = small_policy()
    torch.manual_seed(3)
    policy.guess = nn.Linear(policy.lstm.hidden_size, 1)
    return policy


@pytest.mark.parametrize("form", [{}, {"same_step": True}], ids=["next_step", "same_step"])
def test_a_term_of_ones_own_is_a_mean_over_valid_transitions(form: dict[str, Any]) -> None:
    """Catches terms over reset transitions, of final rows, or of one shard alone, and a layer that is not trained."""
    batch = random_batch(5, **form)
    results, layers = [], []
    for shards in (1, 3):
        policy = guessing_policy()
        before = policy.guess.weight.detach().clone()
        with torch.no_grad():
            output, _ = policy.unroll(
                batch["obs"].transpose(0, 1),
                batch["is_first"].T,
                (batch["initial_h"].transpose(0, 1), batch["initial_c"].transpose(0, 1)),
            )
            # [T, B]
            guess = policy.guess(output.core[:-1]).squeeze(-1)
            valid = valid_transitions(batch).T
            want = float((guess - batch["reward"].T)[valid].square().mean())
        learner = make_learner(policy, num_shards=shards, loss=f"losses_of_a_user:{with_critic_of_obs.__name__}")
        result = learner.update(batch)
        assert result.terms["guess_error"] == pytest.approx(want, rel=1e-5)
        assert not torch.equal(policy.guess.weight, before)
        results.append(result.terms["loss"])
        layers.append(policy.guess.weight.detach())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert torch.allclose(layers[0], layers[1], atol=1e-6)


def test_arguments_of_functions_and_classes() -> None:
    """Catches ``loss_kwargs`` that have no effect."""
    batch = random_batch(5)
    found = {}
    for scale in (1.0, 2.0):
        learner = make_learner(small_policy(), loss="losses_of_a_user:Entropic", loss_kwargs={"scale": scale})
        found[scale] = learner.update(batch).terms["loss"]
    assert found[2.0] == pytest.approx(2 * found[1.0], rel=1e-5)
    terms = []
    for coefficient in (0.0, 5.0):
        name = f"losses_of_a_user:{with_critic_of_obs.__name__}"
        learner = make_learner(guessing_policy(), loss=name, loss_kwargs={"coefficient": coefficient})
        terms.append(learner.update(batch).terms)
    assert terms[1]["loss"] == pytest.approx(terms[0]["loss"] + 5 * terms[0]["guess_error"], rel=1e-5)


def test_without_lag_impala_and_ppo_make_the_same_first_step() -> None:
    """Catches an importance weight that counts twice, and a policy gradient of the wrong sign."""
    batch = random_batch(5).clone()
    policies = []
    for loss in ("ppo", "impala"):
        policy = small_policy()
        learner = make_learner(policy, loss=loss, rho_bar=10.0, value_clip_coef=0.0)
        with torch.no_grad():
            state = (batch["initial_h"].transpose(0, 1), batch["initial_c"].transpose(0, 1))
            output, _ = policy.unroll(batch["obs"].transpose(0, 1), batch["is_first"].T, state)
            log_prob, _ = policy.actions.evaluate(output.logits[:-1], batch["action"].T)
            batch["behavior_log_prob"] = log_prob.T.contiguous()
        learner.update(batch)
        policies.append(policy)
    for one, other in zip(*(policy.parameters() for policy in policies), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def no_mapping(inputs: shoal.LossInputs) -> Any:
    return inputs.mean(inputs.value)


def no_loss(inputs: shoal.LossInputs) -> Any:
    return {"policy_loss": inputs.mean(inputs.value)}


def no_scalar(inputs: shoal.LossInputs) -> Any:
    return {"loss": inputs.mean(inputs.value), "value": inputs.value}


def no_gradient(inputs: shoal.LossInputs) -> Any:
    return {"loss": inputs.mean(inputs.advantage)}


def taken_name(inputs: shoal.LossInputs) -> Any:
    return {"loss": inputs.mean(inputs.value), "grad_norm": inputs.mean(inputs.value)}


def raises(inputs: shoal.LossInputs) -> Any:
    return {"loss": inputs.mean(inputs.value) / len(inputs.batch["score"])}


def not_finite(inputs: shoal.LossInputs) -> Any:
    return {"loss": inputs.mean(inputs.value) / 0.0}


def no_arguments() -> Any:
    return {}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (no_mapping, r"returned a tensor \[\], must be a mapping of scalars by name, of which 'loss' is minimized"),
        (no_loss, "returned the keys 'policy_loss', must be a mapping of scalars by name"),
        (no_scalar, r"returned 'value': a tensor \[3, 4\], must be a tensor without dimensions"),
        (no_gradient, "returned a 'loss' without a gradient"),
        (taken_name, "returned the terms grad_norm, which every update has already"),
        (raises, "raises KeyError: .*score"),
        (not_finite, "the first update of a fresh policy is not finite"),
        (no_arguments, "expected a function of shoal.LossInputs"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_before_the_start(loss: Any, words: str, tmp_path: Any) -> None:
    """Catches a run that ends at its first update, minutes after a cluster has started for it."""
    [problem] = problems(tmp_path, f"learner.loss=losses_of_a_user:{loss.__name__}")
    assert problem.startswith(f"learner.loss: losses_of_a_user:{loss.__name__}")
    assert re.search(words, problem), problem


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("learner.loss=absent_package.losses:mine",), "there is no module 'absent_package' here; install the package"),
        (("learner.loss=losses_of_a_user:absent",), "losses_of_a_user has no absent"),
        (("learner.loss=losses_of_a_user:Entropic",), "missing 1 required positional argument: 'scale'"),
        (("learner.loss=losses_of_a_user:Entropic", "learner.loss_kwargs={size: 2}"), "unexpected keyword argument"),
        (("learner.loss=losses_of_a_user:raises", "learner.loss_kwargs={size: 2}"), "expected a function of"),
        (("learner.loss=pop",), "learner.loss"),
        (("learner.loss_kwargs={size: 2}",), "need a loss that is named by its function"),
    ],
)
def test_a_loss_that_is_not_there_is_said(settings: tuple[str, ...], words: str, tmp_path: Any) -> None:
    """Catches a name that fails in a learner's process only."""
    [problem] = problems(tmp_path, *settings)
    assert words in problem


def test_a_sound_loss_starts(tmp_path: Any) -> None:
    """Catches a check that refuses every loss."""
    assert problems(tmp_path, "learner.loss=losses_of_a_user:Entropic", "learner.loss_kwargs={scale: 0.1}") == []


def test_the_first_lines_of_a_run_say_what_is_learned() -> None:
    """Catches a loss that runs unnoticed, and values in units of the reward without a word."""
    config, _ = load_config((), [*SMALL])
    learner = make_learner(small_policy(), loss="impala", epochs=1, normalize_values=True)
    run: Any = SimpleNamespace(config=config, learner=SimpleNamespace(learner=learner))
    said = progress._update(run)
    assert said.startswith("loss impala, ")
    assert "value loss times up to 0.44, entropy bonus" in said
    assert said.endswith("no linear layer value_head to rescale")
    learner = make_learner(small_policy(), normalize_values=False)
    run.learner.learner = learner
    assert not progress._update(run).startswith("loss")
    assert progress._update(run).endswith("normalized")


def problems(folder: Any, *settings: str) -> list[str]:
    config, found = load_config((), [*SMALL, "mode=inline", *settings])
    return found or preflight.check(config, folder / "run")


def test_a_loss_of_a_script_is_known_by_its_name() -> None:
    """Catches a function that no import finds and that other processes would look for in vain."""
    local = functools.partial(with_critic_of_obs, coefficient=1.0)
    name = give_loss(local)
    try:
        assert given.losses[name] is local
        assert make_learner(guessing_policy(), loss=name).update(random_batch(1)).terms["guess_error"] > 0
    finally:
        del given.losses[name]
