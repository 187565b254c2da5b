"""The nodes of a cluster that a run may use, and no others, are asked what they run."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import shoal.deploy.cluster.nodes as nodes_module
from ray.exceptions import WorkerCrashedError
from shoal.actors.code import Code
from shoal.actors.ray_nodes import NoAnswer, RayNode
from shoal.actors.ray_watch import RayLost, RayWatch
from shoal.deploy.cluster import connect
from shoal.deploy.cluster.connect import Cluster, _told
from shoal.deploy.cluster.node_trial import Failure, Parts, make_once, parts_of
from shoal.deploy.cluster.nodes import Node, ask_nodes
from shoal.deploy.cluster.probe import probe
from shoal.deploy.library.config import make_config
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
    tried: dict[Node, Parts] = {}

    class Known(Cluster):
        def __init__(self) -> None:
            self.config = config.cluster

        def nodes(self) -> list[Node]:
            return list(nodes.values())

        def probe(self, nodes: Any, config: Any) -> Any:
            asked.extend(nodes)
            return {node: foreign if node.address in ("3", "4") else own for node in nodes}

        def _asked(self, ask: Any, *arguments: Any) -> Any:
            return ask(*arguments)

        def _answered(self, ask: Any) -> Any:
            return list(nodes.values())

        def _try_out(self, asked: Any, config: Any) -> Any:
            tried.update({node: parts for node, (parts,) in asked.items()})
            return {node: [] for node in asked}

    if "other" in used:
        with pytest.raises(ValueError, match=r"node 3 \(33333333\) runs other code"):
            Known().machine(config, Machine(cores=2, accelerator=False))
    else:
        Known().machine(config, Machine(cores=2, accelerator=False))
        # This machine's environment was made by the check of the settings.
        assert set(tried) == {nodes[name] for name in used.split(", ") if name != "here"}
        assert all(parts.env is not None for parts in tried.values())
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


def test_a_node_with_other_code_is_refused() -> None:
    """Catches a cluster of two versions: it would train with trajectories of other code."""
    here = probe()
    node = Node("0" * 56, "10.0.0.7", False, False, {"CPU": 2.0}, {}, {})
    silent = Node("1" * 56, "10.0.0.8", False, False, {"CPU": 2.0}, {}, {})
    cluster = Cluster.__new__(Cluster)
    cluster.config = Config().cluster
    config = Config()
    assert cluster.mismatches({node: here}, config) == []
    other = here._replace(code=Code("/elsewhere", "0" * 64), versions={**here.versions, "ray": "2.1.0"})
    problems = cluster.mismatches({node: other, silent: None}, config)
    assert len(problems) == 3
    assert "runs other code than this process (/elsewhere, 000000000000" in problems[0]
    assert "has ray 2.1.0 (here " in problems[1]
    assert "did not answer" in problems[2]


class Tried(Cluster):
    """A cluster whose nodes answer what a test says."""

    def __init__(self, config: Config, answers: dict[Node, list[Failure] | None], living: list[Node]) -> None:
        self.config, self._answers, self._living = config.cluster, answers, living

    def _asked(self, ask: Any, *arguments: Any) -> Any:
        return ask(*arguments)

    def _answered(self, ask: Any) -> Any:
        return self._living

    def _try_out(self, asked: Any, config: Any) -> Any:
        return {node: self._answers[node] for node in asked}


def many(count: int) -> list[Node]:
    """Nodes of four CPUs."""
    return [
        Node(f"{number:08d}" + "f" * 48, f"10.0.0.{number}", False, False, {"CPU": 4.0}, {}, {})
        for number in range(count)
    ]


def test_what_nodes_cannot_make_is_said_once_with_their_names(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a hundred lines for a hundred nodes of one image, a node that ended meanwhile as a reason not to start,
    and a message without the module, the error or what to do."""
    config = Config()
    nodes = many(8)
    missing = Failure("env.id", "mine:Env", "'maps', which mine.py:3 imports", "no")
    raises = Failure("env.id", "mine:Env", "", "OSError: no levels.bin (mine.py:9)")
    answers: dict[Node, list[Failure] | None] = {node: [missing] for node in nodes}
    answers |= {nodes[5]: [raises], nodes[6]: None, nodes[7]: [raises]}
    first, second = Tried(config, answers, nodes[:7]).try_out(nodes, config)
    assert first.startswith(
        "env.id: nodes 10.0.0.0 (00000000), 10.0.0.1 (00000001), 10.0.0.2 (00000002), 10.0.0.3 (00000003) and 1 more: "
        "mine:Env needs the module 'maps', which mine.py:3 imports: install it there, or send it with cluster"
    )
    assert second.startswith(
        "env.id: node 10.0.0.5 (00000005): mine:Env cannot be made: OSError: no levels.bin (mine.py:9). Here it can"
    )
    assert not caplog.records


def test_an_environment_that_takes_minutes_is_said_and_keeps_no_run_from_its_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches a start that is refused, or waits without a word, for an environment that is slow to make."""
    config = Config()
    nodes = many(2)
    assert Tried(config, {nodes[0]: [], nodes[1]: None}, nodes).try_out(nodes, config) == []
    assert "not made and tried within 60 s on node 10.0.0.1 (00000001); the run starts all the same" in caplog.text


class Call:
    """In place of a remote function, and of the reference to its answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def options(self, **_: Any) -> Call:
        """The same."""
        return self

    def remote(self, *arguments: Any) -> Call:
        """The call of it."""
        return Call(self.answer(*arguments))


