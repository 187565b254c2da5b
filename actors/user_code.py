"""The user's own classes and functions: their names, and their way to the other processes of a run.

A class that an import finds is named, and imported there. What else is given (a class of a notebook or of the script
that runs, a function) goes along as ``cloudpickle`` writes it, to processes of this run only and never into a file.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cloudpickle  # noqa: TID251  (the user's own code, on its way to processes that this one starts)
import torch
from shoal import given
from shoal.envs.entry_points import is_environment_class
from shoal.policy.core import Core
from shoal.policy.recurrent_policy import RecurrentPolicy


def give_environment(make: Callable[..., Any]) -> str:
    """The environment id of a class or function that makes one environment; it is known by it from now on."""
    is_class = is_environment_class(make)
    return _give(make, given.environments, by_name=is_class)


def give_policy(cls: type[RecurrentPolicy]) -> str:
    """The ``policy.kind`` of a class; it is known by it from now on."""
    return _give(cls, given.policies, by_name=True)


def give_core(cls: type[Core]) -> str:
    """The ``policy.core`` of a class; it is known by it from now on."""
    return _give(cls, given.cores, by_name=True)


def give_loss(loss: Callable[..., Any]) -> str:
    """The ``learner.loss`` of a function, or of a class whose objects are called; it is known by it from now on."""
    return _give(loss, given.losses, by_name=True)


def give_optimizer(cls: type[torch.optim.Optimizer]) -> str:
    """The ``learner.optimizer`` of a class; it is known by it from now on."""
    return _give(cls, given.optimizers, by_name=True)


def give_schedule(schedule: Callable[..., Any]) -> str:
    """The ``kind`` in ``learner.schedules`` of a function of progress; it is known by it from now on."""
    return _give(schedule, given.schedules, by_name=True)


def give_sink(cls: type[Any]) -> str:
    """The name in ``log.sinks`` of a subclass of ``shoal.Sink``; it is known by it from now on, in this process."""
    return _give(cls, given.sinks, by_name=True)


def _give(found: Any, names: dict[str, Any], *, by_name: bool) -> str:
    name = name_of(found)
    if by_name and _is_importable(name, found):
        return name
    if not isinstance(found, type) or "<locals>" in name:
        # There may be several of functions, lambdas above all, and of classes that a function makes. Of a class in a
        # notebook the latest counts.
        known = [name, *(f"{name}#{number}" for number in range(2, 2 + len(names)))]
        name = next(one for one in known if names.get(one, found) is found)
    names[name] = found
    return name


def name_of(found: Any) -> str:
    """``module:name`` of a class or a function; of any other object, that of its class."""
    if isinstance(found, functools.partial):
        module, _, name = name_of(found.func).partition(":")
        return f"{module}:partial({name})"
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}:{named.__qualname__}"


def _is_importable(name: str, found: Any) -> bool:
    """Whether other processes find the object by its name."""
    module = name.partition(":")[0]
    if module == "__main__" or module in cloudpickle.list_registry_pickle_by_value():
        return False
    try:
        return pkgutil.resolve_name(name) is found
    except (ImportError, AttributeError, ValueError):
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class UserCode:
    """What goes along by value, by name. A process that unpickles it knows these names from then on."""

    environments: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    policies: Mapping[str, type[RecurrentPolicy]] = dataclasses.field(default_factory=dict)
    cores: Mapping[str, type[Core]] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    optimizers: Mapping[str, type[torch.optim.Optimizer]] = dataclasses.field(default_factory=dict)
    schedules: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(
        env_id: str,
        policy_kind: str,
        core: str = "",
        loss: str = "",
        optimizer: str = "",
        schedules: Iterable[str] = (),
    ) -> UserCode:
        """What these names stand for in this process, as far as it was given."""
        return UserCode(
            _chosen(given.environments, env_id),
            _chosen(given.policies, policy_kind),
            _chosen(given.cores, core),
            _chosen(given.losses, loss),
            _chosen(given.optimizers, optimizer),
            _chosen(given.schedules, *schedules),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        parts = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return (_arrive, (cloudpickle.dumps(parts),)) if any(parts) else (UserCode, ())


def _chosen(names: Mapping[str, Any], *chosen: str) -> dict[str, Any]:
    return {name: names[name] for name in chosen if name in names}


def _arrive(data: bytes) -> UserCode:
    arrived = UserCode(*cloudpickle.loads(data))
    given.environments.update(arrived.environments)
    given.policies.update(arrived.policies)
    given.cores.update(arrived.cores)
    given.losses.update(arrived.losses)
    given.optimizers.update(arrived.optimizers)
    given.schedules.update(arrived.schedules)
    return arrived
