"""Callbacks: the user's code that a run calls at its events, and the numbers that it returns."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.deploy.records.evaluations import EvaluationResult, Evaluations
from shoal.deploy.settings import named_code
from shoal.deploy.settings.sections import CallbackConfig
from shoal.envs.plain_state import NotPlain, to_plain
from shoal.learner.learner_worker import StepResult, Trained
from shoal.learner.training_loop import ObserverFailed

if TYPE_CHECKING:
    from shoal.deploy.settings.sections import Config
    from shoal.deploy.training.prepared_run import PreparedRun
    from shoal.policy.recurrent_policy import RecurrentPolicy

log = logging.getLogger(__name__)

MOST_NAMES = 100
"""Names of numbers that the callbacks of a run may return, all of them together: each is a time series of a policy."""
MOST_STATE_BYTES = 2**20
"""Of one callback's state, as JSON."""
_NAME = re.compile(r"[A-Za-z_][\w./ -]{0,63}")

Numbers = Mapping[str, float] | None
"""Numbers by name: of letters, digits, and ``_ . / -``, at most 64 characters."""


class Update(NamedTuple):
    """One update of the policy."""

    policy_version: int
    """Updates made in the whole run."""
    env_steps: int
    """Environment steps trained in the whole run."""
    terms: Mapping[str, float]
    """What metrics.jsonl has after ``loss/``: losses, entropy and KL divergences in nats, the share of transitions that
    were clipped, the gradient's norm before it is clipped, explained variance, and the advantages' standard deviation
    in units of the reward; means over the update's optimizer steps."""
    policy: str = ""
    """Whose update it is, of several policies; the other numbers are of this one, too."""


class EndedEpisodes(NamedTuple):
    """Episodes that ended in the trajectories of one update, one agent's each."""

    returns: tuple[float, ...]
    """Undiscounted returns."""
    lengths: tuple[int, ...]
    """Environment steps."""
    policy: str = ""
    """Whose agents they are, of several policies."""


class RunningPolicy:
    """One of the policies that a run trains, as callbacks see it."""

    def __init__(self, run: PreparedRun) -> None:
        self._run = run

    @property
    def env_steps(self) -> int:
        """Environment steps of its agents that it was trained with in the whole run."""
        return self._run.learner.queue.ledger.trained

    @property
    def policy_version(self) -> int:
        """Its updates in the whole run."""
        return self._run.statistics.policy_version

    @property
    def mean_return(self) -> float | None:
        """Mean return of the last 256 episodes of its agents; None before the first."""
        return self._run.statistics.mean_return

    @property
    def policy(self) -> RecurrentPolicy:
        """The learner's policy with its current weights, on the learner's device. Training goes on with it."""
        return self._run.learner.learner.policy


