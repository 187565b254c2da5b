"""The plots of one run, by chapter."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from shoal.deploy.report.figure import COLORS, GREY, STEPS, Figure, Line, style
from shoal.deploy.report.headline import TOLERANCE, final_random_return
from shoal.deploy.report.page import LegendEntry
from shoal.deploy.report.recorded_metrics import Numbers, RecordedMetrics
from shoal.deploy.report.recorded_run import RecordedRun

MOST_WINDOWS = 250
_STAGES = {
    "update": "updating weights",
    "reduce": "waiting for other learners",
    "wait": "waiting for rollouts, or making them",
    "assemble": "assembling batches",
    "parity_check": "checking the memory",
    "publish": "publishing weights",
    "weight_metrics": "measuring weights",
    "checkpoint": "saving",
}
_ACTOR_STAGES = {"env": "stepping environments", "policy": "running the policy", "pack": "packing trajectories"}


class _Feature(NamedTuple):
    name: str
    title: str
    unit: str
    caption: str
    share: bool = False
    log: bool = False


_FEATURES = (
    _Feature(
        "weight_norm",
        "Norm",
        "L2 norm",
        "Good: it grows slowly or settles; growth without end costs the ability to learn.",
    ),
    _Feature(
        "weight_relative_distance_to_init",
        "Distance to the initial weights",
        "over their norm",
        "How far each has moved; one that stays at 0 learns nothing. Good: fast first, then slower.",
        share=True,
    ),
    _Feature(
        "weight_distance_to_init",
        "Distance to the initial weights, absolute",
        "L2 distance",
        "The same, also of components that began with zeros.",
    ),
    _Feature(
        "weight_effective_rank",
        "Effective rank",
        "singular values",
        "How many directions a component uses. Good: it stays; a steady fall says that it can express less and less.",
    ),
    _Feature(
        "weight_condition_number",
        "Condition number",
        "ratio (log scale)",
        "Largest over smallest stretch. Good: steady; growing by powers of ten says that some directions die out.",
        log=True,
    ),
    _Feature(
        "dormant_units_ratio",
        "Dormant units",
        "share of units",
        "Units that hardly ever act. Good: few, and not growing while the return falls.",
        share=True,
    ),
    _Feature(
        "weight_clipped_fraction",
        "Weights on their bound",
        "share of clipped weights",
        "With learner.regularization.clip_scale. Good: a small part; if most are there, the bound is too tight.",
        share=True,
    ),
)


def learning(run: RecordedRun) -> list[Figure]:
    """Return plots of return and episode length."""
    metrics = run.metrics
    lines = [_line(metrics, "mean_return", "while training, last 256 episodes", width=2.5)]
    if run.evaluations:
        steps, means, halves = (
            np.array([np.nan if value is None else float(value) for value in column])
            for column in list(zip(*run.evaluations, strict=True))[:3]
        )
        lines.append(Line(name="evaluation", x=steps, y=means, band=halves, points=True, color=COLORS[1]))
    random = final_random_return(run)
    if random is not None:
        lines.append(_level("a random policy", random, metrics))
    intervals = " Bars: 95% intervals." if run.evaluations else ""
    return present(
        run,
        Figure(
            key="return",
            title="Return",
            caption="Good: it rises well above a policy that acts at random, and levels off late." + intervals,
            x_label=STEPS,
            y_label="mean return of an episode",
            lines=lines,
        ),
        Figure(
            key="episode-length",
            title="Episode length",
            caption="It depends on the environment: where failing ends an episode it should grow, where succeeding "
            "does, shrink; flat at the time limit where only that ends it.",
            x_label=STEPS,
            y_label="steps, mean",
            lines=[_line(metrics, "episode_length_steps/mean", "episode length")],
        ),
    )


def updates(run: RecordedRun) -> list[Figure]:
    """Return plots of losses, policy change and gradients."""
    metrics = run.metrics
    most = _number(run.setting("learner.max_grad_norm"))
    bound = [_level("clipped above (learner.max_grad_norm)", most, metrics)] if most else []
    return present(
        run,
        _terms(
            metrics,
            "policy-loss",
            "Policy loss",
            "Good: small and around 0. It says little of how well the policy does; growing swings say that updates are "
            "too large.",
            "loss",
            {"policy_loss": "policy loss", "l2_init_loss": "pull towards the initial weights"},
        ),
        Figure(
            key="gradients",
            title="Gradients of policy and value loss",
            caption="Through the layers that both share. Good: within a factor of ten; if that of the value loss is "
            "far larger, these layers do not learn for the policy (learner.value_coef).",
            x_label=STEPS,
            y_label="L2 norm (log scale)",
            lines=[
                _line(metrics, "gradient_norm/policy", "policy, with its entropy bonus"),
                _line(metrics, "gradient_norm/value", "value, times its coefficient"),
            ],
            log=True,
        ),
        _terms(
            metrics,
            "value-loss",
            "Value loss",
            "Good: it settles. It may grow as long as returns do, because there is more to predict.",
            "loss",
            {"value_loss": "value loss"},
        ),
        _terms(
            metrics,
            "explained-variance",
            "Explained variance of the value function",
            "Good: it goes towards 1, a perfect prediction of returns; below 0 it is worse than a constant.",
            "share",
            {"explained_variance": "explained variance"},
        ),
        _terms(
            metrics,
            "entropy",
            "Entropy of the policy",
            "Good: it falls slowly. A fast fall to 0 is a policy that stopped exploring (learner.entropy_coef).",
            "nats",
            {"entropy": "entropy"},
        ),
        _terms(
            metrics,
            "kl",
            "How far an update moves the policy",
            "Good: KL divergence below about 0.05. Far above it the policy runs ahead of its data: a lower "
            "learner.learning_rate, fewer epochs.",
            "KL divergence, nats",
            {"approx_kl": "KL divergence from the policy that acted"},
        ),
        _terms(
            metrics,
            "clipped",
            "Transitions whose update was clipped",
            "Good: a few to twenty percent. Nearly all: updates are too large; none: they could be larger.",
            "share of transitions",
            {"clip_fraction": "clipped"},
            share=True,
        ),
        Figure(
            key="gradient",
            title="Gradient norm before clipping",
            caption="Good: steady. Jumps by powers of ten, or all of it far above the bound, ask for a lower "
            "learner.learning_rate.",
            x_label=STEPS,
            y_label="L2 norm (log scale)",
            lines=[_line(metrics, "loss/grad_norm", "gradient norm"), *bound],
            log=True,
        ),
        *(
            Figure(
                key=f"schedule-{name}",
                title=f"learner.{name}",
                caption=caption,
                x_label=STEPS,
                y_label=name,
                lines=[_line(metrics, name, name)],
            )
            for name, caption in (
                *((name, "As learner.schedules makes it.") for name in ("learning_rate", "entropy_coef")),
                ("value_coef", "Lower while the value's gradient would drown the policy's."),
                *((name, "As learner.schedules makes it.") for name in ("clip_coef", "value_clip_coef")),
            )
            if len(np.unique(metrics.curve(name)[1])) > 1
        ),
    )


def speed(run: RecordedRun) -> list[Figure]:
    """Return plots of speed, of time by stage, and of policy lag."""
    metrics = run.metrics
    unit, label = time_unit(float(metrics.seconds[-1]))
    ends = np.array([window.stop - 1 for window in metrics.windows(100_000)], int)
    over_time = metrics.seconds[ends] / unit if len(ends) else np.zeros(0)
    speeds = [
        Line(name=name, x=over_time, y=rates(metrics, key, 100_000), color=COLORS[i], dash=dash)
        for i, (key, name, dash) in enumerate(
            (("trained_env_steps", "trained", "solid"), ("sampled_env_steps", "delivered by actors", "dash"))
        )
    ]
    return present(
        run,
        Figure(
            key="speed",
            title="Speed",
            caption="Good: level, and both the same. Dips are pauses: saving, actors being replaced, or other work on "
            "the machine.",
            x_label=label,
            y_label="environment steps per second",
            lines=speeds,
        ),
        Figure(
            key="learner-time",
            title="The learner's time",
            caption="Good: nearly all of it updates weights. Where the learner also acts, it makes its own rollouts "
            "while it waits for them; elsewhere much waiting means that the actors are too slow.",
            x_label=label,
            y_label="share of its time",
            lines=_shares(metrics, _learner_seconds(metrics), unit),
            stacked=True,
            share=True,
        ),
        Figure(
            key="actor-time",
            title="An actor's time",
            caption="On average. The rest is waiting for the learner, or for others in the same process. Good if "
            "acting is the bottleneck: little rest.",
            x_label=label,
            y_label="share of its time",
            lines=_shares(metrics, _actor_seconds(metrics), unit),
            stacked=True,
            share=True,
        ),
        Figure(
            key="lag",
            title="Policy lag: how old the data is",
            caption="Updates made between acting and training on it. Good: below actor.max_policy_lag, and the lower "
            "the better; 0 is data of the newest weights.",
            x_label=STEPS,
            y_label="versions",
            lines=[
                _line(metrics, "policy_lag_versions/mean", "mean"),
                _line(metrics, "policy_lag_versions/max", "highest so far", index=1, steps=True),
            ],
        ),
    )


def dropped(run: RecordedRun) -> list[Figure]:
    """Return a plot of the steps that were dropped."""
    reasons = [r for r in run.metrics.labels("dropped_env_steps") if run.total(f"dropped_env_steps/{r}")]
    return present(
        run,
        Figure(
            key="dropped",
            title="Steps dropped, by reason",
            caption="Good: nothing until the end of a session (shutdown).",
            x_label=STEPS,
            y_label="environment steps, so far",
            legend="always",
            lines=[
                _sum(run.metrics, f"dropped_env_steps/{reason}", reason, index) for index, reason in enumerate(reasons)
            ],
        ),
    )


def memory(run: RecordedRun) -> list[Figure]:
    """Return plots of what the memory is used for, of the log-prob parity check and of memory staleness."""
    metrics = run.metrics
    states = {"stored": "as the actors stored them", "used": "as training used them"}
    return present(
        run,
        *_memory_horizon(run),
        Figure(
            key="parity_check",
            title="Log-prob parity check: is the memory right?",
            caption="Good: below the line, usually near 1e-6, which is rounding (0 is drawn as 1e-8). Above it actors "
            "and learner disagree on what the policy remembered.",
            x_label=STEPS,
            y_label="difference (log scale)",
            lines=[
                _line(metrics, "log_prob_error", "actors' against learner's log-probabilities"),
                _level("alarm above", TOLERANCE, metrics),
            ],
            log=True,
        ),
        Figure(
            key="staleness",
            title="Staleness of the memory that segments begin with",
            caption="Distance to what the newest weights would remember, over its size. Good: level. "
            "actor.burn_in or learner.refresh_states bring what training uses close to 0.",
            x_label=STEPS,
            y_label="relative distance",
            lines=[
                _line(metrics, f"memory_staleness_ratio/{label}", states.get(label, label), index=index)
                for index, label in enumerate(metrics.labels("memory_staleness_ratio"))
            ],
            share=True,
        ),
    )


def _memory_horizon(run: RecordedRun) -> list[Figure]:
    record = run.memory_horizon
    if record is None:
        return []
    levels = [*record["horizons"], record["whole"]]
    returns, half_widths = (
        np.array([float("nan") if level[key] is None else float(level[key]) for level in levels])
        for key in ("mean_return", "return_ci95")
    )
    names = [*(f"{level['steps']}" for level in record["horizons"]), "all"]
    episodes, actions = record.get("episodes"), record.get("actions")
    return [
        Figure(
            key="memory_horizon",
            title="What the memory is used for",
            caption=f"Return where the memory reaches back only so many steps ({episodes} episodes each, with the same "
            f"seeds; actions {actions}; policy version {record.get('policy_version')}), with 95% intervals. Flat: the "
            "policy needs no memory here. Where it stops rising, it needs none that is longer.",
            x_label="steps that are remembered",
            y_label="return",
            x_names=names,
            lines=[
                Line(
                    name="return",
                    x=np.arange(len(levels), dtype=np.float64),
                    y=returns,
                    band=np.nan_to_num(half_widths),
                    points=True,
                )
            ],
        )
    ]


def weights(run: RecordedRun) -> tuple[list[Figure], list[LegendEntry]]:
    """Return plots of the weights by component, and the legend that they share."""
    metrics = run.metrics
    components = sorted({label for feature in _FEATURES for label in metrics.labels(feature.name)})
    looks = {component: style(index) for index, component in enumerate(components)}
    figures = [
        Figure(
            key=feature.name.replace("_", "-"),
            title=feature.title,
            caption=feature.caption,
            x_label=STEPS,
            y_label=feature.unit,
            lines=[
                Line(name=label, x=x, y=y, color=looks[label][0], dash=looks[label][1], width=1.7)
                for label in sorted(metrics.labels(feature.name))
                for x, y in (metrics.curve(f"{feature.name}/{label}"),)
            ],
            share=feature.share,
            log=feature.log,
            legend="shared",
        )
        for feature in _FEATURES
    ]
    return present(run, *figures), [LegendEntry(name, *look) for name, look in looks.items()]


def actors(run: RecordedRun) -> list[Figure]:
    """Return plots of actors by state and of faults."""
    metrics = run.metrics
    faults = [(f"actor_restarts/{r}", f"actors replaced: {r}") for r in metrics.labels("actor_restarts")]
    faults += [("env_faults", "environment slots restarted"), ("lost_unrolls", "unrolls lost")]
    faults += [
        (f"refused_trajectories/{r}", f"deliveries refused: {r}") for r in metrics.labels("refused_trajectories")
    ]
    faults += [("skipped_updates", "updates skipped"), ("failed_checkpoints", "checkpoints not written")]
    happened = [(key, name) for key, name in faults if run.total(key)]
    unit, label = time_unit(float(metrics.seconds[-1]))
    alive = metrics.column("actors_alive")
    # When the last line of a session is written, its actors are stopped already.
    going_on = np.ones(len(metrics), bool)
    going_on[[session.stop - 1 for session in metrics.sessions]] = False
    states = [
        state
        for state in metrics.labels("actors")
        if state != "up" and np.nansum(metrics.column(f"actors/{state}")[going_on])
    ]
    levels = [("at work", alive), *((state, metrics.column(f"actors/{state}")) for state in states)]
    return present(
        run,
        Figure(
            key="actors",
            title="Actors",
            caption="Good: level. A dip is an actor that died or hung, until its successor is there; 0 at the very end "
            "is the run closing.",
            x_label=label,
            y_label="actors",
            whole=True,
            lines=[
                Line(name=name, x=metrics.seconds / unit, y=level, color=COLORS[index % len(COLORS)], steps=True)
                for index, (name, level) in enumerate(levels)
            ],
        ),
        Figure(
            key="faults",
            title="Faults so far",
            caption="Good: no line at all. Single events cost one unroll or episode each; steps up again and again "
            "need a look into the log below. Unrolls under way when a session ends count as lost.",
            x_label=STEPS,
            y_label="events",
            whole=True,
            legend="always",
            lines=[_sum(metrics, key, name, index) for index, (key, name) in enumerate(happened)],
        ),
    )


def present(run: RecordedRun, *figures: Figure) -> list[Figure]:
    """Return the figures that have data, with their lines that have data, the run's clock, and marks of its resumes."""
    steps, seconds = run.metrics.steps[run.metrics.kept], run.metrics.seconds[run.metrics.kept]
    unit, label = time_unit(float(run.metrics.seconds[-1]))
    found = []
    for figure in figures:
        lines = [line for line in figure.lines if np.isfinite(line.y).any()]
        if any(not line.quiet for line in lines):
            if figure.x_names:
                found.append(dataclasses.replace(figure, lines=lines))
                continue
            over_steps = figure.x_label == STEPS
            clock = (steps, seconds / unit) if over_steps else (seconds / unit, steps)
            at = [s.first_step for s in run.metrics.sessions[1:]] if over_steps else _starts(run.metrics)
            lines = [dataclasses.replace(line, clock=clock) for line in lines]
            other = label if over_steps else STEPS
            found.append(dataclasses.replace(figure, lines=lines, marks=at, other_label=other))
    return found


