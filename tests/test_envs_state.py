"""The state of environments: said, kept in a file, read back, and the rows after it."""

from __future__ import annotations

import collections
import importlib.util
import random
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from make_env import make_env
from shoal.envs.boundary import StatefulEnvironment, StepRows
from shoal.envs.env_state import get_state, set_state
from shoal.envs.plain_state import DoesNotFit, NotPlain, from_plain, to_plain
from shoal.envs.reference import random_player
from shoal.learner.plain_file import load_plain, save_plain

TAXI = max(name for name in gymnasium.registry if name.startswith("Taxi-v"))
SMOOTHED = {"wrappers": ["stateful_envs:Smoothing", {"gymnasium.wrappers:FrameStackObservation": {"stack_size": 3}}]}
ENVIRONMENTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "recall": ("recall", 6, {}),
    "synthetic": ("synthetic?episode_length=13&window=3&used_tokens=5", 5, {}),
    "mettagrid": ("mettagrid/forage", 16, {}),
    "mettagrid-together": ("mettagrid/corridor", 8, {"stagger": False}),
    **{name: (name, 3, {}) for name in ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0")},
    **{name: (name, 3, {}) for name in ("MountainCarContinuous-v0", "Blackjack-v1", "FrozenLake-v1", TAXI)},
    "random-map": ("FrozenLake-v1", 3, {"map_name": None, "desc": None}),
    "spaces": ("stateful_envs:SpacedWalk", 2, {}),
    "same-step": ("CartPole-v1", 3, {"autoreset_mode": "same_step"}),
    "disabled": ("CartPole-v1", 3, {"autoreset_mode": "disabled"}),
    "native": ("CartPole-v1", 3, {"vectorization": "native"}),
    "async": ("CartPole-v1", 3, {"vectorization": "async"}),
    "async-same-step": ("CartPole-v1", 2, {"vectorization": "async", "autoreset_mode": "same_step"}),
    "plain": ("stateful_envs:PlainWalk-v0", 3, {}),
    "saying": ("stateful_envs:SayingWalk-v0", 3, {}),
    "wrapped": ("stateful_envs:PlainWalk-v0", 3, SMOOTHED),
    "pettingzoo": ("pettingzoo:scripted_games:parallel_env", 4, {"num_agents": 2, "salt": 1, "together": False}),
}
LONGEST = {"mettagrid": 260, "mettagrid-together": 230}


class Played:
    """An environment, step by step, with random actions that depend on the step alone."""

    def __init__(self, env_id: str, slots: int, options: dict[str, Any], seed: int) -> None:
        self.env = make_env(env_id, slots, seed, **options)
        spec = self.env.spec
        self.obs = np.zeros((slots, *spec.obs_shape), spec.obs_dtype)
        flags = [np.zeros(slots, bool) for _ in range(3)]
        final = np.zeros_like(self.obs) if spec.same_step else None
        self.rows = StepRows(self.obs, flags[0], np.zeros(slots, np.float32), flags[1], flags[2], final)
        self.rows.is_first[:] = True
        self.env.reset(self.obs)

    def step(self, t: int) -> list[np.ndarray]:
        """Copies of the rows after step t, and of the legal actions."""
        spec = self.env.spec
        mask = getattr(self.env, "action_mask", np.zeros(0))
        masks = (mask,) if spec.num_mask else ()
        action = random_player(spec, np.random.default_rng(t))(self.rows.obs, self.rows.is_first, *masks)
        self.env.step(action.astype(spec.action_dtype), self.rows)
        ended = self.rows.terminated | self.rows.truncated
        finals = [] if self.rows.final_obs is None else [self.rows.final_obs[ended]]
        return [each.copy() for each in (*self.rows[:5], *finals, mask, self.env.short_episode)]

    def go_on(self, state: Any, before: Played) -> dict[int, str]:
        """Take over the state and what the policy sees next."""
        failed = self.env.set_state(state, self.obs)
        for slot in range(self.env.num_envs):
            if slot not in failed:
                self.obs[slot] = before.obs[slot]
                self.rows.is_first[slot] = before.rows.is_first[slot]
        return failed


def through_a_file(state: Any, tmp_path: Path) -> Any:
    save_plain(tmp_path / "state.npz", state)
    return load_plain(tmp_path / "state.npz")


