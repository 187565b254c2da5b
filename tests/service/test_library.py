"""``import shoal`` in scripts without a main guard, with classes of the script itself, and no end after them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shoal
import torch
from echo_envs import even, mask
from service import read_summary, wait_for

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """\
import shoal, gymnasium, numpy as np
from gymnasium import spaces

class Corridor(gymnasium.Env):
    observation_space = spaces.Dict(where=spaces.Box(0, 1, (3,), np.float32), kind=spaces.Discrete(2))
    action_space = spaces.Discrete(2, start=5)

    def __init__(self, length=5):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert action in (5, 6), action
        self.steps += 1
        return self.observe(), float(action - 5), self.steps == self.length, False, {}

    def observe(self):
        return {"where": np.full(3, self.steps / 10, np.float32), "kind": self.steps % 2}

class MyPolicy(shoal.FastPolicy):
    pass

SMALL = {"env.num_envs": 4, "actor.unroll_length": 8, "learner.batch_size": 16, "total_env_steps": 300}
SMALL |= {"learner.epochs": 1, "learner.minibatches": 2, "evaluation.random_seconds": 0}
"""
LOCAL = {"actor.num_actors": 1, "learner.num_threads": 1}


def script(folder: Path, body: str) -> Path:
    path = folder / "script.py"
    path.write_text(PRELUDE + textwrap.dedent(body))
    return path


def run_script(folder: Path, body: str, timeout: float = 240, *, as_notebook: bool = False) -> str:
    """Run it to its end; its output. A notebook's ``__main__`` has no file, as that of standard input has none."""
    file = script(folder, body)
    done = subprocess.run(
        [sys.executable, "-" if as_notebook else str(file)],
        cwd=folder,
        input=file.read_text() if as_notebook else None,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["inline", "local"])
def test_classes_of_a_script_train_and_are_evaluated(tmp_path: Path, mode: str) -> None:
    """Catches a class of ``__main__`` that other processes look up by name, a script that is run again in every process
    it starts, a second run that finds leftovers of the first, and Ray that the first leaves behind."""
    settings = {"mode": mode, **(LOCAL if mode == "local" else {})}
    said = run_script(
        tmp_path,
        f"""
        print("once")
        for number in range(2):
            SMALL["env.kwargs"] = {{"length": 7}}
            run = shoal.train(Corridor, config=SMALL, policy=MyPolicy, **{settings!r})
            print(number, run.run_dir.name, run.summary["env_steps"] >= 300)
        played = run.evaluate(episodes=8, processes=2)
        print("lengths", set(played.lengths.tolist()))
        action = run.policy.act(Corridor().reset()[0], 0, True)
        assert action in (5, 6)
        import sys
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        """,
        as_notebook=mode == "inline",
    )
    assert said.count("once") == 1
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert "lengths {7}" in said
    assert len(re.findall(r"metrics  http://127.0.0.1:\d+/", said)) == 2
    for run in runs:
        state = json.loads(next((run / "checkpoints").glob("*/state.json")).read_text())
        assert (state["env_id"], state["policy"]["kind"]) == ("__main__:Corridor", "__main__:MyPolicy")
        read_summary(run)
        # What nobody here defines is named, with the way out.
        with pytest.raises(ValueError, match=r"__main__:MyPolicy.*script or notebook"):
            shoal.load_policy(run)
        with pytest.raises(ValueError, match=r"__main__:Corridor.*script or notebook"):
            shoal.evaluate(run)


