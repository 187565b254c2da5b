"""The wrappers that people use, of single environments and of native vectors, as the rows and evaluation show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_env import make_env
from scripted_vectors import MODES, Rows
from shaping import LENGTH
from shoal.envs.boundary import EnvironmentFault, VectorEnvironment
from shoal.envs.config import AdapterOptions
from shoal.envs.play import play
from shoal.envs.recording import CannotRecord, film
from shoal.envs.registry import make_env_spec, make_vector_env

ID = "shaping:Line-v0"
G, V = "gymnasium.wrappers", "gymnasium.wrappers.vector"
STATISTICS = f"{V}:RecordEpisodeStatistics"
NO_WARNING = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
"""``RescaleObservation`` warns of every number that is given as a float."""


def episode(env: VectorEnvironment, action: float) -> tuple[list[list[float]], list[float]]:
    """Observations and rewards of slot 0 until its first episode ends, with an action of the policy's range [-1, 1]."""
    rows = Rows(env).rows
    env.reset(rows.obs)
    shown, rewards = [rows.obs[0].astype(float).tolist()], []
    for _ in range(20):
        env.step(np.full((env.num_envs, 1), action, np.float32), rows)
        ended = bool(rows.terminated[0] or rows.truncated[0])
        last = rows.final_obs if ended and rows.final_obs is not None else rows.obs
        shown.append(last[0].astype(float).tolist())
        rewards.append(float(rows.reward[0]))
        if ended:
            return shown, rewards
    raise AssertionError("no episode ended")


STEPS = [float(step) for step in range(1, LENGTH + 1)]
TENS = [10 * step for step in STEPS]
# The wrappers, the action taken; of the episode the first number of every observation, the action that the environment
# was given, and the rewards.
SINGLE = [
    ([], 0.5, [0, *STEPS], 2.0, TENS),
    ([{f"{G}:RescaleAction": {"min_action": -2.0, "max_action": 2.0}}], 0.5, [0, *STEPS], 2.0, TENS),
    ([f"{G}:ClipAction"], 9.0, [0, *STEPS], 4.0, TENS),
    (
        [{f"{G}:RescaleObservation": {"min_obs": 0.0, "max_obs": 1.0}}],
        0.5,
        [0, *(step / 10 for step in STEPS)],
        0.2,
        TENS,
    ),
    (["shaping:Halved"], 0.5, [0, *(step / 2 for step in STEPS)], 1.0, TENS),
    ([{f"{G}:ClipReward": {"min_reward": -1.0, "max_reward": 35.0}}], 0.5, [0, *STEPS], 2.0, [10, 20, 30, 35, 35, 35]),
    ([{"shaping:Scaled": {"factor": 0.1, "plus": -1.0}}], 0.5, [0, *STEPS], 2.0, [0, 1, 2, 3, 4, 5]),
    ([{f"{G}:MaxAndSkipObservation": {"skip": 2}}], 0.5, [0, 2, 4, 6], 2.0, [30, 70, 110]),
    ([{f"{G}:TimeLimit": {"max_episode_steps": 4}}], 0.5, [0, *STEPS[:4]], 2.0, TENS[:4]),
    (
        [
            {f"{G}:TimeLimit": {"max_episode_steps": 4}},
            {f"{G}:TimeAwareObservation": {"flatten": True, "normalize_time": False}},
        ],
        0.5,
        [0, *STEPS[:4]],
        2.0,
        TENS[:4],
    ),
]


@NO_WARNING
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("wrappers", "action", "shown", "acted", "rewards"), SINGLE)
def test_wrappers_of_single_environments_do_what_they_say(
    wrappers: list[Any], action: float, shown: Sequence[float], acted: float, rewards: list[float], mode: str
) -> None:
    """Catches a wrapper that is left out, one whose arguments do not arrive, one whose last observation is that of the
    episode after it, and actions that are mapped onto other bounds than the wrapper's."""
    env = make_env(ID, 2, 0, wrappers=wrappers, autoreset_mode=mode)
    observations, rewarded = episode(env, action)
    env.close()
    assert [row[0] for row in observations] == pytest.approx(list(shown))
    assert [row[1] for row in observations[1:]] == pytest.approx([acted] * len(rewards))
    assert rewarded == pytest.approx(rewards)
    assert env.faults == []


def test_a_stack_of_frames_begins_anew_with_every_episode() -> None:
    """Catches frames of the episode before in the stack of the next one."""
    env = make_env(ID, 1, 0, wrappers=[{f"{G}:FrameStackObservation": {"stack_size": 3, "padding_type": "zero"}}])
    rows = Rows(env).rows
    env.reset(rows.obs)
    for _ in range(LENGTH + 1):
        env.step(np.full((1, 1), 0.5, np.float32), rows)
    assert rows.is_first[0]
    assert not rows.obs.any()
    env.step(np.full((1, 1), 0.5, np.float32), rows)
    assert rows.obs[0].reshape(3, 2).tolist() == [[0, 0], [0, 0], [1, 2]]
    env.close()