def _starts(metrics: RecordedMetrics) -> list[float]:
    unit, _ = time_unit(float(metrics.seconds[-1]))
    return [float(metrics.seconds[s.start - 1]) / unit for s in metrics.sessions[1:]]


def _terms(
    metrics: RecordedMetrics,
    key: str,
    title: str,
    caption: str,
    unit: str,
    names: dict[str, str],
    *,
    share: bool = False,
) -> Figure:
    lines = [_line(metrics, f"loss/{term}", name, index=index) for index, (term, name) in enumerate(names.items())]
    return Figure(key=key, title=title, caption=caption, x_label=STEPS, y_label=unit, lines=lines, share=share)


def _line(
    metrics: RecordedMetrics, key: str, name: str, *, index: int = 0, width: float = 2.0, steps: bool = False
) -> Line:
    x, y = metrics.curve(key)
    color, dash = style(index)
    return Line(name=name, x=x, y=y, color=color, dash=dash, width=width, steps=steps)


def _sum(metrics: RecordedMetrics, key: str, name: str, index: int) -> Line:
    """Return a counter, summed over sessions, over environment steps."""
    gained = metrics.increments(key).cumsum()
    color, dash = style(index)
    return Line(name=name, x=metrics.steps[metrics.kept], y=gained[metrics.kept], color=color, dash=dash, steps=True)


