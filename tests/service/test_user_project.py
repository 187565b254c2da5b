"""A user's project whose packages are named like ours trains beside an installed shoal, in every mode."""

from __future__ import annotations

import signal
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from installations import Installation, build, clean, head
from service import read_summary, wait_for

ROOT = Path(__file__).resolve().parents[2]
OWN_PACKAGES = ("actors", "deploy", "envs", "learner", "policy", "tests")
SMALL = (
    "env.id=envs.mine:Mine-v0",
    "env.num_envs=4",
    "actor.unroll_length=8",
    "learner.batch_size=16",
    "learner.epochs=1",
    "learner.minibatches=2",
    "evaluation.random_seconds=0",
    "total_env_steps=600",
    "metrics.port=-1",
)
ENVIRONMENT = '''\
"""Shows where in its episode it is; every package that it imports is the user's."""

import actors, deploy, learner, policy, tests  # noqa: E401
import gymnasium
import numpy as np
from gymnasium import spaces

for package in (actors, deploy, learner, policy, tests):
    assert package.OWNER == "the user", package


class Mine(gymnasium.Env):
    observation_space = spaces.Box(0, 1, (3,), dtype=np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        return self._obs(), float(action), self.steps == 5, False, {}

    def _obs(self):
        return np.full(3, self.steps / 5, np.float32)


gymnasium.register("Mine-v0", Mine)
'''
GAME = '''\
"""Two agents in one environment."""

import numpy as np
import pettingzoo
import policy
from gymnasium import spaces

assert policy.OWNER == "the user"


class Game(pettingzoo.ParallelEnv):
    metadata = {"name": "game"}
    possible_agents = ["a", "b"]

    def observation_space(self, agent):
        return spaces.Box(0, 1, (3,), dtype=np.float32)

    def action_space(self, agent):
        return spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.steps = list(self.possible_agents), 0
        return self._obs(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        over = self.steps == 5
        rewards = {agent: float(action) for agent, action in actions.items()}
        ended = dict.fromkeys(self.agents, over)
        answer = self._obs(), rewards, ended, dict.fromkeys(self.agents, False), {agent: {} for agent in self.agents}
        self.agents = [] if over else self.agents
        return answer

    def _obs(self):
        return {agent: np.full(3, self.steps / 5, np.float32) for agent in self.possible_agents}


def parallel_env():
    return Game()
'''


