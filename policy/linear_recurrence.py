"""The linear core: gated diagonal linear recurrences, unrolled by a parallel scan over time.

Each layer is a block of Griffin (De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention for
Efficient Language Models", without its convolution): a real-gated linear recurrent unit (RG-LRU) whose output is gated
by a GeLU branch, then an MLP, both residual. The state is linear in the state before, element by element,

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t v_t),    a_t = exp(-8 softplus(decay) r_t),

where v_t, and the gates r_t and i_t in (0, 1), depend on the input alone. So T steps are a scan of an associative
operation (Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length"), which takes
log2(T) passes by doubling (Hillis and Steele 1986). At a reset a_t is exactly 0: nothing crosses it, and no gradient.
As 0 <= a_t < 1, products of them need no logarithms to stay in range.
"""

# T time, B rows, K final rows, N = T * B + K, L layers, I inputs, H hidden

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from shoal.policy.config import Initialization
from shoal.policy.core import LAYERS, Core
from shoal.policy.initialization import initialize_layer, initialize_weight
from shoal.policy.precision import at_least_float32
from shoal.policy.resets import ResetPlan, State, zeroed
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

SHARPNESS = 8.0
"""The factor of the exponent, Griffin's c."""
SLOWEST, FASTEST = 0.999, 0.9
"""a_t that layers start with between, where r_t is 1."""
_LEAST = 1e-6
"""1 - a_t^2 is no smaller: the slope of its root is finite where a gate is closed."""


class LinearCore(Core):
    """Gated linear recurrences with MLPs between them; the state is ``h`` [L, H], in float32 also under autocast.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = LAYERS) -> None:
        super().__init__(input_size, hidden_size)
        self.embed = nn.Linear(input_size, hidden_size)
        # mypy takes the layers of a list for any modules.
        self.layers = cast("Sequence[_Layer]", nn.ModuleList(_Layer(hidden_size) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(hidden_size)

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """``h`` [L, H]."""
        return {"h": (len(self.layers), self.hidden_size)}

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: x [B, I], is_first bool [B], state [L, B, H] -> output [B, H], new state."""
        [h] = zeroed(state, is_first)
        x, after = self.embed(x), []
        for layer, before in zip(self.layers, h, strict=True):
            a, b, gate = layer.gates(x)
            after.append(torch.addcmul(b, a, before))
            x = layer.mix(x, after[-1], gate)
        return self.norm(x), (torch.stack(after),)

    def unroll(
        self, x: Tensor, plan: ResetPlan, is_first: Tensor, state: State, *, return_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """T steps of B rows with one scan per layer; ``Core.unroll`` says what comes and goes."""
        count = is_first.numel()
        [h] = zeroed(state, is_first[0])
        x, last = self.embed(x), []
        for layer, before in zip(self.layers, h, strict=True):
            a, b, gate = layer.gates(x)
            after = scan(
                a[:count].unflatten(0, is_first.shape).masked_fill(is_first[..., None], 0.0),
                b[:count].unflatten(0, is_first.shape),
                before,
            )
            last.append(after[-1])
            after = after.flatten(0, 1)
            if len(plan.final):
                final = torch.addcmul(b[count:], a[count:], after.index_select(0, plan.final))
                after = torch.cat([after, final])
            x = layer.mix(x, after, gate)
        return self.norm(x), (torch.stack(last),)

    def initialize(self, stream: torch.Generator, settings: Initialization) -> None:
        """Orthogonal weights, biases of 0, and decays as at construction."""
        initialize_layer(self.embed, stream)
        for layer in self.layers:
            layer.initialize(stream)


class _Layer(nn.Module):
    """A recurrence and an MLP, both residual."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm_recurrence = nn.LayerNorm(size)
        self.project = nn.Linear(size, 4 * size)
        """v, r, i and the gate of the output."""
        # A bias by its place in the formula, and to regularization, which leaves biases alone.
        self.decay_bias = nn.Parameter(torch.empty(size))
        self.out = nn.Linear(size, size)
        self.norm_mlp = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)
        self._draw_decays(None)

    @torch.no_grad()
    def _draw_decays(self, stream: torch.Generator | None) -> None:
        """a_t^2 uniform in [0.9^2, 0.999^2] where r_t is 1."""
        a = self.decay_bias.uniform_(FASTEST**2, SLOWEST**2, generator=stream).sqrt()
        self.decay_bias.copy_((-a.log() / SHARPNESS).expm1().log())

    def initialize(self, stream: torch.Generator) -> None:
        """Fresh weights."""
        for part in (self.out, self.up, self.down):
            initialize_layer(part, stream)
        with torch.no_grad():
            for block in self.project.weight.chunk(4):
                initialize_weight(block, stream)
            self.project.bias.zero_()
        self._draw_decays(stream)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H] -> a and b of h_t = a h_{t-1} + b, and the gate of the output, [N, H] each, in float32 or wider."""
        v, r, i, gate = at_least_float32(self.project(self.norm_recurrence(x))).chunk(4, 1)
        log_a = -SHARPNESS * F.softplus(self.decay_bias) * r.sigmoid()
        scale = (-torch.expm1(2 * log_a)).clamp(min=_LEAST).sqrt()
        return log_a.exp(), scale * i.sigmoid() * v, F.gelu(gate)

    def mix(self, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        """The layer's input, state and gate, [N, H] each -> its output [N, H]."""
        x = x + self.out(h * gate)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


def scan(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """h [T, ...] of h_t = a_t h_{t-1} + b_t, elementwise, with h_{-1} = ``before`` [...]; a and b are [T, ...]."""
    b = torch.cat([torch.addcmul(b[0], a[0], before)[None], b[1:]])
    h: Tensor = _Scan.apply(a, b)
    return h


class _Scan(torch.autograd.Function):
    """``scan`` from zeros. Its gradient is a scan backwards, so that only a and h are kept of all passes."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        """[T, ...] each -> h [T, ...]."""
        h = _doubling(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """dh_t = grad_t + a_{t+1} dh_{t+1}; da_t = dh_t h_{t-1}, db_t = dh_t."""
        a, h = ctx.saved_tensors  # type: ignore[attr-defined]
        nothing = torch.zeros_like(a[:1])
        later = torch.cat([a[1:], nothing])
        dh = _doubling(later.flip(0), grad.flip(0)).flip(0)
        return dh * torch.cat([nothing, h[:-1]]), dh


def _doubling(a: Tensor, b: Tensor) -> Tensor:
    """h [T, ...] of h_t = a_t h_{t-1} + b_t from zeros. After each pass, row t has what twice as many rows up to it
    make of the state before them: a h + b."""
    a, h = a.clone(), b.clone()
    reach = 1
    while reach < len(a):
        h[reach:] = torch.addcmul(h[reach:], a[reach:], h[:-reach])
        a[reach:] = a[reach:] * a[:-reach]
        reach *= 2
    return h