class RunningRun:
    """A run as its callbacks see it."""

    def __init__(self, runs: Sequence[PreparedRun], run_dir: Path, stop: Callable[[], None]) -> None:
        self._first, self._run_dir, self._stop = runs[0], run_dir, stop
        self.policies: Mapping[str, RunningPolicy] = {run.policy: RunningPolicy(run) for run in runs}
        """Every policy that is trained, by the names in the settings; the only one's name is ``""``."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self._first.config

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self._run_dir

    @property
    def env_steps(self) -> int:
        """Environment steps trained in the whole run, of all policies together."""
        return sum(policy.env_steps for policy in self.policies.values())

    @property
    def policy_version(self) -> int:
        """Updates made in the whole run; of several policies the most that one has."""
        return max(policy.policy_version for policy in self.policies.values())

    @property
    def mean_return(self) -> float | None:
        """Mean return of the last 256 episodes; None before the first.

        Raises:
            AttributeError: there are several policies, each with its own.
        """
        return self._only("mean_return").mean_return

    @property
    def policy(self) -> RecurrentPolicy:
        """The learner's policy with its current weights, on the learner's device. Training goes on with it.

        Raises:
            AttributeError: there are several.
        """
        return self._only("policy").policy

    def _only(self, asked: str) -> RunningPolicy:
        if len(self.policies) > 1:
            raise AttributeError(
                f"this run trains {', '.join(self.policies)}: ask for run.policies[NAME].{asked}, where NAME is "
                "update.policy or another of these"
            )
        return self.policies[self._first.policy]

    def set_env_options(self, options: Mapping[str, Any]) -> None:
        """Pass options to the environments of all actors, as ``reset(options=...)`` of the episodes that begin from now
        on: a curriculum. They take effect with the next policy version, replace those set before, and are kept in
        checkpoints: a resumed run begins with them. Evaluations play with ``env.reset_options``.

        Args:
            options: plain data by name.

        Raises:
            TypeError: they are something else.
        """
        json.dumps(options := dict(options))
        # Several policies play in the same games, which the first one's weights reach as often as any other's.
        self._first.learner.env_options = options

    @property
    def env_options(self) -> Mapping[str, Any] | None:
        """What ``set_env_options`` was called with last, in this run or the one that it goes on from; None before."""
        return self._first.learner.env_options

    def stop(self) -> None:
        """End the run after this update, as at ``total_env_steps``."""
        self._stop()


class Callback:
    """A callback; a subclass defines the methods of the events that it wants.

    All are called in the run's own process, in the thread that trains, between updates: training waits for them. The
    numbers that a method returns are written beside shoal's own: to RUN/metrics.jsonl as ``callback/NAME``, to the
    trackers of ``log.sinks``, and to Prometheus as ``shoal_callback{name="NAME"}``. An exception saves the run and ends
    it with ``CallbackFailed``.

    Where several policies are trained, ``on_update``, ``on_episodes`` and ``on_evaluation`` are called for each of
    them, once all have had their update; their numbers are that policy's, and those of the other methods are every
    policy's.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """What a resumed run's callback of this class needs to go on, as plain data (JSON); it is kept in every
        checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned when the checkpoint was written that a run is resumed from; before
        ``on_start``. It is not called where there is none."""

    def on_start(self, run: RunningRun) -> Numbers:
        """The workers are started, and no update is made yet."""
        return None

    def on_update(self, run: RunningRun, update: Update) -> Numbers:
        """A policy was updated."""
        return None

    def on_episodes(self, run: RunningRun, episodes: EndedEpisodes) -> Numbers:
        """Episodes ended in the data of the last update; it comes after ``on_update``."""
        return None

    def on_checkpoint(self, run: RunningRun, path: Path) -> Numbers:
        """A checkpoint was written to the directory ``path``."""
        return None

    def on_evaluation(self, run: RunningRun, result: EvaluationResult) -> Numbers:
        """An evaluation (``evaluation.every_env_steps``) has ended; it comes after the next update, or before
        ``on_end``. Of several policies, which play together, each has a result of its own (``result.policy``)."""
        return None

    def on_end(self, run: RunningRun, summary: Mapping[str, Any]) -> Numbers:
        """The run is over, also after a failure; ``summary`` is that of RUN/summary.json."""
        return None


class CallbackFailed(ObserverFailed):
    """A callback raised an exception, which is the cause of this one, or returned something else than numbers."""


class Callbacks:
    """The callbacks of one run, called in their order; an ``learner.training_loop.Observer``.

    Args:
        callbacks: what is called.
        runs: one, or one for each of several policies.
        run_dir: that of the whole run.
        evaluations: those during training, by the name of the policy.
        stop: ends the run.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        runs: Sequence[PreparedRun],
        run_dir: Path,
        evaluations: Mapping[str, Evaluations],
        stop: Callable[[], None],
    ) -> None:
        self._callbacks, self._evaluations = tuple(callbacks), evaluations
        self._view = RunningRun(runs, run_dir, stop)
        self._learner = runs[0].learner
        self._seen = {name: own.last for name, own in evaluations.items()}
        self._stateless: CallbackFailed | None = None
        """Why a checkpoint lacks the state of a callback."""
        self._numbers: dict[str, dict[str, float]] = {run.policy: {} for run in runs}

    def numbers(self, policy: str) -> Mapping[str, float]:
        """The last number of every name that was returned for a policy, or for the whole run."""
        return self._numbers[policy]

    def started(self) -> None:
        """Call ``on_start``."""
        self._call("on_start")

    def updated(self, policy: str, result: StepResult) -> None:
        """Call ``on_update``, and ``on_episodes`` and ``on_evaluation`` where there are any."""
        if not self._callbacks:
            return
        own, outcome = self._view.policies[policy], result.outcome
        assert isinstance(outcome, Trained)
        self._call("on_update", Update(own.policy_version, own.env_steps, outcome.terms, policy), policy=policy)
        returns = tuple(value for report in result.reports for value in report.statistics["episode_returns"])
        if returns:
            lengths = tuple(value for report in result.reports for value in report.statistics["episode_lengths"])
            self._call("on_episodes", EndedEpisodes(returns, lengths, policy), policy=policy)
        self._tell_evaluations()

    def _tell_evaluations(self) -> None:
        for name, evaluations in self._evaluations.items():
            if (last := evaluations.last) is not None and last is not self._seen[name]:
                self._seen[name] = last
                self._call("on_evaluation", last, policy=name)

    def get_state(self) -> dict[str, Any]:
        """What checkpoints hold of the callbacks, as plain data; one that fails is left out, and ``saved`` raises."""
        states, self._stateless = [], None
        for callback in self._callbacks:
            if type(callback).state_dict is Callback.state_dict:
                continue
            try:
                states.append({"name": name_of(callback), "state": _plain(callback.state_dict())})
            except Exception as error:  # noqa: BLE001  (the user's code: it raises anything; raised once it is saved)
                self._stateless = _failed(callback, "state_dict", error)
        weights = self._learner.weights
        try:
            return {
                "callbacks": states,
                "episode_options": to_plain(self._learner.env_options),
                # Those of the weights that actors have, which a resumed run publishes again.
                "published_options": to_plain(None if weights is None else weights.env_options),
            }
        except NotPlain:  # mappings of another class, for example; a callback may give them again
            return {"callbacks": states}

    def saved(self, path: Path) -> None:
        """Call ``on_checkpoint``."""
        if self._stateless is not None:
            raise self._stateless
        self._call("on_checkpoint", path)

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Call ``on_end``, and ``on_evaluation`` where one has ended since the last update."""
        self._tell_evaluations()
        self._call("on_end", summary)

    def _call(self, event: str, *arguments: Any, policy: str | None = None) -> None:
        """Call the method of all callbacks; the numbers are of ``policy``, or where it is None of every one."""
        for callback in self._callbacks:
            if getattr(type(callback), event) is getattr(Callback, event):
                continue
            try:
                self._take(getattr(callback, event)(self._view, *arguments), policy)
            except Exception as error:
                raise _failed(callback, event, error) from error

    def _take(self, numbers: Any, policy: str | None) -> None:
        if numbers is None:
            return
        if not isinstance(numbers, Mapping):
            raise TypeError(f"expected a mapping of numbers by name, or None, got {numbers!r}")
        known = set[str]().union(*self._numbers.values())
        for name, value in numbers.items():
            if name not in known:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    raise ValueError(
                        f"the name {name!r} must be a letter and at most 63 letters, digits, spaces and _ . / -"
                    )
                if len(known) == MOST_NAMES:
                    raise ValueError(
                        f"{name!r} is one name too many: the callbacks of a run may name {MOST_NAMES} numbers"
                    )
                known.add(name)
            number = float(value)
            for each in self._numbers if policy is None else (policy,):
                self._numbers[each][name] = number


def _failed(callback: Callback, method: str, error: Exception) -> CallbackFailed:
    failed = CallbackFailed(f"{name_of(callback)}.{method}: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _plain(state: Any) -> dict[str, Any]:
    """A callback's state, independent of it.

    Raises:
        TypeError: it is no plain data.
        ValueError: there is too much of it.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a mapping of plain data, got {state!r}")
    text = json.dumps(dict(state))
    if len(text) > MOST_STATE_BYTES:
        raise ValueError(f"a state of {len(text):,} bytes; every checkpoint holds it: {MOST_STATE_BYTES:,} at most")
    plain: dict[str, Any] = json.loads(text)
    return plain


