"""Runs with every core by the command line: they train, compare, resume, play and export as those with the LSTM do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import shoal
from own_cores import Leaky, faulty
from service import SMALL, read_summary
from shoal import given
from shoal.deploy import cli
from shoal.learner.checkpoint import find_checkpoint
from shoal.policy.weights import flatten_weights

OWN = "own_cores:Leaky"
CORES = ["gru", "linear", OWN]
RUN = (*SMALL, "mode=inline", "actor.max_policy_lag=0", "seed=3", "checkpoint.every_updates=2", "checkpoint.keep=9")


def steps_of(updates: int) -> str:
    """total_env_steps that ends after so many updates."""
    return f"total_env_steps={int(updates * 16 * 8 * 0.85)}"


def train(run_dir: Path, *settings: str, code: int = 0) -> dict:
    assert cli.main(["train", *RUN, f"run_dir={run_dir}", *settings]) == code
    return read_summary(run_dir) if code == 0 else {}


@pytest.mark.parametrize("core", CORES)
def test_a_run_with_another_core(core, tmp_path, capsys):
    """Catches a core that a worker, the canary, a checkpoint, the other kind, `evaluate` or a library's user lacks."""
    run = tmp_path / "run"
    summary = train(run, f"policy.core={core}", steps_of(4))
    assert summary["log_prob_checks"] > 0
    assert summary["max_log_prob_error"] < 1e-4
    assert summary["ledger"]["trained"] == summary["ledger"]["sampled"]
    component = train(tmp_path / "component", f"policy.core={core}", "policy.kind=component", steps_of(4))
    assert component["weights_sha256"] == summary["weights_sha256"]
    checkpoint = find_checkpoint(run)
    assert checkpoint.state["policy"]["core"] == core
    made = checkpoint.make_policy()
    assert flatten_weights(made, 0).sha256 == summary["weights_sha256"]
    assert any(name.startswith("core.") for name, _ in made.named_parameters())
    # Each kind continues it, to the same weights.
    shutil.copytree(run, tmp_path / "other")
    resumed = train(run, f"policy.core={core}", steps_of(6))
    other = train(tmp_path / "other", f"policy.core={core}", "policy.kind=component", steps_of(6))
    assert resumed["policy_version"] == 6
    assert resumed["weights_sha256"] == other["weights_sha256"] != summary["weights_sha256"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--episodes", "8", "--memory-horizon", "0", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] >= 8
    # Its memory is its own for every environment, and goes to and fro as numpy arrays.
    policy = shoal.load_policy(run)
    obs = np.random.default_rng(0).normal(size=(2, *policy.network.observation.shape)).astype(np.float32)
    policy.act(obs, [4, 5], True)
    memory = policy.get_memory()
    assert [part.shape for part in memory[4]] == list(made.core.state_shapes.values())
    policy.reset_memory()
    policy.set_memory(memory)
    for part, again in zip(memory[5], policy.get_memory()[5], strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("way", ["actor.burn_in=5", "learner.refresh_states=true"])
def test_memory_is_freshened(core, way, tmp_path):
    """Catches a state of another core that is not burned in or refreshed."""
    run = tmp_path / "run"
    settings = (f"policy.core={core}", "learner.learning_rate=0.01", "checkpoint.every_updates=99", steps_of(8))
    assert train(run, way, *settings)["weights_sha256"] != train(tmp_path / "stored", *settings)["weights_sha256"]


def test_another_core_is_not_continued(tmp_path, capsys):
    """Catches weights that go on in another memory, and a core whose package is not there without its name."""
    run = tmp_path / "run"
    train(run, f"policy.core={OWN}", "policy.core_kwargs={halves: 4}", steps_of(2))
    expected = f"was trained with policy.core={OWN} and policy.core_kwargs={{'halves': 4}}, and can only be resumed so"
    for settings in (["policy.core=gru"], [], [f"policy.core={OWN}"]):
        train(run, *settings, steps_of(4), code=2)
        assert expected in capsys.readouterr().err


def test_a_core_that_is_not_here_is_named(tmp_path, capsys, monkeypatch):
    """Catches a checkpoint that cannot say what to install, and a traceback in place of a sentence."""
    name, run = "no_such_pkg.cores:Core", tmp_path / "run"
    monkeypatch.setitem(given.cores, name, Leaky)
    train(run, f"policy.core={name}", steps_of(2))
    monkeypatch.delitem(given.cores, name)
    expected = f"core {name}: there is no module 'no_such_pkg' here; install the package that has it"
    with pytest.raises(ValueError, match=expected):
        shoal.load_policy(run)
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--episodes", "2"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["policy.core=gur"], "policy.core: must be lstm, gru, linear, or a core class of yours .*did you mean gru?"),
        (["policy.core=no_such_pkg:Core"], "policy.core: no_such_pkg:Core: there is no module 'no_such_pkg' here"),
        (["policy.core=own_cores:Stranger"], "policy.core: own_cores:Stranger: expected a subclass of shoal.Core"),
        (["policy.core_kwargs={colour: red}"], "policy.core: lstm: got an unexpected keyword argument 'colour'"),
        (
            ["policy.core=gru", "policy.core_kwargs={num_layers: 0}"],
            "policy.core: gru: its __init__ raises ValueError: num_layers must",
        ),
        (["policy.core=here:Draws"], "policy.core: here:Draws: .*the learner would train another memory than acted"),
        (
            ["policy.core=gru", "policy.kind=component", "policy.components={lstm: {size: 7}}"],
            "policy.components.lstm: policy.core makes the memory another component, core",
        ),
        (
            ["policy.core=gru", "policy.kind=component", "policy.components={core: {gain: 2}}"],
            "policy.components.core.gain: a component of kind core has no such setting; it has sources, size",
        ),
    ],
)
def test_what_does_not_fit_starts_nothing(settings, expected, tmp_path, capsys, monkeypatch):
    """Catches a run directory that is made, or a traceback, for a core that cannot train."""
    monkeypatch.setitem(given.cores, "here:Draws", faulty("forgets resets"))
    train(tmp_path / "run", *settings, code=2)
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_components_around_another_core(tmp_path):
    """Catches a size, a source or a sample of activations that only the LSTM has."""
    settings = [
        "policy.kind=component",
        "policy.core=gru",
        "policy.components={core: {size: 24}, critic_1: {sources: [core], size: 32}}",
        "learner.weight_metrics_every=1",
        "policy.core_kwargs={num_layers: 1}",
    ]
    train(tmp_path / "run", *settings, steps_of(3))
    policy = find_checkpoint(tmp_path / "run").make_policy()
    assert policy.core.state_shapes == {"h": (1, 24)}
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"core"' in last or "/core" in last