@pytest.mark.parametrize("mode", ["inline", "local"])
def test_an_optimizer_and_a_schedule_of_a_notebook_train_and_go_on(tmp_path: Path, mode: str) -> None:
    """Catches a class or a function that reaches the run's process and not its learners, and moments that a resumed run
    drops."""
    said = run_script(
        tmp_path,
        f"""
        import torch

        class Halving(torch.optim.Optimizer):
            def __init__(self, params, lr, share=1.0):
                super().__init__(params, {{"lr": lr, "share": share}})

            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for parameter in group["params"]:
                        state = self.state[parameter]
                        state["steps"] = state.get("steps", 0) + 1
                        parameter.sub_(parameter.grad, alpha=group["lr"] * group["share"] / state["steps"])

        for steps in (300, 600):
            learner = {{
                "optimizer": Halving, "optimizer_kwargs": {{"share": 0.5}}, "learning_rate": 0.1, "num_learners": 2,
                "batch_size": 16, "epochs": 1, "minibatches": 1, "desired_kl": 0,
                "schedules": {{"learning_rate": lambda progress: 0.25 if progress else 1.0}},
            }}
            run = shoal.train(
                "recall", run_dir="run", total_env_steps=steps, mode={mode!r}, learner=learner,
                config={{"env.num_envs": 4, "actor.unroll_length": 8, "actor.num_actors": 2}},
            )
            newest = max((run.run_dir / "checkpoints").iterdir())
            state = torch.load(newest / "optimizer.pt", weights_only=True)["optimizer"]
            print("steps", {{one["steps"] for one in state["state"].values()}} == {{run.summary["policy_version"]}})
            print("groups", [(one["share"], one["lr"], len(one["params"]) > 1) for one in state["param_groups"]])
        """,
        as_notebook=True,
    )
    assert said.count("steps True") == 2, said
    assert said.count("groups [(0.5, 0.025, True)]") == 2, said
    assert "begins anew" not in said


def test_the_interpreter_is_as_before(tmp_path: Path) -> None:
    """Catches whatever a run sets for the whole process: a notebook goes on with it."""
    said = run_script(
        tmp_path,
        """
        import logging, os, random, signal, threading, torch, warnings
        shoal.train, shoal.evaluate  # imports set filters of warnings of their own

        class Rude(Corridor):
            def __init__(self, length=5):
                super().__init__(length)
                os.chdir("/")
                os.environ["RUDE"] = "1"
                warnings.simplefilter("ignore")

        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        def seed():
            random.seed(1), np.random.seed(1), torch.manual_seed(1)
        def draws():
            return random.random(), np.random.rand(), float(torch.rand(()))
        def state():
            return (
                torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters),
                dict(os.environ), os.getcwd(), logging.getLogger().handlers, logging.getLogger("shoal").level,
                logging.getLogger("shoal").handlers, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
            )
        seed()
        expected, before = draws(), state()
        seed()
        with torch.no_grad():
            run = shoal.train(Rude, config=SMALL, mode="inline", run_dir="run", progress=False)
            run.evaluate(8, processes=1)
        assert draws() == expected
        after = state()
        assert after == before, [pair for pair in zip(before, after) if pair[0] != pair[1]]
        assert run.run_dir.is_dir()

        def elsewhere():
            shoal.train(Corridor, config=SMALL, mode="inline", run_dir="thread", progress=False)
        thread = threading.Thread(target=elsewhere)
        thread.start(), thread.join()
        assert shoal.Run("thread").summary["env_steps"] >= 300
        """,
    )
    assert said == "", said


@pytest.mark.parametrize("mode", ["local", "cluster"])
def test_the_callers_ray_is_used_and_left_running(tmp_path: Path, mode: str) -> None:
    """Catches a second Ray beside the caller's, a cluster that is left without being asked, and classes of the script
    that do not reach its workers."""
    run_script(
        tmp_path,
        f"""
        import ray
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
        here = ray.get_runtime_context().gcs_address
        run = shoal.train(Corridor, config=SMALL, mode={mode!r}, run_dir="run", progress=False, **{LOCAL!r})
        assert ray.is_initialized() and ray.get_runtime_context().gcs_address == here
        assert run.summary["env_steps"] >= 300
        if {mode!r} == "cluster":
            try:
                shoal.train("recall", mode="cluster", **{{"cluster.address": "127.0.0.1:1"}})
            except shoal.ConfigError as error:
                assert "has joined already" in str(error), error
            else:
                raise AssertionError
        """,
    )
    read_summary(tmp_path / "run")


