"""A run that was trained for a moment, with all that a run leaves, for attacks on what reads it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

from shoal.deploy.cli import main

SETTINGS = (
    *("mode=inline", "metrics.port=-1", "env.id=recall", "env.num_envs=4", "actor.unroll_length=8", "seed=5"),
    *("actor.num_actors=3", "actor.max_policy_lag=2", "learner.batch_size=4", "learner.num_threads=1"),
    *("learner.epochs=1", "learner.minibatches=1", "learner.normalize_values=true", "recorder.keep_updates=1"),
    *("total_env_steps=320", "checkpoint.every_updates=2", "checkpoint.keep=2", "log.every_seconds=0.01"),
    *("evaluation.random_seconds=0", "policy.kind=component"),
    "policy.components={fc1: {size: 6}, encoded_obs: {size: 5}, lstm: {size: 4}, critic_1: {size: 6}, "
    "actor_1: {size: 6}}",
)
"""A small policy: what is attacked is copied each time."""


def train(run_dir: Path) -> Path:
    """Train into ``run_dir``, where no run is there yet."""
    if not (run_dir / "summary.json").is_file():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["train", *SETTINGS, f"run_dir={run_dir}"])
        assert code == 0, said.getvalue()
        metrics = run_dir / "metrics.jsonl"
        metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[-20:]))
    return run_dir


def seal(checkpoint: Path) -> None:
    """Write the hashes of the files as they are now into the manifest, as somebody who means it would."""
    manifest = checkpoint / "manifest.json"
    if not manifest.is_file():
        return
    try:
        known = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(known, dict):
        for name in known:
            with contextlib.suppress(OSError, ValueError):
                if not (checkpoint / name).is_file():
                    continue  # a pipe has no end
                data = (checkpoint / name).read_bytes()
                known[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(known))
