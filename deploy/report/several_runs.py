"""The page of several runs of one environment."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shoal.deploy.monitoring.intervals import confidence_interval, difference
from shoal.deploy.report import headline
from shoal.deploy.report.comparison import Band, Curve, Group, band, common_end, group_runs, rate_curve, value_at
from shoal.deploy.report.figure import GREY, STEPS, Figure, Line, style
from shoal.deploy.report.page import LegendEntry, Note, Page, Section, Table
from shoal.deploy.report.recorded_metrics import Numbers, thin
from shoal.deploy.report.recorded_run import RecordedRun
from shoal.deploy.report.run_plots import time_unit
from shoal.deploy.report.text import count, margin, moment, number, several


def page_of_runs(runs: Sequence[RecordedRun]) -> Page:
    """Return a page that compares groups of runs, and lists each run in a table.

    Raises:
        ValueError: the runs are of different environments.
    """
    environments: dict[str, Path] = {}
    for run in runs:
        environments.setdefault(run.env_id, run.path)
    if len(environments) > 1:
        listed = "; ".join(f"{path} is of {env_id or 'an unknown one'}" for env_id, path in environments.items())
        raise ValueError(f"returns of different environments cannot be compared: {listed}. Make a report of each.")
    groups = group_runs(runs)
    looks = {group.name: style(index) for index, group in enumerate(groups)}
    alike = len(groups) == 1
    sections = [
        Section("results", "Results", "", [_results(groups, runs), *_warnings(groups), *_comparison(groups)]),
        Section(
            "curves",
            "Curves",
            _how_to_read(groups),
            _figures(groups, looks),
            [LegendEntry(name, *look) for name, look in looks.items()] if not alike else [],
        ),
        Section("differences", "Differences", "", _differences(groups)),
        Section("runs", "Every run", "", [_runs(groups)]),
    ]
    seeds = f"{several(len(runs), 'run')}, all with the same settings but the seed" if alike else ""
    what = seeds or f"{several(len(runs), 'run')} with {len(groups)} different settings"
    return Page(
        title=f"{next(iter(environments)) or 'Runs'}: {what}",
        lead=[_lead(groups)],
        sections=[section for section in sections if section.blocks],
        made=f"Made by shoal report at {moment(time.time())}. Drag in a plot to zoom, double-click to go back; click "
        "a name above the plots to hide its lines.",
    )


class _Compared(NamedTuple):
    key: str
    title: str
    unit: str
    caption: str
    curve: Curve
    log: bool = False


def _column(name: str) -> Curve:
    return lambda run: run.metrics.curve(name)


def _evaluated(run: RecordedRun) -> tuple[Numbers, Numbers]:
    points = [(evaluation.env_steps, evaluation.mean_return) for evaluation in run.evaluations]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


_COMPARED = (
    _Compared(
        "return",
        "Return",
        "mean return of an episode",
        "The mean of the last 256 episodes. Good: high, early, and with a narrow band.",
        _column("mean_return"),
    ),
    _Compared(
        "evaluation",
        "Evaluated return",
        "mean return of an episode",
        "Played with fixed weights, apart from training. Good: as the return.",
        _evaluated,
    ),
    _Compared(
        "episode-length",
        "Episode length",
        "steps, mean",
        "The environment decides what is good: longer where failing ends an episode, shorter where succeeding does.",
        _column("episode_length_steps/mean"),
    ),
    _Compared(
        "speed",
        "Speed",
        "environment steps per second",
        "Trained. To be compared only between runs on one machine that had nothing else to do.",
        lambda run: rate_curve(run, "trained_env_steps"),
    ),
    _Compared(
        "entropy",
        "Entropy of the policy",
        "nats",
        "Good: it falls slowly; at 0 the policy explores nothing.",
        _column("loss/entropy"),
    ),
    _Compared(
        "value-loss",
        "Value loss",
        "loss",
        "Good: it settles; it may grow with the returns.",
        _column("loss/value_loss"),
    ),
    _Compared(
        "explained-variance",
        "Explained variance of the value function",
        "share",
        "Good: towards 1, a perfect prediction of returns.",
        _column("loss/explained_variance"),
    ),
    _Compared(
        "kl",
        "How far an update moves the policy",
        "KL divergence, nats",
        "Good: below about 0.05.",
        _column("loss/approx_kl"),
    ),
    _Compared(
        "gradient",
        "Gradient norm before clipping",
        "L2 norm (log scale)",
        "Good: steady, without jumps by powers of ten.",
        _column("loss/grad_norm"),
        log=True,
    ),
    _Compared(
        "lag",
        "Policy lag",
        "versions, mean",
        "Updates between acting and training on what was acted. Good: low.",
        _column("policy_lag_versions/mean"),
    ),
)


def _figures(groups: Sequence[Group], looks: dict[str, tuple[str, str]]) -> list[Figure]:
    unit, label = time_unit(max(float(run.metrics.seconds[-1]) for group in groups for run in group.runs))
    found = []
    for key, title, of, caption, curve, log in _COMPARED:
        lines: list[Line] = []
        seen: list[Numbers] = []
        for group in groups:
            color, dash = looks[group.name]
            each = [xy for run in group.runs if len((xy := curve(run))[0])]
            seen += [y for _, y in each]
            together = band(each) if len(each) == len(group.runs) else None
            if together is not None:
                lines.append(_line(group.name, together, color, dash, _clock(group.runs, unit)))
            if together is None or (len(groups) == 1 and len(each) > 1):
                lines += [
                    _faint(group.name, len(each), *curve(run), color, _clock([run], unit))
                    for run in group.runs
                    if len(curve(run)[0])
                ]
        if key == "return" and (random := _random(groups, unit)):
            lines += random
            levels = ", ".join(_level_of(line, random) for line in random)
            caption += f" Dotted: a policy that acts at random ({levels})."
        if seen:
            # The interval of two or three runs may be wider than all curves; it does not set the range of the axis.
            low, high = min(float(y.min()) for y in seen), max(float(y.max()) for y in seen)
            margin = 0.25 * (high - low) or 0.5 * abs(high) or 1.0
            y_range = None if log else (0.0 if low >= 0 else low - margin, high + margin)
            found.append(
                Figure(
                    key=key,
                    title=title,
                    caption=caption,
                    x_label=STEPS,
                    y_label=of,
                    lines=lines,
                    other_label=label,
                    y_range=y_range,
                    log=log,
                    legend="several" if key == "return" and len(groups) == 1 else "shared",
                )
            )
    return found


Clock = tuple[Numbers, Numbers]


def _clock(runs: Sequence[RecordedRun], unit: float) -> Clock:
    """Return environment steps and the time at which these runs had made them, on average."""
    clocks = [(run.metrics.steps[run.metrics.kept], run.metrics.seconds[run.metrics.kept] / unit) for run in runs]
    together = band(clocks)
    return (together.x, together.mean) if together is not None else clocks[0]


def _line(name: str, together: Band, color: str, dash: str, clock: Clock) -> Line:
    return Line(
        name=name,
        x=together.x,
        y=together.mean,
        band=together.half_width,
        color=color,
        dash=dash,
        width=2.5,
        clock=clock,
    )


def _faint(name: str, many: int, x: Numbers, y: Numbers, color: str, clock: Clock) -> Line:
    x, y = thin(x, y, max(50, 1000 // many))
    return Line(name=f"{name}, each", x=x, y=y, color=color if many == 1 else GREY, width=1, clock=clock, quiet=True)


def _random(groups: Sequence[Group], unit: float = 1.0) -> list[Line]:
    """The return of a random policy, as a line; one for each of several policies of a run, whose agents earn others."""
    found: dict[str, list[float]] = {}
    for group in groups:
        for run in group.runs:
            if (value := headline.final_random_return(run)) is not None:
                found.setdefault(run.config.get("trained_policy", ""), []).append(value)
    if not found:
        return []
    end = max(float(run.metrics.steps[-1]) for group in groups for run in group.runs)
    longest = max(float(run.metrics.seconds[-1]) for group in groups for run in group.runs)
    x = np.array([0.0, end])
    clock = x, np.array([0.0, longest / unit])
    return [
        Line(
            name=f"a random policy{f' as {policy}' if policy else ''}",
            x=x,
            y=np.full(2, sum(values) / len(values)),
            color=GREY,
            dash="dot",
            width=1.5,
            clock=clock,
            quiet=True,
        )
        for policy, values in found.items()
    ]


def _level_of(line: Line, random: Sequence[Line]) -> str:
    level = number(float(line.y[0]))
    return level if len(random) == 1 else f"{line.name.removeprefix('a random policy ')} {level}"


def _final(group: Group) -> list[float]:
    return [value for run in group.runs if (value := run.final_return) is not None]


def _mean_and_interval(values: Sequence[float]) -> str:
    """Return the mean with its 95% interval as text."""
    mean, half = confidence_interval(values)
    if math.isnan(mean):
        return "-"
    return number(mean) if math.isnan(half) else f"{number(mean)} {margin(half)}"


def _lead(groups: Sequence[Group]) -> Note:
    ranked = sorted((group for group in groups if _final(group)), key=lambda g: -confidence_interval(_final(g))[0])
    if not ranked:
        return Note("No episode has ended in any of them.", "open")
    best = ranked[0]
    random = _random(groups)
    against = "; a random policy gets " + ", ".join(_level_of(line, random) for line in random) if random else ""
    if len(groups) == 1:
        return Note(
            f"Return at the end: {_mean_and_interval(_final(best))} (mean over seeds and its 95% interval){against}."
        )
    text = f"Highest return at the end: {_mean_and_interval(_final(best))}, {best.name}{against}."
    if len(ranked) > 1:
        apart = difference(_final(best), _final(ranked[1]), paired=False)
        if math.isnan(apart.half_width):
            text += " Whether that is more than chance cannot be said of single runs: give each setting several seeds."
        else:
            beyond = "more than chance explains" if apart.is_beyond_noise else "not more than chance may explain"
            text += (
                f" Its distance to the next, {ranked[1].name}, is {number(apart.mean)} "
                f"{margin(apart.half_width)} (95%): {beyond}."
            )
    return Note(text)


def _results(groups: Sequence[Group], runs: Sequence[RecordedRun]) -> Table:
    step = common_end(runs)
    header = ["", "runs", "return at the end", "lowest", "highest", f"return at {count(step)} steps", "steps/s"]
    rows = []
    for group in groups:
        final = _final(group)
        there = [v for run in group.runs if (v := value_at(run, "mean_return", step)) is not None]
        speeds = [run.total("trained_env_steps") / float(run.metrics.seconds[-1]) for run in group.runs]
        low, high = (min(final), max(final)) if final else (None, None)
        rows.append(
            [
                group.name,
                str(len(group.runs)),
                _mean_and_interval(final),
                number(low),
                number(high),
                _mean_and_interval(there),
                _mean_and_interval(speeds),
            ]
        )
    note = (
        "Mean over the runs of a group, \u00b1 half of its 95% interval (Student's t, over seeds). Return: of the last "
        "256 episodes of training. All runs have reached the steps of the last but one column."
    )
    return Table("Returns", header, rows, note)


def _comparison(groups: Sequence[Group]) -> list[Table]:
    """Compare each group with the first."""
    first, *others = groups
    rows = []
    for group in others:
        if _final(group) and _final(first):
            apart = difference(_final(group), _final(first), paired=False)
            known = not math.isnan(apart.half_width)
            interval = margin(apart.half_width) if known else "unknown"
            beyond = ("yes" if apart.is_beyond_noise else "no") if known else "needs two seeds of each"
            rows.append([group.name, number(apart.mean), interval, beyond])
    if not rows:
        return []
    return [
        Table(
            f"Against {first.name}",
            ["", "difference of returns", "95% interval", "beyond chance"],
            rows,
            "Welch's interval. Of many settings compared at once, one in twenty looks different by chance.",
        )
    ]


def _warnings(groups: Sequence[Group]) -> list[Note]:
    notes = []
    ends = sorted(run.env_steps for group in groups for run in group.runs)
    if ends[0] < 0.95 * ends[-1]:
        text = f"The runs have come to different numbers of environment steps, {count(ends[0])} to {count(ends[-1])}: "
        notes.append(Note(f"{text}compare returns where all have been, in the last but one column.", "open"))
    for group in groups:
        twice = sorted({seed for seed in group.seeds if group.seeds.count(seed) > 1})
        if twice:
            notes.append(
                Note(
                    f"{group.name}: seed {', '.join(twice)} more than once. Runs of one seed are no independent runs; "
                    "the interval is too narrow.",
                    "open",
                )
            )
        if unfinished := [run.name for run in group.runs if run.summary is None or run.failure]:
            notes.append(Note(f"{group.name}: not finished or failed: {', '.join(unfinished)}.", "open"))
        if damaged := [run.name for run in group.runs if run.metrics.skipped]:
            notes.append(
                Note(f"{group.name}: lines that could not be read were left out of {', '.join(damaged)}.", "open")
            )
    return notes


def _how_to_read(groups: Sequence[Group]) -> str:
    if all(len(group.runs) == 1 for group in groups):
        return "One line for each run. Several seeds of each setting would say how much of a difference is chance."
    return (
        "Lines are means over the seeds of a group, bands their 95% intervals (Student's t), where all of its runs "
        "have data. The band of two or three seeds is wide, and may leave the frame."
    )


def _differences(groups: Sequence[Group]) -> list[Table | Note]:
    names = list(groups[0].settings)
    if not names:
        return [Note("Nothing but seeds.")]
    rows = [[name, *(group.settings[name] for group in groups)] for name in names]
    return [Table("Settings", ["setting", *(group.name for group in groups)], rows, text=True)]


def _runs(groups: Sequence[Group]) -> Table:
    header = ["run", "group", "seed", "return at the end", "environment steps", "training", "ended"]
    rows = []
    for group in groups:
        for run in group.runs:
            state = "failed" if run.failure else "no summary" if run.summary is None else "interrupted"
            if run.summary is not None and not run.failure and not run.summary.get("interrupted_by"):
                state = "well"
            seconds = float(run.metrics.seconds[-1])
            final, seed = number(run.final_return), str(run.setting("seed"))
            rows.append([str(run.path), group.name, seed, final, count(run.env_steps), f"{seconds:,.0f} s", state])
    return Table("Runs", header, rows, "shoal report RUN shows one by itself.", text=True)
