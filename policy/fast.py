"""FastPolicy: the whole network in plain PyTorch.

Encoder (token CNN, image CNN or nothing) -> fc1 -> encoded_obs -> 2-layer LSTM -> critic and bilinear actor head.
With 25 feature planes and an 11x11 window it has 574,978 parameters, whatever the number of actions.
"""

# T time, B rows, N = T * B, A actions, L layers, H hidden

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.actions import Actions, Continuous, Discrete
from policy.config import Initialization
from policy.memory import Memory
from policy.observation import ImageObservation, Observation, TokenObservation, VectorObservation
from policy.recurrent import FragmentPlan, State, plan_fragments, step_lstm, unroll_lstm
from policy.tokens import TokensToBox

HIDDEN = 128
LSTM_LAYERS = 2
EMBEDDING_SIZE = 16


class PolicyOutput(NamedTuple):
    """What the network says of each row."""

    logits: Tensor
    """[..., A]: unnormalized log-probabilities, or means and log standard deviations of continuous actions."""
    value: Tensor
    """[...]"""


class FastPolicy(nn.Module):
    """The recurrent actor-critic that everything here trains.

    Args:
        observation: what one observation is; a ``TokenObservation`` gives the original network.
        action_names: names of one discrete choice, or an ``Actions`` description of any other action space.
        embedding_rows: size of the action embedding table.
        action_rows: embedding row by action name, as saved with weights; fresh policies use rows 0..A-1 in name order.
        initialization: where the weights start.

    Raises:
        ValueError: more actions than embedding rows, repeated names, or names without a row in ``action_rows``.
    """

    def __init__(
        self,
        observation: Observation,
        action_names: Sequence[str] | Actions,
        embedding_rows: int = 100,
        *,
        action_rows: Mapping[str, int] | None = None,
        initialization: Initialization | None = None,
    ) -> None:
        super().__init__()
        self.observation = observation
        self.actions: Actions = (
            action_names if isinstance(action_names, Discrete | Continuous) else Discrete((tuple(action_names),))
        )
        self.action_rows = _embedding_rows(self.actions.flat_names, embedding_rows, action_rows)
        self._rows: Tensor
        self.register_buffer("_rows", torch.tensor(list(self.action_rows.values())), persistent=False)

        if isinstance(observation, TokenObservation):
            self.to_box = TokensToBox(observation)
            self.cnn1, self.cnn2, self._pad, encoded = _token_cnn(observation, self.to_box.num_planes)
        elif isinstance(observation, ImageObservation):
            self.cnn1, self.cnn2, encoded = _image_cnn(observation)
        else:
            encoded = observation.size
        self.fc1 = nn.Linear(encoded, HIDDEN)
        self.encoded_obs = nn.Linear(HIDDEN, HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, num_layers=LSTM_LAYERS)
        self.critic_1 = nn.Linear(HIDDEN, 1024)
        self.value_head = nn.Linear(1024, 1)
        self.actor_1 = nn.Linear(HIDDEN, 512)
        self.action_embeddings = nn.Embedding(embedding_rows, EMBEDDING_SIZE)
        self.actor_W = nn.Parameter(torch.empty(1, 512, EMBEDDING_SIZE))
        self.actor_bias = nn.Parameter(torch.empty(1))
        if isinstance(self.actions, Continuous):
            self.actor_log_std = nn.Parameter(torch.zeros(len(self.actions.names)))
        self.memory = Memory(LSTM_LAYERS, HIDDEN)
        self._initialize(initialization or Initialization())

    @torch.no_grad()
    def _initialize(self, settings: Initialization) -> None:
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
            weight, bias = layer.parameters()
            nn.init.orthogonal_(weight, math.sqrt(2) if layer is self.critic_1 else 1.0)
            nn.init.zeros_(bias)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            elif settings.lstm_bias == "ones":
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)
                if settings.lstm_bias == "forget" and name.startswith("bias_ih"):
                    parameter[HIDDEN : 2 * HIDDEN] = 1.0  # torch's gate order: input, forget, cell, output
        nn.init.orthogonal_(self.action_embeddings.weight)
        self.action_embeddings.weight.mul_(0.1 / self.action_embeddings.weight.abs().max())
        bound = 1 / math.sqrt(512)
        nn.init.uniform_(self.actor_W, -bound, bound)
        nn.init.uniform_(self.actor_bias, -bound, bound)

    def initial_state(self, batch: int) -> State:
        """Zeros, (h, c) each [L, B, H]."""
        shape = (LSTM_LAYERS, batch, HIDDEN)
        return self.fc1.weight.new_zeros(shape), self.fc1.weight.new_zeros(shape)

    def step(self, obs: Tensor, is_first: Tensor, state: State | None = None) -> tuple[PolicyOutput, State]:
        """Act: one step of B rows. The returned state is detached.

        Args:
            obs: [B, *observation.shape], uint8 tokens or images, float32 vectors.
            is_first: bool [B]; where true the state is zeroed before the row is consumed.
            state: (h, c), each [L, B, H]; None is zeros.
        """
        x = self.encode(obs)
        core, (h, c) = step_lstm(self.lstm, x, is_first, state or self.initial_state(len(obs)))
        return self.heads(core), (h.detach(), c.detach())

    def unroll(
        self,
        obs: Tensor,
        is_first: Tensor,
        state: State | None = None,
        *,
        plan: FragmentPlan | None = None,
        return_state: bool = True,
    ) -> tuple[PolicyOutput, State | None]:
        """Train: T steps of B rows with resets inside, the same numbers as ``step`` T times.

        Args:
            obs: [T, B, *observation.shape].
            is_first: bool [T, B]; where true the state is zeroed before the row is consumed.
            state: (h, c) before row 0, each [L, B, H]; None is zeros.
            plan: ``plan_fragments(is_first)`` where the caller made it already (on a GPU that saves a synchronisation).
            return_state: whether the state after row T-1 is wanted; without it resets are cheaper on a CPU.
        """
        steps, batch = is_first.shape
        if plan is None:
            plan = plan_fragments(is_first.cpu().numpy()).to(obs.device)
        x = self.encode(obs.reshape(steps * batch, *self.observation.shape)).view(steps, batch, HIDDEN)
        core, state = unroll_lstm(
            self.lstm, x, plan, is_first[0], state or self.initial_state(batch), return_state=return_state
        )
        return self.heads(core), state

    def encode(self, obs: Tensor) -> Tensor:
        """[N, *observation.shape] -> [N, H]."""
        if isinstance(self.observation, VectorObservation):
            x = obs
        else:
            if isinstance(self.observation, TokenObservation):
                box = self.to_box(obs)
                x = F.pad(box, self._pad) if any(self._pad) else box
            else:
                x = obs.permute(0, 3, 1, 2).to(self.fc1.weight.dtype) / 255.0
            x = F.relu(_convolve(self.cnn2, F.relu(_convolve(self.cnn1, x)))).flatten(1)
        return F.relu(self.encoded_obs(F.relu(self.fc1(x))))

    def heads(self, core: Tensor) -> PolicyOutput:
        """[..., H] -> logits [..., A], value [...]."""
        value = self.value_head(torch.tanh(self.critic_1(core))).squeeze(-1)
        query = torch.tanh(F.relu(self.actor_1(core)) @ self.actor_W[0])
        logits = query @ self.action_embeddings.weight[self._rows].T + self.actor_bias
        if isinstance(self.actions, Continuous):
            logits = torch.cat([logits, self.actor_log_std.expand_as(logits)], -1)
        return PolicyOutput(logits, value)

    # Memory while acting: one state per training_env_id, no part of the weights (policy.memory).

    def act(self, obs: Tensor, training_env_ids: Sequence[int], is_first: Tensor) -> PolicyOutput:
        """``step`` with the state of each row kept here by its ``training_env_id`` (unknown ids start from zeros)."""
        output, state = self.step(obs, is_first, self.memory.read(training_env_ids))
        self.memory.write(training_env_ids, state)
        return output

    def has_memory(self) -> bool:
        """Whether the policy is recurrent."""
        return True

    def get_memory(self) -> dict[int, State]:
        """A copy of every state: (h, c), each [L, H], by ``training_env_id``."""
        return self.memory.get()

    def set_memory(self, states: Mapping[int, State]) -> None:
        """Replace all memory by ``states``, as ``get_memory`` gave them."""
        self.memory.set(states)

    def reset_memory(self, training_env_ids: Sequence[int] | None = None) -> None:
        """Zero the states of these ids; None forgets all of them."""
        self.memory.reset(training_env_ids)


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer(x)``; where the kernel covers its whole input, as the matrix product that it is, which costs a third."""
    if x.shape[-2:] != layer.kernel_size:
        return layer(x)
    return F.linear(x.flatten(1), layer.weight.flatten(1), layer.bias)[..., None, None]


def _embedding_rows(names: Sequence[str], table: int, recorded: Mapping[str, int] | None) -> dict[str, int]:
    if len(set(names)) != len(names):
        raise ValueError(f"action names must be unique, got {list(names)}")
    if len(names) > table:
        raise ValueError(
            f"{len(names)} actions do not fit {table} embedding rows; raise embedding_rows to {len(names)} or more"
        )
    if recorded is None:
        return {name: i for i, name in enumerate(names)}
    missing = [name for name in names if name not in recorded]
    if missing:
        raise ValueError(f"no embedding row is recorded for {missing}; recorded are {sorted(recorded)}")
    return {name: recorded[name] for name in names}


def _token_cnn(observation: TokenObservation, planes: int) -> tuple[nn.Conv2d, nn.Conv2d, tuple[int, ...], int]:
    """5x5 stride 3, then 3x3, as the original; zero columns and rows are added where the stride would drop cells."""
    height, width = observation.height, observation.width
    kernel1 = (min(5, height), min(5, width))
    pad = (0, -(width - kernel1[1]) % 3, 0, -(height - kernel1[0]) % 3)
    out1 = ((height + pad[3] - kernel1[0]) // 3 + 1, (width + pad[1] - kernel1[1]) // 3 + 1)
    kernel2 = (min(3, out1[0]), min(3, out1[1]))
    out2 = (out1[0] - kernel2[0] + 1) * (out1[1] - kernel2[1] + 1)
    return nn.Conv2d(planes, 64, kernel1, stride=3), nn.Conv2d(64, 64, kernel2), pad, 64 * out2


def _image_cnn(observation: ImageObservation) -> tuple[nn.Conv2d, nn.Conv2d, int]:
    """8x8 stride 4 and 4x4 stride 2 for pictures, 3x3 twice for small grids (smaller where the grid is)."""
    height, width = observation.height, observation.width
    large = min(height, width) >= 36
    kernel1, stride1, kernel2, stride2 = (8, 4, 4, 2) if large else (3, 1, 3, 1)
    sizes = []
    k1: list[int] = []
    k2: list[int] = []
    for size in (height, width):
        k1.append(min(kernel1, size))
        out1 = (size - k1[-1]) // stride1 + 1
        k2.append(min(kernel2, out1))
        sizes.append((out1 - k2[-1]) // stride2 + 1)
    cnn1 = nn.Conv2d(observation.channels, 64, (k1[0], k1[1]), stride=stride1)
    return cnn1, nn.Conv2d(64, 64, (k2[0], k2[1]), stride=stride2), 64 * sizes[0] * sizes[1]
