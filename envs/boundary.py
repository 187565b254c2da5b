"""The environment contract: the rows that every adapter writes at each step.

The rollout worker knows environments only through this contract. An adapter writes into rows of the caller's unroll
buffers, so that stepping allocates nothing and the learner later trains on the same memory.

Rows, for B slots (one slot = one agent in one environment = one ``training_env_id``):

- ``obs[b]`` is the network's next input.
- ``is_first[b]`` marks ``obs[b]`` as the first observation of an episode: the memory's state must be zeroed before
  it is consumed, unless it is carried across episodes (``TrialEnvironment``).
- ``reward[b], terminated[b], truncated[b]`` are the results of the action.

A transition with ``is_first`` but neither ``terminated`` nor ``truncated`` is a *reset transition (masked)*: it leads
from one episode to the next, its action had no effect, its reward is 0, and no loss, statistic or count includes it.

An episode ends in one of two forms, the same for a whole environment:

- *next step* (``EnvSpec.same_step`` false): the call in which the episode ends returns the true final observation as
  ``obs``; the next call ignores that slot's action and returns the first observation of the new episode with
  ``is_first``, a reset transition (masked).
- *same step* (``EnvSpec.same_step`` true): the call in which the episode ends returns the first observation of the new
  episode as ``obs`` with ``is_first``, and the true final observation as ``final_obs``. No transition is lost.

Either way a truncated episode is bootstrapped from its true final observation. A slot that was restarted after a
fault returns ``is_first`` without an end: the faulty transition becomes a reset transition (masked), and the one before
it is bootstrapped like a truncation. A slot whose agent is out of the game while others play on returns ``is_first`` at
every step until the agent is back; all of these are reset transitions (masked), whatever ``obs`` holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from shoal.envs.reports import Reports


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpace:
    """Observations as uint8 [num_tokens, 3] tokens of (coordinate, feature id, value); 0xFF as coordinate is padding.

    The coordinate's high nibble is the row, the low nibble the column, of a ``height`` x ``width`` window.
    """

    width: int
    height: int
    num_tokens: int
    feature_names: tuple[str, ...]
    """Names by feature id; ids run from 0 without gaps ("" for an id that is not used)."""
    feature_normalizations: tuple[float, ...]
    """The value that is normalized to 1.0, by feature id."""
    categorical_features: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(feature id, names of its values 0, 1, ...): each value gets a plane of its own instead of a magnitude."""
    global_coordinate: int | None = None
    """Coordinate byte of tokens that belong to no cell; they are placed on the window's centre."""


Stored = Literal["float32", "float16", "int16", "int8", "uint8"]
"""Types of numbers in rows."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VectorSpace:
    """Observations as numbers [size]."""

    size: int
    names: tuple[str, ...] = ()
    """Unique names, one per number; empty if the environment does not name the parts of its observations."""
    categorical: tuple[int, ...] = ()
    """Indices of the numbers that are one-hot codes or flags, 0 or 1: these are never normalized."""
    stored: Stored = "float32"
    """The narrowest type that holds what the environment declares. Rows are float32, or the bytes of such numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpace:
    """Observations as [height, width, channels]; several frames are further channels."""

    height: int
    width: int
    channels: int
    dtype: Literal["uint8", "float32"] = "uint8"
    scale: float = 255.0
    """Largest magnitude of a number, by which the policy divides."""
    axes: tuple[int, ...] = (0, 1, 2)
    """The axes of the environment's own array, in the order in which rows have them."""

    @property
    def size(self) -> int:
        """Numbers of the image."""
        return self.height * self.width * self.channels


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DictSpace:
    """Observations as numbers [size]: those of several parts, and behind them images, each flattened. Rows are float32,
    or, where there is an image of bytes, the bytes of float32 numbers and of the images, without gaps."""

    numbers: VectorSpace
    """Of size 0 where there are images alone."""
    images: tuple[tuple[str, ImageSpace], ...]
    """Images by unique name, in the order of the rows."""
    leaves: tuple[int, ...]
    """The place of each image among the innermost parts of the observation."""

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return self.numbers.size + sum(image.size for _, image in self.images)


