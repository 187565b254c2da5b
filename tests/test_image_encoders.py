"""Encoders of images: two convolutions, or the residual network of IMPALA (Espeholt et al. 2018, figure 3, right)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from networks import POLICIES, assert_same, draw_is_first, make_pair
from shoal.actors.worker_setup import observation_of
from shoal.deploy.doctor import preflight
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings.load import load_config
from shoal.envs.reading import reading
from shoal.envs.registry import make_env_spec
from shoal.learner.described_policy import describe_policy, make_described_policy, other_part
from shoal.policy import FastPolicy, ImageObservation
from shoal.policy.actions import Actions, Discrete
from shoal.policy.convolution import ResidualSection
from shoal.policy.observation import (
    DictObservation,
    Observation,
    VectorObservation,
    encoded_by,
    image_encoders,
    observation_from_json,
    observation_to_json,
    written,
    written_name,
)
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.remap import Remapping, remap
from torch import Tensor

ACTIONS = Discrete((("n", "s", "e"),))
BOTH = DictObservation(
    VectorObservation(2),
    [
        ("camera", ImageObservation(13, 10, 3, encoder="residual")),
        ("map", ImageObservation(9, 9, 2, "float32", 4.0)),
        ("radar", ImageObservation(5, 4, 1, "float32", 2.0, encoder="residual")),
    ],
)


class Seeing(gymnasium.Env[Any, Any]):
    """Two cameras and a number, two in a Tuple, one picture, or numbers alone."""

    action_space = spaces.Discrete(3)

    def __init__(self, sees: str) -> None:
        camera = spaces.Box(0, 255, (20, 24, 3), np.uint8)
        cameras: dict[str, spaces.Space[Any]] = {"front": camera, "rear": camera, "speed": spaces.Box(-1, 1, (1,))}
        self.observation_space = {
            "cameras": spaces.Dict(cameras),
            "pair": spaces.Tuple((camera, camera)),
            "picture": camera,
            "numbers": spaces.Box(-1, 1, (3,), np.float32),
        }[sees]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


gymnasium.register("Seeing-v0", Seeing)


def padded(x: np.ndarray, value: float) -> np.ndarray:
    return np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=value)


def conv3(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """[C, H, W] -> [D, H, W], one pixel after the other."""
    _, height, width = x.shape
    weight, bias, around = weights[f"{name}.weight"], weights[f"{name}.bias"], padded(x, 0.0)
    out = np.empty((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            out[:, i, j] = bias + np.einsum("dcij,cij->d", weight, around[:, i : i + 3, j : j + 3])
    return out


def max_pool(x: np.ndarray) -> np.ndarray:
    """The largest of 3 x 3 pixels around every second one."""
    planes, height, width = x.shape
    around = padded(x, -np.inf)
    out = np.empty((planes, math.ceil(height / 2), math.ceil(width / 2)))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            out[:, i, j] = around[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    return out


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def impala(image: np.ndarray, weights: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    """What the paper's figure says of one image [C, H, W], in float64, up to the ReLU before the linear layer."""
    x = image
    for section, channels in ((1, 16), (2, 32), (3, 32)):
        name = f"{prefix}section{section}"
        x = max_pool(conv3(x, weights, f"{name}.conv"))
        assert len(x) == channels
        for block in (1, 2):
            inner = conv3(relu(x), weights, f"{name}.block{block}_conv1")
            x = x + conv3(relu(inner), weights, f"{name}.block{block}_conv2")
    return relu(x).flatten()


def weights_of(policy: RecurrentPolicy) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in policy.state_dict().items()}