ALL = [
    f"{G}:RecordEpisodeStatistics",
    {f"{G}:RescaleAction": {"min_action": -1.0, "max_action": 1.0}},
    f"{G}:ClipAction",
    {f"{G}:RescaleObservation": {"min_obs": 0.0, "max_obs": 1.0}},
    "shaping:Halved",
    {f"{G}:MaxAndSkipObservation": {"skip": 2}},
    {"shaping:Scaled": {"factor": 0.1}},
    {f"{G}:ClipReward": {"max_reward": 8.0}},
    {f"{G}:TimeLimit": {"max_episode_steps": 2}},
    {f"{G}:TimeAwareObservation": {"flatten": True}},
    {f"{G}:FrameStackObservation": {"stack_size": 2}},
]


@NO_WARNING
def test_processes_of_their_own_wrap_alike() -> None:
    """Catches a wrapper that does not reach the process of a slot, or that needs the one before it."""
    plain, spread = (make_env(ID, 2, 0, vectorization=how, wrappers=ALL) for how in ("sync", "async"))
    try:
        observations, rewards = episode(plain, 0.5)
        assert episode(spread, 0.5) == (observations, rewards)
    finally:
        plain.close()
        spread.close()
    assert rewards == pytest.approx([3.0, 7.0])
    assert len(observations) == 3


