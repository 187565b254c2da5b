"""The components of a network and their connections, as plain data: checked without importing torch.

The default graph is ``FastPolicy``'s network; settings change its components by name, add others or take some out. A
component reads its ``sources``: other components, or ``obs`` (of a Dict with images its numbers, and ``obs[KEY]`` an
image). The memory is the component ``lstm``, or ``core`` where ``policy.core`` is another than the LSTM. All components
that it needs are the encoder; the rest are the heads, which end in ``actor`` and ``value_head``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from shoal.policy.observation import (
    RESIDUAL,
    SMALL,
    DictObservation,
    EncoderChoice,
    ImageObservation,
    Observation,
    TokenObservation,
    VectorObservation,
    chosen_encoder,
    encoded_by,
)
from shoal.section import Section

OBS = "obs"
LSTM, CORE, EMBEDDINGS, ACTOR, VALUE = "lstm", "core", "action_embeddings", "actor", "value_head"

# Keys that RecurrentPolicy.forward reads or writes beside the components', and parameters of the actor.
RESERVED = frozenset(
    (
        *(OBS, "is_first", "initial_h", "initial_c", "training_env_id"),
        *("bptt", "batch", "logits", "value", "next_h", "next_c"),
        *("actor_bias", "actor_log_std"),
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentConfig(Section):
    """One component of ``policy.kind=component``. What is not set stays as in the default graph, or
    as is usual for the kind."""

    kind: str | None = None
    """``linear``, ``conv``, ``normalize``, ``tokens_to_box``, ``image_to_box``, ``residual`` (a section of IMPALA's
    residual network: a convolution, max pooling that halves the sides, two residual blocks); ``lstm``, ``core``,
    ``embedding`` and ``bilinear`` for the components that have these already."""
    sources: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Components that it reads, or ``obs``; of a Dict with images that is its numbers, and ``obs[KEY]`` an image. A
    ``linear`` component reads several side by side."""
    size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Outputs: features, channels, or the hidden size of the memory."""
    kernel: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Height and width of a ``conv``'s kernel; it is smaller where the box is."""
    stride: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Stride of a ``conv``."""
    activation: Literal["relu", "tanh", "none"] | None = None
    initialization: Literal["orthogonal", "orthogonal_max", "uniform", "zeros"] | None = None
    """Distribution of the initial weights. Biases start at 0, but for the LSTM's (``policy.initialization.lstm_bias``)
    and a uniform actor's."""
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """``orthogonal``: a factor; ``orthogonal_max``: the largest |w|; ``uniform``: |w| <= gain / sqrt(inputs)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One component with every setting decided; ``ComponentConfig`` says what they mean."""

    kind: str
    sources: tuple[str, ...] = ()
    size: int = 0
    kernel: int = 0
    stride: int = 0
    activation: str = "none"
    initialization: str = "orthogonal"
    gain: float = 1.0


class Kind(NamedTuple):
    """The types that a kind of component takes and gives."""

    reads: tuple[tuple[str, ...], ...]
    """The types allowed of each source."""
    gives: str
    """The type of its output."""
    new: Mapping[str, Any] = {}
    """The settings it has, with their values where the default graph gives none."""
    any_number: bool = False
    """It reads one or more sources, side by side, instead of exactly one."""


_WEIGHTS = {"initialization": "orthogonal", "gain": 1.0}
KINDS: Mapping[str, Kind] = {
    "tokens_to_box": Kind((("tokens",),), "raw box"),
    "image_to_box": Kind((("image",),), "raw box"),
    "normalize": Kind((("raw box",),), "box"),
    "conv": Kind(
        (("raw box", "box"),), "box", {"size": 64, "kernel": 3, "stride": 1, "activation": "relu", **_WEIGHTS}
    ),
    "residual": Kind((("raw box", "box"),), "box", {"size": 32, "activation": "none", **_WEIGHTS}),
    "linear": Kind(
        (("vector", "box", "raw box"),), "vector", {"size": 128, "activation": "relu", **_WEIGHTS}, any_number=True
    ),
    LSTM: Kind((("vector",),), "vector", {"size": 128, **_WEIGHTS}),
    CORE: Kind((("vector",),), "vector", {"size": 128}),
    "embedding": Kind((), "table", {"size": 16, "initialization": "orthogonal_max", "gain": 0.1}),
    "bilinear": Kind((("vector",), ("table",)), "logits", {"initialization": "uniform", "gain": 1.0}),
}
# There is one of each of these, and the rest of the program knows it by its name.
_NAMED = {LSTM: LSTM, CORE: CORE, "embedding": EMBEDDINGS, "bilinear": ACTOR}


