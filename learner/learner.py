"""The update: unroll, V-trace, PPO loss, backpropagation through time, clipping. No Ray, no queues, no clock."""

# T time, B segments

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import Evaluation, evaluate, log_prob_error, valid_transitions
from shoal.learner.group import LearnerGroup, LearnerLost
from shoal.learner.loss import LossTerms, actor_critic_loss
from shoal.learner.start_states import RefreshedStates, StalenessProbe, burned_in, final_state, with_state
from shoal.learner.vtrace import Targets, vtrace
from shoal.policy.recurrent import State
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.regularization import WeightRegularizer
from tensordict import TensorDict
from torch import Tensor


class NonFiniteUpdate(FloatingPointError):
    """A loss or gradient that is not a number; nothing was changed."""


class Moments(NamedTuple):
    """Sums over valid transitions in double precision, from which every learner takes the same means."""

    transitions: float
    advantage: float
    advantage_squared: float
    residual: float
    """Of vs - V."""
    residual_squared: float
    target: float
    """Of vs."""
    target_squared: float

    def normalize(self, advantage: Tensor, valid: Tensor) -> Tensor:
        """Zero mean and unit variance over the valid transitions of all shards and learners; 0 elsewhere."""
        if self.transitions < 2:
            return advantage
        mean = self.advantage / self.transitions
        variance = max(self.advantage_squared - self.transitions * mean**2, 0.0) / (self.transitions - 1)
        return (advantage - mean) / (variance**0.5 + 1e-8) * valid

    @property
    def explained_variance(self) -> float:
        """1 - var(vs - V) / var(vs)."""
        if not self.transitions:
            return float("nan")
        residual = self.residual_squared / self.transitions - (self.residual / self.transitions) ** 2
        target = self.target_squared / self.transitions - (self.target / self.transitions) ** 2
        return 1 - residual / (target + 1e-12)


