"""Masks of legal actions: of every source, in every vectorization, in acting, training, evaluation, the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from echo_envs import CASES, HOWS, PART, SLOTS, Case, EchoVector, echo, even, mask, two_masks
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from scripted_vectors import MODES, Rows
from service import make_setup
from shoal.deploy.evaluation.evaluate import PolicyPlayer
from shoal.envs.boundary import EnvironmentFault, MaskedEnvironment, VectorSpace
from shoal.envs.config import AdapterOptions
from shoal.envs.masks import NOT_USED, MaskSource
from shoal.envs.native import NativeEnvironment
from shoal.envs.play import play
from shoal.envs.reading import reading
from shoal.envs.reference import random_player
from shoal.envs.registry import make_vector_env
from shoal.envs.writers import Malformed
from shoal.learner.batch import BatchAssembler
from shoal.learner.config import LearnerConfig
from shoal.learner.device_choice import make_device_path
from shoal.learner.forward_pass import forward_pass, log_prob_error
from shoal.policy.actions import Discrete, legal
from shoal.policy.trajectory import TrajectoryError, TrajectoryHeader, from_bytes, to_bytes
from shoal.policy.weights import flatten_weights

TWO = ("masks of two choices", "masks in a list", "masks in a tuple of obs")
SINGLE = ("mask in info", "mask in obs", "mask in obs, truncated", "mask beside others")


def expected(case: str, t: int) -> list[int]:
    if case in TWO:
        return np.concatenate(two_masks(t)).tolist()
    if case == "no choice":
        return mask(t).tolist() if t % 2 else [1] * 5
    return mask(t).tolist()


def skip_without(how: str, case: str = "") -> None:
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    if how == "native" and case in TWO:
        pytest.skip("gymnasium's vectors have no form for it")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", [*SINGLE, *TWO, "no choice"])
def test_masks_are_those_of_the_observations(case: str, how: str) -> None:
    """Catches the mask of the step before, of another slot, of the episode that ended, and a mask read as numbers."""
    skip_without(how, case)
    env = echo(how, case)
    space = env.spec.observation
    assert isinstance(space, VectorSpace)
    assert space.size == (4 if "beside" in case else 2)
    assert env.spec.num_mask == 5
    assert "mask tells the legal ones" in reading(env.spec)[1]
    assert isinstance(env, MaskedEnvironment)
    kept = env.action_mask
    rows = Rows(env).rows
    env.reset(rows.obs)
    choose = random_player(env.spec, np.random.default_rng(0))
    seen = []
    for _ in range(12):
        assert env.action_mask is kept
        t = int(rows.obs[0, 0])
        seen.append(t)
        # The final observation of an episode asks for no action.
        assert kept.tolist() == [expected(case, t)] * SLOTS
        env.step(choose(rows.obs, rows.is_first, kept), rows)
        assert env.faults == []
    assert seen == [0, 1, 2, 3, 4] * 2 + [0, 1]
    env.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("case", SINGLE[:2])
def test_masks_in_every_mode(case: str, how: str, mode: str) -> None:
    """Catches the final observation's mask beside the next episode's first observation."""
    env = echo(how, case, autoreset_mode=mode)
    assert isinstance(env, MaskedEnvironment)
    rows = Rows(env).rows
    env.reset(rows.obs)
    choose = random_player(env.spec, np.random.default_rng(0))
    for _ in range(12):
        t = int(rows.obs[0, 0])
        assert env.action_mask.tolist() == [mask(t).tolist()] * SLOTS
        env.step(choose(rows.obs, rows.is_first, env.action_mask), rows)
    assert env.faults == []
    env.close()


@pytest.mark.parametrize("how", ["sync", "async"])
def test_masks_of_a_method_are_used(how: str) -> None:
    """Catches sb3-contrib's ``action_masks()`` passed over without a word, and an info that is lost for it."""
    env = make_vector_env("echo_envs:Methodical", SLOTS, 0, AdapterOptions(vectorization=how))  # type: ignore[arg-type]
    assert isinstance(env, MaskedEnvironment)
    assert env.spec.num_mask == 5
    rows = Rows(env).rows
    env.reset(rows.obs)
    choose = random_player(env.spec, np.random.default_rng(0))
    for _ in range(8):
        assert env.action_mask.tolist() == [mask(int(rows.obs[0, 0])).tolist()] * SLOTS
        env.step(choose(rows.obs, rows.is_first, env.action_mask), rows)
    assert env.faults == []
    assert [numbers for _, numbers in env.reports.take().episodes] == [{"score": 4.0}] * SLOTS  # type: ignore[attr-defined]
    env.close()


