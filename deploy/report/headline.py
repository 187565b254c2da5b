"""The head of a report: what was trained, how the run ended, and whether its numbers can be trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from shoal.deploy.monitoring.learning import CAUSES
from shoal.deploy.report.page import Fact, Note, State, Table
from shoal.deploy.report.recorded_run import RecordedRun
from shoal.deploy.report.text import count, duration, margin, moment, number, several

TOLERANCE = 1e-4
"""Equals ``learner.parity_check.TOLERANCE``, whose module imports torch."""
POLICIES = {"fast": "Fast", "component": "ComponentPolicy"}
_STAGES = {
    "environment": "stepping environments",
    "inference": "acting, that is running the policy",
    "transfer": "moving data, checking and saving",
    "learner": "updating the weights",
    "waiting": "learners waiting for each other",
    "staleness": "data that comes too late to be trained",
    "actors": "waiting for actors that deliver nothing",
}
_DROPPED = {
    "shutdown": "on their way when the run ended",
    "stale": "older than actor.max_policy_lag allows",
    "restart": "on their way when a session ended without a word",
    "non_finite": "the update made of them was not finite and was skipped",
    "learner_lost": "their peer learner ended in the middle of the update",
}


def lead(run: RecordedRun) -> list[Note]:
    """Return sentences on what was trained, how the run ended, and gaps in its records."""
    notes = [Note(_what(run)), _ending(run), *_learning(run), Note(_bottleneck(run))]
    resumed = run.metrics.sessions[1:]
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
    if run.metrics.torn and run.metrics.skipped == 1:
        notes.append(Note("The last line of metrics.jsonl was cut off, and is left out.", "open"))
    elif run.metrics.skipped:
        notes.append(Note(f"{several(run.metrics.skipped, 'line')} of metrics.jsonl could not be read.", "open"))
    return notes


def facts(run: RecordedRun) -> list[Fact]:
    """Return the numbers of the headline."""
    return [_return(run), *_evaluation(run), _speed(run), _memory(run), _balance(run), _faults(run)]


def final_random_return(run: RecordedRun) -> float | None:
    """Return the mean return of uniformly random actions; None if the run did not measure it."""
    value = run.summary.get("random_return") if run.summary else run.metrics.last("random_return")
    return float(value) if isinstance(value, int | float) else None


def ledger_of(run: RecordedRun) -> dict[str, Any]:
    """Return the ledger of the whole run, from the summary or else from the sessions' counters."""
    if run.summary and isinstance(run.summary.get("ledger"), dict):
        return dict(run.summary["ledger"])
    return {
        "sampled": run.total("sampled_env_steps"),
        "trained": run.total("trained_env_steps"),
        "in_flight": run.metrics.last("in_flight_env_steps") or 0.0,
        "dropped": {
            reason: steps
            for reason in run.metrics.labels("dropped_env_steps")
            if (steps := run.total(f"dropped_env_steps/{reason}"))
        },
    }


def ledger_table(run: RecordedRun) -> Table:
    """Return a table of the steps that actors delivered: trained, in flight, or dropped by reason."""
    ledger = ledger_of(run)
    sampled = ledger["sampled"]
    lines = [("trained", ledger["trained"], "used in an update"), ("in flight", ledger["in_flight"], "not yet used")]
    lines += [
        (f"dropped: {reason}", steps, _DROPPED.get(reason, "")) for reason, steps in sorted(ledger["dropped"].items())
    ]
    rows = [["delivered by actors", count(sampled), "100%", ""]]
    rows += [[name, count(steps), f"{steps / max(sampled, 1):.2%}", meaning] for name, steps, meaning in lines]
    rows.append(["missing", count(_missing(run, ledger)), "", "0: every step is accounted for"])
    return Table("Environment steps", ["", "steps", "share", "meaning"], rows, text=True)


def bottleneck_shares(run: RecordedRun) -> str:
    """Return how often each stage was the bottleneck, as a sentence; empty if there are no readings."""
    readings = {stage: run.metrics.column(f"bottleneck/{stage}") == 1 for stage in run.metrics.labels("bottleneck")}
    total = sum(int(found.sum()) for found in readings.values())
    shares = sorted(((int(found.sum()) / total, s) for s, found in readings.items() if found.any()), reverse=True)
    if not shares:
        return ""
    listed = ", ".join(f"{_STAGES.get(stage, stage)} ({share:.0%})" for share, stage in shares)
    return f"The bottleneck of the run, in shares of all readings: {listed}."


