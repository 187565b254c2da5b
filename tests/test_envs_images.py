"""Images of every layout and type: read as what they are, alike in every vectorization, or refused with a setting."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from echo_envs import CASES, HOWS, SLOTS, Case, echo
from gymnasium import spaces
from scripted_vectors import Rows
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.envs.boundary import ImageSpace, VectorSpace
from shoal.envs.reading import reading
from shoal.envs.reports import CODES
from shoal.envs.spaces import Declared, make_spec
from shoal.policy import ComponentPolicy, FastPolicy, ImageObservation
from shoal.policy.actions import Discrete
from shoal.policy.observation import image_kernels, observation_from_json, observation_to_json
from shoal.policy.remap import Remapping, remap


def stack_last(frames: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [H, W, N * C], a frame's channels beside each other."""
    return np.concatenate(list(frames), -1)


READ: dict[str, tuple[tuple[int, int, int], str, float, Any]] = {
    "grey": ((84, 84, 1), "uint8", 255, lambda x: x[..., None]),
    "grey with an axis": ((84, 84, 1), "uint8", 255, lambda x: x),
    "stack": ((84, 84, 4), "uint8", 255, lambda x: np.stack(list(x), -1)),
    "channels first": ((64, 64, 3), "uint8", 255, lambda x: np.stack(list(x), -1)),
    "stack of colours": ((84, 84, 12), "uint8", 255, stack_last),
    "stack, channels first": ((40, 44, 6), "uint8", 255, lambda x: stack_last(np.moveaxis(x, 1, -1))),
    "wide": ((48, 64, 3), "uint8", 255, lambda x: np.stack(list(x), -1)),
    "small": ((32, 32, 3), "uint8", 255, lambda x: x),
    "float": ((64, 64, 3), "float32", 1, lambda x: x),
    "float first": ((36, 36, 3), "float32", 1, lambda x: np.stack(list(x), -1).astype(np.float32)),
    "board": ((8, 8, 17), "uint8", 1, lambda x: x.astype(np.uint8)),
    "codes": ((12, 12, 3), "uint8", 10, lambda x: x.astype(np.uint8)),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", list(READ))
def test_images_are_read_as_what_they_are(case: str, how: str) -> None:
    """Catches a grey picture that is a list of numbers, a stack that is an image of height 4, planes in another order,
    and a vectorization that reads otherwise.
    """
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    if how == "async" and case not in ("stack", "float first"):
        pytest.skip("the writer is that of sync, in processes that take a second to start")
    shape, dtype, scale, arranged = READ[case]
    env = echo(how, case)
    space = env.spec.observation
    assert isinstance(space, ImageSpace)
    assert (space.height, space.width, space.channels, space.dtype, space.scale) == (*shape, dtype, scale)
    assert env.spec.obs_dtype == dtype
    rows = Rows(env).rows
    env.reset(rows.obs)
    for t in range(5):
        expected = arranged(CASES[case].obs(t))
        for slot in range(SLOTS):
            np.testing.assert_array_equal(rows.obs[slot], expected, strict=True)
        env.step(np.zeros(SLOTS, np.int64), rows)
    assert env.faults == []
    env.close()


@pytest.mark.parametrize("how", ["sync", "native", "pettingzoo"])
@pytest.mark.parametrize("case", ["either", "cube"])
def test_what_may_be_two_things_is_refused_with_the_setting(case: str, how: str) -> None:
    """Catches a guess."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    with pytest.raises(ValueError, match=r"set env.image_layout to channels_last, channels_first or none"):
        echo(how, case)


@pytest.mark.parametrize("how", ["sync", "native", "pettingzoo"])
@pytest.mark.parametrize(
    ("case", "layout", "shape"),
    [
        ("either", "channels_last", (9, 12, 9)),
        ("either", "channels_first", (12, 9, 9)),
        ("either", "none", (972,)),
        ("stack of colours", "none", (4 * 84 * 84 * 3,)),
        ("stack", "channels_last", (4, 84, 84)),
        ("table", "channels_last", (4, 3, 1)),
        ("table", "auto", (12,)),
    ],
)
def test_the_setting_decides(case: str, layout: str, shape: tuple[int, ...], how: str) -> None:
    """Catches a setting that only some shapes or adapters obey."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    env = echo(how, case, image_layout=layout)
    assert env.spec.obs_shape == shape
    assert isinstance(env.spec.observation, ImageSpace if len(shape) == 3 else VectorSpace)
    rows = Rows(env).rows
    env.reset(rows.obs)
    raw = CASES[case].obs(0)
    expected = np.stack(list(raw), -1) if layout == "channels_first" else raw.reshape(shape)
    np.testing.assert_array_equal(rows.obs[1], expected)
    env.close()


def box(shape: tuple[int, ...], dtype: Any = np.uint8, low: float = 0, high: float = 255) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype=dtype)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            box((210, 160, 3)),
            r"\(210, 160, 3\) as an image \(channels last\) of 210 x 160 pixels with 3 channels",
        ),
        (
            box((4, 84, 84)),
            r"\(channels first\) of 84 x 84 pixels with 4 channels, divided by 255, by a CNN",
        ),
        (box((3, 4, 84, 84)), r"\(stacked frames, channels first\) of 84 x 84 pixels with 12 channels"),
        (box((16, 16)), r"\(grey\) of 16 x 16 pixels with 1 channel,"),
        (box((15, 84)), r"^uint8 \(15, 84\) as 1,260 numbers"),
        (box((20, 20), np.int32), r"^int32 \(20, 20\) as an image \(grey\) .* divided by 255"),
        (box((20, 20), np.bool_, 0, 1), r"^bool \(20, 20\) as an image \(grey\) .* divided by 1,"),
        (box((20, 20), np.float32, -np.inf, np.inf), r"^float32 \(20, 20\) as 400 numbers"),
        (spaces.Dict(a=box((2,)), b=box((0,))), r"as 2 numbers"),
        (box((6, 7, 2), np.int8, 0, 1), r"as 84 numbers"),
        (box((7, 7, 3)), r"^uint8 \(7, 7, 3\) as 147 numbers"),
        (box((4, 7, 7, 3)), r"as 588 numbers"),
        (box((2, 4, 3)), r"as 24 numbers"),
        (box((2, 2, 2, 2, 2)), r"as 32 numbers"),
        (spaces.Dict(view=box((7, 7, 3)), way=spaces.Discrete(4)), r"as 151 numbers, 4 of them 0 or 1$"),
        (
            spaces.Dict({"a": box((2, 2)), "b": spaces.Discrete(3)}),
            r"Dict of a uint8 \(2, 2\), b Discrete\(3\) as 7 n",
        ),
    ],
    ids=str,
)
def test_a_line_says_how_observations_are_read(space: spaces.Space[Any], said: str) -> None:
    """Catches a reading that nobody is told of."""
    observations, actions = reading(make_spec("E", Declared(space, spaces.Discrete(4))))
    assert re.search(said, observations), observations
    assert actions == "one of 4"


