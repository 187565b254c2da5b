"""The output of ``shoal replay``: tables, or one JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.learner.contributions import Contribution
from shoal.learner.recorded_updates import RecordedUpdate, RecordError, load_recorded, recorded_names
from shoal.learner.replay import Replay

SHOWN = ("loss", "grad_norm", "approx_kl", "explained_variance")
"""Terms of an update in the list of updates."""


def list_updates(run: Path) -> tuple[list[RecordedUpdate], dict[str, str]]:
    """The recorded updates of a run, and for those that cannot be used, by name, why.

    Raises:
        RecordError: there is none.
    """
    found, problems = [], {}
    for name, path in recorded_names(run).items():
        try:
            found.append(load_recorded(path))
        except RecordError as error:
            problems[name] = str(error)
    return found, problems


def lines_of_list(run: Path, found: Sequence[RecordedUpdate], problems: Mapping[str, str]) -> list[str]:
    """The list as lines of text."""
    said = []
    if found:
        terms = [name for name in SHOWN if any(name in one.terms for one in found)]
        head = ["update", "session", "env steps before", "learners", "segments", *terms, ""]
        rows = [
            [
                one.name,
                str(one.about.get("session", "")),
                f"{one.env_steps:,}",
                str(one.num_learners),
                str(one.num_segments),
                *(_short(one.terms.get(term)) for term in terms),
                one.outcome,
            ]
            for one in found
        ]
        said += _columns(head, rows)
        said += ["", *(f"  {one.name}: {one.error}" for one in found if one.error)]
        said += [f"  shoal replay {run} --update {found[-1].name}"]
    return said + [f"  {name}: {why}" for name, why in problems.items()]


def list_to_json(found: Sequence[RecordedUpdate], problems: Mapping[str, str]) -> dict[str, Any]:
    """The list as plain data."""
    return {"updates": [_described(one) for one in found], "problems": dict(problems)}


def lines(replay: Replay, num_rows: int) -> list[str]:
    """A replay as lines of text, with the ``num_rows`` segments of the largest gradients; 0 shows all."""
    recorded, result = replay.recorded, replay.result
    learners = "1 learner" if recorded.num_learners == 1 else f"{recorded.num_learners} learners"
    said = [
        f"update {recorded.name} of {recorded.path.parent.parent}: {recorded.about.get('env_id', '')}, from policy "
        f"version {recorded.policy_version} after {recorded.env_steps:,} environment steps; {learners}, "
        f"{recorded.num_segments} segments"
    ]
    if result is not None:
        values = {"optimizer steps": result.optimizer_steps, **result.scheduled._asdict()}
        said += [
            "  with    " + ", ".join(f"{name} {_short(value)}" for name, value in values.items()),
            "  means   " + ", ".join(f"{name} {_short(value)}" for name, value in result.terms.items()),
        ]
    order = sorted(replay.contributions, key=_size, reverse=True)
    shown = order[: num_rows or None]
    if shown:
        said += ["", *_table(shown, replay), ""]
        said.append("  parts of the loss and of its gradient, with the weights before the update; the parts add up")
    if len(shown) < len(order):
        said.append(f"  the {len(shown)} segments with the largest gradients of {len(order)}; --segments 0 shows all")
    if replay.why_not_told:
        said.append(f"  no segment's part can be told: {replay.why_not_told}")
    if replay.error:
        said.append(f"  not made: {replay.error}")
    return [*said, f"  {verdict(replay)}"]


def verdict(replay: Replay) -> str:
    """Whether the update ended as it did in the run, in a sentence."""
    recorded = replay.recorded
    if replay.is_same and recorded.outcome == "made":
        return f"the weights after it are the recorded ones, bit for bit ({replay.weights_hash})"
    if replay.is_same and recorded.outcome == "skipped":
        return f"it was skipped again; the weights are the recorded ones, bit for bit ({replay.weights_hash})"
    if replay.is_same:
        return "it failed again, with the same words"
    if replay.outcome != recorded.outcome:
        why = f" ({recorded.error})" if recorded.error else ""
        said = f"here it was {replay.outcome}, in the run it was {recorded.outcome}{why}"
    elif recorded.outcome == "failed":
        said = f"it failed in another way than in the run, where it was: {recorded.error}"
    else:
        said = f"the weights after it differ: here {replay.weights_hash}, in the run {recorded.weights_hash}"
    here, there = replay.machine, recorded.machine
    other = [
        f"{name} {there.get(name)} there, {value} here" for name, value in here.items() if value != there.get(name)
    ]
    if other:
        return f"{said}; numbers are rounded in another way by {'; '.join(other)}"
    if not here["device"].startswith("cpu"):
        return f"{said}; on {here['device']} sums are not always made in the same order"
    if recorded.num_learners > 1:
        return f"{said}; random numbers that a loss draws are those of one process here, and of several in the run"
    return f"{said}; does the loss, the policy or the optimizer keep a state, or draw from other streams than torch's?"


def to_json(replay: Replay) -> dict[str, Any]:
    """A replay as plain data; numbers that are not finite are texts, as ``nan``."""
    result = replay.result
    return {
        **_described(replay.recorded),
        "same": replay.is_same,
        "verdict": verdict(replay),
        "replayed": {
            "outcome": replay.outcome,
            "error": replay.error,
            "weights_hash": replay.weights_hash,
            "machine": replay.machine,
            "terms": {} if result is None else {name: _plain(value) for name, value in result.terms.items()},
            "optimizer_steps": None if result is None else result.optimizer_steps,
            "scheduled": None if result is None else result.scheduled._asdict(),
        },
        "why_not_told": replay.why_not_told,
        "segments": [
            {
                **_place(one, replay),
                **{
                    name: _plain(value) if isinstance(value, float) else value
                    for name, value in dataclasses.asdict(one).items()
                    if name != "terms"
                },
                "terms": {name: _plain(value) for name, value in one.terms.items()},
            }
            for one in replay.contributions
        ],
    }


def _described(recorded: RecordedUpdate) -> dict[str, Any]:
    return {
        "update": recorded.name,
        "file": str(recorded.path),
        "policy_version_before": recorded.policy_version,
        "env_steps_before": recorded.env_steps,
        "outcome": recorded.outcome,
        "error": recorded.error,
        "weights_hash": recorded.weights_hash,
        "num_learners": recorded.num_learners,
        "num_segments": recorded.num_segments,
        "terms": {name: _plain(value) for name, value in recorded.terms.items()},
        "machine": recorded.machine,
        "run_id": recorded.run_id,
        **recorded.about,
    }


def _place(one: Contribution, replay: Replay) -> dict[str, int]:
    actor, slot = one.training_env_id >> 32, one.training_env_id & (2**32 - 1)
    agents = int(replay.recorded.about.get("num_agents", 1))
    return {
        "actor": actor,
        "slot": slot,
        "agent": slot % agents,
        "unroll": one.unroll_index & (2**32 - 1),
        "lag": replay.recorded.policy_version - one.policy_version,
    }


def _table(shown: Sequence[Contribution], replay: Replay) -> list[str]:
    agents = int(replay.recorded.about.get("num_agents", 1)) > 1
    # Before the update there is no divergence from the policy before it.
    names = [name for name in (shown[0].terms if shown else ()) if name != "update_kl"]
    places = ["actor", "slot", *(["agent"] if agents else []), "unroll", "lag"]
    head = [*places, "steps", "reward", *names, "grad norm", "ratio", "max", "V-trace", "advantage", "largest", "value"]
    rows = []
    for one in shown:
        place = _place(one, replay)
        numbers = (
            *(one.terms[name] for name in names),
            *(one.grad_norm, one.ratio_mean, one.ratio_max, one.vtrace_weight),
            *(one.advantage_mean, one.advantage_largest, one.value_mean),
        )
        rows.append(
            [*(str(place[name]) for name in places), str(one.steps), _short(one.reward_sum), *map(_short, numbers)]
        )
    return _columns(
        [*head, "target"], [[*row, _short(one.value_target_mean)] for row, one in zip(rows, shown, strict=True)]
    )


def _size(one: Contribution) -> float:
    """By which segments are ordered: what is not finite comes first."""
    return one.grad_norm if math.isfinite(one.grad_norm) else math.inf


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
