"""Whether a run learns, in words: its return against a random policy's, and where it is no better, the likeliest cause.

A cause is named with the setting to turn. It is found from numbers that the run records anyway; the thresholds below
were set by runs that were broken on purpose in each of these ways (``tests/service/test_learning_causes.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from shoal.deploy.monitoring.intervals import confidence_interval

if TYPE_CHECKING:  # which imports torch, and a report does without
    from shoal.learner.statistics import RunStatistics

Verdict = Literal["unknown", "better", "no_better", "worse"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Cause = Literal[
    "faults",
    "no_signal",
    "few_steps",
    "clipping",
    "entropy_gone",
    "entropy_held",
    "dead_layers",
    "value_loss",
    "stale_memory",
    "unclear",
]
CAUSES: Mapping[Cause, str] = {
    "faults": "the environment fails",
    "no_signal": "every episode returns the same",
    "few_steps": "too few optimizer steps",
    "clipping": "updates are refused by ratio clipping",
    "entropy_gone": "the policy stopped exploring",
    "entropy_held": "the entropy bonus keeps the policy random",
    "dead_layers": "the policy's gradient does not come through the shared layers",
    "value_loss": "the value loss drowns the policy's",
    "stale_memory": "training starts from stale memories",
    "unclear": "none stands out",
}
"""Causes in a few words."""

ROUNDING = 1e-6
"""A mean return of a game's agents below this is 0."""
MANY_FAULTS = 0.2
"""Share of the episodes that ended with a fault of their environment: what they earned is not known, and may be what
tells good episodes from others."""
FIRST_EPISODES = 2
"""Episodes of each slot, on average, that do not count: by then those that end are no longer mostly short ones."""
ENOUGH_EPISODES = 6
"""Episodes of each slot, on average, among which its first one carries no weight."""
FEW_STEPS = 0.2
"""Sum of the learning rate over all optimizer steps. Adam moves a weight by about the learning rate in a step, so no
weight has gone farther; weights begin with sizes around 0.1 to 1."""
MOSTLY_CLIPPED = 0.35
"""Share of the transitions whose ratio lies outside the clip range: the surrogate gives them no gradient."""
HELD_CLIPPED, HELD_KL = 0.1, 1e-4
"""So many transitions at a bound, and so small a KL divergence, which is that of a policy held within 1 +- 0.01."""
LEAP = 1.0
"""KL divergence of one update after which a policy is another one."""
SURE = 0.03
"""Share of the greatest entropy below which a policy no longer tries anything."""
NARROW = -3.0
"""Change of a Gaussian's entropy since the run's start, in nats per action dimension, below which it does not either:
its standard deviation is a twentieth."""
UNDECIDED = 0.97
"""Share of the greatest entropy above which a policy prefers nothing."""
WIDE = 1.0
"""The same for a Gaussian, as for ``NARROW``."""
STRONG_BONUS = 0.1
"""Coefficient of the entropy bonus, over the standard deviation of the advantages, that outweighs what advantages can
say: with theirs normalized to 1, a preference worth one standard deviation."""
DROWNED = 20.0
"""Norm of the value loss' gradient over that of the policy's, through the parameters they share."""
VANISHED = 1e-7
"""Norm of the policy's gradient through them that is as good as none; that of a fresh policy is around 1e-3."""
ALIVE = 1.0
"""Norm of the value loss' gradient that layers let through only if they live."""
STALE = 0.6
"""Relative distance of the states that training starts from to those of the newest weights."""
SETTLED = 32
"""Updates after which that distance says something."""