def _level(name: str, value: float, metrics: RecordedMetrics) -> Line:
    x = metrics.steps[metrics.kept][[0, -1]]
    return Line(name=name, x=x, y=np.full(2, value), color=GREY, dash="dash", width=1.5, quiet=True)


def rates(metrics: RecordedMetrics, key: str, most: int) -> Numbers:
    """Return a counter's increase per second of training in each of ``metrics.windows(most)``."""
    gained, elapsed = metrics.increments(key), metrics.elapsed()
    return np.array([gained[w].sum() / elapsed[w].sum() for w in metrics.windows(most)])


def _shares(metrics: RecordedMetrics, seconds: dict[str, tuple[Numbers, Numbers]], unit: float) -> list[Line]:
    """Return shares over time from (seconds [N], seconds of the whole [N]) by name."""
    windows = metrics.windows(MOST_WINDOWS)
    ends = np.array([window.stop - 1 for window in windows], int)
    found = []
    for index, (name, (spent, whole)) in enumerate(seconds.items()):
        values = np.array([spent[w].sum() / whole[w].sum() if whole[w].sum() > 0 else np.nan for w in windows])
        if np.nansum(values) > 0:
            found.append(Line(name=name, x=metrics.seconds[ends] / unit, y=values, color=_area(index)))
    return found


