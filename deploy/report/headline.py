"""What a stranger wants to know of a run first: what it was, how it ended, and whether its numbers can be trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from shoal.deploy.report.page import Fact, Note, Table
from shoal.deploy.report.recorded_run import RecordedRun
from shoal.deploy.report.text import count, duration, margin, moment, number, several

TOLERANCE = 1e-4
"""``learner.parity_check.TOLERANCE``, without the libraries that it brings."""
POLICIES = {"fast": "Fast", "component": "ComponentPolicy"}
_LIMITS = {
    "environment": "stepping environments",
    "inference": "acting, that is running the policy",
    "transfer": "moving data, checking and saving",
    "learner": "updating the weights",
    "waiting": "learners waiting for each other",
    "staleness": "data that comes too late to be trained",
}
_DROPPED = {
    "shutdown": "on their way when the run ended",
    "stale": "older than actor.max_policy_lag allows",
    "restart": "on their way when a session ended without a word",
    "non_finite": "the update made of them was not finite and was refused",
    "learner_lost": "a learner ended in the middle of the update",
}


def lead(run: RecordedRun) -> list[Note]:
    """What was trained, how it ended, and what is to be known about the records."""
    notes = [Note(_what(run)), _ending(run), Note(_limit(run))]
    resumed = run.history.sessions[1:]
    if resumed:
        again = sum(session.repeated for session in resumed)
        often = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        text = f"It was resumed {often}; dotted lines in the plots say where."
        if again:
            text += (
                f" {count(again)} environment steps had not been saved and were made again; curves over environment "
                "steps show what the weights come from."
            )
        notes.append(Note(text))
    if run.history.torn and run.history.skipped == 1:
        notes.append(Note("The last line of metrics.jsonl was cut off, and is left out.", "open"))
    elif run.history.skipped:
        notes.append(Note(f"{several(run.history.skipped, 'line')} of metrics.jsonl could not be read.", "open"))
    return notes


def facts(run: RecordedRun) -> list[Fact]:
    """The numbers of the headline."""
    return [_return(run), *_evaluation(run), _speed(run), _memory(run), _balance(run), _faults(run)]


def final_random_return(run: RecordedRun) -> float | None:
    """What uniformly random actions earn, where the run measured it."""
    value = (run.summary or {}).get("random_return")
    return float(value) if isinstance(value, int | float) else None


def books(run: RecordedRun) -> dict[str, Any]:
    """The ledger of the whole run: the summary's, or else what the sessions wrote down."""
    if run.summary and isinstance(run.summary.get("ledger"), dict):
        return dict(run.summary["ledger"])
    return {
        "sampled": run.total("sampled_env_steps"),
        "trained": run.total("trained_env_steps"),
        "in_flight": run.history.last("in_flight_env_steps") or 0.0,
        "dropped": {r: run.total(f"dropped_env_steps/{r}") for r in run.history.labels("dropped_env_steps")},
    }


def books_table(run: RecordedRun) -> Table:
    """Every step that actors delivered, and what became of it."""
    ledger = books(run)
    sampled = ledger["sampled"]
    lines = [("trained", ledger["trained"], "used in an update"), ("in flight", ledger["in_flight"], "not yet used")]
    lines += [
        (f"dropped: {reason}", steps, _DROPPED.get(reason, "")) for reason, steps in sorted(ledger["dropped"].items())
    ]
    rows = [["delivered by actors", count(sampled), "100%", ""]]
    rows += [[name, count(steps), f"{steps / max(sampled, 1):.2%}", meaning] for name, steps, meaning in lines]
    rows.append(["missing", count(_missing(run, ledger)), "", "0: the books balance"])
    return Table("Environment steps", ["", "steps", "share", "meaning"], rows, text=True)


def limit_share(run: RecordedRun) -> str:
    """How often each stage was what limits, as a sentence; empty where nothing is known."""
    readings = {stage: run.history.column(f"limit/{stage}") == 1 for stage in run.history.labels("limit")}
    total = sum(int(found.sum()) for found in readings.values())
    shares = sorted(((int(found.sum()) / total, s) for s, found in readings.items() if found.any()), reverse=True)
    if not shares:
        return ""
    told = ", ".join(f"{_LIMITS.get(stage, stage)} ({share:.0%})" for share, stage in shares)
    return f"What limited the run, by its own judgement, in shares of all readings: {told}."


def _what(run: RecordedRun) -> str:
    kind = str(run.setting("policy.kind") or (run.summary or {}).get("policy_kind") or "")
    seed, mode = run.setting("seed"), run.setting("mode")
    parts = [f"{POLICIES.get(kind, kind) or 'A policy'}, a recurrent policy, was trained on {run.env_id or 'unknown'}"]
    parts += [f"seed {seed}"] if seed is not None else []
    parts += [f"mode {mode}"] if mode is not None else []
    history = run.history
    return (
        f"{', '.join(parts)}, from {moment(history.time[0] - history.column('seconds')[0])}: "
        f"{count(run.env_steps)} environment steps in {duration(history.seconds[-1])} of training, "
        f"{count(history.last('policy_version') or 0)} updates. (One environment step is one step of one agent.)"
    )


