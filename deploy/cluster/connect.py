"""A running Ray cluster: connection, room for actors and learners, and checks of its nodes before a run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.actors.code import packaged, this_code
from shoal.actors.ray_nodes import NoAnswer, draining_nodes, is_autoscaled, living_nodes
from shoal.actors.ray_pool import describe
from shoal.actors.ray_watch import RayLost, RayWatch
from shoal.actors.supervisor import BUILD_TIMEOUT_SECONDS
from shoal.deploy.cluster.named_packages import named_packages
from shoal.deploy.cluster.node_trial import Failure, make_once, parts_of
from shoal.deploy.cluster.nodes import Node, ask_nodes, fits, matches, named
from shoal.deploy.cluster.own_modules import names_of
from shoal.deploy.cluster.probe import Probe, probe
from shoal.deploy.cluster.ray_session import RaySession, configure, join, leave, wait_until_free, watched
from shoal.deploy.placement.layout import Machine
from shoal.deploy.placement.versions import versions
from shoal.deploy.records.run_dir import CannotStart
from shoal.deploy.settings.sections import ClusterConfig, Config

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = (2.0, 4.0, 8.0, 15.0)
"""How long the head may take to answer, from try to try. None of them would still be under way when Ray ends processes
whose head is lost."""
AGAIN_SECONDS = 0.2
"""Pause between two tries."""
PROBE_SECONDS = 120.0
"""A node may have to fetch this code, or to build an environment of Python's, before it answers."""
TRIAL_SECONDS = 60.0
"""How long a run waits for nodes to make its environment once; one that takes minutes keeps no run from its start."""
NODE_ID = "ray.io/node-id"
"""The label that Ray gives every node."""
LOOK_SECONDS = 1.0
SAY_SECONDS = 30.0
"""How often a run that waits for its place looks, and says so."""
TURN = "shoal_turn"
TURN_SECONDS = 15.0
"""How long after its start a run that has waited keeps its turn: until its actors hold their places."""
ADVICE = "Start the cluster again (ray start --head); the same command then goes on from the checkpoint"


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Number of rollout actors that fit, by place."""

    here: int
    """Rollout actors on this machine, beside the learner."""
    elsewhere: int
    """Rollout actors on the other nodes."""
    autoscaling: bool
    """Nodes may still come."""


class _Turn:
    """An actor whose name one run has at a time."""


Answer = TypeVar("Answer")


class Cluster:
    """A cluster that this process is connected to.

    Whatever asks Ray for something raises RayLost where Ray ended before it answered.
    """

    def __init__(self, config: ClusterConfig, watch: RayWatch, sent: Sequence[Path] = ()) -> None:
        self.config, self.watch, self.sent = config, watch, sent
        """``sent`` are modules of the user's that every node gets."""
        self._turn: Any = None
        """Of this run, to take its place; None where it has none."""
        self.address = ray.util.get_node_ip_address()

    def nodes(self) -> list[Node]:
        """The living nodes."""
        return self._answered(self._nodes)

    def _nodes(self, seconds: float) -> list[Node]:
        here, draining = ray.get_runtime_context().get_node_id(), draining_nodes(seconds)
        return [
            Node(
                node.node_id,
                node.address,
                node.node_id == here,
                node.node_id in draining,
                node.resources,
                node.available,
                node.labels,
            )
            for node in living_nodes(seconds)
        ]

    @property
    def autoscaling(self) -> bool:
        """True if nodes may still be added."""
        if self.config.autoscaling != "auto":
            return self.config.autoscaling
        return self._answered(is_autoscaled)

    def needs(self) -> dict[str, float]:
        """Resources of one rollout actor."""
        return {"CPU": self.config.actor_cpus, **self.config.actor_resources}

    def uses(self, node: Node, config: Config) -> bool:
        """Whether a process of the run may be on the node: this one, a rollout actor, or a peer learner."""
        return node.is_here or self._may_act(node) or self._may_learn(node, config)

    def _may_act(self, node: Node) -> bool:
        return fits(node, self.config.actor_labels, self.needs())

    def _may_learn(self, node: Node, config: Config) -> bool:
        return config.learner.num_learners != 1 and fits(node, self.config.learner_labels, {"CPU": 1.0})

    def room(self, nodes: Sequence[Node]) -> Room:
        """Actors that fit on what is free now. On this machine the learner keeps at least half of the cores."""
        here = elsewhere = 0
        for node in nodes:
            if node.is_draining or not matches(node.labels, self.config.actor_labels):
                continue
            free = dict(node.available)
            if node.is_here:
                free["CPU"] = min(free.get("CPU", 0.0), node.resources.get("CPU", 0.0) // 2)
            places = min(
                (math.floor(free.get(name, 0.0) / need) for name, need in self.needs().items() if need), default=0
            )
            if node.is_here:
                here += places
            else:
                elsewhere += places
        return Room(here, elsewhere, self.autoscaling)

    def machine(self, config: Config, here: Machine) -> Machine:
        """The resources of a run whose learner is on the machine ``here``, as soon as they are free.

        Raises:
            CannotStart: the actors have no place within ``cluster.wait_seconds`` and no node can be expected, or a node
                runs something else.
            RayLost: Ray ended meanwhile.
        """
        self._wait(config, here)
        nodes = self.nodes()
        room = self.room(nodes)
        problems = self.problems(config, nodes, room, here)
        used = [node for node in nodes if self.uses(node, config)]
        problems = problems or self.mismatches(self.probe(used, config), config)
        problems = problems or self.try_out(used, config)
        if problems:
            raise CannotStart(*problems)
        return self.place(config, room, here)

    def _wait(self, config: Config, here: Machine) -> None:
        """Return once it is this run's turn and it fits, would not fit without other runs either, or has waited long
        enough.

        Raises:
            RayLost: Ray ended meanwhile.
        """
        began, say_at = time.monotonic(), 0.0
        while (waited := time.monotonic() - began) < self.config.wait_seconds:
            nodes = self.nodes()
            idle = [dataclasses.replace(node, available=node.resources) for node in nodes]
            problems = self.problems(config, nodes, self.room(nodes), here)
            if self.problems(config, idle, self.room(idle), here):
                return
            if not problems and self._asked(self._take_turn):
                # Whoever had the turn before has its place by now.
                nodes = self.nodes()
                problems = self.problems(config, nodes, self.room(nodes), here)
                if not problems:
                    return
                self.end_turn()
            if waited >= say_at:
                say_at = waited + SAY_SECONDS
                log.warning(
                    "waiting for other runs to end, %.0f of %g s (cluster.wait_seconds): %s",
                    waited,
                    self.config.wait_seconds,
                    "; ".join(problems) or "another one is starting",
                )
            self.watch.lost.wait(LOOK_SECONDS)

    def _asked(self, ask: Callable[..., Answer], *arguments: Any) -> Answer:
        answer = self.watch.call(ask, *arguments)
        if answer is None:
            raise RayLost(f"{self.watch.why}; nothing had started")
        return answer

    def _answered(self, ask: Callable[[float], Answer]) -> Answer:
        """The head's answer to what ``ask`` asks with a limit in seconds."""
        for seconds in ANSWER_SECONDS:
            with contextlib.suppress(NoAnswer):
                return self._asked(ask, seconds)
            self.watch.lost.wait(AGAIN_SECONDS)
        self.watch.lose(
            f"its head (GCS) at {self.watch.head} takes connections, and has not answered within {seconds:g} s"
        )
        raise RayLost(f"{self.watch.why}; nothing had started")

    def _take_turn(self) -> bool:
        """Whether this run may take its place now; no other that waits does before ``end_turn``."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        turn = ray.remote(num_cpus=0)(_Turn).options(name=TURN, namespace=TURN, scheduling_strategy=node)
        try:
            self._turn = turn.remote()
        except ValueError:  # the name is taken
            return False
        return True

    def end_turn(self) -> None:
        """Let the next run that waits take its place."""
        turn, self._turn = self._turn, None
        if turn is not None and not self.watch.lost.is_set():
            with contextlib.suppress(Exception):  # it ends with this process
                self.watch.call(ray.kill, turn)

    def end_turn_soon(self) -> None:
        """The same, when actors that are asked for from now on have their places."""
        if self._turn is not None:
            timer = threading.Timer(TURN_SECONDS, self.end_turn)
            timer.daemon = True
            timer.start()

    def place(self, config: Config, room: Room, here: Machine) -> Machine:
        """``here`` with the actors that ``room`` has places for."""
        wanted = config.actor.num_actors
        # The learner's machine is its own as long as the others have room.
        apart = room.elsewhere > 0 if wanted == "auto" else wanted <= room.elsewhere
        if room.autoscaling and not apart:
            apart = wanted != "auto" or not room.here
        places = (room.elsewhere if apart else room.here + room.elsewhere) or 1
        return dataclasses.replace(here, actor_places=places, actors_here=0 if apart else room.here)

    def problems(self, config: Config, nodes: Sequence[Node], room: Room, here: Machine) -> list[str]:
        """Reasons why actors or learners find no place, each with its setting."""
        found = []
        labels = self.config.actor_labels
        learners = config.learner.num_learners
        if learners != "auto" and learners > 1:
            if problem := self._learners_problem(learners, nodes, room, here):
                found.append(problem)
            if config.placement == "colocated" or (config.placement == "auto" and not here.accelerator):
                return found  # they act, nobody else does
        if labels and not room.autoscaling and not any(matches(node.labels, labels) for node in nodes):
            own = sorted({f"{k}={v}" for node in nodes for k, v in node.labels.items() if not k.startswith("ray.io/")})
            found.append(
                f"cluster.actor_labels: no node carries {_labels(labels)}; the nodes carry "
                f"{', '.join(own) or 'no labels'} (ray start --labels)"
            )
            return found
        wanted = 1 if config.actor.num_actors == "auto" else config.actor.num_actors
        have = room.here + room.elsewhere
        if wanted > have and not room.autoscaling:
            listed = "; ".join(f"{node.name}: {_amounts(node.available)}" for node in nodes)
            found.append(
                f"actor.num_actors: {wanted} actors of {describe(self.actor_options())} do not fit, there is room for "
                f"{have} (half of this machine's cores are the learner's). Free are: {listed}. Lower it, add nodes, "
                "let it wait for other runs (cluster.wait_seconds), or say cluster.autoscaling=true if nodes are still "
                "to come"
            )
        return found

    def _learners_problem(self, learners: int, nodes: Sequence[Node], room: Room, here: Machine) -> str | None:
        labels, resource = self.config.learner_labels, "GPU" if here.accelerator else "CPU"
        fitting = [node for node in nodes if not node.is_draining and matches(node.labels, labels)]
        have = sum(math.floor(node.available.get(resource, 0.0)) for node in fitting)
        if learners - 1 <= have or room.autoscaling:
            return None
        where = f" on nodes with {_labels(labels)}" if labels else ""
        return (
            f"learner.num_learners: {learners - 1} peer learners need a {resource} each{where}, {have} are "
            "free; lower it, let it wait for other runs (cluster.wait_seconds), or say cluster.autoscaling=true if "
            "nodes are still to come"
        )

    def actor_options(self, *, keep_off_this_machine: bool = False) -> dict[str, Any]:
        """Ray options of a rollout actor."""
        labels = dict(self.config.actor_labels)
        if keep_off_this_machine:
            labels[NODE_ID] = f"!{ray.get_runtime_context().get_node_id()}"
        options: dict[str, Any] = {"num_cpus": self.config.actor_cpus, "scheduling_strategy": "SPREAD"}
        if self.config.actor_resources:
            options["resources"] = dict(self.config.actor_resources)
        if labels:
            options["label_selector"] = labels
        return options

    def session(self, machine: Machine) -> RaySession:
        """The Ray session of a run on ``machine``."""
        learner: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        if machine.accelerator:
            learner["num_gpus"] = 1
        if self.config.learner_labels:
            learner["label_selector"] = dict(self.config.learner_labels)
        return RaySession(
            address=self.address,
            actor_options=self.actor_options(keep_off_this_machine=machine.actors_here == 0),
            learner_options=learner,
            watch=self.watch,
        )

    def probe(self, nodes: Sequence[Node], config: Config) -> dict[Node, Probe | None]:
        """Every node's probe; None where it does not answer. Nodes that died meanwhile are left out."""
        answers = self._asked(self._probe, nodes, config)
        # Ray takes a while to notice that a machine is gone; it is no reason not to start.
        living = {node.node_id for node in self._answered(living_nodes)}
        return {node: answer for node, answer in answers.items() if answer or node.node_id in living}

    def _probe(self, nodes: Sequence[Node], config: Config) -> dict[Node, Probe | None]:
        packages = tuple(named_packages(config))
        asked = dict.fromkeys(nodes, (packages,))
        return ask_nodes(probe, asked, "to say what they run", PROBE_SECONDS)

    def try_out(self, nodes: Sequence[Node], config: Config) -> list[str]:
        """What the nodes that the run can use cannot make of what its settings name.

        Each makes the environment once and takes its first steps. This machine's has been made by the check of the
        settings, and is made again only where ``cluster.runtime_env`` gives its actors another surrounding than this
        process has.
        """
        tried = [node for node in nodes if self.config.runtime_env or not node.is_here]
        # Peer learners play, too, unless the actors feed them.
        all_play = config.placement != "disaggregated"
        asked = {}
        for node in tried:
            acts, learns = self._may_act(node), self._may_learn(node, config)
            if acts or learns:
                asked[node] = (parts_of(config, plays=acts or all_play, learns=learns),)
        if not asked:
            return []
        failures = self._asked(self._try_out, asked, config)
        living = {node.node_id for node in self._answered(living_nodes)}
        found: dict[Failure, list[Node]] = {}
        for node, failed in failures.items():
            for failure in failed or () if node.node_id in living else ():
                found.setdefault(failure, []).append(node)
        slow = [node for node, failed in failures.items() if failed is None and node.node_id in living]
        if slow and not found:
            log.warning(
                "%s: not made and tried within %.0f s on %s; the run starts all the same, and each of its actors has "
                "%.0f s to make it",
                config.env.id,
                TRIAL_SECONDS,
                named(slow),
                BUILD_TIMEOUT_SECONDS,
            )
        return [_told(failure, there) for failure, there in found.items()]

    def _try_out(self, asked: Mapping[Node, tuple[Any, ...]], config: Config) -> dict[Node, list[Failure] | None]:
        def ended(error: RayError) -> list[Failure]:
            if not isinstance(error, RayTaskError | WorkerCrashedError | OutOfMemoryError):
                # Not the environment's: the node is gone, or about to be.
                log.warning("a node could not try %s: %s", config.env.id, error)
                return []
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            # An error of the task's own has its frames before it.
            return [Failure("env.id", config.env.id, "", lines[-1 if isinstance(error, RayTaskError) else 0].strip())]

        return ask_nodes(make_once, asked, f"to try {config.env.id}", TRIAL_SECONDS, ended)

    def mismatches(self, answers: Mapping[Node, Probe | None], config: Config) -> list[str]:
        """Nodes that the run would use and cannot: silent ones, those that run something else or lack a package."""
        found = []
        own_code, own, named = this_code(), versions(), named_packages(config)
        for node, answer in answers.items():
            if not self.uses(node, config):
                continue
            if answer is None:
                found.append(f"cluster.address: node {node.name} did not answer within {PROBE_SECONDS:.0f} s")
                continue
            if answer.code.sha256 != own_code.sha256:
                found.append(
                    f"cluster.address: node {node.name} runs other code than this process ({answer.code.root}, "
                    f"{answer.code.sha256[:12]}; here {own_code.root}, {own_code.sha256[:12]}): use the same image or "
                    "checkout on every node"
                )
            # That of this project says less than its code, and there is none where nothing was installed.
            theirs = answer.versions
            different = [
                f"{name} {theirs.get(name)} (here {version})"
                for name, version in own.items()
                if name != "shoal" and _release(theirs.get(name)) != _release(version)
            ]
            if different:
                found.append(
                    f"cluster.address: node {node.name} has {', '.join(different)}: use images of the same versions on "
                    "all nodes"
                )
            found += [
                f"{named[package]}: node {node.name} has no package {package!r}: install it there, or send it with "
                f"cluster.runtime_env={{py_modules: [DIRECTORY OR WHEEL OF {package}]}}"
                for package in answer.missing
            ]
        return found


@contextlib.contextmanager
def connect(config: ClusterConfig, modules: Sequence[Path] = (), *, owns_process: bool = True) -> Iterator[Cluster]:
    """The cluster at ``cluster.address``, for the length of the block.

    Where this process has joined a cluster already, it is that one, and stays connected.

    Args:
        config: the settings of the cluster.
        modules: files and folders of modules that the nodes get (``deploy.cluster.own_modules``), besides this code.
            Where the connection is somebody else's, or a Ray job's, these are sent by whoever made it.
        owns_process: this process ends with the block.

    Raises:
        CannotStart: nobody answers there, or it refuses this process; or this process has joined another cluster.
        RayLost: a Ray that was lost before still holds this process.
    """
    wait_until_free()
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if config.address not in ("auto", joined):
            raise CannotStart(
                f"cluster.address: {config.address} is not the cluster {joined} that this process has joined already "
                "(ray.init); leave the setting out, or call ray.shutdown() before"
            )
        with watched(ADVICE, head_may_return=config.head_may_return) as watch:
            try:
                yield Cluster(config, watch)
            finally:
                if watch.lost.is_set():  # Ray would end this process in a minute
                    leave(watch, owns_process=owns_process)
        return
    configure()
    if config.address != "auto":
        _check_address(config.address)
    runtime_env: dict[str, Any] = dict(config.runtime_env)
    sent: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            # A Ray job brings its own; its processes have the job's working directory.
            if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
                # Every node runs this very code, whatever is installed there. Ray uploads it before init returns.
                code = str(stack.enter_context(packaged()))
                theirs = runtime_env.get("py_modules", ())
                # A working directory has them, too.
                if "working_dir" not in runtime_env:
                    sent = [place for place in modules if place.stem not in names_of(theirs)]
                runtime_env["py_modules"] = [*theirs, *map(str, sent), code]
            join(address=config.address, runtime_env=runtime_env or None)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise CannotStart(f"cluster.address: {config.address}: {_explain(config, error)}") from error
    with watched(ADVICE, head_may_return=config.head_may_return) as watch:
        try:
            yield Cluster(config, watch, sent)
        finally:
            leave(watch, owns_process=owns_process)


def _check_address(address: str) -> None:
    """Ray itself retries for minutes where nobody answers."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host or "/" in host:
        raise CannotStart(
            f"cluster.address: {address!r} must be host:port of the cluster's head (ray start prints it), or auto"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            pass
    except OSError as error:
        raise CannotStart(
            f"cluster.address: nobody answers at {address} ({error}); is the head running (ray start --head), and may "
            "this machine reach it?"
        ) from error


def _explain(config: ClusterConfig, error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    token = (
        "Give this process the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
        "~/.ray/auth_token"
    )
    if isinstance(error, AuthenticationError):
        return f"the cluster asks for another token ({text}). {token}"
    if isinstance(error, ConnectionError) and config.address != "auto":
        # Ray says no more: what it was refused for it only prints.
        return (
            f"somebody answers, but does not let this process in ({text}): the cluster's token or its version of Ray "
            f"(here {ray.__version__}) is another, or it is no Ray head. {token}"
        )
    if isinstance(error, ConnectionError):
        return f"{text} Start one with `ray start --head`, or name its head: cluster.address=host:port"
    return text


def _told(failure: Failure, nodes: Sequence[Node]) -> str:
    if failure.missing:
        return (
            f"{failure.setting}: {named(nodes)}: {failure.name} needs the module {failure.missing}: install it there, "
            "or send it with cluster.runtime_env={py_modules: [DIRECTORY OR WHEEL]} or {pip: [PACKAGE]}"
        )
    if failure.is_made:
        return (
            f"{failure.setting}: {named(nodes)}: the first steps fail: {failure.error}. If shoal doctor can take them "
            "here, compare the files, libraries, devices and environment variables there with those of this machine"
        )
    return (
        f"{failure.setting}: {named(nodes)}: {failure.name} cannot be made: {failure.error}. Here it can: compare the "
        "files, libraries, devices and environment variables there with those of this machine"
    )


def _release(version: str | None) -> str | None:
    """Without the build: actors need no CUDA."""
    return version and version.partition("+")[0]


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {k: v for k, v in resources.items() if k not in ("memory", "object_store_memory") and ":" not in k}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"
