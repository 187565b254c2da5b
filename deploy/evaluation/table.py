"""The output of ``shoal evaluate``: a table, or one JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shoal.deploy.evaluation.evaluate import Side, compare
from shoal.deploy.evaluation.saved_run import trained_arguments
from shoal.deploy.monitoring.intervals import Difference, confidence_interval
from shoal.envs.play import Episodes
from shoal.learner.checkpoint import Checkpoint


class Played(NamedTuple):
    """A side and its episodes."""

    side: Side
    episodes: Episodes


class Recorded(NamedTuple):
    """A film or replay."""

    file: Path
    returned: float
    """Mean return of its agents."""
    length: float


class Filmed(NamedTuple):
    """A film of a game of several policies."""

    file: Path
    returns: Mapping[str, float | None]
    """Mean return of the agents of every policy, by its name; None where none of them was in the game."""
    length: int
    """Steps of its longest episode."""


def recorded(files: Sequence[Path], episodes: Episodes) -> list[Recorded]:
    """Each file with what was played in it."""
    returns, lengths = episodes.by_environment(episodes.returns), episodes.by_environment(episodes.lengths)
    return [Recorded(*one) for one in zip(files, returns.tolist(), lengths.tolist(), strict=True)]


def lines(own: Played, others: Sequence[Played], recordings: Sequence[Recorded]) -> list[str]:
    """The table as lines of text."""
    side, episodes = own
    checkpoint = side.checkpoint
    assert checkpoint is not None
    together = len(episodes.starts())
    shared = "" if together == episodes.episodes else f", {together} of all agents of an environment together"
    said = [
        f"{side.setup.env_id}, policy version {checkpoint.policy_version}, actions {side.manner}",
        f"  episodes  {episodes.episodes} (one per agent{shared}), seed {side.setup.seed}",
        "",
        *columns(
            ["", "return", "95% of the mean", "lowest", "median", "highest", "steps", "terminated"],
            [_row(played) for played in (own, *others)],
        ),
    ]
    said += _by_number(own.episodes)
    said += [""] * any(len(played.episodes.metrics) or played.episodes.cut.any() for played in (own, *others))
    for played in (own, *others):
        of = f" of {played.side.label}" if others else ""
        if cut := int(played.episodes.cut.sum()):
            steps = int(played.episodes.lengths.max())
            said.append(
                f"  cut       {cut} of {played.episodes.episodes} episodes{of} at {steps:,} steps "
                "(--max-episode-steps): their returns are those up to there"
            )
        said += [f"  {name}  {mean:.6g}{of}" for name, mean in _metrics(played.episodes).items()]
    if (trained := checkpoint.state["mean_return"]) is not None:
        where = "" if side.setup.env_id == checkpoint.state["env_id"] else f" in {checkpoint.state['env_id']}"
        said += ["", f"  training  {trained:.3f} over its last episodes{where}"]
    if others:
        found = [(played.side, compare(episodes, played.episodes)) for played in others]
        rows = [
            [
                f"{side.label} - {other.label}",
                f"{difference.mean:+.3f}",
                interval(difference.mean, difference.half_width, "+.3f"),
                "same starts" if difference.paired else "independent",
                _significance(difference),
            ]
            for other, difference in found
        ]
        said += ["", *columns(["", "difference", "95% of it", "episodes", ""], rows)]
        said += [
            f"  {other.label} was trained in {trained_in}"
            for other, _ in found
            if (trained_in := _other_environment(other))
        ]
    if recordings:
        said += ["", *(f"  {one.file}  return {one.returned:.3f}, {one.length:g} steps" for one in recordings)]
    return said


def to_json(own: Played, others: Sequence[Played], recordings: Sequence[Recorded]) -> dict[str, Any]:
    """One object of plain data; None for what there is no number for."""
    checkpoint = own.side.checkpoint
    assert checkpoint is not None
    versus = []
    for played in others:
        found = compare(own.episodes, played.episodes)
        theirs = played.side.checkpoint
        versus.append(
            {
                "versus": played.side.label,
                "checkpoint": str(theirs.path) if theirs else None,
                "policy_version": theirs.policy_version if theirs else None,
                **_numbers(played),
                "difference": found.mean,
                "difference_ci95": _number(found.half_width),
                "paired": found.paired,
                "beyond_noise": found.is_beyond_noise,
            }
        )
    return {
        "checkpoint": str(checkpoint.path),
        "policy_version": checkpoint.policy_version,
        "env_id": own.side.setup.env_id,
        "seed": own.side.setup.seed,
        **_numbers(own),
        "training_mean_return": checkpoint.state["mean_return"],
        "versus": versus,
        "recordings": [{"file": str(one.file), "return": one.returned, "length": one.length} for one in recordings],
    }


def policies_lines(policies: Mapping[str, Played], films: Sequence[Filmed] = ()) -> list[str]:
    """The table of several policies that played together, as lines of text."""
    first = next(iter(policies.values()))
    games = max(len(played.episodes.starts()) for played in policies.values())
    said = [
        f"{first.side.setup.env_id}, {len(policies)} policies, actions {first.side.manner}",
        f"  games     {games}, each with episodes of all agents, seed {first.side.setup.seed}",
        "",
        *columns(
            ["", "return", "95% of the mean", "lowest", "median", "highest", "steps", "terminated"],
            [_row(played) for played in policies.values() if played.episodes.episodes],
        ),
        "",
    ]
    for name, (side, episodes) in policies.items():
        assert side.checkpoint is not None
        trained = side.checkpoint.state["mean_return"]
        was = "no episode ended in training" if trained is None else f"training {trained:.3f} over its last episodes"
        said.append(f"  {name}  policy version {side.checkpoint.policy_version}, {was}")
        if not episodes.episodes:
            said.append(f"  {name}  none of its agents was in a game")
        if cut := int(episodes.cut.sum()):
            said.append(f"  {name}  {cut} of {episodes.episodes} episodes cut (--max-episode-steps)")
    said += [""] * bool(films)
    for film in films:
        returns = ", ".join(f"{name} {'-' if mean is None else f'{mean:.3f}'}" for name, mean in film.returns.items())
        said.append(f"  {film.file}  return {returns}, {film.length} steps")
    return said


def policies_to_json(
    checkpoint: Checkpoint, policies: Mapping[str, Played], films: Sequence[Filmed] = ()
) -> dict[str, Any]:
    """One object of plain data for several policies that played together."""
    first = next(iter(policies.values())).side
    found = {}
    for name, played in policies.items():
        assert played.side.checkpoint is not None
        found[name] = {
            "policy_version": played.side.checkpoint.policy_version,
            "training_mean_return": played.side.checkpoint.state["mean_return"],
            **(_numbers(played) if played.episodes.episodes else {"episodes": 0, "mean_return": None}),
        }
    return {
        "checkpoint": str(checkpoint.path),
        "policy_version": checkpoint.policy_version,
        "env_id": first.setup.env_id,
        "seed": first.setup.seed,
        "policies": found,
        "recordings": [
            {"file": str(film.file), "returns": dict(film.returns), "length": film.length} for film in films
        ],
    }


def _numbers(played: Played) -> dict[str, Any]:
    side, episodes = played
    returns, lengths = episodes.returns, episodes.lengths
    return {
        "actions": side.manner,
        "episodes": episodes.episodes,
        "mean_return": episodes.mean,
        "standard_error": _number(episodes.standard_error),
        "return_ci95": _number(mean_interval(episodes)[1]),
        "min_return": float(returns.min()),
        "median_return": float(np.median(returns)),
        "max_return": float(returns.max()),
        "mean_length": episodes.mean_length,
        "min_length": int(lengths.min()),
        "max_length": int(lengths.max()),
        "terminated": float(episodes.terminated.mean()),
        "cut": int(episodes.cut.sum()),
        "metrics": _metrics(episodes),
        "return_by_episode": _returns_by_number(episodes),
    }


def _returns_by_number(episodes: Episodes) -> list[float]:
    """Mean return of the first, second, .. episode since the memory was zeroed."""
    counts = np.bincount(episodes.since_reset)
    sums = np.bincount(episodes.since_reset, episodes.returns)
    return [float(total / count) for total, count in zip(sums, counts, strict=True) if count]


def _by_number(episodes: Episodes) -> list[str]:
    """A line of the returns by episode, where the memory was carried across some; at most ten of them."""
    means = _returns_by_number(episodes)
    if len(means) == 1:
        return []
    shown = sorted({round(number) for number in np.linspace(0, len(means) - 1, min(len(means), 10))})
    listed = ", ".join(f"{number + 1}: {means[number]:.3f}" for number in shown)
    return ["", f"  return by episode since the memory was zeroed  {listed}"]


def _metrics(episodes: Episodes) -> dict[str, float]:
    """Means of the numbers that ``info`` had at the ends of episodes, over those that had one."""
    return {name: float(np.nanmean(values)) for name, values in episodes.metrics.items()}


def mean_interval(episodes: Episodes) -> tuple[float, float]:
    """Mean return and half of its 95% interval (NaN of one episode)."""
    return confidence_interval(episodes.by_environment(episodes.returns))


def _row(played: Played) -> list[str]:
    side, episodes = played
    mean, half_width = mean_interval(episodes)
    lengths = episodes.lengths
    low, high = int(lengths.min()), int(lengths.max())
    return [
        side.label,
        f"{mean:.3f}",
        interval(mean, half_width, ".3f"),
        f"{episodes.returns.min():.6g}",
        f"{np.median(episodes.returns):.6g}",
        f"{episodes.returns.max():.6g}",
        f"{low}" if low == high else f"{episodes.mean_length:.1f} ({low}..{high})",
        f"{episodes.terminated.mean():.0%}",
    ]


def interval(mean: float, half_width: float, form: str) -> str:
    """An interval in words."""
    if math.isnan(half_width):
        return "one episode gives none"
    return f"{mean - half_width:{form}} .. {mean + half_width:{form}}"


def _significance(found: Difference) -> str:
    if math.isnan(found.half_width):
        return "too few episodes to tell"
    if not found.is_beyond_noise:
        return "within noise"
    return f"{'better' if found.mean > 0 else 'worse'}, beyond noise"


def _other_environment(side: Side) -> str:
    """The training environment of a checkpoint, if it was played in another one."""
    if side.checkpoint is None:
        return ""
    state: Mapping[str, Any] = side.checkpoint.state
    kwargs, _ = trained_arguments(side.checkpoint)
    if (state["env_id"], kwargs) == (side.setup.env_id, side.setup.env_kwargs):
        return ""
    arguments = ", ".join(f"{name}={value}" for name, value in kwargs.items())
    return f"{state['env_id'] or 'no environment in particular'}" + (f" with {arguments}" if arguments else "")


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in (head, *rows)
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
