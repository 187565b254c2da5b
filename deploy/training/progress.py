"""The screen of a run: a live view on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from shoal.actors.self_play import Games
from shoal.deploy.monitoring.bottleneck import WINDOW_SECONDS, Bottleneck, BottleneckMonitor
from shoal.deploy.monitoring.learning import Cause, LearningMonitor
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations, sentence
from shoal.deploy.records.json_lines import event
from shoal.deploy.training.screen import Screen
from shoal.envs.reading import reading
from shoal.learner.config import PPO
from shoal.learner.opponents import Result
from shoal.learner.opponents import sentence as won
from shoal.learner.parity_check import TOLERANCE
from shoal.learner.schedules import course
from shoal.learner.statistics import RunStatistics
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.actions import Discrete

if TYPE_CHECKING:
    from shoal.deploy.training.prepared_run import PreparedRun

log = logging.getLogger(__name__)

PLAIN_LINE_SECONDS = 10.0
RATE_WINDOW_SECONDS = 15.0
WORTH_SAYING = 0.005
"""Share of episodes that reads as 1% or more."""
_BARS = " ▁▂▃▄▅▆▇█"


class _Pool(Protocol):
    @property
    def num_alive(self) -> int: ...

    @property
    def restarts(self) -> Any: ...


def headline(run: PreparedRun, metrics_url: str | None) -> str:
    """The first lines of a run: policy, environment, actors, learners, metrics address and run directory."""
    config, layout, learner = run.config, run.layout, run.learner.learner
    count = sum(p.numel() for p in learner.policy.parameters())
    start = f", continuing from policy version {learner.policy_version}" if run.origin.session else ""
    name = {"fast": "Fast", "component": "ComponentPolicy"}.get(config.policy.kind, config.policy.kind)
    segments = run.share.batch_size if run.policy else layout.batch_size
    learners = f"{learner.path.describe()}, {segments} segments per update"
    if layout.num_learners > 1:
        role = "which also act" if layout.placement == "colocated" else "each fed by its own actors"
        where = "in one process" if config.mode == "inline" else role
        learners = f"{layout.num_learners}, {where}; {learners}"
    elif layout.placement == "disaggregated" and learner.path.device.type == "cpu":
        learners += f", gradient threads: {layout.num_threads}"
    observations, actions = reading(run.setup.env, config.policy.encoder_of)
    slots, steps = run.setup.worker.num_envs, config.actor.unroll_length
    sent = ", ".join(place.name for place in run.cluster.sent) if run.cluster else ""
    return "\n".join(
        [
            f"Training {name} ({count:,} parameters) on {config.env.id}, mode {config.mode}, seed {config.seed}{start}",
            f"  reads    {observations}",
            f"  acts     {actions}",
            f"  learns   {_update(run)}",
            f"  actors   {layout.num_actors} x {slots} slots, unrolls of {steps} steps{_lock_step(run)}",
            *_games(run.setup.worker.games),
            f"  {'learners' if layout.num_learners > 1 else 'learner '} {learners}",
            *([f"  sends    {sent} to every node"] if sent else []),
            f"  metrics  {metrics_url or 'not served'}",
            f"  run      {run.run_dir}",
        ]
    )


def _lock_step(run: PreparedRun) -> str:
    if run.config.mode == "inline" or run.layout.placement == "colocated" or run.setup.max_policy_lag:
        return ""
    return ", in lock step with the learner"


def _games(games: Games | None) -> list[str]:
    if games is None:
        return []
    among = f", {games.among_themselves} among its own agents" if games.among_themselves else ""
    return [
        f"  plays    {games.against_versions} games of each actor against versions of itself, {games.num_agents - 1} "
        f"of {games.num_agents} agents frozen{among}"
    ]


def _update(run: PreparedRun) -> str:
    """The settings of the update that matter most, those that ``auto`` chose among them."""
    learner, policy = run.learner.learner, run.learner.learner.policy
    settings = learner.config
    steps = settings.epochs * settings.minibatches
    rate = f"learning rate {'up to ' if settings.desired_kl else ''}{settings.learning_rate:g}"
    of_rate = course(settings.schedules, "learning_rate", run.config.total_env_steps)
    if of_rate.is_own:
        rate += f" by {of_rate.kind}"
    elif of_rate.moves:
        rate += f", {of_rate.kind or 'linear'} to {of_rate.end or 0:g}"
    if settings.desired_kl:
        rate += f", KL divergence of an update about {settings.desired_kl:g}"
    chosen = ""
    if run.config.learner.entropy_coef == "auto":
        chosen = " (discrete actions)" if isinstance(policy.actions, Discrete) else " (continuous actions)"
    units = [
        name
        for name, part in (("observations", policy.vector_normalizer), ("values", policy.value_scale))
        if part is not None
    ]
    raw = ""
    if settings.normalize_values and policy.value_scale is None:
        raw = "; values in units of the reward: the policy has no linear layer value_head to rescale"
    loss = "" if settings.loss == PPO else f"loss {settings.loss}, "
    most = "up to " if run.config.learner.value_coef == "auto" else ""
    weights = f"value loss times {most}{settings.value_coef:g}, entropy bonus {settings.entropy_coef:g}{chosen}"
    return (
        f"{loss}{steps} optimizer step{'s' * (steps > 1)} per batch, {rate}, gamma {settings.gamma:g}, {weights}, "
        f"{' and '.join(units) or 'nothing'} normalized{raw}"
    )


class Curve:
    """A series of any length in at most ``MOST_POINTS`` points, each the mean of equally many values."""

    MOST_POINTS = 960

    def __init__(self) -> None:
        self.points: list[float] = []
        self._size = 1
        self._part: list[float] = []

    def add(self, value: float) -> None:
        """Append a value."""
        self._part.append(value)
        if len(self._part) < self._size:
            return
        self.points.append(sum(self._part) / self._size)
        self._part.clear()
        if len(self.points) == self.MOST_POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._size *= 2


class Progress:
    """Prints the run's state once a second from a thread of its own; the training loop does no work for it.

    ``time_is_up_at`` is a time of ``time.monotonic``; with ``json_lines`` every line is a JSON object; with ``quiet``
    nothing is printed. ``stalled`` returns why updates are missing, which is logged. ``policy`` is the name of one of
    several, each of which has plain lines that begin with it; the one that ``leads`` says what is of the whole run.
    """

    def __init__(
        self,
        statistics: RunStatistics,
        trajectory_queue: TrajectoryQueue,
        pool: _Pool,
        monitor: BottleneckMonitor,
        learning: LearningMonitor,
        *,
        total_env_steps: int,
        share_trained: Callable[[], float],
        time_is_up_at: float = math.inf,
        json_lines: bool = False,
        evaluations: Evaluations | None = None,
        opponents: Callable[[], Sequence[Result]] = tuple,
        quiet: bool = False,
        stalled: Callable[[], str | None] = lambda: None,
        policy: str = "",
        leads: bool = True,
    ) -> None:
        self._statistics, self._trajectory_queue, self._pool, self._total = (
            statistics,
            trajectory_queue,
            pool,
            total_env_steps,
        )
        self._share_trained = share_trained
        self._begun_at, self._time_is_up_at = time.monotonic(), time_is_up_at
        self._json_lines = json_lines
        self._stalled, self._said_stalled = stalled, False
        self._policy, self._leads = policy, leads
        self._monitor = monitor
        self._bottleneck: Bottleneck | None = None
        self._reported_stage = ""
        self._learning = learning
        self._reported_cause: Cause | None = None
        self._evaluations = evaluations or Evaluations()
        self._opponents = opponents
        self._reported_evaluation = self._evaluations.last
        # A notebook gets the plain lines: rich's live view would need a package of its own there. Its kernel sets
        # FORCE_COLOR, as continuous integration does, by which rich takes any file for a terminal.
        screen = Screen()
        self._console = Console(
            file=cast("IO[str]", screen),
            highlight=False,
            quiet=quiet,
            force_jupyter=False,
            force_terminal=screen.isatty(),
        )
        self._samples: deque[tuple[float, int, int]] = deque()
        self._curve = Curve()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._sample()  # the live view renders as soon as it is made
        self._live = (
            Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=False,
                redirect_stderr=True,
            )
            if self._console.is_terminal and not json_lines and not quiet and not policy
            else None
        )
        self._thread = threading.Thread(target=self._keep_watching, name="progress", daemon=True)

    def say(self, text: str) -> None:
        """Print ``text`` unchanged."""
        self._print(text, "message", {"message": text})

    def _print(self, text: str, kind: str, fields: Mapping[str, Any], *, of_run: bool = False) -> None:
        """Print ``text``, or with ``json_lines`` an event of ``kind`` with ``fields``; ``of_run``: of all policies."""
        if of_run and not self._leads:
            return
        if self._policy and not of_run:
            text, fields = f"{self._policy}: {text}", {"policy": self._policy, **fields}
        self._console.print(event(kind, fields) if self._json_lines else text, markup=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._sample()
        if self._live:
            self._live.stop()
        else:
            self._print_evaluation()
            self._print_line()

    def _keep_watching(self) -> None:
        last_line = time.monotonic()
        while not self._stopped.wait(1.0):
            self._sample()
            if self._leads:
                self._log_stall()
            if not self._live and time.monotonic() - last_line >= PLAIN_LINE_SECONDS:
                last_line = time.monotonic()
                self._print_line()
                if self._leads:
                    self._print_bottleneck()
                self._print_learning()
            if not self._live:
                self._print_evaluation()

    def _log_stall(self) -> None:
        """Log that updates are missing, and that they are made again, once each."""
        why = self._stalled()
        if why and not self._said_stalled:
            log.warning("%s; /readyz says so, too, until updates are made again", why)
        if self._said_stalled and not why and not self._statistics.ended:
            log.warning("updates are made again")
        self._said_stalled = why is not None

    def _print_bottleneck(self) -> None:
        """Print the bottleneck when it has moved to another stage."""
        found = self._bottleneck
        if found and self._statistics.seconds > WINDOW_SECONDS and found.stage != self._reported_stage:
            self._reported_stage = found.stage
            self._print(f"bottleneck: {found.sentence}", "bottleneck", found._asdict(), of_run=True)

    def _print_learning(self) -> None:
        """Print why nothing is learned, when that is found or has changed."""
        found = self._learning.now(self.share_done)
        if found.cause and found.cause != self._reported_cause:
            self._print(f"learning: {found.advice}", "learning", found.words())
        self._reported_cause = found.cause

    def _print_evaluation(self) -> None:
        """Print the last evaluation once."""
        last = self._evaluations.last
        if last is not None and last is not self._reported_evaluation:
            self._reported_evaluation = last
            self._print(f"evaluation: {sentence(last)}", "evaluation", last.to_json())

    def _sample(self) -> None:
        self._bottleneck = self._monitor.now()
        with self._lock:
            ledger = self._trajectory_queue.ledger
            self._samples.append((time.monotonic(), ledger.sampled, ledger.trained))
            while self._samples[-1][0] - self._samples[0][0] > RATE_WINDOW_SECONDS:
                self._samples.popleft()
            if (mean := self._statistics.mean_return) is not None:
                self._curve.add(mean)

    def _rates(self) -> tuple[float, float]:
        """Environment steps per second, (sampled, trained), over the last ``RATE_WINDOW_SECONDS``."""
        with self._lock:
            (t0, s0, n0), (t1, s1, n1) = self._samples[0], self._samples[-1]
        seconds = max(t1 - t0, 1e-9)
        return (s1 - s0) / seconds, (n1 - n0) / seconds

    def _eta(self, trained_rate: float) -> str:
        """The time left until the last step or the end of ``max_seconds``, whichever comes first."""
        left, done = 1 - self._share_trained(), self._trajectory_queue.ledger.trained
        # Of several policies each has made its part of what is done, and goes on to.
        steps = left * done / (1 - left) if left < 1 else self._total
        seconds = min(steps / trained_rate if trained_rate > 0 else math.inf, self._time_is_up_at - time.monotonic())
        return _clock(seconds) if seconds < math.inf else "--:--"

    @property
    def share_done(self) -> float:
        """The share of the run that is over, by steps or by time."""
        now, begun = time.monotonic(), self._begun_at
        by_time = (now - begun) / (self._time_is_up_at - begun) if self._time_is_up_at > begun else 1.0
        return min(1.0, max(self._share_trained(), by_time))

    def _steps(self, of: str) -> str:
        trained = self._trajectory_queue.ledger.trained
        if self._policy:  # how many of the run's steps will be those of its agents is known at the end
            return f"{trained:,} ({self._share_trained():.0%} of the run)"
        return f"{trained:,}{of}{self._total:,}"

    def _facts(self) -> dict[str, str]:
        statistics = self._statistics
        sampled, trained = self._rates()
        learning = self._learning.now(self.share_done)
        terms = statistics.terms
        lag = statistics.policy_lag
        return {
            "steps": self._steps(" of "),
            "time": f"{_clock(statistics.seconds)} elapsed, {self._eta(trained)} left",
            "return": learning.comparison.removeprefix("return "),
            "steps/s": f"{sampled:,.0f} sampled, {trained:,.0f} trained",
            "lag": f"{lag.mean:.1f} versions mean, {lag.max:.0f} max" if lag.count else "-",
            "loss": "  ".join(f"{label} {terms[name]:.3f}" for name, label in _LOSSES.items() if name in terms) or "-",
            **({"learning": learning.advice or learning.details} if learning.details else {}),
            "memory": self._memory(),
            "actors": self._actors(),
            **({"self-play": words} if (words := won(self._opponents())) else {}),
            **({"evaluation": sentence(last)} if (last := self._evaluations.last) else {}),
            "bottleneck": self._bottleneck.sentence if self._bottleneck else "-",
        }

    def _memory(self) -> str:
        return _memory_line(self._statistics.max_log_prob_error, self._statistics.log_prob_checks)

    def _actors(self) -> str:
        restarts = sum(self._pool.restarts.values())
        return f"{self._pool.num_alive} alive" + (f", {restarts} replaced" if restarts else "")

    def _print_line(self) -> None:
        statistics, ledger = self._statistics, self._trajectory_queue.ledger
        sampled, trained = self._rates()
        fields = {
            "seconds": round(statistics.seconds, 3),
            "env_steps": ledger.trained,
            "total_env_steps": self._total,
            "mean_return": statistics.mean_return,
            "sampled_env_steps_per_second": round(sampled, 1),
            "trained_env_steps_per_second": round(trained, 1),
            "policy_version": statistics.policy_version,
            "policy_lag": statistics.policy_lag.mean,
            **statistics.terms,
        }
        self._print(self._line(sampled, trained), "progress", fields)

    def _line(self, sampled: float, trained: float) -> str:
        """One plain line that always has the same numbers in the same order."""
        statistics = self._statistics
        mean = "-" if statistics.mean_return is None else f"{statistics.mean_return:.3f}"
        terms = statistics.terms
        names = ("policy_loss", "value_loss", "entropy")
        losses = [f"{terms[name]:.3f}" if name in terms else "-" for name in names]
        lag = f"{statistics.policy_lag.mean:.1f}" if statistics.policy_lag.count else "-"
        return (
            f"[{_clock(statistics.seconds)}] steps {self._steps('/')}  return {mean}  "
            f"sampled/s {sampled:,.0f}  trained/s {trained:,.0f}  lag {lag}  "
            f"policy_loss {losses[0]}  value_loss {losses[1]}  entropy {losses[2]}  eta {self._eta(trained)}"
        )

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", justify="right")
        table.add_column()
        for name, text in self._facts().items():
            table.add_row(name, text)
        with self._lock:
            curve = list(self._curve.points)
        if curve:
            table.add_row("curve", Text(_sparkline(curve, max(10, min(60, self._console.width - 16))), style="cyan"))
        return Group(ProgressBar(total=1.0, completed=self.share_done, width=min(72, self._console.width)), table)

    def summary(self, summary: dict[str, Any], run_dir: Path, *, is_last: bool = True) -> None:
        """Print what was learned and the step accounting, and after the last policy what is of the whole run."""
        if not self._json_lines:
            self._console.print()
        lines = _summary_lines(summary, self._total, is_whole=self._share_trained() >= 1)
        if is_last:
            lines += [*([""] if self._policy else []), *_lines_of_run(summary, run_dir)]
        self._print("\n".join(lines), "summary", summary)


_LOSSES = {"policy_loss": "policy", "value_loss": "value", "entropy": "entropy", "approx_kl": "kl"}

_ENDED = {
    "callback": "Done: a callback ended it.",
    "max_seconds": "Done: time is up (max_seconds).",
    "ray_lost": "Ended early, because Ray was lost; saved.",
}


def _summary_lines(summary: dict[str, Any], total_env_steps: int, *, is_whole: bool) -> list[str]:
    ended = "Done."
    session = summary["session_env_steps"]
    if not session and is_whole:
        ended = f"Nothing was trained: the run has its total_env_steps={total_env_steps:,} already; set more to go on."
    elif summary["interrupted_by"]:
        ended = "Interrupted; saved." if summary["session_updates"] else "Interrupted before the first update; saved."
    elif not is_whole:
        ended = _ENDED.get(summary["stopped_by"], ended)
    mean, random = summary["mean_return"], summary["random_return"]
    if mean is None:
        learned = "no episode ended"
    elif random is None:
        learned = f"{mean:.3f}{_margin(summary['return_ci95'])}"
    else:
        times = f", {mean / random:.1f} times as much" if random > 0 else ""
        learned = (
            f"{mean:.3f}{_margin(summary['return_ci95'])}; a random policy gets "
            f"{random:.3f}{_margin(summary['random_return_ci95'])}{times}"
        )
    whole = ""
    if session != summary["env_steps"]:
        whole = f"; the whole run {summary['env_steps']:,} in {summary['policy_version']:,} updates"
    ledger, balances = summary["ledger"], "balances" if summary["books_balance"] else "DOES NOT BALANCE"
    dropped = ", ".join(f"{steps:,} dropped ({reason})" for reason, steps in ledger["dropped"].items())
    lines = [
        ended,
        f"  return      {learned}",
        *([f"  learning    {summary['learning']['advice']}"] if summary["learning"]["advice"] else []),
        f"  trained     {session:,} environment steps in {_clock(summary['wall_seconds'])} "
        f"({summary['env_steps_per_second']:,.0f}/s), {summary['session_updates']:,} updates" + whole,
        f"  ledger      {balances}: {ledger['sampled']:,} sampled = "
        f"{ledger['trained']:,} trained + {ledger['in_flight']:,} in flight" + (f" + {dropped}" if dropped else ""),
        f"  memory      {_memory_line(summary['max_log_prob_error'], summary['log_prob_checks'])}",
    ]
    if summary["actor_restarts"] or summary["env_faults"]:
        back = summary["actor_recovery_seconds"]
        after = f" (up again after {back['mean']:.1f} s, {back['max']:.1f} s at most)" if back["count"] else ""
        share = summary.get("env_fault_share", 0.0)
        ended = f", which ended {share:.0%} of the episodes" if share >= WORTH_SAYING else ""
        lines.append(
            f"  faults      {summary['actor_restarts']} actors replaced{after}, "
            f"{summary['env_faults']} environment slots restarted{ended}"
        )
    if words := won([Result(**each) for each in summary.get("self_play") or ()]):
        lines.append(f"  self-play   {words}")
    if (evaluation := summary.get("evaluation")) and evaluation["last"]:
        last = EvaluationResult(**evaluation["last"])
        best = EvaluationResult(**evaluation["best"]) if evaluation["best"] else None
        better = "" if last.policy else "; no best weights are kept"
        if best is not None:
            better = f"; best {best.mean_return:.3f} at {best.env_steps:,}" if best != last else ""
        failed = f"; {evaluation['failed']} failed" if evaluation["failed"] else ""
        lines.append(f"  evaluation  {sentence(last)}{better}{failed}")
    return lines


def _lines_of_run(summary: dict[str, Any], run_dir: Path) -> list[str]:
    bottleneck = [f"  bottleneck  {summary['limit']['sentence']}"] if summary["limit"] else []
    return [*bottleneck, f"  run         {run_dir}", f"  play it     shoal evaluate {run_dir}"]


def _margin(half_width: float | None) -> str:
    return "" if half_width is None or math.isnan(half_width) else f" +- {half_width:.3f}"


def _memory_line(error: float | None, checks: int) -> str:
    """The parity check in one line; ``error`` None stands for NaN, which JSON does not have."""
    if not checks:
        return "not checked yet"
    state = "right" if error is not None and error <= TOLERANCE else "MEMORY IS WRONG"
    size = "not a number" if error is None else f"{error:.1e} at most"
    return f"{state}: actors' and learner's log-probabilities differ by {size} ({checks:,} checks)"


def _clock(seconds: float) -> str:
    whole = int(max(0.0, min(seconds, 360_000)))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"


def _sparkline(values: list[float], width: int) -> str:
    """``values`` in ``width`` bars, each the mean of an equal stretch, scaled from the smallest mean to the largest."""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(_BARS[1 + round((m - low) * scale)] for m in means) + f"  {low:.2f} .. {high:.2f}"
