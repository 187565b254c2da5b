"""The metrics catalogue, scraped over HTTP as Prometheus would."""

from __future__ import annotations

import dataclasses
import math
import re
import urllib.request
from collections import Counter

import pytest
from metric_sources import REPORTED, make_sources
from prometheus_client.parser import text_string_to_metric_families
from rollouts import RUN, SMALL, make_learner, random_batch, random_columns, small_policy
from shoal.deploy.monitoring.catalogue import CATALOGUE, Sources
from shoal.deploy.monitoring.collector import make_registry
from shoal.deploy.monitoring.learning import CAUSES
from shoal.deploy.monitoring.metrics_server import MetricsServer
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import Histogram, RunStatistics, report_trajectories
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.learner.weight_metrics import WeightMetrics
from shoal.policy.config import RegularizationConfig
from shoal.policy.trajectory import TrajectoryHeader, from_bytes, to_bytes


@pytest.fixture
def sources():
    return make_sources()


@pytest.fixture
def serve():
    """Starts servers on free ports and closes them."""
    servers = []

    def start(sources, port=0):
        servers.append(MetricsServer(make_registry(sources), address="127.0.0.1", port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def scrape(server):
    """Return families by name, as Prometheus parses them."""
    with urllib.request.urlopen(server.url, timeout=10) as response:
        return {family.name: family for family in text_string_to_metric_families(response.read().decode())}


def values(families, name):
    """Return values by labels of one sample name."""
    family = families.get(name) or families[name.removesuffix("_total")]
    return {tuple(s.labels.values()): s.value for s in family.samples if s.name == name}


def test_every_entry_is_on_the_page(sources, serve):
    """Catches a metric that cannot be rendered, or is promised and never shown."""
    families = scrape(serve(sources))
    for entry in CATALOGUE:
        family = families[entry.name.removesuffix("_total")]
        assert family.type == entry.kind, entry.name
        assert family.documentation == entry.help
        assert family.samples, entry.name
        labels = {entry.label, "le" if entry.kind == "histogram" else None} - {None}
        assert {label for s in family.samples for label in s.labels} == labels
    assert values(families, "shoal_build_info") == {("3", "0.1"): 1}
    assert values(families, "shoal_run_info") == {("inline", "colocated"): 1}
    assert "process_resident_memory_bytes" in families


def test_names_follow_the_rules_of_prometheus():
    """Catches names that `promtool check metrics` complains of, or two entries of one name."""
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    for entry in CATALOGUE:
        assert re.fullmatch(r"shoal_[a-z0-9_]+", entry.name)
        assert entry.name.endswith("_total") == (entry.kind == "counter"), entry.name
        assert not re.search(r"_(count|sum|bucket|info|created)$", entry.name)
        assert not re.search(r"_(gauge|counter|histogram|summary)(_|$)", entry.name)
        # base units, spelt out, before _total
        assert not re.search(
            r"_(ms|milliseconds|minutes|hours|kb|mb|kilobytes|megabytes|percent|fraction|bits)(_|$)", entry.name
        )
        for unit in ("seconds", "bytes", "ratio", "nats"):
            if f"_{unit}" in entry.name:
                assert re.search(rf"_{unit}(_total)?$", entry.name), entry.name
        assert entry.help.endswith(".")
        assert len(entry.help) > 10


def test_values_are_those_of_the_run(sources, serve):
    """Catches two numbers for one thing: page and ledger must not disagree, now or later."""
    server = serve(sources)
    families = scrape(server)
    assert values(families, "shoal_sampled_env_steps_total") == {(): 100}
    assert values(families, "shoal_trained_env_steps_total") == {(): 60}
    assert values(families, "shoal_in_flight_env_steps") == {(): 30}
    assert values(families, "shoal_dropped_env_steps_total") == {
        ("stale",): 7,
        ("non_finite",): 3,
        **dict.fromkeys([("learner_lost",), ("shutdown",), ("restart",)], 0),
    }
    assert values(families, "shoal_ledger_imbalance_env_steps") == {(): 0}
    assert values(families, "shoal_refused_trajectories_total") == {("duplicate",): 2, ("malformed",): 0}
    assert values(families, "shoal_actors_alive") == {(): 3}
    states = {("up",): 3, ("starting",): 0, ("unplaced",): 2, ("pausing",): 0}
    assert values(families, "shoal_actors") == states
    assert values(families, "shoal_actor_data_share_ratio") == {("least",): 1, ("most",): 1}
    assert values(families, "shoal_stale_actors") == {(): 2}
    assert values(families, "shoal_slowest_actor_lag_versions") == {(): 5}
    assert values(families, "shoal_run_env_steps") == {(): 60}
    assert values(families, "shoal_target_env_steps") == {(): 1000}
    assert values(families, "shoal_accelerator_memory_bytes") == {("allocated",): 7, ("reserved",): 8, ("total",): 9}
    [free], [size] = (values(families, f"shoal_run_dir_{name}_bytes").values() for name in ("free", "size"))
    assert 0 < free <= size
    replaced = values(families, "shoal_actor_restarts_total")
    assert {reason: actors for (reason,), actors in replaced.items() if actors} == {"died": 1}
    assert values(families, "shoal_log_prob_error") == {(): 1e-6}
    assert values(families, "shoal_mean_return") == {(): -1.0}
    assert values(families, "shoal_mean_return_ci95") == {(): 0.5}
    assert values(families, "shoal_random_return") == {(): 2.1}
    assert values(families, "shoal_random_return_ci95") == {(): 0.25}
    holds = {("better",): 0, ("worse",): 0, ("unknown",): 0, ("no_better",): 1}
    assert values(families, "shoal_learning") == holds
    blamed = values(families, "shoal_learning_problem")
    assert {cause for (cause,), number in blamed.items() if number} == {"few_steps"}
    assert len(blamed) == len(CAUSES)
    assert values(families, "shoal_gradient_norm") == {("policy",): 0.25, ("value",): 4.0}
    assert values(families, "shoal_learning_rate") == {(): 1e-3}
    assert values(families, "shoal_optimizer_steps_total") == {(): 40}
    other = {"relative_distance_to_init": "distance_to_init_ratio", "clipped_fraction": "clipped_ratio"}
    for i, field in enumerate(dataclasses.fields(WeightMetrics)):
        name = field.name if field.name == "dormant_units_ratio" else f"weight_{other.get(field.name, field.name)}"
        assert values(families, f"shoal_{name}") == {("lstm",): i}
    assert values(families, "shoal_ignored_tokens_total") == {(): 4}
    spent = values(families, "shoal_stage_seconds_total")
    assert {stage: seconds for (stage,), seconds in spent.items() if seconds} == {
        "actor_policy": 0.25,
        "actor_env": 0.5,
        "actor_pack": 0.125,
    }
    sources.trajectory_queue.ledger.sampled += 1
    families = scrape(serve(sources))
    assert values(families, "shoal_sampled_env_steps_total") == {(): 101}
    assert values(families, "shoal_ledger_imbalance_env_steps") == {(): 1}


def test_each_unit_of_the_loss_has_a_metric_of_its_own(sources, serve):
    """Catches nats, shares, norms and losses under one name, a total among its parts, a term on two metrics or none.
    What a loss of the user's adds is of an unknown unit."""
    families, terms = scrape(serve(sources)), sources.statistics.terms
    names = ("policy_loss", "value_loss", "l2_init_loss")
    assert values(families, "shoal_loss") == {(name,): terms[name] for name in names}
    assert values(families, "shoal_loss_metric") == {("reward_error",): terms["reward_error"]}
    own = {
        "loss": "total_loss",
        "entropy": "entropy_nats",
        "approx_kl": "approx_kl_nats",
        "update_kl": "update_kl_nats",
        "clip_fraction": "clipped_transitions_ratio",
        "grad_norm": "global_gradient_norm",
        "explained_variance": "explained_variance_ratio",
        "advantage_std": "advantage_std",
    }
    assert {*names, "reward_error", *own} == terms.keys()
    for term, name in own.items():
        assert values(families, f"shoal_{name}") == {(): terms[term]}


def test_the_terms_of_the_loss_add_up_as_their_help_says(sources, serve):
    """Catches a help text that has a term with its coefficient where it is without, and a total that leaves one out."""
    policy, coefs = small_policy(), {"value_coef": 0.3, "entropy_coef": 0.05}
    learner = make_learner(
        policy, regularization=RegularizationConfig(l2_init_coef=0.2), epochs=2, minibatches=2, **coefs
    )
    result = learner.update(random_batch(1))
    sources.statistics.terms, sources.statistics.scheduled = result.terms, result.scheduled
    families = scrape(serve(sources))
    loss = {term: value for (term,), value in values(families, "shoal_loss").items()}
    assert all(loss.values())
    [entropy], [entropy_coef], [total] = (
        values(families, f"shoal_{name}").values() for name in ("entropy_nats", "entropy_coef", "total_loss")
    )
    assert entropy_coef == coefs["entropy_coef"]
    summed = loss["policy_loss"] + coefs["value_coef"] * loss["value_loss"] - entropy_coef * entropy
    assert total == pytest.approx(summed + loss["l2_init_loss"], rel=1e-5)


def test_histograms_are_cumulative_and_include_their_bounds(sources, serve):
    """Catches a bucket that counts its own share only, or that leaves out a value equal to its bound."""
    families = scrape(serve(sources))
    lag = families["shoal_policy_lag_versions"].samples
    buckets = {s.labels["le"]: s.value for s in lag if s.name.endswith("_bucket")}
    assert (buckets["1.0"], buckets["2.0"], buckets["32.0"], buckets["+Inf"]) == (0, 1, 1, 1)
    samples = {
        s.name.rsplit("_", 1)[1]: s.value for s in families["shoal_episode_length_steps"].samples if not s.labels
    }
    assert samples == {"count": 2, "sum": 16.0}
    # Where a bucket is negative a sum is no counter: the format leaves out both, mean_return and episodes_total remain.
    returns = families["shoal_episode_return"].samples
    assert {s.name for s in returns} == {"shoal_episode_return_bucket"}
    assert {s.labels["le"]: s.value for s in returns}["-2.0"] == 1
    assert values(families, "shoal_episodes_total") == {(): 2}


def test_a_failing_entry_costs_only_itself(sources, serve, caplog):
    """Catches a page that is gone because one number cannot be read; a log that is full of it."""

    def raises():
        raise RuntimeError("the pool is closed")

    server = serve(dataclasses.replace(sources, actors_alive=raises))
    for _ in range(3):
        families = scrape(server)
    assert "shoal_actors_alive" not in families
    assert "shoal_actor_restarts" in families
    assert "shoal_build_info" in families
    assert caplog.text.count("shoal_actors_alive cannot be read") == 1
    # The page counts failures, including its own.
    assert values(families, "shoal_failed_readings_total")["shoal_actors_alive",] >= 1


def begun():
    """A run that has just begun."""
    ledger = Ledger()
    trajectory_queue = TrajectoryQueue(
        SMALL, run_id=RUN, num_actors=1, num_envs=4, batch_size=4, max_policy_lag=1, ledger=ledger
    )
    return Sources(
        statistics=RunStatistics(ledger),
        trajectory_queue=trajectory_queue,
        actors_alive=lambda: 0,
        actor_restarts=dict,
        bottleneck=lambda: None,
        build={},
    )


def test_before_the_first_batch_the_page_is_whole(serve):
    """Catches a division by zero episodes, a maximum of nothing."""
    families = scrape(serve(begun()))
    assert {entry.name.removesuffix("_total") for entry in CATALOGUE} <= families.keys()
    assert set(values(families, "shoal_failed_readings_total").values()) == {0}
    assert values(families, "shoal_entropy_nats") == {(): pytest.approx(math.nan, nan_ok=True)}


def test_the_first_event_is_an_increase(serve):
    """Catches a series that begins with its first event: increase() takes its first sample for the start, so that a
    query, an alert or a panel misses the first restart, drop, refusal, remark or failed reading of a run."""
    restarts, alive = Counter(), [1]
    predator = dataclasses.replace(begun(), actor_restarts=lambda: restarts, actors_alive=alive.pop)
    registry = make_registry({"predator": predator, "prey": begun()})
    by_label = {entry.name: entry.label for entry in CATALOGUE if entry.kind == "counter" and entry.label}

    def read():
        page = [sample for family in registry.collect() for sample in family.samples if sample.name in by_label]
        return {(s.name, s.labels.get("policy"), s.labels[by_label[s.name]]): s.value for s in page}

    first = read()
    assert {name for name, *_ in first} == by_label.keys()
    assert set(first.values()) == {0}

    header = TrajectoryHeader(run_id=RUN, actor=0, restart_index=0, sequence=0, policy_version=0, statistics=REPORTED)
    unroll = to_bytes(SMALL, header, random_columns(SMALL, 4, 0))
    restarts["died"] += 1
    predator.trajectory_queue.deliver(0, unroll)  # it was never admitted
    predator.trajectory_queue.add(Ledger(sampled=4, dropped=Counter(stale=4)))
    predator.statistics.add_reports(report_trajectories([from_bytes(SMALL, unroll)], 0))

    second = read()
    assert second.keys() == first.keys()
    assert {series: value - first[series] for series, value in second.items() if value > first[series]} == {
        ("shoal_actor_restarts_total", None, "died"): 1,
        ("shoal_refused_trajectories_total", None, "malformed"): 1,
        ("shoal_dropped_env_steps_total", "predator", "stale"): 4,
        ("shoal_env_remarks_total", "predator", "out_of_bounds"): 3,
        ("shoal_stage_seconds_total", "predator", "actor_policy"): 0.25,
        ("shoal_stage_seconds_total", "predator", "actor_env"): 0.5,
        ("shoal_stage_seconds_total", "predator", "actor_pack"): 0.125,
        ("shoal_failed_readings_total", "predator", "shoal_actors_alive"): 1,  # nothing is left to pop
    }


def test_a_term_that_the_loss_does_not_have_is_no_failure(sources, serve):
    """Catches an alert for metrics that cannot be read in every run of IMPALA, which clips no ratio."""
    learner = make_learner(small_policy(), loss="impala")
    sources.statistics.terms = learner.update(random_batch(1)).terms
    families = scrape(serve(sources))
    failed = values(families, "shoal_failed_readings_total")
    assert {name for (name,), times in failed.items() if times} == {"shoal_broken"}
    assert values(families, "shoal_clipped_transitions_ratio") == {(): pytest.approx(math.nan, nan_ok=True)}
    assert values(families, "shoal_approx_kl_nats") == {(): sources.statistics.terms["approx_kl"]}


def test_counters_of_a_resumed_run_begin_at_zero(sources, serve):
    """Catches counters that go on from a checkpoint, behind where the run was killed: rate() sees a reset."""
    ledger = sources.ledger
    before = Ledger(sampled=ledger.sampled + 500, trained=500, dropped=Counter(restart=7))
    ledger.add(before)
    families = scrape(serve(dataclasses.replace(sources, before=before)))
    [sampled] = families["shoal_sampled_env_steps"].samples
    assert sampled.value == ledger.sampled - before.sampled > 0
    assert values(families, "shoal_dropped_env_steps_total")["restart",] == 0


def test_two_runs_in_one_process(sources, serve):
    """Catches a global registry: the second run's metrics refused as duplicates, or added to the first's."""
    first, second = serve(sources), serve(sources)
    assert first.port != second.port
    assert values(scrape(first), "shoal_actors_alive") == values(scrape(second), "shoal_actors_alive")


def test_a_port_that_is_taken_is_an_error(sources, serve):
    """Catches a run whose numbers nobody can see, because another answers in its place."""
    server = serve(sources)
    with pytest.raises(OSError, match="Address already in use"):
        MetricsServer(make_registry(sources), address="127.0.0.1", port=server.port)


def test_a_closed_server_frees_its_port(sources, serve):
    """Catches a resumed run in the same process that cannot have its port back."""
    server = MetricsServer(make_registry(sources), address="127.0.0.1", port=0)
    server.close()
    assert serve(sources, server.port).port == server.port


def test_histogram():
    """Catches a mean of nothing that is 0, a maximum that forgets."""
    histogram = Histogram((1, 2))
    assert histogram.mean != histogram.mean
    histogram.observe([0, 1, 2, 5])
    assert (histogram.counts, histogram.count, histogram.mean, histogram.max) == ([2, 1, 1], 4, 2.0, 5)


def test_a_nan_of_the_canary_stays_seen():
    """Catches a parity check that read NaN once and then looks healthy."""
    statistics = RunStatistics(Ledger())
    statistics.add_log_prob_errors((1e-6, float("nan"), 1e-5))
    assert statistics.log_prob_checks == 3
    assert statistics.last_log_prob_error == 1e-5
    assert statistics.max_log_prob_error != statistics.max_log_prob_error


def test_who_lags_is_seen_while_it_does(sources):
    """Catches a straggler that nobody sees before its unroll is thrown away, and one that is blamed for waiting."""
    trajectory_queue, spec = sources.trajectory_queue, SMALL
    trajectory_queue.publish(1, "weights")
    assert trajectory_queue.lags() == []
    trajectory_queue._admission._quota = None
    assert trajectory_queue.admit([0]) == (0, "weights")
    assert trajectory_queue.lags() == [0]
    for version in (2, 3):
        trajectory_queue.publish(version, "weights")
    assert trajectory_queue.lags() == [2]
    header = TrajectoryHeader(run_id=RUN, actor=0, restart_index=1, sequence=0, policy_version=1, statistics=REPORTED)
    trajectory_queue.deliver(0, to_bytes(spec, header, random_columns(spec, 4, 0)))
    assert trajectory_queue.lags() == []
    assert trajectory_queue.sampled_episodes == 2
    trajectory_queue.publish(9, "weights")
    assert trajectory_queue.admit([1]) == (1, "weights")
    trajectory_queue.abandon(1)
    assert trajectory_queue.lags() == []
