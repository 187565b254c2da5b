"""Samples the outputs of a policy's hidden layers on part of a batch; dormant units are counted in them."""

# B segments, T time, N rows

from __future__ import annotations

import torch
from shoal.learner.forward_pass import valid_transitions
from shoal.learner.start_states import memory_resets
from shoal.policy import ComponentPolicy, FastPolicy, ImageObservation, RecurrentPolicy
from shoal.policy.graph import CORE, LSTM, VALUE
from tensordict import TensorDict
from torch import Tensor

SAMPLE_ROWS = 512
"""Approximate number of rows in a sample: enough to see a unit that is active in one row of 100, at the cost of one
rollout step."""
_HIDDEN_KINDS = ("conv", "residual", "linear", LSTM, CORE)


class ActivationSampler:
    """Runs the named components of the policy in training, with its current weights, on a few segments.

    A policy class of the user's has no named components, and so no sample.

    Drawing a sample changes nothing in the policy, its memory or any random stream.
    """

    def __init__(self, policy: RecurrentPolicy) -> None:
        self._policy = _by_components(policy) if policy.kind == FastPolicy.kind else policy
        graph = self._policy.graph if isinstance(self._policy, ComponentPolicy) else {}
        self._layers = [name for name, part in graph.items() if part.kind in _HIDDEN_KINDS and name != VALUE]

    @torch.no_grad()
    def sample(self, batch: TensorDict) -> dict[str, Tensor]:
        """Outputs by hidden layer, [N, U] (of a convolution [N, U, height, width]), for rows that were acted on.

        Args:
            batch: [B], as ``BatchAssembler`` makes it. Segments are taken at even distances, from their stored states.
        """
        if not self._layers:
            return {}
        segments, steps = batch.shape[0], batch["reward"].shape[1]
        chosen = torch.arange(segments)[:: max(segments * steps // SAMPLE_ROWS, 1)].to(batch["obs"].device)
        part = batch[chosen]
        shape = (len(chosen), steps)
        td = TensorDict({"obs": part["obs"][:, :steps], "is_first": memory_resets(part)[:, :steps]}, batch_size=shape)
        for name in (f"initial_{state}" for state in self._policy.core.state_shapes):
            td[name] = part[name][:, None].expand(*shape, *part[name].shape[1:])
        outputs, acted_on = self._policy(td), valid_transitions(part).nonzero(as_tuple=True)
        return {name: outputs[name][acted_on] for name in self._layers}


def _by_components(policy: RecurrentPolicy) -> ComponentPolicy:
    """The same network with named layers; it shares the parameters of ``policy``."""
    trained = policy.trained_observation
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are replaced
        view = ComponentPolicy(
            policy.observation,
            policy.actions,
            policy.action_embeddings.num_embeddings,
            core=policy.core_name,
            core_kwargs=policy.core_kwargs,
            action_rows=policy.action_rows,
            trained_observation=None if isinstance(trained, ImageObservation) else trained,
            normalize_observations=policy.vector_normalizer is not None,
            normalize_values=policy.value_scale is not None,
        ).to(policy.action_embeddings.weight.device)
    view.load_state_dict(policy.state_dict(), assign=True)
    return view