Space = TokenSpace | VectorSpace | ImageSpace | DictSpace


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiscreteActions:
    """One or several discrete choices per step, int64 [B] (one) or [B, len(names)] (several)."""

    names: tuple[tuple[str, ...], ...]
    """Names of each choice's actions, in the order of their indices."""
    scalar: bool = True
    """True if the action is a single number and not an array."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContinuousActions:
    """float32 [B, len(low)]; the adapter maps [-1, 1] onto [low, high], where there are both, and clips."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EnvSpec:
    """Everything that the policy and the trajectory contract need to know of an environment."""

    env_id: str
    observation: Space
    actions: DiscreteActions | ContinuousActions
    same_step: bool = False
    """Episodes end in the same-step form: the next begins in the same step, the last observation is ``final_obs``."""
    num_agents: int = 1
    """Number of agents per environment; they occupy consecutive slots, and their returns are not independent."""
    spaces: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    """A slot's spaces in the environment's own terms (``envs.space_json``); None where observations and actions are the
    rows themselves."""
    num_mask: int = 0
    """Number of actions that masks tell of, all choices together; 0 where there are no masks."""
    declared: str = ""
    """The observations as the environment declares them, in words; empty where they are declared as rows have them."""

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of one slot's observation."""
        space = self.observation
        if isinstance(space, TokenSpace):
            return (space.num_tokens, 3)
        if isinstance(space, ImageSpace):
            return (space.height, space.width, space.channels)
        return (sum(size * dtype.itemsize for size, dtype in self.byte_parts) or space.size,)

    @property
    def obs_dtype(self) -> np.dtype:
        """float32 for numbers, uint8 for tokens and rows of bytes, either for images."""
        space = self.observation
        if isinstance(space, ImageSpace):
            return np.dtype(space.dtype)
        return np.dtype(np.uint8 if isinstance(space, TokenSpace) or self.byte_parts else np.float32)

    @property
    def byte_parts(self) -> tuple[tuple[int, np.dtype], ...]:
        """Numbers and type of each part of a row of bytes, in order; empty where rows are none."""
        space = self.observation
        if isinstance(space, VectorSpace) and space.stored != "float32":
            return ((space.size, np.dtype(space.stored)),)
        if isinstance(space, DictSpace) and any(image.dtype == "uint8" for _, image in space.images):
            images = ((image.size, np.dtype(image.dtype)) for _, image in space.images)
            return ((space.numbers.size, np.dtype(np.float32)), *images)
        return ()

    @property
    def float_spans(self) -> tuple[tuple[int, int, str], ...]:
        """(start, stop, type) of the floating-point numbers in rows of bytes."""
        found, start = [], 0
        for size, dtype in self.byte_parts:
            stop = start + size * dtype.itemsize
            if size and dtype.kind == "f":
                found.append((start, stop, dtype.name))
            start = stop
        return tuple(found)

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one slot's action: () for a scalar."""
        if isinstance(self.actions, ContinuousActions):
            return (len(self.actions.low),)
        return () if self.actions.scalar else (len(self.actions.names),)

    @property
    def action_dtype(self) -> np.dtype:
        """int64 for discrete actions, float32 for continuous ones."""
        return np.dtype(np.float32 if isinstance(self.actions, ContinuousActions) else np.int64)


class StepRows(NamedTuple):
    """Views into the caller's buffers that one ``step`` fills; all contiguous or strided numpy arrays over B slots."""

    obs: np.ndarray
    """[B, *obs_shape] in the spec's dtype."""
    is_first: np.ndarray
    """[B] bool."""
    reward: np.ndarray
    """[B] float32."""
    terminated: np.ndarray
    """[B] bool."""
    truncated: np.ndarray
    """[B] bool."""
    final_obs: np.ndarray | None = None
    """[B, *obs_shape] in the spec's dtype, written only for slots whose episode ended; None if ``EnvSpec.same_step`` is
    false."""

    def of(self, slots: slice) -> StepRows:
        """Views of these slots only."""
        return StepRows(
            self.obs[slots],
            self.is_first[slots],
            self.reward[slots],
            self.terminated[slots],
            self.truncated[slots],
            None if self.final_obs is None else self.final_obs[slots],
        )


class EnvironmentFault(Exception):
    """An environment broke its contract and could not be restarted slot by slot; the message has the details."""


