"""The slow, obvious reference of the update: episodes one by one, steps one by one, formulas as they are printed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

TERMINATED, TRUNCATED, FAULT, ABSENT = ENDS = ("terminated", "truncated", "fault", "absent")
"""Ends of an episode's part of a row. A fault has no final observation: its transition is void itself. ``absent`` is a
termination after which the agent is out of the game for two more steps."""


class Episode(NamedTuple):
    """One episode's part of one row: its transitions are begin .. end - 1."""

    begin: int
    end: int
    terminated: bool
    final: bool
    """True where it bootstraps from ``final_obs[end - 1]`` (same-step form), False where from row ``end``."""


def draw_boundaries(lengths, ends, steps, *, begins_void=False, same_step=False):
    """Flags of one row, (is_first [T+1] with row 0 left open, terminated [T], truncated [T]).

    In the next-step form the transition after an episode's end is void, in the same-step form there is none.
    """
    is_first, terminated, truncated = (np.zeros(steps + 9, bool) for _ in range(3))
    t = 0
    if begins_void and not same_step:  # the unroll before ended with the final observation of an episode: row 0
        is_first[1], t = True, 1
    for length, how in zip(lengths, ends, strict=True):
        if (last := t + length - 1) >= steps:
            break
        if how != FAULT:
            (truncated if how == TRUNCATED else terminated)[last] = True
        t = last + 1 if same_step or how == FAULT else last + 2
        is_first[t] = True
        if how == ABSENT:
            is_first[t + 1 : t + 3] = True
            t += 2
    return is_first[: steps + 1], terminated[:steps], truncated[:steps]


def episodes_of(is_first, terminated, truncated):
    """Every episode's part of one row of a batch, those without a transition too."""
    starts = [0, *(np.flatnonzero(is_first[1:]) + 1)]
    found = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        end, final = (len(is_first) - 1 if following is None else following - 1), False
        if following is not None and (terminated[end] or truncated[end]):
            end, final = following, True
        found.append(Episode(int(start), int(end), bool(end > start and terminated[end - 1]), final))
    return found


def episode_targets(log_rho, reward, value, terminated, *, gamma, lambda_, rho_bar, c_bar):
    """(vs, advantage) of one episode's n transitions; ``value`` [n + 1] ends with its last row's.

    vs_s = V(x_s) + sum_t gamma^(t-s) (prod_{s<=i<t} c_i) delta_t, and the advantage from vs_{s+1}.
    """
    n = len(reward)
    rho = np.exp(log_rho)
    v = [*value[:n], 0.0 if terminated else value[n]]
    vs = [
        v[s]
        + sum(
            gamma ** (t - s)
            * np.prod([lambda_ * min(c_bar, rho[i]) for i in range(s, t)])
            * min(rho_bar, rho[t])
            * (reward[t] + gamma * v[t + 1] - v[t])
            for t in range(s, n)
        )
        for s in range(n)
    ]
    after = [*vs[1:], v[n]]
    advantage = [reward[s] + gamma * (v[s + 1] + lambda_ * (after[s] - v[s + 1])) - v[s] for s in range(n)]
    return np.array(vs), np.array(advantage)


def one_step(policy, obs, state):
    """(output [1, H], state) of one environment in the middle of an episode."""
    x = policy.encode(obs[None])
    if isinstance(policy.core, torch.nn.LSTM):
        core, state = torch.nn.LSTM.forward(policy.core, x[None], state)
        return core[0], state
    return policy.core.step(x, torch.zeros(1, dtype=torch.bool), state)


def start_state(policy, batch, b):
    """The memory before row 0 of segment b: stored, or from its burn-in rows, a step at a time."""
    burn_in = "burn_in_obs" in batch.keys()  # noqa: SIM118  (a TensorDict iterates over rows)
    when = "burn_in" if burn_in else "initial"
    state = tuple(batch[f"{when}_{name}"][b][:, None] for name in policy.core.state_shapes)
    if burn_in:
        with torch.no_grad():
            for obs, is_first in zip(batch["burn_in_obs"][b], batch["burn_in_is_first"][b], strict=True):
                state = tuple(torch.zeros_like(part) for part in state) if is_first else state
                _, state = one_step(policy, obs, state)
    return state


