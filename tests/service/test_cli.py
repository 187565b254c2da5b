"""The command line, as somebody uses it: exit codes, what stands on the terminal, what lies in the run directory."""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import socket
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from service import SMALL, command, read_summary, shoal, start_shoal, wait_for
from shoal import __version__
from shoal.deploy.cli import main
from shoal.learner.checkpoint import find_checkpoint

KEYS = {"env_steps", "policy_version", "env_steps_per_second", "wall_seconds", "mean_return", "random_return"}
KEYS |= {"max_log_prob_error", "actor_restarts", "ledger", "weights_sha256", "policy_lag"}


def train(run: Path, *settings: str, steps: int = 1000) -> int:
    """A small inline run in this process."""
    return main(["train", "mode=inline", *SMALL, f"run_dir={run}", f"total_env_steps={steps}", *settings])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that ended well."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(run, "checkpoint.every_updates=4", "evaluation.random_seconds=5") == 0
    return run


@pytest.mark.parametrize("home", ["empty", "/proc/none"])
def test_a_local_run_keeps_its_token_to_itself(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ~/.ray/auth_token, for which a cluster that is started later asks on every node; and a run that fails
    where HOME cannot be written."""
    if home == "empty":
        (tmp_path / "empty").mkdir()
        home = str(tmp_path / "empty")
    monkeypatch.setenv("HOME", home)
    local = ("mode=local", "actor.num_actors=2", "total_env_steps=400", "run_dir=run")
    done = shoal("train", *SMALL, *local, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not Path(home, ".ray", "auth_token").exists()
    assert read_summary(tmp_path / "run")["books_balance"]


def test_help_answers_at_once(tmp_path: Path) -> None:
    """Catches a heavy import: help and typing errors must not cost seconds (of the processor: others may be busy)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = shoal("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert {"train", "evaluate", "doctor", "config", "export", "bench"} <= set(done.stdout.replace(",", " ").split())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    assert shoal("trian", cwd=tmp_path).returncode == 2


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    """Catches a run that starts with a bad setting, a first problem that hides the rest, a traceback."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        (tmp_path / "file").touch()
        done = shoal(
            "train",
            "env.id=NoSuchThing-v0",
            "learner.device=cuda",
            f"metrics.port={taken.getsockname()[1]}",
            "metrics.address=0.0.0.0",
            f"run_dir={tmp_path / 'file' / 'run'}",
            f"resume={tmp_path / 'nothing'}",
            "learner.batchsize=3",
            "actor.num_actors=many",
            "learner.batch_size=100",
            cwd=tmp_path,
        )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"shoal: {len(lines) - 1} problems, nothing was started:"
    for start in ("learner.batchsize: ", "actor.num_actors: ", "learner.batch_size: ", "env.id: ", "learner.device: "):
        assert sum(line.startswith(f"  {start}") for line in lines) == 1, done.stderr
    for start in ("metrics.port: ", "run_dir: ", "resume: "):
        assert sum(line.startswith(f"  {start}") for line in lines) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("env.id=ALE/Pong-v5", "install ale-py"),
        ("env.id=nosuchpackage:Env-v0", "there is no module 'nosuchpackage'"),
        ("env.id=recal", "did you mean recall?"),
        ("env.kwargs={delay: -1}", "env.id: recall"),
        ("env.kwargs={dealy: 3}", "env.id: recall"),
        ("metrics={address: 256.1.1.1, port: 39999}", "metrics.address: cannot listen"),
        ("metrics={address: .., port: 39999}", "metrics.address: cannot listen"),
        ("run_dir=/proc/shoal/run", "run_dir: cannot write"),
        ("run_dir=/dev/null", "run_dir: /dev/null is a file"),
        (f"run_dir={'x' * 300}", "File name too long"),
        ("resume=/dev/null", "resume: /dev/null is no directory"),
        ("policy.embedding_rows=3", "raise embedding_rows to 4"),
        ("learner.regularization.clip_overrides={lstn: 2}", "clip_overrides names ['lstn']"),
        ("learner.device=cuda", "learner.device: device=cuda is not available here"),
    ],
)
def test_each_bad_setting_is_refused(
    setting: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check before the start that raises, stays silent, or leaves a directory behind."""
    monkeypatch.chdir(tmp_path)
    if "cuda" in setting and __import__("torch").cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["train", *SMALL, "mode=inline", "metrics.port=0", setting]) == 2
    assert expected in capsys.readouterr().err
    # What only the policy itself knows to be wrong is found with the run directory in hand.
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_finished_run_says_what_it_did(trained: Path) -> None:
    """Catches a summary without a promised number, books that do not balance, a missing checkpoint or config."""
    summary = read_summary(trained)
    assert summary.keys() >= KEYS
    assert summary["env_steps"] == summary["ledger"]["trained"] >= 1000
    assert 0.05 < summary["random_return"] < 0.5
    assert 0 <= summary["mean_return"] <= 1
    assert (summary["actor_restarts"], summary["interrupted_by"]) == (0, None)
    assert summary["policy_lag"] == {"mean": 0, "max": 0}
    assert summary["log_prob_checks"] >= summary["policy_version"]
    assert find_checkpoint(trained).policy_version == summary["policy_version"]
    assert len(list((trained / "checkpoints").iterdir())) == 3
    assert main(["config", "validate", "--config", str(trained / "config.yaml")]) == 0


def test_evaluate_plays_what_was_trained(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option of `evaluate` that is not obeyed, and numbers that are no JSON."""

    def evaluate(*options: str) -> dict[str, Any]:
        assert main(["evaluate", str(trained), "--json", "--episodes", "64", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        return found

    plain = evaluate()
    assert plain == evaluate()
    assert plain["episodes"] == 64
    assert plain["env_id"] == "recall"
    assert 0 <= plain["mean_return"] <= 1
    assert 6 <= plain["mean_length"] <= 10
    assert evaluate("--seed", "2")["mean_length"] != plain["mean_length"]
    assert evaluate("--greedy")["mean_return"] == evaluate("--greedy")["mean_return"]
    assert evaluate("--zero-memory")["mean_length"] == plain["mean_length"]
    assert evaluate("--num-envs", "1", "--episodes", "1")["standard_error"] is None
    assert main(["evaluate", str(trained / "checkpoints"), "--episodes", "8"]) == 0
    out = capsys.readouterr().out
    assert "return" in out
    assert "95%" in out


@pytest.mark.parametrize("options", [["RUN", "--episodes", "0"], ["RUN", "--num-envs", "0"], ["NONE"]])
def test_evaluate_refuses(trained: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a silent default in place of a bad number, and a traceback for a path without a checkpoint."""
    assert main(["evaluate", options[0].replace("RUN", str(trained)), *options[1:]]) == 2
    assert "nothing was started" in capsys.readouterr().err


def test_export_is_read_with_plain_arrow(trained: Path, tmp_path: Path) -> None:
    """Catches a file that only our own code can read."""
    file = tmp_path / "unroll.arrow"
    assert main(["export", str(trained), "--out", str(file)]) == 0
    table = pa.ipc.open_stream(file).read_all()
    table.validate(full=True)
    assert table.num_rows == 8
    assert table.column("obs").type.shape == [9, 5]
    assert table.column("action").combine_chunks().to_numpy_ndarray().shape == (8, 8)
    assert int(table.schema.metadata[b"policy_version"]) == read_summary(trained)["policy_version"]
    assert main(["export", str(trained), "--out", str(tmp_path / "no" / "f")]) == 2


def test_the_version_is_that_of_the_release(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a version of its own in the code, and none for a report of a bug."""
    release = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"shoal {release}\n"
    assert __version__ == release


def test_config_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a `show` that is no file to use, a `schema` that is no JSON, a `validate` that lets things pass."""
    assert main(["config", "show", "learner.gamma=0.5"]) == 0
    assert "gamma: 0.5" in capsys.readouterr().out
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"
    assert main(["config", "validate", "--config", "recall"]) == 0
    assert "are loaded by shoal doctor, not here" in capsys.readouterr().out
    assert main(["config", "validate", "learner.gama=1", "sed=1"]) == 2
    assert capsys.readouterr().err.count("did you mean") == 2


def test_resume_goes_on_where_the_run_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches counters that start anew, books that forget, a second run mixed into the first by accident."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert train(run, steps=500) == 0
    first = read_summary(run)
    assert train(run, "resume=never", steps=1000) == 2
    assert "holds checkpoints" in capsys.readouterr().err
    assert read_summary(run) == first
    assert train(run, steps=1000) == 0
    second = read_summary(run)
    assert "continuing from policy version" in capsys.readouterr().out
    assert second["policy_version"] > first["policy_version"]
    assert second["env_steps"] == second["ledger"]["trained"] > first["env_steps"]
    assert second["ledger"]["sampled"] >= second["ledger"]["trained"]
    # From a path, into another directory; what was trained long enough trains no more.
    assert train(other, f"resume={run}", steps=1000) == 0
    assert read_summary(other)["weights_sha256"] == second["weights_sha256"]
    # An older checkpoint in the directory of a newer one would be forgotten at the next start.
    old = run / "checkpoints" / f"{first['policy_version']:09d}"
    assert train(run, f"resume={old}", steps=2000) == 2
    assert "choose another run_dir" in capsys.readouterr().err
    # Another environment than the one that was trained in.
    assert train(run, "env.id=CartPole-v1", steps=2000) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_damaged_checkpoints_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a damaged checkpoint that is loaded, or that silently makes the run begin anew."""
    run = tmp_path / "run"
    assert train(run, "checkpoint.every_updates=4") == 0
    newest, *older = sorted((run / "checkpoints").iterdir(), reverse=True)
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert find_checkpoint(run).path == older[0]
    for path in older:
        (path / "state.json").unlink()
    assert train(run, steps=2000) == 2
    assert "no usable checkpoint" in capsys.readouterr().err


def test_same_seed_same_weights(tmp_path: Path) -> None:
    """Catches anything random that does not follow from the seed."""

    def weights(name: str, *settings: str) -> str:
        assert train(tmp_path / name, "learner.epochs=2", "learner.minibatches=2", *settings, steps=400) == 0
        found: str = read_summary(tmp_path / name)["weights_sha256"]
        return found

    assert weights("a", "seed=3") == weights("b", "seed=3") != weights("c", "seed=4")


def _saved(run: Path, before: set[Path]) -> set[Path]:
    return set((run / "checkpoints").glob("0*")) - before


def test_interrupted_once_saves_and_says_so(tmp_path: Path) -> None:
    """Catches Ctrl-C that loses the run, a second writer in the directory, and SIGTERM that is not like SIGINT."""
    settings = [
        *SMALL,
        "mode=inline",
        "total_env_steps=1000000000",
        "max_seconds=800",
        "run_dir=run",
        "checkpoint.every_updates=5",
    ]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start_shoal("train", *settings, cwd=tmp_path)
        before = _saved(tmp_path / "run", set())
        wait_for(functools.partial(_saved, tmp_path / "run", before), process=process)
        if number is signal.SIGINT:
            second = main(["train", *SMALL, "mode=inline", f"run_dir={tmp_path / 'run'}"])
            assert second == 2
        process.send_signal(number)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == code, output
        assert "Interrupted; saved." in output
        assert "Traceback" not in output
        summary = read_summary(tmp_path / "run")
        assert summary["interrupted_by"] == number.name
        assert find_checkpoint(tmp_path / "run").policy_version == summary["policy_version"]


def test_a_run_in_the_background_of_a_script_ignores_ctrl_c(tmp_path: Path) -> None:
    """Catches Ctrl-C on a script that ends its background runs, and one of them that SIGTERM cannot end."""
    settings = [*SMALL, "mode=inline", "total_env_steps=1e9", "max_seconds=800", "run_dir=run"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start_shoal("train", *settings, "checkpoint.every_updates=5", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    found = _saved(tmp_path / "run", set())
    wait_for(functools.partial(_saved, tmp_path / "run", found), process=process)
    process.send_signal(signal.SIGINT)
    found = _saved(tmp_path / "run", set())
    wait_for(lambda: _saved(tmp_path / "run", set()) - found, process=process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 143, output
    assert read_summary(tmp_path / "run")["interrupted_by"] == "SIGTERM"


def test_interrupted_twice_ends_at_once(tmp_path: Path) -> None:
    """Catches a second Ctrl-C that is ignored, and one that leaves half a checkpoint."""
    # Slow, so that the end after the first signal takes longer than the way of the second.
    env = ("env.id=service_envs:Scripted-v0", "env.kwargs={seconds: 0.003}")
    process = subprocess.Popen(
        command("train", *SMALL, *env, "mode=inline", "run_dir=run", "checkpoint.every_updates=1"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/0*")), process=process)
    process.send_signal(signal.SIGINT)
    assert any("interrupt again to stop at once" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    process.stderr.close()
    assert find_checkpoint(tmp_path / "run").policy_version > 0
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("settings", [["placement=colocated", "learner.num_learners=1"], ["actor.num_actors=2"]])
def test_doctor_measures_what_an_actor_makes_and_a_learner_takes(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches advice that does not follow from the figures beside it; a measurement that leaves something behind."""
    monkeypatch.setattr("shoal.deploy.doctor.measure.MEASURED_SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--measure", *SMALL, *settings, "run_dir=run"]) == 0
    said = capsys.readouterr().out
    acting, learning = (
        float(re.search(rf"{name} +([\d,]+) environment steps/s", said)[1].replace(",", ""))
        for name in ("acting", "learning")
    )
    if "placement=colocated" in settings:
        together = float(re.search(r"together +([\d,]+)", said)[1].replace(",", ""))
        assert together == pytest.approx(1 / (1 / acting + 1 / learning), rel=0.01)
    else:
        enough = float(re.search(r"feeding +([\d.]+) actors", said)[1])
        assert enough == pytest.approx(learning / acting, abs=0.06)
        assert "it has 2" in said
        assert ("actors wait" if enough < 2 else "the learner waits") in said
    assert not (tmp_path / "run").exists()


def test_doctor_explains_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a layout that is told otherwise than it is made, and a problem that a run would only meet later."""
    run = tmp_path / "run"
    assert main(["doctor", f"run_dir={run}", "env.id=recall", "learner.num_learners=3", "metrics.port=0"]) == 0
    said = capsys.readouterr().out
    assert "colocated: learner.num_learners=3" in said
    assert "3, each acting on 16 slots" in said
    assert "48 segments x 32 steps = 1,536 environment steps" in said
    assert said.endswith("ready\n")
    arguments = ["env.id=recall", "learner.num_learners=3", "actor.num_actors=4", "metrics.port=0"]
    assert main(["doctor", f"run_dir={run}", *arguments]) == 2
    assert "actor.num_actors: 4 must be a multiple of the 3 learners" in capsys.readouterr().err
    assert not run.exists()
