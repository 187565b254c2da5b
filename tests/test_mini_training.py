"""Both kinds of policy train through the command line, make the same weights, and continue each other's runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from service import SMALL, read_summary
from shoal.deploy import cli
from shoal.learner.checkpoint import find_checkpoint, load_checkpoint
from shoal.policy.weights import flatten_weights

UPDATES = 6
# Valid steps per update: 16 segments of 8 steps, of which some are void.
RUN = (*SMALL, "mode=inline", "actor.max_policy_lag=0", "seed=3", "checkpoint.every_updates=2", "checkpoint.keep=9")
CHANGED = "policy.components={critic_1: {size: 96}, lstm: {size: 64}, mine: {kind: linear, sources: [fc1], size: 24}, encoded_obs: {sources: [mine]}}"  # noqa: E501


def train(run_dir: Path, *settings: str, code: int = 0) -> dict:
    assert cli.main(["train", *RUN, f"run_dir={run_dir}", *settings]) == code
    return read_summary(run_dir) if code == 0 else {}


def versions(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def steps_of(updates: int) -> str:
    """total_env_steps that ends after so many updates."""
    return f"total_env_steps={int(updates * 16 * 8 * 0.85)}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind with the same settings."""
    found = {}
    for kind in ("fast", "component"):
        path = tmp_path_factory.mktemp("runs") / kind
        found[kind] = (path, train(path, f"policy.kind={kind}", steps_of(UPDATES)))
    return found


def test_both_kinds_make_the_same_weights(runs):
    """Policies that are equal in every test of their parts, and not in a run."""
    fast, component = runs["fast"][1], runs["component"][1]
    assert fast["weights_sha256"] == component["weights_sha256"] is not None
    assert fast["policy_version"] == component["policy_version"] == UPDATES
    assert fast["ledger"] == component["ledger"]
    assert (fast["policy_kind"], component["policy_kind"]) == ("fast", "component")


def test_both_kinds_really_train(runs):
    """Runs that are equal because nothing moves."""
    for path, summary in runs.values():
        hashes = {
            flatten_weights(load_checkpoint(path / "checkpoints" / f"{version:09d}").make_policy(), 0).sha256
            for version in versions(path)
        }
        assert len(hashes) == 3
        assert summary["weights_sha256"] in hashes


def test_both_kinds_save_at_the_same_versions(runs):
    """A checkpoint folder that exists says nothing of what is in it."""
    for kind, (path, _) in runs.items():
        assert versions(path) == [2, 4, 6]
        policy = find_checkpoint(path).make_policy()
        assert policy.kind == kind
        assert sum(p.numel() for p in policy.parameters()) > 400_000


@pytest.mark.parametrize(("first", "second"), [("fast", "component"), ("component", "fast")])
def test_each_kind_continues_the_others_run(runs, first, second, tmp_path):
    """A resumed run whose weights or moments went to other parameters: it ends where it would not have."""
    found = {}
    for kind in (first, second):
        shutil.copytree(runs[first][0], tmp_path / kind)
        found[kind] = train(tmp_path / kind, f"policy.kind={kind}", steps_of(UPDATES + 3))
    assert found[first]["weights_sha256"] == found[second]["weights_sha256"]
    assert found[second]["policy_version"] == UPDATES + 3
    assert find_checkpoint(tmp_path / second).state["policy"]["kind"] == second


def test_other_components_train_resume_and_play(tmp_path, capsys):
    """Components that a worker, a checkpoint, `evaluate` or `export` does not know of."""
    settings = ("policy.kind=component", CHANGED)
    summary = train(tmp_path / "run", *settings, steps_of(2))
    checkpoint = find_checkpoint(tmp_path / "run")
    policy = checkpoint.make_policy()
    assert flatten_weights(policy, 0).sha256 == summary["weights_sha256"]
    assert (policy.mine.out_features, policy.critic_1.out_features, policy.lstm.hidden_size) == (24, 96, 64)
    capsys.readouterr()
    play = ["evaluate", str(tmp_path / "run"), "--episodes", "8", "--json"]
    assert cli.main(play) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] >= 8
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "unroll.arrow")]) == 0
    assert train(tmp_path / "run", *settings, steps_of(4))["policy_version"] == 4


@pytest.mark.parametrize(
    "settings",
    [
        ("policy.kind=fast",),
        ("policy.kind=component",),
        ("policy.kind=component", CHANGED.replace("size: 96", "size: 96, activation: relu")),
    ],
)
def test_another_network_is_not_continued(settings, tmp_path, capsys):
    """Weights that fit by their shapes and go on as another function, or an error without the reason."""
    train(tmp_path / "run", "policy.kind=component", CHANGED, steps_of(1))
    before = find_checkpoint(tmp_path / "run").state["policy_version"]
    train(tmp_path / "run", *settings, steps_of(3), code=2)
    message = capsys.readouterr().err
    assert "holds another policy than this run's config describes" in message
    assert "critic_1" in message
    assert find_checkpoint(tmp_path / "run").state["policy_version"] == before


def test_a_bad_graph_starts_nothing(tmp_path, capsys):
    """A run directory that is made, or a traceback, for settings that cannot be a network."""
    train(tmp_path / "run", "policy.kind=component", "policy.components={fc1: {sources: [fc2]}}", code=2)
    assert "policy.components.fc1.sources: 'fc2' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # What only the environment's observations decide: recall's are vectors.
    train(tmp_path / "run", "policy.kind=component", "policy.components={cnn1: {size: 3}}", code=2)
    assert "components.cnn1: a new component needs a kind" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _leave_the_global_stream_alone():
    """A run seeds torch's global generator; the tests after it must not depend on that."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