def loss_by_episode(policy, batch, config, known=None, l2_init=None):
    """(loss with its graph, what the targets and old values are) of a batch, an episode at a time.

    ``known`` are targets of an earlier call; ``l2_init`` are the initial weights that the L2 loss pulls to.
    """
    columns = {name: batch[name].numpy() for name in batch.keys()}  # noqa: SIM118  (a TensorDict iterates over rows)
    log_probs, entropies, values, behavior, targets = [], [], [], [], []
    for b in range(batch.shape[0]):
        is_first = columns["is_first"][b]
        resets = columns.get("memory_reset", columns["is_first"])[b]
        state = start_state(policy, batch, b)
        for episode in episodes_of(is_first, columns["terminated"][b], columns["truncated"][b]):
            steps = slice(episode.begin, episode.end)
            if resets[episode.begin]:
                state = policy.initial_state(1)
            if episode.begin == episode.end:
                _, state = one_step(policy, batch["obs"][b, episode.end], state)
                continue
            last = batch["final_obs"][b, episode.end - 1] if episode.final else batch["obs"][b, episode.end]
            outputs = []
            for obs in batch["obs"][b, steps]:
                core, state = one_step(policy, obs, state)
                outputs.append(policy.heads(core))
            core, after = one_step(policy, last, state)
            outputs.append(policy.heads(core))
            if not episode.final:  # a row like others, which the memory reads
                state = after
            chosen = torch.distributions.Categorical(logits=torch.cat([o.logits for o in outputs[:-1]]))
            log_prob = chosen.log_prob(batch["action"][b, steps])
            value = torch.cat([o.value for o in outputs])
            log_probs.append(log_prob)
            entropies.append(chosen.entropy())
            values.append(value[:-1])
            behavior.append(batch["behavior_log_prob"][b, steps])
            log_rho = (log_prob.detach() - behavior[-1]).double().numpy()
            targets.append(
                episode_targets(
                    np.zeros_like(log_rho) if config.advantage == "gae" else log_rho,
                    columns["reward"][b, steps].astype(np.float64),
                    value.detach().double().numpy(),
                    episode.terminated,
                    gamma=config.gamma,
                    lambda_=config.advantage_lambda,
                    rho_bar=config.rho_bar,
                    c_bar=config.c_bar,
                )
            )
    log_prob, entropy, value = torch.cat(log_probs), torch.cat(entropies), torch.cat(values)
    mu = torch.cat(behavior)
    vs, advantage, old_value, old_log_prob = known = known or (
        torch.from_numpy(np.concatenate([vs for vs, _ in targets])).to(value.dtype),
        torch.from_numpy(np.concatenate([a for _, a in targets])).to(value.dtype),
        value.detach(),
        log_prob.detach() if config.epochs > 1 else mu,
    )
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
    weight = (old_log_prob - mu).exp().clamp(max=config.rho_bar)
    policy_loss = -(weight * torch.minimum(ratio * advantage, clipped * advantage)).mean()
    if config.loss == "impala":
        policy_loss = -((log_prob.detach() - mu).exp().clamp(max=config.rho_bar) * advantage * log_prob).mean()
    error = (value - vs) ** 2
    if config.value_clip_coef:
        near = old_value + (value - old_value).clamp(-config.value_clip_coef, config.value_clip_coef)
        error = torch.maximum(error, (near - vs) ** 2)
    loss = policy_loss + config.value_coef * 0.5 * error.mean() - config.entropy_coef * entropy.mean()
    if l2_init is not None:
        weights = [(p, l2_init[name]) for name, p in policy.named_parameters() if name in l2_init]
        loss = loss + config.regularization.l2_init_coef * sum(((p - w0) ** 2).sum() for p, w0 in weights)
    return loss, known
