"""The slow, obvious reference of the update: episodes one by one, steps one by one, formulas as they are printed."""

from __future__ import annotations

import numpy as np
import torch

TERMINATED, TRUNCATED, FAULT = "terminated", "truncated", "fault"


def draw_boundaries(lengths, ends, steps, begins_void):
    """Flags of one row in the next-step convention: after an episode's end at t, transition t+1 is void.

    A fault has no final observation: its transition is void itself. ``is_first`` [T+1] leaves row 0 open.
    """
    is_first, terminated, truncated = (np.zeros(steps + 1, bool) for _ in range(3))
    t = 0
    if begins_void:  # the unroll before ended with the final observation of an episode: row 0
        is_first[1], t = True, 1
    for length, how in zip(lengths, ends, strict=True):
        last = t + length - 1
        if last >= steps:
            break
        if how == FAULT:
            is_first[last + 1], t = True, last + 1
            continue
        (terminated if how == TERMINATED else truncated)[last] = True
        if last + 2 > steps:
            break
        is_first[last + 2], t = True, last + 2
    return is_first, terminated[:steps], truncated[:steps]


def episodes_of(is_first, terminated):
    """(first row, last row, whether it terminated) of every episode's part in one row of a batch.

    Its transitions are those from its first row up to, not including, its last: that one only bootstraps.
    """
    starts = [0, *(np.flatnonzero(is_first[1:]) + 1)]
    lasts = [*(start - 1 for start in starts[1:]), len(is_first) - 1]
    return [(int(a), int(b), bool(b > a and terminated[b - 1])) for a, b in zip(starts, lasts, strict=True)]


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


def loss_by_episode(policy, batch, config, known=None, l2_init=None):
    """(loss with its graph, what the targets and old values are) of a batch, an episode at a time.

    ``known`` are targets of an earlier call; ``l2_init`` are the initial weights that the L2 loss pulls to.
    """
    columns = {name: batch[name].numpy() for name in batch.keys()}  # noqa: SIM118  (a TensorDict iterates over rows)
    log_probs, entropies, values, behavior, targets = [], [], [], [], []
    for b in range(batch.shape[0]):
        is_first = columns["is_first"][b]
        for begin, end, terminated in episodes_of(is_first, columns["terminated"][b]):
            stored = begin == 0 and not is_first[0]
            state = tuple(
                batch[part][b][:, None] if stored else torch.zeros(2, 1, policy.lstm.hidden_size)
                for part in ("initial_h", "initial_c")
            )
            outputs = []
            for t in range(begin, end + 1):
                core, state = policy.lstm(policy.encode(batch["obs"][b, t : t + 1])[None], state)
                outputs.append(policy.heads(core[0]))
            steps = slice(begin, end)
            if begin == end:
                continue
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
                    terminated,
                    gamma=config.gamma,
                    lambda_=config.advantage_lambda,
                    rho_bar=config.rho_bar,
                    c_bar=config.c_bar,
                )
            )
    log_prob, entropy, value = torch.cat(log_probs), torch.cat(entropies), torch.cat(values)
    vs, advantage, old_value = known or (
        torch.from_numpy(np.concatenate([vs for vs, _ in targets])).float(),
        torch.from_numpy(np.concatenate([a for _, a in targets])).float(),
        value.detach(),
    )
    known = (vs, advantage, old_value)
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (log_prob - torch.cat(behavior)).exp()
    clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
    policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    error = (value - vs) ** 2
    if config.value_clip_coef:
        near = old_value + (value - old_value).clamp(-config.value_clip_coef, config.value_clip_coef)
        error = torch.maximum(error, (near - vs) ** 2)
    loss = policy_loss + config.value_coef * 0.5 * error.mean() - config.entropy_coef * entropy.mean()
    if l2_init is not None:
        weights = [(p, l2_init[name]) for name, p in policy.named_parameters() if name in l2_init]
        loss = loss + config.regularization.l2_init_coef * sum(((p - w0) ** 2).sum() for p, w0 in weights)
    return loss, known
