"""What a checkpoint says of the run that saved it: its environment, its names, when it zeroed the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from shoal.actors.config import EPISODE
from shoal.envs.config import AdapterOptions, split_options
from shoal.envs.registry import list_env_ids
from shoal.learner.checkpoint import Checkpoint, refusing_damage
from shoal.policy.remap import NameMap, Remapping

_MOST_SLOTS_OR_STEPS = 2**20
"""Slots of an actor, or steps of an unroll, that a checkpoint may say it was trained with."""


def trained_arguments(checkpoint: Checkpoint) -> tuple[dict[str, Any], AdapterOptions]:
    """The environment's own arguments and the options that the checkpoint was trained with.

    Raises:
        ValueError: no run saved them.
    """
    with refusing_damage(checkpoint.path, passed_on=ValueError):
        return _trained_arguments(checkpoint.state)


def _trained_arguments(state: Mapping[str, Any]) -> tuple[dict[str, Any], AdapterOptions]:
    is_vector = state["policy"]["observation"]["kind"] == "vector"
    is_own = state["env_id"].partition("?")[0] in list_env_ids()
    if "env_options" in state:
        options = AdapterOptions(**state["env_options"])
        of_several = bool((state.get("config") or {}).get("policies"))
        if is_vector and not (is_own or of_several) and options.image_layout == "auto":
            # Numbers they were, whatever "auto" makes of them now; of several policies each was read in its own way.
            options = dataclasses.replace(options, image_layout="none")
        return state["env_kwargs"], options
    own, options = split_options(state["env_kwargs"])
    if not is_own:
        # As observations were read then, whatever "auto" makes of them now.
        layouts: dict[str, Literal["none", "channels_last"]] = {"vector": "none", "image": "channels_last"}
        layout = layouts.get(state["policy"]["observation"]["kind"])
        options = dataclasses.replace(options, image_layout=layout or options.image_layout)
    return own, options


def check_saved_by_run(checkpoint: Checkpoint) -> None:
    """Check what an evaluation reads beside the weights.

    Raises:
        ValueError: no run saved this.
    """
    state = checkpoint.state
    config = state.get("config")
    parts = config if isinstance(config, dict) else {}
    env, actor = parts.get("env"), parts.get("actor")
    fits = {
        "config": isinstance(env, dict) and isinstance(actor, dict) and isinstance(parts.get("policy"), dict),
        "config.env.num_envs": isinstance(env, dict) and _is_size(env.get("num_envs")),
        "config.actor.unroll_length": isinstance(actor, dict) and _is_size(actor.get("unroll_length")),
        "env_id": isinstance(state.get("env_id"), str),
        "env_kwargs": isinstance(state.get("env_kwargs"), dict),
        "mean_return": "mean_return" in state and isinstance(state["mean_return"], int | float | None),
    }
    if wrong := [name for name, right in fits.items() if not right]:
        raise ValueError(f"{checkpoint.path} was not saved by a run: its state lacks {', '.join(wrong)}, or has others")


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MOST_SLOTS_OR_STEPS


def check_plays_all(checkpoint: Checkpoint) -> None:
    """Check that the policy was trained to play every agent of its environment.

    Raises:
        ValueError: it is one of several policies.
    """
    policies = checkpoint.state["config"].get("policies")
    if isinstance(policies, dict) and policies:
        whole = checkpoint.path.parent
        run = whole if (whole / "manifest.json").is_file() else "RUN"
        raise ValueError(
            f"{checkpoint.path} is of one of the policies {', '.join(policies)}, and would play the agents of the "
            f"others, too; shoal evaluate {run} plays each with its own policy"
        )


def remapping_of(settings: Mapping[str, Any]) -> Remapping:
    """The remapping that the settings of a policy say."""
    return Remapping(
        NameMap(settings.get("map_features", ()), "--map-feature"),
        NameMap(settings.get("map_actions", ()), "--map-action"),
    )


def reset_memory_of(checkpoint: Checkpoint) -> str:
    """The run's ``actor.reset_memory``; runs from before there was a choice zeroed the memory with every episode."""
    config = checkpoint.state.get("config") or {}
    found: str = config.get("actor", {}).get("reset_memory", EPISODE)
    return found


def own_remapping(checkpoint: Checkpoint) -> Remapping:
    """The remapping that the checkpoint was trained with."""
    return remapping_of(checkpoint.state["config"]["policy"])
