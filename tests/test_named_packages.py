"""Packages that nodes of a cluster need, by the settings that name them."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from shoal import given
from shoal.deploy.cluster.named_packages import named_packages
from shoal.deploy.cluster.probe import probe
from shoal.deploy.docs.settings_reference import _attribute_docstrings
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.section import Named, Section


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {}),
        (["env.id=recall"], {}),
        (["env.id=mettagrid/forage"], {}),
        (["env.id=named_envs:Thing-v0"], {"named_envs": "env.id"}),
        (["env.id=pettingzoo:scripted_games:make"], {"scripted_games": "env.id"}),
        (["env.id=mettagrid:metta_games:well"], {"metta_games": "env.id"}),
        (["env.id=CartPole-v1", "env.wrappers=[{gymnasium.wrappers:TimeLimit: {}}]"], {"gymnasium": "env.wrappers"}),
        (["env.id=CartPole-v1", "env.wrappers=[gymnasium.wrappers:FlattenObservation]"], {"gymnasium": "env.wrappers"}),
        (["policy.kind=networks:Any"], {"networks": "policy.kind"}),
        (["policy.core=networks:Any"], {"networks": "policy.core"}),
        (["learner.optimizer=torch.optim:AdamW"], {"torch": "learner.optimizer"}),
        (["learner.loss=no_such_package:loss"], {}),  # this process lacks it, too, and says so by itself
        (["learner.loss=__main__:loss", "policy.kind=__main__:Mine", "policy.core=__main__:Core"], {}),  # they go along
    ],
)
def test_packages_by_setting(settings: list[str], expected: dict[str, str]) -> None:
    """Catches a setting whose module nobody looks for, and names of ours or of gymnasium that are taken for modules."""
    assert named_packages(load_config([], settings)[0]) == expected


def test_what_was_given_as_an_object_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches objects that go along and are asked for on the nodes all the same."""
    monkeypatch.setitem(given.environments, "named_envs:made here", object)
    monkeypatch.setitem(given.losses, "networks:loss", print)
    monkeypatch.setitem(given.cores, "networks:Core", object)
    monkeypatch.setitem(given.optimizers, "networks:Optimizer", object)
    monkeypatch.setitem(given.schedules, "networks:schedule", print)
    settings = [
        "learner.optimizer=networks:Optimizer",
        "learner.schedules.clip_coef.kind=networks:schedule",
        "env.id=named_envs:made here",
        "learner.loss=networks:loss",
        "policy.core=networks:Core",
    ]
    assert named_packages(load_config([], settings)[0]) == {}


HERE_ALONE = {"callbacks.name", "log.sinks.name"}
"""Settings that name code of the user's which the process that runs the command imports, and no other."""


def settings_that_name_code(section: type, path: str = "") -> Iterator[str]:
    """Dotted names of the settings below ``section`` that are marked as ``Named`` or described as names of code."""
    described = _attribute_docstrings(section)
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        parts = list(parts_of(hint))
        if any(isinstance(part, Named) for part in parts) or re.search(r"module:\w", described.get(name, "")):
            yield path + name
        # A section for each of several names is looked into under one of these.
        keys = next(
            (typing.get_args(typing.get_args(part)[0]) for part in parts if typing.get_origin(part) is Mapping), ()
        )
        inside = f"{path}{name}.{keys[0]}." if keys and isinstance(keys[0], str) else f"{path}{name}."
        for part in parts:
            if isinstance(part, type) and issubclass(part, Section):
                yield from settings_that_name_code(part, inside)


def parts_of(hint: Any) -> Iterator[Any]:
    """A type, what it is made of, and what it is annotated with."""
    yield hint
    for part in (*typing.get_args(hint), *getattr(hint, "__metadata__", ())):
        if part is not hint:
            yield from parts_of(part)


def test_every_setting_that_names_code_is_looked_at() -> None:
    """Catches a new setting of this kind, whose module would be neither sent to the nodes nor looked for there."""
    found = {*settings_that_name_code(Config)} - HERE_ALONE
    known = {"policy.kind", "policy.core", "learner.loss", "learner.optimizer", "env.id", "env.wrappers"}
    assert known | {"learner.schedules.learning_rate.kind"} <= found
    for setting in sorted(found):
        value = "[networks:Any]" if setting == "env.wrappers" else "networks:Any"
        config = load_config([], ["env.id=CartPole-v1", f"{setting}={value}"])[0]
        assert named_packages(config) == {"networks": setting}


def test_a_node_names_what_it_lacks() -> None:
    """Catches a node that imports what it is asked for, or finds everything."""
    assert probe(("gymnasium", "no_such_package", "antigravity")).missing == ("no_such_package",)