def image_source(name: str) -> str:
    """What components name as the source of a Dict's image."""
    return f"{OBS}[{name}]"


def inputs_of(observation: Observation) -> dict[str, str]:
    """The sources that are no components, with their types: ``obs``, which is a Dict's numbers, and its images."""
    if isinstance(observation, DictObservation):
        return {OBS: "vector", **{image_source(name): "raw box" for name, _ in observation.images}}
    return {
        OBS: {TokenObservation: "tokens", ImageObservation: "image", VectorObservation: "vector"}[type(observation)]
    }


def cnn_kernels(observation: TokenObservation | ImageObservation) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride) of cnn1 and of cnn2: the original's for tokens, an image's own."""
    if isinstance(observation, ImageObservation):
        first, second = observation.kernels or ()
        return first, second
    return (5, 3), (3, 1)


SECTIONS: Mapping[str, int] = {"section1": 16, "section2": 32, "section3": 32}
"""Channels of the sections of IMPALA's residual network (Espeholt et al. 2018, figure 3, right)."""


def _convolutions(observation: TokenObservation | ImageObservation, source: str, prefix: str) -> dict[str, Component]:
    """What reads the box of ``source``, in a row; names are behind ``prefix``."""
    if isinstance(observation, ImageObservation) and observation.encoder == RESIDUAL:
        layers = {name: Component(kind="residual", size=size) for name, size in SECTIONS.items()}
    else:
        layers = {
            name: Component(kind="conv", size=64, kernel=kernel, stride=stride)
            for name, (kernel, stride) in zip(("cnn1", "cnn2"), cnn_kernels(observation), strict=True)
        }
    found: dict[str, Component] = {}
    for name, layer in layers.items():
        # The sum that a section gives goes into the next one as it is.
        activation = "none" if layer.kind == "residual" and name != [*layers][-1] else "relu"
        found[f"{prefix}{name}"] = dataclasses.replace(layer, sources=(source,), activation=activation)
        source = f"{prefix}{name}"
    return found


def core_component(core: str) -> str:
    """The name, and the kind, of the component that is the memory, for a value of ``policy.core``."""
    return LSTM if core == LSTM else CORE


def core_of(graph: Mapping[str, Component]) -> str:
    """The name of the component that is the memory."""
    return LSTM if LSTM in graph else CORE


def default_graph(observation: Observation, core: str = LSTM) -> dict[str, Component]:
    """``FastPolicy``'s network for such observations, in the order of its parameters."""
    memory = core_component(core)
    graph: dict[str, Component] = {}
    features: tuple[str, ...] = (OBS,)
    if isinstance(observation, DictObservation):
        features = (OBS,) * bool(observation.numbers.size)
        for index, (name, image) in enumerate(observation.images):
            prefix = f"image{index}_"
            graph[f"{prefix}normalizer"] = Component(kind="normalize", sources=(image_source(name),))
            graph |= _convolutions(image, f"{prefix}normalizer", prefix)
            features = (*features, [*graph][-1])
    elif not isinstance(observation, VectorObservation):
        shaper = "tokens_to_box" if isinstance(observation, TokenObservation) else "image_to_box"
        graph = {
            "obs_shaper": Component(kind=shaper, sources=(OBS,)),
            "obs_normalizer": Component(kind="normalize", sources=("obs_shaper",)),
            **_convolutions(observation, "obs_normalizer", ""),
        }
        features = ([*graph][-1],)
    return {
        **graph,
        "fc1": Component(kind="linear", sources=features, size=128, activation="relu"),
        "encoded_obs": Component(kind="linear", sources=("fc1",), size=128, activation="relu"),
        memory: Component(kind=memory, sources=("encoded_obs",), size=128),
        "critic_1": Component(kind="linear", sources=(memory,), size=1024, activation="tanh", gain=math.sqrt(2)),
        VALUE: Component(kind="linear", sources=("critic_1",), size=1),
        "actor_1": Component(kind="linear", sources=(memory,), size=512, activation="relu"),
        EMBEDDINGS: Component(kind="embedding", size=16, initialization="orthogonal_max", gain=0.1),
        ACTOR: Component(kind="bilinear", sources=("actor_1", EMBEDDINGS), initialization="uniform"),
    }


