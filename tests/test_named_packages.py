"""Packages that nodes of a cluster need, by the settings that name them."""

from __future__ import annotations

import pytest
from shoal import given
from shoal.deploy.cluster.named_packages import named_packages
from shoal.deploy.cluster.probe import probe
from shoal.deploy.settings.load import load_config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], {}),
        (["env.id=recall"], {}),
        (["env.id=mettagrid/forage"], {}),
        (["env.id=named_envs:Thing-v0"], {"named_envs": "env.id"}),
        (["env.id=pettingzoo:scripted_games:make"], {"scripted_games": "env.id"}),
        (["env.id=CartPole-v1", "env.wrappers=[{gymnasium.wrappers:TimeLimit: {}}]"], {"gymnasium": "env.wrappers"}),
        (["env.id=CartPole-v1", "env.wrappers=[gymnasium.wrappers:FlattenObservation]"], {"gymnasium": "env.wrappers"}),
        (["policy.kind=networks:Any"], {"networks": "policy.kind"}),
        (["learner.optimizer=torch.optim:AdamW"], {"torch": "learner.optimizer"}),
        (["learner.loss=no_such_package:loss"], {}),  # this process lacks it, too, and says so by itself
        (["learner.loss=__main__:loss", "policy.kind=__main__:Mine"], {}),  # they go along
    ],
)
def test_packages_by_setting(settings: list[str], expected: dict[str, str]) -> None:
    """Catches a setting whose module nobody looks for, and names of ours or of gymnasium that are taken for modules."""
    assert named_packages(load_config([], settings)[0]) == expected


def test_what_was_given_as_an_object_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches objects that go along and are asked for on the nodes all the same."""
    monkeypatch.setitem(given.environments, "named_envs:made here", object)
    monkeypatch.setitem(given.losses, "networks:loss", print)
    settings = ["env.id=named_envs:made here", "learner.loss=networks:loss"]
    assert named_packages(load_config([], settings)[0]) == {}


def test_a_node_names_what_it_lacks() -> None:
    """Catches a node that imports what it is asked for, or finds everything."""
    assert probe(("gymnasium", "no_such_package", "antigravity")).missing == ("no_such_package",)
