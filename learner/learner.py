"""The update: unroll, V-trace, PPO loss, backpropagation through time, clipping. No Ray, no queues, no clock."""

# T time, B segments

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from learner.config import LearnerConfig
from learner.device import DevicePath
from learner.loss import LossTerms, actor_critic_loss
from learner.start_states import RefreshedStates, StalenessProbe, burned_in, final_state, stored_state, with_state
from learner.vtrace import Targets, vtrace
from policy.recurrent import State, plan_fragments
from policy.recurrent_policy import RecurrentPolicy
from policy.regularization import WeightRegularizer


class NonFiniteUpdate(FloatingPointError):
    """A loss or gradient that is not a number; nothing was changed."""


class Evaluation(NamedTuple):
    """One shard under the current weights; time-major."""

    log_prob: Tensor
    """[T, B]"""
    entropy: Tensor
    """[T, B]"""
    value: Tensor
    """[T, B]"""
    next_value: Tensor
    """[T, B], without gradient: of what each transition led to in its own episode."""


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one update did; plain numbers, means over its optimizer steps."""

    env_steps: int
    """Valid transitions of the batch, as the loss counted them."""
    terms: dict[str, float]
    log_prob_error: float | None
    """The canary, over the segments that the very weights before the update acted; None where there were none, or where
    training did not start from the stored states."""
    staleness: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the memory that segments start from (``learner.start_states``); empty where it was not measured."""


