"""The GRU core (Cho et al. 2014), whose unroll is one call per layer, equal to stepping with resets.

h' = (1 - z) n + z h, with n = tanh(W x + b + r (U h + b_h)). A step that empties the state (``policy.resets``) is one
in which an extra input drives the gates r and z to exactly 0. Its other inputs are zeros, and the bias b is the weight
of an input that is 1 in real steps alone: so n is exactly 0, and with it h' and every gradient through that step, that
of b too. What follows a row's last step is not looked at, so nothing needs to be held.
"""

# T time, B rows, K final rows, L layers, I inputs, H hidden

from __future__ import annotations

from collections.abc import Mapping

import torch
from shoal.policy.config import Initialization
from shoal.policy.core import LAYERS, Core
from shoal.policy.initialization import initialize_weight
from shoal.policy.precision import at_least_float32, without_autocast
from shoal.policy.resets import SATURATED, ResetPlan, State, zeroed
from torch import Tensor, nn


class GRUCore(Core, nn.GRU):
    """``torch.nn.GRU`` as a core; the state is ``h`` [L, H]. It computes in float32 also under autocast.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = LAYERS) -> None:
        nn.GRU.__init__(self, input_size, hidden_size, num_layers)

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """``h`` [L, H]."""
        return {"h": (self.num_layers, self.hidden_size)}

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: x [B, I], is_first bool [B], state [L, B, H] -> output [B, H], new state."""
        [h] = zeroed(state, is_first)
        layers = []
        with without_autocast(x.device):
            x = at_least_float32(x)
            for layer, parameters in enumerate(self.all_weights):
                x = torch.gru_cell(x, h[layer], *parameters)
                layers.append(x)
        return x, (torch.stack(layers),)

    def unroll(
        self, x: Tensor, plan: ResetPlan, is_first: Tensor, state: State, *, return_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """T steps of B rows with one call per layer; ``Core.unroll`` says what comes and goes."""
        with without_autocast(x.device):
            return self._unroll(at_least_float32(x), plan, is_first, state)

    def _unroll(self, x: Tensor, plan: ResetPlan, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        rows = is_first.shape[1]
        [h] = zeroed(state, is_first[0])
        if not plan.slots:
            y, last = self(x.view(-1, rows, x.shape[1]), h)
            return y.flatten(0, 1), (last,)
        y = x.new_zeros(plan.slots * rows, x.shape[1]).index_copy(0, plan.place, x).view(plan.slots, rows, -1)
        empty = plan.inserted[..., :1].to(x.dtype)
        extra = torch.cat([1 - empty, empty], 2)
        closed = x.new_tensor([-SATURATED, -SATURATED, 0.0]).repeat_interleave(self.hidden_size)
        candidate = x.new_tensor([0.0, 0.0, 1.0]).repeat_interleave(self.hidden_size)
        last = []
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self.all_weights):
            weights = [
                torch.cat([w_ih, torch.stack([b_ih * candidate, closed], 1)], 1),
                w_hh,
                b_ih * (1 - candidate),
                b_hh,
            ]
            start = h[layer : layer + 1]
            y, _ = torch.gru(torch.cat([y, extra], 2), start, weights, True, 1, 0.0, self.training, False, False)
            last.append(y.flatten(0, 1).index_select(0, plan.last))
        return y.flatten(0, 1).index_select(0, plan.place), (torch.stack(last),)

    def initialize(self, stream: torch.Generator, settings: Initialization) -> None:
        """Orthogonal weights, and biases of 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("weight"):
                    initialize_weight(parameter, stream)
                else:
                    parameter.zero_()
