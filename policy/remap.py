"""Match weights with another environment's features and actions by name, or explain which mapping to write.

Weights have an order of features and of actions, and names for both. An environment may have them in another
order, under other names, or have more or fewer. Names that only one side has must be mapped or left out explicitly;
``remap`` then translates everything to the weights' names, by which a policy finds each feature and action.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

from shoal.policy.actions import Actions, Discrete, actions_from_json
from shoal.policy.config import malformed
from shoal.policy.observation import (
    DictObservation,
    ImageObservation,
    Observation,
    TokenObservation,
    VectorObservation,
    observation_from_json,
    shown,
)

PlaneName = tuple[str, str | None]
_MOST = 50
"""Largest number of names that a message lists."""


@dataclasses.dataclass(frozen=True, slots=True)
class NameMap:
    """A mapping from the environment's names to the weights' names, as the user wrote it.

    Raises:
        ValueError: an entry is malformed.
    """

    entries: Sequence[str] = ()
    """``ENVIRONMENT=TRAINED``; ``NAME=`` leaves out a name of the environment, ``=NAME`` declares that the environment
    lacks a name of the weights."""
    option: str = ""
    """The command-line option that takes these entries, for messages."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        if bad := malformed(self.entries):
            raise ValueError(
                f"{self.option}: {bad} must be of the form ENVIRONMENT=TRAINED, where one side may be empty"
            )

    def pairs(self, what: str, here: Set[str], known: Set[str]) -> list[tuple[str, str]]:
        """(environment's name, weights' name) pairs, "" for none. An entry is split at the = that gives existing names.

        Raises:
            ValueError: an entry has an unknown name or is ambiguous, or a name of the environment is mapped twice.
        """
        pairs, problems = [], []
        for entry in self.entries:
            parts = entry.split("=")
            cuts = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(1, len(parts))]
            found = [(left, right) for left, right in cuts if left in {"", *here} and right in {"", *known}]
            if len(found) == 1:
                pairs += found
            elif found:
                problems.append(f"{self.option} {entry}: may mean {' or '.join(map(str, found))}")
            else:
                left, right = cuts[0]
                problems += [
                    f"{self.option} {entry}: the {side} has no {name!r} among its {what} {_listed(sorted(names))}"
                    for side, name, names in (("environment", left, here), ("policy", right, known))
                    if name and name not in names
                ]
        if twice := [name for name, count in Counter(left for left, _ in pairs if left).items() if count > 1]:
            problems.append(f"{self.option}: {', '.join(twice)} is mapped twice")
        if problems:
            raise ValueError("\n  ".join(problems))
        return pairs


@dataclasses.dataclass(frozen=True, slots=True)
class Remapping:
    """The two name maps of a run. An empty map requires equal names on both sides."""

    features: NameMap = NameMap(option="--map-feature")
    actions: NameMap = NameMap(option="--map-action")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyInterface:
    """Arguments of a policy's constructor, all in the weights' names."""

    observation: Observation
    """The environment's observation, with its ids, coordinates and sizes."""
    trained_observation: TokenObservation | VectorObservation | DictObservation | None
    """The observation that the weights were trained with, in their order; None for images."""
    actions: Actions
    """The environment's actions, in its order; two of them may share a name."""
    action_rows: dict[str, int]
    """Embedding row by name, for every action that the weights know."""
    embedding_rows: int
    """Of the weights' table, with those that no action has yet."""


def remap(
    described: Mapping[str, Any], observation: Observation, actions: Actions, remapping: Remapping
) -> PolicyInterface:
    """Match the policy that a checkpoint describes with an environment's ``observation`` and ``actions``.

    Raises:
        ValueError: they do not match. For features and actions, the message lists the names that only one side has,
            those that look alike, and how to map them.
    """
    trained = observation_from_json(described["observation"])
    rows = {str(name): int(row) for name, row in described["action_rows"].items()}
    problems = []
    try:
        observation = _remap_observation(trained, observation, remapping.features)
    except ValueError as error:
        problems.append(str(error))
    try:
        actions = _remap_actions(actions_from_json(described["actions"]), rows, actions, remapping.actions)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(problems))
    return PolicyInterface(
        observation=observation,
        trained_observation=None if isinstance(trained, ImageObservation) else trained,
        actions=actions,
        action_rows=rows,
        embedding_rows=int(described["embedding_rows"]),
    )


