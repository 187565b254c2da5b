"""RecurrentPolicy: the base class of every policy, with memory, steps, unrolls and the TensorDict interface."""

# T time, B rows, N = T * B, K final rows, A actions, L layers, H hidden

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shoal.policy.actions import Actions, Continuous, Discrete
from shoal.policy.byte_rows import parts_of, unpack
from shoal.policy.core import Core
from shoal.policy.cores import make_core
from shoal.policy.graph import CORE, LSTM, core_component
from shoal.policy.lstm import as_core
from shoal.policy.memory import Memory
from shoal.policy.normalization import ObservationNormalizer, ValueScale
from shoal.policy.observation import DictObservation, ImageObservation, Observation, numbers_of
from shoal.policy.precision import at_least_float32, without_autocast
from shoal.policy.resets import ResetPlan, State, plan_resets
from torch import Tensor, nn

if TYPE_CHECKING:  # actors never need it, and it takes a second to import
    from tensordict import TensorDict

HIDDEN = 128


class PolicyOutput(NamedTuple):
    """The network's output for each row."""

    logits: Tensor
    """[..., A]: unnormalized log-probabilities, or means and log standard deviations of continuous actions."""
    value: Tensor
    """[...], in units of the reward."""
    final_value: Tensor | None = None
    """[K]: values of the final rows of an unroll; None if it has none."""
    core: Tensor | None = None
    """[T, B, H]: the memory's output in an unroll, for losses that read it."""


class ActorOutput(NamedTuple):
    """The part of the network's output that acting needs, for each row."""

    logits: Tensor
    """[..., A], as ``PolicyOutput``'s."""


