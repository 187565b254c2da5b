"""Schedules of settings, and the early end of an update: by trained environment steps, whatever process counts them."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import shoal
import torch
from own_schedules import Falling, to_floor
from rollouts import make_learner, random_batch, small_policy
from shoal import given
from shoal.deploy.doctor import preflight
from shoal.deploy.library.config import make_config
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings.load import load_config, to_yaml
from shoal.deploy.training.run import run
from shoal.envs.registry import make_env_spec
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass
from shoal.learner.schedules import (
    WARMUP_FROM,
    ScheduleConfig,
    Scheduled,
    ScheduledSettings,
    check_schedules,
    scheduled_settings,
)
from shoal.learner.statistics import RunStatistics
from shoal.policy.weights import flatten_weights

HALF_COSINE = 0.5 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ({}, {0: 2.0, 50: 2.0, 1000: 2.0}),
        ({"kind": "linear"}, {0: 2.0, 25: 1.5, 99: 0.02, 100: 0.0, 1000: 0.0}),
        ({"kind": "linear", "end": 6.0}, {0: 2.0, 25: 3.0, 100: 6.0, 101: 6.0}),
        ({"end": 6.0}, {0: 2.0, 25: 3.0, 100: 6.0, 101: 6.0}),
        ({"over_env_steps": 50}, {0: 2.0, 25: 1.0, 50: 0.0}),
        ({"kind": "constant"}, {0: 2.0, 50: 2.0, 1000: 2.0}),
        ({"kind": "cosine", "end": 0.0}, {0: 2.0, 25: 2 * HALF_COSINE, 50: 1.0, 100: 0.0, 200: 0.0}),
        ({"kind": "linear", "end": 0.0, "over_env_steps": 1000}, {100: 1.8, 1000: 0.0, 2000: 0.0}),
        ({"warmup_env_steps": 10}, {0: 2 * WARMUP_FROM, 5: 1 + WARMUP_FROM, 10: 2.0, 90: 2.0}),
        # What is left after the warm-up ends where it would have ended without.
        ({"kind": "linear", "end": 0.0, "warmup_env_steps": 20}, {10: 1 + WARMUP_FROM, 20: 2.0, 60: 1.0, 100: 0.0}),
        ({"kind": "cosine", "end": 1.0, "warmup_env_steps": 20}, {20: 2.0, 60: 1.5, 100: 1.0}),
    ],
)
def test_a_course_passes_through_its_points(schedule: dict[str, Any], at: dict[int, float]) -> None:
    """Catches a course that starts, bends, warms up or ends elsewhere, or that goes on beyond its end."""
    course = ScheduleConfig(**schedule)
    for env_steps, value in at.items():
        assert course.value(2.0, env_steps, 100) == pytest.approx(value, abs=1e-12), env_steps


def test_a_course_over_the_run_needs_to_know_the_run() -> None:
    """Catches a learner without a run that silently trains with some other value."""
    with pytest.raises(ValueError, match="total_env_steps"):
        make_learner(small_policy(), schedules={"learning_rate": {"kind": "linear", "end": 0.0}})


def test_the_learning_rate_falls_over_the_run_unless_it_is_told() -> None:
    """Catches a default course that other settings get, too, that a named one does not replace, or that is guessed
    where no end is known."""

    def rates(total: int | None, **schedules: Any) -> list[float]:
        config = LearnerConfig(learning_rate=0.001, clip_coef=0.2, schedules=schedules)
        return [scheduled_settings(config, at, total).learning_rate for at in (0, 250, 1000, 2000)]

    assert rates(1000) == pytest.approx([0.001, 0.00075, 0.0, 0.0])
    assert rates(None) == [0.001] * 4
    assert rates(1000, learning_rate=ScheduleConfig(kind="constant")) == [0.001] * 4
    assert rates(1000, learning_rate=ScheduleConfig(end=0.001)) == [0.001] * 4
    assert rates(1000, clip_coef=ScheduleConfig(kind="linear")) == rates(1000)
    config = LearnerConfig(entropy_coef=0.02, clip_coef=0.3)
    assert scheduled_settings(config, 999, 1000)[1:] == scheduled_settings(config, 0, 1000)[1:]


def test_a_warm_up_alone_takes_nothing_else_away() -> None:
    """Catches a learning rate that falls no more over the run because it warms up first."""
    warm = {"learning_rate": ScheduleConfig(warmup_env_steps=200), "clip_coef": ScheduleConfig(warmup_env_steps=200)}
    config = LearnerConfig(learning_rate=0.001, clip_coef=0.2, schedules=warm)
    rates, clips = zip(*[scheduled_settings(config, at, 1000)[:3:2] for at in (100, 200, 600, 1000)], strict=True)
    assert rates == pytest.approx([0.001 * (WARMUP_FROM + 1) / 2, 0.001, 0.0005, 0.0])
    assert clips == pytest.approx([0.2 * (WARMUP_FROM + 1) / 2, 0.2, 0.2, 0.2])
    assert scheduled_settings(config, 600, None).learning_rate == 0.001  # no end is known


ALL = {
    "learning_rate": {"kind": "linear", "end": 0.0, "warmup_env_steps": 100},
    "entropy_coef": {"kind": "cosine", "end": 0.5, "over_env_steps": 400},
    "clip_coef": {"kind": "linear", "end": 0.01, "over_env_steps": 500},
    "value_clip_coef": {"kind": "linear", "end": 0.001, "over_env_steps": 600},
}


def test_an_update_is_made_with_the_values_of_its_step() -> None:
    """Catches a value that the loss or the optimizer does not take, that is a step late, or that counts otherwise."""
    settings = {"epochs": 2, "minibatches": 1, "learning_rate": 0.01, "clip_coef": 0.2, "value_clip_coef": 0.2}
    learner = make_learner(small_policy(), **settings, schedules=ALL, total_env_steps=700)
    trained = 0
    seen = []
    for seed in range(4):
        want = scheduled_settings(learner.config, trained, 700)
        other = make_learner(copy.deepcopy(learner.policy), **settings | want._asdict())
        other.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
        batch = random_batch(seed)
        result = learner.update(batch)
        other.update(batch)
        assert result.scheduled == want
        assert flatten_weights(learner.policy, 0).sha256 == flatten_weights(other.policy, 0).sha256
        trained += result.all_env_steps
        assert learner.env_steps == trained
        seen.append(want)
    # Each of them moved: otherwise the comparison would say nothing. The weight of the value loss has no schedule.
    assert all(len({getattr(each, name) for each in seen}) == len(seen) for name in get_args(Scheduled))


def test_an_update_that_fails_takes_no_step_of_the_schedule() -> None:
    """Catches steps that are counted though nothing was trained on them."""
    learner = make_learner(small_policy(), schedules=ALL, total_env_steps=700)
    learner.update(random_batch(0))
    before = learner.env_steps
    broken = random_batch(1)
    broken["reward"][0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        learner.update(broken)
    assert learner.env_steps == before


def test_an_update_ends_with_the_epoch_that_moved_the_policy_far_enough() -> None:
    """Catches passes that go on, or that end in mid-epoch: every segment is trained equally often."""
    settings = {"learning_rate": 0.01, "minibatches": 2, "batch_size": 8}
    batch = random_batch(0, num_slots=8)
    # Of the policy itself: one pass alone has no other policy to measure its ratio from than the one that acted.
    with torch.no_grad():
        log_prob = forward_pass(small_policy(), batch, DevicePath(torch.device("cpu"))).log_prob
    batch["behavior_log_prob"] = log_prob.T.contiguous()

    def made(**more: Any) -> tuple[int, int, float, str]:
        learner = make_learner(small_policy(), **settings, **more)
        result = learner.update(batch)
        return (
            result.optimizer_steps,
            result.all_env_steps,
            result.terms["approx_kl"],
            flatten_weights(learner.policy, 0).sha256,
        )

    steps, env_steps, kl, weights = made(epochs=5, target_kl=1e-9)
    assert steps == 2
    everything = made(epochs=5)
    assert everything[:2] == (10, env_steps)
    # A mean over the steps that were made, not over those that were planned: that of one pass alone.
    assert kl == pytest.approx(made(epochs=1)[2], rel=1e-4)
    assert made(epochs=5, target_kl=1e9) == everything
    assert weights != everything[3]


TRAIN = [
    "mode=inline",
    "env.id=recall",
    "env.num_envs=8",
    "actor.unroll_length=8",
    "actor.max_policy_lag=0",
    "learner.batch_size=8",
    "learner.num_threads=1",
    "metrics.port=-1",
    "checkpoint.every_updates=0",
    "learner.schedules.learning_rate={kind: cosine, end: 1e-5, over_env_steps: 640}",
    "learner.schedules.entropy_coef={kind: linear, end: 0.1}",
    "learner.schedules.clip_coef={kind: 'own_schedules:to_floor', kwargs: {floor: 0.5}, warmup_env_steps: 64}",
    "learner.entropy_coef=0.02",
    "learner.desired_kl=0",
    "learner.epochs=1",
    "learner.minibatches=1",
]


def _run(directory: Path, *settings: str) -> dict[str, Any]:
    config, problems = load_config((), [*TRAIN, *settings])
    assert not problems
    return run(config, directory).summary


def test_a_resumed_run_goes_on_where_its_schedules_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a schedule that begins anew, steps that are counted otherwise than in the ledger, and a resumed run that
    keeps the learning rate of the one before."""
    made: list[tuple[int, ScheduledSettings]] = []
    add_update = RunStatistics.add_update

    def watched(statistics: RunStatistics, policy_version: int, outcome: Any) -> None:
        made.append((statistics.ledger.trained - outcome.all_env_steps, outcome.scheduled))
        add_update(statistics, policy_version, outcome)

    monkeypatch.setattr(RunStatistics, "add_update", watched)
    setting = LearnerConfig(entropy_coef=0.02, clip_coef=0.2)
    learning_rate = ScheduleConfig(kind="cosine", end=1e-5, over_env_steps=640)
    entropy = ScheduleConfig(kind="linear", end=0.1)
    clip = own("to_floor", kwargs={"floor": 0.5}, warmup_env_steps=64)
    trained = 0
    for total, start in ((256, setting.learning_rate), (512, setting.learning_rate), (700, 0.5)):
        summary = _run(tmp_path / "run", f"total_env_steps={total}", f"learner.learning_rate={start}")
        assert summary["ledger"]["trained"] >= total
        assert made[0][0] == trained
        for before, scheduled in made:
            assert scheduled.learning_rate == learning_rate.value(start, before, total)
            assert scheduled.entropy_coef == entropy.value(0.02, before, total)
            assert scheduled.clip_coef == clip.value(setting.clip_coef, before, total)
            assert scheduled.value_clip_coef == setting.value_clip_coef
        # The last line of the history has the last update's values.
        line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert (line["learning_rate"], line["entropy_coef"]) == pytest.approx(made[-1][1][:2])
        assert line["optimizer_steps"] == len(made)
        trained = summary["ledger"]["trained"]
        made.clear()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            "learner.schedules.learning_rte={kind: linear, end: 0}",
            "learner.schedules.learning_rte: Input should be 'learning_rate', 'entropy_coef', 'clip_coef' or "
            "'value_clip_coef' (got 'learning_rte'; did you mean learning_rate?)",
        ),
        ("learner.schedules.gamma={kind: linear, end: 0}", "learner.schedules.gamma: Input should be 'learning_rate'"),
        (
            "learner.schedules.clip_coef.kind=linaer",
            "learner.schedules.clip_coef.kind: must be constant, linear, cosine, or a function of progress as "
            "package.module:name; did you mean linear? (got 'linaer')",
        ),
        ("learner.schedules.clip_coef={kind: 'a:b', end: 0.1}", "clip_coef.end=0.1 needs kind linear or cosine, which"),
        ("learner.schedules.clip_coef={kind: linear, kwargs: {a: 1}}", "clip_coef.kwargs={'a': 1} need a kind that is"),
        ("learner.schedules.clip_coef={knd: linear}", "did you mean learner.schedules.clip_coef.kind?"),
        ("learner.schedules.clip_coef=linear", "learner.schedules.clip_coef: is a section of settings"),
        ("learner.schedules.clip_coef={kind: constant, end: 0.1}", "clip_coef.end=0.1 needs kind linear or cosine"),
        ("learner.schedules.clip_coef={kind: constant, over_env_steps: 5}", "over_env_steps=5 needs kind linear or"),
        ("learner.schedules.clip_coef={kind: linear, end: -1}", "clip_coef.end: Input should be greater than or equal"),
        (
            "learner.schedules.clip_coef={kind: linear, end: 0, warmup_env_steps: 50, over_env_steps: 50}",
            "clip_coef.warmup_env_steps=50 leaves nothing of over_env_steps=50",
        ),
        (
            "learner.schedules.clip_coef.warmup_env_steps=3000000",
            "learner.schedules.clip_coef.warmup_env_steps: 3000000 leaves nothing of total_env_steps=3000000",
        ),
        (
            "learner.schedules.value_clip_coef.kind=linear",
            "learner.schedules.value_clip_coef goes from value_clip_coef=0.0 to 0, but 0 turns value clipping off",
        ),
    ],
)
def test_what_is_wrong_with_a_schedule_is_one_line(settings: str, expected: str) -> None:
    """Catches a course that would be ignored, and a problem without its place or its remedy."""
    [problem] = load_config((), [settings])[1]
    assert expected in problem


