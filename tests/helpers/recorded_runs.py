"""Run directories as a run leaves them, without having run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

Line = dict[str, Any]
COMPONENTS = ("actor_1", "actor_head", "cnn1", "cnn2", "critic_1", "fc1", "lstm", "self_encoder")
STAGES = {"wait": 0.1, "assemble": 0.01, "parity_check": 0.02, "update": 0.8, "publish": 0.02, "reduce": 0.1}
RATE, EVERY, START = 9000, 10.0, 1_795_000_000.0


def line(
    time: float, *, session: int = 0, seconds: float, before: int = 0, returns: Callable[[float], float] | None = None
) -> Line:
    """One of ``metrics.jsonl``, ``seconds`` into a session that began with ``before`` environment steps."""
    trained = int(RATE * seconds)
    steps = before + trained
    progress = steps / 1e6
    mean = (returns or (lambda p: 24 * (1 - math.exp(-3 * p))))(progress)
    entry: Line = {
        "time": START + time,
        "session": session,
        "seconds": seconds,
        "env_steps": steps,
        "policy_version": steps // 4000,
        "sampled_env_steps": trained + 4000,
        "trained_env_steps": trained,
        "in_flight_env_steps": 4000,
        "ledger_imbalance_env_steps": 0,
        "lost_unrolls": 0,
        "policy_lag_versions/count": trained // 4000,
        "policy_lag_versions/mean": 0.9 + 0.1 * math.sin(time),
        "policy_lag_versions/max": 1,
        "loss/policy_loss": -0.01 + 0.002 * math.sin(time),
        "loss/value_loss": 0.4 * math.exp(-progress),
        "loss/entropy": 1.6 * math.exp(-progress),
        "loss/approx_kl": 0.01,
        "loss/clip_fraction": 0.08,
        "loss/grad_norm": 0.3 + 0.1 * math.cos(time),
        "loss/explained_variance": 1 - math.exp(-2 * progress),
        "log_prob_error": 4.8e-7,
        "log_prob_error_max": 9.5e-7,
        "log_prob_checks": trained // 4000,
        "memory_staleness_ratio/stored": 0.2,
        "memory_staleness_ratio/used": 0.2,
        "episodes": trained // 300,
        "episode_return/count": trained // 300,
        "episode_return/mean": mean,
        "episode_length_steps/mean": 200,
        "mean_return": mean,
        "actors_alive": 2,
        "env_faults": 0,
        "skipped_updates": 0,
        "bottleneck/learner": 1,
        "bottleneck/inference": 0,
    }
    entry |= {f"stage_seconds/{stage}": share * seconds for stage, share in STAGES.items()}
    entry |= {f"stage_seconds/actor_{stage}": 0.5 * seconds for stage in ("env", "policy", "pack")}
    for index, component in enumerate(COMPONENTS):
        entry[f"weight_norm/{component}"] = 5 + index + progress
        entry[f"weight_relative_distance_to_init/{component}"] = 0.1 * (index + 1) * progress
        entry[f"weight_effective_rank/{component}"] = 60 - 5 * index
        entry[f"weight_condition_number/{component}"] = 10.0 ** (1 + index / 3)
        entry[f"dormant_units_ratio/{component}"] = 0.01 * index
    return entry


def lines(count: int = 30, **given: Any) -> list[Line]:
    """A session's."""
    return [line(EVERY * i, seconds=EVERY * i, **given) for i in range(1, count + 1)]


def config(**changed: Any) -> dict[str, Any]:
    """A ``config.yaml``; keys with ``__`` for the dot."""
    found: dict[str, Any] = {
        "mode": "local",
        "seed": 0,
        "run_dir": "somewhere",
        "total_env_steps": 2_500_000,
        "max_seconds": 285.0,
        "env": {"id": "mettagrid/forage", "num_envs": 128, "kwargs": {}},
        "policy": {"kind": "fast"},
        "actor": {"max_policy_lag": 1},
        "learner": {"learning_rate": 0.001, "max_grad_norm": 0.5},
        "metrics": {"port": 0},
    }
    for name, value in changed.items():
        *sections, last = name.split("__")
        here = found
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return found


def summary(last: Line, **changed: Any) -> dict[str, Any]:
    """A ``summary.json`` that fits the last line."""
    sampled, trained = last["env_steps"] + 4000, last["env_steps"]
    return {
        "env_id": "mettagrid/forage",
        "seed": 0,
        "policy_kind": "fast",
        "env_steps": trained,
        "policy_version": last["policy_version"],
        "env_steps_per_second": trained / last["seconds"],
        "wall_seconds": last["seconds"],
        "mean_return": last["mean_return"],
        "random_return": 0.809,
        "max_log_prob_error": last["log_prob_error_max"],
        "log_prob_checks": 600,
        "ledger": {"sampled": sampled, "trained": trained, "in_flight": 0, "dropped": {"shutdown": 4000}},
        "books_balance": True,
        "limit": {"stage": "learner", "sentence": "updates take 93% of the learner's time: fewer optimizer steps"},
        "stopped_by": None,
        "interrupted_by": None,
        "versions": {"python": "3.11.7", "shoal": "0.1.0"},
        **changed,
    }


def write_run(
    path: Path,
    written: Sequence[Line] | None = None,
    *,
    settings: dict[str, Any] | None = None,
    ended: dict[str, Any] | None = None,
    tail: bytes = b"",
    log: Iterable[str] = (),
    evaluations: Sequence[Line] = (),
) -> Path:
    """All files of a run.

    Args:
        path: the run directory.
        written: lines of ``metrics.jsonl``.
        settings: ``config.yaml``.
        ended: ``summary.json``; None leaves it out.
        tail: what stands after the last line.
        log: lines of ``run.log``.
        evaluations: lines of ``evaluation.jsonl``.
    """
    path.mkdir(parents=True)
    text = "".join(json.dumps(entry) + "\n" for entry in (lines() if written is None else written))
    (path / "metrics.jsonl").write_bytes(text.encode() + tail)
    (path / "config.yaml").write_text(yaml.safe_dump(settings or config(run_dir=str(path)), sort_keys=False))
    (path / "run.log").write_text("".join(f"{text}\n" for text in log))
    if evaluations:
        (path / "evaluation.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in evaluations))
    if ended is not None:
        (path / "summary.json").write_text(json.dumps(ended))
        # Runs of these tests end in their own time.
        os.utime(path / "summary.json", (2e9, 2e9))
    return path
