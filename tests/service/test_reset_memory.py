"""``actor.reset_memory``: where the memory is zeroed, in every kind of environment, while returns end with episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from make_env import make_env
from rollouts import (
    SMALL,
    Rollouts,
    make_learner,
    make_policy,
    random_batch,
    random_columns,
    small_policy,
    state_of,
    tiny_policy,
)
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.doctor.preflight import check
from shoal.deploy.evaluation.evaluate import PolicyPlayer, Side, blocks
from shoal.deploy.settings.load import load_config
from shoal.envs.boundary import DiscreteActions, TrialEnvironment, VectorEnvironment
from shoal.envs.play import play
from shoal.envs.reports import Reports
from shoal.envs.trials import EPISODES_WITHOUT_KEY, KEY_MISSING, TrialKey
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass, log_prob_error
from shoal.learner.parity_check import TOLERANCE
from shoal.learner.start_states import RefreshedStates, final_state, memory_resets
from shoal.policy.actions import legal
from shoal.policy.trajectory import TrajectoryError, TrajectoryHeader, from_bytes, to_bytes
from shoal.policy.weights import flatten_weights
from slow_reference import loss_by_episode
from trial_envs import KEY, places

CPU = DevicePath(torch.device("cpu"))
MODES = {"episode": "ends", "never": "ends", "info:trial": "ends", "info:trial, begins": "begins"}
"""``tells`` of the environments by mode."""
ENVIRONMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"sync {mode}": ("trial_envs:Trials-v0", {"autoreset_mode": mode})
        for mode in ("next_step", "same_step", "disabled")
    },
    **{
        f"native {mode}": ("trial_envs:Trials-v0", {"vectorization": "native", "mode": mode})
        for mode in ("NEXT_STEP", "SAME_STEP", "DISABLED")
    },
    "native without final_info": (
        "trial_envs:Trials-v0",
        {"vectorization": "native", "mode": "SAME_STEP", "final_info": False},
    ),
    "sync with faults": ("trial_envs:Trials-v0", {"fails_at": 17}),
    "sync same_step with faults": ("trial_envs:Trials-v0", {"fails_at": 17, "autoreset_mode": "same_step"}),
    "parallel": ("pettingzoo:trial_envs:Together", {}),
    "parallel with faults": ("pettingzoo:trial_envs:Together", {"fails_at": 17}),
    "turns": ("pettingzoo:trial_envs:Turns", {}),
}
PROCESSES = {"async next_step": {"autoreset_mode": "next_step"}, "async same_step": {"autoreset_mode": "same_step"}}
SLOTS, UNROLL = 4, 7


def zeroed_where(mode: str, rows: list[tuple[int, ...] | None]) -> list[bool]:
    """The reference: whether each row of a slot, from its very first on, finds the memory zeroed.

    What must differ from the row before for that: instance, trial or episode. A row of an agent that is out of the game
    begins an episode by itself.
    """
    differs = {"episode": 3, "never": 1}.get(mode, 2)
    found, before = [], None
    for row in rows:
        if row is None:
            found.append(mode == "episode")
            continue
        found.append(before is None or row[:differs] != before[:differs])
        before = row
    return found


def make_worker(env: VectorEnvironment, mode: str, **settings: Any) -> RolloutWorker:
    """A worker with a policy whose actions depend on its memory."""
    mode = mode.partition(",")[0]
    if mode.startswith("info:"):
        assert isinstance(env, TrialEnvironment)
        env.watch(mode.removeprefix("info:"))
    policy = make_policy(observation_of(env.spec), actions_of(env.spec))
    identity = {"run_id": "trials", "actor": 0, "restart_index": 0, "seed": 0}
    return RolloutWorker(env, policy, UNROLL, **identity, reset_memory=mode, **settings)


def unrolls(worker: RolloutWorker, count: int, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """The columns of so many unrolls, over the wire."""
    for version in range(first, first + count):
        payload = worker.rollout(flatten_weights(worker.policy, version))
        yield {name: column.copy() for name, column in from_bytes(worker.spec, payload).columns.items()}


def check_worker(worker: RolloutWorker, mode: str, count: int) -> tuple[int, int]:
    """Replay every slot, step by step; the numbers of resets, and of episodes begun without one."""
    found = list(unrolls(worker, count))
    policy, names = worker.policy, [name for name, _ in worker.spec.state_shapes]
    resets = carried = 0
    for slot in range(len(found[0]["obs"])):
        rows = [row for columns in found for row in columns["obs"][slot, :-1]]
        expected = iter(zeroed_where(mode, places(np.stack([*rows, found[-1]["obs"][slot, -1]]))))
        state = policy.initial_state(1)
        for columns in found:
            for name, part in zip(names, state, strict=True):
                shipped = torch.from_numpy(columns[f"initial_{name}"][slot])[:, None]
                torch.testing.assert_close(shipped, part, atol=1e-5, rtol=1e-5)
            for t in range(UNROLL):
                zeroed = next(expected)
                assert columns.get("memory_reset", columns["is_first"])[slot, t] == zeroed, (slot, t)
                resets, carried = resets + zeroed, carried + (columns["is_first"][slot, t] and not zeroed)
                obs = torch.from_numpy(columns["obs"][slot, t])[None]
                with torch.no_grad():
                    output, state = policy.step(obs, torch.tensor([zeroed]), state)
                mask = columns.get("action_mask")
                logits = legal(output.logits, None if mask is None else torch.from_numpy(mask[slot, t : t + 1] != 0))
                action = torch.from_numpy(columns["action"][slot, t : t + 1])
                log_prob, _ = policy.actions.evaluate(logits, action)
                assert log_prob.item() == pytest.approx(columns["behavior_log_prob"][slot, t], abs=1e-5)
    return resets, carried


@pytest.mark.parametrize("kind", ENVIRONMENTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_memory_is_zeroed_where_the_mode_says(mode: str, kind: str) -> None:
    """Catches a memory zeroed a row early or late, or with an episode of the same trial; one that outlives its trial or
    a restart; a flag of mid-episode that counts; infos of a last step, or of a reset, that an adapter overlooks."""
    env_id, kwargs = ENVIRONMENTS[kind]
    if env_id.startswith("pettingzoo"):
        pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")
    env = make_env(env_id, SLOTS, 0, tells=MODES[mode], **kwargs)
    try:
        resets, carried = check_worker(make_worker(env, mode), mode, 8)
    finally:
        env.close()
    assert resets > SLOTS or mode == "never"
    assert bool(carried) == (mode != "episode")
    if "faults" in kind:
        assert resets > SLOTS


@pytest.mark.parametrize("kind", PROCESSES)
def test_processes_tell_where_trials_begin(kind: str) -> None:
    """Catches a key that does not reach the processes, or flags of one group of slots that another overwrites."""
    env = make_env("trial_envs:Trials-v0", SLOTS, 0, vectorization="async", fails_at=17, **PROCESSES[kind])
    worker = make_worker(env, "info:trial")
    try:
        resets, carried = check_worker(worker, "info:trial", 8)
    finally:
        worker.close()
    assert min(resets - SLOTS, carried) > 0


FORMS = {
    "next_step": {},
    "same_step": {"same_step": True},
    "burn_in": {"burn_in": 5},
    "same_step_burn_in": {"same_step": True, "burn_in": 5},
}


def gradients_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    total = float(torch.stack([w.norm() for w in want.values()]).norm())
    for name in want:
        error = float((got[name] - want[name]).norm())
        assert error <= tolerance * (float(want[name].norm()) + total / 100), name


@pytest.mark.parametrize("core", ["lstm", "gru", "linear", "own_cores:Leaky"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=examples(2), phases=[Phase.generate])  # a seed does not shrink
@given(seed=st.integers(0, 2**31), num_slots=st.integers(1, 4))
def test_updates_with_a_carried_memory_equal_episodes_trained_one_by_one(
    form: str, core: str, seed: int, num_slots: int
) -> None:
    """Catches returns, traces or bootstraps that follow the memory over an episode's end, a memory or a gradient that
    does not cross one, and a final row that later steps remember."""
    policy = tiny_policy(core).double()
    batch = random_batch(seed, num_slots=num_slots, state_shapes=state_of(policy), carries_memory=True, **FORMS[form])
    batch = batch.apply(lambda column: column.double() if column.is_floating_point() else column.clone())
    learner = make_learner(policy, max_grad_norm=1e99)
    loss, _ = loss_by_episode(policy, batch, learner.config)
    names, parameters = zip(*policy.named_parameters(), strict=True)
    want = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    result = learner.update(batch)
    assert result.terms["loss"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    gradients_close({name: p.grad for name, p in policy.named_parameters()}, want, 1e-9)


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("core", ["lstm", "gru", "linear"])
def test_gradients_cross_an_episodes_end_but_no_reset(core: str, reset: bool, same_step: bool) -> None:
    """Catches a carried memory that is detached at an episode's end, and a reset that a gradient passes."""
    policy = tiny_policy(core)
    batch = random_batch(
        3, num_slots=2, state_shapes=state_of(policy), carries_memory=True, same_step=same_step
    ).clone()
    first = 5
    for name in ("is_first", "memory_reset", "terminated", "truncated"):
        batch[name].zero_()
    batch["truncated"][:, first - 1 if same_step else first - 2] = True
    batch["is_first"][:, first] = True
    batch["memory_reset"][:, first] = reset
    obs = batch["obs"] = batch["obs"].clone().requires_grad_(True)
    log_prob = forward_pass(policy, batch, CPU).log_prob
    [gradient] = torch.autograd.grad(log_prob[first:].sum(), obs)
    assert bool(gradient[:, :first].any()) == (not reset)
    assert gradient[:, first:].any()


