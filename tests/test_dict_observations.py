"""Images inside Dict and Tuple observations: each has convolutions of its own, beside the numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rollouts import make_learner
from service import make_setup
from shoal.actors.worker_setup import observation_of
from shoal.deploy.settings.load import load_config
from shoal.envs.boundary import DictSpace, EnvSpec, VectorSpace
from shoal.envs.config import AdapterOptions
from shoal.envs.reading import reading
from shoal.envs.spaces import Declared, declared_from_json, declared_to_json, make_spec
from shoal.envs.writers import make_writer
from shoal.learner.batch import BatchAssembler
from shoal.policy import ComponentPolicy, FastPolicy
from shoal.policy.observation import (
    DictObservation,
    ImageObservation,
    VectorObservation,
    observation_from_json,
    observation_to_json,
)
from shoal.policy.remap import Remapping, remap
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights

SPACE = spaces.Dict(
    camera=spaces.Box(0, 255, (3, 40, 48), np.uint8),
    v=spaces.Box(-5, 5, (2,), np.float32),
    kind=spaces.Discrete(3),
    deep=spaces.Tuple([spaces.Box(0, 1, (20, 20, 2), np.float32), spaces.MultiBinary(2)]),
)


class Pointing(gymnasium.Env[Any, Any]):
    """Which quarter of a picture is lit is asked for two steps later, when the picture is dark and a flag is set."""

    observation_space = spaces.Dict(screen=spaces.Box(0, 255, (12, 12, 3), np.uint8), asked=spaces.Discrete(2))
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t, self.quarter = 0, int(self.np_random.integers(4))
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._obs(), float(self.t == 3 and action == self.quarter), self.t == 3, False, {}

    def _obs(self) -> dict[str, Any]:
        screen = np.zeros((12, 12, 3), np.uint8)
        if self.t == 0:
            row, column = divmod(self.quarter, 2)
            screen[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] = 200
        return {"screen": screen, "asked": int(self.t == 2)}


gymnasium.register("Pointing-v0", Pointing)


def spec_of(space: spaces.Space[Any], **options: Any) -> EnvSpec:
    return make_spec("x", Declared(space, spaces.Discrete(4)), AdapterOptions(**options))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_every_part_is_where_the_policy_looks_for_it(batched: bool, packed: bool) -> None:
    """Catches an image with its axes mixed up, numbers of another part, and parts in another order than the names."""
    spec = spec_of(SPACE)
    observation = observation_of(spec)
    assert isinstance(observation, DictObservation)
    assert observation.numbers.names == ("v[0]", "v[1]", "kind=0", "kind=1", "kind=2", "deep[1][0]", "deep[1][1]")
    assert observation.numbers.categorical == (2, 3, 4, 5, 6)
    assert [(name, image.shape) for name, image in observation.images] == [
        ("camera", (40, 48, 3)),
        ("deep[0]", (20, 20, 2)),
    ]
    assert observation.shape == (7 + 40 * 48 * 3 + 20 * 20 * 2,)
    assert (spec.obs_shape, spec.obs_dtype) == ((7 * 4 + 40 * 48 * 3 + 20 * 20 * 2 * 4,), np.uint8)
    SPACE.seed(0)
    obs = [SPACE.sample() for _ in range(3)]
    # Rows of an unroll, which lie apart, and numbers as an exported policy takes them.
    rows = np.full((3, 2, *spec.obs_shape), 255, np.uint8)[:, 1] if packed else np.full((3, 6567), np.nan, np.float32)
    if batched:
        together = {key: np.stack([one[key] for one in obs]) for key in ("camera", "v", "kind")}
        deep = tuple(np.stack([one["deep"][i] for one in obs]) for i in range(2))
        make_writer(SPACE, spec, batched=True)({**together, "deep": deep}, rows)
    else:
        for one, row in zip(obs, rows, strict=True):
            make_writer(SPACE, spec, batched=False)(one, row[None])
    policy = FastPolicy(observation, ["a", "b"])
    for one, row in zip(obs, policy.read(torch.from_numpy(rows)), strict=True):
        expected = [*one["v"], *np.eye(3)[one["kind"]], *one["deep"][1]]
        np.testing.assert_allclose(row[:7], expected, atol=1e-6)
        assert torch.equal(policy.image(row[None], 0)[0], torch.from_numpy(one["camera"]).float())
        np.testing.assert_array_equal(policy.image(row[None], 1)[0], one["deep"][0].transpose(2, 0, 1))


def test_how_parts_are_read() -> None:
    """Catches an image that is read as numbers without a word, and a setting that has no effect inside a Dict."""
    assert (
        "7 numbers, 5 of them 0 or 1, and camera as an image (channels first) of 40 x 48 pixels"
        in reading(spec_of(SPACE))[0]
    )
    plain = spec_of(SPACE, image_layout="none").observation
    assert isinstance(plain, VectorSpace)
    assert plain.size == spaces.flatdim(SPACE)
    unclear = spaces.Dict(map=spaces.Box(0, 255, (9, 12, 9), np.uint8), v=spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match=r"x: map: the observation space .* set env.image_layout"):
        spec_of(unclear)
    first = spec_of(unclear, image_layout="channels_first").observation
    assert isinstance(first, DictSpace)
    assert (first.images[0][1].channels, first.images[0][1].height) == (9, 12)
    assert spec_of(unclear, image_layout={"map": "channels_first"}).observation == first
    mixed = spec_of(SPACE, image_layout={"camera": "none", "deep[0]": "channels_first"}).observation
    assert isinstance(mixed, DictSpace)
    assert [(name, image.channels) for name, image in mixed.images] == [("deep[0]", 20)]
    assert mixed.numbers.size == 7 + 3 * 40 * 48
    with pytest.raises(ValueError, match=r"env.image_layout names screen; boxes of numbers are camera, v, deep\[0\]"):
        spec_of(SPACE, image_layout={"screen": "none"})
    with pytest.raises(ValueError, match="for the parts of a Dict or Tuple"):
        spec_of(SPACE["camera"], image_layout={"camera": "none"})
    config, problems = load_config((), ["env.image_layout={camera: channels_first, map: none}"])
    assert (problems, config.env.image_layout) == ([], {"camera": "channels_first", "map": "none"})
    assert load_config((), ["env.image_layout={camera: channels_firts}"])[1]
    # Only images, and keys that read alike.
    only = spec_of(spaces.Tuple([spaces.Box(0, 255, (36, 36, 3), np.uint8)] * 2)).observation
    assert isinstance(only, DictSpace)
    assert (only.numbers.size, [name for name, _ in only.images]) == (0, ["obs[0]", "obs[1]"])
    alike = spaces.Dict({"a.b": spaces.Box(0, 1, (1,)), "a": spaces.Dict(b=spaces.Box(0, 1, (1,)))})
    names = spec_of(spaces.Dict(c=SPACE["camera"], **alike.spaces)).observation
    assert isinstance(names, DictSpace)
    assert len(set(names.numbers.names)) == 2
    with pytest.raises(ValueError, match=r"no part of Dict .* is an image"):
        spec_of(spaces.Dict(v=spaces.Discrete(2)), image_layout="channels_last")


def test_both_policies_are_one_network() -> None:
    """Catches a component that reads another image, or a scale that is applied to one of them only."""
    observation = observation_of(spec_of(SPACE))
    policies = []
    for cls in (FastPolicy, ComponentPolicy):
        torch.manual_seed(0)
        policies.append(cls(observation, ["a", "b", "c"], normalize_observations=True, normalize_values=True))
    fast, component = policies
    assert list(fast.state_dict()) == list(component.state_dict())
    assert all(map(torch.equal, fast.state_dict().values(), component.state_dict().values()))
    x = 100 * torch.rand(4, *observation.shape)
    first = torch.tensor([True, False, False, True])
    one, other = (policy.step(x, first)[0] for policy in policies)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.value, other.value)
    # Every part has an effect.
    for columns in (slice(0, 7), *observation.spans):  # type: ignore[union-attr]
        changed = x.clone()
        changed[:, columns] = changed[:, columns].flip(1)
        fast.vector_normalizer.scale.fill_(1.0)  # type: ignore[union-attr]
        assert not torch.allclose(fast.encode(changed), fast.encode(x))


def test_a_camera_in_a_dict_costs_what_a_camera_costs() -> None:
    """Catches pixels that are read one by one: 240 x 320 pixels had 30 million weights."""
    camera = spaces.Box(0, 255, (240, 320, 3), np.uint8)
    alone, beside = (
        sum(p.numel() for p in FastPolicy(observation_of(spec_of(space)), ["a", "b"]).parameters())
        for space in (camera, spaces.Dict(screen=camera, v=spaces.Box(-1, 1, (2,))))
    )
    assert beside == alone + 2 * 128


def test_components_of_images_are_settings() -> None:
    """Catches settings that are refused before the observation is known."""
    config, problems = load_config(
        (),
        [
            "policy.kind=component",
            "policy.components={image0_cnn1: {size: 8}, peek: {kind: linear, sources: ['obs[screen]', obs]}, "
            "fc1: {sources: [image0_cnn2, peek]}}",
        ],
    )
    assert not problems
    components = {"image0_cnn1": {"size": 8}, "peek": {"kind": "linear", "sources": ["obs[screen]", "obs"]}}
    components["fc1"] = {"sources": ["image0_cnn2", "peek"]}
    observation = observation_of(spec_of(Pointing.observation_space))
    policy = ComponentPolicy(observation, ["a", "b"], components=components)
    assert policy.image0_cnn1.out_channels == 8
    assert policy.step(torch.zeros(2, *observation.shape), torch.ones(2, dtype=torch.bool))[0].value.shape == (2,)
    components["peek"]["sources"] = ["obs[camera]"]
    with pytest.raises(ValueError, match=r"'obs\[camera\]' is unknown; there are obs, obs\[screen\]"):
        ComponentPolicy(observation, ["a", "b"], components=components)
    assert config.policy.components


def test_plain_data() -> None:
    """Catches a checkpoint that plays another network."""
    spec = spec_of(SPACE)
    observation = observation_of(spec)
    assert observation_from_json(json.loads(json.dumps(observation_to_json(observation)))) == observation
    assert spec.spaces is not None
    assert make_spec("x", declared_from_json(json.loads(json.dumps(spec.spaces)))).observation == spec.observation
    assert declared_to_json(declared_from_json(spec.spaces)) == spec.spaces


def test_numbers_move_by_name_and_images_do_not() -> None:
    """Catches numbers that are read from the pixels of an image once the environment has them in another order."""
    image = ("camera", ImageObservation(20, 20, 1))
    trained = DictObservation(VectorObservation(3, ["a", "b", "c"]), [image])
    here = DictObservation(VectorObservation(2, ["c", "a"]), [image])
    torch.manual_seed(0)
    policy = FastPolicy(trained, ["x", "y"], normalize_observations=True)
    moved = FastPolicy(here, ["x", "y"], trained_observation=trained, normalize_observations=True)
    moved.load_state_dict(policy.state_dict())
    for each in (policy, moved):
        each.vector_normalizer.scale.fill_(1.0)  # type: ignore[union-attr]
    pixels = 255 * torch.rand(2, 400)
    numbers = torch.tensor([[1.0, 0.0, 3.0], [4.0, 0.0, 6.0]])
    x, y = torch.cat([numbers, pixels], 1), torch.cat([numbers[:, [2, 0]], pixels], 1)
    assert torch.allclose(policy.encode(x), moved.encode(y), atol=1e-6)
    other = DictObservation(here.numbers, [("camera", ImageObservation(24, 20, 1))])
    with pytest.raises(ValueError, match="was trained with the images"):
        FastPolicy(other, ["x", "y"], trained_observation=trained)
    described = {
        "observation": observation_to_json(trained),
        "actions": {"kind": "discrete", "names": [["x", "y"]], "scalar": True},
        "action_rows": {"x": 0, "y": 1},
    }
    with pytest.raises(ValueError, match="was trained with the images"):
        remap(described, other, policy.actions, Remapping())


def test_rollouts_and_updates() -> None:
    """Catches statistics of pixels, a memory that actors and learner see differently, and images without gradient."""
    setup = dataclasses.replace(
        make_setup("Pointing-v0", num_envs=4, unroll_length=12), normalize_observations=True, normalize_values=True
    )
    worker = setup.make_worker(0, 0)
    policy = setup.make_policy()
    assert policy.vector_normalizer is None  # its only numbers are flags
    learner = make_learner(policy, epochs=2, minibatches=2)
    before = policy.get_parameter("image0_cnn1.weight").clone()
    for version in range(3):
        payload = worker.rollout(flatten_weights(policy, version))
        batch = BatchAssembler(worker.spec, 4).assemble([from_bytes(worker.spec, payload)])
        result = learner.update(batch)
        assert result.log_prob_error is not None
        assert result.log_prob_error < 1e-5
    assert not torch.equal(policy.get_parameter("image0_cnn1.weight"), before)
    worker.close()