def test_a_schedule_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """Catches a resolved configuration that another run cannot be started with."""
    settings = [
        "learner.schedules.learning_rate={kind: linear, end: 0.0, warmup_env_steps: 10000}",
        "learner.schedules.clip_coef={kind: cosine, end: 0.05, over_env_steps: 1e6}",
        "learner.schedules.entropy_coef={kind: 'own_schedules:to_floor', kwargs: {floor: 0.1}}",
        "learner.target_kl=0.03",
    ]
    config, problems = load_config((), settings)
    assert not problems
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "config.yaml"], ()) == (config, [])
    assert config.learner.schedules["learning_rate"].warmup_env_steps == 10_000


def test_rounding_never_leaves_the_course() -> None:
    """Catches a learning rate that rounding makes negative, which the optimizer would refuse."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        start, end = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        over = int(torch.randint(1, 10**6, (), generator=generator))
        at = int(torch.randint(0, 2 * 10**6, (), generator=generator))
        for kind in ("linear", "cosine"):
            value = ScheduleConfig(kind=kind, end=end, over_env_steps=over).value(start, at, None)
            assert min(start, end) - 1e-15 <= value <= max(start, end) + 1e-15
            assert value == end or at < over


def own(name: str, **more: Any) -> ScheduleConfig:
    """A schedule by a function of ``own_schedules``."""
    return ScheduleConfig(kind=f"own_schedules:{name}", **more)


def test_a_function_of_ones_own_gets_the_progress_after_the_warm_up() -> None:
    """Catches a function that gets a count, whose answer is taken for the value itself, that goes on beyond the end,
    whose arguments are dropped, or that a warm-up turns off."""
    floored = own("to_floor", kwargs={"floor": 0.5})
    assert [floored.value(2.0, at, 100) for at in (0, 50, 100, 1000)] == [2.0, 1.5, 1.0, 1.0]
    late = own("to_floor", warmup_env_steps=20, over_env_steps=120)
    assert [late.value(2.0, at, None) for at in (10, 20, 70, 120)] == pytest.approx([1 + WARMUP_FROM, 2.0, 1.0, 0.0])
    # Plain numbers, whatever the function computes with: they are written as JSON and compared between learners.
    values = [own("in_steps").value(1.0, at, 100) for at in (0, 50)]
    assert values == [1.0, 0.1]
    assert {type(value) for value in values} == {float}
    with pytest.raises(ValueError, match="total_env_steps"):
        floored.value(2.0, 0, None)


def test_a_default_course_makes_room_for_a_function() -> None:
    """Catches a learning rate that falls over the run although a function says otherwise."""
    config = LearnerConfig(learning_rate=0.001, schedules={"learning_rate": own("to_floor", kwargs={"floor": 1.0})})
    assert [scheduled_settings(config, at, 1000).learning_rate for at in (0, 500, 1000)] == [0.001] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raises", "own_schedules:raises, called with the progress 1, raises ZeroDivisionError: "),
        ("unfit", "unfit, called with the progress 0, raises TypeError: unfit() missing 1 required positional"),
        ("undefined", "own_schedules:undefined returned nan at progress 1, must be finite and at least 0"),
        ("below_zero", "returned -0.05 at progress 0.55, must be finite and at least 0"),
        ("endless", "returned inf at progress 0, must be finite"),
        ("enormous", "returned inf at progress 0, must be finite"),
        ("of_tensors", "returned an object of Tensor at progress 0, must be a number: float(...) makes one"),
        ("of_arrays", "returned an object of ndarray at progress 0, must be a number: float(...) makes one"),
        ("said", "returned an object of bool at progress 0, must be a number"),
        ("nothing", "returned an object of NoneType at progress 0, must be a number"),
        ("by_calls", "at progress 0, must be a function of the progress alone"),
        ("CONSTANT", "own_schedules:CONSTANT is an object of float, must be a function of the progress, from 0 to 1"),
        ("Falling", "own_schedules:Falling is the class Falling, must be a function of the progress"),
        ("absent", "own_schedules:absent: own_schedules has no absent"),
        ("too_large", "too_large returned 1.7e+308 at progress 0: clip_coef=2.0 times that is infinite"),
    ],
)
def test_a_function_that_does_not_serve_is_named_before_a_start(tmp_path: Path, name: str, expected: str) -> None:
    """Catches a run that ends, or trains with NaN, in the middle for what a call before its start tells."""
    settings = {"mode": "inline", "env.id": "recall", "metrics.port": -1, "learner.clip_coef": 2.0}
    config = make_config({**settings, "learner.schedules.clip_coef.kind": f"own_schedules:{name}"})
    [problem] = preflight.check(config, tmp_path / "run")
    assert problem.startswith(f"learner.schedules.clip_coef.kind: own_schedules:{name}")
    assert expected in problem


def test_a_module_that_is_missing_or_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of the user's module in place of a problem of the settings."""
    (tmp_path / "broken_schedules.py").write_text("raise SystemExit('half written')")
    monkeypatch.syspath_prepend(tmp_path)
    kinds = ("no_such_package.schedules:mine", "broken_schedules:mine")
    missing, broken = (
        check_schedules(LearnerConfig(schedules={"entropy_coef": ScheduleConfig(kind=kind)})) for kind in kinds
    )
    assert missing == [
        f"learner.schedules.entropy_coef.kind: {kinds[0]}: there is no module 'no_such_package' here; install the "
        "package that has it, or start in the directory where it lies"
    ]
    assert broken == [
        f"learner.schedules.entropy_coef.kind: {kinds[1]}: broken_schedules ends the program (exit 'half written') "
        'where it is imported or made; what a script runs belongs under if __name__ == "__main__"'
    ]


