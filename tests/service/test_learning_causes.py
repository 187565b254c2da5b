"""Runs that are broken on purpose: each must be told what it is broken by.

Stale memories alone broke none that was tried (up to 0.9 of their norm, with a lag of 14 versions): those runs learned.
That they are named where nothing else shows is in ``test_learning_verdict.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shoal.deploy.cli import main
from shoal.deploy.settings.load import load_config
from shoal.deploy.training.run import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SOUND = (
    *("mode=inline", "env.id=CartPole-v1", "env.num_envs=32", "total_env_steps=16000", "metrics.port=-1"),
    *("actor.unroll_length=32", "actor.max_policy_lag=0", "policy.initialization.lstm_bias=zeros"),
    *("learner.batch_size=32", "learner.num_threads=1", "learner.epochs=4", "learner.minibatches=8"),
    *("learner.learning_rate=1e-3", "learner.gamma=0.98", "learner.clip_coef=0.2", "learner.value_clip_coef=0"),
    *("learner.entropy_coef=0.01", "learner.value_coef=0.001", "learner.weight_metrics_every=4"),
    *("policy.normalize_observations=false", "learner.normalize_values=false", "learner.desired_kl=0"),
    *("policy.initialization.action_embeddings=0.1", "learner.adam_eps=1e-12", "learner.advantage_lambda=0.916"),
)
"""A run that learns in these few steps: the value loss of CartPole's returns is scaled down. What would mend a broken
one by itself is off."""

BROKEN: dict[str, tuple[tuple[str, ...], str, str]] = {
    "value loss": (("learner.value_coef=1000",), "value_loss", "Lower learner.value_coef"),
    "entropy bonus": (("learner.entropy_coef=100",), "entropy_held", "Lower learner.entropy_coef"),
    "learning rate": (("learner.learning_rate=1",), "clipping", "Lower learner.learning_rate"),
    "clip range": (("learner.clip_coef=1e-4",), "clipping", "Raise learner.clip_coef"),
    "one step for every batch": (
        ("learner.epochs=1", "learner.minibatches=1", "env.num_envs=128", "learner.batch_size=128"),
        "few_steps",
        "Raise learner.minibatches or learner.epochs",
    ),
    "dead layers": (
        (
            *("actor.max_policy_lag=16", "env.num_envs=4", "actor.num_actors=16", "learner.batch_size=4"),
            *("learner.epochs=1", "learner.minibatches=1", "learner.learning_rate=2e-2", "learner.clip_coef=10"),
        ),
        "dead_layers",
        "Lower learner.learning_rate",
    ),
    # Only the next reward counts, and that of the other action comes later.
    "no exploration": (
        ("env.id=tempting_envs:Tempting-v0", "learner.gamma=0", "learner.entropy_coef=0", "total_env_steps=40000"),
        "entropy_gone",
        "Raise learner.entropy_coef",
    ),
    # Every episode of a policy that knows nothing returns -200.
    "no reward": (("env.id=MountainCar-v0",), "no_signal", "Reward progress earlier"),
}


def trained(directory: Path, *settings: str) -> dict[str, Any]:
    config, problems = load_config((), [*SOUND, *settings])
    assert not problems
    return run(config, directory).summary


@pytest.mark.parametrize("fault", BROKEN)
def test_the_fault_is_named(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches thresholds that real numbers do not reach, and an effect of the fault that is told in its place."""
    settings, cause, words = BROKEN[fault]
    learning = trained(tmp_path / "run", *settings)["learning"]
    assert (learning["cause"], learning["verdict"] in ("no_better", "worse")) == (cause, True), learning
    assert words in learning["advice"]
    # The metrics of the end say the same, and so do the screen and the report.
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert [name for name, value in last.items() if name.startswith("learning_problem/") and value == 1] == [
        f"learning_problem/{cause}"
    ]
    assert f"  learning    {learning['advice']}" in capsys.readouterr().out
    pytest.importorskip("jinja2")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(page)]) == 0
    assert words in page.read_text()


def test_a_run_that_learns_is_told_so(tmp_path: Path) -> None:
    """Catches a diagnosis that frightens whoever has a sound run."""
    summary = trained(tmp_path / "run", "total_env_steps=40000")
    learning = summary["learning"]
    assert (learning["verdict"], learning["cause"], learning["advice"]) == ("better", None, ""), learning
    assert summary["mean_return"] - summary["return_ci95"] > summary["random_return"] + summary["random_return_ci95"]
    assert "better than a random policy's" in learning["sentence"]
