"""Play a number of whole episodes of an environment with any player."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from shoal.envs.boundary import (
    MaskedEnvironment,
    ReportingEnvironment,
    StepRows,
    TrialEnvironment,
    VectorEnvironment,
)
from shoal.envs.reports import Reports

Player = Callable[..., np.ndarray]
"""(obs [B, ...], is_first [B]) -> action [B, ...], where ``is_first`` says where a memory is zeroed; where
``EnvSpec.num_mask`` is not 0, a third argument is the mask of legal actions, uint8 [B, num_mask]."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Episodes:
    """Whole episodes, one per agent, ordered by environment and by time; [N] each."""

    environment: np.ndarray
    """int64: index of the episode's environment; agents that share an environment share its index."""
    number: np.ndarray
    """int64: index within its environment's episodes, from 0; agents that share an environment share the index."""
    agent: np.ndarray
    """int64: index of the agent among those of its environment."""
    returns: np.ndarray
    """float64, undiscounted."""
    lengths: np.ndarray
    """int64 steps."""
    terminated: np.ndarray
    """bool; False if it was truncated."""
    start: np.ndarray
    """uint32: a hash of the first observations of all agents of the environment. Two players with equal hashes had the
    same task."""
    since_reset: np.ndarray
    """int64: episodes of the agent since its memory was zeroed, from 0; all 0 where the memory is of one episode."""
    cut: np.ndarray
    """bool; True if it had not ended after the most steps that an episode was given."""
    metrics: Mapping[str, np.ndarray]
    """float64 by name: numbers of ``info`` at the end (``envs.reports``); NaN where an episode had none."""
    policies: Mapping[str, Episodes] = dataclasses.field(default_factory=dict)
    """The episodes of each policy's agents by its name, where several policies played together; else none."""

    @property
    def episodes(self) -> int:
        """N."""
        return len(self.returns)

    def by_environment(self, values: np.ndarray) -> np.ndarray:
        """[M] means of ``values`` [N] over the episodes that were played together: these are independent, those of the
        agents of one environment are not."""
        if not self.episodes:
            return np.zeros(0)
        counts = np.add.reduceat(np.ones(self.episodes), self._together())
        return np.asarray(np.add.reduceat(values.astype(np.float64), self._together()) / counts)

    def starts(self) -> np.ndarray:
        """[M] in the order of ``by_environment``."""
        return self.start[self._together()] if self.episodes else self.start

    @property
    def mean(self) -> float:
        """Mean return per agent and episode; NaN if none ended."""
        return float(self.by_environment(self.returns).mean()) if self.episodes else float("nan")

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over episodes of whole environments; NaN if there are fewer than two."""
        means = self.by_environment(self.returns)
        return float(np.std(means, ddof=1)) / len(means) ** 0.5 if len(means) > 1 else float("nan")

    def __repr__(self) -> str:
        """One line, or one for each policy: the arrays are too long to read."""
        if not self.episodes:
            return "no episodes"
        error = f" +- {self.standard_error:.3g} (standard error)" if len(self.starts()) > 1 else ""
        count = f"{self.episodes} episode{'s' if self.episodes > 1 else ''}"
        own = f"mean return {self.mean:.4g}{error} over {count} of {self.mean_length:.4g} steps on average"
        if cut := int(self.cut.sum()):
            own += f", {cut} of them cut"
        return "\n".join([own, *(f"  {name}: {episodes!r}" for name, episodes in self.policies.items())])

    @property
    def mean_length(self) -> float:
        """Mean steps per episode; NaN if none ended."""
        return float(self.lengths.mean()) if self.episodes else float("nan")

    def _together(self) -> np.ndarray:
        """Start indices of the groups of episodes that were played together."""
        changes = (np.diff(self.environment) != 0) | (np.diff(self.number) != 0)
        return np.concatenate([[0], np.flatnonzero(changes) + 1])

    def of_agents(self, agents: Sequence[int]) -> Episodes:
        """Those of some agents alone, by their indices within an environment."""
        chosen = np.isin(self.agent, list(agents))
        metrics = {name: values[chosen] for name, values in self.metrics.items()}
        return Episodes(metrics=metrics, **{name: getattr(self, name)[chosen] for name in ARRAYS})


ARRAYS = tuple(field.name for field in dataclasses.fields(Episodes) if field.name not in ("metrics", "policies"))
"""The fields of ``Episodes`` that every episode has one value of."""


def join(parts: Sequence[Episodes]) -> Episodes:
    """Concatenate episodes of different environments and renumber these."""
    first = np.cumsum([0, *(part.environment.max(initial=-1) + 1 for part in parts)])
    renumbered = [part.environment + offset for part, offset in zip(parts, first, strict=False)]
    fields = [name for name in ARRAYS if name != "environment"]
    rest: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    absent = [np.full(part.episodes, np.nan) for part in parts]
    metrics = {
        name: np.concatenate([part.metrics.get(name, nan) for part, nan in zip(parts, absent, strict=True)])
        for name in names
    }
    return Episodes(environment=np.concatenate(renumbered), metrics=metrics, **rest)


def play(
    env: VectorEnvironment,
    player: Player,
    episodes: int,
    *,
    max_env_steps: int | None = None,
    enough: Callable[[], bool] = lambda: False,
    max_episode_steps: int | None = None,
    carries_memory: bool = False,
) -> Episodes:
    """Play until every environment has finished its share of ``episodes``; further episodes are not counted.

    (Counting the first to finish would favour short episodes.) If agents share an environment
    (``EnvSpec.num_agents``), their episodes count together, once the last of them has ended.

    Args:
        env: it is reset first.
        player: chooses the actions.
        episodes: at least so many.
        max_env_steps: bounds the steps of all slots together; the result then has, of each environment, as many
            episodes as all have finished.
        enough: asked before every step; once it is true the result is as after ``max_env_steps``.
        max_episode_steps: an episode that has not ended after so many steps is cut there and counts as it is. Its
            environment waits for its own end, or for the others, after which all of them are reset.
        carries_memory: the player's memory goes on across the episodes of a slot: it is zeroed only where the
            environment was reset here, and where its episode ``begins_anew``.
    """
    slots, spec = env.num_envs, env.spec
    share = -(-episodes // slots)
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.empty((slots, *spec.obs_shape), dtype=spec.obs_dtype)
    final_obs = np.empty_like(obs) if spec.same_step else None
    rows = StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2], final_obs)
    rows.is_first[:] = True
    resets = np.ones(slots, dtype=bool) if carries_memory else rows.is_first
    begins_anew = env.begins_anew if isinstance(env, TrialEnvironment) else np.zeros(slots, dtype=bool)
    tally = _Tally(slots, spec.num_agents, max_episode_steps)
    masks = (env.action_mask,) if spec.num_mask and isinstance(env, MaskedEnvironment) else ()
    reports = env.reports if isinstance(env, ReportingEnvironment) else Reports()
    finished: list[list[list[_Ended]]] = [[] for _ in tally.ended]
    env.reset(obs)
    env_steps = 0
    while min(map(len, finished)) < share and (max_env_steps is None or env_steps < max_env_steps) and not enough():
        tally.note_starts(rows, resets)
        action = player(rows.obs, resets, *masks)
        full = ~env.short_episode
        env.step(action, rows)
        if carries_memory:
            np.logical_and(rows.is_first, begins_anew, out=resets)
        env_steps += slots
        for environment in tally.add(rows, full, dict(reports.take().episodes) if reports else {}):
            if tally.ended[environment]:
                finished[environment].append(tally.ended[environment])
            tally.clear(environment)
        for environment in tally.cut():
            finished[environment].append(tally.ended[environment])
            tally.wait(environment)
        if tally.waiting.any() and all(
            waits or len(played) >= share for waits, played in zip(tally.waiting, finished, strict=True)
        ):
            # Nothing is left to wait for that would count.
            env.reset(obs)
            rows.is_first[:] = resets[:] = True
            tally.restart()
    complete = min(map(len, finished))
    found = [
        (
            environment,
            number,
            one.agent,
            one.returned,
            one.length,
            one.terminated,
            one.start,
            one.since_reset,
            one.is_cut,
        )
        for environment, played in enumerate(finished)
        for number, together in enumerate(played[:complete])
        for one in together
    ]
    columns = zip(*found, strict=True) if found else ((),) * 9
    dtypes: dict[str, Any] = {
        "environment": np.int64,
        "number": np.int64,
        "agent": np.int64,
        "returns": np.float64,
        "lengths": np.int64,
        "terminated": np.bool_,
        "start": np.uint32,
        "since_reset": np.int64,
        "cut": np.bool_,
    }
    arrays: dict[str, Any] = {
        name: np.array(column, dtype=dtype) for (name, dtype), column in zip(dtypes.items(), columns, strict=True)
    }
    numbers = [one.numbers for played in finished for together in played[:complete] for one in together]
    metrics = {
        name: np.array([each.get(name, np.nan) for each in numbers])
        for name in dict.fromkeys(name for each in numbers for name in each)
    }
    return Episodes(metrics=metrics, **arrays)


class _Ended(NamedTuple):
    """One agent's episode."""

    agent: int
    returned: float
    length: int
    terminated: bool
    start: int
    since_reset: int
    is_cut: bool
    numbers: Mapping[str, float]


