"""Runs with the residual encoder by the command line: they train, compare, resume, evaluate and say what reads what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import shoal
from gymnasium import spaces
from service import SMALL, read_summary
from shoal.deploy import cli
from shoal.learner.checkpoint import find_checkpoint
from shoal.policy.observation import image_encoders
from shoal.policy.weights import flatten_weights

CHOICE = "policy.image_encoder={screen: residual}"
RUN = (*SMALL, "env.id=Screens-v0", "mode=inline", "actor.max_policy_lag=0", "seed=3", "checkpoint.every_updates=2")


class Screens(gymnasium.Env[Any, Any]):
    """Two pictures, one of which is the brighter."""

    screen = spaces.Box(0, 255, (12, 12, 3), np.uint8)
    observation_space = spaces.Dict(map=spaces.Box(0, 255, (8, 8, 3), np.uint8), screen=screen, t=spaces.Discrete(4))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.brighter)
        self.t += 1
        return self._obs(), reward, self.t == 3, False, {}

    def _obs(self) -> dict[str, Any]:
        self.brighter = int(self.np_random.integers(2))
        levels = (200, 20) if self.brighter == 0 else (20, 200)
        parts = {
            name: self.np_random.integers(0, level, space.shape, np.uint8)
            for (name, space), level in zip(list(self.observation_space.items())[:2], levels, strict=True)
        }
        return {**parts, "t": self.t}


gymnasium.register("Screens-v0", Screens)


class Halves(gymnasium.Env[Any, Any]):
    """A picture of noise, of which one half is the brighter: 1 for the action that says which, four times."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.brighter)
        self.t += 1
        return self._obs(), reward, self.t == 4, False, {}

    def _obs(self) -> np.ndarray:
        self.brighter = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (8, 8, 3), np.uint8)
        picture[:, 4 * self.brighter : 4 * self.brighter + 4] += 100
        return picture


gymnasium.register("Halves-v0", Halves)


class Own(shoal.FastPolicy):
    """A policy class of a user's, which no setting gives an encoder."""


OWN = f"policy.kind={__name__}:Own"


def train(run_dir: Path, *settings: str, updates: int, code: int = 0) -> dict[str, Any]:
    steps = f"total_env_steps={int(updates * 16 * 8 * 0.9)}"
    assert cli.main(["train", *RUN, f"run_dir={run_dir}", steps, *settings]) == code
    return read_summary(run_dir) if code == 0 else {}


def test_a_run_with_an_encoder_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an encoder that a worker, the parity check, a checkpoint, the other kind, the weight metrics, `evaluate`
    or a library's user lacks, and a regularizer that does not find its layers."""
    run = tmp_path / "run"
    settings = (
        *(CHOICE, "learner.weight_metrics_every=1", "learner.regularization.clip_scale=2"),
        *("learner.regularization.l2_init_coef=0.001", "learner.regularization.l2_init_overrides={image1_section*: 2}"),
    )
    summary = train(run, *settings, updates=4)
    assert "map as an image (channels last) of 8 x 8 pixels with 3 channels, divided by 255, by a small CNN" in (
        said := capsys.readouterr().out
    )
    assert (
        "screen as an image (channels last) of 12 x 12 pixels with 3 channels, divided by 255, by a residual CNN"
        in said
    )
    assert summary["log_prob_checks"] > 0
    assert summary["max_log_prob_error"] < 1e-4
    component = train(tmp_path / "component", *settings, "policy.kind=component", updates=4)
    assert component["weights_sha256"] == summary["weights_sha256"]
    assert "image1_section2" in (run / "metrics.jsonl").read_text()
    made = find_checkpoint(run).make_policy()
    assert flatten_weights(made, 0).sha256 == summary["weights_sha256"]
    assert image_encoders(made.observation) == {"map": "small", "screen": "residual"}
    # Each kind continues it, to the same weights.
    shutil.copytree(run, tmp_path / "other")
    resumed = train(run, *settings, updates=6)
    other = train(tmp_path / "other", *settings, "policy.kind=component", updates=6)
    assert resumed["policy_version"] == other["policy_version"] > summary["policy_version"]
    assert resumed["weights_sha256"] == other["weights_sha256"] != summary["weights_sha256"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--episodes", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] >= 8
    policy = shoal.load_policy(run)
    assert policy.act(Screens.observation_space.sample(), 0, True) in (0, 1)


@pytest.mark.parametrize("begun", ["policy.image_encoder=small", CHOICE], ids=["small", "residual"])
def test_another_encoder_is_not_continued(begun: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches weights that go on in another encoder, and a refusal that lists tensors instead of the setting."""
    run = tmp_path / "run"
    train(run, begun, updates=2)
    other = CHOICE if "small" in begun else "policy.image_encoder=small"
    encoder, here = ("small", "residual") if "small" in begun else ("residual", "small")
    for kind in ("fast", "component"):
        capsys.readouterr()
        train(run, other, f"policy.kind={kind}", updates=4, code=2)
        said = capsys.readouterr().err
        saved = f"was trained with policy.image_encoder={{map: small, screen: {encoder}}}, and can only be resumed so"
        assert f"{saved}; here it is {{map: small, screen: {here}}}" in said


@pytest.mark.parametrize(("begun", "then"), [(CHOICE, OWN), (OWN, CHOICE)], ids=["to", "from"])
def test_a_class_of_ones_own_is_told_its_kind(
    begun: str, then: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a refusal that asks for an encoder, which is refused in turn for a class of one's own."""
    train(tmp_path / "run", begun, updates=2)
    capsys.readouterr()
    train(tmp_path / "run", then, updates=4, code=2)
    said = capsys.readouterr().err
    kinds = (OWN.removeprefix("policy.kind="), "fast")
    saved, here = kinds if begun == OWN else kinds[::-1]
    assert f"it was trained with policy.kind={saved}, and here that is {here}" in said
    assert "shoal: 1 problem, nothing was started" in said
    assert "policy.image_encoder" not in said
    assert "policy.components" not in said


@pytest.mark.parametrize("encoder", ["small", "residual"])
def test_the_encoder_learns_to_see(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an encoder whose features or gradients tell nothing of the picture: guesses are right half the time."""
    run = tmp_path / "run"
    settings = ("env.id=Halves-v0", "env.num_envs=32", "learner.batch_size=32", "learner.minibatches=4")
    learns = ("learner.learning_rate=0.001", "learner.precision=float32", "learner.gamma=0", f"run_dir={run}")
    ends = ("total_env_steps=5000", "checkpoint.every_updates=100")
    arguments = (*RUN, *settings, *learns, *ends, f"policy.image_encoder={encoder}")
    assert cli.main(["train", *arguments]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--episodes", "64", "--greedy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_return"] > 0.95 * 4


def test_the_doctor_says_what_reads_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a report on another encoder than a run would have."""
    named = f"env.id={__name__}:Screens-v0"  # as the process finds it that tries it
    assert cli.main(["doctor", *RUN, named, f"run_dir={tmp_path / 'run'}", "policy.image_encoder=residual"]) == 0
    # In the line of the whole observation, and in that of each part.
    assert capsys.readouterr().out.count("by a residual CNN") == 4