def resolve(
    components: Mapping[str, ComponentConfig | None], observation: Observation, core: str = LSTM
) -> dict[str, Component]:
    """The default graph for ``observation`` and ``policy.core`` with ``components`` put in.

    In the order of the default graph, then by name, however the settings are ordered: it is that of the parameters.

    Raises:
        ValueError: all problems, a line each, beginning with ``components.NAME``.
    """
    graph, problems = _merge(components, default_graph(observation, core), inputs_of(observation))
    problems += _connections(graph, observation) if graph else []
    if problems:
        raise ValueError("\n".join(problems))
    return graph


def check(
    components: Mapping[str, ComponentConfig | None],
    core: str = LSTM,
    image_encoder: EncoderChoice = SMALL,
) -> list[str]:
    """The problems that ``components`` have for every sort of observation; none where they fit some sort."""
    # What depends on the numbers in these is not checked here.
    image = encoded_by(ImageObservation(64, 64, 3), image_encoder)
    images = _dict_for(components, image_encoder)
    sorts = (TokenObservation(11, 11, 200, [1.0]), image, VectorObservation(1), images)
    found = []
    for observation in sorts:
        graph, problems = _merge(components, default_graph(observation, core), inputs_of(observation))
        problems += _connections(graph, observation) if graph else []
        # The sort that was meant is the one that the components go furthest with.
        found.append((not graph, len(problems), problems))
    return min(found, key=lambda each: each[:2])[2]


def _dict_for(components: Mapping[str, ComponentConfig | None], choice: EncoderChoice) -> DictObservation:
    """A Dict with the images that ``components`` speak of, by name or by number.

    Which number a name has is not known. Where both encoders are chosen, components of an image tell its own.
    """
    sources = [source for settings in components.values() for source in (settings and settings.sources) or ()]
    names = [found[1] for source in dict.fromkeys(sources) if (found := re.fullmatch(rf"{OBS}\[(.*)\]", source))]
    numbers = [int(found[1]) for name in components if (found := re.match(r"image(\d{1,2})_", name))]
    # Names that nobody chooses, and that read well in a message.
    names += [f"<key {index}>" for index in range(len(names), max([0, *numbers]) + 1)]
    spoken_of = {*components, *sources}
    images = []
    for index, name in enumerate(names):
        encoder = chosen_encoder(choice, name)
        if not isinstance(choice, str) and RESIDUAL in choice.values():
            own = {one.removeprefix(f"image{index}_") for one in spoken_of if one.startswith(f"image{index}_")}
            encoder = RESIDUAL if own & {*SECTIONS} else SMALL if own & {"cnn1", "cnn2"} else encoder
        images.append((name, ImageObservation(64, 64, 3, encoder=encoder)))
    return DictObservation(VectorObservation(1), images)


def encoder_of(graph: Mapping[str, Component]) -> list[str]:
    """Everything that the memory needs, each after its sources."""
    return _needed(graph, graph[core_of(graph)].sources)


def heads_of(graph: Mapping[str, Component]) -> list[str]:
    """Everything that reads the memory, and the embeddings, each after its sources."""
    return _needed(graph, (VALUE, ACTOR), core_of(graph))