class Interval(NamedTuple):
    """A mean with half the width of its 95% interval, which is NaN where there is none."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        margin = "" if math.isnan(self.half_width) else f" +- {_number(self.half_width)}"
        return f"{_number(self.mean)}{margin}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a run has recorded, as ``judge`` takes it; a number that is not known is None or absent."""

    env_steps: int = 0
    """Trained in the whole run."""
    share_done: float = 0.0
    """Share of the run that is over."""
    returned: Interval | None = None
    """Mean return of the last finished episodes; None before the first."""
    settled: bool = True
    """Whether these are no longer the first episodes of the slots, of which the short ones end first."""
    random: Interval | None = None
    """Mean return of a random policy."""
    fault_share: float = 0.0
    """Share of the episodes that a fault of their environment ended."""
    num_agents: int = 1
    """That share an environment and are played by the policy."""
    among_others: bool = False
    """Whether other policies, which are trained too, play in the same environments."""
    terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Means of ``UpdateResult.terms`` over the last updates; the entropy is the present one."""
    wildest_terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Terms of the update that moved the policy most."""
    first_entropy: float | None = None
    """Entropy at the first update, in nats."""
    max_entropy: float | None = None
    """Entropy of uniformly random actions; None where it has no bound."""
    action_dimensions: int = 1
    """Dimensions of continuous actions."""
    entropy_coef: float = 0.0
    advantage_scale: float | None = None
    """Standard deviation of the advantages as the policy's loss takes them: 1 where they are normalized."""
    optimizer_steps: int = 0
    """Of the whole run."""
    movement: float = 0.0
    """Sum of the learning rate over these."""
    gradient_norms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """``shoal_gradient_norm``."""
    staleness: float | None = None
    """Of the states that training starts from (``shoal_memory_staleness_ratio``); None while the only readings are of
    the first ``SETTLED`` updates, when memories are faint and change by themselves."""


class Learning(NamedTuple):
    """The state of learning."""

    verdict: Verdict
    returned: Interval | None
    """Mean return of the last finished episodes."""
    random: Interval | None
    """Mean return of a random policy."""
    comparison: str
    """The one against the other, in words."""
    details: str
    """Explained variance, KL divergence and entropy, in words; empty before the first update."""
    cause: Cause | None = None
    """The likeliest cause, if the return should be better than a random policy's by now and is not, or if it cannot be
    told because the environment fails."""
    advice: str = ""
    """The cause and the setting to turn, in one sentence."""

    @property
    def sentence(self) -> str:
        """Comparison and details."""
        return f"{self.comparison}; {self.details}" if self.details else self.comparison

    def words(self) -> dict[str, str | None]:
        """Plain data: verdict, sentence, cause and advice."""
        return {"verdict": self.verdict, "sentence": self.sentence, "cause": self.cause, "advice": self.advice}


def judge(run: Recorded, *, expect_after: float) -> Learning:
    """Say whether a run learns; name a cause once the share ``expect_after`` of it is over without a better return."""
    verdict = _verdict(run)
    state = Learning(verdict, run.returned, run.random, _compared(run, verdict), "; ".join(_details(run)))
    if run.share_done < expect_after or verdict == "better":
        return state
    if verdict == "unknown" and run.fault_share <= MANY_FAULTS:
        return state
    cause, why = _cause(run)
    when = f"after {run.env_steps:,} steps ({run.share_done:.0%} of the run)"
    if verdict == "unknown":
        return state._replace(cause=cause, advice=f"{when} {why}")
    than = "worse than" if verdict == "worse" else "no better than"
    among = " among random ones, which may be because the others have learned" if run.among_others else ""
    return state._replace(cause=cause, advice=f"{when} the return is {than} a random policy's{among}; {why}")


