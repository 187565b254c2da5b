"""The description of a policy: plain data from which it can be made again around its weights."""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from shoal.policy.actions import actions_from_json, actions_to_json
from shoal.policy.graph import LSTM, components_from_json, differences, resolve
from shoal.policy.make import make_policy
from shoal.policy.observation import ImageEncoder, image_encoders, observation_from_json, observation_to_json, written
from shoal.policy.recurrent_policy import RecurrentPolicy

_COMMON_SIZE = 2**14
"""Up to it a size is not looked for: two of them make a tensor of a gigabyte."""
_NO_SIZES = ("kwargs", "feature_normalizations", "feature_names", "categorical_features", "left_out", "action_rows")


def other_part(described: Mapping[str, Any], policy: RecurrentPolicy) -> str:
    """How the checkpoint's core or encoders of images differ from the policy's, as the end of a sentence; "" where they
    are the same, or nobody could choose them."""
    return _other_core(described, policy) or _other_encoders(described, policy)


def other_kind(described: Mapping[str, Any], policy: RecurrentPolicy) -> str:
    """Of a checkpoint and a policy of which only one is of this package, or each of another class of a user's: their
    kinds, as part of a sentence. "" for all others."""
    if described["kind"] == policy.kind or not _one_is_own(described, policy):
        return ""
    return f"it was trained with policy.kind={described['kind']}, and here that is {policy.kind}: "


def _one_is_own(described: Mapping[str, Any], policy: RecurrentPolicy) -> bool:
    return ":" in described["kind"] or ":" in policy.kind


def _other_encoders(described: Mapping[str, Any], policy: RecurrentPolicy) -> str:
    saved, here = _encoders(described, policy)
    # A class of a user's chooses its layers itself: policy.image_encoder says nothing of it, and cannot be set.
    if saved == here or saved.keys() != here.keys() or _one_is_own(described, policy):
        return ""
    # "" is the name of an observation that is an image itself.
    theirs, ours = (written(each.get("", each)) for each in (saved, here))
    return f"was trained with policy.image_encoder={theirs}, and can only be resumed so; here it is {ours}"


def _encoders(described: Mapping[str, Any], policy: RecurrentPolicy) -> tuple[dict[str, ImageEncoder], ...]:
    observations = (observation_from_json(described["observation"]), policy.trained_observation)
    return tuple(image_encoders(observation) for observation in observations)


def _other_core(described: Mapping[str, Any], policy: RecurrentPolicy) -> str:
    saved = (described.get("core", LSTM), described.get("core_kwargs") or {})
    # As a file gives them back: tuples are lists there.
    here = (policy.core_name, json.loads(json.dumps(dict(policy.core_kwargs))))
    if saved == here:
        return ""
    (name, kwargs), (name_here, kwargs_here) = saved, here
    return (
        f"was trained with policy.core={name} and policy.core_kwargs={kwargs}, and can only be resumed so; here they "
        f"are {name_here} and {kwargs_here}"
    )


def changed_components(described: Mapping[str, Any], policy: RecurrentPolicy) -> list[str]:
    """Names of the components that differ; equal shapes may still have another activation or another source."""
    saved_encoders, encoders = _encoders(described, policy)
    if saved_encoders != encoders and _one_is_own(described, policy):
        return []  # those of the encoder, of which one side has layers of its own: the weights tell
    components, observation = described.get("components") or {}, observation_from_json(described["observation"])
    saved = resolve(components_from_json(components), observation, policy.core_name)
    here = resolve(components_from_json(policy.components), policy.trained_observation, policy.core_name)
    return differences(saved, here)


def check_sizes(described: Mapping[str, Any], weights: Path) -> None:
    """Check that a description asks for no larger sizes than there are in ``weights``, a file of its tensors: they are
    allocated before the weights are loaded, and compared only then.

    Raises:
        ValueError: it does, or they are no such file.
    """
    try:
        with safe_open(weights, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{weights.name} is no file of tensors: {error}") from error
    most = max((*itertools.chain(*shapes), _COMMON_SIZE))
    # Whatever a core of the user's takes need not be a size.
    left_out = ("core_kwargs",) if ":" in str(described.get("core")) else ()
    for name, size in _sizes({key: value for key, value in described.items() if key not in left_out}):
        if size > most:
            raise ValueError(f"{name} is {reprlib.repr(size)}, and no tensor of {weights.name} has such a size")


def _sizes(value: Any, name: str = "policy") -> Iterator[tuple[str, int]]:
    """The whole numbers in a description, but for those that only name or count, by their places."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NO_SIZES:
                yield from _sizes(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _sizes(inner, name)
    elif isinstance(value, int):
        yield name, value


def make_described_policy(
    described: Mapping[str, Any], observation: Mapping[str, Any] | None = None
) -> RecurrentPolicy:
    """A policy as ``describe_policy`` says, with fresh weights.

    Args:
        observation: the environment's, in the same form, where it has other features than the trained one, which
            ``described`` has.

    Raises:
        ValueError: there is no such policy here.
    """
    trained = observation_from_json(described["observation"])
    other = observation is not None and observation != described["observation"]
    return make_policy(
        described["kind"],
        observation_from_json(observation) if observation is not None and other else trained,
        actions_from_json(described["actions"]),
        described["embedding_rows"],
        components=described.get("components"),
        kwargs=described.get("kwargs"),
        core=described.get("core", LSTM),
        core_kwargs=described.get("core_kwargs"),
        action_rows=described["action_rows"],
        trained_observation=trained if other else None,
        normalize_observations=described.get("normalize_observations", False),
        normalize_values=described.get("normalize_values", False),
    )


def describe_policy(policy: RecurrentPolicy) -> dict[str, Any]:
    """The description from which the policy can be rebuilt around its weights."""
    return {
        "kind": policy.kind,
        "components": policy.components,
        "kwargs": dict(policy.kwargs),
        "core": policy.core_name,
        "core_kwargs": dict(policy.core_kwargs),
        "observation": observation_to_json(policy.trained_observation),
        "actions": actions_to_json(policy.actions),
        "action_rows": dict(policy.action_rows),
        "embedding_rows": policy.embedding_rows,
        "normalize_observations": policy.vector_normalizer is not None,
        "normalize_values": policy.value_scale is not None,
    }
