"""A user's package, installed by pip from its wheel, brings environment, policy, loss and callback; in every mode."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installations import Installation, clean, head
from service import read_summary

SETTINGS = (
    "env.id=angling:Pond-v0",
    "env.num_envs=4",
    "policy.kind=angling.nets:Narrow",
    "policy.kwargs={width: 24}",
    "learner.loss=angling.losses:with_activity",
    "learner.loss_kwargs={coefficient: 0.01}",
    "callbacks=[{name: angling.watch:CountCatches, kwargs: {unit: fish}}]",
    "actor.unroll_length=8",
    "learner.batch_size=16",
    "learner.epochs=1",
    "learner.minibatches=2",
    "evaluation.random_seconds=0",
    "total_env_steps=600",
    "metrics.port=-1",
    "run_dir=run",
)
MODULES = {
    "__init__": '''\
        """A pond where waiting pays."""

        import gymnasium
        import numpy as np
        from gymnasium import spaces


        class Pond(gymnasium.Env):
            observation_space = spaces.Box(-1, 1, (3,), dtype=np.float32)
            action_space = spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.steps = 0
                return self._obs(), {}

            def step(self, action):
                self.steps += 1
                return self._obs(), float(action), self.steps == 5, False, {"catch": float(action)}

            def _obs(self):
                return self.np_random.uniform(-1, 1, 3).astype(np.float32)


        gymnasium.register("Pond-v0", Pond)
        ''',
    "nets": """\
        import shoal
        import torch


        class Narrow(shoal.RecurrentPolicy):
            def __init__(self, observation, actions, embedding_rows, *, action_rows=None, trained_observation=None,
                         initialization=None, width=16):
                super().__init__(observation, actions, embedding_rows, action_rows=action_rows,
                                 trained_observation=trained_observation, hidden=width)
                self.body = torch.nn.Linear(self.trained_observation.shape[0], width)
                self.lstm = torch.nn.LSTM(width, width, num_layers=2)
                self.actor = torch.nn.Linear(width, self.num_known_actions)
                self.value_head = torch.nn.Linear(width, 1)

            def encode(self, obs):
                return torch.tanh(self.body(self.network_input(obs)))

            def heads(self, core):
                return shoal.PolicyOutput(self.logits(core), self.in_reward_units(self.value_head(core).squeeze(-1)))

            def logits(self, core):
                return self.in_order(self.actor(core))
        """,
    "losses": """\
        import shoal


        def with_activity(inputs, coefficient):
            terms = shoal.ppo_loss(inputs)
            terms["activity"] = inputs.mean(inputs.core.square().mean(-1))
            terms["loss"] = terms["loss"] + coefficient * terms["activity"]
            return terms
        """,
    "watch": """\
        import shoal


        class CountCatches(shoal.Callback):
            def __init__(self, unit):
                self.unit, self.caught = unit, 0.0

            def on_update(self, run, update):
                self.caught += 1
                return {f"{self.unit}/updates": self.caught}
        """,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the user's package."""
    project = tmp_path_factory.mktemp("angling")
    (project / "angling").mkdir()
    for name, text in MODULES.items():
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (project / "angling" / f"{name}.py").write_text("\n".join(lines) + "\n")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "angling"\nversion = "1.0"\n[tool.setuptools]\npackages = ["angling"]\n'
    )
    code = f"import setuptools.build_meta as backend; backend.build_wheel({str(project)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(project.glob("*.whl"))


