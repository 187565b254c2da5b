"""A policy as a player; sides in the same environments; what `shoal evaluate` says and refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from service import SMALL, alive, descendants, make_setup, start_shoal, wait_for
from shoal.deploy.cli import main
from shoal.deploy.evaluation.evaluate import PolicyPlayer, Side, blocks, compare, opponent, play_sides
from shoal.deploy.evaluation.memory_horizon import conclusion, horizon_sides
from shoal.deploy.evaluation.table import Played
from shoal.envs.play import Episodes, play
from shoal.envs.registry import make_vector_env
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.weights import flatten_weights


def make_policy() -> FastPolicy:
    torch.manual_seed(0)
    policy = FastPolicy(VectorObservation(5), ["0", "1", "2", "3"])
    with torch.no_grad():
        policy.actor_W.mul_(200)
    return policy


def make_side(env_id: str = "recall", *, num_envs: int = 4, seed: int = 3, **kwargs: Any) -> Side:
    """A policy that was never trained."""
    setup = make_setup(env_id, num_envs=num_envs, seed=seed, **kwargs)
    torch.manual_seed(0)
    return Side(label="own", setup=setup, weights=flatten_weights(setup.make_policy(), 7))


def train(run: Path, *settings: str, steps: int = 300) -> Path:
    arguments = ["mode=inline", *SMALL, f"run_dir={run}", f"total_env_steps={steps}", *settings]
    assert main(["train", *arguments]) == 0
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run")


def test_zeroed_memory_is_no_memory() -> None:
    """Catches a baseline without memory that remembers all the same, and play with memory that forgets."""
    obs, again = np.zeros((8, 5), np.float32), np.zeros(8, bool)
    for zero_memory in (False, True):
        player = PolicyPlayer(make_policy(), seed=0, memory_horizon=0 if zero_memory else None)
        states = []
        for _ in range(3):
            player(obs, again)
            states.append(torch.stack([h for h, _ in player._policy.get_memory().values()]))
        assert torch.equal(states[0], states[2]) == zero_memory


@pytest.mark.parametrize("horizon", [1, 2, 5, 30])
def test_a_memory_of_k_steps_is_that_of_k_steps(horizon: int) -> None:
    """Catches a window of one step more or less, that reaches into the episode before, or of another slot."""
    rng = np.random.default_rng(0)
    policy = make_policy()
    player = PolicyPlayer(policy, seed=0, memory_horizon=horizon)
    obs = torch.from_numpy(rng.standard_normal((20, 3, 5)).astype(np.float32))
    is_first = torch.from_numpy(rng.random((20, 3)) < 0.15)
    is_first[0] = True
    with torch.inference_mode():
        for t in range(20):
            found = player._logits(obs[t], is_first[t])
            for slot in range(3):
                begin = t
                while not is_first[begin, slot] and t - begin < horizon:
                    begin -= 1
                state = None
                for now in range(begin, t + 1):
                    never = torch.zeros(1, dtype=torch.bool)
                    output, state = policy.step(obs[now, slot : slot + 1], never, state)
                assert torch.allclose(found[slot], output.logits[0], atol=1e-5), (t, slot)


def test_memory_horizons_are_compared_and_recorded(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches horizons on other episodes, or with the whole memory, and a record that no report finds."""
    capsys.readouterr()
    arguments = ["evaluate", str(trained), "--episodes", "32", "--vs", "random"]
    assert main([*arguments, "--json", "--memory-horizon", "64", "0"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [versus["versus"] for versus in found["versus"]] == ["random", "no step", "the last 64 steps"]
    assert all(versus["paired"] for versus in found["versus"])
    # Episodes are shorter than that.
    assert found["versus"][2]["difference"] == pytest.approx(0, abs=0.1)
    record = found["memory_horizon"]
    assert [level["steps"] for level in record["horizons"]] == [0, 64]
    assert record["horizons"][0]["mean_return"] == found["versus"][1]["mean_return"]
    assert record["whole"] == {"mean_return": found["mean_return"], "return_ci95": found["return_ci95"]}
    assert json.loads((trained / "memory_horizon.json").read_text()) == record
    assert main([*arguments, "--memory-horizon"]) == 0
    said = capsys.readouterr().out
    assert all(f"the last {steps} steps" in said for steps in (2, 4, 8, 16, 32, 64))
    assert "memory: " in said
    assert main(["report", str(trained)]) == 0
    assert "What the memory is used for" in (trained / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        ((9, 9, 9), "without it the return is the same"),
        ((1, 9, 9), "the last 4 steps are enough"),
        ((1, 5, 9), "the last 8 steps are enough"),
        # A horizon that happens to do well does not hide a longer one that does not.
        ((9, 5, 9), "the last 8 steps are enough"),
        ((1, 2, 3), "more than the last 8 steps are remembered"),
    ],
)
def test_what_memory_is_for_in_a_sentence(returns: tuple[int, ...], words: str) -> None:
    """Catches a conclusion that the table does not bear out."""
    whole = make_side()
    noise = np.random.default_rng(0).standard_normal(40)

    def played(side: Any, mean: int) -> Played:
        zeros = np.zeros(40, np.int64)
        number = np.arange(40)
        flags = np.zeros(40, bool)
        episodes = Episodes(
            number, zeros, zeros, mean + 0.1 * noise, zeros + 1, flags, number.astype(np.uint32), zeros, flags, {}
        )
        return Played(side, episodes)

    cut = [played(side, mean) for side, mean in zip(horizon_sides(whole, (4, 0, 8)), returns, strict=True)]
    assert words in conclusion(played(whole, 9), cut)
    none, one = horizon_sides(whole, (0, 1))
    assert conclusion(played(whole, 9), [played(none, 1)]) == "memory: without it the return is lower"
    assert "the last step is enough" in conclusion(played(whole, 9), [played(none, 1), played(one, 9)])


def test_memory_is_reset_between_episodes() -> None:
    """Catches evaluation that carries one episode's state into the next."""
    obs = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    player = PolicyPlayer(make_policy(), seed=0)
    player(obs, np.ones(4, bool))
    first = player._policy.get_memory()
    player(obs, np.zeros(4, bool))
    player(obs, np.array([True, False, True, False]))
    now = player._policy.get_memory()
    assert [bool(torch.allclose(now[i][0], first[i][0], atol=1e-6)) for i in range(4)] == [True, False, True, False]


def test_greedy_play_does_not_sample() -> None:
    """Catches greedy play that samples, and sampled play that does not."""
    obs, first = np.zeros((400, 5), np.float32), np.ones(400, bool)
    assert len(set(PolicyPlayer(make_policy(), seed=0, greedy=True)(obs, first).tolist())) == 1
    assert len(set(PolicyPlayer(make_policy(), seed=0)(obs, first).tolist())) > 1


def test_play_counts_whole_episodes_of_every_slot_alike() -> None:
    """Catches short episodes that weigh more because they end first."""
    env = make_vector_env("recall", 16, 0, min_delay=1, max_delay=20)
    returns = play(env, lambda obs, is_first: np.zeros(16, np.int64), 64)
    assert returns.episodes == 64
    assert set(np.bincount(returns.environment)) == {4}
    assert 1 <= returns.mean_length - 2 <= 20
    assert play(env, lambda obs, is_first: np.zeros(16, np.int64), 10**6, max_env_steps=16).episodes == 0


def same(a: Episodes, b: Episodes) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Episodes.__dataclass_fields__)


