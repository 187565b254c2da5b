"""The page of one run."""

from __future__ import annotations

import time
from pathlib import Path

from shoal.deploy.report import headline, run_plots
from shoal.deploy.report.machine_plots import machine
from shoal.deploy.report.page import Link, Links, Note, Page, Plain, Section, Table
from shoal.deploy.report.recorded_run import RecordedRun
from shoal.deploy.report.text import moment, number, relative_url, several

MOST_FILMS = 40


def page_of_run(run: RecordedRun, folder: Path) -> Page:
    """Return the page of a run, the most important sections first; ``folder`` is where the page will be."""
    weights, components = run_plots.weights(run)
    shares = headline.bottleneck_shares(run)
    sections = [
        Section(
            "learning",
            "Does it learn?",
            "A return is what one agent earns in one episode, not discounted.",
            [
                *run_plots.learning(run),
                *_nothing(run.final_return is None, "No episode has ended yet."),
                *_films(run, folder),
            ],
        ),
        Section(
            "updates",
            "Updates",
            "The optimizer's numbers, with each update of the weights.",
            run_plots.updates(run),
        ),
        Section("speed", "Speed", shares, run_plots.speed(run)),
        Section("machine", "Processor and memory", "Of the process that learns.", machine(run)),
        Section(
            "ledger",
            "Step accounting",
            "Every environment step that an actor delivered is trained, in flight or dropped for a reason.",
            [headline.ledger_table(run), *run_plots.dropped(run)],
        ),
        Section(
            "memory",
            "Memory",
            "The policy remembers: a recurrent state goes along with every agent and is zeroed where its episode ends. "
            "Learner and actors must agree on it.",
            run_plots.memory(run),
        ),
        Section(
            "weights",
            "Weights by component",
            "Signs of a network that is losing its ability to learn, read every learner.weight_metrics_every updates.",
            weights,
            components,
        ),
        Section(
            "actors",
            "Actors and faults",
            "Actors step environments; an actor that dies or hangs is replaced.",
            run_plots.actors(run),
        ),
        Section("log", "Warnings in the log", "", _log(run)),
        Section("settings", "Settings and versions", "", _settings(run)),
    ]
    name = headline.policy_name(run)
    return Page(
        title=f"{name} on {run.env_id or run.name}",
        lead=headline.lead(run),
        facts=headline.facts(run),
        sections=[section for section in sections if section.blocks],
        made=f"Made by shoal report of {run.path} at {moment(time.time())}. Drag in a plot to zoom, double-click to go "
        "back; click a name above a plot to hide its line.",
    )


def _films(run: RecordedRun, folder: Path) -> list[Links]:
    """Films of episodes, which ``shoal evaluate --video`` writes, linked from where the page will be."""
    if not run.films:
        return []
    links = [Link(str(film.relative_to(run.run_dir)), relative_url(film, folder)) for film in run.films[:MOST_FILMS]]
    left = f" {len(run.films) - MOST_FILMS} older ones are not listed." if len(run.films) > MOST_FILMS else ""
    note = f"Newest first. The page only points to the files: move them with it.{left}"
    return [Links("Films of episodes", links, note)]


def _nothing(missing: bool, text: str) -> list[Note]:
    return [Note(text, "open")] if missing else []


def _log(run: RecordedRun) -> list[Note | Table]:
    log = run.complaints
    if not log.kinds:
        return [Note("None.")]
    summary = (
        f"{several(log.warnings, 'warning')} and {several(log.errors, 'error')}; those that differ in numbers only are "
    )
    rows = [
        [kind.level, f"{kind.count:,}", kind.first if kind.count == 1 else f"{kind.first} to {kind.last}", kind.text]
        for kind in log.kinds
    ]
    return [
        Note(f"{summary}one line, with the text of the last.", "bad" if log.errors else "open"),
        Table("Messages", ["level", "times", "when", "message"], rows, text=True),
    ]


def _changes(run: RecordedRun) -> list[Plain | Table]:
    """Settings that changed where the run went on with others."""
    rows = [
        [f"{at.version:,}", change.name, change.before, change.after]
        for at in run.changes
        for change in at.differences.changed
    ]
    note = "Later versions were trained with the new ones. RUN/configs has all settings until then."
    header = ["after version", "setting", "from", "to"]
    return [Table("Settings that changed", header, rows, note, text=True)] if rows else []


def _settings(run: RecordedRun) -> list[Plain | Table]:
    blocks: list[Plain | Table] = _changes(run)
    if run.config_text:
        blocks.append(Plain("All settings (config.yaml)", run.config_text))
    versions = (run.summary or {}).get("versions")
    if isinstance(versions, dict):
        rows = [[str(name), str(version)] for name, version in versions.items()]
        blocks.append(Table("Versions", ["package", "version"], rows, text=True))
    last = [[name, number(run.metrics.last(name))] for name in run.metrics.names]
    note = "Counters count from the start of the session. deploy/docs/metrics.md says what each is."
    blocks.append(Table("Last value of every metric", ["metric", "value"], last, note, folded=True))
    return blocks
