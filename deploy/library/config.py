"""``shoal.Config``: a configuration that is made in Python and checked when it is made."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.settings import sections
from shoal.deploy.settings.load import ConfigError, resolve, to_dict
from shoal.deploy.settings.sections import TENSORBOARD, SinkConfig
from shoal.policy.config import PolicyConfig
from shoal.policy.graph import components_to_json

Layer = sections.Config | Mapping[str, Any] | str | Path | None

_DEFAULTS = {"metrics.port": 0}
"""Several runs of one process, or of notebooks beside each other, each get a free port."""
_SHORT = {"env": "env.id", "policy": "policy.kind", "core": "policy.core", "loss": "learner.loss"}
"""What may be given in place of the setting that chooses it."""
_SCHEDULES = "learner.schedules."
_OF_SINKS = ("log.sinks", "log.sinks.name")


class Config(sections.Config):
    """The configuration of a run, with the settings of ``shoal config show``.

    ::

        shoal.Config(env="CartPole-v1", learner={"gamma": 0.9}, **{"actor.unroll_length": 32})
        shoal.Config(env={"id": MyEnv, "num_envs": 16, "kwargs": {"size": 7}}, policy=MyPolicy)

    Keys are dotted, or name a section whose value is a mapping of its settings. ``env`` may be an environment's id, a
    ``gymnasium.Env`` class or a function that makes an environment; ``policy`` a kind, or a ``shoal.RecurrentPolicy``
    class; ``core`` a name, or a ``shoal.Core`` class; ``loss`` a name, or a function of ``shoal.LossInputs``;
    ``learner.optimizer`` a name, or a ``torch.optim.Optimizer`` class; ``learner.schedules.NAME``, or its ``kind``, a
    function of progress; the entries of ``log.sinks`` names,
    ``shoal.Sink`` classes, or mappings of ``name`` and ``kwargs``.
    Everything else is plain data. ``metrics.port`` is 0 (a free port) unless it is set. Frozen;
    ``dataclasses.replace`` makes a changed one.

    Raises:
        ConfigError: settings are unknown, of another type, out of range, or do not fit each other.
    """

    def __init__(self, **settings: Any) -> None:
        made = make_config(settings)
        for field in dataclasses.fields(made):
            object.__setattr__(self, field.name, getattr(made, field.name))


def make_config(*layers: Layer) -> sections.Config:
    """The configuration of ``layers`` over each other, of which the later ones count.

    Args:
        layers: configurations; mappings as ``Config`` takes them; YAML files, or shipped ones by name; None is empty.

    Raises:
        ConfigError: with all problems.
    """
    problems: list[str] = []
    plain = [_plain_layer(layer, problems) for layer in layers if layer is not None]
    config, found = resolve(_DEFAULTS, *plain)
    if problems or found:
        raise ConfigError([*problems, *found])
    return config


def _plain_layer(layer: sections.Config | Mapping[str, Any] | str | Path, problems: list[str]) -> Any:
    if isinstance(layer, str | Path):
        return layer
    if isinstance(layer, sections.Config):
        return to_dict(layer)
    found = {}
    for key, value in layer.items():
        if key in _SHORT and value is not None and not _is_section(value):
            key = _SHORT[key]
        found[key] = _plain(key, value, problems)
    return found


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _plain(key: str, value: Any, problems: list[str]) -> Any:
    """Plain data in place of paths, numpy's numbers, sections, and of classes and functions where these have names."""
    if key in _OF_SINKS and not isinstance(value, str | Mapping | list | tuple | SinkConfig):
        return _named(key, value, problems)
    if isinstance(value, PolicyConfig):
        return {**dataclasses.asdict(value), "components": components_to_json(value.components)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        if key.endswith("kwargs") or key.startswith("env.wrappers."):
            return _arguments(key, value, problems)
        return {name: _plain(f"{key}.{name}", inner, problems) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        if key == "log.sinks":
            problems += _alike(value)
        return [_plain(key, inner, problems) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if key == "env.id" and callable(value):
        return _named(key, value, problems)
    if key == "env.id" and not isinstance(value, str | int | float | None):
        problems.append(
            "env.id: expected an environment's id, its class, or a function that makes one, got an object of "
            f"{type(value).__name__}; give the class, and its arguments as env.kwargs"
        )
        return "recall"
    if key in ("policy.kind", "policy.core") and isinstance(value, type):
        return _named(key, value, problems)
    if key == "learner.loss" and callable(value):
        return _named(key, value, problems)
    if key == "learner.optimizer" and not isinstance(value, str | int | float | None):
        return _named(key, value, problems)
    if key.startswith(_SCHEDULES) and callable(value):
        from shoal.actors.user_code import give_schedule

        _, _, rest = key.removeprefix(_SCHEDULES).partition(".")
        return give_schedule(value) if rest else {"kind": give_schedule(value)}
    return value


def _arguments(key: str, arguments: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Arguments of the user's code, which the run directory and checkpoints hold as JSON."""
    found = {}
    for name, value in arguments.items():
        plain = _plain(f"{key}.{name}", value, problems)
        try:
            json.dumps(plain)
            # Callbacks get what was given; whoever goes on from a file gets text, as ``shoal.OptionsSchedule`` knows.
            if not key.startswith("callbacks") and (odd := _no_text(plain)):
                raise TypeError(f"its key {odd[0]!r} is no text, and JSON has no other keys")
        except (TypeError, ValueError) as error:
            advice = "a function that makes the environment may hold anything, e.g. functools.partial(MyEnv, ...)"
            if key.startswith("log.sinks"):
                advice = "make it in the sink's open"
            elif not key.startswith("env."):
                advice = "make it where it is needed, of plain arguments"
            problems.append(
                f"{key}.{name}: expected plain data (numbers, strings, lists, mappings), which checkpoints can hold, "
                f"got {type(value).__name__} ({error}); {advice}"
            )
            continue
        found[name] = plain
    return found


def _no_text(value: Any) -> list[Any]:
    """Keys of mappings in plain data that are no text."""
    if isinstance(value, Mapping):
        return [key for key in value if not isinstance(key, str)] + [k for v in value.values() for k in _no_text(v)]
    return [key for each in value for key in _no_text(each)] if isinstance(value, list | tuple) else []


def _alike(sinks: Sequence[Any]) -> list[str]:
    """Problems of different classes in ``log.sinks`` that have one name, of which the last would stand for all."""
    named = [sink.get("name") if isinstance(sink, Mapping) else sink for sink in sinks]
    classes = dict.fromkeys(sink for sink in named if isinstance(sink, type))
    if len(classes) < 2:
        return []
    from shoal.actors.user_code import name_of

    counts = collections.Counter(name_of(cls) for cls in classes)
    return [
        f"log.sinks: {count} classes are called {name}; give each a __qualname__ of its own, or make one class that "
        "takes arguments"
        for name, count in counts.items()
        if count > 1
    ]


def _named(key: str, value: Any, problems: list[str]) -> Any:
    """The name of a class or function, by which every process of the run finds it."""
    from shoal.actors.user_code import (
        give_core,
        give_environment,
        give_loss,
        give_optimizer,
        give_policy,
        give_sink,
        name_of,
    )
    from shoal.deploy.monitoring.sinks import Sink
    from shoal.envs.entry_points import is_environment_class

    if key == "env.id":
        if isinstance(value, type) and not is_environment_class(value):
            problems.append(
                "env.id: expected a class of environments, with reset and step, or a function that makes one, got "
                f"{name_of(value)}; a PettingZoo game is named pettingzoo:module:function"
            )
        return give_environment(value)
    if key == "learner.loss":
        return give_loss(value)
    if key == "learner.optimizer":
        import torch

        if not isinstance(value, type) or not issubclass(value, torch.optim.Optimizer):
            problems.append(
                "learner.optimizer: expected a subclass of torch.optim.Optimizer, got "
                f"{name_of(value) if isinstance(value, type) else f'an object of {type(value).__name__}'}; give the "
                "class, and its arguments as learner.optimizer_kwargs"
            )
            return "torch.optim:Adam"  # as Adam's own name takes no optimizer_kwargs, of which there is nothing to say
        return give_optimizer(value)
    if key in _OF_SINKS:
        if not isinstance(value, type) or not issubclass(value, Sink):
            problems.append(
                f"log.sinks: expected a subclass of shoal.Sink, got {value!r}; give the class, and its arguments as "
                "{'name': MySink, 'kwargs': {...}}"
            )
            return TENSORBOARD
        return give_sink(value)
    from shoal.policy import Core, RecurrentPolicy

    if key == "policy.core":
        if not issubclass(value, Core):
            problems.append(f"policy.core: expected a subclass of shoal.Core, got {name_of(value)}")
            return "lstm"
        return give_core(value)
    if not issubclass(value, RecurrentPolicy):
        problems.append(f"policy.kind: expected a subclass of shoal.RecurrentPolicy, got {name_of(value)}")
        return "fast"
    return give_policy(value)
