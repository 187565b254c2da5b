"""The plots of what a run takes of the machine that learns."""

from __future__ import annotations

import numpy as np
from shoal.deploy.report.figure import COLORS, Figure, Line
from shoal.deploy.report.recorded_run import RecordedRun
from shoal.deploy.report.run_plots import present, rates, time_unit


def machine(run: RecordedRun) -> list[Figure]:
    """Return plots of the learner's processor time and of its memory."""
    metrics = run.metrics
    unit, label = time_unit(float(metrics.seconds[-1]))
    ends = np.array([window.stop - 1 for window in metrics.windows(100_000)], int)
    over_time = metrics.seconds[ends] / unit if len(ends) else np.zeros(0)
    cores = []
    if "process_cpu_seconds" in metrics.names:
        cores.append(Line(name="learner", x=over_time, y=rates(metrics, "process_cpu_seconds", 100_000)))
    parts = {"allocated": "allocated to tensors", "reserved": "reserved by torch", "total": "there is"}
    return present(
        run,
        Figure(
            key="processor",
            title="Processor of the learner's process",
            caption="Without actors and peer learners, which are processes of their own. Good: level, below the cores "
            "that it has.",
            x_label=label,
            y_label="cores",
            lines=cores,
        ),
        Figure(
            key="resident-memory",
            title="Memory of the learner's process",
            caption="Resident. Good: it levels off in the first minutes; growth without end is a leak.",
            x_label=label,
            y_label="GiB",
            lines=[
                Line(
                    name="learner",
                    x=metrics.seconds / unit,
                    y=metrics.column("process_resident_memory_bytes") / 2**30,
                )
            ],
        ),
        Figure(
            key="accelerator-memory",
            title="Memory of the learner's accelerator",
            caption="Good: what torch has reserved stays below what there is.",
            x_label=label,
            y_label="GiB",
            lines=[
                Line(
                    name=parts.get(part, part),
                    x=metrics.seconds / unit,
                    y=metrics.column(f"accelerator_memory_bytes/{part}") / 2**30,
                    color=COLORS[index % len(COLORS)],
                )
                for index, part in enumerate(metrics.labels("accelerator_memory_bytes"))
            ],
        ),
    )