class LearningMonitor:
    """Judges a run from its statistics, from any thread.

    Args:
        statistics: of the run.
        max_entropy: of its actions (``policy.actions``).
        masked: whether some actions may be illegal. The greatest entropy is that of the legal ones then, which the
            first update had: nothing had been learned.
        action_dimensions: of continuous actions.
        num_agents: that share an environment; their returns are not independent.
        among_others: whether agents of other trained policies share it, too.
        num_slots: of all actors.
        normalized: whether advantages are normalized.
        expect_after: share of the run after which the return should be better than a random policy's.
    """

    def __init__(
        self,
        statistics: RunStatistics,
        *,
        max_entropy: float | None,
        action_dimensions: int,
        num_agents: int,
        num_slots: int,
        normalized: bool,
        expect_after: float,
        among_others: bool = False,
        masked: bool = False,
    ) -> None:
        self._statistics = statistics
        self._max_entropy, self._action_dimensions = max_entropy, action_dimensions
        self._num_agents, self._num_slots, self._normalized = num_agents, num_slots, normalized
        self._expect_after, self._among_others, self._masked = expect_after, among_others, masked
        self.random: Interval | None = None
        """Return of a random policy; None until it is measured."""

    def _returned(self) -> Interval | None:
        returns = list(self._statistics.returns)
        if not returns:
            return None
        mean, half_width = confidence_interval(returns)
        # As if all agents of an environment earned the same: the interval is never too narrow.
        return Interval(mean, half_width * math.sqrt(self._num_agents))

    def now(self, share_done: float) -> Learning:
        """Judge the run as it is now, with the share ``share_done`` of it over."""
        statistics = self._statistics
        updates = statistics.updates
        terms = {**statistics.mean_terms, "entropy": statistics.present_entropy} if updates else {}
        first_entropy = statistics.first_terms.get("entropy")
        return judge(
            Recorded(
                env_steps=statistics.ledger.trained,
                share_done=share_done,
                returned=self._returned(),
                settled=statistics.all_episodes
                >= min(len(statistics.returns) + FIRST_EPISODES * self._num_slots, ENOUGH_EPISODES * self._num_slots),
                random=self.random,
                fault_share=statistics.fault_share,
                num_agents=self._num_agents,
                among_others=self._among_others,
                terms=terms,
                wildest_terms=statistics.wildest_terms,
                first_entropy=first_entropy,
                max_entropy=first_entropy if self._masked else self._max_entropy,
                action_dimensions=self._action_dimensions,
                entropy_coef=statistics.scheduled.entropy_coef if statistics.scheduled else 0.0,
                advantage_scale=1.0 if self._normalized else terms.get("advantage_std"),
                # Earlier sessions of a resumed run made as many steps per update, as far as anyone knows.
                optimizer_steps=round(statistics.optimizer_steps * statistics.policy_version / max(updates, 1)),
                movement=statistics.learning_rate_sum * statistics.policy_version / max(updates, 1),
                gradient_norms=dict(statistics.gradient_norms),
                staleness=statistics.staleness.get("used") if statistics.policy_version > SETTLED else None,
            ),
            expect_after=self._expect_after,
        )


def _verdict(run: Recorded) -> Verdict:
    if run.returned is None or run.random is None:
        return "unknown"
    difference = run.returned.mean - run.random.mean
    noise = math.hypot(run.returned.half_width, run.random.half_width)
    if math.isnan(difference) or math.isnan(noise):
        return "unknown"
    if not run.settled and noise:
        return "unknown"
    if abs(difference) <= noise:
        return "unknown" if _is_zero_sum(run) else "no_better"
    return "better" if difference > 0 else "worse"


def _is_zero_sum(run: Recorded) -> bool:
    """Whether agents win what others lose, so that their mean return is 0 however well they play."""
    returned, random = run.returned, run.random
    if run.num_agents == 1 or returned is None or random is None:
        return False
    return max(abs(random.mean), random.half_width) < ROUNDING < returned.half_width


def _compared(run: Recorded, verdict: Verdict) -> str:
    if run.returned is None:
        return (
            "no episode has ended but by a fault of the environment" if run.fault_share else "no episode has ended yet"
        )
    returned = f"return {run.returned}"
    if run.random is None:
        return f"{returned}; a random policy's is not known"
    if verdict == "unknown" and run.settled and _is_zero_sum(run):
        against = "shoal evaluate RUN --against random"
        return (
            f"{returned}, which says nothing: agents win what others lose; games against another policy do: {against}"
        )
    words = {
        "better": "better than",
        "no_better": "not beyond noise from",
        "worse": "worse than",
        "unknown": "too early to compare with",
    }
    return f"{returned}, {words[verdict]} a random policy's {run.random}"


def _details(run: Recorded) -> list[str]:
    terms, found = run.terms, []
    if math.isfinite(explained := terms.get("explained_variance", math.nan)):
        worse = explained < 0
        found.append(
            "values predict worse than a constant"
            if worse
            else f"values explain {explained:.0%} of their targets' variance"
        )
    if math.isfinite(kl := terms.get("approx_kl", math.nan)):
        found.append(f"KL {max(kl, 0.0):.2g}")
    if math.isfinite(entropy := terms.get("entropy", math.nan)):
        share = f" ({entropy / run.max_entropy:.0%} of the greatest)" if run.max_entropy else ""
        found.append(f"entropy {_number(entropy)}{share}")
    return found


