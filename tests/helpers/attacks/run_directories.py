"""Run directories given to the commands that read them: empty, young, running, damaged, foreign."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from hypothesis import strategies as st
from shoal.deploy.cli import main

from attacks import Attack
from attacks.checkpoints import DAMAGE, damage
from attacks.recorded import seal, train

COMMANDS = {
    "evaluate": ("evaluate", "RUN", "--episodes", "4", "--processes", "1", "--max-episode-steps", "50"),
    "evaluate --json": ("evaluate", "RUN", "--episodes", "4", "--processes", "1", "--json"),
    "memory horizon": ("evaluate", "RUN", "--episodes", "4", "--processes", "1", "--memory-horizon", "0"),
    "against random": ("evaluate", "RUN", "--episodes", "4", "--processes", "1", "--vs", "random", "--vs", "RUN"),
    "report": ("report", "RUN", "--out", "OUT.html"),
    "reports": ("report", "RUN", "PRISTINE", "--out", "OUT.html"),
    "unroll": ("export", "RUN", "--out", "OUT.arrow"),
    "onnx": ("export", "RUN", "--onnx", "OUT.onnx"),
    "replays": ("replay", "RUN"),
    "config": ("config", "show", "--config", "RUN/config.yaml"),
}
STATES = ("ended", "running", "young", "killed early", "empty", "file", "nothing", "foreign")
_commands = st.sampled_from(sorted(set(COMMANDS) - {"onnx"})) | st.sampled_from(("report", "evaluate", "unroll"))


class RunDirectories:
    """A directory that somebody names to a command."""

    attacks = st.fixed_dictionaries(
        {"command": _commands, "state": st.sampled_from((*["ended"] * 6, *STATES))},
        optional={
            "files": st.lists(
                st.tuples(st.integers(0, 40), st.fixed_dictionaries({}, optional=DAMAGE)).map(list), max_size=2
            )
        },
    )

    def __init__(self, directory: Path) -> None:
        self._pristine = train(directory / "pristine")
        with _quiet():
            # Files that only some commands write.
            assert main(["evaluate", str(self._pristine), "--episodes", "4", "--memory-horizon", "0"]) == 0
        for name, text in (("traceback.txt", "ValueError: it was wrong\n"), ("evaluation.jsonl", _EVALUATION)):
            (self._pristine / name).write_text(text)
        self._run = directory / "attacked"
        self._out = directory / "out"
        paths = sorted(path for path in self._pristine.rglob("*") if path.is_file() and path.name != ".lock")
        self._content = {path.relative_to(self._pristine): path.read_bytes() for path in paths}

    def attempt(self, attack: Attack) -> str:
        """Give it to a command, which says what is wrong, with its exit code, or does its work."""
        self._lay_out(attack["state"])
        for file, how in attack.get("files", ()):
            name = Path(file) if isinstance(file, str) else list(self._content)[file % len(self._content)]
            if (path := self._run / name).is_file():
                damage(path, self._content[name], how)
                if how.get("sealed"):
                    seal(path.parent)
        self._out.mkdir(exist_ok=True)
        names = {"RUN": str(self._run), "OUT": str(self._out / "made"), "PRISTINE": str(self._pristine)}
        arguments = list(COMMANDS[attack["command"]])
        for name, path in names.items():
            arguments = [path + each.removeprefix(name) if each.startswith(name) else each for each in arguments]
        with _quiet() as (output, said):
            code = main(arguments)
        assert code in (0, 1, 2), f"exit code {code}"
        assert "Traceback (most recent" not in output.getvalue() + said.getvalue(), said.getvalue()
        if code:
            assert said.getvalue().strip() or output.getvalue().strip(), "it says nothing"
        elif "--json" in arguments:
            json.loads(output.getvalue())
        return "refused" if code else "taken"

    def _lay_out(self, state: str) -> None:
        for path in (self._run, self._out):
            if path.is_file():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
        match state:
            case "file":
                self._run.write_text("no directory")
                return
            case "nothing":
                return
            case "empty":
                self._run.mkdir()
                return
            case "foreign":
                (self._run / "checkpoints" / "000000007").mkdir(parents=True)
                (self._run / "checkpoints" / "step_10.pt").write_bytes(b"PK\x03\x04")
                (self._run / "config.yaml").write_text("algo: sac\nseed: 3\n")
                (self._run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
                return
        left_out = {
            "running": ("summary.json", "traceback.txt"),
            "young": ("summary.json", "checkpoints", "metrics.jsonl", "traceback.txt", "recorder"),
            "killed early": ("summary.json", "checkpoints", "traceback.txt", "recorder"),
        }.get(state, ())
        for name, content in self._content.items():
            if name.parts[0] in left_out:
                continue
            path = self._run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            half = state != "ended" and name.suffix == ".jsonl"
            path.write_bytes(content[: -len(content.splitlines()[-1]) // 2] if half else content)


_EVALUATION = json.dumps(
    {
        "time": 1_795_000_000.0,
        "session": 0,
        "policy_version": 2,
        "env_steps": 100,
        "episodes": 4,
        "mean_return": 0.5,
        "return_ci95": None,
        "mean_length": 9.0,
    }
)


@contextlib.contextmanager
def _quiet() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as said:
        yield output, said


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[RunDirectories]:
    """The runs lie in ``directory``."""
    torch.set_num_threads(1)
    logger = logging.getLogger("shoal")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield RunDirectories(directory)
    finally:
        logger.setLevel(level)
