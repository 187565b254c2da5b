"""The supervisor of actors, without Ray: what it does with answers that cannot be read."""

from __future__ import annotations

import collections
import time
from typing import Any

import pytest
import shoal.actors.pool as pool_module
import shoal.actors.ray_pool as ray_pool_module
import shoal.actors.supervisor as supervisor_module
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError
from shoal.actors.config import ActorConfig
from shoal.actors.pool import MOST_REFUSED
from shoal.actors.ray_actor import ProcessLocation, _age_seconds
from shoal.actors.ray_nodes import NoAnswer, RayNode
from shoal.actors.ray_pool import RayPool
from shoal.actors.supervisor import ActorSlot, Supervisor, TooManyFailures
from shoal.envs.config import EnvironmentNotFound


class Call:
    """In place of a method of an actor and of the reference to its answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def remote(self, *_: Any) -> Call:
        """The call."""
        return self


class Actor:
    """In place of a handle."""

    process_location = Call(ProcessLocation("node", 1))
    build = Call(None)
    rollout = Call("an unroll")


class Made:
    """In place of a remote class."""

    @staticmethod
    def remote(*_: Any) -> Actor:
        """A new actor."""
        return Actor()


class Store:
    """In place of Ray's object store: the answers of actors in ``lost`` were there and cannot be read any more."""

    def __init__(self) -> None:
        self.lost: set[Call] = set()
        self.waited: list[float] = []

    def get(self, call: Call, timeout: float) -> Any:
        """The answer."""
        if isinstance(call, Raises):
            raise call.answer
        if call in self.lost:
            self.waited.append(timeout)
            raise GetTimeoutError
        return call.answer

    def wait(self, calls: list[Call], timeout: float, **_: Any) -> tuple[list[Call], list[Call]]:
        """All answers are there."""
        return calls, []

    def kill(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def remote(self, **_: Any) -> Any:
        """A decorator of classes, whose actors are ``Actor``."""
        return lambda _: Made


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(supervisor_module, "ray", store)
    monkeypatch.setattr(ray_pool_module, "ray", store)
    monkeypatch.setattr(supervisor_module, "draining_nodes", frozenset)
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(supervisor_module, "end_process", lambda _: None)
    return store


def supervise(call_timeout_seconds: float) -> tuple[Supervisor, ActorSlot, list[ActorSlot]]:
    """A supervisor, its only actor slot, whose actor is up and has made an unroll, and what was lost."""
    lost: list[ActorSlot] = []
    supervisor = Supervisor(
        range(1),
        title="actor",
        make=lambda *_: Actor(),
        needs="",
        call_timeout_seconds=call_timeout_seconds,
        max_consecutive_failures=5,
        on_lost=lost.append,
    )
    [slot] = supervisor.all
    for _ in ("process_location", "build"):
        supervisor.collect(slot)
    assert slot.built
    supervisor.call(slot, "rollout")
    return supervisor, slot, lost


class Raises(Call):
    """In place of a call whose answer is an error of the actor's."""


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'maps'"), EnvironmentNotFound("no maps:Map")])
@pytest.mark.parametrize("others_up", [False, True])
def test_a_missing_module_is_not_tried_again(store: Store, error: Exception, others_up: bool) -> None:
    """Catches five starts and a minute for a module that is not there the fifth time either; and a run that is well and
    ends because a node that joined it lacks one."""
    supervisor = Supervisor(
        range(2),
        title="actor",
        make=lambda *_: Actor(),
        needs="",
        call_timeout_seconds=9.0,
        max_consecutive_failures=5,
        on_lost=lambda _: None,
    )
    well, lacking = supervisor.all
    for slot in (*([well] * 2 if others_up else []), lacking):
        supervisor.collect(slot)
    lacking.call = Raises(RayTaskError("build", "", error))
    if others_up:
        supervisor.collect(lacking)
        assert lacking.failures == 1
    else:
        with pytest.raises(TooManyFailures, match=r"actor 1 cannot start, now or later: .*map.*cluster\.runtime_env"):
            supervisor.collect(lacking)
    assert supervisor.restarts == {"error": 1}


@pytest.mark.parametrize("times", [1, 3])
def test_an_answer_that_cannot_be_read_keeps_nobody_waiting(store: Store, times: int) -> None:
    """Catches the only thread that serves all actors waiting an unroll's time limit for one whose node hangs."""
    supervisor, slot, lost = supervise(call_timeout_seconds=600)
    store.lost.add(Actor.rollout)
    for _ in range(times):
        assert supervisor.collect(slot) is None
    assert len(store.waited) == times
    assert max(store.waited) <= 1
    supervisor.fail_overdue()
    assert slot.built
    assert (lost, slot.failures, supervisor.restarts) == ([], 0, {})
    store.lost.clear()
    assert supervisor.collect(slot) == "an unroll"


def test_an_answer_that_never_comes_back_fails_at_its_deadline(store: Store) -> None:
    """Catches an actor that is waited for without end because its answer was there once."""
    supervisor, slot, lost = supervise(call_timeout_seconds=0.01)
    store.lost.add(Actor.rollout)
    time.sleep(0.02)
    assert supervisor.collect(slot) is None
    supervisor.fail_overdue()
    assert not slot.built
    assert (lost, slot.failures, supervisor.restarts) == ([slot], 1, {"timeout": 1})


@pytest.mark.parametrize("readable", [True, False])
def test_who_waits_for_one_answer_reads_it_or_ends_at_its_deadline(store: Store, readable: bool) -> None:
    """Catches a learner whose answer was there after its deadline and is thrown away, or read for ever."""
    supervisor, slot, _ = supervise(call_timeout_seconds=0.01)
    if not readable:
        store.lost.add(Actor.rollout)
    time.sleep(0.02)
    assert supervisor.answer(slot) == ("an unroll" if readable else None)
    assert slot.built == readable
    assert supervisor.restarts == ({} if readable else {"timeout": 1})


class Sink:
    """Admits everybody, and refuses the deliveries whose turn is in ``refused``."""

    def __init__(self, refused: Any) -> None:
        self.refused, self.turn = refused, -1

    def admit(self, idle: list[int]) -> tuple[int, Any]:
        """The first."""
        return idle[0], "weights"

    def deliver(self, actor: int, payload: Any) -> str | None:
        """Why it is refused."""
        self.turn += 1
        return "poison" if self.turn in self.refused else None

    def abandon(self, actor: int) -> None:
        """Nothing is lost here."""
        raise AssertionError


@pytest.mark.parametrize("failures", [2, 4])
def test_actors_whose_deliveries_are_refused_are_replaced_and_end_the_run(store: Store, failures: int) -> None:
    """Catches an actor that delivers poison for ever, and refused deliveries that count as successes: replacements
    without end.
    """
    sink: Any = Sink(range(10**6))
    pool = RayPool(None, range(1), ActorConfig(max_consecutive_failures=failures), sink, {})  # type: ignore[arg-type]
    with pytest.raises(TooManyFailures, match=f"failed {failures} times in a row .refused.; .* the last one: poison"):
        collections.deque((pool.pump(0.01) for _ in range(100)), maxlen=0)
    assert sink.turn + 1 == failures * MOST_REFUSED
    assert pool.restarts == {"refused": failures}


def test_refused_deliveries_in_between_replace_nobody(store: Store) -> None:
    """Catches refusals that are added up over a whole run."""
    sink: Any = Sink({turn for turn in range(40) if turn % MOST_REFUSED})
    pool = RayPool(None, range(1), ActorConfig(), sink, {})  # type: ignore[arg-type]
    while sink.turn < 40:
        pool.pump(0.01)
    assert pool.restarts == {}


def test_no_answer_is_read_where_the_raylet_has_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that Ray ends, unsaved, because an unroll was ready when its raylet ended and is read then."""
    sink: Any = Sink(set())
    ended: list[bool] = []
    pool = RayPool(None, range(2), ActorConfig(), sink, {}, out_of_reach=lambda: bool(ended))  # type: ignore[arg-type]
    while sink.turn < 4:
        pool.pump(0.01)
    turn = sink.turn
    # It ends while the pool waits for an answer.
    monkeypatch.setattr(store, "wait", lambda calls, **_: (ended.append(True), (calls, []))[1])
    monkeypatch.setattr(store, "get", lambda *_, **__: pytest.fail("Ray would have ended this process"))
    for _ in range(3):
        pool.pump(0.01)
    assert sink.turn == turn


def test_a_head_that_does_not_answer_keeps_nobody_waiting(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pool that ends, or forgets which nodes are draining, because the head is busy for a moment."""
    supervisor, slot, lost = supervise(60.0)
    supervisor._draining = frozenset({"a node"})

    def no_answer() -> frozenset[str]:
        raise NoAnswer("busy")

    monkeypatch.setattr(supervisor_module, "draining_nodes", no_answer)
    supervisor._look_at = 0.0
    supervisor.start_due()
    assert supervisor._look_at > 0
    assert supervisor._draining == {"a node"}
    assert slot.built
    assert lost == []


class Nodes:
    """In place of the head: the ids of the nodes that it takes for living, or its silence."""

    def __init__(self) -> None:
        self.living: list[str] | None = ["node"]

    def __call__(self) -> list[RayNode]:
        """The living nodes."""
        if self.living is None:
            raise NoAnswer("busy")
        return [RayNode(node_id, "", {}, {}, {}) for node_id in self.living]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    found = Nodes()
    monkeypatch.setattr(supervisor_module, "living_nodes", found)
    return found


def look(supervisor: Supervisor) -> None:
    """Whatever is due now."""
    supervisor._look_at = 0.0
    supervisor.start_due()


def lose(supervisor: Supervisor, slot: ActorSlot) -> None:
    """The actor is out of reach, and Ray does not know why."""
    slot.call = Raises(ActorUnavailableError("its connection broke", None))  # type: ignore[assignment]
    assert supervisor.collect(slot) is None


def test_an_actor_that_was_lost_with_its_node_is_no_failure(store: Store, nodes: Nodes) -> None:
    """Catches an actor that is said to have died, and failures that end the run, because a connection broke some
    seconds before Ray knew that its node had ended."""
    supervisor, slot, lost = supervise(60.0)
    for _ in range(supervisor._max_failures):
        lose(supervisor, slot)
        look(supervisor)  # another takes its place meanwhile
        assert slot.handle is not None
        for _ in ("process_location", "build"):
            supervisor.collect(slot)
    nodes.living = None
    look(supervisor)
    assert supervisor.restarts == {}
    nodes.living = ["another node"]
    look(supervisor)
    assert supervisor.restarts == {"node_died": 5}
    assert (slot.failures, lost) == (0, [slot] * 5)
    assert [reason for reason, _ in supervisor.replaced] == ["node_died"] * 5
    assert supervisor.recoveries.count == 5


@pytest.mark.parametrize("delivers", [True, False])
def test_an_actor_that_was_lost_while_its_node_lives_failed(
    store: Store, nodes: Nodes, delivers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an actor that is replaced without end and counted as no failure, or after it has done its work."""
    supervisor, slot, _ = supervise(60.0)
    lose(supervisor, slot)
    look(supervisor)
    for _ in ("process_location", "build"):
        supervisor.collect(slot)
    if delivers:
        supervisor.call(slot, "rollout")
        assert supervisor.collect(slot) == "an unroll"
    monkeypatch.setattr(supervisor_module, "VERDICT_SECONDS", 0.0)
    if delivers:
        supervisor._max_failures = 1
        look(supervisor)
        assert slot.failures == 0
    else:
        supervisor._max_failures = 1
        with pytest.raises(TooManyFailures, match=r"failed 1 times in a row \(died\).*its connection broke"):
            look(supervisor)
    assert supervisor.restarts == {"died": 1}


@pytest.mark.parametrize("knows", [True, False])
def test_every_lost_actor_is_counted_at_the_end(store: Store, nodes: Nodes, knows: bool) -> None:
    """Catches a summary of fewer replacements than there were, because the run ended before Ray knew of a node."""
    supervisor, slot, _ = supervise(60.0)
    lose(supervisor, slot)
    nodes.living = [] if knows else None
    supervisor.close()
    supervisor.close()
    assert supervisor.restarts == ({"node_died": 1} if knows else {"died": 1})


@pytest.mark.parametrize(
    ("age", "recovery"),
    [(20.0, 21.0), (None, 101.0), (5000.0, 1.0)],
    ids=["a new process", "no Linux", "a process that was idle"],
)
def test_a_recovery_does_not_wait_for_a_node(
    store: Store, age: float | None, recovery: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a time to replace an actor that is that of a cloud's machines to come."""
    now = [1000.0]
    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now[0])
    supervisor, slot, _ = supervise(60.0)
    slot.since -= 300.0  # its own wait is nobody's recovery
    supervisor.fail(slot, "node_died", RuntimeError("gone"))
    supervisor.start_due()
    now[0] += 100.0
    monkeypatch.setattr(Actor, "process_location", Call(ProcessLocation("node", 2, age)))
    slot.call = Actor.process_location  # type: ignore[assignment]
    supervisor.collect(slot)
    now[0] += 1.0
    supervisor.collect(slot)
    assert slot.built
    assert supervisor.recoveries.seconds == pytest.approx(recovery)


def test_a_process_knows_its_age() -> None:
    """Catches an age in other units, or of the machine."""
    before = time.monotonic()
    first = _age_seconds()
    if first is None:
        pytest.skip("needs /proc")
    assert 0 < first < 24 * 3600
    second = _age_seconds()
    assert second is not None
    assert 0 <= second - first <= time.monotonic() - before