def test_numbers_do_not_depend_on_the_number_of_processes() -> None:
    """Catches random streams that belong to a process, and results in the order in which processes finish."""
    side = make_side()
    assert [block.rounds for block in blocks(side, 50)] == [2] * 6 + [1]
    alone = play_sides([side, opponent("random", side)], 50, 1)
    assert [played.episodes for played in alone] == [52, 52]
    assert not same(*alone)
    for processes in (2, None):
        again = play_sides([side, opponent("random", side)], 50, processes)
        assert all(same(a, b) for a, b in zip(alone, again, strict=True))
    # Blocks have environments and actions of their own.
    whole = alone[0]
    starts = whole.starts().reshape(-1)
    assert len({tuple(starts[k : k + 8]) for k in range(0, 48, 8)}) == 6


def test_first_episodes_are_whole_ones_in_an_evaluation() -> None:
    """Catches staggered first episodes, which are played for nothing."""
    side = make_side("synthetic", episode_length=16, num_tokens=20, used_tokens=5)
    played = play_sides([side], 8, 1)[0]
    assert played.lengths.tolist() == [16] * 8
    assert not played.terminated.any()
    for env_id, slots in (("synthetic", 4), ("mettagrid/forage", 16)):
        if env_id != "synthetic":
            pytest.importorskip("mettagrid")
        for whole in (False, True):
            env = make_vector_env(env_id, slots, 0, None, whole)
            env.reset(np.empty((slots, *env.spec.obs_shape), env.spec.obs_dtype))
            assert env.short_episode.any() != whole
            env.close()