def _cause(run: Recorded) -> tuple[Cause, str]:
    """The first cause that shows. Each makes those after it likely or meaningless, and not the other way round."""
    terms = run.terms
    if run.fault_share > MANY_FAULTS:
        return "faults", (
            f"{run.fault_share:.0%} of the episodes have ended with a fault of the environment (env.id), and what they "
            "would have earned is not known: mend it first; run.log has the first faults of each kind"
        )
    if run.returned and run.random and run.returned.half_width == run.random.half_width == 0:
        return "no_signal", (
            f"every episode returned {_number(run.returned.mean)}, whatever was done in it: the policy has yet to meet "
            "a reward that tells actions apart. Reward progress earlier, or explore more (learner.entropy_coef)"
        )
    if run.movement < FEW_STEPS:
        return "few_steps", (
            f"most likely too few optimizer steps were made: {run.optimizer_steps:,}, in which no weight moves by more "
            f"than about {run.movement:.2g}. Raise learner.minibatches or learner.epochs, lower learner.batch_size, or "
            "raise learner.learning_rate"
        )
    clipped, kl = terms.get("clip_fraction", 0.0), terms.get("approx_kl", math.nan)
    held = clipped > HELD_CLIPPED and kl < HELD_KL
    if clipped > MOSTLY_CLIPPED or held:
        lower = "Lower learner.learning_rate, make fewer learner.epochs, or raise learner.clip_coef"
        return "clipping", (
            f"most likely updates are refused by ratio clipping: {clipped:.0%} of the transitions lie outside "
            f"1 +- clip_coef, with a KL divergence of {max(kl, 0.0):.2g}. "
            + ("Raise learner.clip_coef" if held else lower)
        )
    entropy = _entropy(run)
    leap = run.wildest_terms
    if entropy == "gone" and leap.get("approx_kl", 0.0) > LEAP:
        return "clipping", (
            "most likely updates are too large for ratio clipping to hold them: one moved the policy by a KL "
            f"divergence of {leap['approx_kl']:.2g}, with {leap.get('clip_fraction', math.nan):.0%} of the transitions "
            f"clipped, and its entropy is {_number(terms['entropy'])} now. Lower learner.learning_rate, or set "
            "learner.target_kl"
        )
    if entropy == "gone":
        return "entropy_gone", (
            f"most likely the policy stopped exploring before it had found anything: its entropy is "
            f"{_number(terms['entropy'])}. Raise learner.entropy_coef, or lower learner.learning_rate"
        )
    bonus = run.entropy_coef / run.advantage_scale if run.advantage_scale else 0.0
    if entropy == "highest" and bonus > STRONG_BONUS:
        return "entropy_held", (
            f"most likely the entropy bonus keeps the policy random: its entropy is {_number(terms['entropy'])}, with "
            f"a coefficient of {run.entropy_coef:g}. Lower learner.entropy_coef"
        )
    policy, value = (run.gradient_norms.get(loss, math.nan) for loss in ("policy", "value"))
    if policy < VANISHED and value < ALIVE:
        return "dead_layers", (
            "most likely units of the layers that policy and values share are dead: the policy's gradient through them "
            f"is {policy:.1g}. Lower learner.learning_rate; shoal_dormant_units_ratio shows such units"
        )
    if value > DROWNED * policy:
        return "value_loss", (
            "most likely the value loss drowns the policy's: its gradient through the layers they share is "
            f"{value / policy if policy else math.inf:,.0f} times as large. Lower learner.value_coef, and leave "
            "learner.normalize_values on"
        )
    if run.staleness is not None and run.staleness > STALE:
        return "stale_memory", (
            f"most likely training starts from memories that its own updates made stale: they differ by "
            f"{run.staleness:.0%} from what the newest weights remember. Set actor.burn_in or "
            "learner.refresh_states, lower actor.max_policy_lag, or lower learner.learning_rate"
        )
    undecided = " Its entropy is still about the greatest." if entropy == "highest" else ""
    return "unclear", (
        f"no one cause stands out.{undecided} It may need more steps or more exploration (learner.entropy_coef); "
        "shoal report shows the course of the losses"
    )


def _entropy(run: Recorded) -> Literal["gone", "highest", "between"]:
    entropy = run.terms.get("entropy", math.nan)
    if run.max_entropy is not None:
        share = entropy / run.max_entropy if run.max_entropy else math.nan
        return "gone" if share < SURE else "highest" if share > UNDECIDED else "between"
    change = (entropy - (math.nan if run.first_entropy is None else run.first_entropy)) / run.action_dimensions
    return "gone" if change < NARROW else "highest" if change > WIDE else "between"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