@pytest.mark.parametrize("mode", ["inline", "local"])
def test_ctrl_c_raises_after_the_checkpoint(tmp_path: Path, mode: str) -> None:
    """Catches an interrupt that ends the interpreter, or that loses the run."""
    settings = {"mode": mode, **(LOCAL if mode == "local" else {})}
    body = f"""
        SMALL["total_env_steps"] = 10**9
        try:
            shoal.train(Corridor, config=SMALL, run_dir="run", **{settings!r})
        except KeyboardInterrupt:
            print("interrupted", shoal.Run("run").summary["interrupted_by"])
        run = shoal.train(Corridor, config=SMALL, run_dir="run", max_seconds=1, **{settings!r})
        print("went on", run.summary["stopped_by"])
        """
    process = start(tmp_path, body)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process=process)
    process.send_signal(signal.SIGINT)
    code, said = process.wait(timeout=600), (tmp_path / "said").read_text()
    assert code == 0, said
    assert "interrupted SIGINT" in said
    assert "went on max_seconds" in said
    assert "continuing from policy version" in said


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    """Catches a run that only the end of the interpreter ends: its environment hangs."""
    process = start(
        tmp_path,
        """
        import time
        class Hangs(Corridor):
            def step(self, action):
                if getattr(self, "total", 0) > 200:
                    open("hangs", "w").close()
                    time.sleep(10**6)
                self.total = getattr(self, "total", 0) + 1
                return super().step(action)
        SMALL["total_env_steps"] = 10**9
        SMALL["checkpoint.every_updates"] = 1
        try:
            shoal.train(Hangs, config=SMALL, run_dir="run", mode="inline")
        except KeyboardInterrupt:
            print("interrupted", sorted(path.name for path in (shoal.Run("run").run_dir / "checkpoints").iterdir())[-1])
        """,
    )
    wait_for((tmp_path / "hangs").exists, process=process)
    process.send_signal(signal.SIGINT)
    log = wait_for(lambda: (tmp_path / "said").read_text().count("interrupt again"), process=process)
    assert log == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=400) == 0, (tmp_path / "said").read_text()
    assert re.search(r"interrupted 0000000\d\d", (tmp_path / "said").read_text())


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    """The script in a session of its own, as a terminal starts it; its output goes to the file ``said``."""
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-u", str(script(folder, body))],
            cwd=folder,
            text=True,
            start_new_session=True,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def test_a_callers_settings_of_torch_change_nothing(tmp_path: Path) -> None:
    """Catches a policy in the caller's type or on its device, and a training in its autocast that says that the memory
    is wrong."""
    said = run_script(
        tmp_path,
        """
        import torch

        def hashes(name):
            run = shoal.train(
                Corridor, config=SMALL, mode="inline", run_dir=name, progress=False, learner={"precision": "float32"}
            )
            return run, run.summary["weights_sha256"]

        run, expected = hashes("plain")
        with torch.autocast("cpu", torch.bfloat16):
            assert hashes("cast")[1] == expected
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        policy = shoal.load_policy(run.run_dir)
        assert {p.dtype for p in policy.network.parameters()} == {torch.float32}
        assert {p.device.type for p in policy.network.parameters()} == {"cpu"}
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
        """,
    )
    assert said == "", said