def actor_of(graph: Mapping[str, Component]) -> list[str]:
    """The components of ``heads_of`` that the actions' logits need, each after its sources."""
    return _needed(graph, (ACTOR,), core_of(graph))


def differences(one: Mapping[str, Component], other: Mapping[str, Component]) -> list[str]:
    """Names of the components that compute something else, in either; where weights start does not count."""

    def computation(component: Component | None) -> Component | None:
        return component and dataclasses.replace(component, initialization="", gain=0.0)

    return [name for name in {**one, **other} if computation(one.get(name)) != computation(other.get(name))]


def components_to_json(components: Mapping[str, ComponentConfig | None]) -> dict[str, dict[str, Any] | None]:
    """Plain data: only what is set."""
    found: dict[str, dict[str, Any] | None] = {}
    for name, settings in components.items():
        data = None if settings is None else {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
        if data and "sources" in data:
            data["sources"] = list(data["sources"])
        found[name] = data
    return found


def components_from_json(data: Mapping[str, Mapping[str, Any] | None]) -> dict[str, ComponentConfig | None]:
    """The inverse of ``components_to_json``.

    Raises:
        ValueError: all unknown settings and bad values of a component, a line each, beginning with ``components.NAME``.
    """
    found: dict[str, ComponentConfig | None] = {}
    for name, settings in data.items():
        try:
            found[name] = None if settings is None else ComponentConfig(**settings)
        except ValidationError as error:
            problems = [(".".join(map(str, each["loc"])), each["msg"], each["input"]) for each in error.errors()]
            lines = [f"components.{name}.{setting}: {message} (got {value!r})" for setting, message, value in problems]
            raise ValueError("\n".join(lines)) from error
    return found


def _merge(
    components: Mapping[str, ComponentConfig | None], default: dict[str, Component], inputs: Iterable[str]
) -> tuple[dict[str, Component], list[str]]:
    """The graph, or none where a component is not even known well enough to look at its connections."""
    problems: list[str] = []
    graph = dict(default)
    for name in sorted(components, key=lambda name: (name not in default, name)):
        settings = components[name]
        if settings is None:
            if graph.pop(name, None) is None:
                problems.append(f"components.{name}: there is none to take out; there are {_listed(default)}")
        elif name not in default and name in (LSTM, CORE):
            problems.append(f"components.{name}: policy.core makes the memory another component, {core_of(default)}")
        elif name not in default and (why := _bad_name(name)):
            problems.append(f"components.{name}: {why}")
        else:
            component, found = _decide(name, settings, default)
            problems += found
            if component is not None:
                graph[name] = component
    for name in (core_of(default), ACTOR, VALUE):
        if name not in graph:
            problems.append(f"components.{name}: cannot be taken out")
    if problems:
        known = [*inputs, *default, *(name for name in components if name not in default)]
        problems += [
            _unknown_source(name, source, known)
            for name, settings in components.items()
            for source in (settings and settings.sources) or ()
            if source not in known
        ]
    return ({} if problems else graph), problems


def _unknown_source(name: str, source: str, known: Sequence[str]) -> str:
    return f"components.{name}.sources: {source!r} is unknown; there are {_listed(known, source)}"


def _bad_name(name: str) -> str | None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return "a name is a lower-case letter, then lower-case letters, digits and underscores"
    return "the name is taken; choose another" if name in RESERVED else None


def _decide(
    name: str, settings: ComponentConfig, defaults: Mapping[str, Component]
) -> tuple[Component | None, list[str]]:
    given = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    default = defaults.get(name)
    kind = given.pop("kind", default.kind if default else None)
    path = f"components.{name}"
    if kind is None:
        close = difflib.get_close_matches(name, defaults, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        return None, [f"{path}: a new component needs a kind, one of {', '.join(KINDS)}{meant}"]
    if kind not in KINDS:
        return None, [f"{path}.kind: {kind!r} is unknown; there are {_listed(KINDS, kind)}"]
    owner = _NAMED.get(kind)
    if owner not in (None, name) or (name in _NAMED.values() and owner != name):
        named = ", ".join(f"{name} ({kind})" for kind, name in _NAMED.items() if name in defaults)
        return None, [f"{path}.kind: {kind} does not go by this name; of these kinds there is one each: {named}"]
    problems = [
        f"{path}.{key}: a component of kind {kind} has no such setting; it has {_listed(['sources', *KINDS[kind].new])}"
        for key in given
        if key != "sources" and key not in KINDS[kind].new
    ]
    if name == VALUE and given.get("size", 1) != 1:
        problems.append(f"{path}.size: a value is one number, got {given['size']}")
    if problems:
        return None, problems
    if default is not None and default.kind == kind:
        return dataclasses.replace(default, **given), []
    return Component(kind=kind, **{**KINDS[kind].new, "sources": (), **given}), []


def _connections(graph: Mapping[str, Component], observation: Observation) -> list[str]:
    problems = [
        _unknown_source(name, source, [*inputs_of(observation), *graph])
        for name, component in graph.items()
        for source in component.sources
        if source not in graph and source not in inputs_of(observation)
    ]
    problems += [f"components.{cycle[0]}.sources: a cycle, {' reads '.join(cycle)}" for cycle in _cycles(graph)]
    if problems:  # more would follow from these
        return problems
    return _types(graph, observation) or _sides(graph)


def _types(graph: Mapping[str, Component], observation: Observation) -> list[str]:
    given = {**inputs_of(observation), **{name: KINDS[component.kind].gives for name, component in graph.items()}}
    problems = []
    for name, component in graph.items():
        kind, sources = KINDS[component.kind], component.sources
        reads = kind.reads * len(sources) if kind.any_number and sources else kind.reads
        wanted = " and ".join(" or ".join(types) for types in reads)
        if len(sources) != len(reads):
            problems.append(
                f"components.{name}.sources: a component of kind {component.kind} reads {wanted or 'nothing'}, "
                f"got {list(sources)}"
            )
            continue
        problems += [
            f"components.{name}.sources: {source} gives {given[source]}, a component of kind {component.kind} reads "
            f"{wanted} here"
            for source, types in zip(sources, reads, strict=True)
            if given[source] not in types
        ]
    return problems


def _sides(graph: Mapping[str, Component]) -> list[str]:
    encoder = {*encoder_of(graph), *(source for one in graph.values() for source in one.sources if source not in graph)}
    heads = [name for name in heads_of(graph) if name not in encoder]
    problems = [
        f"components.{name}.sources: {source} lies before the memory and {name} after it; only {core_of(graph)} leads "
        "across"
        for name in heads
        for source in graph[name].sources
        if source in encoder
    ]
    used = {*encoder, *heads, core_of(graph)}
    if not problems:
        problems += [
            f"components.{name}: nothing reads it; name it in some sources, or set it to null to take it out"
            for name in graph
            if name not in used
        ]
    return problems


def _needed(graph: Mapping[str, Component], targets: Sequence[str], *known: str) -> list[str]:
    """The targets and all they need down to ``known`` and what is no component, each after its sources."""
    order: list[str] = []
    seen = set(known)

    def visit(name: str) -> None:
        if name in graph and name not in seen:
            seen.add(name)
            for source in graph[name].sources:
                visit(source)
            order.append(name)

    for target in targets:
        visit(target)
    return order


def _cycles(graph: Mapping[str, Component]) -> list[list[str]]:
    """Ways from a component back to itself along sources, e.g. [a, b, a]; of those that share components, one."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in graph:
            return []
        for source in graph[name].sources:
            if found := visit(source, [*way, name]):
                done.update(found)
                return found
        done.add(name)
        return []

    return [found for name in graph if (found := visit(name, []))]


def _listed(names: Any, wanted: str | None = None) -> str:
    names = list(names)
    meant = difflib.get_close_matches(wanted, names, n=1) if wanted else []
    return ", ".join(names) + (f" (did you mean {meant[0]}?)" if meant else "")
