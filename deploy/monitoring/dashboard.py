"""The Grafana dashboard, made from the metrics catalogue.

``python -m shoal.deploy.monitoring`` writes it, and the guide's table of metrics.

``ROWS`` lists the panels. Their descriptions come from the catalogue, and a last row shows the metrics that no panel
of ``ROWS`` shows.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.monitoring import metrics_table
from shoal.deploy.monitoring.catalogue import CATALOGUE, CatalogueEntry
from shoal.deploy.monitoring.grafana_json import SAMPLES, Json, annotation, panel_json, variables
from shoal.deploy.monitoring.panels import Panel, all_policies, buckets, loss_terms, mean, rate
from shoal.learner.parity_check import TOLERANCE

DASHBOARD = Path(__file__).parent / "grafana" / "shoal.json"
COLUMNS = 24


def _number(title: str, expression: str, unit: str = "short", **more: Any) -> Panel:
    return Panel(title, {"": expression}, unit, kind="stat", width=3, height=4, **more)


_OF_LEARNER = 'shoal_stage_seconds_total{stage!~"actor_.+"}'
_OF_LEARNER_ONCE = 'shoal_stage_seconds_total{stage!~"actor_.+|reduce"}'
_OF_ACTORS = 'shoal_stage_seconds_total{stage=~"actor_.+"}'
_SINCE_UPDATE = "time() - (shoal_last_update_timestamp_seconds > 0)"
_SINCE_CHECKPOINT = "time() - (shoal_last_checkpoint_timestamp_seconds > 0)"
# A run ends with the steps of all its policies.
_STEPS_LEFT = f"{all_policies('shoal_target_env_steps')} - {all_policies('shoal_run_env_steps')}"
_TIME_LEFT = f"clamp_min({_STEPS_LEFT}, 0) / ({all_policies(rate('shoal_trained_env_steps_total'))} > 0)"
_STAGES = rate(_OF_LEARNER_ONCE)
_ACTOR_STAGES = f"{rate(_OF_ACTORS)} / ignoring (stage, policy) group_left () (shoal_actors_alive > 0)"
_STAGES_OF_UPDATE = f"{rate(_OF_LEARNER)} / ignoring (stage) group_left () ({rate('shoal_updates_total')} > 0)"
# Lags are whole numbers; a quantile interpolated within a bucket could lie below the mean.
_LAG_QUANTILE = f"ceil(histogram_quantile(0.95, sum by (le, policy) ({rate('shoal_policy_lag_versions_bucket')})))"
# Policies share the actors: the time of one that acts for another is not waiting.
_WAITING = f"clamp_min(1 - sum without (stage, policy) ({_ACTOR_STAGES}), 0)"
_ACTORS_NOTE = (
    "The mean of all actors; for the rest of its time an actor waits for the learner, or for others in its process."
)
_LEARNER_NOTE = (
    "The run's training loop. A large share of wait means that acting is the bottleneck; learners that also act spend "
    "it acting."
)
_BY_COMPONENT = "{{component}}"

ROWS: Mapping[str, Sequence[Panel]] = {
    "Overview": (
        _number("Return", "shoal_mean_return", decimals=3),
        _number("Trained steps per second", all_policies(rate("shoal_trained_env_steps_total"))),
        _number("Trained steps", all_policies("shoal_run_env_steps"), note="The steps of the whole run."),
        _number("Actors alive", "shoal_actors_alive", "none"),
        _number("Policy lag", mean("shoal_policy_lag_versions"), "none", decimals=1),
        _number("Since the last update", _SINCE_UPDATE, "s", bad_above=300),
        _number("Parity check, highest error", "shoal_log_prob_error_max", "sci", bad_above=TOLERANCE),
        _number("Steps unaccounted for", "abs(shoal_ledger_imbalance_env_steps)", "none", bad_above=1),
        Panel("Return of the last 256 episodes", {"return": "shoal_mean_return"}, width=12),
        Panel(
            "Environment steps per second",
            {
                "sampled": rate("shoal_sampled_env_steps_total"),
                "trained": rate("shoal_trained_env_steps_total"),
            },
            width=12,
        ),
        Panel(
            "The learner's time",
            {"{{stage}}": all_policies(_STAGES)},
            "percentunit",
            kind="bargauge",
            width=12,
            share=True,
            note=_LEARNER_NOTE,
        ),
        Panel(
            "The actors' time",
            {"{{stage}}": all_policies(_ACTOR_STAGES), "waiting": _WAITING},
            "percentunit",
            kind="bargauge",
            width=12,
            share=True,
            note=_ACTORS_NOTE,
        ),
        Panel(
            "Bottleneck",
            {"{{stage}}": "shoal_bottleneck"},
            "none",
            width=16,
            height=6,
            stacked=True,
            share=True,
            note="The live view and summary.json say it in a sentence, with the setting to change.",
        ),
        Panel(
            "Alerts",
            {"": 'ALERTS{alertname=~"Shoal.+"}'},
            "none",
            kind="table",
            height=6,
            when_empty="none",
            note="Firing or about to; they come with deploy/monitoring/prometheus/alerts.yml. Empty is well.",
        ),
    ),
    "Step accounting": (
        Panel(
            "Steps of the whole run",
            {"trained": "shoal_run_env_steps", "to train": "shoal_target_env_steps"},
            width=16,
        ),
        Panel("Time left", {"seconds": _TIME_LEFT}, "s", note="At the present speed; max_seconds may end it earlier."),
        Panel(
            "Steps by what became of them",
            {
                "trained": rate("shoal_trained_env_steps_total"),
                "dropped: {{reason}}": rate("shoal_dropped_env_steps_total"),
            },
            stacked=True,
            note="Per second. What is dropped should be nothing until the end (shutdown).",
        ),
        Panel(
            "Steps in flight, and unaccounted for",
            {"in flight": "shoal_in_flight_env_steps", "unaccounted for": "shoal_ledger_imbalance_env_steps"},
        ),
        Panel(
            "Dropped so far",
            {"{{reason}}": "shoal_dropped_env_steps_total > 0"},
            when_empty="nothing",
            note="Drops by this process; the summary has the whole run's.",
        ),
        Panel(
            "Deliveries refused, unrolls lost",
            {"refused: {{reason}}": "shoal_refused_trajectories_total", "lost": "shoal_lost_unrolls_total"},
            "none",
        ),
        Panel("Updates", {"updates of the run": "shoal_policy_version", "of this process": "shoal_updates_total"}),
        Panel(
            "Optimizer steps per update",
            {"steps": f"{rate('shoal_optimizer_steps_total')} / ({rate('shoal_updates_total')} > 0)"},
            "none",
            note="learner.target_kl may end an update early.",
        ),
        Panel("Updates skipped", {"skipped": "shoal_skipped_updates_total"}, "none", bad_above=1),
    ),
    "Speed by stage": (
        Panel(
            "The learner's time", {"{{stage}}": _STAGES}, "percentunit", stacked=True, share=True, note=_LEARNER_NOTE
        ),
        Panel(
            "An actor's time",
            {"{{stage}}": _ACTOR_STAGES, "waiting": _WAITING},
            "percentunit",
            stacked=True,
            share=True,
            note=_ACTORS_NOTE,
        ),
        Panel("Seconds per update", {"{{stage}}": _STAGES_OF_UPDATE}, "s", note="reduce is a part of update."),
        Panel("Updates per second", {"updates": rate("shoal_updates_total")}, width=12),
        Panel(
            "Bytes per second",
            {
                "trajectories received": rate("shoal_received_bytes_total"),
                "weights published": rate("shoal_published_bytes_total"),
            },
            "Bps",
            width=12,
        ),
    ),
    "Policy lag and queue": (
        Panel(
            "Policy lag",
            {"{{le}}": buckets("shoal_policy_lag_versions")},
            "none",
            kind="heatmap",
            note="Trajectories by the versions between acting and training; actor.max_policy_lag bounds it, except of "
            "actors that are too slow for it.",
        ),
        Panel(
            "Policy lag, mean and 95th percentile",
            {"mean": mean("shoal_policy_lag_versions"), "95th percentile": _LAG_QUANTILE},
            "none",
            decimals=1,
        ),
        Panel(
            "Unrolls under way",
            {"lag of the oldest": "shoal_slowest_actor_lag_versions", "too late already": "shoal_stale_actors"},
            "none",
            note="Actors that are slower than the others, or hang.",
        ),
        Panel(
            "Data by actor",
            {"{{actor}}": "shoal_actor_data_share_ratio"},
            "percentunit",
            decimals=2,
            note="Trained steps of the actor that gave least and of the one that gave most, divided by an equal share.",
        ),
        Panel("Segments waiting for their update", {"segments": "shoal_queued_segments"}, width=4),
        Panel("Bytes waiting for their update", {"bytes": "shoal_queued_bytes"}, "bytes", width=4),
    ),
    "Losses": (
        Panel("Loss", {"loss": "shoal_total_loss", **loss_terms("policy_loss", "l2_init_loss")}),
        Panel("Value loss", loss_terms("value_loss")),
        Panel(
            "Explained variance",
            {"explained variance": "shoal_explained_variance_ratio"},
            "percentunit",
            note="The share of returns that the value explains: towards 1 as it learns, below 0 worse than a constant.",
        ),
        Panel("Entropy", {"nats": "shoal_entropy_nats"}, note="A fast fall to 0 is a policy that stopped exploring."),
        Panel(
            "How far an update moves the policy",
            {"from the one that acted": "shoal_approx_kl_nats", "from the one before": "shoal_update_kl_nats"},
            "none",
            note="KL divergences in nats. learner.target_kl ends an update by the first; learner.desired_kl sets the "
            "learning rate by the second.",
        ),
        Panel("Transitions clipped", {"clipped": "shoal_clipped_transitions_ratio"}, "percentunit", share=True),
        Panel("Gradient norm before clipping", {"norm": "shoal_global_gradient_norm"}, log=True),
        Panel(
            "Learning rate",
            {"learning rate": "shoal_learning_rate"},
            "sci",
            note="It changes where learner.schedules or learner.desired_kl says so.",
        ),
        Panel(
            "Scheduled coefficients",
            {name: f"shoal_{name}" for name in ("entropy_coef", "value_coef", "clip_coef", "value_clip_coef")},
            "none",
        ),
        Panel("Terms of a loss of your own", {"{{name}}": "shoal_loss_metric"}, when_empty="none"),
    ),
    "Memory": (
        Panel(
            "Log-prob parity check",
            {"last check": "shoal_log_prob_error", "highest": "shoal_log_prob_error_max"},
            "sci",
            log=True,
            bad_above=TOLERANCE,
        ),
        Panel("Checks per second", {"checks": rate("shoal_log_prob_checks_total")}, note="Nobody looks where it is 0."),
        Panel(
            "Stale memory",
            {"{{state}}": "shoal_memory_staleness_ratio"},
            "percentunit",
            note="Freshened by actor.burn_in or learner.refresh_states.",
        ),
    ),
    "Is it learning?": (
        Panel(
            "Return against a random policy's",
            {"return": "shoal_mean_return", "random policy": "shoal_random_return"},
            note="Good: it rises well above.",
        ),
        Panel(
            "Half width of their 95% intervals",
            {"return": "shoal_mean_return_ci95", "random policy": "shoal_random_return_ci95"},
        ),
        Panel("Compared", {"{{verdict}}": "shoal_learning"}, "none", stacked=True),
        Panel(
            "Likeliest cause, where nothing is learned",
            {"{{cause}}": "shoal_learning_problem > 0"},
            "none",
            when_empty="none",
        ),
        Panel(
            "Gradients of policy and value loss",
            {"{{loss}}": "shoal_gradient_norm"},
            log=True,
            note="They share layers: the larger one decides what these learn (learner.value_coef).",
        ),
        Panel("Spread of the advantages", {"standard deviation": "shoal_advantage_std"}),
    ),
    "Episodes": (
        Panel("Returns", {"{{le}}": buckets("shoal_episode_return")}, kind="heatmap"),
        Panel("Lengths", {"{{le}}": buckets("shoal_episode_length_steps")}, kind="heatmap"),
        Panel(
            "Evaluation",
            {"last": "shoal_evaluation_return", "best": "shoal_evaluation_best_return"},
            note="None unless evaluation.every_env_steps asks for it.",
        ),
        Panel("Evaluated after so many steps", {"steps": "shoal_evaluation_env_steps"}),
        Panel(
            "Evaluations",
            {"made": "shoal_evaluations_total", "given up": "shoal_failed_evaluations_total"},
            "none",
        ),
        Panel("Mean length", {"steps": mean("shoal_episode_length_steps")}),
        Panel(
            "Episodes per second",
            {"acted": rate("shoal_sampled_episodes_total"), "taken into updates": rate("shoal_episodes_total")},
        ),
        Panel(
            "Environment faults",
            {"faults": all_policies("shoal_env_faults_total")},
            "none",
            note="run.log names environment, slot, step and field of each.",
        ),
        Panel(
            "Games won against earlier versions",
            {"{{opponent}}": "shoal_opponent_win_ratio"},
            "percentunit",
            share=True,
            when_empty="no self-play",
            note="Good: high against the oldest, above one half against the newest.",
        ),
        Panel(
            "Return above that of earlier versions",
            {"{{opponent}}": "shoal_opponent_return_difference"},
            when_empty="no self-play",
        ),
        Panel(
            "Earlier versions that are played",
            {"{{opponent}}": "shoal_opponent_version"},
            "none",
            when_empty="no self-play",
        ),
        Panel(
            "Steps of frozen agents",
            {"steps": rate("shoal_opponent_env_steps_total")},
            note="Per second; no other count has them.",
        ),
        Panel(
            "Numbers of info at an episode's end",
            {"{{name}}": "shoal_episode_metric"},
            "none",
            note="Means over the last 256 episodes that had them, for example is_success.",
        ),
        Panel(
            "Remarks on environments",
            {"{{remark}}": "shoal_env_remarks_total"},
            "none",
            note="run.log has the first of each kind.",
        ),
        Panel(
            "Tokens without a place, per second",
            {"tokens": rate("shoal_ignored_tokens_total")},
            note="Tokens of features that the policy has no row for.",
        ),
        Panel("Numbers of callbacks", {"{{name}}": "shoal_callback"}, note="None unless callbacks returned some."),
    ),
    "Weights": (
        Panel("Norm", {_BY_COMPONENT: "shoal_weight_norm"}, width=6),
        Panel("Distance to init", {_BY_COMPONENT: "shoal_weight_distance_to_init"}, width=6),
        Panel(
            "Relative distance to init",
            {_BY_COMPONENT: "shoal_weight_distance_to_init_ratio"},
            "percentunit",
            width=6,
        ),
        Panel("Effective rank", {_BY_COMPONENT: "shoal_weight_effective_rank"}, "none", width=6),
        Panel("Condition number", {_BY_COMPONENT: "shoal_weight_condition_number"}, log=True),
        Panel(
            "On their bound",
            {_BY_COMPONENT: "shoal_weight_clipped_ratio"},
            "percentunit",
            note="Only with learner.regularization.clip_scale.",
        ),
        Panel(
            "Dormant units",
            {_BY_COMPONENT: "shoal_dormant_units_ratio"},
            "percentunit",
            note="Growing, while the return falls: the network loses its ability to learn (deploy/docs/networks.md).",
        ),
    ),
    "Process": (
        Panel("Actors", {"{{state}}": "shoal_actors"}, "none", stacked=True),
        Panel("Actors replaced", {"{{reason}}": "shoal_actor_restarts_total"}, "none"),
        Panel(
            "Time to replace an actor",
            {"seconds": "shoal_actor_recovery_seconds_total / (shoal_actor_recoveries_total > 0)"},
            "s",
            when_empty="none was replaced",
            note="From noticing the failure, without waiting for a place in the cluster; mean of this process.",
        ),
        Panel("Since the last checkpoint", {"seconds": _SINCE_CHECKPOINT}, "s", bad_above=3600),
        Panel("The run is done", {"done": "shoal_run_finished"}, "none", width=6),
        Panel("Checkpoints not written", {"failed": "shoal_failed_checkpoints_total"}, "none", width=6, bad_above=1),
        Panel(
            "Cores used by the run's own process",
            {"cores": rate("process_cpu_seconds_total")},
            "none",
            width=6,
            decimals=1,
            note="Actors and other learners are processes of their own.",
        ),
        Panel(
            "Memory of the run's own process",
            {"resident": "process_resident_memory_bytes"},
            "bytes",
            width=6,
            note="It should be flat.",
        ),
        Panel(
            "Disk of the run directory",
            {"free": "shoal_run_dir_free_bytes", "size": "shoal_run_dir_size_bytes"},
            "bytes",
            width=6,
        ),
        Panel("Accelerator memory", {"{{part}}": "shoal_accelerator_memory_bytes"}, "bytes", width=6),
        Panel(
            "Metrics that were not read",
            {"{{metric}}": "shoal_failed_readings_total > 0"},
            "none",
            width=6,
            bad_above=1,
            when_empty="none",
        ),
        Panel("Open files", {"open": "process_open_fds", "limit": "process_max_fds"}, "none", width=6, log=True),
        Panel("Running since", {"seconds": "time() - process_start_time_seconds"}, "s", kind="stat", width=6, height=4),
        Panel("A scrape takes", {"seconds": "scrape_duration_seconds"}, "s", width=6, height=4),
        Panel("Answers (1) or not (0)", {"up": "up"}, "none", width=6, height=4),
        Panel("Versions", {"": "shoal_build_info"}, "none", kind="table", width=6, height=4),
        Panel("The run", {"": "shoal_run_info"}, "none", kind="table", width=24, height=4),
    ),
}


def dashboard() -> Json:
    """Return the dashboard as JSON data that Grafana imports."""
    shown = set(_shown(ROWS))
    rows = {**ROWS, "More": tuple(_panel_of(entry) for entry in CATALOGUE if entry not in shown)}
    return {
        "uid": "shoal",
        "title": "shoal",
        "description": "Made by `python -m shoal.deploy.monitoring`: change deploy/monitoring/dashboard.py, not this.",
        "tags": ["shoal"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [annotation()]},
        "templating": {"list": list(variables())},
        "panels": list(_placed({title: panels for title, panels in rows.items() if panels})),
    }


def catalogued(expression: str) -> set[CatalogueEntry]:
    """Return the metrics of the catalogue that an expression reads."""
    names = {name for name, _ in SAMPLES.findall(expression)}
    return {entry for entry in CATALOGUE if names & _sample_names(entry)}


def _sample_names(entry: CatalogueEntry) -> set[str]:
    if entry.kind == "histogram":
        return {f"{entry.name}_{part}" for part in ("bucket", "sum", "count")}
    return {entry.name}


def _shown(rows: Mapping[str, Sequence[Panel]]) -> Iterator[CatalogueEntry]:
    for panels in rows.values():
        for panel in panels:
            for expression in panel.queries.values():
                yield from catalogued(expression)


def _description(panel: Panel) -> str:
    shown = set(_shown({"": [panel]}))
    helps = [f"`{entry.name}`: {entry.help}" for entry in CATALOGUE if entry in shown]
    return "\n\n".join(filter(None, (panel.note, *helps)))


def _panel_of(entry: CatalogueEntry) -> Panel:
    """Return a panel for a metric that ``ROWS`` does not show."""
    title = entry.name.removeprefix("shoal_").removesuffix("_total").replace("_", " ").capitalize()
    legend = f"{{{{{entry.label}}}}}" if entry.label else ""
    unit = "s" if "_seconds" in entry.name else "bytes" if "_bytes" in entry.name else "short"
    if entry.kind == "histogram":
        return Panel(title, {"{{le}}": buckets(entry.name)}, unit, kind="heatmap")
    if entry.kind == "counter":
        return Panel(
            f"{title} per second", {legend: rate(entry.name)}, {"bytes": "Bps", "s": "percentunit"}.get(unit, unit)
        )
    if entry.name.endswith("_timestamp_seconds"):
        return Panel(f"Since {title.lower()}", {legend: f"time() - ({entry.name} > 0)"}, unit)
    return Panel(title, {legend: entry.name}, "percentunit" if entry.name.endswith("_ratio") else unit)


def _with_policies(panel: Panel) -> Panel:
    """The panel with the name of its policy in the legend of every series that has one.

    Where there is one policy, no series has this label, and Grafana puts nothing in its place.
    """
    if panel.kind in ("table", "heatmap"):
        return panel
    named = {
        f"{legend or panel.title} {{{{policy}}}}" if _is_by_policy(expression) else legend: expression
        for legend, expression in panel.queries.items()
    }
    return dataclasses.replace(panel, queries=named)


def _is_by_policy(expression: str) -> bool:
    summed = re.search(r"\bwithout \([^)]*\bpolicy\b", expression)
    return not summed and any(not entry.of_run for entry in catalogued(expression))


def _placed(rows: Mapping[str, Sequence[Panel]]) -> Iterator[Json]:
    """The panels of each row by its title, from left to right."""
    number, top = 0, 0
    for title, panels in rows.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            "panels": [],
        }
        top += 1
        left = height = 0
        for panel in panels:
            number += 1
            if left + panel.width > COLUMNS:
                left, top, height = 0, top + height, 0
            yield {
                "id": number,
                "gridPos": {"x": left, "y": top, "w": panel.width, "h": panel.height},
                **panel_json(_with_policies(panel), _description(panel)),
            }
            left, height = left + panel.width, max(height, panel.height)
        top += height


def rendered() -> str:
    """Return the dashboard as the text of its file."""
    return json.dumps(dashboard(), indent=2) + "\n"


def main() -> None:
    """Write the dashboard and the table."""
    guide = metrics_table.GUIDE
    guide.write_text(metrics_table.rendered(guide.read_text(encoding="utf-8")), encoding="utf-8")
    DASHBOARD.write_text(rendered(), encoding="utf-8")
    print(f"{DASHBOARD}: {sum(panel['type'] != 'row' for panel in dashboard()['panels'])} panels")
