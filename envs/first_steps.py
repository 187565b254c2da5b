"""Takes the first steps in an environment with random actions, through the adapters that a run uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from shoal.envs.all_agents import AllAgents
from shoal.envs.boundary import EnvironmentFault, EnvSpec, ReportingEnvironment, StepRows
from shoal.envs.config import AdapterOptions, in_one_process
from shoal.envs.pettingzoo import GroupSpec
from shoal.envs.reference import random_player
from shoal.envs.registry import make_one_env
from shoal.envs.reports import Reports
from shoal.envs.teams import Patterns, TeamsEnvironment, make_team_specs


class FirstSteps(NamedTuple):
    """What the first steps showed."""

    spec: EnvSpec | None = None
    """The environment's; None where several policies play it."""
    teams: Mapping[str, GroupSpec] = {}
    """The agents of each of several policies."""
    steps: int = 0
    """Of every agent."""
    episodes: int = 0
    """That ended, of all agents."""
    step_limit: int | None = None
    """Steps after which gymnasium's ``TimeLimit`` truncates; 0 where an environment of gymnasium has none, and None
    where it is not known."""
    fault: str = ""
    """The fault that ended the environment, as it would a run."""
    faults: tuple[str, ...] = ()
    """Those that cost an episode; a run goes on."""
    remarks: tuple[str, ...] = ()
    """What a run would warn of."""


def take_first_steps(
    env_id: str,
    options: AdapterOptions,
    kwargs: Mapping[str, Any],
    patterns: Patterns,
    *,
    steps: int,
    seconds: float,
    note: Callable[[str], None] = lambda doing: None,
) -> FirstSteps:
    """Make one environment, or one game of all agents, in this process, reset it, step it, and close it.

    Args:
        env_id: as of ``envs.registry.make_vector_env``, like ``options`` and ``kwargs``.
        options: slots are stepped in this process, whatever they say.
        kwargs: the environment's own arguments.
        patterns: whose agents are whose, where several policies play; empty for one.
        steps: at most so many, of every agent; each action is legal.
        seconds: no step begins later.
        note: told before each of these what begins.

    Raises:
        Exception: whatever making it raises.
    """
    options, _ = in_one_process(options)
    note("making it, with its first reset,")
    seed, rng = np.random.SeedSequence([0, 1]), np.random.default_rng([0, 2])
    teams: Mapping[str, GroupSpec] = {}
    env: Any
    if patterns:
        teams = make_team_specs(env_id, options, kwargs, patterns)
        num_agents = sum(len(group.agents) for group in teams.values())
        whole = TeamsEnvironment(env_id, num_agents, seed, options, False, kwargs, patterns)
        groups = whole.games.groups
        streams = rng.spawn(len(groups))
        env = AllAgents(whole, [random_player(each.spec, one) for each, one in zip(groups, streams, strict=True)])
        act = env.act
    else:
        env = make_one_env(env_id, seed, options, **kwargs)
        act = random_player(env.spec, rng)
    try:
        found = FirstSteps(None if patterns else env.spec, teams, step_limit=getattr(env, "step_limit", None))
        return _play(env, act, found, steps, time.monotonic() + seconds, note)
    finally:
        note("close")
        env.close()


def _play(env: Any, act: Any, found: FirstSteps, most: int, until: float, note: Callable[[str], None]) -> FirstSteps:
    slots = env.num_envs
    obs = np.empty((slots, *env.spec.obs_shape), env.spec.obs_dtype)
    final_obs = np.empty_like(obs) if env.spec.same_step else None
    flags = np.zeros((3, slots), bool)
    rows = StepRows(obs, flags[0], np.zeros(slots, np.float32), flags[1], flags[2], final_obs)
    rows.is_first[:] = True
    masks = (env.action_mask,) if env.spec.num_mask else ()
    reports = env.reports if isinstance(env, ReportingEnvironment) else Reports()
    steps = episodes = 0
    fault = ""
    try:
        note("reset")
        env.reset(obs)
        while steps < most and time.monotonic() < until:
            note(f"step {steps + 1}")
            env.step(act(rows.obs, rows.is_first, *masks), rows)
            steps += 1
            episodes += int((rows.terminated | rows.truncated).sum())
    except EnvironmentFault as error:
        fault = str(error)
    return found._replace(
        steps=steps,
        episodes=episodes,
        fault=fault,
        faults=tuple(dict.fromkeys(env.faults)),
        remarks=tuple(reports.examples.values()),
    )