@pytest.mark.parametrize(
    "space",
    [
        box((84, 84, 3, 4)),
        box((64, 64, 3, 4)),
        box((9, 9, 9, 9)),
        box((9, 9, 9, 9, 9)),
        box((64, 64, 3), np.float32, -np.inf, np.inf),
        box((64, 64), np.float32, -1, 1),
        box((20, 20), high=10),
        box((64, 64), np.uint16, 0, 65535),
    ],
    ids=str,
)
def test_shapes_that_say_nothing_are_refused(space: spaces.Box) -> None:
    """Catches unbounded numbers taken for a picture, and a grey picture within [-1, 1] that is 4,096 numbers without a
    word."""
    with pytest.raises(ValueError, match=r"E: the observation space .* set env.image_layout"):
        make_spec("E", Declared(space, spaces.Discrete(4)))


def test_a_layout_for_what_is_no_box_is_refused() -> None:
    """Catches a setting that is passed over."""
    CASES["words"] = Case(lambda t: 0, spaces.Discrete(3))
    with pytest.raises(ValueError, match=r"image_layout=channels_last is for boxes of numbers.*Discrete"):
        echo("sync", "words", image_layout="channels_last")
    CASES["row"] = Case(lambda t: np.zeros(5, np.uint8), box((5,)))
    with pytest.raises(ValueError, match=r"is for boxes of 2 to 4 axes"):
        echo("sync", "row", image_layout="channels_first")


def dark_picture(largest: int, *, late: int = 0) -> Case:
    """Codes up to ``largest``, and one number ``late`` in the 100th picture."""

    def picture(t: int) -> np.ndarray:
        codes = np.arange(300, dtype=np.uint8).reshape(10, 10, 3) % (largest + 1)
        codes[0, 0, 0] = max(codes[0, 0, 0], late * (t % 100 == 99))
        return codes

    return Case(picture, box((10, 10, 3)), terminated=lambda t: False)


