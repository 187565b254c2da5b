"""Core: the memory itself, between a policy's encoder and its heads (``policy.core``)."""

# T time, B rows, K final rows, L layers, I inputs, H hidden

from __future__ import annotations

from collections.abc import Mapping

import torch
from shoal.policy.config import Initialization
from shoal.policy.resets import ResetPlan, State
from torch import Tensor, nn

LAYERS = 2
"""Layers of this package's cores, unless ``policy.core_kwargs`` have ``num_layers``."""


class Core(nn.Module):
    """A recurrent layer, or several: inputs [N, I] to outputs [N, H], with a state of every environment.

    A subclass names its state in ``state_shapes`` and implements ``step``; ``unroll`` then steps through time, which is
    right and slow, until the subclass has a faster one that gives the same. No row may depend on another row, on
    chance, or on earlier calls. ``policy.core=package.module:Class`` constructs it with (input_size, hidden_size) and
    ``policy.core_kwargs``.

    Args:
        input_size: I.
        hidden_size: H.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors of one environment's state: shape by name, of two or more dimensions, the first of them layers.

        In trajectories they are the columns ``initial_<name>``, in float32.
        """
        raise NotImplementedError

    def initial_state(self, batch: int) -> State:
        """Zeros: each tensor of the state as [L, B, ...]. A core that begins episodes with another state puts it there
        in ``step``, where ``is_first`` is set."""
        parameter = next(self.parameters())
        return tuple(parameter.new_zeros(layers, batch, *rest) for layers, *rest in self.state_shapes.values())

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        """One step of B rows.

        Args:
            x: [B, I].
            is_first: bool [B]; where true, the state counts as zeros, whatever it is (``policy.resets.zeroed``).
            state: each [L, B, ...].

        Returns:
            The output [B, H] and the state after the step, in the dtype that it came in.
        """
        raise NotImplementedError

    def unroll(
        self, x: Tensor, plan: ResetPlan, is_first: Tensor, state: State, *, return_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """T steps of B rows with resets inside; equal to ``step`` called T times.

        Args:
            x: [T * B + K, I]: the steps in time-major order, and the final rows behind them.
            plan: ``plan_resets(is_first, final)``. Final row k follows step ``plan.final[k]``; nothing follows it.
            is_first: bool [T, B] on the device of ``x``.
            state: before row 0, each [L, B, ...].
            return_state: return the state after row T-1, which may otherwise be None.

        Returns:
            The outputs [T * B + K, H] in the order of ``x``, and the state.
        """
        outputs, states = [], []
        for t, flags in enumerate(is_first):
            y, state = self.step(x[t * len(flags) : (t + 1) * len(flags)], flags, state)
            outputs.append(y)
            states.append(state)
        if len(plan.final):
            before = tuple(torch.cat(parts, 1).index_select(1, plan.final) for parts in zip(*states, strict=True))
            none = is_first.new_zeros(len(plan.final))
            outputs.append(self.step(x[is_first.numel() :], none, before)[0])
        return torch.cat(outputs), state

    def initialize(self, stream: torch.Generator, settings: Initialization) -> None:
        """Draw fresh weights from ``stream``.

        A core without an initialization of its own keeps what its constructor drew.
        """