def train(installed: Installation, *settings: str, cwd: Path) -> dict[str, Any]:
    """A small run that has to end well; its summary."""
    done = installed.run("train", *SMALL, "run_dir=run", *settings, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_summary(cwd / "run")
    assert summary["env_steps"] >= 600
    return summary


@pytest.fixture(scope="session")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """An installation by ``pip install -e .``, started by ``python -m shoal``."""
    made = Installation(tmp_path_factory.mktemp("installed") / "editable", "python", "-m", "shoal")
    made.install(build("editable", source, tmp_path_factory.mktemp("editable")))
    made.see_libraries()
    return made


@pytest.fixture(params=["from_wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> Installation:
    """Both."""
    found: Installation = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The user's folder, from which commands are started."""
    folder = tmp_path / "project"
    for name in OWN_PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text('OWNER = "the user"\n')
    (folder / "envs" / "mine.py").write_text(ENVIRONMENT)
    (folder / "envs" / "game.py").write_text(GAME)
    return folder


def test_the_wheel_holds_one_name_and_all_that_it_needs(wheel: Path) -> None:
    """Catches a wheel that claims other names, takes tests, runs or environments along, or forgets a data file."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"shoal", f"{wheel.stem.rsplit('-', 3)[0]}.dist-info"}
    found = {name.removeprefix("shoal/") for name in names if name.startswith("shoal/")}
    assert {name.split("/")[0] for name in found} == {
        *("__init__.py", "__main__.py", "given.py", "problems.py", "section.py", "py.typed"),
        *("actors", "deploy", "envs", "learner", "policy"),
    }
    packages = [path for name in OWN_PACKAGES[:-1] for path in (ROOT / name).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in packages} <= found
    data = (
        "examples/*.ipynb",
        "settings/configs/*.yaml",
        "report/page.*",
        "monitoring/grafana/**/*.*",
        "monitoring/prometheus/*.yml",
    )
    for pattern in data:
        files = [path for path in (ROOT / "deploy").glob(pattern) if path.name != ".gitignore" and path.is_file()]
        assert files, pattern
        assert {path.relative_to(ROOT).as_posix() for path in files} <= found


def test_an_installed_shoal_trains_where_there_is_nothing_else(from_wheel: Installation, tmp_path: Path) -> None:
    """Catches a wheel that works only beside its checkout."""
    (tmp_path / "empty").mkdir()
    train(from_wheel, "env.id=CartPole-v1", "mode=inline", cwd=tmp_path / "empty")


def test_shoal_is_imported_without_torch_and_ray(from_wheel: Installation, tmp_path: Path) -> None:
    """Catches an ``import shoal`` that takes seconds; what it offers loads on first use."""
    code = (
        "import sys, shoal; heavy = {'torch', 'ray', 'numpy', 'gymnasium'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "assert {'FastPolicy', 'ComponentPolicy', 'TokenObservation'} <= set(dir(shoal)); "
        "from shoal import FastPolicy; assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    done = subprocess.run(
        [from_wheel.python, "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_inline_mode_and_evaluation(installed: Installation, project: Path) -> None:
    """Catches a package of the user's that hides ours or is hidden by it, in this process and in spawned ones."""
    train(installed, "mode=inline", cwd=project)
    played = installed.run("evaluate", "run", "--episodes", 16, "--processes", 2, "--vs", "random", cwd=project)
    assert played.returncode == 0, played.stdout + played.stderr
    assert "envs.mine:Mine-v0, policy version" in played.stdout


def test_local_mode(installed: Installation, project: Path) -> None:
    """Catches Ray workers that find our ``envs`` where the user means theirs, or no shoal at all."""
    train(installed, "mode=local", "actor.num_actors=1", "learner.num_threads=1", cwd=project)


def test_local_mode_with_learners_that_act(editable: Installation, project: Path) -> None:
    """Catches the same in the processes of peer learners."""
    train(editable, "mode=local", "learner.num_learners=2", "placement=colocated", cwd=project)


def test_cluster_mode(installed: Installation, project: Path, tmp_path: Path) -> None:
    """Catches code that is sent to nodes under another name than ``shoal``: on this cluster it is not installed."""
    bare = Installation(tmp_path / "bare", "python")
    bare.see_libraries()
    with head(bare, tmp_path) as address:
        train(installed, "mode=cluster", f"cluster.address={address}", "actor.num_actors=1", cwd=project)


def test_evaluation_during_training(from_wheel: Installation, project: Path) -> None:
    """Catches the process that evaluates looking elsewhere for the user's environment than the one that trains."""
    settings = ("evaluation.every_env_steps=200", "evaluation.episodes=8", "total_env_steps=1000000000")
    process = subprocess.Popen(
        [*from_wheel.command, "train", *SMALL, "mode=inline", "run_dir=run", "max_seconds=600", *settings],
        cwd=project,
        env=clean(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    evaluations = project / "run" / "evaluation.jsonl"
    wait_for(lambda: evaluations.is_file() and "mean_return" in evaluations.read_text(), process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output


def test_environments_in_processes_of_their_own(editable: Installation, project: Path) -> None:
    """Catches environment processes that find another ``envs`` than the process that started them."""
    train(editable, "mode=inline", "env.vectorization=async", cwd=project)


def test_a_pettingzoo_game_of_the_user(editable: Installation, project: Path) -> None:
    """Catches a second way of naming environments that looks elsewhere."""
    pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")
    train(editable, "mode=inline", "env.id=pettingzoo:envs.game:parallel_env", cwd=project)
