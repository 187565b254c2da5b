"""Weight clipping to bounds set at initialisation, and the L2-init loss.

Clipping follows Elsayed et al. 2024, "Weight Clipping for Deep Continual and Reinforcement Learning": after every
optimizer step |w| <= clip_scale * max|w_init|. The loss is that of Kumar et al. 2023, "Maintaining Plasticity in
Continual Learning via Regenerative Regularization" (L2 Init): l2_init_coef * sum (w - w_init)^2. A value head that is
rescaled (``learner.normalize_values``) has neither.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from shoal.policy.config import RegularizationConfig
from torch import Tensor, nn


class WeightRegularizer:
    """Holds the initial weights w0 of one policy and their largest magnitudes; both go into every checkpoint.

    They are kept for all parameters, whatever the settings, so that a run may be resumed with other settings.

    Args:
        policy: the policy with its initial weights; its parameters are clipped in place and get the loss's gradient.
        config: the parameters to clip and those to pull towards w0.

    Raises:
        ValueError: a name in the settings matches no parameter that it could apply to.
    """

    def __init__(self, policy: nn.Module, config: RegularizationConfig) -> None:
        self._config = config
        self.parameters: dict[str, nn.Parameter] = dict(policy.named_parameters())
        self.reference: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}
        """w0 by parameter, the initial weights until ``update_l2_init_reference``."""
        largest = torch.stack([w0.abs().max() for w0 in self.reference.values()]).tolist()
        self._initial_max: dict[str, float] = dict(zip(self.parameters, largest, strict=True))
        # PopArt gives this layer the unit of the values, which moves; the initial weights' is another.
        rescaled = policy.value_head if getattr(policy, "value_scale", None) is not None else None
        head = {id(p) for p in rescaled.parameters()} if isinstance(rescaled, nn.Module) else set()
        free = [
            name
            for name, p in self.parameters.items()
            if id(p) not in head and not any(_matches(name, key) for key in config.exclude)
        ]
        _check_names(self.parameters, free, config)
        self._clip_scale = {
            name: scale for name in free if (scale := _lookup(config.clip_overrides, name, config.clip_scale)) > 0
        }
        self.l2_init_coefs: dict[str, float] = {
            name: coef
            for name in free
            if (coef := config.l2_init_coef * _lookup(config.l2_init_overrides, name, 1.0)) > 0
        }
        """Coefficient of sum (w - w0)^2 by parameter; those without one are not in the loss."""
        self.generation = 0
        """Rises whenever ``state_dict`` changes."""

    @property
    def bounds(self) -> dict[str, float]:
        """Largest |w| allowed, by parameter; those without a bound are not clipped."""
        floor = self._config.clip_floor
        return {name: max(scale * self._initial_max[name], floor) for name, scale in self._clip_scale.items()}

    @torch.no_grad()
    def clip_weights(self) -> None:
        """Clamp the parameters to their bounds; call after every optimizer step."""
        for name, bound in self.bounds.items():
            self.parameters[name].clamp_(-bound, bound)

    def l2_init_loss(self) -> Tensor | None:
        """Sum over parameters of coef * sum (w - w0)^2, with its gradient, 2 coef (w - w0); None if it is off."""
        terms = [
            coef * (self.parameters[name] - self.reference[name]).square().sum()
            for name, coef in self.l2_init_coefs.items()
        ]
        return torch.stack(terms).sum() if terms else None

    def end_update(self, policy_version: int) -> None:
        """Update the reference every ``l2_init_reference_every`` versions; call after the update to ``policy_version``.

        Versions, not updates of this process, are counted: a resumed run moves it when the uninterrupted one would.
        """
        every = self._config.l2_init_reference_every
        if every and policy_version % every == 0:
            self.update_l2_init_reference()

    @torch.no_grad()
    def update_l2_init_reference(self) -> None:
        """Set w0 of all parameters to the current weights. The bounds still follow from the initial weights."""
        self.generation += 1
        for name, p in self.parameters.items():
            self.reference[name].copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        """w0 and the initial magnitudes as tensors, for a checkpoint."""
        largest = {f"initial_max/{name}": torch.tensor(x, dtype=torch.float64) for name, x in self._initial_max.items()}
        return {**{f"reference/{name}": w0 for name, w0 in self.reference.items()}, **largest}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint's w0 and initial magnitudes; the bounds follow from these and the current settings.

        Raises:
            ValueError: those of a parameter are missing or have another shape; nothing was changed.
        """
        for name, w0 in self.reference.items():
            saved = state.get(f"reference/{name}")
            if saved is None or saved.shape != w0.shape or f"initial_max/{name}" not in state:
                found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise ValueError(
                    f"the checkpoint's initial weights do not fit this policy: expected shape {tuple(w0.shape)} for "
                    f"{name}, found {found}; resume with the settings and the version of shoal that saved it"
                )
        self.generation += 1
        for name, w0 in self.reference.items():
            w0.copy_(state[f"reference/{name}"])
            self._initial_max[name] = float(state[f"initial_max/{name}"])


def component(parameter_name: str) -> str:
    """``lstm`` of ``lstm.weight_ih_l0``; ``actor_W`` of ``actor_W``."""
    return parameter_name.split(".")[0]


def _matches(parameter: str, key: str) -> bool:
    return fnmatchcase(parameter, key) or fnmatchcase(component(parameter), key)


def _lookup(overrides: Mapping[str, float], parameter: str, default: float) -> float:
    for key, value in overrides.items():
        if _matches(parameter, key):
            default = value
    return default


def _check_names(parameters: Mapping[str, Tensor], free: list[str], config: RegularizationConfig) -> None:
    """A misspelt name must not leave a setting without effect; a pattern in ``exclude`` may match nothing."""
    components = sorted({component(name) for name in parameters})
    problems = []
    for field, keys, candidates in (
        ("clip_overrides", list(config.clip_overrides), free),
        ("l2_init_overrides", list(config.l2_init_overrides), free),
        ("exclude", [key for key in config.exclude if not set(key) & set("*?[")], list(parameters)),
    ):
        unknown = [key for key in keys if not any(_matches(name, key) for name in candidates)]
        if not unknown:
            continue
        if any(_matches(name, key) for name in parameters for key in unknown):
            hint = (
                f"regularization.exclude={list(config.exclude)}, or learner.normalize_values, which rescales the value "
                "head, leaves these out; change it to have them in"
            )
        else:
            close = difflib.get_close_matches(unknown[0], [*components, *parameters], n=1)
            hint = (f"did you mean {close[0]!r}? " if close else "") + f"The policy's components are {components}"
        problems.append(f"regularization.{field} names {unknown}, which is no parameter it applies to; {hint}")
    if problems:
        raise ValueError("\n".join(problems))