@pytest.mark.parametrize("how", ["sync", "native"])
@pytest.mark.parametrize(
    ("case", "told"),
    [(dark_picture(10), 10), (dark_picture(0), None), (dark_picture(200), None), (dark_picture(10, late=90), None)],
    ids=["codes", "black", "bright", "bright later"],
)
def test_codes_in_a_picture_are_told(case: Case, told: int | None, how: str) -> None:
    """Catches MiniGrid's codes from 0 to 10, of its whole grid, read as shades of 255 without a word; and a warning of
    a picture that is dark at first, or black."""
    CASES["dark"] = case
    env = echo(how, "dark")
    rows = Rows(env).rows
    env.reset(rows.obs)
    for _ in range(1100):
        env.step(np.zeros(env.num_envs, np.int64), rows)
    found = env.reports.take()
    if told is None:
        assert CODES not in found.counts
    else:
        assert re.search(rf"no number was above {told}: .*env.image_layout=none", found.examples[CODES])
        assert found.counts[CODES] == (1 if how == "native" else env.num_envs)


@pytest.mark.parametrize("size", [3, 7, 9, 11, 12, 13, 16, 20, 24, 30, 32, 35, (10, 200), 36, 64, 84, 96, 128])
def test_images_of_every_size_leave_few_features(size: int | tuple[int, int]) -> None:
    """Catches kernels that reduce nothing: 6,951,042 parameters for 32 x 32 pixels."""
    height, width = size if isinstance(size, tuple) else (size, size)
    policy = FastPolicy(ImageObservation(height, width, 3), Discrete((("a", "b"),)))
    small = min(height, width) < 36
    assert policy.fc1.in_features <= (4096 if small else 6400)
    obs = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    assert policy.step(obs, torch.ones(2, dtype=torch.bool))[0].logits.isfinite().all()
    if max(height, width) <= 11:
        assert image_kernels(height, width) == ((3, 1), (3, 1))
    if size in (36, 64, 84, 96):
        assert image_kernels(height, width) == ((8, 4), (4, 2))


def test_large_images_leave_few_features_too() -> None:
    """Catches the same fault at the other end: 240 x 320 pixels gave 8.7 million weights of one layer."""
    for height, width in ((240, 320), (210, 160), (480, 640)):
        cells = FastPolicy(ImageObservation(height, width, 1), Discrete((("a",),))).fc1.in_features
        assert cells <= 64 * 300, (height, width, cells)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (160, 210), (84, 84)])
def test_weights_saved_without_kernels_keep_theirs(height: int, width: int) -> None:
    """Catches a checkpoint of before that no longer loads, or loads into another network."""
    before = ((8, 4), (4, 2)) if min(height, width) >= 36 else ((3, 1), (3, 1))
    observation = observation_from_json({"kind": "image", "height": height, "width": width, "channels": 3})
    assert isinstance(observation, ImageObservation)
    assert (observation.kernels, observation.dtype, observation.scale) == (before, "uint8", 255)
    assert observation_from_json(observation_to_json(observation)) == observation
    described = {
        "observation": observation_to_json(observation),
        "actions": {"kind": "discrete", "names": [["a", "b"]], "scalar": True},
        "action_rows": {"a": 0, "b": 1},
        "embedding_rows": 100,
    }
    # The environment's image as it would be read now.
    found = remap(described, ImageObservation(height, width, 3, scale=10), Discrete((("a", "b"),)), Remapping())
    assert found.observation == observation


@pytest.mark.parametrize("case", ["float", "codes", "board"])
def test_both_policies_divide_by_the_scale(case: str) -> None:
    """Catches numbers from 0 to 1 divided by 255, and a policy that differs from the other."""
    env = echo("sync", case)
    observation, actions = observation_of(env.spec), actions_of(env.spec)
    env.close()
    assert isinstance(observation, ImageObservation)
    torch.manual_seed(0)
    fast = FastPolicy(observation, actions)
    component = ComponentPolicy(observation, actions)
    component.load_state_dict(fast.state_dict())
    obs = torch.from_numpy(np.stack([CASES[case].obs(t) for t in range(3)]).astype(observation.dtype))
    unit = dataclasses.replace(observation, scale=1.0)
    same = FastPolicy(unit, actions)
    same.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast.encode(obs), same.encode(obs.float() / observation.scale))
    assert torch.equal(fast.encode(obs), component.encode(obs))