class Learner:
    """Policy, optimizer and regularizer, and the update that moves them.

    On the CPU the batch is cut into one shard per gradient thread. Each thread runs whole sequences with one torch
    thread, so no thread ever spins on another. Gradients are added in shard order: the result does not depend on who
    was faster.
    """

    def __init__(
        self, policy: RecurrentPolicy, config: LearnerConfig, path: DevicePath, *, num_threads: int, seed: int
    ) -> None:
        self.policy, self.config, self.path = policy, config, path
        self.regularizer = WeightRegularizer(policy, config.regularization)
        self.optimizer = torch.optim.Adam(
            policy.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=path.fused_optimizer
        )
        self.policy_version = 0
        """Updates made so far."""
        self._parameters = list(policy.parameters())
        self._shards = num_threads if path.device.type == "cpu" else 1
        self._threads = (
            ThreadPoolExecutor(self._shards, "gradient", torch.set_num_threads, (1,)) if self._shards > 1 else None
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._refreshed = RefreshedStates(policy.initial_state(0)) if config.refresh_states else None
        self._probe = StalenessProbe(path)

    def update(self, batch: TensorDict) -> UpdateResult:
        """``epochs`` x ``minibatches`` optimizer steps on one batch; a new policy version.

        Args:
            batch: [B], as ``BatchAssembler`` makes it, on the learner's device.

        Raises:
            NonFiniteUpdate: in any step; weights and optimizer are as before the update.
        """
        used = self._start(batch)
        staleness = self._probe.measure(self.policy, batch, used)
        # From another state than the actor's, other log-probabilities are no fault.
        result = self._update_or_nothing(used, compare=used is batch and self.path.is_exact)
        if self._refreshed is not None:
            self._refreshed.keep(batch, self._map_states(final_state, used))
        return dataclasses.replace(result, staleness=staleness)

    def _start(self, batch: TensorDict) -> TensorDict:
        """The batch with the states that its training starts from."""
        if self._refreshed is not None:
            return self._refreshed.apply(batch)
        if "burn_in_obs" in batch.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
            return with_state(batch, self._map_states(burned_in, batch))
        return batch

    def _map_states(self, function: Callable[..., State], batch: TensorDict) -> State:
        parts = self._map(lambda shard: function(self.policy, shard, self.path), self._cut(batch))
        return torch.cat([h for h, _ in parts], 1), torch.cat([c for _, c in parts], 1)

    def _update_or_nothing(self, batch: TensorDict, *, compare: bool) -> UpdateResult:
        if self.config.epochs * self.config.minibatches == 1:
            return self._update(batch, compare)
        before = copy.deepcopy((self.policy.state_dict(), self.optimizer.state_dict()))
        try:
            return self._update(batch, compare)
        except NonFiniteUpdate:
            self.policy.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            raise

    def _update(self, batch: TensorDict, compare: bool) -> UpdateResult:
        config = self.config
        targets = None
        if config.epochs > 1:
            # A segment that is used again must not chase its own tail: targets, and the value that clipping is measured
            # from, are those of the weights before the first step. Used once, V-trace takes the newest there are.
            with torch.no_grad():
                evaluation = _concatenate(self._map(self._evaluate, self._cut(batch)))
            targets = (self._targets(batch, evaluation), evaluation.value)
        sums: dict[str, float] = {}
        steps = 0
        for index in self._minibatches(batch.shape[0]):
            part = batch if index is None else batch[index]
            known = None if targets is None else _select(targets, index)
            for name, value in self._step(part, known, compare=compare and steps == 0).items():
                sums[name] = sums.get(name, 0.0) + value
            steps += 1
        self.policy_version += 1
        self.regularizer.end_update(self.policy_version)
        valid = int(valid_transitions(batch).sum())
        error = sums.pop("log_prob_error", None)
        return UpdateResult(valid, {name: value / steps for name, value in sums.items()}, error)

    def _minibatches(self, batch_size: int) -> Iterator[Tensor | None]:
        """Indices of whole segments; each segment once per epoch. None is the whole batch."""
        for _ in range(self.config.epochs):
            if self.config.minibatches == 1:
                yield None
            else:
                order = torch.randperm(batch_size, generator=self._generator).to(self.path.device)
                yield from order.chunk(self.config.minibatches)

    def _step(self, batch: TensorDict, known: tuple[Targets, Tensor] | None, *, compare: bool) -> dict[str, float]:
        config = self.config
        shards = self._cut(batch)
        evaluations = self._map(self._evaluate, shards)
        whole = Evaluation(*(part.detach() for part in _concatenate(evaluations)))
        targets, old_value = known or (self._targets(batch, whole), whole.value)
        valid = valid_transitions(batch).T
        count = max(int(valid.sum()), 1)
        advantage = _normalize(targets.advantage, valid) if config.normalize_advantage else targets.advantage
        columns = [slice(None)] if len(shards) == 1 else _ranges(batch.shape[0], len(shards))

        def gradient(shard: TensorDict, evaluation: Evaluation, rows: slice) -> tuple[LossTerms, tuple[Tensor, ...]]:
            terms = actor_critic_loss(
                evaluation.log_prob,
                evaluation.entropy,
                evaluation.value,
                behavior_log_prob=shard["behavior_log_prob"].T,
                advantage=advantage[:, rows],
                vs=targets.vs[:, rows],
                old_value=old_value[:, rows],
                valid=valid[:, rows],
                count=count,
                config=config,
            )
            return terms, torch.autograd.grad(terms.loss, self._parameters)

        results = self._map(gradient, shards, evaluations, columns)
        numbers = self._apply(results, whole, targets, valid)
        if compare and (current := batch["policy_version"] == self.policy_version).any():
            numbers["log_prob_error"] = float(log_prob_error(whole.log_prob, batch, current))
        return numbers

    @torch.no_grad()
    def _apply(
        self,
        results: list[tuple[LossTerms, tuple[Tensor, ...]]],
        whole: Evaluation,
        targets: Targets,
        valid: Tensor,
    ) -> dict[str, float]:
        """Add the shards' gradients, check, step, clip."""
        gradients = list(results[0][1])
        for _, more in results[1:]:
            torch._foreach_add_(gradients, more)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.enable_grad():
            l2_init = self.regularizer.l2_init_loss()
            if l2_init is not None:
                l2_init.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        terms = {name: torch.stack([getattr(r[0], name) for r in results]).sum() for name in LossTerms._fields}
        terms["grad_norm"] = grad_norm
        if l2_init is not None:
            terms["l2_init_loss"] = l2_init
            terms["loss"] = terms["loss"] + l2_init
        terms["explained_variance"] = _explained_variance(targets.vs, whole.value, valid)
        numbers = dict(zip(terms, torch.stack([t.detach() for t in terms.values()]).tolist(), strict=True))
        if not (_finite(numbers["loss"]) and _finite(numbers["grad_norm"])):
            raise NonFiniteUpdate(f"policy version {self.policy_version}: {numbers}")
        self.optimizer.step()
        self.regularizer.clip_weights()
        return numbers

    def _evaluate(self, shard: TensorDict) -> Evaluation:
        return evaluate(self.policy, shard, self.path)

    def _targets(self, batch: TensorDict, evaluation: Evaluation) -> Targets:
        config = self.config
        log_rho = evaluation.log_prob - batch["behavior_log_prob"].T
        return vtrace(
            torch.zeros_like(log_rho) if config.advantage == "gae" else log_rho,
            batch["reward"].T,
            evaluation.value,
            evaluation.next_value,
            batch["terminated"].T,
            (batch["terminated"] | batch["truncated"]).T,
            valid_transitions(batch).T,
            gamma=config.gamma,
            lambda_=config.advantage_lambda,
            rho_bar=config.rho_bar,
            c_bar=config.c_bar,
        )

    def _cut(self, batch: TensorDict) -> list[TensorDict]:
        """One shard per gradient thread, as views."""
        return [batch[rows] for rows in _ranges(batch.shape[0], self._shards)]

    def _map(self, function, *arguments):  # type: ignore[no-untyped-def]
        if self._threads is None:
            return [function(*each) for each in zip(*arguments, strict=True)]
        return list(self._threads.map(function, *arguments))

    def random_state(self) -> dict[str, Tensor]:
        """The random streams that updates draw from."""
        return {"minibatches": self._generator.get_state(), "torch": torch.get_rng_state()}

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        """Continue the streams of ``random_state``."""
        self._generator.set_state(state["minibatches"].cpu())
        torch.set_rng_state(state["torch"].cpu())

    def close(self) -> None:
        """End the gradient threads."""
        if self._threads is not None:
            self._threads.shutdown()


def evaluate(policy: RecurrentPolicy, batch: TensorDict, path: DevicePath) -> Evaluation:
    """``policy`` on [B] segments, from their initial states, with resets inside."""
    is_first = batch["is_first"].T
    final = _final_rows(batch)
    plan = plan_fragments(is_first.cpu().numpy(), final and (final[0].cpu().numpy(), final[1].cpu().numpy()))
    with path.autocast():
        output, _ = policy.unroll(
            batch["obs"].transpose(0, 1),
            is_first,
            stored_state(batch),
            plan=plan.to(path.device),
            final_obs=batch["final_obs"][final[1], final[0]] if final else None,
            return_state=False,
        )
    # Row T is only bootstrapped from.
    log_prob, entropy = policy.actions.evaluate(_precise(output.logits[:-1]), batch["action"].transpose(0, 1))
    value = _precise(output.value)
    next_value = value[1:].detach()
    if final and output.final_value is not None:
        next_value = next_value.index_put(final, _precise(output.final_value.detach()))
    return Evaluation(log_prob, entropy, value[:-1], next_value)


def _precise(x: Tensor) -> Tensor:
    """At least float32, whatever autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _final_rows(batch: TensorDict) -> tuple[Tensor, Tensor] | None:
    """(t [K], b [K]) of the transitions that bootstrap from ``final_obs``: truncated in the same-step form."""
    if "final_obs" not in batch.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
        return None
    b, t = (batch["truncated"] & ~batch["terminated"]).nonzero(as_tuple=True)
    return (t, b) if len(t) else None


def valid_transitions(batch: TensorDict) -> Tensor:
    """bool [B, T]; false on void transitions (``policy.trajectory``)."""
    return ~batch["is_first"][:, 1:] | batch["terminated"] | batch["truncated"]


def log_prob_error(log_prob: Tensor, batch: TensorDict, rows: Tensor | slice = slice(None)) -> Tensor:
    """max |recomputed - behavior| log-probability over segments ``rows``: the canary (policy.memory, 1e-4 in float32).

    Void transitions count too: their rows went through the same memory.
    """
    return (log_prob.T[rows] - batch["behavior_log_prob"][rows]).abs().max()


def _ranges(total: int, parts: int) -> list[slice]:
    """``parts`` contiguous slices of nearly equal size that cover ``total``; fewer where there is less."""
    parts = min(parts, total)
    edges = [total * i // parts for i in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _concatenate(evaluations: list[Evaluation]) -> Evaluation:
    return (
        evaluations[0]
        if len(evaluations) == 1
        else Evaluation(*(torch.cat(p, 1) for p in zip(*evaluations, strict=True)))
    )


def _select(targets: tuple[Targets, Tensor], index: Tensor | None) -> tuple[Targets, Tensor]:
    if index is None:
        return targets
    (vs, advantage), old_value = targets
    return Targets(vs[:, index], advantage[:, index]), old_value[:, index]


def _normalize(advantage: Tensor, valid: Tensor) -> Tensor:
    """Zero mean and unit variance over valid transitions; 0 elsewhere."""
    chosen = advantage[valid]
    if chosen.numel() < 2:
        return advantage
    return (advantage - chosen.mean()) / (chosen.std() + 1e-8) * valid


def _explained_variance(vs: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    target = vs[valid]
    if not len(target):
        return target.new_tensor(float("nan"))
    return 1 - (target - value[valid]).var(correction=0) / (target.var(correction=0) + 1e-12)


def _finite(x: float) -> bool:
    return x - x == 0