def _remap_observation(trained: Observation, presented: Observation, names: NameMap) -> Observation:
    if isinstance(trained, TokenObservation) and isinstance(presented, TokenObservation):
        return _remap_tokens(trained, presented, names)
    if isinstance(trained, VectorObservation) and isinstance(presented, VectorObservation):
        return _remap_vector(trained, presented, names)
    if isinstance(trained, DictObservation) and isinstance(presented, DictObservation):
        images = [
            (name, _as_trained(image, mine))
            for (name, image), (_, mine) in zip(presented.images, trained.images, strict=False)
        ]
        if [*trained.images] != images or len(trained.images) != len(presented.images):
            raise ValueError(
                f"the policy was trained with the images {list(trained.images)}, the environment has "
                f"{list(presented.images)}"
            )
        return DictObservation(_remap_vector(trained.numbers, presented.numbers, names), images)
    if type(trained) is not type(presented):
        kinds = [type(observation).__name__ for observation in (trained, presented)]
        raise ValueError(f"the policy was trained with {kinds[0]}s, the environment has {kinds[1]}s")
    if isinstance(trained, ImageObservation) and isinstance(presented, ImageObservation):
        presented = _as_trained(presented, trained)
    if trained != presented:
        raise ValueError(f"the policy was trained with {trained}, the environment has {presented}")
    _refuse_unnamed(names)
    return presented


def _as_trained(image: ImageObservation, trained: ImageObservation) -> ImageObservation:
    """The image with what the weights were made for, whatever would be chosen now."""
    return dataclasses.replace(image, scale=trained.scale, kernels=trained.kernels, encoder=trained.encoder)


def _refuse_unnamed(names: NameMap) -> None:
    if names.entries:
        raise ValueError(f"{names.option}: features have no names here that could be mapped")


def _remap_tokens(trained: TokenObservation, presented: TokenObservation, names: NameMap) -> TokenObservation:
    trained.check_window(presented)
    here = presented.plane_names
    if not all(feature for feature, _ in (*trained.plane_names, *here)):
        _refuse_unnamed(names)
        trained.planes_of(presented)
        return presented
    targets = _match("features", trained.plane_names, here, names)
    renamed: dict[int, str] = {}
    values = {feature: list(found) for feature, found in presented.categorical_features}
    left_out: list[tuple[int, int | None]] = []
    for (feature, value), name, target in zip(presented.planes, here, targets, strict=True):
        if target is None:
            left_out.append((feature, value))
        elif (value is None) != (target[1] is None):
            raise ValueError(
                f"{names.option}: {shown(name)} cannot stand for {shown(target)}: one is a magnitude, one a category"
            )
        elif renamed.setdefault(feature, target[0]) != target[0]:
            raise ValueError(f"{names.option}: {name[0]} cannot stand for both {renamed[feature]} and {target[0]}")
        elif value is not None and target[1] is not None:
            values[feature][value] = target[1]
    seen = {feature for feature, plane in presented.planes if (feature, plane) not in left_out}
    result = dataclasses.replace(
        presented,
        feature_names=[renamed.get(i, name) for i, name in enumerate(presented.feature_names or ())],
        categorical_features=tuple(values.items()),
        # A feature with no visible plane is left out as a whole, including ids beyond its named values.
        left_out=tuple(dict.fromkeys((f, v if f in seen else None) for f, v in left_out)),
    )
    trained.planes_of(result)
    return result


def _remap_vector(trained: VectorObservation, presented: VectorObservation, names: NameMap) -> VectorObservation:
    if trained.names is None or presented.names is None:
        _refuse_unnamed(names)
        trained.columns_of(presented)
        return presented
    here = [(name, None) for name in presented.names]
    targets = _match("features", [(name, None) for name in trained.names], here, names)
    renamed = dataclasses.replace(presented, names=tuple("" if target is None else target[0] for target in targets))
    trained.columns_of(renamed)
    return renamed