@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_an_environment_goes_on_from_its_state(name: str, tmp_path: Path) -> None:
    """Catches anything that decides later rows and is not part of the state: a stream, a count, a pending reset."""
    for package in ("mettagrid", "pettingzoo"):
        if name.startswith(package) and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs shoal[{package}]")
    env_id, slots, options = ENVIRONMENTS[name]
    played = Played(env_id, slots, options, seed=1)
    assert isinstance(played.env, StatefulEnvironment)
    t = 0
    # At the first row, within episodes, and in the step in which one has ended.
    for until in (0, 1, 40, "end", LONGEST.get(name, 90)):
        while t < until if isinstance(until, int) else not (played.rows.terminated | played.rows.truncated).any():
            played.step(t)
            t += 1
        state = through_a_file(played.env.get_state(), tmp_path)
        later = Played(env_id, slots, options, seed=2 + t)
        assert later.go_on(state, played) == {}
        for ahead in range(t, t + 40):
            for one, other in zip(played.step(ahead), later.step(ahead), strict=True):
                np.testing.assert_array_equal(one, other)
        t += 40
        later.env.close()
    played.env.close()


def test_a_hidden_state_begins_an_episode_with_a_seed_of_its_own(tmp_path: Path) -> None:
    """Catches a state that is guessed, a run that ends for it, slots that play the run's first episodes again."""
    played = Played("stateful_envs:HiddenWalk-v0", 2, {}, seed=1)
    first = played.obs.copy()
    for t in range(5):
        played.step(t)
    later = Played("stateful_envs:HiddenWalk-v0", 2, {}, seed=1)
    failed = later.go_on(through_a_file(played.env.get_state(), tmp_path), played)
    assert failed.keys() == {0, 1}
    assert "HiddenWalk._place is a builtins.generator" in failed[0]
    assert (later.obs[:, 0] != first[:, 0]).all()
    assert (later.obs[:, 0] != played.obs[:, 0]).all()
    later.step(0)


@pytest.mark.parametrize("part", ["function", "class", "default", "space"])
def test_what_a_constructor_drew_and_is_no_data_is_compared(part: str) -> None:
    """Catches a state that goes on with another rule, type, constant or space than it was saved with."""
    from stateful_envs import DrawnWalk

    def made(drawn: int) -> DrawnWalk:
        env = DrawnWalk(part, drawn)
        env.reset(seed=drawn)
        return env

    state = get_state(made(0))
    same = made(0)
    set_state(same, state)
    with pytest.raises(DoesNotFit, match="another"):
        set_state(made(1), state)


@pytest.mark.parametrize("shape", [(2,), (1440, 2560, 3)])
def test_a_space_that_was_printed_or_is_large_is_the_same(shape: tuple[int, ...]) -> None:
    """Catches a slot that begins anew because a log line had the space in it, and bounds that count as stored."""

    class Walk:
        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
            self.place = 0

    played, fresh = Walk(), Walk()
    played.place = 7
    assert "Box" in str(played.observation_space)
    set_state(fresh, get_state(played))
    assert fresh.place == 7


def test_a_large_table_that_was_perturbed_is_not_taken_for_the_same(tmp_path: Path) -> None:
    """Catches a table that is left out of the state because gymnasium's own constructor always makes it alike."""
    options = {"wrappers": ["stateful_envs:Perturbed"]}
    played, later = (Played(TAXI, 1, options, seed=seed) for seed in (1, 2))
    played.step(0)
    failed = later.go_on(through_a_file(played.env.get_state(), tmp_path), played)
    assert "TaxiEnv has another table than a fresh one" in failed[0]


class _WithoutModule(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise AttributeError("__module__")


class _OfAnotherLanguage(metaclass=_WithoutModule):
    """Like an object that SWIG makes."""

    __slots__ = ()


class _NotLookedAt:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("the library is closed")


class _Simulator:
    """Like an object of a compiled library: it says its state, and has no attributes."""

    __slots__ = ("place",)

    def get_state(self) -> Any:
        return {"place": getattr(self, "place", 0)}

    def set_state(self, state: Any) -> None:
        self.place = state["place"]


class _Endless:
    __slots__ = ()

    def get_state(self) -> Any:
        return {"part": _NotLookedAt()}

    def set_state(self, state: Any) -> None:
        raise AssertionError


def test_layers_of_compiled_libraries_say_their_state() -> None:
    """Catches a checkpoint that ends the run where the inner ``env`` is an object without attributes, what such an
    object says that cannot be read, and layers that lead in a circle."""
    played = Played("CartPole-v1", 1, {}, seed=1)
    played.step(0)
    env = played.env.first_environment().unwrapped  # type: ignore[attr-defined]
    env.env = _Simulator()
    env.env.place = 5
    state = get_state(env)
    fresh = Played("CartPole-v1", 1, {}, seed=2).env.first_environment().unwrapped  # type: ignore[attr-defined]
    fresh.env = _Simulator()
    set_state(fresh, state)
    assert fresh.env.place == 5
    assert fresh.state.tolist() == env.state.tolist()
    env.env = _Endless()
    with pytest.raises(NotPlain, match="the library is closed"):
        get_state(env)
    env.env = env
    assert len(get_state(env)) == 1


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ([].append, "builtin_function_or_method"),
        (random.Random(3).random, "builtin_function_or_method"),
        pytest.param(1 << 20_000, "20,001 bits", id="huge"),
    ],
)
def test_what_hides_a_state_is_refused(part: Any, why: str) -> None:
    """Catches a method that goes on with the list or stream of another environment, and a number that no file takes."""
    with pytest.raises(NotPlain, match=why):
        to_plain({"part": part})
    assert from_plain(to_plain([1 << 5000])) == [1 << 5000]


