"""Settings of the policy, as plain data: importing them costs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from shoal.policy.graph import LSTM, ComponentConfig, check
from shoal.policy.observation import SMALL, ImageEncoder, chosen_encoder
from shoal.section import Named, Section


def malformed(mapping: Sequence[str]) -> list[str]:
    """The entries that are not ``ENVIRONMENT=TRAINED`` with something on one side at least."""
    return [entry for entry in mapping if "=" not in entry or entry == "="]


def _well_formed(entry: str) -> str:
    if malformed([entry]):
        raise ValueError("must be of the form ENVIRONMENT=TRAINED, where one side may be empty")
    return entry


OWN_KINDS = ("fast", "component")
"""The policies of this package; other kinds are named by their class."""
OWN_CORES = (LSTM, "gru", "linear")
"""The cores of this package; others are named by their class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialization(Section):
    """Initial weights."""

    lstm_bias: Literal["ones", "forget", "zeros"] = "zeros"
    """``ones``: every LSTM bias 1 (each gate starts at +2); ``forget``: 1 on the forget gate, else 0; ``zeros``."""
    action_embeddings: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Largest |w| of the action embeddings. The trunk's policy gradient passes through them: at the original's 0.1 it
    is a tenth, and the value's drowns it."""
    log_std: Annotated[float, Field(ge=-5, le=2)] = -0.7
    """Log standard deviation that continuous actions start with, where the bounds of an action lie at -1 and 1: at 0 a
    third of all actions would be clipped, at -0.7 a twentieth."""


ORIGINAL = Initialization(lstm_bias="ones", action_embeddings=0.1, log_std=0.0)
"""The original policies' initialization, which ``FastPolicy`` has unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig(Section):
    """The network."""

    kind: Annotated[str, Named(*OWN_KINDS, yours="a policy class of yours as package.module:Class")] = "fast"
    """``fast``: the network in plain PyTorch. ``component``: the same network put together from named components, which
    ``components`` change. Each loads the other's weights. ``package.module:Class``: a ``RecurrentPolicy`` of yours."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of a policy class of yours, as plain data."""
    core: Annotated[str, Named(*OWN_CORES, yours="a core class of yours as package.module:Class")] = LSTM
    """The memory. ``lstm``: two layers of LSTM. ``gru``: two layers of GRU. ``linear``: two gated linear recurrences
    with MLPs, trained by a parallel scan over time. ``package.module:Class``: a ``Core`` of yours."""
    core_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the core, as plain data: ``num_layers`` of this package's cores."""
    image_encoder: ImageEncoder | Mapping[str, ImageEncoder] = SMALL
    """What reads images. ``small``: two convolutions of 64 channels, whose kernels and strides are those of DQN's first
    two (8 and 4 pixels) where the shorter side has 36 pixels or more, and others for tiny and for large images.
    ``residual``: IMPALA's deep network, three sections of 16, 32 and 32 channels, which takes several times the time
    and the memory. Of a Dict or Tuple one for all images, or by name: ``{camera: residual}``, where images that are not
    named are read by ``small``."""
    components: Mapping[str, ComponentConfig | None] = dataclasses.field(default_factory=dict)
    """Components that are changed or added, by name; null takes one out. Only with kind ``component``."""
    embedding_rows: Annotated[int, Field(ge=1, le=2**20)] | Literal["auto"] = "auto"
    """Rows of the action embedding table: the most actions that a policy can have. ``auto``: 100, or the number of the
    environment's actions where that is larger; those of the checkpoint for a policy that goes on from one."""
    initialization: Initialization = dataclasses.field(default_factory=Initialization)
    normalize_observations: bool = True
    """The network sees vector observations in units of their own mean and spread, which the policy keeps as running
    statistics. Images and tokens have fixed ranges, and one-hot columns stay as they are."""
    map_features: Sequence[Annotated[str, AfterValidator(_well_formed)]] = dataclasses.field(default_factory=list)
    """``ENVIRONMENT=TRAINED`` for features that a resumed policy knows by another name; ``NAME=`` for one that it does
    not see, ``=NAME`` for one that is absent here."""
    map_actions: Sequence[Annotated[str, AfterValidator(_well_formed)]] = dataclasses.field(default_factory=list)
    """The same for actions; those of the environment cannot be left out."""

    def __post_init__(self) -> None:
        if self.kwargs and self.kind in OWN_KINDS:
            raise PydanticCustomError(
                "cross_field", "{kwargs}", {"kwargs": f"kwargs: the kind {self.kind} takes none; see policy.components"}
            )
        if self.image_encoder != SMALL and self.kind not in OWN_KINDS:
            problem = f"image_encoder: the kind {self.kind} makes its own network, which decides itself; leave it out"
            raise PydanticCustomError("cross_field", "{image_encoder}", {"image_encoder": problem})
        if not self.components:
            return
        if self.kind == "component":
            problems = check(self.components, self.core, self.image_encoder)
        else:
            what = "is one fixed network" if self.kind == "fast" else "makes its own network"
            problems = [f"components: the kind {self.kind} {what}; set policy.kind to component"]
        if problems:
            raise PydanticCustomError("cross_field", "{components}", {"components": "\n".join(problems)})

    def encoder_of(self, image: str) -> str:
        """What reads the image of that name, "" for the only one of an environment; "" where a class decides itself."""
        return chosen_encoder(self.image_encoder, image) if self.kind in OWN_KINDS else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularizationConfig(Section):
    """Weight clipping and the L2-init loss. Both are off by default, as in the original. A value head that is rescaled
    (learner.normalize_values) has neither: its weights follow the unit of the values.

    Names, in the overrides and in ``exclude``, are those of components (``lstm``) or of parameters
    (``lstm.weight_hh_l0``), or patterns of either (``cnn*``, ``*.weight``). Of several that match, the last counts.
    """

    clip_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Bound of each parameter, as a multiple of its largest |w| at initialisation; 0 turns clipping off."""
    clip_floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """No bound is smaller than this, so that parameters that start at zero can move."""
    clip_overrides: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = dataclasses.field(
        default_factory=dict
    )
    """Clip scale by name, in place of ``clip_scale``; 0 leaves the parameters alone. Where
    ``action_embeddings`` begin at 0.1 (``--config original``), logits stay within 1.6 times their scale: below 2 a
    policy cannot become sure of itself."""
    l2_init_coef: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of sum (w - w_init)^2 in the loss; 0 turns it off."""
    l2_init_overrides: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = dataclasses.field(
        default_factory=dict
    )
    """Factor on ``l2_init_coef`` by name; 0 leaves the parameters alone."""
    l2_init_reference_every: Annotated[int, Field(ge=0)] = 0
    """Every so many policy versions the present weights take the place of w_init in the loss, before that version is
    saved; clip bounds stay. 0 keeps the initial weights."""
    exclude: Sequence[str] = dataclasses.field(default_factory=lambda: ["*bias*", "*norm*", "*log_std*"])
    """Parameters that are neither clipped nor drawn to w_init. A bound on these changes what the network can say, not
    how well it goes on learning: a clipped log-std fixes the exploration."""