def test_value_clipping_is_not_turned_off_by_a_function() -> None:
    """Catches a schedule that ends with the loosest clipping, where it was to end with the tightest."""
    floored = {"value_clip_coef": own("to_floor", kwargs={"floor": 0.1})}
    assert check_schedules(LearnerConfig(value_clip_coef=0.2, schedules=floored)) == []
    [problem] = check_schedules(LearnerConfig(value_clip_coef=0.2, schedules={"value_clip_coef": own("to_floor")}))
    assert problem.endswith("returned 0 at progress 1, but a value_clip_coef of 0 turns value clipping off instead of "
                            "clipping most; must be above 0")  # fmt: skip


def test_a_function_is_given_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a function that its name does not lead to, one that an import finds and is sent all the same, and one
    that does not arrive in the process of a learner."""
    monkeypatch.setattr(given, "schedules", {})
    named = shoal.Config(learner={"schedules": {"clip_coef": to_floor, "entropy_coef": {"kind": to_floor}}})
    assert {one.kind for one in named.learner.schedules.values()} == {"own_schedules:to_floor"}
    assert not given.schedules

    functions = (lambda progress: 1 - 0.5 * progress), functools.partial(to_floor, floor=0.25), Falling(0.125)
    names = ("learning_rate", "clip_coef", "entropy_coef")
    config = shoal.Config(
        **{f"learner.schedules.{name}": function for name, function in zip(names, functions, strict=True)},
        learner={"learning_rate": 1.0, "clip_coef": 1.0, "entropy_coef": 1.0},
    )
    assert check_schedules(config.learner) == []
    sent = pickle.dumps(make_worker_setup(config, make_env_spec("recall"), run_id="r").user_code)
    given.schedules.clear()
    assert len(check_schedules(config.learner)) == 3
    pickle.loads(sent)
    assert scheduled_settings(config.learner, 100, 100)[:3] == (0.5, 0.125, 0.25)
    # What no checkpoint would hold is no argument.
    with pytest.raises(shoal.ConfigError, match=r"learner.schedules.clip_coef.kwargs.floor: expected plain data"):
        shoal.Config(learner={"schedules": {"clip_coef": {"kind": to_floor, "kwargs": {"floor": object()}}}})