class Prepared(NamedTuple):
    """A shard before its gradient; time-major, [T, B] each."""

    evaluation: Evaluation
    targets: Targets
    old_value: Tensor
    """What value clipping is measured from."""
    valid: Tensor
    moments: Tensor
    """[7] float64: ``Moments``."""

    def select(self, index: Tensor | None) -> Prepared:
        """Segments ``index``; None is all."""
        if index is None:
            return self
        return self._replace(targets=Targets(*(x[:, index] for x in self.targets)), old_value=self.old_value[:, index])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What one update did; plain numbers, means over its optimizer steps."""

    env_steps: int
    """Valid transitions of this learner's batch."""
    all_env_steps: int
    """Those of all learners' batches, as the loss counted them."""
    terms: dict[str, float]
    log_prob_error: float | None
    """The parity check, over the segments that the very weights before the update acted; None where there were none, or
    where training did not start from the stored states."""
    staleness: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the memory that segments start from (``learner.start_states``); empty where it was not measured."""


class Learner:
    """Policy, optimizer and regularizer, and the update that moves them.

    A batch is cut into shards, whose gradients are added in shard order: the result does not depend on who was faster.
    Shards are computed one after the other, each by a gradient thread of its own (whole sequences with one torch
    thread, so that no thread spins on another), or by other processes: learners of one ``LearnerGroup`` have a shard
    each, add up their gradients, and make the same step.

    Args:
        num_shards: parts that this learner cuts its batches into; by default ``num_threads``.
        first_shard: number of the first of them among those of all learners.
        num_threads: gradient threads (on the CPU).
    """

    def __init__(
        self,
        policy: RecurrentPolicy,
        config: LearnerConfig,
        path: DevicePath,
        *,
        num_threads: int = 1,
        num_shards: int | None = None,
        first_shard: int = 0,
        seed: int,
    ) -> None:
        self.policy, self.config, self.path = policy, config, path
        self.regularizer = WeightRegularizer(policy, config.regularization)
        self.optimizer = torch.optim.Adam(
            policy.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=path.fused_optimizer
        )
        self.policy_version = 0
        """Updates made so far."""
        self.group: LearnerGroup | None = None
        """The learners whose gradients are added; None where this is the only one."""
        self._parameters = list(policy.parameters())
        self._saved: list[Tensor] = []
        threads = num_threads if path.device.type == "cpu" else 1
        self._threads = ThreadPoolExecutor(threads, "gradient", torch.set_num_threads, (1,)) if threads > 1 else None
        streams = range(first_shard, first_shard + (num_shards or threads))
        self._generators = [torch.Generator().manual_seed(_stream_seed(seed, stream)) for stream in streams]
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
        restore = self._remember()
        try:
            return self._update(batch, compare)
        except (NonFiniteUpdate, LearnerLost):
            restore()
            raise

    @torch.no_grad()
    def _remember(self) -> Callable[[], None]:
        """Copy weights and optimizer state; what is returned puts them back."""
        state = self.optimizer.state
        fresh = not state
        tensors = [*self._parameters, *(t for p in self._parameters for t in state.get(p, {}).values())]
        if len(self._saved) != len(tensors):
            self._saved = [torch.empty_like(t) for t in tensors]
        torch._foreach_copy_(self._saved, tensors)

        @torch.no_grad()
        def restore() -> None:
            torch._foreach_copy_(tensors, self._saved)
            if fresh:
                state.clear()

        return restore

    def _update(self, batch: TensorDict, compare: bool) -> UpdateResult:
        config = self.config
        shards = self._cut(batch)
        known: list[Prepared] | list[None] = [None] * len(shards)
        if config.epochs > 1:
            # A segment that is used again must not chase its own tail: targets, and the value that clipping is measured
            # from, are those of the weights before the first step. Used once, V-trace takes the newest there are.
            with torch.no_grad():
                known = self._map(self._prepare, shards, known)
        sums: dict[str, float] = {}
        error: float | None = None
        total = 0
        for step, indices in enumerate(self._minibatches([shard.shape[0] for shard in shards])):
            part = [_rows(shard, index) for shard, index in zip(shards, indices, strict=True)]
            targets = [k and k.select(index) for k, index in zip(known, indices, strict=True)]
            prepared, count = self._step(part, targets, sums)
            if step < config.minibatches:
                total += count
            if compare and step == 0:
                error = self._compare(part, prepared)
        steps = config.epochs * config.minibatches
        self.policy_version += 1
        self.regularizer.end_update(self.policy_version)
        return UpdateResult(
            env_steps=int(valid_transitions(batch).sum()),
            all_env_steps=total,
            terms={name: value / steps for name, value in sums.items()},
            log_prob_error=error,
        )

    def _minibatches(self, sizes: Sequence[int]) -> Iterator[list[Tensor | None]]:
        """Of every shard, by its size, indices of whole segments; each once per epoch. None is the whole shard.

        Each shard is divided by a random stream of its own: which segments share an optimizer step does not depend on
        how many processes the shards are spread over.
        """
        for _ in range(self.config.epochs):
            if self.config.minibatches == 1:
                yield [None] * len(sizes)
                continue
            orders = [
                torch.randperm(size, generator=generator).to(self.path.device)
                for size, generator in zip(sizes, self._generators, strict=False)
            ]
            split = [order.tensor_split(self.config.minibatches) for order in orders]
            yield from map(list, zip(*split, strict=True))

    def _step(
        self, shards: list[TensorDict], known: Sequence[Prepared | None], sums: dict[str, float]
    ) -> tuple[list[Prepared], int]:
        """One optimizer step; adds its numbers to ``sums``. Returns also the valid transitions of all learners."""
        prepared = self._map(self._prepare, shards, known)
        moments = self._add([p.moments for p in prepared])
        if self.group is not None:
            self.group.sum_(moments)
        summary = Moments(*moments.tolist())

        def gradient(shard: TensorDict, p: Prepared) -> Tensor:
            terms = actor_critic_loss(
                p.evaluation.log_prob,
                p.evaluation.entropy,
                p.evaluation.value,
                behavior_log_prob=shard["behavior_log_prob"].T,
                advantage=summary.normalize(p.targets.advantage, p.valid)
                if self.config.normalize_advantage
                else p.targets.advantage,
                vs=p.targets.vs,
                old_value=p.old_value,
                valid=p.valid,
                count=max(int(summary.transitions), 1),
                config=self.config,
            )
            parts = torch.autograd.grad(terms.loss, self._parameters)
            return torch.cat([*(g.reshape(-1) for g in parts), torch.stack([t.detach() for t in terms])])

        # All gradients and the terms of the loss in one buffer: shards and learners are added in two operations, and a
        # number that is not finite in any of them is so in all of them.
        flat = self._add(self._map(gradient, shards, prepared))
        if self.group is not None:
            self.group.sum_(flat)
        numbers = self._apply(flat, summary)
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0.0) + value
        return prepared, int(summary.transitions)

    @torch.no_grad()
    def _apply(self, flat: Tensor, summary: Moments) -> dict[str, float]:
        """Check the gradient, step, clip."""
        parts = flat.split([*(p.numel() for p in self._parameters), len(LossTerms._fields)])
        for parameter, part in zip(self._parameters, parts[:-1], strict=True):
            parameter.grad = part.view_as(parameter)
        gradient = flat[: -len(LossTerms._fields)]
        with torch.enable_grad():
            l2_init = self.regularizer.l2_init_loss()
            if l2_init is not None:
                l2_init.backward()
        # As torch.nn.utils.clip_grad_norm_, on one buffer.
        grad_norm = gradient.norm()
        gradient.mul_((self.config.max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        terms = dict(zip(LossTerms._fields, parts[-1], strict=True))
        terms["grad_norm"] = grad_norm
        if l2_init is not None:
            terms["l2_init_loss"] = l2_init.detach()
            terms["loss"] = terms["loss"] + l2_init.detach()
        numbers = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        numbers["explained_variance"] = summary.explained_variance
        if not (_finite(numbers["loss"]) and _finite(numbers["grad_norm"])):
            raise NonFiniteUpdate(f"policy version {self.policy_version}: {numbers}")
        self.optimizer.step()
        self.regularizer.clip_weights()
        return numbers

    def _prepare(self, shard: TensorDict, known: Prepared | None) -> Prepared:
        """Evaluate a shard under the current weights; ``known`` brings the targets of an earlier evaluation."""
        evaluation = evaluate(self.policy, shard, self.path)
        valid = valid_transitions(shard).T
        with torch.no_grad():
            targets = known.targets if known else self._targets(shard, evaluation, valid)
            value = evaluation.value.detach()
            old_value = known.old_value if known else value
            moments = _moments(targets, value, valid)
        return Prepared(evaluation, targets, old_value, valid, moments)

    def _targets(self, batch: TensorDict, evaluation: Evaluation, valid: Tensor) -> Targets:
        config = self.config
        log_rho = evaluation.log_prob.detach() - batch["behavior_log_prob"].T
        return vtrace(
            torch.zeros_like(log_rho) if config.advantage == "gae" else log_rho,
            batch["reward"].T,
            evaluation.value.detach(),
            evaluation.next_value,
            batch["terminated"].T,
            (batch["terminated"] | batch["truncated"]).T,
            valid,
            gamma=config.gamma,
            lambda_=config.advantage_lambda,
            rho_bar=config.rho_bar,
            c_bar=config.c_bar,
        )

    def _compare(self, shards: list[TensorDict], prepared: list[Prepared]) -> float | None:
        """The parity check's reading of a first step, over the segments that the weights before it acted."""
        errors = [
            log_prob_error(p.evaluation.log_prob.detach(), shard, current)
            for shard, p in zip(shards, prepared, strict=True)
            if (current := shard["policy_version"] == self.policy_version).any()
        ]
        return float(torch.stack(errors).max()) if errors else None

    def _cut(self, batch: TensorDict) -> list[TensorDict]:
        """The shards of a batch, as views."""
        # Every shard has a part in every minibatch.
        most = batch.shape[0] // self.config.minibatches
        return [batch[rows] for rows in _ranges(batch.shape[0], min(len(self._generators), most))]

    def _add(self, parts: list[Tensor]) -> Tensor:
        """The sum in shard order, in the first one's memory."""
        for more in parts[1:]:
            parts[0] += more
        return parts[0]

    def _map(self, function, *arguments):  # type: ignore[no-untyped-def]
        if self._threads is None:
            return [function(*each) for each in zip(*arguments, strict=True)]
        return list(self._threads.map(function, *arguments))

    def synchronize(self, group: LearnerGroup) -> None:
        """Take over everything from the group's first learner (the first gives it), and reduce with the group."""
        state = group.broadcast(
            {
                "policy": self.policy.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "regularizer": self.regularizer.state_dict(),
                "policy_version": self.policy_version,
            }
        )
        self.group = group
        if group.rank:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.regularizer.load_state_dict(state["regularizer"])
            self.policy_version = state["policy_version"]

    def random_state(self) -> dict[str, Any]:
        """The random streams that updates draw from."""
        return {"minibatches": [g.get_state() for g in self._generators], "torch": torch.get_rng_state()}

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Continue the streams of ``random_state``; shards that were not there have fresh ones."""
        for generator, saved in zip(self._generators, state["minibatches"], strict=False):
            generator.set_state(saved.cpu())
        torch.set_rng_state(state["torch"].cpu())

    def close(self) -> None:
        """End the gradient threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _ranges(total: int, parts: int) -> list[slice]:
    """``parts`` contiguous slices of nearly equal size that cover ``total``; fewer where there is less."""
    parts = min(parts, total)
    edges = [total * i // parts for i in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _rows(batch: TensorDict, index: Tensor | None) -> TensorDict:
    if index is None:
        return batch
    # Not batch[index], which moves a row of bytes one by one: five times as slow.
    columns = cast(dict[str, Tensor], dict(batch.items()))
    return TensorDict({name: column.index_select(0, index) for name, column in columns.items()}, index.shape)


def _moments(targets: Targets, value: Tensor, valid: Tensor) -> Tensor:
    """[7] ``Moments`` of one shard."""
    wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has nothing wider
    advantage, vs, residual = (
        torch.where(valid, x, 0.0).to(wide) for x in (targets.advantage, targets.vs, targets.vs - value)
    )
    sums = [valid.sum().to(wide)]
    for x in (advantage, residual, vs):
        sums += [x.sum(), x.square().sum()]
    return torch.stack(sums)


def _stream_seed(seed: int, stream: int) -> int:
    """A seed for one of several independent streams of one run."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)[0] >> 1)


def _finite(x: float) -> bool:
    return x - x == 0
