"""Decides which torch to install, before anything is installed: pip's own default is a CUDA build of several gigabytes
on Linux, with or without a GPU.

install.sh runs this file with the new environment's Python: standard output is the arguments for pip, one per line
(none: keep what is there), standard error says what was chosen and why. It must never hang: every call has a time
limit.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# The project page of torch on PyTorch's CPU index, as a find-links page: so nothing but torch is taken from there.
PYTORCH_CPU_PAGE = "https://download.pytorch.org/whl/cpu/torch/"
OVERRIDE_HINT = "to take another: make install TORCH=VERSION, or the path or URL of a wheel"

Offers = Callable[[str | None], list[str]]
"""Versions of torch that fit this interpreter: of pip's configured sources (None), or of one find-links page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The inputs of the choice."""

    torch_range: str
    """The project's own requirement, such as ``torch>=2.13``."""
    constraints: tuple[str, ...] = ()
    """Version specifiers for torch from the user's pip constraint files, such as ``<=2.14.1``."""
    override: str = ""
    """The make variable TORCH: a pip requirement, or a bare version."""
    installed: str | None = None
    """Version of the torch that this interpreter already has."""
    system: str = "Linux"
    nvidia_gpu: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Arguments for pip (empty: keep the torch that is there) and the reason in one line."""

    pip_arguments: tuple[str, ...]
    reason: str
    warning: str = ""


def parse_version(version: str) -> tuple[tuple[int, ...], str]:
    """``2.13.0+cpu`` -> ((2, 13), "cpu"); trailing zeros do not count. Pre-releases raise ValueError."""
    match = re.fullmatch(r"v?(\d+(?:\.\d+)*)(?:\+([\w.]+))?", version.strip())
    if match is None:
        raise ValueError(f"not a plain release version: {version!r}")
    numbers = [int(part) for part in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), match[2] or ""


def satisfies(version: str, specifier: str) -> bool:
    """Return whether a release fits a specifier such as ``>=2.10,<3`` (operators of PEP 440, without pre-releases)."""
    try:
        release, label = parse_version(version)
    except ValueError:
        return False
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.fullmatch(r"(~=|==|!=|<=|>=|<|>)\s*([\w.+]+?)(\.\*)?", clause)
        if match is None:
            return False
        operator, bound_text, wildcard = match.groups()
        bound, bound_label = parse_version(bound_text)
        width = bound_text.split("+")[0].count(".") + 1
        padded = release + (0,) * max(0, width - len(release))
        prefix = tuple(int(part) for part in bound_text.split("+")[0].split("."))
        if wildcard:
            equal = padded[:width] == prefix
        else:
            equal = release == bound and (not bound_label or bound_label == label)
        fits = {
            "==": equal,
            "!=": not equal,
            "~=": release >= bound and padded[: width - 1] == prefix[:-1],
            ">=": release >= bound,
            "<=": release <= bound,
            ">": release > bound,
            "<": release < bound,
        }[operator]
        if not fits:
            return False
    return True


def newest_cpu_build(versions: Iterable[str], specifiers: Iterable[str]) -> str | None:
    """The newest version labelled ``+cpu`` that fits every specifier."""
    wanted = list(specifiers)
    builds = [v for v in versions if v.endswith("+cpu") and all(satisfies(v, specifier) for specifier in wanted)]
    return max(builds, key=parse_version, default=None)


def choose(facts: Facts, offers: Offers) -> Choice:
    """The decision. `offers` is asked only where a CPU build has to be found."""
    specifier = facts.torch_range.removeprefix("torch").strip()
    plain = (facts.torch_range,)
    if facts.override:
        words = shlex.split(facts.override)
        if re.fullmatch(r"\d[\w.+]*", words[0]):
            words[0] = f"torch=={words[0]}"
        return Choice(pip_arguments=tuple(words), reason=f"{' '.join(words)}, as TORCH says")
    if facts.installed is not None and satisfies(facts.installed, specifier):
        blind = facts.nvidia_gpu and facts.installed.endswith("+cpu")
        return Choice(
            pip_arguments=(),
            reason=f"keeping torch {facts.installed}, which is installed and fits {facts.torch_range}",
            warning="it is a CPU build and this machine has an NVIDIA GPU; 'make clean' first for the other" * blind,
        )
    if facts.system in ("Darwin", "Windows"):
        return Choice(pip_arguments=plain, reason=f"{facts.torch_range}: PyPI's default build for {facts.system}")
    if facts.nvidia_gpu:
        return Choice(pip_arguments=plain, reason=f"{facts.torch_range} in its CUDA build: there is an NVIDIA GPU")
    wanted = (specifier, *facts.constraints)
    for page, source in ((None, "pip's configured sources"), (PYTORCH_CPU_PAGE, "PyTorch's CPU index")):
        build = newest_cpu_build(offers(page), wanted)
        if build is not None:
            return Choice(
                pip_arguments=(f"torch=={build}", *(("--find-links", page) if page else ())),
                reason=f"torch {build} from {source}: there is no NVIDIA GPU, and the CPU build is far smaller",
            )
    return Choice(
        pip_arguments=plain,
        reason=f"{facts.torch_range} from PyPI",
        warning="no CPU build of torch is within reach, so pip will DOWNLOAD A CUDA BUILD OF SEVERAL GIGABYTES that "
        f"this machine cannot use. Ctrl-C stops it; {OVERRIDE_HINT}",
    )


def has_nvidia_gpu() -> bool:
    """Return whether the driver is loaded here; a CUDA toolkit alone is not a GPU."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return True
    try:
        return b"GPU " in subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def run_pip(arguments: list[str], limit_seconds: float) -> str:
    """The output of a pip command; empty when it failed or took too long."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def offered_versions(page: str | None) -> list[str]:
    """Versions of torch that pip finds for this interpreter, newest first (see `Offers`).

    `pip index versions` honours every source that pip is configured with (index, extra index, find-links) and the
    interpreter's tags, in old pips and new, and downloads no wheel.
    """
    # Time limits: the configured sources must answer anyway, later; a page that is out of reach is given up soon.
    reach = ["--timeout", "15", "--retries", "1"]
    if page is not None:
        reach = ["--no-index", "--find-links", page, "--timeout", "5", "--retries", "0"]
    answer = run_pip(["index", "versions", "torch", *reach], limit_seconds=60 if page is None else 20)
    match = re.search(r"^Available versions:(.*)$", answer, flags=re.MULTILINE)
    return [version.strip() for version in match[1].split(",")] if match else []


def torch_specifiers(constraint_lines: Iterable[str]) -> list[str]:
    """The specifiers for torch in a pip constraint file; lines with environment markers are left to pip."""
    pattern = re.compile(r"\s*torch\s*([<>=!~][^;#]*?)\s*(?:#.*)?", re.IGNORECASE)
    matches = (pattern.fullmatch(line) for line in constraint_lines)
    return [match[1] for match in matches if match]


def configured_constraints() -> tuple[str, ...]:
    """`pip index` lists versions that the user's constraint files forbid: what those say of torch."""
    listed = re.findall(r"^(?:global|install|:env:)\.constraint='(.*)'$", run_pip(["config", "list"], 30), re.MULTILINE)
    found: list[str] = []
    for path in (Path(word) for value in listed for word in value.split()):
        if path.is_file():
            found += torch_specifiers(path.read_text(encoding="utf-8").splitlines())
    return tuple(found)


def project_range(pyproject: Path) -> str:
    """The project's requirement on torch."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(str(line) for line in dependencies if re.match(r"torch\s*[<>=!~]", line))


def gather() -> Facts:
    """The facts of this machine."""
    try:
        installed = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return Facts(
        torch_range=project_range(ROOT / "pyproject.toml"),
        constraints=configured_constraints(),
        override=os.environ.get("TORCH", "").strip(),
        installed=installed,
        system=platform.system(),
        nvidia_gpu=has_nvidia_gpu(),
    )


def main() -> int:
    """Prints the choice; see the module's docstring for the streams."""
    choice = choose(gather(), offered_versions)
    print(f"install: {choice.reason}", file=sys.stderr)
    if choice.warning:
        print(f"install: WARNING: {choice.warning}", file=sys.stderr)
    print("\n".join(choice.pip_arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
