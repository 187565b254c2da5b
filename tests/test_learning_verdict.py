"""Whether a run learns, and why not: the right words for every set of numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from rollouts import make_learner, random_batch, small_policy
from shoal.deploy.monitoring import learning
from shoal.deploy.monitoring.learning import (
    CAUSES,
    Interval,
    LearningMonitor,
    Recorded,
    judge,
)
from shoal.deploy.settings.load import load_config, to_dict
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass
from shoal.learner.learner_worker import Trained
from shoal.learner.ledger import Ledger
from shoal.learner.schedules import ScheduledSettings
from shoal.learner.statistics import RunStatistics, TrajectoryReport
from shoal.policy.weights import flatten_weights

RANDOM = Interval(21.7, 0.9)
WELL: dict[str, Any] = {
    "env_steps": 60_000,
    "share_done": 0.5,
    "returned": Interval(21.9, 1.1),
    "random": RANDOM,
    "terms": {
        "explained_variance": 0.4,
        "approx_kl": 0.01,
        "clip_fraction": 0.1,
        "entropy": 0.5,
    },
    "max_entropy": math.log(2),
    "entropy_coef": 0.01,
    "advantage_scale": 1.0,
    "optimizer_steps": 2000,
    "movement": 2.0,
    "gradient_norms": {"policy": 0.1, "value": 0.4},
    "staleness": 0.1,
}
"""A run that is no better than a random policy, and shows nothing else that is wrong."""


def run_with(**changed: Any) -> Recorded:
    """``WELL`` with other numbers; terms are added to its own."""
    terms = WELL["terms"] | changed.pop("terms", {})
    return Recorded(**(WELL | {"terms": terms} | changed))


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "faults": ({"fault_share": 0.34}, "34% of the episodes have ended with a fault of the environment"),
    "no_signal": ({"returned": Interval(0.0, 0.0), "random": Interval(0.0, 0.0)}, "every episode returned 0,"),
    "few_steps": ({"movement": 0.02, "optimizer_steps": 49}, "49, in which no weight moves by more than about 0.02"),
    "clipping": ({"terms": {"clip_fraction": 0.8, "approx_kl": 3.0}}, "80% of the transitions"),
    "held": (
        {"terms": {"clip_fraction": 0.22, "approx_kl": 1e-9}},
        "22% of the transitions lie outside 1 +- clip_coef, with a KL divergence of 1e-09. Raise learner.clip_coef",
    ),
    "leap": (
        {"terms": {"entropy": 0.001}, "wildest_terms": {"approx_kl": 56.4, "clip_fraction": 0.97}},
        "one moved the policy by a KL divergence of 56, with 97% of the transitions clipped",
    ),
    "entropy_gone": ({"terms": {"entropy": 0.001}, "wildest_terms": {"approx_kl": 0.1}}, "its entropy is 0.001"),
    "entropy_held": ({"terms": {"entropy": 0.693}, "entropy_coef": 10.0}, "with a coefficient of 10"),
    "value_loss": ({"gradient_norms": {"policy": 0.1, "value": 31.0}}, "310 times as large"),
    "dead_layers": ({"gradient_norms": {"policy": 4e-10, "value": 0.003}}, "gradient through them is 4e-10"),
    "stale_memory": ({"staleness": 0.93}, "they differ by 93%"),
    "unclear": ({}, "no one cause stands out"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_cause_is_named_with_its_number(name: str) -> None:
    """Catches advice for another fault than the one that shows."""
    changed, words = BROKEN[name]
    found = judge(run_with(**changed), expect_after=0.25)
    assert (found.cause, found.verdict) == (
        {"held": "clipping", "leap": "clipping"}.get(name, name),
        "no_better",
    )
    assert words in found.advice
    assert found.advice.startswith("after 60,000 steps (50% of the run) the return is no better than a random policy's")


def test_every_cause_is_told_of_some_run() -> None:
    """Catches a cause that no run would ever be told."""
    assert {judge(run_with(**changed), expect_after=0.25).cause for changed, _ in BROKEN.values()} == set(CAUSES)


@pytest.mark.parametrize("name", BROKEN)
def test_advice_names_settings_that_there_are(name: str) -> None:
    """Catches a setting that was renamed, or that never was."""
    advice = judge(run_with(**BROKEN[name][0]), expect_after=0.25).advice
    known = to_dict(load_config((), ())[0])
    named = re.findall(r"\b(?:learner|actor|env|policy)\.\w+", advice)
    assert named
    for path in named:
        section, setting = path.split(".")
        assert setting in known[section], path


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        # Weights that cannot have moved say nothing of losses; a value function that explodes with the learning rate
        # drowns everything, and is not the cause.
        ("few_steps", "value_loss", "few_steps"),
        ("clipping", "value_loss", "clipping"),
        ("leap", "value_loss", "clipping"),
        ("clipping", "entropy_gone", "clipping"),
        ("entropy_held", "value_loss", "entropy_held"),
        ("value_loss", "stale_memory", "value_loss"),
    ],
)
def test_of_two_causes_the_first_is_named(first: str, second: str, named: str) -> None:
    """Catches an effect that is told as the cause."""
    one, other = BROKEN[first][0], BROKEN[second][0]
    both = {**one, **other, "terms": {**one.get("terms", {}), **other.get("terms", {})}}
    assert judge(run_with(**both), expect_after=0.25).cause == named


@pytest.mark.parametrize(
    ("changed", "verdict", "words"),
    [
        ({"returned": Interval(219.3, 8.1)}, "better", "return 219 +- 8.1, better than a random policy's 21.7 +- 0.9"),
        ({"returned": Interval(23.0, 0.2)}, "better", "better than"),
        ({"returned": Interval(23.0, 1.2)}, "no_better", "not beyond noise from a random policy's"),
        ({"returned": Interval(9.4, 0.2)}, "worse", "return 9.4 +- 0.2, worse than"),
        ({"returned": Interval(30.0, math.nan)}, "unknown", "return 30, too early to compare with"),
        ({"returned": Interval(15.0, 0.5), "settled": False}, "unknown", "return 15 +- 0.5, too early to compare with"),
        ({"returned": None}, "unknown", "no episode has ended yet"),
        ({"random": None}, "unknown", "a random policy's is not known"),
    ],
)
def test_the_return_is_compared_by_both_intervals(changed: dict[str, Any], verdict: str, words: str) -> None:
    """Catches a difference within noise that is told as progress, and a verdict without the numbers for it."""
    found = judge(run_with(**changed), expect_after=0.25)
    assert found.verdict == verdict
    assert words in found.comparison
    assert (found.cause is None) == (verdict in ("better", "unknown"))


def test_nothing_is_blamed_before_its_time() -> None:
    """Catches a cause that is told while nothing could have been learned yet."""
    assert judge(run_with(share_done=0.24), expect_after=0.25).cause is None
    assert judge(run_with(share_done=0.25), expect_after=0.25).cause == "unclear"


def test_the_details_are_words() -> None:
    """Catches a detail that is left out, and one that is told of a run that has none."""
    assert judge(run_with(), expect_after=1.0).details == (
        "values explain 40% of their targets' variance; KL 0.01; entropy 0.5 (72% of the greatest)"
    )
    worse = judge(run_with(terms={"explained_variance": -3.0}), expect_after=1.0)
    assert "values predict worse than a constant" in worse.sentence
    assert judge(Recorded(), expect_after=1.0).sentence == "no episode has ended yet"
    # A loss without entropy or values of its own.
    assert judge(run_with(terms={"explained_variance": math.nan, "entropy": math.nan}), expect_after=1.0).details == (
        "KL 0.01"
    )


@pytest.mark.parametrize(
    ("entropy", "cause"), [(2.8 - 7.0, "entropy_gone"), (2.8 - 5.0, "unclear"), (2.8 + 3.0, "entropy_held")]
)
def test_a_gaussians_entropy_is_measured_from_its_start(entropy: float, cause: str) -> None:
    """Catches a continuous policy that is told to be sure of itself because its entropy is negative."""
    run = run_with(
        terms={"entropy": entropy}, first_entropy=2.8, max_entropy=None, action_dimensions=2, entropy_coef=0.5
    )
    assert judge(run, expect_after=0.25).cause == cause


def test_an_unnormalized_advantage_scales_the_bonus() -> None:
    """Catches a coefficient that is called large though rewards are in thousands."""
    changed = {"terms": {"entropy": 0.693}, "entropy_coef": 5.0}
    assert judge(run_with(**changed, advantage_scale=100.0), expect_after=0.25).cause == "unclear"
    assert judge(run_with(**changed, advantage_scale=10.0), expect_after=0.25).cause == "entropy_held"


def _trained(entropy: float, **more: Any) -> Trained:
    return Trained(
        **(
            {
                "all_env_steps": 100,
                "terms": {"entropy": entropy, "advantage_std": 2.0},
                "optimizer_steps": 8,
                "scheduled": ScheduledSettings(0.01, 0.3, 0.2, 0.2, 0.5),
                "staleness": {},
                "gradient_norms": {},
            }
            | more
        )
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_leaves_less_to_be_unsure_of(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a policy that is told to be sure of itself from the beginning because most of its moves are forced."""
    monkeypatch.setattr(learning, "judge", lambda run, **_: run)
    statistics = RunStatistics(Ledger(trained=1000, dropped=Counter()))
    monitor = LearningMonitor(
        statistics,
        max_entropy=math.log(100),
        masked=masked,
        action_dimensions=1,
        num_agents=1,
        num_slots=1,
        normalized=True,
        expect_after=0.1,
    )
    for entropy in (0.1, 0.08):  # the first of who has not learned anything yet
        statistics.add_update(50, _trained(entropy))
    run: Any = monitor.now(1.0)
    assert run.max_entropy == (0.1 if masked else math.log(100))
    found = judge(run_with(terms={"entropy": 0.08}, max_entropy=run.max_entropy), expect_after=0.25)
    assert found.cause == ("unclear" if masked else "entropy_gone")