def shoal_with(wheels: list[Path], folder: Path, *command: str) -> Installation:
    """An environment of its own with these wheels."""
    made = Installation(folder, *command)
    for wheel in wheels:
        made.install(wheel)
    made.see_libraries()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """shoal and the user's package, side by side."""
    return shoal_with([wheel, package], tmp_path_factory.mktemp("both") / "venv", "shoal")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder, from which commands are started."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def check(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    """The run ended well, and all four parts took part in it."""
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(folder / "run")
    assert summary["env_steps"] >= 600
    assert summary["books_balance"]
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["callback/fish/updates"] == summary["policy_version"] > 0
    assert last["loss/activity"] > 0
    assert "angling.nets:Narrow" in (folder / "run" / "config.yaml").read_text()


@pytest.fixture
def trained(installed: Installation, here: Path) -> Path:
    """The run directory of a run in one process."""
    check(here, installed.run("train", *SETTINGS, "mode=inline", cwd=here))
    return here / "run"


def test_one_process_and_what_plays_afterwards(
    installed: Installation, from_wheel: Installation, trained: Path, tmp_path: Path
) -> None:
    """Catches parts that are found while training only; and a missing package that is told as a traceback."""
    played = installed.run("evaluate", "run", "--episodes", 8, "--processes", 2, cwd=trained.parent)
    assert played.returncode == 0, played.stdout + played.stderr
    resumed = installed.run(
        "train", *SETTINGS, "mode=inline", "total_env_steps=1200", "resume=auto", cwd=trained.parent
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert read_summary(trained)["env_steps"] >= 1200
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(trained, elsewhere / "run")
    for command in (
        ("evaluate", "run"),
        ("train", *SETTINGS, "mode=inline", "total_env_steps=1800"),
        ("export", "run", "--onnx", "policy.onnx"),
    ):
        done = from_wheel.run(*command, cwd=elsewhere)
        assert done.returncode == 2, (command, done.stdout + done.stderr)
        assert "angling" in done.stderr
        assert "install" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    code = "import shoal; shoal.load_policy('run')"
    done = subprocess.run(
        [from_wheel.python, "-c", code], cwd=elsewhere, env=clean(), capture_output=True, text=True, timeout=60
    )
    assert "angling" in done.stderr.splitlines()[-1]
    assert "install" in done.stderr.splitlines()[-1]


def test_local_mode(installed: Installation, here: Path) -> None:
    """Catches actors that look for the package elsewhere than the process that started them."""
    check(
        here, installed.run("train", *SETTINGS, "mode=local", "actor.num_actors=2", "learner.num_threads=1", cwd=here)
    )


@pytest.fixture
def nodes_without_it(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster whose nodes have neither shoal nor the package."""
    bare = shoal_with([], tmp_path / "bare", "python")
    with head(bare, tmp_path) as address:
        yield address


def test_cluster_mode(installed: Installation, package: Path, here: Path, nodes_without_it: str) -> None:
    """Catches a cluster that lacks the package and is found out by an actor's traceback; and one that is sent it."""
    cluster = ("mode=cluster", f"cluster.address={nodes_without_it}", "actor.num_actors=1")
    done = installed.run("train", *SETTINGS, *cluster, cwd=here)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "angling" in done.stderr
    assert "cluster.runtime_env" in done.stderr
    sent = f"cluster.runtime_env={{py_modules: ['{package}']}}"
    check(here, installed.run("train", *SETTINGS, *cluster, sent, cwd=here))


def test_modules_beside_the_run_are_sent_to_a_cluster(
    from_wheel: Installation, here: Path, nodes_without_it: str
) -> None:
    """Catches an environment of the current directory that works on one machine and fails on every other node."""
    (here / "my_env.py").write_text(
        "import gymnasium, numpy as np\nfrom gymnasium import spaces\nfrom my_tools import seen\n"
        "class MyEnv(gymnasium.Env):\n"
        "    observation_space, action_space = spaces.Box(0, 1, (3,), np.float32), spaces.Discrete(2)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n        self.t = 0\n        return seen(self), {}\n"
        "    def step(self, action):\n"
        "        self.t += 1\n        return seen(self), float(action), self.t == 7, False, {}\n"
    )
    (here / "my_tools.py").write_text(
        "import numpy as np\ndef seen(env):\n    return np.full(3, env.t / 7, np.float32)\n"
    )
    (here / "my_notes.py").write_text("raise RuntimeError('nobody asked for this')\n")
    cluster = ("mode=cluster", f"cluster.address={nodes_without_it}", "actor.num_actors=1", "metrics.port=-1")
    small = ("total_env_steps=600", "env.num_envs=4", "actor.unroll_length=8", "learner.batch_size=4", "run_dir=run")
    done = from_wheel.run("train", "env.id=my_env:MyEnv", *small, *cluster, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sends    my_env.py, my_tools.py to every node" in done.stdout
    assert read_summary(here / "run")["books_balance"]