@pytest.mark.parametrize("core", ["lstm", "gru", "linear"])
def test_final_rows_without_a_reset_are_stepped_in_bfloat16_too(core: str) -> None:
    """Catches types that do not fit each other where a segment is stepped through under autocast."""
    policy = small_policy() if core == "lstm" else tiny_policy(core)
    batch = random_batch(3, num_slots=5, carries_memory=True, same_step=True, state_shapes=state_of(policy)).clone()
    batch["memory_reset"].zero_()
    with torch.no_grad():
        wanted = forward_pass(policy, batch, CPU)
        with torch.autocast("cpu", torch.bfloat16):
            got = forward_pass(policy, batch, CPU)
    assert (batch["truncated"] & ~batch["terminated"]).any()
    torch.testing.assert_close(got.next_value, wanted.next_value, atol=0.1, rtol=0.1)
    torch.testing.assert_close(got.log_prob, wanted.log_prob, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("same_step", [False, True])
def test_value_targets_end_with_the_episode(same_step: bool) -> None:
    """Catches targets that go by the memory's resets: what follows an episode would count in its return."""
    policy = tiny_policy()
    batch = random_batch(
        5, num_slots=3, carries_memory=True, same_step=same_step, state_shapes=state_of(policy)
    ).clone()
    batch["memory_reset"].zero_()
    learner = make_learner(policy)

    def targets(which: Any) -> torch.Tensor:
        targets: torch.Tensor = learner._prepare(which, None, None).targets.vs
        return targets.T

    before = targets(batch)
    ends = batch["terminated"] | batch["truncated"]
    assert ends.any()
    for slot, t in ends.nonzero().tolist():
        changed = batch.clone()
        changed["reward"][slot, t + 1 :] += 100.0
        assert torch.equal(targets(changed)[slot, : t + 1], before[slot, : t + 1])
        changed["reward"][slot, t] += 1.0
        assert not torch.equal(targets(changed)[slot, t], before[slot, t])


@pytest.mark.parametrize("burn_in", [0, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_the_canary_is_exact(autoreset: str, mode: str, burn_in: int) -> None:
    """Catches a learner that resets by ``is_first``, in the update, in burn-in rows or in refreshed states."""
    env = make_env("trial_envs:Trials-v0", SLOTS, 0, tells=MODES[mode], autoreset_mode=autoreset)
    reset_memory = mode.partition(",")[0]
    if reset_memory == "info:trial":
        assert isinstance(env, TrialEnvironment)
        env.watch(KEY)
    rollouts = Rollouts(env, unroll_length=12, burn_in=burn_in, reset_memory=reset_memory)
    learner = make_learner(make_policy(rollouts.observation, rollouts.actions), learning_rate=1e-3)
    policy, refreshed = learner.policy, RefreshedStates(learner.policy.core)
    for version in range(4):
        batch = rollouts.batch(policy, version)
        assert error(policy, batch, batch) <= TOLERANCE / 10
        if mode != "episode":
            wrong = batch.clone()
            wrong["memory_reset"] = wrong["is_first"]
            assert error(policy, wrong, batch) > 10 * TOLERANCE
        refreshed.keep(batch, final_state(policy, batch, CPU))
        following = rollouts.batch(policy, version)
        for name in policy.core.state_shapes:
            used = refreshed.apply(following)[f"initial_{name}"]
            torch.testing.assert_close(used, following[f"initial_{name}"], atol=1e-5, rtol=1e-5)
        if burn_in:
            burned = learner.with_start_states(following)
            for name in policy.core.state_shapes:
                torch.testing.assert_close(
                    burned[f"initial_{name}"], following[f"initial_{name}"], atol=1e-5, rtol=1e-5
                )
        made = learner.update(following).log_prob_error
        assert burn_in or made <= TOLERANCE / 10
    env.close()


def error(policy: Any, used: Any, batch: Any) -> float:
    """The canary's reading of ``batch``, recomputed from what ``used`` says."""
    return float(log_prob_error(forward_pass(policy, used, CPU).log_prob.detach(), batch))


def test_a_reset_in_mid_episode_is_refused() -> None:
    """Catches damaged flags that would train another memory than acted."""
    spec = dataclasses.replace(SMALL, carries_memory=True)
    columns = random_columns(spec, 3, 0)
    columns["is_first"][1, 4], columns["memory_reset"][1, 4] = 0, 1
    columns["terminated"][1, 2:4] = columns["truncated"][1, 2:4] = 0
    header = TrajectoryHeader(run_id="a", actor=0, restart_index=0, sequence=0, policy_version=0)
    with pytest.raises(TrajectoryError, match="slot 1, row 4: the memory is zeroed where no episode begins"):
        from_bytes(spec, to_bytes(spec, header, columns))


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
@pytest.mark.parametrize("mode", ["never", "info:trial", "info:trial, begins"])
def test_a_resumed_worker_goes_on_exactly(mode: str, autoreset: str) -> None:
    """Catches a pending flag, a reset or a memory that a checkpoint forgets, wherever it falls."""

    def make() -> RolloutWorker:
        env = make_env("trial_envs:Trials-v0", SLOTS, 0, tells=MODES[mode], autoreset_mode=autoreset)
        return make_worker(env, mode, burn_in=3)

    worker = make()
    for version in range(6):
        list(unrolls(worker, 1, version))
        state = worker.get_state()
        resumed = make()
        assert resumed.set_state(state) == {}
        [want] = unrolls(worker, 1, version)
        [got] = unrolls(resumed, 1, version)
        for name in want:
            if name == "final_obs":  # written where an episode ended
                ended = want["terminated"] | want["truncated"] > 0
                want[name], got[name] = want[name][ended], got[name][ended]
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        resumed.close()
    worker.close()


def test_a_memory_of_another_mode_begins_anew() -> None:
    """Catches a resumed run whose first episodes go on with a memory that their own mode would have zeroed."""
    for before, now in (("never", "episode"), ("episode", "info:trial")):
        worker = make_worker(make_env("trial_envs:Trials-v0", 2, 0), before)
        list(unrolls(worker, 1))
        state = worker.get_state()
        other = make_worker(make_env("trial_envs:Trials-v0", 2, 0), now)
        why = other.set_state(state)
        assert set(why) == {0, 1}
        assert why[0] == f"its memory was made with actor.reset_memory={before}, now it is {now}"
        [columns] = unrolls(other, 1)
        assert columns["is_first"][:, 0].all()
        assert columns.get("memory_reset", columns["is_first"])[:, 0].all()


def player_of(env: VectorEnvironment) -> PolicyPlayer:
    return PolicyPlayer(make_policy(observation_of(env.spec), actions_of(env.spec)), seed=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync next_step", "sync same_step", "native NEXT_STEP", "parallel"])
def test_evaluation_carries_the_memory_too(kind: str, mode: str) -> None:
    """Catches an evaluation that gives every episode of a trial a fresh memory, or episodes numbered wrongly."""
    env_id, kwargs = ENVIRONMENTS[kind]
    if env_id.startswith("pettingzoo"):
        pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")
    env = make_env(env_id, SLOTS, 0, tells=MODES[mode], **kwargs)
    if mode.startswith("info:"):
        assert isinstance(env, TrialEnvironment)
        env.watch(KEY)
    seen: list[list[Any]] = [[] for _ in range(SLOTS)]
    zeroed: list[list[bool]] = [[] for _ in range(SLOTS)]

    def player(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        for slot in range(SLOTS):
            seen[slot] += places(obs[slot : slot + 1])
            zeroed[slot].append(bool(is_first[slot]))
        return np.zeros(SLOTS, np.int64)

    played = play(env, player, 12 * SLOTS, carries_memory=mode != "episode")
    env.close()
    for slot in range(SLOTS):
        assert zeroed[slot] == zeroed_where(mode.partition(",")[0], seen[slot])
    if mode == "episode":
        assert not played.since_reset.any()
        return
    if kind == "parallel":
        assert played.since_reset.max() > 0
        return
    for slot in range(SLOTS):
        episodes = list(dict.fromkeys(seen[slot]))
        mine = played.since_reset[played.environment == slot]
        trial = [episodes[0][:2] if mode == "never" else one[:2] for one in episodes]
        want = [trial[:index].count(one) for index, one in enumerate(trial)]
        assert mine.tolist() == want[: len(mine)]


def test_a_slot_plays_all_its_episodes_in_a_row() -> None:
    """Catches trials of which only the first two episodes are ever played, and a report that does not say how."""
    env = make_env("trial_envs:Trials-v0", 1, 0)
    setup = WorkerSetup(
        env_id="trial_envs:Trials-v0",
        env_kwargs={},
        num_envs=4,
        unroll_length=8,
        run_id="",
        seed=0,
        observation=observation_of(env.spec),
        actions=actions_of(env.spec),
    )
    side = Side(label="", setup=setup, weights=flatten_weights(setup.make_policy(), 0))
    assert len(blocks(side, 80)) == 10
    assert side.manner == "sampled"
    for mode, manner in (
        ("never", "sampled, memory carried across episodes"),
        ("info:trial", "sampled, memory carried across episodes until info has trial"),
    ):
        carrying = dataclasses.replace(side, setup=dataclasses.replace(setup, reset_memory=mode))
        assert [block.rounds for block in blocks(carrying, 80)] == [20]
        assert carrying.manner == manner
        assert blocks(carrying, 12)[0]().since_reset.max() > 0


@pytest.mark.parametrize("kind", ["sync next_step", "native NEXT_STEP", "native SAME_STEP", "parallel"])
@pytest.mark.parametrize("tells", ["nothing", "ends", "begins"])
def test_a_key_that_never_comes_is_remarked(kind: str, tells: str) -> None:
    """Catches a misspelt key that nobody hears of, or an alarm about one that is there."""
    env_id, kwargs = ENVIRONMENTS[kind]
    if env_id.startswith("pettingzoo"):
        pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")
    env = make_env(env_id, 2, 0, tells=tells, **kwargs)
    worker = make_worker(env, "info:trial")
    told: dict[str, Any] = {}
    for version in range(24):
        payload = worker.rollout(flatten_weights(worker.policy, version))
        for kind_, (count, example) in from_bytes(worker.spec, payload).header.statistics["remarks"].items():
            told.setdefault(kind_, [0, example])[0] += count
    env.close()
    if tells != "nothing":
        assert told == {}
        return
    assert set(told) == {KEY_MISSING}
    assert f"info had no 'trial' at the ends and beginnings of {EPISODES_WITHOUT_KEY} episodes" in told[KEY_MISSING][1]
    assert "actor.reset_memory=info:trial" in told[KEY_MISSING][1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("info:", "info: needs the key of info that tells where the memory is zeroed, as in info:trial_ended"),
        ("info", "info: needs the key"),
        ("info: trial", "write info:KEY without a space"),
        ("epsode", "must be episode, never or info:KEY; did you mean episode?"),
        ("nevr", "did you mean never?"),
        ("inf:trial", "did you mean info:trial?"),
        ("always", "must be episode, never or info:KEY (got 'always')"),
    ],
)
def test_settings_that_mean_nothing_are_refused(value: str, said: str) -> None:
    """Catches a mode that is taken for another, and an error that does not say what to write."""
    _, problems = load_config([], [f"actor.reset_memory={value}"])
    assert len(problems) == 1
    assert problems[0].startswith("actor.reset_memory: ")
    assert said in problems[0]


def test_an_environment_without_infos_is_refused(tmp_path: Any) -> None:
    """Catches a run whose memory would never be zeroed, because there is nothing to look into."""
    config, problems = load_config([], ["env.id=recall", "mode=inline", "metrics.port=-1", "actor.reset_memory=info:x"])
    assert not problems
    [problem] = check(config, tmp_path / "run")
    assert problem.startswith("actor.reset_memory: recall reports no infos, so info:x never comes")
    config, _ = load_config([], ["env.id=recall", "mode=inline", "metrics.port=-1", "actor.reset_memory=never"])
    assert check(config, tmp_path / "run") == []


def test_without_a_choice_trajectories_are_as_before() -> None:
    """Catches a column, or another reset, in runs that do not carry the memory."""
    env = make_env("trial_envs:Trials-v0", 2, 0)
    worker = make_worker(env, "episode")
    assert isinstance(env.spec.actions, DiscreteActions)
    assert "memory_reset" not in worker.spec.columns()
    [columns] = unrolls(worker, 1)
    batch = random_batch(0)
    assert memory_resets(batch) is batch["is_first"]
    assert columns["is_first"][:, 0].all()
    env.close()


@pytest.mark.slow
def test_a_carried_memory_learns_what_one_of_an_episode_cannot() -> None:
    """Catches a memory that is carried while acting and lost in training, or the other way round: two-armed bandits, an
    episode a pull, where the pulls before tell which arm pays in this trial."""
    env = make_env("trial_envs:Bandit-v0", 48, 0)
    assert isinstance(env, TrialEnvironment)
    env.watch("trial_ended")
    rollouts = Rollouts(env, unroll_length=24, reset_memory="info:trial_ended")
    policy = make_policy(rollouts.observation, rollouts.actions)
    settings = {"epochs": 4, "minibatches": 4, "normalize_advantage": True, "entropy_coef": 0.01}
    learner = make_learner(policy, learning_rate=1e-3, **settings)
    for version in range(20):
        batch = rollouts.batch(policy, version)
        earned = float(batch["reward"][batch["terminated"]].mean())
        assert learner.update(batch).log_prob_error <= TOLERANCE
    env.close()
    assert earned > 0.75

    def played(carries_memory: bool, *, zero_memory: bool = False) -> Any:
        env = make_env("trial_envs:Bandit-v0", 48, 1)
        assert isinstance(env, TrialEnvironment)
        env.watch("trial_ended")
        player = PolicyPlayer(policy, seed=0, greedy=True, memory_horizon=0 if zero_memory else None)
        return play(env, player, 12 * 48, carries_memory=carries_memory)

    whole = played(carries_memory=True)
    assert whole.returns[whole.since_reset > 0].mean() > 0.9
    assert 0.35 < whole.returns[whole.since_reset == 0].mean() < 0.65
    # 576 pulls at chance: more than 0.6 is five standard errors away.
    assert played(carries_memory=False).mean < 0.6
    assert played(carries_memory=True, zero_memory=True).mean < 0.6


def test_a_flag_that_is_none_is_none() -> None:
    """Catches a fault at the end of every episode of an environment that reports None while nothing has ended."""
    key = TrialKey("over", "slot 0", Reports())
    assert not key.begin({"over": None})
    key.end({"over": None})
    assert not key.begin({})
    key.end({"over": True})
    assert key.begin({"over": None})