def test_a_short_run_that_stopped_exploring_is_told_so() -> None:
    """Catches an entropy of the whole run, in which a policy that tries nothing any more still looks open."""
    statistics = RunStatistics(Ledger())
    monitor = LearningMonitor(
        statistics, max_entropy=0.7, action_dimensions=1, num_agents=1, num_slots=1, normalized=True, expect_after=0.1
    )
    for update in range(40):
        statistics.add_update(50, _trained(0.7 * 0.8**update))
    assert statistics.mean_terms["entropy"] > 0.03 * 0.7
    assert monitor.now(1.0).details.startswith("entropy 0.00")
    # Of a long run the last updates, as many as for every other term.
    for _ in range(960):
        statistics.add_update(50, _trained(0.5))
    for _ in range(32):
        statistics.add_update(50, _trained(0.1))
    assert statistics.present_entropy == pytest.approx(0.3)


def test_the_monitor_reads_the_statistics() -> None:
    """Catches numbers of the last update alone, of one process for those of the run, and an interval that takes the
    agents of one environment for independent."""
    statistics = RunStatistics(Ledger(trained=1000, dropped=Counter()))
    monitor = LearningMonitor(
        statistics, max_entropy=2.0, action_dimensions=1, num_agents=4, num_slots=8, normalized=False, expect_after=0.1
    )
    assert monitor.now(1.0).verdict == "unknown"
    for entropy in (1.0, 2.0, 3.0):
        statistics.add_update(50, _trained(entropy))
    assert statistics.optimizer_steps == 24
    assert statistics.learning_rate_sum == pytest.approx(0.24)
    assert statistics.mean_terms == {"entropy": 2.0, "advantage_std": 2.0}
    assert statistics.first_terms["entropy"] == 1.0
    reported = {
        "episode_returns": [1.0, 2.0, 3.0, 4.0] * 4,
        "episode_lengths": [5] * 16,
        "policy_seconds": 0.0,
        "env_seconds": 0.0,
        "pack_seconds": 0.0,
        "ignored_tokens": 0,
        "faults": [],
        "remarks": {},
        "episode_metrics": {},
    }
    statistics.add_reports([TrajectoryReport(0, 0, reported, 0, 10)])
    monitor.random = Interval(2.0, 0.1)
    # All of them are first episodes of the slots.
    assert monitor.now(1.0).verdict == "unknown"
    statistics.episodes += 16
    found = monitor.now(1.0)
    # 16 returns of standard deviation 1.155 by Student's t, widened by the root of four agents.
    assert found.returned is not None
    assert found.returned.half_width == pytest.approx(2 * 2.1314 * 1.1547 / 4, rel=1e-3)
    # 24 optimizer steps in 3 of the run's 50 updates.
    assert found.cause == "entropy_held"
    assert found.advice.startswith("after 1,000 steps (100% of the run)")
    statistics.add_update(4, _trained(2.0))
    assert monitor.now(1.0).cause == "entropy_held"  # 0.32 / 4 x 4: enough of them
    statistics.learning_rate_sum = 0.1
    assert monitor.now(1.0).cause == "few_steps"


