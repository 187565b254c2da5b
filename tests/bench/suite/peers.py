"""Other libraries on the rows of the suite, with the settings that their own projects recommend."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from suite import curve, processes
from suite.rows import Row
from suite.trial import ROOT, Asked, Trial

HERE = ROOT / "tests" / "bench" / "peers"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An adapter in ``peers/``, and the virtual environment that it runs in."""

    script: str
    venv: str


PEERS = {
    "sb3-ppo": Peer(script="suite_sb3.py", venv="sb3"),
    "sb3-recurrent": Peer(script="suite_sb3.py", venv="sb3"),
    "sample-factory": Peer(script="suite_sample_factory.py", venv="sample-factory"),
}


def recommended(system: str, row: str) -> dict[str, Any] | None:
    """What the peer's project recommends for a row (``recommended.yaml``); None where there is nothing of the kind."""
    settings = yaml.safe_load((Path(__file__).parent / "recommended.yaml").read_text())[system].get(row)
    return settings and dict(settings)


def train(row: Row, asked: Asked, directory: Path, python: Path) -> Trial:
    """Train and evaluate in ``directory``, which is made, with the interpreter of the peer's virtual environment.

    Raises:
        processes.Failed: the adapter did not end with 0.
    """
    settings = recommended(asked.system, asked.row) or {}
    entry = settings.pop("entry")
    question = {
        "env_id": row.env_id,
        "env_kwargs": settings.pop("env_kwargs", {}),
        "env_steps": asked.budget,
        "seed": asked.seed,
        "settings": settings,
        "episodes": curve.EPISODES,
        "directory": str(directory / "episodes"),
    }
    (directory / "episodes").mkdir(parents=True)
    # The task that is ours comes with our package, whose name is not that of the checkout.
    (directory / "source").mkdir()
    (directory / "source" / "shoal").symlink_to(ROOT)
    began = time.time()
    words = [str(python), str(HERE / PEERS[asked.system].script), asked.system, json.dumps(question)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{directory / 'source'}"}
    said = processes.run(words, log=directory / "train.log", cwd=directory, environment=environment)
    told = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"sampled"')))
    drawn = curve.of_episodes(directory / "episodes", began)
    return Trial(
        asked=asked,
        command=f"{entry}: {json.dumps(settings)}",
        seconds=told["ended"] - began,
        steps_per_second=drawn.rate,
        reached=drawn.reached(asked.threshold, asked.budget),
        best=drawn.best(asked.budget),
        sampled=told["sampled"],
        greedy=told["greedy"],
        curve=drawn.thinned(),
    )