BITS = spaces.Box(0, 1, (5,), np.int8)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Dict(observation=PART, action_mask=spaces.Box(0, 1, (4,), np.int8)), "expected 5 numbers 0 or 1"),
        (spaces.Dict(observation=PART, action_mask=spaces.Box(0, 1, (2, 3), np.int8)), "expected 5 numbers 0 or 1"),
        (spaces.Dict(observation=PART, action_mask=spaces.Tuple((BITS, spaces.Text(3)))), "expected 5 numbers 0 or 1"),
        (spaces.Dict(agent=spaces.Dict(observation=PART, action_mask=BITS)), "is too deep"),
        (spaces.Tuple((PART, spaces.Dict(action_mask=BITS))), "is too deep"),
    ],
    ids=["short", "padded", "text", "nested", "in a tuple"],
)
def test_masks_that_do_not_fit_the_actions_are_refused(space: spaces.Space[Any], said: str) -> None:
    """Catches a mask that was read as five numbers more, while illegal actions were taken."""
    CASES["misfit"] = Case(even, space, action=spaces.MultiDiscrete([3, 2]))
    with pytest.raises(ValueError, match=rf"Echo-v0: obs.*action_mask.*{said}.*give it another name"):
        echo("sync", "misfit")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("case", "why"),
    [("a mask in steps", "the first reset's info had none"), ("a mask of bits", "only Discrete and MultiDiscrete")],
)
def test_masks_that_are_not_used_are_remarked(case: str, why: str, how: str) -> None:
    """Catches an environment whose masks do nothing, without a word."""
    skip_without(how)
    env = echo(how, case)
    rows = Rows(env).rows
    env.reset(rows.obs)
    for _ in range(3):
        env.step(np.zeros((SLOTS, *env.spec.action_shape), np.int64), rows)
    told = env.reports.take()  # type: ignore[attr-defined]
    assert 1 <= told.counts[NOT_USED] <= SLOTS
    assert why in told.examples[NOT_USED]
    env.close()


@pytest.mark.parametrize("told", ["all", "some"])
@pytest.mark.parametrize("form", ["one", "two", "objects"])
def test_a_batch_of_masks_is_that_of_each(form: str, told: str) -> None:
    """Catches a slot that gets another's mask, a choice of another slot that is opened, and a mask nobody told."""
    rng = np.random.default_rng(0)
    source = MaskSource("info", (3, 2))
    masks: Any = rng.integers(0, 2, (6, 5)).astype(np.int8)
    masks[2], masks[4, :3] = 0, 0
    flags = None if told == "all" else np.array([True, False, True, False, True, True])
    expected = np.empty((6, 5), np.uint8)
    for slot, row in enumerate(expected):
        source.write(None if flags is not None and not flags[slot] else masks[slot], row)
    rows = np.empty_like(expected)
    if form == "two":
        masks = (masks[:, :3], masks[:, 3:])
    elif form == "objects":
        masks = np.array([*masks, None], dtype=object)[:6]
    source.write_batch(masks, flags, rows)
    assert rows.tolist() == expected.tolist()
    source.write_batch(None, flags, rows)
    assert (rows == 1).all()


@pytest.mark.parametrize(
    ("wrong", "slot"), [(np.full((3, 5), 2), 0), (np.ones((3, 4)), 0), (np.ones((2, 5)), None), (1, None)], ids=str
)
def test_a_wrong_batch_of_masks_is_refused(wrong: Any, slot: int | None) -> None:
    """Catches masks of another size that are taken as far as they go."""
    with pytest.raises(Malformed, match=r"action_mask .* must") as raised:
        MaskSource("info", (3, 2)).write_batch(wrong, None, np.empty((3, 5), np.uint8))
    assert raised.value.slot == slot