def test_measuring_the_gradients_changes_nothing_and_finds_who_is_larger() -> None:
    """Catches a probe that draws from a random stream or leaves gradients, and one that mixes up the losses."""
    weights = []
    for every in (0, 1):
        learner = make_learner(small_policy(), epochs=2, minibatches=2, learning_rate=1e-2, weight_metrics_every=every)
        results = [learner.update(random_batch(seed)) for seed in range(3)]
        weights.append(flatten_weights(learner.policy, 0).sha256)
        assert all(bool(result.gradient_norms) == bool(every) for result in results)
    assert weights[0] == weights[1]

    def norms(**settings: Any) -> dict[str, float]:
        settings = {"value_coef": 0.5, "weight_metrics_every": 1} | settings
        return make_learner(small_policy(), **settings).gradient_norms(random_batch(0))

    plain = norms()
    assert plain["policy"] > 0
    assert norms(value_coef=50.0) == pytest.approx({"policy": plain["policy"], "value": 100 * plain["value"]}, rel=1e-3)
    assert norms(value_coef=0.0) == {}


def test_gradients_are_compared_where_both_losses_reach() -> None:
    """Catches norms that count the heads, which each loss has for itself."""
    policy = small_policy()
    learner = make_learner(policy, max_grad_norm=1e9, value_coef=0.5)
    batch = random_batch(0, num_slots=8)
    path = DevicePath(torch.device("cpu"))
    batch["behavior_log_prob"] = forward_pass(policy, batch, path).log_prob.detach().T
    found = learner.gradient_norms(batch)
    other = make_learner(small_policy(), max_grad_norm=1e9, value_coef=0.0, learning_rate=1e-30)
    other.update(batch)
    heads = ("critic_1", "value_head", "actor_1", "actor_W", "actor_bias", "action_embeddings")
    shared = [p.grad for name, p in other.policy.named_parameters() if not name.startswith(heads)]
    assert found["policy"] == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in shared)), rel=1e-3)