def player(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
    """Takes the middle of the upper half of the policy's range."""
    return np.full((len(obs), 1), 0.5, np.float32)


@pytest.mark.parametrize(
    ("options", "shaped"),
    [
        (AdapterOptions(wrappers=[f"{G}:RecordEpisodeStatistics", {"shaping:Scaled": {"factor": 0.1}}]), 21.0),
        (AdapterOptions(wrappers=[{"shaping:Scaled": {"factor": 0.1}}, f"{G}:RecordEpisodeStatistics"]), 21.0),
        (AdapterOptions(wrappers=[STATISTICS, {f"{V}:ClipReward": {"max_reward": 35.0}}], vectorization="native"), 165),
    ],
    ids=["inside", "outside", "native"],
)
def test_evaluation_shows_the_raw_return_beside_the_shaped_one(
    options: AdapterOptions, shaped: float, request: pytest.FixtureRequest
) -> None:
    """Catches evaluation without the wrappers, and a true score that shaping hides or that is not of whole episodes."""
    env = make_vector_env(ID, 2, 0, options, True)
    found = play(env, player, 6)
    env.close()
    assert found.returns.tolist() == pytest.approx([shaped] * 6)
    raw = shaped if request.node.callspec.id == "outside" else sum(TENS)
    assert found.metrics["episode.r"].tolist() == pytest.approx([raw] * 6)
    assert found.metrics["episode.l"].tolist() == [LENGTH] * 6


@NO_WARNING
@pytest.mark.parametrize("mode", MODES)
def test_native_vectors_are_wrapped(mode: str) -> None:
    """Catches wrappers of a native vector that are left out, whose arguments do not arrive, that leave the last
    observation of an episode as it was, or whose statistics are lost."""
    wrappers = [
        STATISTICS,
        f"{V}:ClipAction",
        {f"{V}:RescaleObservation": {"min_obs": 0.0, "max_obs": 1.0}},
        {f"{V}:ClipReward": {"min_reward": -1.0, "max_reward": 35.0}},
    ]
    # The first knows nothing of a reset with a mask, and gymnasium refuses wrappers of observations in the third mode.
    left_out = {"next_step": [], "disabled": wrappers[:1], "same_step": wrappers[2:3]}[mode]
    wrappers = [wrapper for wrapper in wrappers if wrapper not in left_out]
    scale = 1.0 if mode == "same_step" else 0.1
    env = make_env(ID, 3, 0, vectorization="native", wrappers=wrappers, mode=mode.upper())
    observations, rewards = episode(env, 9.0)
    assert [row[0] for row in observations] == pytest.approx([0, *(step * scale for step in STEPS)])
    assert [row[1] for row in observations[1:]] == pytest.approx([4 * scale] * LENGTH)
    assert rewards == [10, 20, 30, 35, 35, 35]
    ended = env.reports.take().episodes
    assert [(slot, numbers["episode.r"]) for slot, numbers in ended] == [
        (slot, sum(TENS)) for slot in range(3) if mode != "disabled"
    ]
    env.close()


def test_a_vector_wrapper_of_rewards_does_not_reward_resets() -> None:
    """Catches a vector that is said to belie its mode because a wrapper adds to the 0 of the step that resets."""
    env = make_env(ID, 2, 0, vectorization="native", wrappers=[{"shaping:ScaledVector": {"plus": -1.0}}])
    rows = Rows(env).rows
    env.reset(rows.obs)
    rewards = []
    for _ in range(LENGTH + 2):
        env.step(np.full((2, 1), 0.5, np.float32), rows)
        rewards.append(rows.reward.tolist())
    assert rewards == [[10 * step - 1] * 2 for step in range(1, LENGTH + 1)] + [[0, 0], [9, 9]]
    env.close()


@pytest.mark.parametrize(
    ("wrapper", "vectorization", "said"),
    [
        (
            f"{G}:ClipReward",
            "native",
            r"ClipReward wraps one environment, and env.vectorization=native makes a gymnasium.vector.VectorEnv of all "
            r"slots: name gymnasium.wrappers.vector:ClipReward, or set env.vectorization=sync or async",
        ),
        (f"{G}:TimeLimit", "native", "wraps one environment, .*: name a gymnasium.vector.VectorWrapper, or set"),
        ("shaping:Scaled", "native", "shaping:Scaled wraps one environment"),
        ("shaping:unwrapping", "sync", r"unwrapping\(\) cannot wrap .*: it returned SyncVectorEnv"),
        (
            f"{V}:ClipReward",
            "sync",
            r"ClipReward wraps a gymnasium.vector.VectorEnv, which only env.vectorization=native makes, and every "
            r"environment is wrapped by itself here: name gymnasium.wrappers:ClipReward$",
        ),
        (f"{V}:DictInfoToList", "async", "wraps a gymnasium.vector.VectorEnv, .*: name a gymnasium.Wrapper$"),
        ("shaping:ScaledVector", "sync", "shaping:ScaledVector wraps a gymnasium.vector.VectorEnv"),
        (f"{V}:NormalizeObservation", "native", "learns statistics .*; set policy.normalize_observations=true"),
        (f"{V}:NormalizeReward", "native", "learns statistics .*; set learner.normalize_values=true"),
        (
            {f"{V}:RescaleObservation": {"min_obs": 0, "max_obs": 1}},
            "native, SAME_STEP",
            "cannot wrap .*Expected autoreset_mode to be NEXT_STEP or DISABLED",
        ),
        ({f"{V}:ClipReward": {"least": 0}}, "native", r"vector:ClipReward\(least=0\) cannot wrap .*Lines.*'least'"),
    ],
)
def test_a_wrapper_that_does_not_fit_is_refused_with_the_one_that_does(
    wrapper: Any, vectorization: str, said: str
) -> None:
    """Catches an assertion of gymnasium's about a type in place of what to write, and statistics that no checkpoint
    holds."""
    how, _, mode = vectorization.partition(", ")
    with pytest.raises(ValueError, match=said):
        make_env(ID, 2, 0, vectorization=how, wrappers=[wrapper], **({"mode": mode} if mode else {}))


def test_a_wrapper_that_answers_otherwise_than_a_vector_is_named_at_its_first_step() -> None:
    """Catches a traceback from the middle of the adapter."""
    env = make_env(ID, 2, 0, vectorization="native", wrappers=[f"{V}:DictInfoToList"])
    rows = Rows(env).rows
    env.reset(rows.obs)
    with pytest.raises(
        EnvironmentFault, match=r"step answered .*must be \(obs, reward, terminated, truncated, infos\)"
    ):
        env.step(np.zeros((2, 1), np.float32), rows)
    env.close()


def test_a_game_takes_no_wrapper_of_vectors() -> None:
    """Catches a wrapper of vectors around a game of several agents."""
    pytest.importorskip("pettingzoo")
    with pytest.raises(ValueError, match=r"wraps a gymnasium.vector.VectorEnv.*: name gymnasium.wrappers:ClipReward$"):
        make_env_spec("pettingzoo:scripted_games:parallel_env", AdapterOptions(wrappers=[f"{V}:ClipReward"]))


def test_a_film_says_that_it_shows_one_environment(tmp_path: Path) -> None:
    """Catches a film without the wrappers that the policy was trained with."""
    pytest.importorskip("imageio_ffmpeg")
    options = AdapterOptions(vectorization="native", wrappers=[f"{V}:ClipReward"])
    with pytest.raises(CannotRecord, match=r"wrappers of its native vector, .* --env-options vectorization=sync"):
        film(ID, np.random.SeedSequence(0), tmp_path, "film", {}, options)
