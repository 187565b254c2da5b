"""Weight features: clipping to bounds set at initialisation, and the L2-init loss (Kumar et al. 2023, "L2 Init").

Clipping follows Elsayed et al. 2024 ("Weight Clipping"): after every optimizer step |w| <= scale * max|w_init|.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from policy.config import RegularizationConfig


class WeightRegularizer:
    """Holds the initial weights w0 and the bounds of one policy; both go into every checkpoint.

    Vectors (biases, norms' scales) and log standard deviations are excluded: a bound on them changes the function, not
    its plasticity (a clipped log-std silently fixes the exploration).

    Raises:
        ValueError: an override names no component of the policy.
    """

    def __init__(self, policy: nn.Module, config: RegularizationConfig) -> None:
        self._config = config
        self._parameters = {
            name: p
            for name, p in policy.named_parameters()
            if p.ndim > 1 and "log_std" not in name and "norm" not in name
        }
        components = {component(name) for name in self._parameters}
        for field in ("clip_overrides", "l2_init_overrides"):
            unknown = set(getattr(config, field)) - components
            if unknown:
                raise ValueError(f"{field} names {sorted(unknown)}; the policy's components are {sorted(components)}")
        self.reference: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.bounds: dict[str, float] = {
            name: max(scale * float(p.detach().abs().max()), config.clip_floor)
            for name, p in self._parameters.items()
            if (scale := config.clip_overrides.get(component(name), config.clip_scale)) > 0
        }

    @property
    def clips(self) -> bool:
        """Whether any component is clipped."""
        return bool(self.bounds)

    @torch.no_grad()
    def clip_weights(self) -> None:
        """Clamp to the bounds; after every optimizer step."""
        for name, bound in self.bounds.items():
            self._parameters[name].clamp_(-bound, bound)

    @torch.no_grad()
    def clipped_fraction(self) -> float:
        """Share of the bounded weights that lie on their bound."""
        on_bound = sum(int((self._parameters[name].abs() >= bound).sum()) for name, bound in self.bounds.items())
        total = sum(self._parameters[name].numel() for name in self.bounds)
        return on_bound / total if total else 0.0

    def l2_init_loss(self) -> Tensor | None:
        """coef * sum over components of factor * sum (w - w0)^2, with its gradient; None where it is off."""
        config = self._config
        terms = [
            factor * (p - self.reference[name]).square().sum()
            for name, p in self._parameters.items()
            if (factor := config.l2_init_overrides.get(component(name), 1.0)) > 0
        ]
        return config.l2_init_coef * torch.stack(terms).sum() if config.l2_init_coef and terms else None

    @torch.no_grad()
    def distance_to_init(self) -> float:
        """L2 distance of all regularised weights to their reference."""
        squares = [(p - self.reference[name]).square().sum() for name, p in self._parameters.items()]
        return float(torch.stack(squares).sum().sqrt())

    @torch.no_grad()
    def update_l2_init_reference(self) -> None:
        """Move the reference to the current weights."""
        for name, p in self._parameters.items():
            self.reference[name].copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        """Reference and bounds as tensors, for a checkpoint."""
        bounds = {f"bound/{name}": torch.tensor(bound, dtype=torch.float64) for name, bound in self.bounds.items()}
        return {**{f"reference/{name}": w0 for name, w0 in self.reference.items()}, **bounds}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's reference and the bounds of components that are still clipped."""
        for name, w0 in self.reference.items():
            w0.copy_(state[f"reference/{name}"])
        for name in self.bounds:
            if f"bound/{name}" in state:
                self.bounds[name] = float(state[f"bound/{name}"])


def component(parameter_name: str) -> str:
    """``lstm`` of ``lstm.weight_ih_l0``; ``actor_W`` of ``actor_W``."""
    return parameter_name.split(".")[0]
