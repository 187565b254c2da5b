"""Minutes of attacks on one target, in processes of their own under limits of memory and time.

What such a process raises, how it dies and what it takes too long for is recorded, and the campaign goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from attacks import Attack, opened

ROUND = 100
"""Attacks that hypothesis draws from one seed."""
MOST_SECONDS = 5
"""Of the processor, for one attack."""
MOST_ASLEEP = 24
"""Looks in a row, 5 s apart, that find the process asleep with one attack."""
CHECKOUT = Path(__file__).resolve().parents[3]


class TooSlow(BaseException):
    """An attack took longer than ``MOST_SECONDS``; no ``except Exception`` of the service may catch it."""


def campaign(name: str, directory: Path, *, minutes: float, first_seed: int, memory: float) -> dict[str, Any]:
    """Attack one target for ``minutes``, with ``memory`` GiB of address space; what was tried, and each fault once."""
    directory.mkdir(parents=True, exist_ok=True)
    until, at_seed = time.monotonic() + 60 * minutes, first_seed
    deaths: list[dict[str, Any]] = []
    while (left := until - time.monotonic()) > 0:
        command = [sys.executable, "-m", "attacks.campaign", name, str(directory), str(left), str(at_seed), str(memory)]
        with (directory / "output").open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            hung = _wait(process, directory)
        if process.returncode or hung:
            how = "it hangs" if hung else f"the process ended with {process.returncode}"
            deaths.append({"error": how, "where": _tail(directory / "output"), "attack": _read(directory / "attack")})
        at_seed = int(_read(directory / "seed") or at_seed) + 1
    told = _read(directory / "progress") or {}
    return {"target": name, **told, "faults": [*(_read(directory / "faults") or {}).values(), *deaths]}


def _wait(process: subprocess.Popen[bytes], directory: Path) -> bool:
    """Wait for the process to end; True where it hung and was ended.

    By its own time on the processor and its sleep, not by the clock: the machine may be busy with other things.
    """
    before, began, asleep = None, 0.0, 0
    while True:
        try:
            process.wait(timeout=5)
            return False
        except subprocess.TimeoutExpired:
            attacked, (sleeps, seconds) = _changed(directory / "attack"), _used(process.pid)
            if attacked != before:
                before, began, asleep = attacked, seconds, 0
            asleep = asleep + 1 if sleeps else 0
            if asleep < MOST_ASLEEP and (attacked is None or seconds - began < 6 * MOST_SECONDS):
                continue
        process.send_signal(signal.SIGABRT)  # its stack goes to the output
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def _changed(file: Path) -> float | None:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_mtime
    return None


def _used(pid: int) -> tuple[bool, float]:
    """Whether a process sleeps, and its seconds on the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0] in "SD", (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _attacked(name: str, directory: Path, seconds: float, first_seed: int, memory: float) -> None:
    """The process that is attacked."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _too_slow)
    told = Counter(_read(directory / "progress") or {})
    faults = _read(directory / "faults") or {}
    until, parent = time.monotonic() + seconds, os.getppid()
    (directory / "work").mkdir(exist_ok=True)
    with opened(name, directory / "work") as target:
        at_seed = first_seed
        while time.monotonic() < until and os.getppid() == parent:
            (directory / "seed").write_text(str(at_seed))

            @seed(at_seed)
            @settings(
                max_examples=ROUND,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(target.attacks)
            def attack_once(attack: Attack) -> None:
                if time.monotonic() > until:
                    return
                # For whoever finds this process dead.
                (directory / "attack").write_text(json.dumps(attack))
                told["attacks"] += 1
                before = time.process_time()
                try:
                    with _limited():
                        told[target.attempt(attack)] += 1
                except (Exception, TooSlow) as error:  # noqa: BLE001  (each is a find)
                    told["faulty"] += 1
                    _record(faults, error, attack)
                told["milliseconds of the processor"] += round(1000 * (time.process_time() - before))
                told["MiB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                for file, content in (("progress", told), ("faults", faults)):
                    (directory / file).write_text(json.dumps(content))

            attack_once()
            at_seed += 1


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {MOST_SECONDS} s of the processor")


def _record(faults: dict[str, Any], error: BaseException, attack: Attack) -> None:
    """Keep the shortest attack for each place that an error came from."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in stack if "attacks/campaign" not in frame.filename]
    where = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in ours[-12:]]
    own = [place for place in where if not place.startswith("/")]
    key = f"{type(error).__name__} {own[-2:]}"
    known = faults.setdefault(
        key, {"error": f"{type(error).__name__}: {error}"[:500], "where": where, "attack": attack, "times": 0}
    )
    known["times"] += 1
    if len(json.dumps(attack)) < len(json.dumps(known["attack"])):
        known |= {"attack": attack, "error": f"{type(error).__name__}: {error}"[:500], "where": where}


def _short(path: str) -> str:
    resolved = Path(path).resolve()
    return str(resolved.relative_to(CHECKOUT)) if resolved.is_relative_to(CHECKOUT) else str(resolved)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _tail(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-30:]


if __name__ == "__main__":
    target_name, place, *numbers = sys.argv[1:]
    _attacked(target_name, Path(place), float(numbers[0]), int(numbers[1]), float(numbers[2]))