class _Tally:
    """The episodes of agents that share an environment, until all of them have ended."""

    def __init__(self, slots: int, agents: int, max_episode_steps: int | None) -> None:
        self._agents, self._most = agents, max_episode_steps
        self.waiting = np.zeros(slots // agents, dtype=bool)
        """The environment's episode was cut; nothing of it counts until the next begins."""
        self._return = np.zeros(slots)
        self._length = np.zeros(slots, dtype=np.int64)
        self._since_reset = np.zeros(slots, dtype=np.int64)
        """Episodes that have ended since the slot's memory was zeroed."""
        self._start = [0] * (slots // agents)
        self._begins = np.ones(slots // agents, dtype=bool)
        """The environment's next episode has not been seen yet."""
        self.ended: list[list[_Ended]] = [[] for _ in range(slots // agents)]
        """Steps by environment since its episode began."""

    def note_starts(self, rows: StepRows, resets: np.ndarray) -> None:
        """Look at the first observations of environments that begin an episode; ``resets`` bool [B] marks the slots
        whose memory is zeroed before this step."""
        self._since_reset[resets] = 0
        for environment in np.flatnonzero(self._begins).tolist():
            agents = slice(environment * self._agents, (environment + 1) * self._agents)
            self._start[environment] = zlib.crc32(np.ascontiguousarray(rows.obs[agents]).data)
            self._begins[environment] = False

    def add(self, rows: StepRows, full: np.ndarray, numbers: Mapping[int, Mapping[str, float]]) -> list[int]:
        """Count a step and return the environments whose last agent's episode has ended.

        ``full`` bool [B] marks the slots whose episodes count; ``numbers`` are what ended ones reported, by slot.
        """
        ended = rows.terminated | rows.truncated
        masked = rows.is_first & ~ended
        self._return += rows.reward
        self._length += 1
        self._return[masked] = 0.0
        self._length[masked] = 0
        if not (ended.any() or masked.any()):
            return []
        for slot in np.flatnonzero(ended & full).tolist():
            if not self.waiting[slot // self._agents]:
                self._end(slot, terminated=bool(rows.terminated[slot]), is_cut=False, numbers=numbers.get(slot, {}))
        self._return[ended] = 0.0
        self._length[ended] = 0
        self._since_reset[ended] += 1
        # A reset, possibly after a fault: episodes finished before it are not grouped with those after it.
        for environment in np.flatnonzero(self._of_environments(masked).all(1)).tolist():
            self.clear(environment)
        over = self._of_environments(ended).any(1) & self._of_environments(ended | masked).all(1)
        found: list[int] = np.flatnonzero(over).tolist()
        return found

    def cut(self) -> list[int]:
        """End the episodes that have lasted too long, and return their environments."""
        if self._most is None or self._length.max() < self._most:
            return []
        long = self._of_environments(self._length >= self._most).any(1) & ~self.waiting
        found: list[int] = np.flatnonzero(long).tolist()
        for environment in found:
            first = environment * self._agents
            # Agents whose episodes have ended, or not begun, have no steps.
            for slot in (first + np.flatnonzero(self._length[first : first + self._agents])).tolist():
                self._end(slot, terminated=False, is_cut=True, numbers={})
        return found

    def wait(self, environment: int) -> None:
        """Count nothing more of the environment's episode."""
        self.ended[environment] = []
        self.waiting[environment] = True

    def clear(self, environment: int) -> None:
        """Begin the environment's next episode."""
        self.ended[environment] = []
        self._begins[environment] = True
        self.waiting[environment] = False

    def restart(self) -> None:
        """Begin the next episode of every environment."""
        self._return[:], self._length[:] = 0.0, 0
        for environment in range(len(self.ended)):
            self.clear(environment)

    def _end(self, slot: int, *, terminated: bool, is_cut: bool, numbers: Mapping[str, float]) -> None:
        environment = slot // self._agents
        returned, length = float(self._return[slot]), int(self._length[slot])
        self.ended[environment].append(
            _Ended(
                slot % self._agents,
                returned,
                length,
                terminated,
                self._start[environment],
                int(self._since_reset[slot]),
                is_cut,
                dict(numbers),
            )
        )

    def _of_environments(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, self._agents)