def test_both_sides_are_set_the_same_tasks() -> None:
    """Catches sides with seeds of their own, and later episodes that begin differently because of what was done."""
    side = make_side("evaluated_envs:Wandering-v0")
    own, random = play_sides([side, opponent("random", side)], 24, 1)
    assert own.starts().tolist() == random.starts().tolist()
    assert len(set(own.starts().tolist())) == 24
    found = compare(own, random)
    assert found.paired
    # What they share, the place, spreads much more than what actions earn.
    assert found.half_width < 0.05 < own.standard_error
    again = compare(own, play_sides([side], 24, 1)[0])
    assert (again.mean, again.half_width) == (0.0, 0.0)
    assert not again.is_beyond_noise
    elsewhere = compare(own, play_sides([make_side("evaluated_envs:Wandering-v0", seed=4)], 24, 1)[0])
    assert not elsewhere.paired


def test_other_ways_to_play_are_sides() -> None:
    """Catches a word that changes nothing, and a comparison of a side with itself."""
    side = make_side()
    assert opponent("greedy", side).greedy
    assert opponent("zero-memory", side).memory_horizon == 0
    assert opponent("random", side).weights is None
    assert not opponent("sampled", opponent("greedy", side)).greedy
    with pytest.raises(ValueError, match="--vs sampled: own is played in that way already"):
        opponent("sampled", side)