def _learner_seconds(metrics: RecordedMetrics) -> dict[str, tuple[Numbers, Numbers]]:
    """Return the learner's seconds by stage. The file counts ``reduce`` within ``update``; here they are separate."""
    spent = {
        stage: metrics.increments(f"stage_seconds/{stage}")
        for stage in metrics.labels("stage_seconds")
        if not stage.startswith("actor_")
    }
    whole = sum((values for stage, values in spent.items() if stage != "reduce"), np.zeros(len(metrics)))
    if "reduce" in spent and "update" in spent:
        spent["update"] = spent["update"] - spent["reduce"]
    return {_STAGES.get(stage, stage): (spent[stage], whole) for stage in sorted(spent, key=_place)}


def _place(stage: str) -> int:
    return list(_STAGES).index(stage) if stage in _STAGES else len(_STAGES)


def _actor_seconds(metrics: RecordedMetrics) -> dict[str, tuple[Numbers, Numbers]]:
    """Return the mean actor's seconds by stage; the file has sums over all actors."""
    alive = np.nan_to_num(metrics.column("actors_alive"))
    # Actors are stopped when the run closes; their work was done before.
    alive = np.where(alive > 0, alive, np.nanmax(np.append(alive, 1.0)))
    whole = alive * metrics.elapsed()
    spent = {
        stage: metrics.increments(f"stage_seconds/actor_{stage}")
        for stage in _ACTOR_STAGES
        if f"actor_{stage}" in metrics.labels("stage_seconds")
    }
    if not any(seconds.any() for seconds in spent.values()):
        return {}
    # Work is counted on delivery, which can be a line later than the work.
    whole = np.maximum(whole, sum(spent.values(), np.zeros(len(metrics))))
    rest = whole - sum(spent.values(), np.zeros(len(metrics)))
    return {_ACTOR_STAGES[stage]: (values, whole) for stage, values in spent.items()} | {"the rest": (rest, whole)}


def _area(index: int) -> str:
    return (COLORS[0], COLORS[1], COLORS[2], GREY, COLORS[3], COLORS[4], COLORS[5], "#3f6b8a", "#a05a4a")[index % 9]


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the seconds of the unit in which so many are well read, and the label of an axis in it."""
    if seconds < 180:
        return 1.0, "seconds of training"
    if seconds < 3 * 3600:
        return 60.0, "minutes of training"
    return 3600.0, "hours of training"


def _number(setting: object) -> float | None:
    try:
        return float(str(setting))
    except ValueError:
        return None