def test_a_reset_of_some_slots_leaves_the_masks_of_the_others() -> None:
    """Catches a vector that is reset by a mask (autoreset DISABLED), whose other slots may do everything after it."""

    class Resets(EchoVector):
        metadata = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012  (as gymnasium has it)

        def __init__(self, num_envs: int, case: str) -> None:
            super().__init__(num_envs, case)
            self.envs[1].case = dataclasses.replace(CASES[case], terminated=lambda t: t == 3)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            which = (options or {}).pop("reset_mask", np.ones(self.num_envs, bool))
            infos: dict[str, Any] = {}
            for slot in np.flatnonzero(which):
                infos = self._add_info(infos, self.envs[slot].reset()[1], slot)
            self.ended = [False] * self.num_envs
            return self._stack([env.case.obs(env.t) for env in self.envs]), infos

    gymnasium.register("Resets-v0", Resets, vector_entry_point=Resets)
    env = NativeEnvironment("Resets-v0", 2, 0, case="mask in info")
    rows = Rows(env).rows
    env.reset(rows.obs)
    choose = random_player(env.spec, np.random.default_rng(0))
    for _ in range(9):
        assert env.action_mask.tolist() == [mask(int(t)).tolist() for t in rows.obs[:, 0]]
        env.step(choose(rows.obs, rows.is_first, env.action_mask), rows)
    env.close()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["mask in info", "mask in obs"])
def test_only_legal_actions_are_taken_and_trained(case: str, how: str) -> None:
    """Catches illegal actions in rollouts, log-probabilities of the learner over all actions, an entropy of NaN, and
    gradients to what is not legal. ``EchoEnv`` raises for an illegal action, which would be a fault.
    """
    skip_without(how)
    env_id = "pettingzoo:echo_envs:parallel_env" if how == "pettingzoo" else "echo_envs:Echo-v0"
    options = {} if how == "pettingzoo" else {"vectorization": how}
    setup = make_setup(env_id, num_envs=2, unroll_length=9, case=case, **options)
    worker = setup.make_worker(0, 0)
    torch.manual_seed(0)
    policy = setup.make_policy()
    trajectories = [from_bytes(worker.spec, worker.rollout(flatten_weights(policy, 0))) for _ in range(2)]
    worker.close()
    for trajectory in trajectories:
        columns = trajectory.columns
        assert trajectory.header.statistics["faults"] == []
        assert columns["action_mask"].shape == (2, 10, 5)
        assert (columns["action_mask"].sum(-1) == 2).all()
        assert np.take_along_axis(columns["action_mask"][:, :-1], columns["action"][..., None], -1).all()
    np.testing.assert_array_equal(
        trajectories[0].columns["action_mask"][:, -1], trajectories[1].columns["action_mask"][:, 0]
    )
    batch = BatchAssembler(worker.spec, 4).assemble(trajectories)
    path = make_device_path(LearnerConfig(device="cpu", precision="float32"))
    found = forward_pass(policy, batch, path)
    assert log_prob_error(found.log_prob, batch) < 1e-5
    assert found.entropy.isfinite().all()
    assert (found.entropy <= np.log(2) + 1e-6).all()
    assert found.entropy.max() > 0.1
    # All of the policy's gradient goes through legal actions.
    (found.log_prob.sum() + found.entropy.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())
    without = forward_pass(policy, batch.exclude("action_mask"), path)
    assert log_prob_error(without.log_prob, batch) > 1e-2


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("how", ["sync", "native", "pettingzoo"])
def test_evaluation_takes_legal_actions_only(how: str, greedy: bool) -> None:
    """Catches an evaluation that loses episodes to actions that training never takes."""
    skip_without(how)
    env = echo(how, "mask in obs")
    torch.manual_seed(1)
    policy = make_setup("echo_envs:Echo-v0", case="mask in obs").make_policy()
    played = play(env, PolicyPlayer(policy, seed=0, greedy=greedy), 6)
    assert env.faults == []
    assert played.lengths.tolist() == [4] * 6
    random = play(env, random_player(env.spec, np.random.default_rng(0)), 6)
    assert env.faults == []
    assert random.lengths.tolist() == [4] * 6
    env.close()


def test_gymnasiums_taxi_has_a_mask() -> None:
    """Catches what only the tests' own environment has: Taxi says in ``info`` which ways are open."""
    setup = make_setup(
        max(name for name in gymnasium.registry if name.startswith("Taxi-v")), num_envs=4, unroll_length=20
    )
    worker = setup.make_worker(0, 0)
    trajectory = from_bytes(worker.spec, worker.rollout(flatten_weights(setup.make_policy(), 0)))
    worker.close()
    legal_ones = trajectory.columns["action_mask"]
    assert legal_ones.shape == (4, 21, 6)
    assert 0 < legal_ones.mean() < 1
    # Each action pays -1; -10 is for illegal pickups, which the mask rules out.
    assert trajectory.columns["reward"].min() == -1