@runtime_checkable
class VectorEnvironment(Protocol):
    """B slots stepped together. Adapters: ``envs.mettagrid``, ``envs.recall``, ``envs.gym``, ``envs.native``,
    ``envs.pettingzoo``."""

    spec: EnvSpec
    num_envs: int
    """B."""
    short_episode: np.ndarray
    """[B] bool; the current episode began with a shorter time limit, so that slots do not all end together. Its steps
    are valid, its return is not that of a full episode. Refers to the episode that the next ``step`` may end."""
    faults: list[str]
    """One message per fault since the caller last cleared the list; a fault restarts one slot, or all slots of one
    environment."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape]."""

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` [B, *action_shape] and fill ``rows``.

        Raises:
            EnvironmentFault: the whole vector environment is unusable and must be recreated.
        """

    def close(self) -> None:
        """Release everything; called once."""


class SlotGroup(Protocol):
    """Consecutive slots of an environment that are stepped in other processes, independently of its other slots."""

    slots: slice
    """The group's slots within the environment."""

    def step_begin(self, action: np.ndarray) -> None:
        """Start the step for ``action`` [slots, *action_shape] and return at once; ``step_end`` must follow."""

    def step_end(self, rows: StepRows) -> None:
        """Wait for the step in progress and fill ``rows`` of these slots.

        Both methods raise like ``VectorEnvironment.step``; afterwards no group of the environment is usable.
        """


@runtime_checkable
class ReportingEnvironment(VectorEnvironment, Protocol):
    """An environment of another library, which tells more than its rows."""

    reports: Reports
    """What it told since the caller last took it."""


@runtime_checkable
class MaskedEnvironment(VectorEnvironment, Protocol):
    """An environment that says which actions are legal (``EnvSpec.num_mask`` is not 0)."""

    action_mask: np.ndarray
    """uint8 [B, num_mask], 1 for every legal action of the observations that were written last; the same array for the
    environment's whole life. Every choice has a legal action."""


@runtime_checkable
class GroupedEnvironment(VectorEnvironment, Protocol):
    """An environment whose slots are stepped in other processes: the caller may act for one group meanwhile.

    ``step`` begins and ends a step of every group, with the same results.
    """

    groups: Sequence[SlotGroup]
    """Groups covering all slots, in order. Every ``reset`` creates new ones and requires that no step is in progress.
    Empty before the first ``reset``, and if the environment is stepped in the caller's own thread."""


@runtime_checkable
class SharedEnvironment(VectorEnvironment, Protocol):
    """A part of games that others share; whichever part takes its rows first plays them, for all."""

    def take_owed_seconds(self) -> float:
        """Seconds of playing since the last call that are this part's, by its slots, less those in its own calls.

        All parts' add up to 0.
        """


@runtime_checkable
class StatefulEnvironment(VectorEnvironment, Protocol):
    """An environment that says its state, so that an interrupted run goes on with the same rows."""

    def get_state(self) -> dict[str, Any]:
        """All that decides later rows, as plain data (``envs.plain_state``); not while a step is in progress."""

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from what ``get_state`` of an equal environment returned; this one was just reset.

        Return the slots that could not, each with the reason: these begin an episode, and their first observations are
        in ``obs`` [B, *obs_shape], into which ``reset`` wrote.
        """


@runtime_checkable
class TrialEnvironment(VectorEnvironment, Protocol):
    """An environment that says where a memory that is carried across episodes must not be: its slots restart after
    faults, and its infos may tell where trials of several episodes begin."""

    begins_anew: np.ndarray
    """bool [B], of the slots whose last row has ``is_first``: nothing from before it may be remembered, because
    ``reset`` was called, the slot was restarted after a fault, or its ``info`` said so under the key of ``watch``. The
    same array for the environment's whole life; what it holds of other slots means nothing."""

    def watch(self, key: str) -> None:
        """Look for ``key`` in infos (``envs.trials``); before the first ``reset``."""


@runtime_checkable
class StaggeredEnvironment(VectorEnvironment, Protocol):
    """An environment whose slots need not reach their step limit together."""

    def stagger(self, seed: np.random.SeedSequence) -> None:
        """Truncate the first episodes at lengths that are evenly spread over the step limit, and mark them in
        ``short_episode``; before the first ``reset``. Without a limit nothing changes.
        """


@runtime_checkable
class OptionsEnvironment(VectorEnvironment, Protocol):
    """An environment whose episodes take options, such as a difficulty, as gymnasium's ``reset(options=...)``."""

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass these to the resets of all episodes that begin from now on; not while a step is in progress.

        Raises:
            EnvironmentFault: this one takes none.
        """
