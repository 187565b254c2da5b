"""`shoal report`: read runs, write a page."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from shoal.problems import Problems, problems_of

NEEDED = ("plotly", "jinja2")
FILE = "report.html"


class CannotReport(Problems):
    """The report cannot be made; nothing was written."""


def write_report(paths: Sequence[Path], out: Path | None) -> Path:
    """Write the page of the runs in ``paths``; return its path.

    Args:
        paths: run directories; one of several policies is compared with itself, policy by policy.
        out: the file; None is ``report.html`` in the run directory, or in the current directory for several runs.

    Raises:
        CannotReport: a path is no run, libraries are missing, runs cannot be compared, or ``out`` cannot be written.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotReport(
            f"report: {' and '.join(missing)} must be installed: pip install 'shoal[report]' "
            "(in a checkout: .venv/bin/pip install -e '.[report]')"
        )
    from shoal.deploy.report.one_run import page_of_run
    from shoal.deploy.report.page import render
    from shoal.deploy.report.recorded_run import read_run
    from shoal.deploy.report.several_runs import page_of_runs
    from shoal.learner.config import POLICIES

    runs, problems = [], []
    default = paths[0] / FILE if len(paths) == 1 else Path(FILE)
    # A run of several policies is read as one of each.
    paths = [each for path in paths for each in (sorted((path / POLICIES).glob("*/")) or [path])]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            problems.append(f"{path}: is named twice; name every run once")
            continue
        try:
            runs.append(read_run(path))
        except ValueError as error:
            problems.append(str(error))
    out = out or default
    problems += _check(out)
    if problems:
        raise CannotReport(*problems)
    try:
        page = render(page_of_run(runs[0], out.parent) if len(runs) == 1 else page_of_runs(runs))
    except ValueError as error:
        raise CannotReport(*problems_of(error)) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise CannotReport(f"--out {out}: cannot be written: {error}") from error
    return out


def _check(out: Path) -> list[str]:
    """Refuse to overwrite a file that is not a report."""
    from shoal.deploy.report.page import GENERATOR

    if out.is_dir():
        return [f"--out {out}: is a directory; name a file, e.g. {out / FILE}"]
    if not out.exists():
        return []
    try:
        with out.open(encoding="utf-8", errors="replace") as file:
            start = file.read(2000)
    except OSError as error:
        return [f"--out {out}: {error}"]
    if start and f'content="{GENERATOR}"' not in start:
        return [f"--out {out}: is there and is no report; name another file, or remove it"]
    return []