def test_environments_without_masks_ship_none() -> None:
    """Catches a column of ones for everybody."""
    setup = make_setup("CartPole-v1", num_envs=2, unroll_length=3)
    worker = setup.make_worker(0, 0)
    assert "action_mask" not in worker.spec.columns()
    worker.close()


@pytest.mark.parametrize("how", ["sync", "pettingzoo", "native"])
@pytest.mark.parametrize(
    "wrong", [np.ones(4), np.full(5, 2), np.array(["a"] * 5), np.full(5, np.nan)], ids=["short", "two", "words", "nan"]
)
def test_masks_that_are_none_are_faults(wrong: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mask for other actions."""
    skip_without(how)
    info = {0: {"action_mask": np.ones(5)}}
    case = Case(
        even, CASES["mask in info"].space, info=lambda t: info.get(t, {"action_mask": wrong}), action=spaces.Discrete(5)
    )
    monkeypatch.setitem(CASES, "wrong", case)
    env = echo(how, "wrong")
    rows = Rows(env).rows
    env.reset(rows.obs)
    if how == "native":
        with pytest.raises(EnvironmentFault, match=r"action_mask .* must be 5 numbers 0 or 1"):
            env.step(np.zeros(SLOTS, np.int64), rows)
    else:
        env.step(np.zeros(SLOTS, np.int64), rows)
        assert "must be 5 numbers 0 or 1" in env.faults[0]
    env.close()


def test_illegal_actions_are_refused_on_arrival() -> None:
    """Catches a forged trajectory whose action has no log-probability."""
    setup = make_setup("echo_envs:Echo-v0", num_envs=2, unroll_length=4, case="mask in info")
    worker = setup.make_worker(0, 0)
    found = from_bytes(worker.spec, worker.rollout(flatten_weights(setup.make_policy(), 0)))
    worker.close()
    header = TrajectoryHeader(run_id="r", actor=0, restart_index=0, sequence=0, policy_version=0)
    columns = {name: column.copy() for name, column in found.columns.items()}
    from_bytes(worker.spec, to_bytes(worker.spec, header, columns))
    illegal = np.argmin(columns["action_mask"][1, 2])
    for name, value in (("action", illegal), ("action_mask", 2)):
        forged = {key: column.copy() for key, column in columns.items()}
        forged[name][1, 2] = value
        with pytest.raises(TrajectoryError, match=r"legal actions|must hold 0 or 1"):
            from_bytes(worker.spec, to_bytes(worker.spec, header, forged))
    with pytest.raises(TrajectoryError, match="expected columns"):
        from_bytes(dataclasses.replace(worker.spec, num_mask=0), to_bytes(worker.spec, header, columns))


def test_sampling_never_leaves_the_mask() -> None:
    """Catches the last action taken where rounding leaves the sum of probabilities below the uniform number."""
    actions = Discrete((tuple("abcdefghijklmnopqr"), ("x", "y", "z")), scalar=False)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((20_000, 21), generator=generator) * 4
    allowed = torch.rand((20_000, 21), generator=generator) < 0.3
    allowed[:, [0, 18]] = True
    allowed[:, [17, 20]] = False
    highest = torch.ones((20_000, 2))
    for uniform in (highest, 1 - torch.rand((20_000, 2), generator=generator), torch.full((20_000, 2), 1e-30)):
        action, log_prob = actions.sample(legal(logits, allowed), uniform)
        assert allowed.gather(1, action + torch.tensor([0, 18])).all()
        again, entropy = actions.evaluate(legal(logits, allowed), action)
        assert torch.equal(log_prob, again)
        assert log_prob.isfinite().all()
        assert entropy.isfinite().all()
    picked = actions.mode(legal(logits, allowed))
    assert allowed.gather(1, picked + torch.tensor([0, 18])).all()


def test_masked_probabilities_are_those_of_the_legal_actions_alone() -> None:
    """Catches a mask that leaves probability on what is not legal, and an entropy over all actions."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    few = Discrete((("a", "b"),))
    log_prob, entropy = Discrete((("a", "b", "c", "d"),)).evaluate(
        legal(logits, torch.tensor([[True, False, True, False]])), torch.tensor([2])
    )
    expected_log_prob, expected_entropy = few.evaluate(logits[:, [0, 2]].detach(), torch.tensor([1]))
    torch.testing.assert_close(log_prob.detach(), expected_log_prob)
    torch.testing.assert_close(entropy.detach(), expected_entropy)
    (log_prob + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, [1, 3]].tolist() == [0, 0]
    assert logits.grad[0, [0, 2]].abs().min() > 0