def test_agents_that_play_each_other_are_not_said_to_learn_nothing() -> None:
    """Catches advice to change settings of a run whose mean return is 0 by the rules of the game; and silence about a
    game without rewards, or of agents that lose together."""
    played = {"returned": Interval(0.0, 0.2), "random": Interval(1e-9, 0.0), "num_agents": 2}
    said = judge(run_with(**played), expect_after=0.2)
    assert (said.verdict, said.cause, said.advice) == ("unknown", None, "")
    assert "agents win what others lose" in said.comparison
    together = judge(run_with(**played | {"random": Interval(0.01, 0.05)}), expect_after=0.2)
    assert together.verdict == "no_better"
    nothing = judge(run_with(**played | {"returned": Interval(0.0, 0.0)}), expect_after=0.2)
    assert nothing.cause == "no_signal"
    alone = judge(run_with(**played | {"num_agents": 1}), expect_after=0.2)
    assert alone.verdict == "no_better"


def test_an_environment_that_fails_is_named_whatever_else_is_known() -> None:
    """Catches a run in which no episode ends but by a fault, which is "too early to compare" for good; and a run that
    learns all the same and is told that it does not."""
    assert judge(run_with(fault_share=0.01), expect_after=0.2).cause != "faults"
    none_ended = judge(run_with(returned=None, fault_share=1.0), expect_after=0.2)
    assert (none_ended.cause, none_ended.comparison) == (
        "faults",
        "no episode has ended but by a fault of the environment",
    )
    better = judge(run_with(returned=Interval(400.0, 10.0), fault_share=0.5), expect_after=0.2)
    assert (better.verdict, better.cause) == ("better", None)