def policy_name(run: RecordedRun) -> str:
    """The policy in words: ``Fast``, or the class of the user's."""
    kind = str(run.setting("policy.kind") or (run.summary or {}).get("policy_kind") or "")
    return POLICIES.get(kind, kind) or "A policy"


def _what(run: RecordedRun) -> str:
    seed, mode = run.setting("seed"), run.setting("mode")
    which = f"the recurrent policy {run.policy}" if run.policy else "a recurrent policy"
    parts = [f"{policy_name(run)}, {which}, was trained on {run.env_id or 'unknown'}"]
    parts += [f"seed {seed}"] if seed is not None else []
    parts += [f"mode {mode}"] if mode is not None else []
    metrics = run.metrics
    return (
        f"{', '.join(parts)}, from {moment(metrics.time[0] - metrics.column('seconds')[0])}: "
        f"{count(run.env_steps)} environment steps in {duration(metrics.seconds[-1])} of training, "
        f"{count(metrics.last('policy_version') or 0)} updates. (One environment step is one step of one agent.)"
    )


def _ending(run: RecordedRun) -> Note:
    summary, made, goal = run.summary, _made(run), _goal(run)
    most = _float(run.setting("max_seconds")) or 0.0
    if run.failure:
        return Note(f"It failed after {made}: {run.failure}", "bad")
    if summary is None:
        return Note(
            f"It has no summary of its last session, so it goes on or was killed: this is how it stood at "
            f"{moment(run.metrics.time[-1])}, with {made}.",
            "open",
        )
    if summary.get("interrupted_by"):
        return Note(
            f"It was interrupted ({summary['interrupted_by']}) with {made}, saved, and can be continued.", "open"
        )
    reached = run.run_env_steps if run.policy else run.env_steps
    if goal and reached is not None and reached >= goal:
        own = f", {count(run.env_steps)} of them in this policy" if run.policy else ""
        return Note(
            f"It ended as it should: all of the {count(goal)} environment steps asked for were trained on{own}.", "good"
        )
    if most:
        return Note(f"It ended as it should, after the {duration(most)} it was given (max_seconds).", "good")
    return Note(f"It ended with {made}.")


def _goal(run: RecordedRun) -> float | None:
    return _float(run.setting("total_env_steps"))


def _made(run: RecordedRun) -> str:
    """How many environment steps were trained; those that were asked for are of all policies together."""
    goal, steps = _goal(run), count(run.env_steps)
    of_goal = f"of the {count(goal)} environment steps asked for" if goal else "environment steps"
    if not run.policy:
        return f"{steps} {of_goal}"
    if run.run_env_steps is None:
        return f"{steps} environment steps of this policy"
    return f"{count(run.run_env_steps)} {of_goal}, {steps} of them of this policy"


def _bottleneck(run: RecordedRun) -> str:
    found = (run.summary or {}).get("limit")
    if isinstance(found, dict) and found.get("sentence"):
        return f"Its bottleneck, and the setting to change: {found['sentence']}."
    for stage in run.metrics.labels("bottleneck"):
        if run.metrics.last(f"bottleneck/{stage}") == 1:
            return f"Its bottleneck at the last reading: {_STAGES.get(stage, stage)}."
    return "Its bottleneck is not known: there was no update yet."


def _learning(run: RecordedRun) -> list[Note]:
    """Whether it learned: the summary's sentence, or else what the last line of the metrics says in a word."""
    found = (run.summary or {}).get("learning")
    if isinstance(found, dict) and found.get("sentence"):
        advice = found.get("advice")
        state: State = "good" if found.get("verdict") == "better" else "open"
        notes = [Note(f"Is it learning? {_sentence(found['sentence'])}", state)]
        return [*notes, Note(_sentence(advice), "bad")] if advice else notes
    causes = [words for cause, words in CAUSES.items() if run.metrics.last(f"learning_problem/{cause}") == 1]
    return [
        Note(f"Its return is no better than a random policy's; the likeliest cause: {words}.", "bad")
        for words in causes
    ]


def _sentence(text: object) -> str:
    words = str(text)
    return f"{words[:1].upper()}{words[1:]}."


def _return(run: RecordedRun) -> Fact:
    value, random = run.final_return, final_random_return(run)
    if value is None:
        return Fact("Return", "-", "no episode ended", "open")
    shown = _with_margin(run, value, "mean_return_ci95")
    if random is None:
        return Fact("Return", shown, "mean of the last 256 episodes")
    times = f", {value / random:.1f} times as much" if random > 0 else ""
    better: bool = value > random
    note = f"mean of the last 256 episodes; a random policy gets {_with_margin(run, random, 'random_return_ci95')}"
    return Fact("Return", shown, note + (times if better else ""), "good" if better else "open")


