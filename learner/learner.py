"""The update: forward pass, targets, loss, gradient, optimizer step, clip. No Ray, no queues, no clock."""

# T time, B segments

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.contributions import Contribution, measure
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import ForwardPass, forward_pass, log_prob_error, valid_transitions
from shoal.learner.group import Group, LearnerGroup, LearnerLost
from shoal.learner.kl_adaptation import KLAdaptation, default_desired_kl
from shoal.learner.loss import LossInputs, checked_terms, default_clip_coef, divergences, find_loss
from shoal.learner.moments import Moments, sum_moments
from shoal.learner.normalization import RunningStatistics
from shoal.learner.optimizer import make_optimizer
from shoal.learner.rollback import Rollback
from shoal.learner.schedules import ScheduledSettings, scheduled_settings
from shoal.learner.shards import Shards, add, rows_of
from shoal.learner.start_states import RefreshedStates, StalenessProbe, burned_in, final_state, with_state
from shoal.learner.value_balance import VALUE_COEF, ValueBalance
from shoal.learner.vtrace import Targets, vtrace
from shoal.policy.actions import Actions, Discrete
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.regularization import WeightRegularizer
from shoal.policy.resets import State
from shoal.policy.weights import published_tensors
from tensordict import TensorDict
from torch import Tensor

GRADIENT_SEGMENTS = 8
"""Segments that ``Learner.gradient_norms`` looks at."""


class NonFiniteUpdate(FloatingPointError):
    """A loss, gradient or weight is NaN or infinite; the update changed nothing."""


class Prepared(NamedTuple):
    """A shard after its forward pass and before its gradient; time-major, [T, B] each."""

    forward: ForwardPass
    targets: Targets
    old_value: Tensor
    """The value that value clipping is measured from."""
    old_log_prob: Tensor
    """The log-probability that the update's KL divergence is measured from."""
    valid: Tensor
    moments: Tensor
    """[7] float64: ``Moments``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """The numbers of one update: plain data that may cross processes."""

    env_steps: int
    """Valid transitions of this learner's batch."""
    all_env_steps: int
    """Valid transitions of all learners' batches, as the loss counted them."""
    terms: dict[str, float]
    """The loss and its terms, KL divergences in nats, ``grad_norm`` before clipping, ``explained_variance``, and
    ``advantage_std`` in units of the reward; each the mean over the optimizer steps."""
    optimizer_steps: int
    """Optimizer steps made: ``learner.target_kl`` and ``learner.desired_kl`` may end an update early."""
    scheduled: ScheduledSettings
    """The values that the update was made with."""
    log_prob_error: float | None
    """Reading of the log-prob parity check over the segments that were acted with the weights before the update; None
    without such segments, or where training did not start from the stored states."""
    staleness: dict[str, float] = dataclasses.field(default_factory=dict)
    """Staleness of the states that segments start from (``learner.start_states``); empty where it was not measured."""
    gradient_norms: dict[str, float] = dataclasses.field(default_factory=dict)
    """``Learner.gradient_norms`` of the update's first step; empty where it was not measured."""


