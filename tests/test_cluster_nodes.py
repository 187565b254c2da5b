"""The nodes of a cluster that a run may use, and no others, are asked what they run."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from shoal.actors.code import Code
from shoal.actors.ray_nodes import NoAnswer, RayNode
from shoal.actors.ray_watch import RayLost, RayWatch
from shoal.deploy.cluster import connect
from shoal.deploy.cluster.connect import Cluster, Node
from shoal.deploy.cluster.probe import probe
from shoal.deploy.placement.layout import Machine
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ((), "here, acts, learns, other"),
        (("cluster.actor_labels={role: rollout}",), "here, acts"),
        (("cluster.actor_labels={role: rollout}", "learner.num_learners=2"), "here, acts, learns, other"),
        (
            ("cluster.actor_labels={role: rollout}", "cluster.learner_labels={role: peer}", "learner.num_learners=2"),
            "here, acts, learns",
        ),
        (("cluster.actor_resources={arm: 1}",), "here, other"),
        (("cluster.actor_cpus=3",), "here, other"),
    ],
)
def test_only_nodes_that_the_run_can_use_are_asked(settings: tuple[str, ...], used: str) -> None:
    """Catches a cluster that no run can use as one of its nodes, which is for others, has another gymnasium."""

    def node(name: str, resources: dict[str, float], labels: dict[str, str], here: bool = False) -> Node:
        return Node(name * 56, name, here, False, resources, resources, labels)

    cpus = {"CPU": 2.0}
    nodes = {
        "here": node("0", {}, {}, here=True),
        "acts": node("1", cpus, {"role": "rollout"}),
        "learns": node("2", cpus, {"role": "peer"}),
        "other": node("3", {"CPU": 4.0, "arm": 1.0}, {}),
        "head": node("4", {}, {"role": "head"}),
    }
    config, problems = load_config(
        (), ["env.id=recall", "cluster.autoscaling=true", "learner.num_learners=1", *settings]
    )
    assert not problems
    own = probe()
    foreign = own._replace(code=Code("/elsewhere", "0" * 64), versions={**own.versions, "gymnasium": "0.1"})
    asked: list[Node] = []

    class Known(Cluster):
        def __init__(self) -> None:
            self.config = config.cluster

        def nodes(self) -> list[Node]:
            return list(nodes.values())

        def probe(self, nodes: Any, config: Any) -> Any:
            asked.extend(nodes)
            return {node: foreign if node.address in ("3", "4") else own for node in nodes}

    if "other" in used:
        with pytest.raises(ValueError, match=r"node 3 \(33333333\) runs other code"):
            Known().machine(config, Machine(cores=2, accelerator=False))
    else:
        Known().machine(config, Machine(cores=2, accelerator=False))
    assert ", ".join(name for name, each in nodes.items() if each in asked) == used


def test_a_head_that_is_lost_while_nodes_are_asked_is_said() -> None:
    """Catches two minutes of nothing, or an end by Ray in its own words: the nodes' answers do not come any more."""
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        watch = RayWatch(f"127.0.0.1:{head.getsockname()[1]}", "", "Start it again")
    try:
        assert watch.lost.wait(60)
        cluster = Cluster.__new__(Cluster)
        cluster.config, cluster.watch = Config().cluster, watch
        for ask in (cluster.nodes, lambda: cluster.probe([], Config()), lambda: cluster.autoscaling):
            with pytest.raises(RayLost, match=r"Ray is lost: .*; nothing had started"):
                ask()
    finally:
        watch.close()


@pytest.mark.parametrize("needs", [2.5, 60.0])
def test_a_busy_head_is_asked_again(needs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that fails because the head needs some seconds for an answer, and one that asks a head without an
    end whose kernel takes connections while its process is stopped."""
    node, limits = RayNode("0" * 56, "here", {"CPU": 2.0}, {"CPU": 1.0}, {}), []

    def living_nodes(seconds: float) -> list[RayNode]:
        limits.append(seconds)
        if needs > seconds:
            raise NoAnswer("busy")
        return [node]

    monkeypatch.setattr(connect, "AGAIN_SECONDS", 0.01)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        watch = RayWatch(f"127.0.0.1:{head.getsockname()[1]}", "", "Start it again")
        try:
            cluster = Cluster.__new__(Cluster)
            cluster.config, cluster.watch = Config().cluster, watch
            if needs < 60:
                assert cluster._answered(living_nodes) == [node]
                assert limits == [2.0, 4.0]
                assert not watch.lost.is_set()
            else:
                with pytest.raises(RayLost, match=r"takes connections, and has not answered within 15 s; nothing had"):
                    cluster._answered(living_nodes)
                assert watch.lost.is_set()
        finally:
            watch.close()