def _remap_actions(trained: Actions, rows: Mapping[str, int], presented: Actions, names: NameMap) -> Actions:
    kinds = [type(actions).__name__ for actions in (trained, presented)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the policy was trained with {kinds[0]} actions, the environment takes {kinds[1]} ones")
    several = [len(actions.names) if isinstance(actions, Discrete) else 1 for actions in (trained, presented)]
    if several[0] != several[1]:
        raise ValueError(
            f"the policy was trained with {several[0]} choices per step, the environment takes {several[1]}"
        )
    here = [(name, None) for name in presented.flat_names]
    targets = _match("actions", [(name, None) for name in rows], here, names)
    flat = []
    for (name, _), target in zip(here, targets, strict=True):
        if target is None:
            raise ValueError(
                f"{names.option}: {name!r} cannot be left out, because the environment takes it: map it to an action "
                "that the policy knows"
            )
        flat.append(target[0])
    if not isinstance(presented, Discrete):
        return dataclasses.replace(presented, names=tuple(flat))
    if len(presented.names) == 1:
        return dataclasses.replace(presented, names=(tuple(flat),))
    rest = iter(flat)
    choices = []
    for i, choice in enumerate(presented.names):
        part = [next(rest) for _ in choice]
        if strangers := [name for name in part if not name.startswith(f"{i}:")]:
            raise ValueError(f"{names.option}: choice {i} cannot take {strangers}, which are of another choice")
        choices.append(tuple(name.removeprefix(f"{i}:") for name in part))
    return dataclasses.replace(presented, names=tuple(choices))


def _match(what: str, known: Sequence[PlaneName], here: Sequence[PlaneName], names: NameMap) -> list[PlaneName | None]:
    """For each name in ``here`` the weights' name (in ``known``) that it is mapped to; None if it is left out.

    A pair for a categorical feature applies to all of its values that have no pair of their own.

    Raises:
        ValueError: only one side has a name, or a pair has an unknown name.
    """
    by_text = {shown(name): name for name in known}
    pairs = names.pairs(
        what, {text for name in here for text in (shown(name), name[0])}, {*by_text, *(feature for feature, _ in known)}
    )
    mapped = {left: right for left, right in pairs if left}
    gone = {right for left, right in pairs if not left}
    targets: list[PlaneName | None] = []
    only_here = []
    for name in here:
        if shown(name) in mapped:
            wanted = mapped[shown(name)]
        elif name[0] in mapped:
            wanted = mapped[name[0]] and shown((mapped[name[0]], name[1]))
        else:
            wanted = shown(name)
        target = by_text.get(wanted)
        if wanted and (target is None or gone & {wanted, target[0]}):
            only_here.append(name)
        targets.append(target)
    taken = set(targets)
    only_known = [name for name in known if name not in taken and not gone & {shown(name), name[0]}]
    if only_here or only_known:
        raise ValueError(_difference(what, only_known, only_here, names.option))
    return targets


def _difference(what: str, only_known: Sequence[PlaneName], only_here: Sequence[PlaneName], option: str) -> str:
    old, new = [shown(name) for name in only_known], [shown(name) for name in only_here]
    like = {name: close[0] for name in new[:_MOST] if (close := difflib.get_close_matches(name, old, 1, 0.5))}
    ways = []
    if new:
        ways.append(f"{new[0]}={like.get(new[0], 'TRAINED')}")
        if what == "features":
            ways.append(f"{new[0]}= (the policy does not see it)")
    if old:
        ways.append(f"={old[0]} ({'it is absent here' if what == 'features' else 'it is never taken here'})")
    lines = [
        f"the environment's {what} are not those that the policy was trained with",
        f"only the policy knows: {_listed(old)}",
        f"only the environment knows: {_listed([f'{n} (like {like[n]}?)' if n in like else n for n in new])}",
        f"map every one of them with {option} ENVIRONMENT=TRAINED, e.g. {', '.join(ways)}",
    ]
    if category := next((feature for feature, value in (*only_here, *only_known) if value is not None), None):
        lines.append(f"{category} alone stands for all of its values {category}:...")
    return "\n    ".join(lines)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return (", ".join(names[:_MOST]) or "nothing") + more