class Answers:
    """In place of Ray: None never answers."""

    def __init__(self, now: list[float]) -> None:
        self.now, self.cancelled = now, 0

    def remote(self, **_: Any) -> Any:
        """A decorator of functions."""
        return Call

    def wait(self, calls: list[Call], timeout: float, **_: Any) -> tuple[list[Call], list[Call]]:
        """The answers that are there at once."""
        self.now[0] += timeout
        return [call for call in calls if call.answer is not None], [call for call in calls if call.answer is None]

    def get(self, call: Call) -> Any:
        """The answer."""
        if isinstance(call.answer, Exception):
            raise call.answer
        return call.answer

    def cancel(self, call: Call, **_: Any) -> None:
        """Count it."""
        self.cancelled += 1


def test_a_node_that_does_not_answer_is_said_and_its_task_ended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches minutes without a word, a task that hangs on after the run has started, and a process that ended with the
    environment as a node that does not answer."""
    now = [0.0]
    ray = Answers(now)
    monkeypatch.setattr(nodes_module, "ray", ray)
    monkeypatch.setattr(nodes_module.time, "monotonic", lambda: now[0])
    hangs, crashes, well = many(3)
    given = {hangs: (None,), crashes: (WorkerCrashedError(),), well: ("made",)}
    answers = ask_nodes(lambda answer: answer, given, "to make mine:Env", 40.0, lambda error: f"ended: {error}")
    assert answers == {hangs: None, crashes: f"ended: {WorkerCrashedError()}", well: "made"}
    assert ray.cancelled == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"waiting for node 10.0.0.0 (00000000) to make mine:Env, {waited} of 40 s" for waited in (15, 30)]


BESIDE = {
    "trial_well.py": "from gymnasium.envs.classic_control import CartPoleEnv as Env\n",
    "trial_import.py": "import nowhere_else\n",
    "trial_exit.py": "raise SystemExit('no licence')\n",
    "trial_raises.py": (
        "import gymnasium\n"
        "class Env(gymnasium.Env):\n"
        "    def __init__(self): raise OSError('first\\nlevels.bin is not there')\n"
        "    def step(self, action): ...\n"
        "    def reset(self, *, seed=None, options=None): ...\n"
    ),
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"env.id": "trial_well:Env"}, []),
        (
            {"env.id": "trial_absent:Env"},
            [("env.id", "trial_absent:Env", "'trial_absent'")],
        ),
        (
            {"env.id": "trial_import:Env"},
            [("env.id", "trial_import:Env", "'nowhere_else', which {beside}/trial_import.py:1 imports")],
        ),
        ({"env.id": "trial_exit:Env"}, [("env.id", "trial_exit:Env", "")]),
        ({"env.id": "trial_raises:Env"}, [("env.id", "trial_raises:Env", "")]),
        (
            {"env.id": "trial_well:Env", "env.wrappers": ["trial_import:Wrapper"]},
            [("env.wrappers", "trial_well:Env", "'nowhere_else', which {beside}/trial_import.py:1 imports")],
        ),
        (
            {"env.id": "trial_well:Env", "policy.kind": "trial_import:Mine", "policy.core": "trial_absent:Core"},
            [
                ("policy.kind", "trial_import:Mine", "'nowhere_else', which {beside}/trial_import.py:1 imports"),
                ("policy.core", "trial_absent:Core", "'trial_absent'"),
            ],
        ),
        ({"env.id": "trial_well:Env", "learner.loss": "trial_absent:Loss"}, []),
        (
            {"env.id": "trial_well:Env", "learner.loss": "trial_absent:Loss", "learner.num_learners": 2},
            [("learner.loss", "trial_absent:Loss", "'trial_absent'")],
        ),
        (
            {
                "env.id": "trial_well:Env",
                "learner.schedules.clip_coef.kind": "trial_absent:s",
                "learner.num_learners": 2,
            },
            [("learner.schedules.clip_coef.kind", "trial_absent:s", "'trial_absent'")],
        ),
    ],
)
def test_a_node_says_what_it_cannot_make(
    settings: dict[str, Any], expected: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that starts five actors, for a minute, on a node where the module, what it imports, a wrapper, or a
    file of the environment is missing; and a loss that only learners need, looked for where none is."""
    for name, text in BESIDE.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(settings)
    found = make_once(parts_of(config, plays=True, learns=config.learner.num_learners == 2))
    assert [failure[:3] for failure in found] == [
        (setting, name, missing.format(beside=tmp_path.name)) for setting, name, missing in expected
    ]
    for failure in found:
        if failure.name == "trial_exit:Env":
            assert failure.error == f"SystemExit: no licence ({tmp_path / 'trial_exit.py'}:1)"
        if failure.name == "trial_raises:Env":
            assert failure.error == f"levels.bin is not there ({tmp_path / 'trial_raises.py'}:3)"
    for name in BESIDE:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ResetRaises", "no ROM"),
        ("FourValues", r"must be \(obs, reward, terminated, truncated, info\)"),
        ("NoObservation", "obs is NoneType None"),
        ("FailsAtTheSeventh", ""),
        ("Masked", ""),
    ],
)
def test_a_node_says_that_it_cannot_play(name: str, error: str) -> None:
    """Catches a run whose actors can make the environment on a node and fail there one after the other, and one that is
    refused for a fault that costs an episode, or for an illegal action."""
    config = make_config({"env.id": f"sick_envs:{name}"})
    found = make_once(parts_of(config, plays=True, learns=False))
    assert [failure.is_made for failure in found] == [True] * bool(error)
    for failure in found:
        assert (failure.setting, failure.missing) == ("env.id", "")
        assert re.search(error, failure.error)
        node = many(1)[0]
        assert f"env.id: node {node.name}: the first steps fail: sick_envs:{name}: " in _told(failure, [node])