def _with_margin(run: RecordedRun, value: float, half_width: str) -> str:
    """A value with its interval, whose half width is the last value of a metric."""
    half = run.metrics.last(half_width)
    return number(value) if half is None else f"{number(value)} {margin(half)}"


def _evaluation(run: RecordedRun) -> list[Fact]:
    if not run.evaluations:
        return []
    best, last = max(run.evaluations, key=lambda e: e.mean_return), run.evaluations[-1]
    value = number(last.mean_return) + (f" {margin(last.half_width)}" if last.half_width is not None else "")
    note = f"the last of {len(run.evaluations)}"
    if not run.policy:  # of several, each return says as much of the others
        note += f"; the best, {number(best.mean_return)}, at {count(best.env_steps)} steps"
    return [Fact("Evaluation", value, note)]


def _speed(run: RecordedRun) -> Fact:
    seconds = float(run.metrics.seconds[-1])
    rate = run.total("trained_env_steps") / seconds if seconds > 0 else None
    if run.summary and len(run.metrics.sessions) == 1:
        rate = _float(run.summary.get("env_steps_per_second")) or rate
    return Fact("Speed", f"{number(rate)}/s", "environment steps trained per second, on average")


def _memory(run: RecordedRun) -> Fact:
    checks, worst = 0.0, 0.0
    for checked, error in _parity_check(run):
        if checked:
            checks += checked
            # NaN is null in the files; a comparison must not hide it.
            worst = math.nan if error is None or math.isnan(worst) else max(worst, error)
    if not checks:
        return Fact("Memory", "not checked", "the parity check made no reading", "open")
    size = "by no number" if math.isnan(worst) else f"by {worst:.1e} at most"
    right = worst <= TOLERANCE
    note = f"actors and learner differ {size} in log-probabilities ({several(checks, 'check')}); alarm above 1e-4"
    return Fact("Memory", "right" if right else "WRONG", note, "good" if right else "bad")


def _parity_check(run: RecordedRun) -> list[tuple[float, float | None]]:
    """Return the number of checks and the highest error of each session."""
    checks, errors = (run.metrics.column(name) for name in ("log_prob_checks", "log_prob_error_max"))
    found = [(float(np.nan_to_num(checks[s.stop - 1])), _float(errors[s.stop - 1])) for s in run.metrics.sessions]
    if run.summary and "log_prob_checks" in run.summary:
        found[-1] = (run.summary["log_prob_checks"], run.summary.get("max_log_prob_error"))
    return found


def _balance(run: RecordedRun) -> Fact:
    ledger = ledger_of(run)
    dropped = sum(ledger["dropped"].values())
    note = f"{count(ledger['sampled'])} steps delivered, {count(ledger['trained'])} trained, {count(dropped)} dropped"
    if run.summary is None and len(run.metrics.sessions) > 1:
        return Fact("Step accounting", "not closed", f"{note}, by the sessions' own counts", "open")
    missing = _missing(run, ledger)
    if missing:
        return Fact("Step accounting", "DOES NOT BALANCE", f"{count(missing)} steps are missing; {note}", "bad")
    return Fact("Step accounting", "balances", note, "good")


def _faults(run: RecordedRun) -> Fact:
    restarts = sum(run.total(f"actor_restarts/{reason}") for reason in run.metrics.labels("actor_restarts"))
    faults, skipped = run.total("env_faults"), run.total("skipped_updates")
    if not restarts and not faults and not skipped:
        return Fact("Faults", "none", "no actor replaced, no environment restarted, no update skipped", "good")
    parts = [f"{several(restarts, 'actor')} replaced"] if restarts else []
    parts += [f"{several(faults, 'environment slot')} restarted"] if faults else []
    parts += [f"{several(skipped, 'update')} skipped"] if skipped else []
    return Fact("Faults", count(restarts + faults + skipped), ", ".join(parts), "bad" if skipped else "open")


def _missing(run: RecordedRun, ledger: dict[str, Any]) -> float:
    if run.summary is None:
        # The columns of a line are read one after the other; this one is read at one instant.
        return run.metrics.last("ledger_imbalance_env_steps") or 0.0
    left = ledger["sampled"] - ledger["trained"] - ledger["in_flight"] - sum(ledger["dropped"].values())
    return float(left)


def _float(value: Any) -> float | None:
    try:
        return float(value) if value == value else None
    except (TypeError, ValueError):
        return None
