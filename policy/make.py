"""Construct a policy of any kind from plain data, as found in a configuration or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.policy.actions import Actions
from shoal.policy.component import ComponentPolicy
from shoal.policy.config import Initialization
from shoal.policy.fast import FastPolicy
from shoal.policy.graph import LSTM
from shoal.policy.kinds import make_own
from shoal.policy.observation import Observation
from shoal.policy.recurrent_policy import RecurrentPolicy


def make_policy(
    kind: str,
    observation: Observation,
    actions: Actions,
    embedding_rows: int,
    *,
    components: Mapping[str, Mapping[str, Any] | None] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    core: str = LSTM,
    core_kwargs: Mapping[str, Any] | None = None,
    action_rows: Mapping[str, int] | None = None,
    initialization: Initialization | None = None,
    trained_observation: Observation | None = None,
    normalize_observations: bool = False,
    normalize_values: bool = False,
) -> RecurrentPolicy:
    """Construct a policy with fresh weights, which depend only on the seed of torch's global generator.

    Raises:
        ValueError: the kind is unknown, takes no components or other ``kwargs``, or the policy's constructor raised it.
    """
    shared: dict[str, Any] = {
        "core": core,
        "core_kwargs": core_kwargs,
        "action_rows": action_rows,
        "initialization": initialization,
        "trained_observation": trained_observation,
        "normalize_observations": normalize_observations,
        "normalize_values": normalize_values,
    }
    if ":" in kind:
        return make_own(kind, observation, actions, embedding_rows, kwargs=kwargs or {}, **shared)
    if kind == "component":
        return ComponentPolicy(observation, actions, embedding_rows, components=components, **shared)
    if kind != "fast" or components:
        raise ValueError(f"expected kind component, or fast without components, got {kind} with {components or {}}")
    return FastPolicy(observation, actions, embedding_rows, **shared)