class Learner:
    """Policy, optimizer and regularizer, and the update that changes them.

    A batch is cut into shards (``learner.shards``), whose gradients are added in shard order. The learners of one
    ``LearnerGroup`` have shards each, add up their gradients, and make the same step.

    Args:
        num_shards: number of parts that this learner cuts its batches into; by default ``num_threads``.
        first_shard: number of its first shard among the shards of all learners.
        num_threads: gradient threads (on the CPU).
        total_env_steps: trained environment steps, of all policies, at which the run ends; needed by schedules over the
            whole run.
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
        total_env_steps: int | None = None,
        seed: int,
    ) -> None:
        if config.entropy_coef == "auto":
            config = dataclasses.replace(config, entropy_coef=default_entropy_coef(policy.actions))
        self.value_balance = ValueBalance(is_on=config.value_coef == "auto")
        if config.value_coef == "auto":
            config = dataclasses.replace(config, value_coef=VALUE_COEF)
        if config.clip_coef == "auto":
            config = dataclasses.replace(config, clip_coef=default_clip_coef(config.epochs))
        desired_kl = default_desired_kl(policy.actions) if config.desired_kl == "auto" else config.desired_kl
        config = dataclasses.replace(config, desired_kl=desired_kl)
        self.policy, self.config, self.path = policy, config, path
        self._loss = find_loss(config)
        self._terms: tuple[str, ...] = ()
        """Names of the loss's terms, in the order in which they follow the gradient."""
        self.regularizer = WeightRegularizer(policy, config.regularization)
        self.optimizer = make_optimizer(config, policy.parameters(), fused=path.fused_optimizer)
        self.policy_version = 0
        """Updates made so far."""
        self.attempts = 0
        """Updates begun by this process, the same in all learners of a group; those that were skipped count, too."""
        self.env_steps = 0
        """Environment steps trained so far, by all learners."""
        self.others_env_steps = 0
        """Environment steps that the run's other policies were trained with; schedules go by the steps of all."""
        self.total_env_steps = total_env_steps
        self._scheduled = scheduled_settings(config, self.env_steps, total_env_steps)
        self.group: Group | None = None
        """The learners whose gradients are added; None where this is the only one."""
        parameters = dict(policy.named_parameters())
        self._parameters = list(parameters.values())
        threads = num_threads if path.device.type == "cpu" else 1
        self._shards = Shards(
            num_shards=num_shards or threads,
            first_shard=first_shard,
            num_threads=threads,
            seed=seed,
            device=path.device,
        )
        buffers = [tensor for name, tensor in published_tensors(policy).items() if name not in parameters]
        self._rollback = Rollback([*self._parameters, *buffers], self.optimizer)
        self.statistics = RunningStatistics(policy)
        self.kl_adaptation = KLAdaptation(desired_kl)
        self._value_std = 1.0
        """The unit of values in the update that is being made."""
        self.refreshed = RefreshedStates(policy.core) if config.refresh_states else None
        """None where training starts from stored states or burned-in ones."""
        self._probe = StalenessProbe(path)

    def update(self, batch: TensorDict) -> UpdateResult:
        """``epochs`` x ``minibatches`` optimizer steps on one batch, fewer where the policy moves too far
        (``target_kl``, ``desired_kl``); a new policy version.

        Args:
            batch: [B], as ``BatchAssembler`` makes it, on the learner's device.

        Raises:
            NonFiniteUpdate: in any step; weights and optimizer are as before the update.
            LearnerLost: another learner of the group ended or hangs; likewise.
        """
        self.attempts += 1
        started = self.with_start_states(batch)
        staleness = self._probe.measure(self.policy, batch, started)
        # Where training starts from another state than the actor's, log-probabilities differ without a fault.
        compare = started is batch and self.path.is_exact
        self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = self._scheduled.learning_rate
        several = self.config.epochs * self.config.minibatches > 1 or not self.statistics.value_std
        with self._rollback.on(NonFiniteUpdate, LearnerLost) if several else contextlib.nullcontext():
            result = self._optimize(started, compare=compare)
        if self.refreshed is not None:
            self.refreshed.keep(batch, self._map_states(final_state, started))
        return dataclasses.replace(result, staleness=staleness)

    def _schedule(self) -> None:
        """Set the values of the update that is being made."""
        env_steps = self.env_steps + self.others_env_steps
        scheduled = scheduled_settings(self.config, env_steps, self.total_env_steps)
        self._scheduled = scheduled._replace(
            learning_rate=scheduled.learning_rate * self.kl_adaptation.factor,
            value_coef=scheduled.value_coef * self.value_balance.factor,
        )

    def _optimize(self, batch: TensorDict, *, compare: bool) -> UpdateResult:
        config, shards = self.config, self._shards.cut(batch, self.config.minibatches)
        observed = self._sum_observations(shards)
        if not self.statistics.value_std:
            # Values need a unit before their first step. Until now all were 0.
            moments = self._sum_moments(self._prepare_all(shards))
            self.statistics.begin_values(moments.transitions, moments.target, moments.target_squared)
        self._value_std = self.statistics.value_std
        known: list[Prepared] | list[None] = [None] * len(shards)
        if config.epochs > 1:
            # Several epochs use a segment several times: its targets, and the value that clipping is measured from, are
            # those of the weights before the first step. With one epoch V-trace uses the weights of each step.
            known = self._prepare_all(shards)
        sums: dict[str, float] = {}
        pass_kl: list[float] = []
        targets = torch.zeros(3, dtype=torch.float64)
        error: float | None = None
        every, balances = config.weight_metrics_every, self.value_balance.is_due(self.policy_version)
        is_read = balances or (every and self.policy_version % every == 0)
        measured = self.gradient_norms(batch) if is_read else {}
        total = steps = 0
        minibatches = self._shards.minibatches([len(shard) for shard in shards], config.epochs, config.minibatches)
        for step, indices in enumerate(minibatches, 1):
            parts = [rows_of(shard, index) for shard, index in zip(shards, indices, strict=True)]
            # Forward pass and targets of every shard, and the sums over all of them that normalization needs.
            prepared = self._shards.map(self._prepare, parts, known, indices)
            moments = self._sum_moments(prepared)
            # Gradients and loss terms of every shard in one buffer, and its sum.
            flat = self._sum(self._shards.map(partial(self._gradient, moments), parts, prepared))
            numbers = self._step(flat, moments)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
            if step % config.minibatches == 1 % config.minibatches:
                pass_kl.clear()
            pass_kl.append(numbers["update_kl"])
            steps = step
            if step <= config.minibatches:
                total += int(moments.transitions)
                targets += torch.tensor([moments.transitions, moments.target, moments.target_squared])
            if compare and step == 1:
                error = self._log_prob_error(parts, prepared)
            # From sums over all learners: all stop here, or none does. Every segment is trained on at least once.
            ends_pass = step % config.minibatches == 0
            if config.target_kl and ends_pass and numbers["approx_kl"] > config.target_kl:
                break
            if step >= config.minibatches and self.kl_adaptation.is_too_far(numbers["update_kl"]):
                break
        self.policy_version += 1
        self.env_steps += total
        self.regularizer.end_update(self.policy_version)
        # Statistics move here only: within an update, every forward pass is that of the actors with these weights.
        self.statistics.end_update(observed, *targets.tolist())
        self.kl_adaptation.end_update(sum(pass_kl) / len(pass_kl))
        if balances:
            self.value_balance.end_update(measured)
        return UpdateResult(
            env_steps=int(valid_transitions(batch).sum()),
            all_env_steps=total,
            terms={name: value / steps for name, value in sums.items()},
            optimizer_steps=steps,
            scheduled=self._scheduled,
            log_prob_error=error,
            gradient_norms=measured,
        )

    @torch.no_grad()
    def _prepare_all(self, shards: list[TensorDict]) -> list[Prepared]:
        nothing: list[None] = [None] * len(shards)
        return self._shards.map(self._prepare, shards, nothing, nothing)

    def _sum_moments(self, prepared: list[Prepared]) -> Moments:
        return Moments(*self._sum([p.moments for p in prepared]).tolist())

    def _sum_observations(self, shards: list[TensorDict]) -> Tensor | None:
        """Sums over the observations of all learners' batches, for their statistics; None where there are none."""
        if self.statistics.observations is None:
            return None
        return self._sum(self._shards.map(self.statistics.observations.sums, shards)).cpu()

    def gradient_norms(self, batch: TensorDict) -> dict[str, float]:
        """L2 norms of the gradients of the two losses, ``policy`` (with its entropy bonus) and ``value`` (times its
        coefficient), through the parameters that both reach, on the first ``GRADIENT_SEGMENTS`` of all learners'
        batches, of which [B] is this one's.

        They compete there: one that is far smaller than the other decides nothing about these parameters. Ratios are
        taken as 1, so that it is the policy's own gradient, before clipping refuses any of it.
        """
        before = 0 if self.group is None else self.group.rank * len(batch)
        part = batch[: max(GRADIENT_SEGMENTS - before, 0)]
        # A graph for each loss; a learner without a part of these segments adds nothing to the sums.
        prepared = [self._prepare(part, None, None) for _ in range(2)] if len(part) else []
        none = torch.zeros(len(Moments._fields), dtype=torch.float64, device=self.path.device)
        moments = Moments(*self._sum([prepared[0].moments if prepared else none]).tolist())
        sizes = [p.numel() for p in self._parameters]
        flat = torch.zeros(2, sum(sizes), device=self.path.device)
        for row, of_value, each in zip(flat, (True, False), prepared, strict=False):
            on_policy = part.copy()
            on_policy["behavior_log_prob"] = each.forward.log_prob.detach().T
            gradient, _ = self._backward(moments, on_policy, each, of_value=of_value)
            torch.cat([g.reshape(-1) for g in gradient], out=row)
        both, policy = self._sum([flat])
        shared = [
            torch.stack([p.norm(), v.norm()])
            for p, v in zip(policy.split(sizes), (both - policy).split(sizes), strict=True)
            if p.any() and v.any()
        ]
        if not shared:
            return {}
        return dict(zip(("policy", "value"), torch.stack(shared).norm(dim=0).tolist(), strict=True))

    def contributions(self, batch: TensorDict) -> list[Contribution]:
        """What each segment of this learner's batch [B] adds to one optimizer step on the batch of all learners, with
        the weights as they are.

        Loss terms are parts of the batch's means, and gradients parts of its gradient: they add up. Advantages are
        normalized over the segments whose numbers are finite, so that only those that are not show NaN. Statistics are
        not moved, except that values get a first unit where they have none.
        """
        started = self.with_start_states(batch)
        self._schedule()
        moments = self._finite_moments(started)
        if not self.statistics.value_std:
            self.statistics.begin_values(moments.transitions, moments.target, moments.target_squared)
            moments = self._finite_moments(started)
        self._value_std = self.statistics.value_std
        found = []
        for row in range(started.shape[0]):
            segment = started[row : row + 1]
            prepared = self._prepare(segment, None, None)
            gradient, terms = self._backward(moments, segment, prepared)
            norm = torch.stack([part.norm() for part in gradient]).norm()
            found.append(measure(segment, prepared.forward, prepared.targets, prepared.valid, terms, norm, self.config))
        return found

    @torch.no_grad()
    def _finite_moments(self, batch: TensorDict) -> Moments:
        """The moments of all learners' segments that have finite ones."""
        total = torch.zeros(len(Moments._fields), dtype=torch.float64)
        for prepared in self._prepare_all(self._shards.cut(batch, 1)):
            for row in range(prepared.valid.shape[1]):
                one = slice(row, row + 1)
                targets = Targets(*(x[:, one] for x in prepared.targets))
                own = sum_moments(targets, prepared.forward.value.detach()[:, one], prepared.valid[:, one]).cpu()
                total += torch.where(own.isfinite().all(), own, torch.zeros_like(own))
        return Moments(*self._sum([total]).tolist())

    def _prepare(self, shard: TensorDict, known: Prepared | None, index: Tensor | None) -> Prepared:
        """The forward pass under the current weights, and the V-trace targets (GAE: all ratios 1).

        ``known`` has the targets of an earlier pass over a whole shard, of which ``shard`` holds segments ``index``.
        """
        config = self.config
        forward = forward_pass(self.policy, shard, self.path)
        valid = valid_transitions(shard).T
        with torch.no_grad():
            value = forward.value.detach()
            if known is None:
                log_rho = forward.log_prob.detach() - shard["behavior_log_prob"].T
                old_value = value
                # With one pass there is no forward pass before the first step.
                several = config.epochs > 1
                old_log_prob = forward.log_prob.detach() if several else shard["behavior_log_prob"].T
                targets = vtrace(
                    torch.zeros_like(log_rho) if config.advantage == "gae" else log_rho,
                    shard["reward"].T,
                    value,
                    forward.next_value,
                    shard["terminated"].T,
                    (shard["terminated"] | shard["truncated"]).T,
                    valid,
                    gamma=config.gamma,
                    lambda_=config.advantage_lambda,
                    rho_bar=config.rho_bar,
                    c_bar=config.c_bar,
                )
            else:
                rows = slice(None) if index is None else index
                old_value, old_log_prob = known.old_value[:, rows], known.old_log_prob[:, rows]
                targets = Targets(*(x[:, rows] for x in known.targets))
            moments = sum_moments(targets, value, valid)
        return Prepared(forward, targets, old_value, old_log_prob, valid, moments)

    def _gradient(self, moments: Moments, shard: TensorDict, prepared: Prepared) -> Tensor:
        """[P + terms]: the flat gradient of the shard's part of the loss, followed by its terms.

        One buffer adds up shards and learners in one operation, and a NaN or infinity in any of them reaches the sum.
        """
        parts, terms = self._backward(moments, shard, prepared)
        self._terms = self._terms or tuple(terms)
        if terms.keys() != set(self._terms):
            raise ValueError(f"{self.config.loss} returned {list(terms)}, and {list(self._terms)} before")
        return torch.cat([*(g.reshape(-1) for g in parts), torch.stack([terms[name].detach() for name in self._terms])])

    def _backward(
        self, moments: Moments, shard: TensorDict, prepared: Prepared, *, of_value: bool = True
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The gradient of the shard's part of the loss, by parameter, and its terms; or without the value loss."""
        config, scheduled = self.config, self._scheduled
        if not of_value:
            config, scheduled = dataclasses.replace(config, value_coef=0.0), scheduled._replace(value_coef=0.0)
        forward, targets = prepared.forward, prepared.targets
        advantage = targets.advantage
        if config.normalize_advantage:
            advantage = moments.normalize(advantage, prepared.valid, self._value_std or 1.0)
        inputs = LossInputs(
            log_prob=forward.log_prob,
            entropy=forward.entropy,
            value=forward.value,
            logits=forward.logits,
            core=forward.core,
            behavior_log_prob=shard["behavior_log_prob"].T,
            advantage=advantage,
            vs=targets.vs,
            old_value=prepared.old_value,
            old_log_prob=prepared.old_log_prob,
            valid=prepared.valid,
            count=max(int(moments.transitions), 1),
            value_std=self._value_std,
            batch=shard,
            policy=self.policy,
            config=config,
            scheduled=scheduled,
        )
        terms = checked_terms(config.loss, self._loss(inputs))
        # A policy of the user's may have parameters that the loss does not reach: their gradient is 0.
        gradient = torch.autograd.grad(terms["loss"], self._parameters, materialize_grads=True)
        return gradient, {**terms, **divergences(inputs)}

    @torch.no_grad()
    def _step(self, flat: Tensor, moments: Moments) -> dict[str, float]:
        """Add the L2-init gradient, clip the norm, check that all is finite, step, and clip the weights."""
        *gradients, terms_ = flat.split([*(p.numel() for p in self._parameters), len(self._terms)])
        for parameter, part in zip(self._parameters, gradients, strict=True):
            parameter.grad = part.view_as(parameter)
        gradient = flat[: -len(self._terms)]
        with torch.enable_grad():
            l2_init = self.regularizer.l2_init_loss()
            if l2_init is not None:
                l2_init.backward()
        # torch.nn.utils.clip_grad_norm_ on one buffer.
        grad_norm = gradient.norm()
        gradient.mul_((self.config.max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        terms = dict(zip(self._terms, terms_, strict=True))
        terms["grad_norm"] = grad_norm
        if l2_init is not None:
            terms["l2_init_loss"] = l2_init.detach()
            terms["loss"] = terms["loss"] + l2_init.detach()
        numbers = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        numbers["explained_variance"] = moments.explained_variance
        numbers["advantage_std"] = moments.advantage_std
        if not (_finite(numbers["loss"]) and _finite(numbers["grad_norm"])):
            raise NonFiniteUpdate(f"policy version {self.policy_version}: {numbers}")
        self.optimizer.step()
        self.regularizer.clip_weights()
        return numbers

    def _sum(self, parts: list[Tensor]) -> Tensor:
        """The sum over this learner's shards, in their order, and then over the learners of the group."""
        total = add(parts)
        if self.group is not None:
            self.group.sum_(total)
        return total

    def _log_prob_error(self, shards: list[TensorDict], prepared: list[Prepared]) -> float | None:
        """The parity check's reading of a first step, over the segments that were acted with the weights before it."""
        errors = [
            log_prob_error(p.forward.log_prob.detach(), shard, current)
            for shard, p in zip(shards, prepared, strict=True)
            if (current := shard["policy_version"] == self.policy_version).any()
        ]
        return float(torch.stack(errors).max()) if errors else None

    def with_start_states(self, batch: TensorDict) -> TensorDict:
        """The batch with the states that its training starts from (``learner.start_states``)."""
        if self.refreshed is not None:
            return self.refreshed.apply(batch)
        if "burn_in_obs" in batch.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
            return with_state(self.policy.core, batch, self._map_states(burned_in, batch))
        return batch

    def _map_states(self, function: Callable[..., State], batch: TensorDict) -> State:
        """The states, each tensor [L, B, ...], of all shards."""
        shards = self._shards.cut(batch, self.config.minibatches)
        parts = self._shards.map(lambda shard: function(self.policy, shard, self.path), shards)
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))

    def synchronize(self, group: LearnerGroup) -> None:
        """Copy the state of the group's rank 0 into this learner, and add up gradients with the group from now on.

        Raises:
            LearnerLost: another learner did not take part.
        """
        state = group.broadcast(self.shared_state())
        self.group = group
        if group.rank:
            self.load_shared_state(state)

    def shared_state(self) -> dict[str, Any]:
        """The state that is equal in all learners, as plain data and tensors that share this learner's memory."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": self.regularizer.state_dict(),
            "statistics": self.statistics.state_dict(),
            "learning_rate_factor": self.kl_adaptation.factor,
            "value_coef_factor": self.value_balance.factor,
            "policy_version": self.policy_version,
            "env_steps": self.env_steps,
            "others_env_steps": self.others_env_steps,
            "attempts": self.attempts,
        }

    def load_shared_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``shared_state``."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.regularizer.load_state_dict(state["regularizer"])
        self.statistics.load_state_dict(state["statistics"])
        self.kl_adaptation.factor = state["learning_rate_factor"]
        self.policy_version, self.env_steps = state["policy_version"], state["env_steps"]
        # Updates that were recorded by earlier versions lack these two.
        self.value_balance.factor = state.get("value_coef_factor", 1.0)
        self.others_env_steps = state.get("others_env_steps", 0)
        self.attempts = state["attempts"]

    def own_state(self) -> dict[str, Any]:
        """The state that is this learner's alone, likewise; with ``shared_state`` and a batch it decides an update."""
        return {
            "shards": self._shards.place,
            "random": self.random_state(),
            "start_states": None if self.refreshed is None else self.refreshed.state_dict(),
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``own_state``, in a learner with as many shards and threads."""
        self.load_random_state(state["random"])
        if self.refreshed is not None:
            self.refreshed.load_state_dict(state["start_states"])

    def random_state(self) -> dict[str, Any]:
        """The random streams that updates draw from."""
        return {"minibatches": self._shards.random_state(), "torch": torch.get_rng_state()}

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Continue the streams of ``random_state``; shards that did not exist then keep fresh ones."""
        self._shards.load_random_state(state["minibatches"])
        torch.set_rng_state(state["torch"].cpu())

    def close(self) -> None:
        """End the gradient threads."""
        self._shards.close()


def default_entropy_coef(actions: Actions) -> float:
    """``learner.entropy_coef=auto``."""
    return 0.01 if isinstance(actions, Discrete) else 0.0


def _finite(x: float) -> bool:
    return x - x == 0
