"""PettingZoo's parallel environments: agents that end together or apart, join late, and break their game."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_env import make_env
from scripted_envs import Episode, choose, play_script
from scripted_games import ScriptedGame
from scripted_vectors import Rows
from shoal.deploy.cli import main
from shoal.envs.boundary import DiscreteActions, EnvironmentFault, VectorEnvironment, VectorSpace
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.registry import make_env_spec, make_vector_env

ID = "pettingzoo:scripted_games:parallel_env"


def make(num_envs: int, **kwargs: Any) -> VectorEnvironment:
    ScriptedGame.instances.clear()
    return make_env(ID, num_envs, 0, **kwargs)


class Log:
    """Every row of a run: [T, B] and [T, B, 3], and what the contract says they mean."""

    def __init__(self, env: VectorEnvironment, steps: int) -> None:
        rows = Rows(env).rows
        assert rows.final_obs is None
        env.reset(rows.obs)
        rows.is_first[:] = True
        self.first = rows.obs.copy()
        kept: list[list[np.ndarray]] = []
        for _ in range(steps):
            action = np.array([choose(slot, rows.obs[slot]) for slot in range(env.num_envs)])
            env.step(action, rows)
            kept.append([part.copy() for part in rows[:5]])
        self.obs, self.is_first, self.reward, self.terminated, self.truncated = (
            np.stack(parts) for parts in zip(*kept, strict=True)
        )
        self.ended = self.terminated | self.truncated

    def episodes(self, slot: int) -> list[Episode]:
        """Finished episodes of a slot; is_first opens one anew, whatever was before."""
        found: list[Episode] = []
        states, rewards = [tuple(self.first[slot].tolist())], []
        for t in range(len(self.obs)):
            state = tuple(self.obs[t, slot].tolist())
            if self.is_first[t, slot]:
                assert self.reward[t, slot] == 0
                assert not self.ended[t, slot]
                states, rewards = [state], []
                continue
            states.append(state)
            rewards.append(float(self.reward[t, slot]))
            if self.ended[t, slot]:
                flags = bool(self.terminated[t, slot]), bool(self.truncated[t, slot])
                found.append(Episode(states, rewards, *flags))
        return found


@pytest.mark.parametrize(("salt", "how"), [*((salt, "") for salt in range(4)), (1, "lists the ended")])
def test_agents_that_end_apart_have_the_episodes_of_their_scripts(salt: int, how: str) -> None:
    """Catches a game reset when the first agent ends, a step too late, or never; steps counted for agents that are out
    of it; a final observation overwritten while the others play on; an agent revived because it is still listed.
    """
    env = make(6, salt=salt, how=how)
    log = Log(env, 150)
    env.close()
    assert env.faults == []
    waited = 0
    for slot in range(6):
        found = log.episodes(slot)
        assert len(found) > 5
        assert found == play_script(slot, salt, len(found))
    for game in (slice(0, 3), slice(3, 6)):
        playing, over = np.ones(3, bool), False
        for t in range(150):
            if over:
                assert log.is_first[t, game].all(), "reset in the step after the last agent's end"
                playing, over = np.ones(3, bool), False
                continue
            np.testing.assert_array_equal(log.is_first[t, game], ~playing)
            assert not log.obs[t, game][~playing].any()
            waited += int((~playing).sum())
            playing = playing & ~log.ended[t, game]
            over = not playing.any()
    assert waited > 20, "the script is too tame to tell"


def test_only_agents_in_the_game_are_asked_to_act() -> None:
    """Catches actions for agents that have ended, which PettingZoo forbids, and a game stepped instead of reset."""
    env = make(3, salt=1)
    log = Log(env, 60)
    env.close()
    (game,) = ScriptedGame.instances
    asked = [len(agents) for agents in game.asked]
    assert asked == [count for count in (~log.is_first).sum(1).tolist() if count]
    assert set(asked) == {1, 2, 3}


def test_agents_that_end_together() -> None:
    """Catches a game that waits a step more than it need, or one less."""
    env = make(6, together=True, salt=3)
    log = Log(env, 80)
    env.close()
    for game in (slice(0, 3), slice(3, 6)):
        ended = log.ended[:, game]
        assert (ended.any(1) == ended.all(1)).all()
        np.testing.assert_array_equal(log.is_first[1:, game], ended[:-1])


def test_an_agent_that_joins_late() -> None:
    """Catches a latecomer that is taken for one that plays, or is never let in: its first row opens an episode."""
    env = make(3, late=(1,), salt=3)
    log = Log(env, 120)
    env.close()
    assert env.faults == []
    joined = log.episodes(1)
    assert len(joined) > 3
    assert joined == play_script(1, 3, len(joined))
    enters = int(log.obs[:, 1].any(1).argmax())
    assert enters >= 2
    assert log.is_first[: enters + 1, 1].all()
    assert not log.is_first[enters + 1, 1]


def test_agents_that_come_back_play_on() -> None:
    """Catches a revived agent that is never asked again, on which its game then fails."""
    env = make(3, salt=2, how="revives")
    log = Log(env, 150)
    env.close()
    assert env.faults == []
    for slot in range(3):
        found = log.episodes(slot)
        assert len(found) > 5
        assert found == play_script(slot, 2, len(found))
    # While the others play on.
    back = log.is_first[1:].sum(1) < 3
    assert (log.is_first[1:] & log.obs[1:].any(2) & back[:, None]).sum() > 5


def test_the_last_observation_of_the_terminated_may_be_left_out() -> None:
    """Catches a game that is given up for a row that nothing is computed from."""
    env = make(3, salt=1, how="keeps last rows")
    log = Log(env, 60)
    env.close()
    assert env.faults == []
    assert log.terminated.sum() > 5
    bare = log.terminated & ~log.obs.any(2)
    assert bare.any()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "RuntimeError: 100% lost"),
        ("no obs", r"agent 'agent_\d': obs .* is not for it"),
        ("obs nan", r"agent 'agent_\d': obs has a value that is not finite"),
        ("reward nan", r"agent 'agent_\d': reward nan is not finite"),
        ("no reward", r"agent 'agent_\d': reward .* is not for it"),
        ("terminated two", r"agent 'agent_\d': terminated int 2 is not a bool"),
        ("gone", r"agent 'agent_\d': is gone from agents, but was neither terminated nor truncated"),
        ("stranger", "agent 'stranger' is not in possible_agents"),
    ],
)
def test_a_fault_costs_the_episodes_of_one_game(how: str, said: str) -> None:
    """Catches a broken game that ends the run, or others with it, or leaves half of its agents in the old episode."""
    env = make(4, num_agents=2, how=how, at=21, salt=3)
    rows = Rows(env).rows
    env.reset(rows.obs)
    ScriptedGame.instances[1].how = ""
    faulty = 0
    for step in range(1, 60):
        env.step(np.array([choose(slot, rows.obs[slot]) for slot in range(4)]), rows)
        if env.faults:
            faulty = step
            break
    (message,) = env.faults
    assert message.startswith(f"{ID}: slots 0..1, step {faulty} (seed ")

    assert re.search(said, message), message
    assert rows.is_first[:2].all()
    assert not (rows.terminated | rows.truncated)[:2].any()
    assert rows.reward[:2].tolist() == [0, 0]
    assert rows.obs[:2].tolist() == [list(play_script(0, 3, 1)[0].states[0])] * 2
    assert not rows.is_first[2:].all()
    old, _, new = ScriptedGame.instances
    assert old.closed
    assert not new.closed
    env.close()
    assert new.closed


def test_a_game_that_always_breaks_is_given_up() -> None:
    """Catches an endless loop of restarts."""
    env = make(2, num_agents=2, how="reset")
    with pytest.raises(
        EnvironmentFault,
        match=r"slots 0\.\.1.*OSError: no map \(\S+scripted_games\.py:\d+\) \(3 faults in a row, given up\)",
    ):
        env.reset(Rows(env).rows.obs)


@pytest.mark.parametrize(
    ("env_id", "num_envs", "kwargs", "said"),
    [
        (ID, 4, {}, "num_envs=4 must be a positive multiple of its 3 agents"),
        (ID, 3, {"colour": 1}, "colour"),
        (ID, 3, {"vectorization": "async"}, "vectorization is for gymnasium ids"),
        (ID, 3, {"spaces_differ": True}, "need the same observation_space; agent 'agent_0' has Box.*'agent_2' has Box"),
        (ID, 3, {"num_agents": 0}, "no possible_agents"),
        (ID.replace("parallel_env", "not_a_game"), 3, {}, "must be a pettingzoo.ParallelEnv or AECEnv"),
        ("pettingzoo:turn_games:Nim", 2, {"moves": "box"}, r"agents take turns.*'first' has the actions Box.*Discrete"),
        (ID.replace("parallel_env", "SPACES"), 3, {}, "write pettingzoo:package.module:factory"),
        (ID.replace("parallel_env", "parallel"), 3, {}, "no attribute 'parallel'; write pettingzoo:package.module"),
        ("pettingzoo:no_such_module:parallel_env", 3, {}, "no module 'no_such_module'"),
        ("pettingzoo:scripted_games", 3, {}, "write pettingzoo:package.module:factory"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(env_id: str, num_envs: int, kwargs: Any, said: str) -> None:
    """Catches a traceback from deep inside, or a game that is left open."""
    ScriptedGame.instances.clear()
    with pytest.raises(ValueError, match=said):
        make_env(env_id, num_envs, 0, **kwargs)
    assert all(game.closed for game in ScriptedGame.instances)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare ModuleNotFoundError for the extra."""
    monkeypatch.setitem(sys.modules, "pettingzoo", None)
    with pytest.raises(EnvironmentNotFound, match=r"pip install 'shoal\[pettingzoo\]'"):
        make_vector_env(ID, 3, 0)


def test_the_spec_needs_no_number_of_slots() -> None:
    """Catches a spec that is asked for with one slot, which a game of several agents refuses."""
    ScriptedGame.instances.clear()
    spec = make_env_spec(ID, num_agents=5)
    assert spec.observation == VectorSpace(size=3)
    assert spec.actions == DiscreteActions(names=(("action_0", "action_1", "action_2"),))
    assert not spec.same_step
    assert [game.closed for game in ScriptedGame.instances] == [True]


def test_a_run_with_half_a_game_is_refused_before_it_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches slots that do not fit the agents and are found out by an actor."""
    settings = (f"env.id={ID}", "env.num_envs=4", "learner.batch_size=4", "mode=inline", f"run_dir={tmp_path / 'run'}")
    assert main(["train", *settings]) == 2
    assert f"env.num_envs: 4 must be a multiple of the 3 agents of {ID}; set it to 3 or 6" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
