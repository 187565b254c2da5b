"""The LSTM core, whose unroll is one call per layer, equal to stepping with the state zeroed at ``is_first``.

A step that empties the LSTM (``policy.resets``) is one in which an extra input drives the input, forget and output
gates to exactly 0, so c, h and every gradient through that step are 0. In one that holds it, the forget gate is exactly
1 and the input gate exactly 0, so c does not change. Stepping is used instead if resets nearly double the steps of many
rows.
"""

# T time, B rows, K final rows, L layers, I inputs, H hidden

from __future__ import annotations

from collections.abc import Mapping

import torch
from shoal.policy.config import Initialization
from shoal.policy.core import LAYERS, Core
from shoal.policy.initialization import initialize_lstm
from shoal.policy.resets import SATURATED, ResetPlan, State, zeroed
from torch import Tensor, nn

# With more inserted steps than this in that many rows, stepping is cheaper on a CPU in float32 (bench kernels).
LOOP_FROM, LOOP_ROWS = 1.7, 64
_EMPTY, _HOLD = (-1.0, -1.0, 0.0, -1.0), (-1.0, 1.0, 0.0, -1.0)
"""Signs added to the input, forget, cell and output gates by the two kinds of inserted steps."""


class LSTMCore(Core, nn.LSTM):
    """``torch.nn.LSTM`` as a core, with its parameters' names; the state is ``h`` and ``c``, each [L, H].

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = LAYERS) -> None:
        nn.LSTM.__init__(self, input_size, hidden_size, num_layers)

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """``h`` and ``c``, each [L, H]."""
        shape = (self.num_layers, self.hidden_size)
        return {"h": shape, "c": shape}

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: x [B, I], is_first bool [B], state [L, B, H] -> output [B, H], new state."""
        h, c = zeroed(state, is_first)
        # Cell by cell: for one step nn.LSTM spends half its time on preparing weights for more.
        layers = []
        for layer, parameters in enumerate(self.all_weights):
            layers.append(torch.lstm_cell(x, (h[layer], c[layer]), *parameters))
            x = layers[-1][0]
        return x, (torch.stack([h for h, _ in layers]), torch.stack([c for _, c in layers]))

    def unroll(
        self, x: Tensor, plan: ResetPlan, is_first: Tensor, state: State, *, return_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """T steps of B rows with one call per layer; ``Core.unroll`` says what comes and goes."""
        steps, rows = is_first.shape
        few_slots = plan.slots <= LOOP_FROM * steps or rows < LOOP_ROWS
        if not few_slots and x.dtype != torch.bfloat16 and x.device.type == "cpu":
            return super().unroll(x, plan, is_first, state)
        h, c = zeroed(state, is_first[0])
        if not plan.slots:
            y, last = self(x.view(-1, rows, x.shape[1]), (h, c))
            return y.flatten(0, 1), last if return_state else None
        y = x.new_zeros(plan.slots * rows, x.shape[1]).index_copy(0, plan.place, x).view(plan.slots, rows, -1)
        inserted = plan.inserted.to(x.dtype)
        # [4 H, 2]
        gates = SATURATED * torch.tensor((_EMPTY, _HOLD), device=x.device).T.repeat_interleave(self.hidden_size, 0)
        outputs, cells = [], []
        for layer, (w_ih, *others) in enumerate(self.all_weights):
            weights = [torch.cat([w_ih, gates.to(w_ih.dtype)], 1), *others]
            start = [part[layer : layer + 1] for part in (h, c)]
            x = torch.cat([y, inserted], 2)
            y, _, cell = torch.lstm(x, start, weights, True, 1, 0.0, self.training, False, False)
            outputs.append(y.flatten(0, 1))
            cells.append(cell)
        last_state = None
        if return_state:
            last_state = (torch.stack([y.index_select(0, plan.last) for y in outputs]), torch.cat(cells))
        return outputs[-1].index_select(0, plan.place), last_state

    def initialize(
        self,
        stream: torch.Generator,
        settings: Initialization,
        *,
        scheme: str = "orthogonal",
        gain: float = 1.0,
    ) -> None:
        """Weights by ``scheme``, biases by ``settings.lstm_bias``."""
        initialize_lstm(self, stream, bias=settings.lstm_bias, scheme=scheme, gain=gain)


def as_core(lstm: nn.LSTM) -> LSTMCore:
    """The same object as a core: its parameters stay, methods are added.

    Raises:
        ValueError: it is one that steps and unrolls do not compute.
    """
    if lstm.batch_first or lstm.bidirectional or lstm.proj_size or lstm.dropout or not lstm.bias:
        raise ValueError(
            "self.lstm must be time-major, with biases, and without dropout, projection and a second direction"
        )
    lstm.__class__ = LSTMCore
    assert isinstance(lstm, LSTMCore)
    return lstm