def _ending(run: RecordedRun) -> Note:
    summary, steps = run.summary, run.env_steps
    goal, most = _float(run.setting("total_env_steps")), _float(run.setting("max_seconds")) or 0.0
    of_goal = f" of the {count(goal)} environment steps asked for" if goal else ""
    if run.failure:
        return Note(f"It failed after {count(steps)}{of_goal or ' environment steps'}: {run.failure}", "bad")
    if summary is None:
        return Note(
            f"It has no summary of its last session, so it goes on or was killed: this is how it stood at "
            f"{moment(run.history.time[-1])}, with {count(steps)}{of_goal or ' environment steps'}.",
            "open",
        )
    if summary.get("interrupted_by"):
        return Note(
            f"It was interrupted ({summary['interrupted_by']}) with {count(steps)}{of_goal or ' environment steps'}, "
            "saved, and can be continued.",
            "open",
        )
    if goal and steps >= goal:
        return Note(f"It ended as it should: all{of_goal} were trained on.", "good")
    if most:
        return Note(f"It ended as it should, after the {duration(most)} it was given (max_seconds).", "good")
    return Note(f"It ended with {count(steps)}{of_goal or ' environment steps'}.")


def _limit(run: RecordedRun) -> str:
    limit = (run.summary or {}).get("limit")
    if isinstance(limit, dict) and limit.get("sentence"):
        return f"What limits its speed, and what to turn: {limit['sentence']}."
    for stage in run.history.labels("limit"):
        if run.history.last(f"limit/{stage}") == 1:
            return f"What limits its speed at the last reading: {_LIMITS.get(stage, stage)}."
    return "What limits its speed is not known: there was no update yet."


def _return(run: RecordedRun) -> Fact:
    value, random = run.final_return, final_random_return(run)
    if value is None:
        return Fact("Return", "-", "no episode ended", "open")
    if random is None:
        return Fact("Return", number(value), "mean of the last 256 episodes")
    times = f", {value / random:.1f} times as much" if random > 0 else ""
    better: bool = value > random
    note = f"mean of the last 256 episodes; a random policy gets {number(random)}"
    return Fact("Return", number(value), note + (times if better else ""), "good" if better else "open")


def _evaluation(run: RecordedRun) -> list[Fact]:
    if not run.evaluations:
        return []
    best, last = max(run.evaluations, key=lambda e: e.mean_return), run.evaluations[-1]
    value = number(last.mean_return) + (f" {margin(last.half_width)}" if last.half_width is not None else "")
    note = f"the last of {len(run.evaluations)}; the best, {number(best.mean_return)}, at {count(best.env_steps)} steps"
    return [Fact("Evaluation", value, note)]


def _speed(run: RecordedRun) -> Fact:
    seconds = float(run.history.seconds[-1])
    rate = run.total("trained_env_steps") / seconds if seconds > 0 else None
    if run.summary and len(run.history.sessions) == 1:
        rate = _float(run.summary.get("env_steps_per_second")) or rate
    return Fact("Speed", f"{number(rate)}/s", "environment steps trained per second, on average")


def _memory(run: RecordedRun) -> Fact:
    checks, worst = 0.0, 0.0
    for checked, error in _parity_check(run):
        if checked:
            checks += checked
            # What was no number is null in the files; it must not hide behind a comparison.
            worst = math.nan if error is None or math.isnan(worst) else max(worst, error)
    if not checks:
        return Fact("Memory", "not checked", "the parity check made no reading", "open")
    size = "by no number" if math.isnan(worst) else f"by {worst:.1e} at most"
    right = worst <= TOLERANCE
    note = f"actors and learner differ {size} in log-probabilities ({several(checks, 'check')}); alarm above 1e-4"
    return Fact("Memory", "right" if right else "WRONG", note, "good" if right else "bad")


def _parity_check(run: RecordedRun) -> list[tuple[float, float | None]]:
    """Checks and the highest error of every session."""
    checks, errors = (run.history.column(name) for name in ("log_prob_checks", "log_prob_error_max"))
    found = [(float(np.nan_to_num(checks[s.stop - 1])), _float(errors[s.stop - 1])) for s in run.history.sessions]
    if run.summary and "log_prob_checks" in run.summary:
        found[-1] = (run.summary["log_prob_checks"], run.summary.get("max_log_prob_error"))
    return found


def _balance(run: RecordedRun) -> Fact:
    ledger = books(run)
    dropped = sum(ledger["dropped"].values())
    note = f"{count(ledger['sampled'])} steps delivered, {count(ledger['trained'])} trained, {count(dropped)} dropped"
    if run.summary is None and len(run.history.sessions) > 1:
        return Fact("Books", "not closed", f"{note}, by the sessions' own counts", "open")
    missing = _missing(run, ledger)
    if missing:
        return Fact("Books", "DO NOT BALANCE", f"{count(missing)} steps are missing; {note}", "bad")
    return Fact("Books", "balance", note, "good")


def _faults(run: RecordedRun) -> Fact:
    restarts = sum(run.total(f"actor_restarts/{reason}") for reason in run.history.labels("actor_restarts"))
    faults, refused = run.total("env_faults"), run.total("skipped_updates")
    if not restarts and not faults and not refused:
        return Fact("Faults", "none", "no actor replaced, no environment restarted, no update refused", "good")
    parts = [f"{several(restarts, 'actor')} replaced"] if restarts else []
    parts += [f"{several(faults, 'environment slot')} restarted"] if faults else []
    parts += [f"{several(refused, 'update')} refused"] if refused else []
    return Fact("Faults", count(restarts + faults + refused), ", ".join(parts), "bad" if refused else "open")


def _missing(run: RecordedRun, ledger: dict[str, Any]) -> float:
    if run.summary is None:
        # The columns of a line are not read at one instant; this one is.
        return run.history.last("ledger_imbalance_env_steps") or 0.0
    left = ledger["sampled"] - ledger["trained"] - ledger["in_flight"] - sum(ledger["dropped"].values())
    return float(left)


def _float(value: Any) -> float | None:
    try:
        return float(value) if value == value else None
    except (TypeError, ValueError):
        return None