class RecurrentPolicy(nn.Module):
    """Encoder -> core -> heads, with one memory per environment slot while acting.

    A subclass creates its layers, among them the core by ``make_core``, and implements ``encode``, ``heads`` and
    ``logits``. A policy that has one core, whatever the settings say, assigns it: a ``Core`` as ``core``, or a
    ``torch.nn.LSTM`` as ``lstm``. No row of these may depend on another row, on chance, or on earlier calls. ``encode``
    reads numbers through ``network_input`` and images through ``images``, and ``heads`` returns values
    through ``in_reward_units``; without a layer ``value_head``, a policy normalizes no values.

    Args:
        observation: the environment's observation.
        action_names: names of one discrete choice, or an ``Actions`` description of any other action space.
        embedding_rows: size of the action embedding table; the most actions that the policy can have.
        action_rows: embedding row by action name, as saved with weights; fresh policies use rows 0..A-1 in name order.
            It may hold more actions than the environment has, and two of those may share a name (``policy.remap``).
        trained_observation: the observation that the weights were trained with, if it differs from ``observation``.
        hidden: H of the core that ``make_core`` makes.
        core: the memory, as ``policy.core`` names it.
        core_kwargs: further arguments of the core.
        normalize_observations: the network sees vectors in units of their own spread (``policy.normalization``).
        normalize_values: the value head's output is in units of the spread of its targets.

    Raises:
        ValueError: more actions than embedding rows, repeated names, names without a row in ``action_rows``, or an
            observation that cannot be matched with the trained one.
    """

    kind: str
    """The value of ``policy.kind`` in the configuration."""
    kwargs: Mapping[str, Any] = MappingProxyType({})
    """The value of ``policy.kwargs``."""
    action_embeddings: nn.Embedding
    value_head: nn.Linear

    def __init__(
        self,
        observation: Observation,
        action_names: Sequence[str] | Actions,
        embedding_rows: int,
        *,
        action_rows: Mapping[str, int] | None,
        trained_observation: Observation | None,
        hidden: int = HIDDEN,
        core: str = LSTM,
        core_kwargs: Mapping[str, Any] | None = None,
        normalize_observations: bool = False,
        normalize_values: bool = False,
    ) -> None:
        super().__init__()
        self.core_name = core
        self.core_kwargs: Mapping[str, Any] = dict(core_kwargs or {})
        self._hidden = hidden
        self.observation = observation
        self.trained_observation: Observation = trained_observation or observation
        self._columns: Tensor | None
        self.register_buffer("_columns", _columns(self.trained_observation, observation), persistent=False)
        self._parts = parts_of(observation)
        self.vector_normalizer: ObservationNormalizer | None = None
        self.value_scale: ValueScale | None = None
        self.normalize(observations=normalize_observations, values=normalize_values)
        self.actions: Actions = (
            action_names if isinstance(action_names, Discrete | Continuous) else Discrete((tuple(action_names),))
        )
        self.embedding_rows = embedding_rows
        self.action_rows = _embedding_rows(self.actions.flat_names, embedding_rows, action_rows)
        rows = [self.action_rows[name] for name in self.actions.flat_names]
        # Logits are computed for all actions that the weights know, in row order: the rounding of a product depends on
        # the position, so this order makes them equal bit for bit in every environment.
        known = sorted(set(self.action_rows.values()))
        self.num_known_actions = len(known)
        self._rows: Tensor
        self.register_buffer("_rows", torch.tensor(known), persistent=False)
        order = None if rows == known else torch.tensor([known.index(row) for row in rows])
        self._order: Tensor | None
        self.register_buffer("_order", order, persistent=False)
        self.memory = Memory()

    @property
    def core(self) -> Core:
        """The memory itself: the layer ``core``, or ``lstm`` where it is an LSTM, the name that its weights have."""
        layers = self._modules
        found = layers[CORE] if CORE in layers else layers.get(LSTM)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no core: make it with self.make_core(inputs)")
        return found  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_core(value) if name == LSTM and type(value) is nn.LSTM else value)

    def make_core(self, inputs: int, stream: torch.Generator | None = None) -> Core:
        """Make the core that ``policy.core`` names, for inputs [N, inputs] and outputs [N, hidden], and register it.

        With ``stream`` its initial weights depend on that alone, else on torch's global generator.

        Raises:
            ValueError: the core does not take the arguments, or its state cannot travel.
        """
        core = self._new_core(inputs, stream)
        self.add_module(core_component(self.core_name), core)
        return core

    def _new_core(self, inputs: int, stream: torch.Generator | None) -> Core:
        with torch.random.fork_rng(devices=()) if stream is not None else contextlib.nullcontext():
            if stream is not None:
                torch.manual_seed(stream.initial_seed())
            return make_core(self.core_name, self.core_kwargs, inputs, self._hidden)

    def normalize(self, *, observations: bool, values: bool) -> None:
        """Begin fresh statistics of vector observations and of values (``policy.normalization``)."""
        trained, presented = numbers_of(self.trained_observation), numbers_of(self.observation)
        if observations and trained and presented and len(trained.categorical) < trained.size:
            self.vector_normalizer = ObservationNormalizer(trained, self._columns, presented)
        self.value_scale = ValueScale() if values else None

    def in_order(self, x: Tensor) -> Tensor:
        """[..., actions that the weights know, by row] -> [..., A], in the order of ``actions``."""
        return x if self._order is None else x.index_select(-1, self._order)

    @property
    def components(self) -> dict[str, dict[str, Any] | None]:
        """The differences from the network's default graph as plain data (``policy.components``)."""
        return {}

    def read(self, rows: Tensor) -> Tensor:
        """The rows of an unroll [..., *row] -> observations [..., *observation.shape] in ``observation.dtype``."""
        return unpack(rows, self._parts) if self._parts and rows.dtype == torch.uint8 else rows

    def read_numbers(self, rows: Tensor) -> Tensor:
        """``trained_columns`` of rows [N, *row], without reading the images beside them."""
        return self.trained_columns(
            unpack(rows, self._parts[:1]) if self._parts and rows.dtype == torch.uint8 else rows
        )

    def encode(self, obs: Tensor) -> Tensor:
        """[N, *observation.shape] -> the core's input [N, I]."""
        raise NotImplementedError

    def heads(self, core: Tensor) -> PolicyOutput:
        """[N, H] -> logits [N, A], value [N]."""
        raise NotImplementedError

    def logits(self, core: Tensor) -> Tensor:
        """[N, H] -> logits [N, A] equal to those of ``heads``, without computing the value."""
        raise NotImplementedError

    def initial_state(self, batch: int) -> State:
        """Zeros, each tensor of the core's state as [L, B, ...]; of an LSTM (h, c), each [L, B, H]."""
        return self.core.initial_state(batch)

    def step(self, obs: Tensor, is_first: Tensor, state: State | None = None) -> tuple[PolicyOutput, State]:
        """One step of B rows. The returned state is detached.

        Args:
            obs: [B, *observation.shape] in ``observation.dtype``, or rows of an unroll.
            is_first: bool [B]; if true, the state is zeroed before the row is consumed.
            state: each tensor of the core's state, [L, B, ...]; None is zeros.
        """
        core, state = self._step_core(self.encode(self.read(obs)), is_first, state)
        return self.heads(core), state

    def unroll(
        self,
        obs: Tensor,
        is_first: Tensor,
        state: State | None = None,
        *,
        plan: ResetPlan | None = None,
        final_obs: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[PolicyOutput, State | None]:
        """T steps of B rows with resets inside, for training; the outputs equal those of ``step`` called T times.

        Args:
            obs: [T, B, *observation.shape], or rows of an unroll.
            is_first: bool [T, B]; if true, the state is zeroed before the row is consumed.
            state: before row 0, each tensor [L, B, ...]; None is zeros.
            plan: ``plan_resets(is_first)``, if the caller has it (on a GPU that saves a synchronisation).
            final_obs: [K, *observation.shape], the final rows that ``plan`` was made with: last observations of
                episodes that ended in the same-step form. Their values use the state at that step; they affect no
                other row.
            return_state: return the state after row T-1, which may otherwise be None.
        """
        steps, batch = is_first.shape
        rows = self.read(obs).reshape(steps * batch, *self.observation.shape)
        if final_obs is not None:
            rows = torch.cat([rows, self.read(final_obs)])
        core, state = self._unroll_core(self.encode(rows), is_first, state, plan, return_state)
        logits, value, *_ = self.heads(core)
        here = steps * batch
        output = PolicyOutput(
            logits[:here].view(steps, batch, -1),
            value[:here].view(steps, batch),
            None if final_obs is None else value[here:],
            core[:here].view(steps, batch, -1),
        )
        return output, state

    def _step_core(self, x: Tensor, is_first: Tensor, state: State | None) -> tuple[Tensor, State]:
        core = self.core
        y, state = core.step(x, is_first, state or core.initial_state(len(x)))
        return y, tuple(part.detach() for part in state)

    def _unroll_core(
        self, x: Tensor, is_first: Tensor, state: State | None, plan: ResetPlan | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if plan is None:
            plan = plan_resets(is_first.cpu().numpy()).to(x.device)
        core = self.core
        state = state or core.initial_state(is_first.shape[1])
        if plan.is_stepped:
            with without_autocast(x.device):  # steps keep the state's dtype
                return Core.unroll(core, at_least_float32(x), plan, is_first, state)
        return core.unroll(x, plan, is_first, state, return_state=return_state)

    # The TensorDict interface, batch-major.

    def forward(self, td: TensorDict) -> TensorDict:
        """Apply ``step`` (td [B]) or ``unroll`` (td [B, T]) to a TensorDict, which is not modified.

        Reads ``obs`` and ``is_first`` (bool), and, if present, the state before each row: ``initial_<name>`` of every
        tensor of the core's state, of an LSTM ``initial_h`` and ``initial_c`` [..., L, H]. For [B, T] only the state
        before row 0 is read, so an expanded tensor is enough. Without them, [B] uses the memory of
        ``training_env_id`` if present; otherwise the state is zeros.

        Returns a copy with ``logits`` [..., A] and ``value`` [...], ``bptt`` and ``batch`` (int64, filled with T and B;
        T is 1 while acting), of [B] the state after it (``next_h`` and ``next_c`` [B, L, H]), and the outputs of named
        components.

        Raises:
            ValueError: td has neither one nor two batch dimensions.
        """
        if td.batch_dims not in (1, 2):
            raise ValueError(f"expected a TensorDict of [B] or [B, T], got batch size {tuple(td.batch_size)}")
        obs, is_first = self.read(td["obs"]), td["is_first"]
        names = tuple(self.core.state_shapes)
        given = f"initial_{names[0]}" in td.keys()  # noqa: SIM118  (a TensorDict iterates over rows)
        state: State | None = tuple(td[f"initial_{name}"] for name in names) if given else None
        result = td.copy()
        if td.batch_dims == 1:
            steps = 1
            ids = None if given else td.get("training_env_id", None)
            if ids is not None:
                state = self.memory.read(ids := tuple(ids.tolist()))
            elif state is not None:
                state = _layers_first(state)
            x, outputs = self.encode_outputs(obs)
            core, state = self._step_core(x, is_first, state)
            if ids is not None:
                self.memory.write(ids, state)
            output, more = self.head_outputs(core)
            found = {**outputs, **more, "logits": output.logits, "value": output.value}
            found |= {f"next_{name}": part.transpose(0, 1) for name, part in zip(names, state, strict=True)}
        else:
            steps = td.batch_size[1]
            if state is not None:
                state = _layers_first(tuple(part[:, 0] for part in state))
            x, outputs = self.encode_outputs(obs.transpose(0, 1).flatten(0, 1))
            core, _ = self._unroll_core(x, is_first.transpose(0, 1), state, None, return_state=False)
            output, more = self.head_outputs(core)
            rows = {**outputs, **more, "logits": output.logits, "value": output.value}
            found = {name: tensor.unflatten(0, (steps, -1)).transpose(0, 1) for name, tensor in rows.items()}
        for name, length in (("bptt", steps), ("batch", td.batch_size[0])):
            found[name] = torch.full(td.batch_size, length, dtype=torch.int64, device=obs.device)
        return result.update(found)

    def encode_outputs(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``encode``, and the outputs of the encoder's named components, each [N, ...]."""
        return self.encode(obs), {}

    def head_outputs(self, core: Tensor) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """``heads``, and the outputs of their named components, each [N, ...]."""
        return self.heads(core), {}

    def trained_columns(self, obs: Tensor) -> Tensor:
        """The numbers of vectors and Dicts, [N, size] in the order of ``trained_observation``; columns that the
        environment lacks are 0. Other observations as they are."""
        if isinstance(self.observation, DictObservation):
            obs = obs[:, : self.observation.numbers.size]
        if self._columns is None:
            return obs
        return nn.functional.pad(obs, (0, 1)).index_select(1, self._columns)

    def image(self, obs: Tensor, index: int) -> Tensor:
        """Image ``index`` of Dicts [N, size]: [N, channels, height, width], in the numbers of the observation."""
        assert isinstance(self.observation, DictObservation)
        _, image = self.observation.images[index]
        return obs[:, self.observation.spans[index]].unflatten(1, image.shape).permute(0, 3, 1, 2)

    def images(self, obs: Tensor) -> list[Tensor]:
        """What an encoder reads of images, as numbers within -1 and 1 or 0 and 1.

        Args:
            obs: [N, height, width, channels] uint8 or float32 of an ``ImageObservation``, or the rows of a
                ``DictObservation``, float32 [N, size].

        Returns each image as float32 [N, channels, height, width], divided by its ``scale``: the only one, or those
        of the Dict in the order of its ``images``. Other observations have none.
        """
        trained = self.trained_observation
        if isinstance(trained, DictObservation):
            return [self.image(obs, index) / image.scale for index, (_, image) in enumerate(trained.images)]
        if isinstance(trained, ImageObservation):
            return [obs.permute(0, 3, 1, 2).to(next(self.parameters()).dtype) / trained.scale]
        return []

    def network_input(self, obs: Tensor) -> Tensor:
        """``trained_columns``, normalized where this policy normalizes observations."""
        x = self.trained_columns(obs)
        return x if self.vector_normalizer is None else self.vector_normalizer(x)

    def in_reward_units(self, value: Tensor) -> Tensor:
        """The value head's output [N] in units of the reward."""
        return value if self.value_scale is None else self.value_scale(value)

    # Memory while acting: one state per training_env_id, no part of the weights (policy.memory).

    def act(self, obs: Tensor, training_env_ids: Sequence[int], is_first: Tensor) -> ActorOutput:
        """``step`` with the state of each row kept here by its ``training_env_id`` (unknown ids start from zeros), and
        without the value, which acting does not need and which is a fifth of the work."""
        core, state = self._step_core(self.encode(self.read(obs)), is_first, self.memory.read(training_env_ids))
        self.memory.write(training_env_ids, state)
        return ActorOutput(self.logits(core))

    def has_memory(self) -> bool:
        """Return True: every policy here is recurrent."""
        return True

    def get_memory(self) -> dict[int, State]:
        """A copy of every state by ``training_env_id``: each tensor [L, ...], of an LSTM (h, c), each [L, H]."""
        return self.memory.get()

    def set_memory(self, states: Mapping[int, State]) -> None:
        """Replace all memory by ``states``, as returned by ``get_memory``.

        Raises:
            ValueError: a state has other shapes than the core's.
        """
        shapes = self.core.state_shapes
        for env_id, state in states.items():
            if (got := [tuple(part.shape) for part in state]) != [tuple(shape) for shape in shapes.values()]:
                raise ValueError(f"state of training_env_id {env_id} must be {dict(shapes)}, got the shapes {got}")
        self.memory.set(states)

    def reset_memory(self, training_env_ids: Sequence[int] | None = None) -> None:
        """Zero the states of these ids, or of all ids if None."""
        self.memory.reset(training_env_ids)


def _layers_first(state: State) -> State:
    """[B, L, ...] -> [L, B, ...]"""
    return tuple(part.transpose(0, 1).contiguous() for part in state)


def _columns(trained: Observation, presented: Observation) -> Tensor | None:
    """[size] int64: the environment's column for each trained one, ``presented.size`` if absent; None if none moves."""
    if type(trained) is not type(presented):
        raise ValueError(f"the policy was trained with {trained}, the environment has {presented}: they do not match")
    if isinstance(trained, DictObservation):
        assert isinstance(presented, DictObservation)
        if trained.images != presented.images:
            raise ValueError(
                f"the policy was trained with the images {trained.images}, the environment has {presented.images}"
            )
    numbers, here = numbers_of(trained), numbers_of(presented)
    columns = numbers.columns_of(here) if numbers and here else None
    if columns is None or here is None:
        return None
    return torch.tensor([here.size if column is None else column for column in columns])


def _embedding_rows(names: Sequence[str], table: int, recorded: Mapping[str, int] | None) -> dict[str, int]:
    if recorded is None and len(set(names)) != len(names):
        raise ValueError(f"action names must be unique, got {list(names)}")
    rows = {name: i for i, name in enumerate(names)} if recorded is None else dict(recorded)
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"no embedding row is recorded for {missing}; recorded are {sorted(rows)}")
    needed = max(rows.values(), default=-1) + 1
    if needed > table:
        raise ValueError(
            f"{needed} actions do not fit {table} embedding rows; raise embedding_rows to {needed} or more"
        )
    return rows