def restore_callbacks(callbacks: Sequence[Callback], saved: Mapping[str, Any]) -> None:
    """Give callbacks their states of a checkpoint, whose state ``saved`` is; the n-th of a class that of the n-th.

    Raises:
        ValueError: one does not take its state.
    """
    found = saved.get("callbacks", [])
    states: dict[str, list[Any]] = {}
    for each in found if isinstance(found, list) else []:
        if isinstance(each, dict) and isinstance(each.get("state"), dict):
            states.setdefault(str(each.get("name")), []).append(each["state"])
    for callback in callbacks:
        name = name_of(callback)
        if not states.get(name):
            continue
        try:
            callback.load_state_dict(states[name].pop(0))
        except Exception as error:
            raise ValueError(
                f"{_failed(callback, 'load_state_dict', error)}; to begin it anew, leave it out until the next "
                "checkpoint, or train in another run_dir"
            ) from error
    for name, left in states.items():
        if left:
            log.warning("the checkpoint has a state of the callback %s, which this run does not have", name)


def name_of(callback: Callback) -> str:
    """``module:Class`` of a callback."""
    return f"{type(callback).__module__}:{type(callback).__qualname__}"


def check_callbacks(configs: Sequence[CallbackConfig]) -> list[str]:
    """The problems of callbacks that are named in the settings, without making any."""
    problems = []
    for config in configs:
        try:
            found = _find(config)
            named_code.check_arguments(found, config.kwargs)
        except ValueError as error:
            problems.append(f"callbacks: {config.name}: {error}")
        else:
            if isinstance(found, type):
                problems += [f"callbacks: {config.name}: {problem}" for problem in _wrong_methods(found)]
    return problems