def draw_biases(policy: RecurrentPolicy) -> None:
    """Biases start at 0, where a missing one would not be seen."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "section" in name and name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (2, 3), (4, 4), (9, 12)])
@pytest.mark.parametrize("kind", POLICIES)
def test_the_residual_encoder_is_the_papers(kind: str, sides: tuple[int, int]) -> None:
    """Catches a block without its sum, a ReLU on the skip, other padding or pooling, channels in another order, and
    images so small that nothing would be left of them."""
    torch.manual_seed(0)
    policy = POLICIES[kind](ImageObservation(*sides, 2, encoder="residual"), ACTIONS)
    draw_biases(policy)
    obs = torch.randint(0, 256, (3, *sides, 2), dtype=torch.uint8)
    weights = weights_of(policy)
    for row, got in zip(obs.numpy(), policy.encode(obs).detach().numpy(), strict=True):
        features = impala(row.transpose(2, 0, 1) / 255, weights)
        assert features.max() > 0
        hidden = relu(weights["fc1.weight"] @ features + weights["fc1.bias"])
        expected = relu(weights["encoded_obs.weight"] @ hidden + weights["encoded_obs.bias"])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_images_of_a_dict_have_encoders_of_their_own() -> None:
    """Catches an image that is read by its neighbour's encoder, and a Dict that the two policies read differently."""
    fast, component = make_pair(BOTH, ACTIONS, normalize_observations=True, normalize_values=True)
    assert list(fast.state_dict()) == list(component.state_dict())
    assert [name for name, _ in fast.named_children() if name.startswith("image")] == [
        *(f"image0_section{i}" for i in (1, 2, 3)),
        *("image1_cnn1", "image1_cnn2"),
        *(f"image2_section{i}" for i in (1, 2, 3)),
    ]
    draw_biases(fast)
    component.load_state_dict(fast.state_dict())
    obs, is_first = 255 * torch.rand(4, 3, *BOTH.shape), draw_is_first(4, 3)
    grads = []
    for policy in (fast, component):
        output, _ = policy.unroll(obs, is_first)
        (output.logits.square().sum() + output.value.sum()).backward()
        grads.append({name: p.grad for name, p in policy.named_parameters()})
    assert_same(fast.unroll(obs, is_first)[0].logits, component.unroll(obs, is_first)[0].logits)
    for name, grad in grads[0].items():
        assert_same(grad, grads[1][name], name)
    # The features of both residual images are the paper's, of their own pixels.
    features: list[Tensor] = []
    hook = fast.fc1.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    fast.encode(obs[0])
    hook.remove()
    weights, [read] = weights_of(fast), features
    sizes = [2, 32 * 2 * 2, 64 * math.prod((5, 5)), 32]
    assert read.shape[1] == sum(sizes)
    parts = dict(zip(("numbers", "camera", "map", "radar"), read.split(sizes, 1), strict=True))
    for index, name, scale in ((0, "camera", 255), (2, "radar", 2)):
        for row in range(3):
            image = fast.image(obs[0], index)[row].double().numpy() / scale
            expected = impala(image, weights, f"image{index}_")
            np.testing.assert_allclose(parts[name][row].detach(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_weight_learns(kind: str) -> None:
    """Catches a layer that is made and not used, and one that is detached."""
    torch.manual_seed(0)
    policy = POLICIES[kind](ImageObservation(20, 20, 3, encoder="residual"), ACTIONS)
    output, _ = policy.unroll(torch.randint(0, 256, (2, 3, 20, 20, 3), dtype=torch.uint8), draw_is_first(2, 3))
    (output.logits.square().sum() + output.value.square().sum()).backward()
    named = [(name, p) for name, p in policy.named_parameters() if name.startswith("section")]
    assert len(named) == 3 * 5 * 2
    assert all(p.grad is not None and p.grad.any() for _, p in named)
    assert sum(p.numel() for _, p in named) == sum(
        9 * before * after + after + 4 * (9 * after * after + after) for before, after in ((3, 16), (16, 32), (32, 32))
    )


def test_bfloat16_of_updates() -> None:
    """Catches a type that one of the layers does not take, and sums that lose more than rounding."""
    torch.manual_seed(0)
    policy = FastPolicy(ImageObservation(20, 20, 3, encoder="residual"), ACTIONS)
    obs = torch.randint(0, 256, (5, 20, 20, 3), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        half = policy.encode(obs)
    torch.testing.assert_close(half.float(), policy.encode(obs), rtol=0.1, atol=0.02)


def test_pixels_stay_channels_last() -> None:
    """Catches boxes that are copied into another order, in which the convolutions take twice the time."""
    policy = FastPolicy(BOTH, ACTIONS)
    seen: list[Tensor] = []
    section = policy.get_submodule("image0_section1")
    assert isinstance(section, ResidualSection)
    section.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    policy.encode(torch.rand(3, *BOTH.shape))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def described(observation: Observation) -> dict[str, Any]:
    torch.manual_seed(0)
    return json.loads(json.dumps(describe_policy(FastPolicy(observation, ACTIONS))))


@pytest.mark.parametrize("observation", [BOTH, BOTH.images[0][1], BOTH.images[1][1]], ids=["dict", "residual", "small"])
def test_descriptions_keep_the_encoder(observation: Observation) -> None:
    """Catches a checkpoint that is read by another encoder, and one of before, which says none, that is not read."""
    plain = json.loads(json.dumps(observation_to_json(observation)))
    assert observation_from_json(plain) == observation
    text = json.dumps(plain)
    assert ("residual" in text) == ("residual" in image_encoders(observation).values())
    assert '"small"' not in text
    made = make_described_policy(described(observation))
    assert list(made.state_dict()) == list(FastPolicy(observation, ACTIONS).state_dict())
    # An environment does not know what reads its images: the weights do.
    here = encoded_by(observation, "small")
    for trained, presented in ((observation, here), (here, encoded_by(observation, "residual"))):
        interface = remap(described(trained), presented, ACTIONS, Remapping())
        assert image_encoders(interface.observation) == image_encoders(trained)


def test_kernels_of_older_weights_stay() -> None:
    """Catches weights that no longer fit where the choice of kernels has changed since."""
    old = ImageObservation(20, 20, 3, kernels=((3, 1), (3, 1)))
    assert encoded_by(old, "small") == old
    residual = encoded_by(old, "residual")
    assert residual.kernels == ()
    assert encoded_by(residual, {"": "small"}) == ImageObservation(20, 20, 3)
    with pytest.raises(ValueError, match="an image's encoder is small or residual, got 'resnet'"):
        ImageObservation(20, 20, 3, encoder="resnet")  # type: ignore[arg-type]  # is refused
    with pytest.raises(ValueError, match="no kernels of its own with encoder residual"):
        ImageObservation(20, 20, 3, kernels=((3, 1), (3, 1)), encoder="residual")


def problems_of(tmp_path: Path, sees: str, *settings: str) -> str:
    config, problems = load_config((), ["env.id=Seeing-v0", f"env.kwargs={{sees: {sees}}}", "mode=inline", *settings])
    found = problems or preflight.check(config, tmp_path / "run")
    return "\n".join(problem for problem in found if problem.startswith("policy"))


@pytest.mark.parametrize(
    ("sees", "choice", "expected"),
    [
        ("cameras", "residual", ""),
        ("cameras", "{rear: residual}", ""),
        ("cameras", "{rear: residual, front: small}", ""),
        ("picture", "residual", ""),
        ("numbers", "small", ""),
        ("numbers", "{}", ""),
        ("cameras", "{rera: residual}", "policy.image_encoder names rera; images of Seeing-v0 are front, rear"),
        ("picture", "{rear: residual}", "the observation of Seeing-v0 is one image: name the encoder alone"),
        (
            "numbers",
            "{rear: residual}",
            "policy.image_encoder: {rear: residual} is for images, and Seeing-v0 has none",
        ),
        ("numbers", "residual", "policy.image_encoder: residual is for images, and Seeing-v0 has none; leave it out"),
        ("picture", "resnet", r"policy.image_encoder.*small.*residual"),
        ("cameras", "{rear: resnet}", r"policy.image_encoder.*small.*residual"),
    ],
)
def test_a_choice_without_effect_is_refused(sees: str, choice: str, expected: str, tmp_path: Path) -> None:
    """Catches a misspelt key, and an encoder that is asked for and reads nothing."""
    found = problems_of(tmp_path, sees, f"policy.image_encoder={choice}")
    assert re.search(expected, found) if expected else not found, found


NAMES = (
    "obs[0]",
    "obs[1]",
    "rear",
    "a.b-c",
    "the key",
    "a: b",
    '"',
    "1",
    "1e3",
    "true",
    "Null",
    "",
    "-",
    "\u00e9",
    "\n",
    "\x7f",
)


@pytest.mark.parametrize("name", NAMES)
def test_written_choices_are_settings(name: str) -> None:
    """Catches a name in a message that YAML reads as something else, or not at all."""
    for choice in ({name: "residual", "other": "small"}, {"other": "small", name: "residual"}):
        config, problems = load_config((), [f"policy.image_encoder={written(choice)}"])  # type: ignore[arg-type]  # any name
        assert not problems
        assert config.policy.image_encoder == choice
    assert (written_name(name) == name) == (name in ("rear", "a.b-c", "\u00e9"))


def test_refusals_of_a_tuple_can_be_pasted(tmp_path: Path) -> None:
    """Catches `obs[0]` without quotes, which ends a key of YAML, in a refused setting and in a refused checkpoint."""
    pair, _, _ = setup_of("pair", 'policy.image_encoder={"obs[1]": residual}')
    torch.manual_seed(0)
    said = other_part(described(pair), FastPolicy(encoded_by(pair, "small"), ACTIONS))
    [saved, here] = re.findall(r"\{.*?\}", said)
    for text, expected in ((saved, pair), (here, encoded_by(pair, "small"))):
        again, _, _ = setup_of("pair", f"policy.image_encoder={text}")
        assert again == expected
    found = problems_of(tmp_path, "pair", 'policy.image_encoder={"obs[2]": residual}')
    assert found.endswith('names "obs[2]"; images of Seeing-v0 are "obs[0]", "obs[1]"')
    found = problems_of(tmp_path, "numbers", 'policy.image_encoder={"obs[1]": residual}')
    assert 'policy.image_encoder: {"obs[1]": residual} is for images' in found


def test_a_class_of_ones_own_decides_itself(tmp_path: Path) -> None:
    """Catches a setting that a policy of the user's is never told of."""
    found = problems_of(tmp_path, "picture", "policy.kind=own_policies:Own", "policy.image_encoder=residual")
    assert "policy.image_encoder: the kind own_policies:Own makes its own network" in found


@pytest.mark.parametrize(
    ("choice", "components", "fits"),
    [
        ("residual", "{section2: {size: 8}}", True),
        ("small", "{section2: {size: 8}}", False),
        ("residual", "{cnn1: {size: 8}}", True),  # of tokens: which observation it is, is not known yet
        ("residual", "{image0_section1: {size: 8}, image1_section3: {gain: 2.0}}", True),
        ("small", "{image0_section1: {size: 8}}", False),
        ("{rear: residual}", "{image1_section1: {size: 8}, image0_cnn1: {size: 8}}", True),
        (
            "{rear: residual}",
            "{more: {kind: residual, sources: [image1_section3]}, fc1: {sources: [more, obs]}}",
            False,
        ),
        ("small", "{deep: {kind: residual, sources: [obs_normalizer], size: 4}, cnn1: {sources: [deep]}}", True),
        ("small", "{deep: {kind: residual, sources: [fc1]}, encoded_obs: {sources: [deep]}}", False),
        ("small", "{deep: {kind: residual, sources: [obs_normalizer], kernel: 5}, cnn1: {sources: [deep]}}", False),
    ],
)
def test_components_of_the_residual_encoder_are_settings(choice: str, components: str, fits: bool) -> None:
    """Catches components that are refused before the observation is known, and such as fit no observation."""
    settings = ["policy.kind=component", f"policy.image_encoder={choice}", f"policy.components={components}"]
    _, problems = load_config((), settings)
    assert (not problems) == fits, problems


def test_sections_can_be_wider_and_more() -> None:
    """Catches a section whose size or whose activation is fixed."""
    observation = ImageObservation(20, 20, 3, encoder="residual")
    components = {
        "section3": {"size": 64, "activation": "none"},
        "section4": {"kind": "residual", "sources": ["section3"], "size": 48, "activation": "relu"},
        "fc1": {"sources": ["section4"]},
    }
    policy = POLICIES["component"](observation, ACTIONS, components=components)  # type: ignore[call-arg]
    assert policy.get_parameter("section4.conv.weight").shape == (48, 64, 3, 3)
    assert policy.get_parameter("fc1.weight").shape == (128, 48 * 2 * 2)


def setup_of(sees: str, *settings: str) -> tuple[Observation, Actions, dict[str, str]]:
    config, problems = load_config((), ["env.id=Seeing-v0", f"env.kwargs={{sees: {sees}}}", *settings])
    assert not problems
    spec = make_env_spec("Seeing-v0", sees=sees)
    setup = make_worker_setup(config, spec, run_id="a-run")
    assert setup.presented is not None
    assert setup.presented[0] == observation_of(spec)
    worker = setup.make_worker(0, 0)  # which compares the environment with what the run was set up with
    worker.close()
    return setup.observation, setup.actions, {"said": reading(spec, config.policy.encoder_of)[0]}


def test_a_run_reads_every_key_as_chosen_and_says_so() -> None:
    """Catches a choice that stops at the settings, and a first line that says another encoder than reads the key."""
    cameras, _, said = setup_of("cameras", "policy.image_encoder={rear: residual}")
    assert image_encoders(cameras) == {"front": "small", "rear": "residual"}
    assert re.search("front as an image .* by a small CNN, and rear as an image .* by a residual CNN", said["said"])
    picture, _, said = setup_of("picture", "policy.image_encoder=residual")
    assert image_encoders(picture) == {"": "residual"}
    assert said["said"].endswith("by a residual CNN")
    picture, _, said = setup_of("picture")
    assert picture == observation_of(make_env_spec("Seeing-v0", sees="picture"))
    assert said["said"].endswith("by a small CNN")