def test_a_trained_policy_acts_as_the_network_does(tmp_path: Path) -> None:
    """Catches observations in another order than in training, actions in the network's numbers, and a memory that is
    mixed up between environments."""
    run = shoal.train(
        "Pendulum-v1", mode="inline", run_dir=tmp_path / "run", total_env_steps=300, progress=False, **SMALL
    )
    policy = shoal.load_policy(run.run_dir, greedy=True)
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (4, 2, 3)).astype(np.float32)
    is_first = np.array([[True, True], [False, False], [True, False], [False, False]])
    together = [policy.act(obs[t], [7, 8], is_first[t]) for t in range(4)]
    memory = policy.get_memory()
    assert set(memory) == {7, 8}
    apart = shoal.load_policy(run.run_dir / "checkpoints", greedy=True)
    alone = [[apart.act(obs[t, i], env_id, bool(is_first[t, i])) for i, env_id in enumerate((8, 7))] for t in range(4)]
    assert together[0].shape == (2, 1)
    assert alone[0][0].shape == (1,)
    assert np.allclose(np.array(together), np.array(alone), atol=1e-6)
    with torch.inference_mode():
        unrolled, _ = policy.network.unroll(torch.from_numpy(obs), torch.from_numpy(is_first))
    # [-1, 1] stands for the torques from -2 to 2.
    means = (2 * policy.network.actions.mode(unrolled.logits)).clamp(-2, 2).numpy()
    assert np.allclose(np.array(together), means, atol=1e-5)
    # A state that is taken out and put back goes on where it was.
    expected = policy.act(obs[0], [7, 8])
    policy.reset_memory()
    policy.set_memory(memory)
    assert np.allclose(policy.act(obs[0], [7, 8]), expected, atol=1e-6)
    sampled = [shoal.load_policy(run.run_dir, seed=seed).act(obs[0], [0, 1]).tolist() for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for wrong, expected_words in (
        (obs[0, 0, :2], "shape"),
        (np.full(3, np.nan, np.float32), "not finite"),
    ):
        with pytest.raises(ValueError, match=expected_words):
            policy.act(wrong, 0)
    with pytest.raises(ValueError, match="is_first must be bool"):
        policy.act(obs[0], [7, 8], [1, 0])


@pytest.mark.parametrize("case", ["mask in info", "mask in obs"])
def test_a_trained_policy_keeps_to_the_legal_actions(tmp_path: Path, case: str) -> None:
    """Catches a mask in the observation that is read as numbers, and a mask in ``info`` that has no effect."""
    kwargs = {"env.id": "echo_envs:Echo-v0", "env.kwargs": {"case": case}}
    run = shoal.train(mode="inline", run_dir=tmp_path / "run", total_env_steps=300, progress=False, **kwargs, **SMALL)
    for greedy in (False, True):
        policy = shoal.load_policy(run.run_dir, greedy=greedy)
        for t in range(20):
            obs: Any = even(t)
            if case == "mask in obs":
                # The actions count from 2; the second row is the same environment one step on.
                both = {"observation": np.stack([obs, even(t + 1)]), "action_mask": np.stack([mask(t), mask(t + 1)])}
                one, two = policy.act({"observation": obs, "action_mask": mask(t)}), policy.act(both, [1, 2])
            else:
                one = policy.act(obs, action_mask=mask(t))
                two = policy.act(np.stack([obs, even(t + 1)]), [1, 2], action_mask=np.stack([mask(t), mask(t + 1)]))
            assert mask(t)[one - 2] == mask(t)[two[0] - 2] == mask(t + 1)[two[1] - 2] == 1
    if case == "mask in info":
        with pytest.raises(ValueError, match=r"action_mask .* must be 5 numbers 0 or 1"):
            policy.act(even(0), action_mask=np.ones(4))


SMALL = {"env.num_envs": 4, "actor.unroll_length": 8, "learner.batch_size": 16}


def test_a_run_has_its_report_and_summary(tmp_path: Path) -> None:
    """Catches a run object whose methods are not those of the command line."""
    run = shoal.train("recall", mode="inline", run_dir=tmp_path / "run", total_env_steps=300, progress=False, **SMALL)
    assert run.summary["env_steps"] >= 300
    assert run.evaluate(4).episodes >= 4
    # Episodes have at most ten steps: a memory of ten is the whole one, and one of none acts otherwise.
    whole, ten, none = (run.evaluate(64, processes=1, memory_horizon=steps) for steps in (None, 10, 0))
    assert np.array_equal(whole.starts(), none.starts())
    assert abs(whole.mean - ten.mean) < 0.1
    with pytest.raises(ValueError, match="memory_horizon=-1 must not be negative"):
        run.evaluate(4, memory_horizon=-1)
    policy = run.policy
    rows = np.zeros((3, 5), np.float32)
    assert policy.act(rows, range(3)).shape == (3,)
    assert policy.act(rows[0]).shape == ()
    with pytest.raises(ValueError, match=r"expected observations float32 \[1, 5\], got float32 \[1, 4\]"):
        policy.act(rows[0, 1:])
    pytest.importorskip("plotly", reason="needs shoal[report]")
    assert run.report().read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(FileNotFoundError, match="no run directory"):
        shoal.Run(tmp_path / "nothing")