@pytest.mark.parametrize(
    ("part", "why"),
    [(_OfAnotherLanguage(), "_OfAnotherLanguage"), (_NotLookedAt(), "RuntimeError: the library is closed")],
)
def test_what_cannot_be_looked_at_is_no_state(part: Any, why: str) -> None:
    """Catches a run that fails at a checkpoint because of an attribute of its environment, as LunarLander's Box2D."""
    played = Played("CartPole-v1", 1, {}, seed=1)
    played.step(0)
    env = played.env.first_environment()  # type: ignore[attr-defined]
    env.unwrapped.part = part
    state = played.env.get_state()
    later = Played("CartPole-v1", 1, {}, seed=1)
    assert why in later.go_on(state, played)[0]
    later.env.first_environment().unwrapped.part = part  # type: ignore[attr-defined]
    healthy = Played("CartPole-v1", 1, {}, seed=1)
    assert later.env.set_state(healthy.env.get_state(), later.obs).keys() in ({0}, set())


def _damaged(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Damaged copies of a state of CartPole, by what is wrong."""

    def copy() -> dict[str, Any]:
        return {**state, "env": [{**layer, "attributes": dict(layer["attributes"])} for layer in state["env"]]}

    found = {name: copy() for name in ("shape", "type", "object", "method", "lacking", "class", "text", "deep", "bits")}
    base = {name: each["env"][-1]["attributes"] for name, each in found.items()}
    base["shape"]["state"] = np.zeros(5)
    base["type"]["state"] = np.zeros(4, np.int64)
    base["object"]["state"] = {"#": "object", "class": "os.system", "attributes": {}}
    base["method"]["step"] = 3
    del base["lacking"]["state"]
    found["class"]["env"][-1]["class"] = "subprocess.Popen"
    base["text"]["gravity"] = "down"
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    base["deep"]["state"] = nested
    base["bits"]["_np_random"] = {"#": "random", "state": {"generator": "default_rng", "state": {}}}
    return found


def test_a_damaged_state_costs_its_slot_alone(tmp_path: Path) -> None:
    """Catches data that is believed: another shape, a class to make, a method to replace; or a run that ends for it."""
    played = Played("CartPole-v1", 2, {}, seed=1)
    for t in range(5):
        played.step(t)
    state = played.env.get_state()
    for name, damaged in _damaged(state["slots"][0]).items():
        later = Played("CartPole-v1", 2, {}, seed=3)
        failed = later.go_on({**state, "slots": [damaged, state["slots"][1]]}, played)
        assert failed.keys() == {0}, name
        assert (later.obs[0] != played.obs[0]).any()
        np.testing.assert_array_equal(later.obs[1], played.obs[1])
        for t in range(20):
            later.step(t)
    for nonsense in (None, 3, [], {}, {"slots": []}, {**state, "ended": np.zeros(3, bool)}):
        later = Played("CartPole-v1", 2, {}, seed=3)
        assert later.go_on(nonsense, played).keys() == {0, 1}
        later.step(0)


@pytest.mark.parametrize("env_id", ["recall", "synthetic", "mettagrid/forage"])
def test_a_damaged_state_of_ours_begins_anew(env_id: str) -> None:
    """Catches indices out of range, which numpy would take from the end, or a kill by another's file."""
    if env_id.startswith("mettagrid"):
        pytest.importorskip("mettagrid")
    slots = 16
    played = Played(env_id, slots, {}, seed=1)
    for t in range(5):
        played.step(t)
    good = played.env.get_state()
    bad = [None, {}, 3, {**good, "random": 3, "pool": 3, "simulations": 3}]
    if env_id == "recall":
        bad += [{**good, "cue": good["cue"] + 9}, {**good, "until_go": good["until_go"].astype(np.float32)}]
    if env_id == "synthetic":
        bad += [{**good, "offset": -1}, {**good, "until_end": good["until_end"] - 999}]
    if env_id.startswith("mettagrid"):
        first, *rest = good["simulations"]
        for change in ({"actions": first["actions"] + 99}, {"limit": 0}, {"obs": first["obs"] ^ 1}, {"random": {}}):
            later = Played(env_id, slots, {}, seed=3)
            failed = later.go_on({"simulations": [{**first, **change}, *rest]}, played)
            assert failed.keys() == set(range(8)), change
            later.step(0)
    for state in bad:
        later = Played(env_id, slots, {}, seed=3)
        assert later.go_on(state, played).keys() == set(range(slots))
        later.step(0)


def test_what_is_shared_is_shared_again_and_what_cannot_be_told_is_refused() -> None:
    """Catches two copies of one stream, and an array that another one is a view of: both would drift apart."""
    env = gymnasium.make("stateful_envs:PlainWalk-v0")
    env.reset(seed=3)
    env.step(2)
    other = gymnasium.make("stateful_envs:PlainWalk-v0")
    other.reset(seed=4)
    set_state(other, get_state(env))
    walk = other.unwrapped
    assert walk.helper.owner is walk
    assert walk.helper.random is walk.np_random
    assert walk.latest == env.unwrapped.latest
    from stateful_envs import Remembering

    remembering = Remembering(env)
    remembering.reset(seed=3)
    with pytest.raises(NotPlain, match="shares its memory"):
        get_state(remembering)
    env.unwrapped.data = np.zeros(3 * 2**20)
    with pytest.raises(NotPlain, match="more than 16,777,216 bytes"):
        get_state(env)


def test_plain_data_come_back_as_they_were(tmp_path: Path) -> None:
    """Catches a tuple that comes back as a list, a key that comes back as a text, a number of another type."""
    legacy = np.random.RandomState(3)
    value = {
        "tuple": (1, (2.5, None), [True, "x"]),
        "keys": {1: "a", (0, 1): np.float32(2)},
        "set": {3, "x"},
        "special": {"#": "tuple", "x": float("inf")},
        "queue": collections.deque([1, 2], maxlen=3),
        "arrays": [np.arange(3, dtype=np.int8), np.zeros((0, 2)), np.array(2.0)],
        "streams": [random.Random(4), np.random.default_rng(5), legacy, np.random.Generator(np.random.Philox(1))],
        "large": 2**200,
    }
    found = from_plain(through_a_file(to_plain(value), tmp_path))
    for name in ("tuple", "keys", "special", "set", "queue", "large"):
        assert found[name] == value[name]
    assert type(found["keys"][0, 1]) is np.float32
    assert found["queue"].maxlen == 3
    for one, other in zip(found["arrays"], value["arrays"], strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    python, numpy, old, philox = found["streams"]
    assert python.random() == value["streams"][0].random()
    assert numpy.random() == value["streams"][1].random()
    assert old.normal() == legacy.normal()
    assert philox.random() == value["streams"][3].random()
    for hopeless in (object(), lambda: legacy, {Path()}, np.array([None]), b"", legacy.normal):
        with pytest.raises(NotPlain):
            to_plain({"x": hopeless})
    for nonsense in ({"#": "tuple"}, {"#": "same", "number": 7}, {"#": "x"}, {"#": "random", "state": {}}, b"", {2}):
        with pytest.raises(DoesNotFit):
            from_plain(nonsense)


def test_a_file_of_plain_data_is_never_run(tmp_path: Path) -> None:
    """Catches a pickle in a file of arrays, and a damaged file that raises anything but ValueError."""
    with pytest.raises(TypeError):
        save_plain(tmp_path / "x.npz", {"x": np.array([object()])})
    np.savez(tmp_path / "pickle.npz", document=np.array([object()], dtype=object))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and then nothing")
    np.savez(tmp_path / "lacks.npz", document=np.frombuffer(b'{"#": "array", "number": 3}', np.uint8))
    for name in ("pickle", "torn", "lacks"):
        with pytest.raises(ValueError):
            load_plain(tmp_path / f"{name}.npz")