def make_callbacks(configs: Sequence[CallbackConfig], given: Sequence[Callback]) -> list[Callback]:
    """The callbacks that the settings name, and then those ``given`` as objects.

    Raises:
        ValueError: one cannot be made, or is no ``Callback``.
    """
    made: list[Any] = []
    for config in configs:
        try:
            made.append(_find(config)(**config.kwargs))
        except (Exception, SystemExit) as error:
            raise ValueError(f"callbacks: {config.name}: {type(error).__name__}: {error}") from error
    for callback in (*made, *given):
        if not isinstance(callback, Callback):
            hint = "; give an instance, not the class" if isinstance(callback, type) else ""
            raise ValueError(f"callbacks: expected a shoal.Callback, got {callback!r}{hint}")
        if problems := _wrong_methods(type(callback)):
            raise ValueError(f"callbacks: {name_of(callback)}: {problems[0]}")
    return [*made, *given]


def _wrong_methods(cls: type) -> list[str]:
    """Methods that would never be called, because their name is that of no event, or that fail as soon as they are."""
    events = {name: inspect.signature(method) for name, method in vars(Callback).items() if name.startswith("on_")}
    problems = []
    for name in (name for name in dir(cls) if name.startswith("on_") and callable(getattr(cls, name))):
        if name not in events:
            near = difflib.get_close_matches(name, events, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            problems.append(f"{name} is no event, so it would never be called{meant} There are {', '.join(events)}")
            continue
        wanted, given = list(events[name].parameters), inspect.getattr_static(cls, name)
        if not isinstance(given, FunctionType | staticmethod | classmethod):
            continue  # which may take anything
        try:
            inspect.signature(getattr(cls, name)).bind(*(wanted if isinstance(given, FunctionType) else wanted[1:]))
        except TypeError:
            problems.append(f"{name} must take ({', '.join(wanted)})")
    return problems


def _find(config: CallbackConfig) -> Callable[..., Callback]:
    found = named_code.find(config.name, {})
    if not callable(found):
        raise ValueError(f"expected a Callback class or a function that makes one, got {found!r}")
    made: Callable[..., Callback] = found
    return made