def test_evaluate_compares(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a side that is missing from the table, numbers that differ between table and JSON, and a bottleneck that
    does not follow from the interval.
    """
    other = train(tmp_path / "other", "seed=5")
    arguments = ["evaluate", str(trained), "--episodes", "64", "--vs", str(other), "--vs", "random"]
    capsys.readouterr()
    assert main([*arguments, "--vs", "zero-memory", "--vs", "greedy", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    keys = {"checkpoint", "policy_version", "env_id", "episodes", "mean_return", "standard_error", "mean_length"}
    assert keys | {"training_mean_return", "return_ci95", "terminated", "seed"} <= found.keys()
    assert (found["terminated"], found["min_return"], found["max_return"]) == (1.0, 0.0, 1.0)
    assert found["return_ci95"] == pytest.approx(1.998 * found["standard_error"], rel=1e-3)
    assert 6 <= found["min_length"] <= found["mean_length"] <= found["max_length"] <= 10
    by_name = {versus["versus"]: versus for versus in found["versus"]}
    assert list(by_name) == [str(other), "random", "zero-memory", "greedy"]
    for versus in by_name.values():
        assert versus["paired"]
        assert versus["mean_length"] == found["mean_length"]
        assert versus["difference"] == pytest.approx(found["mean_return"] - versus["mean_return"])
        assert versus["beyond_noise"] == (abs(versus["difference"]) > versus["difference_ci95"])
    assert by_name["random"]["checkpoint"] is None
    assert by_name[str(other)]["checkpoint"].startswith(str(other))
    assert by_name["zero-memory"]["checkpoint"] == found["checkpoint"]
    assert main([*arguments, "--processes", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{found['mean_return']:.3f}" in said
    random = by_name["random"]
    assert f"{random['difference']:+.3f}" in said
    assert ("beyond noise" if random["beyond_noise"] else "within noise") in said
    low, high = (random["difference"] + sign * random["difference_ci95"] for sign in (-1, 1))
    assert f"{low:+.3f} .. {high:+.3f}" in said


def test_a_difference_beyond_noise_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bottleneck with the wrong sign: greedy play in this environment earns all that there is."""
    run = train(tmp_path / "run", "env.id=evaluated_envs:Fragile-v0")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", "--episodes", "64", "--vs", "greedy"]) == 0
    found = json.loads(capsys.readouterr().out)
    versus = found["versus"][0]
    # Greedy takes one action always: a return of 0 or 4 in every episode.
    assert versus["min_return"] == versus["max_return"] in (0.0, 4.0)
    assert versus["beyond_noise"]
    assert main(["evaluate", str(run), "--episodes", "64", "--vs", "greedy"]) == 0
    word = "better" if found["mean_return"] > versus["mean_return"] else "worse"
    assert f"{word}, beyond noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--processes", "0"], "--processes: 0 must be at least 1"),
        (["--recordings", "0"], "--recordings: 0 must be at least 1"),
        (["--seed", "-1"], "--seed: -1 must not be negative"),
        (["--memory-horizon", "-2"], "--memory-horizon: -2 steps must not be negative"),
        (["--memory-horizon", "3", "--zero-memory"], "compares with the whole memory: leave out --zero-memory"),
        (["--vs", "nowhere"], "--vs nowhere: no checkpoint in HERE/nowhere: there is nothing of that name"),
        (["--vs", "nowhere"], "random, greedy, sampled and zero-memory"),
        (["--vs", "sampled"], "--vs sampled: RUN is played in that way already"),
        (["--vs", "OTHER"], "--vs OTHER: "),
        (["--video", "films"], "--video: recall has nothing to show"),
        (["--replay", "films"], "--replay: recall writes no replays"),
        (["--env-kwargs", "delay=-1"], "recall: min_delay=-1"),
        (["--env", "evaluated_envs:NoSuch-v0"], "NoSuch-v0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_played(
    options: list[str],
    expected: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a comparison with nothing, a film of nothing, a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoal.deploy.evaluation.evaluate.play", lambda *_, **__: pytest.fail("something was played"))
    if "OTHER" in options:
        # Another environment with other actions.
        train(Path("OTHER"), "env.id=evaluated_envs:Wandering-v0")
    capsys.readouterr()
    before = set(tmp_path.iterdir())
    assert main(["evaluate", str(trained), *options]) == 2
    said = capsys.readouterr().err
    assert expected.replace("RUN", str(trained)).replace("HERE", str(tmp_path)) in said
    assert "nothing was started" in said
    assert "Traceback" not in said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("trained_policies", [1, 2])
def test_another_number_of_agents_takes_slots_that_fit(
    trained_policies: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an option that is blamed and was not given: 9 slots of training make no games of four agents."""
    pytest.importorskip("pettingzoo")
    teams = ("policies.first.agents=[agent_0]", "policies.others.agents=['agent_[!0]']")
    settings = ("env.id=pettingzoo:scripted_games:parallel_env", "env.num_envs=9", "learner.batch_size=auto")
    run = train(tmp_path / "run", *settings, "learner.minibatches=1", *(teams[: trained_policies * 2 - 2]))
    capsys.readouterr()
    four = ["evaluate", str(run), "--episodes", "4", "--env-kwargs", "num_agents=4"]
    assert main([*four, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main([*four, "--num-envs", "9"]) == 2
    assert "--num-envs: 9 slots must be a multiple of the 4 agents of" in (said := capsys.readouterr().err)
    assert "use 8 or 12" in said


def test_all_that_is_wrong_is_said_at_once(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a first problem that hides the others."""
    options = ["--vs", "nowhere", "--vs", "sampled", "--video", "films", "--replay", "films"]
    assert main(["evaluate", str(trained), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("shoal: 4 problems")


def test_a_run_that_never_saved_is_told_from_no_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one message for a typing error and for a run that has not come to its first checkpoint."""
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "the run has saved none yet" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "typo")]) == 2
    assert "there is nothing of that name" in capsys.readouterr().err


def test_an_environment_that_cannot_be_made_any_more_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where other people's code raises what it likes."""
    run = train(tmp_path / "run", "env.id=evaluated_envs:Wandering-v0")
    capsys.readouterr()
    monkeypatch.setattr("evaluated_envs.Wandering.mood", RuntimeError("not today"))
    assert main(["evaluate", str(run)]) == 2
    assert "evaluated_envs:Wandering-v0 cannot be made: RuntimeError: not today" in capsys.readouterr().err


def test_an_environment_that_breaks_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or exit code 0, where the environment fails again and again."""
    run = train(tmp_path / "run", "env.id=evaluated_envs:Fragile-v0")
    broken = ["--env", "evaluated_envs:Fragile-v0", "--env-kwargs", "how=raises", "--env-kwargs", "everywhere=true"]
    for processes in ("1", "2"):
        capsys.readouterr()
        assert main(["evaluate", str(run), *broken, "--processes", processes]) == 1
        said = capsys.readouterr().err
        assert said.startswith("shoal: the evaluation failed: ")
        assert "only when evaluated" in said
        assert len(said.splitlines()) == 1


def test_recordings_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches films that nobody finds, and more or fewer of them than were asked for."""
    pytest.importorskip("imageio_ffmpeg")
    run = train(tmp_path / "run", "env.id=evaluated_envs:Painted-v0")
    options = ["--episodes", "8", "--video", str(tmp_path / "films"), "--recordings", "2"]
    capsys.readouterr()
    assert main(["evaluate", str(run), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recordings"]
    assert [(one["return"], one["length"]) for one in found] == [(3.0, 3.0), (4.0, 4.0)]
    assert sorted(one["file"] for one in found) == sorted(map(str, (tmp_path / "films").iterdir()))
    assert main(["evaluate", str(run), *options]) == 0
    assert f"{found[1]['file']}  return 4.000, 4 steps" in capsys.readouterr().out


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    """Catches players that go on after the command was interrupted, and tracebacks of theirs."""
    run = train(tmp_path / "run", "env.id=service_envs:Scripted-v0")
    slow = ["--env", "service_envs:Scripted-v0", "--env-kwargs", "seconds=0.05"]
    process = start_shoal("evaluate", run, *slow, "--processes", 2, "--episodes", 1000, cwd=tmp_path)
    below: dict[int, str] = {}

    def two_play() -> bool:
        below.update(descendants(process.pid))
        return sum("spawn_main" in title for title in below.values()) >= 2

    wait_for(two_play, process=process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    wait_for(lambda: not any(map(alive, below)), seconds=200)
