"""The Fast network in plain torch, without anything of shoal: what every peer's adapter wraps.

Tokens -> box -> two convolutions -> fc1 -> encoded_obs -> 2-layer LSTM -> critic and bilinear actor head; 574,978
parameters. Vectors go into fc1 as they are; images go through two convolutions of their own. The peers run the LSTM in
their own way (that is how they handle resets): it is only held here. The first layer and the second convolution of
tokens are written as cheaply as shoal writes them: padding is dropped before the scatter, and a kernel that covers its
whole input is the matrix product that it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 25
WINDOW = 11
NUM_TOKENS = 200
NUM_ACTIONS = 5
HIDDEN = 128
LSTM_LAYERS = 2
NUM_PARAMETERS = 574_978
VECTOR_PARAMETERS = 489_794
"""Where observations are vectors: besides fc1's HIDDEN weights for each of their numbers."""
IMAGE_SHAPE = (4, 84, 84)
IMAGE_PARAMETERS = 1_235_394


class Encoder(nn.Module):
    """uint8 (or float, as some peers hand it over) [N, tokens, 3] -> [N, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn1 = nn.Conv2d(NUM_FEATURES, 64, 5, stride=3)
        self.cnn2 = nn.Conv2d(64, 64, 3)
        self.fc1 = nn.Linear(64, HIDDEN)
        self.encoded_obs = nn.Linear(HIDDEN, HIDDEN)
        for layer in (self.cnn1, self.cnn2, self.fc1, self.encoded_obs):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def box(self, obs: Tensor) -> Tensor:
        """[N, tokens, 3] -> float32 [N, NUM_FEATURES, WINDOW, WINDOW]."""
        rows, tokens_per_row = obs.shape[:2]
        size = NUM_FEATURES * WINDOW * WINDOW
        tokens = obs.reshape(-1, 3)
        position = (tokens[:, 0] != 0xFF).nonzero().squeeze(1)
        coordinate, feature, value = tokens.index_select(0, position).long().unbind(1)
        row, column = coordinate >> 4, coordinate & 15
        place = (feature * WINDOW + row) * WINDOW + column
        # Whatever has no place goes to one spare element behind the box.
        inside = (feature < NUM_FEATURES) & (row < WINDOW) & (column < WINDOW)
        place = torch.where(inside, place + position // tokens_per_row * size, rows * size)
        box = torch.zeros(rows * size + 1, device=obs.device)
        return box.scatter_(0, place, value / 255.0)[:-1].view(rows, NUM_FEATURES, WINDOW, WINDOW)

    def forward(self, obs: Tensor) -> Tensor:
        x = F.relu(self.cnn1(self.box(obs))).flatten(1)
        x = F.relu(F.linear(x, self.cnn2.weight.flatten(1), self.cnn2.bias))
        return F.relu(self.encoded_obs(F.relu(self.fc1(x))))


class VectorEncoder(nn.Module):
    """float32 [N, size] -> [N, HIDDEN]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, HIDDEN)
        self.encoded_obs = nn.Linear(HIDDEN, HIDDEN)
        for layer in (self.fc1, self.encoded_obs):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> Tensor:
        return F.relu(self.encoded_obs(F.relu(self.fc1(obs))))


class ImageEncoder(nn.Module):
    """uint8 (or float, as some peers hand it over) [N, 4, 84, 84] -> [N, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn1 = nn.Conv2d(IMAGE_SHAPE[0], 64, 8, stride=4)
        self.cnn2 = nn.Conv2d(64, 64, 4, stride=2)
        self.fc1 = nn.Linear(64 * 9 * 9, HIDDEN)
        self.encoded_obs = nn.Linear(HIDDEN, HIDDEN)
        for layer in (self.cnn1, self.cnn2, self.fc1, self.encoded_obs):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> Tensor:
        x = F.relu(self.cnn2(F.relu(self.cnn1(obs / 255.0)))).flatten(1)
        return F.relu(self.encoded_obs(F.relu(self.fc1(x))))


def make_encoder(shape: tuple[int, ...]) -> nn.Module:
    """For tokens, a vector or an image."""
    if len(shape) == 3:
        return ImageEncoder()
    return Encoder() if len(shape) == 2 else VectorEncoder(*shape)


class Critic(nn.Module):
    """[N, HIDDEN] -> [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.critic_1 = nn.Linear(HIDDEN, 1024)
        self.value_head = nn.Linear(1024, 1)
        nn.init.orthogonal_(self.critic_1.weight, math.sqrt(2))
        nn.init.orthogonal_(self.value_head.weight)
        nn.init.zeros_(self.critic_1.bias)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, core: Tensor) -> Tensor:
        return self.value_head(torch.tanh(self.critic_1(core)))


class Actor(nn.Module):
    """[N, HIDDEN] -> logits [N, num_actions]."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.actor_1 = nn.Linear(HIDDEN, 512)
        self.action_embeddings = nn.Embedding(100, 16)
        self.actor_W = nn.Parameter(torch.empty(1, 512, 16))
        self.actor_bias = nn.Parameter(torch.zeros(1))
        nn.init.orthogonal_(self.actor_1.weight)
        nn.init.zeros_(self.actor_1.bias)
        nn.init.orthogonal_(self.action_embeddings.weight)
        with torch.no_grad():
            self.action_embeddings.weight.mul_(0.1 / self.action_embeddings.weight.abs().max())
        nn.init.uniform_(self.actor_W, -1 / math.sqrt(512), 1 / math.sqrt(512))

    def forward(self, core: Tensor) -> Tensor:
        query = torch.tanh(F.relu(self.actor_1(core)) @ self.actor_W[0])
        return query @ self.action_embeddings.weight[: self.num_actions].T + self.actor_bias


class Network(nn.Module):
    """All parts together, for observations of ``shape``: tokens, a vector, or an image."""

    def __init__(self, shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        self.encoder = make_encoder(shape)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, num_layers=LSTM_LAYERS)
        self.critic = Critic()
        self.actor = Actor(num_actions)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        check_parameters(self, shape)


def check_parameters(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a module that does not train exactly the parameters of shoal's network for observations of ``shape``."""
    expected = {1: VECTOR_PARAMETERS + HIDDEN * shape[0], 2: NUM_PARAMETERS, 3: IMAGE_PARAMETERS}[len(shape)]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if trained != expected:
        raise RuntimeError(f"the network has {trained:,} trained parameters instead of {expected:,}")
