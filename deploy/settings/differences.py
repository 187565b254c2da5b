"""What differs between two configurations, setting by setting.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shoal.deploy.settings.load import section_of, to_dict
from shoal.deploy.settings.sections import Config

_UNSET = object()
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


class Change(NamedTuple):
    """A setting that differs, by its dotted name, with its values in words."""

    name: str
    before: str
    after: str
    is_default: bool
    """Whether it now has its default."""

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


@dataclasses.dataclass(frozen=True, slots=True)
class Differences:
    """What differs between two configurations, in the order of ``shoal config show``."""

    changed: tuple[Change, ...] = ()
    new: tuple[str, ...] = ()
    """Settings that the first lacks, as one of an older shoal does, and that have their defaults in the second."""
    gone: tuple[str, ...] = ()
    """Settings of the first that shoal no longer has."""

    def __bool__(self) -> bool:
        return bool(self.changed or self.new or self.gone)

    def without(self, names: Sequence[str]) -> Differences:
        """Those of other settings than ``names``, which may be of sections."""

        def is_other(name: str) -> bool:
            return not any(name == one or name.startswith(f"{one}.") for one in names)

        return Differences(
            tuple(change for change in self.changed if is_other(change.name)),
            tuple(filter(is_other, self.new)),
            tuple(filter(is_other, self.gone)),
        )

    def unknown(self, first: str = "the first") -> str:
        """In one line: the settings that only one of the two versions of shoal has; empty where there are none."""
        said = (
            (self.new, f"not in {first}, and at their defaults"),
            (self.gone, f"only in {first}, and unknown to this shoal"),
        )
        return "; ".join(f"{what}: {_short.repr(', '.join(names))[1:-1]}" for names, what in said if names)


NO_DIFFERENCES = Differences()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Differences:
    """Compare two configurations as plain data.

    Args:
        before: all settings, as ``to_dict`` gives them or a run's ``config.yaml`` has them; perhaps of an older shoal.
        after: the same.
    """
    changed: list[Change] = []
    new: list[str] = []
    gone: list[str] = []
    for name, known, old, now in _pairs(Config, before, after, ""):
        default = _default(name)
        if not known:
            if old is not _UNSET:
                gone.append(name)
        elif old is _UNSET and now is not _UNSET and default is not _UNSET and _equal(default, now):
            new.append(name)
        elif not _equal(old, now):
            is_default = default is not _UNSET and _equal(default, now)
            changed.append(Change(name, _words(old), _words(now), is_default))
    return Differences(tuple(changed), tuple(new), tuple(gone))


def _pairs(hint: Any, before: Any, after: Any, path: str) -> Iterator[tuple[str, bool, Any, Any]]:
    """Every setting that is in one of the two: its dotted name, whether shoal has it, and both values."""
    section = section_of(hint)
    are_mappings = all(isinstance(one, Mapping) or one is _UNSET for one in (before, after))
    # What is no section of the root, as an entry of a mapping, is there or not as a whole.
    is_whole = _UNSET in (before, after) and (section is None or _default(path) is _UNSET)
    if not are_mappings or is_whole or not (before or after):
        yield path, True, before, after
        return
    before, after = ({} if one is _UNSET else one for one in (before, after))
    hints: Mapping[str, Any] = typing.get_type_hints(section) if section else {}
    of_values = typing.get_args(hint)[1] if typing.get_origin(hint) is Mapping else Any
    for name in dict.fromkeys((*hints, *before, *after)):
        pair = before.get(name, _UNSET), after.get(name, _UNSET)
        dotted = f"{path}.{name}" if path else str(name)
        if section and name not in hints:
            yield dotted, False, *pair
        elif pair != (_UNSET, _UNSET):
            yield from _pairs(hints.get(name, of_values), *pair, dotted)


def _equal(one: Any, other: Any) -> bool:
    return bool(_plain(one) == _plain(other)) and isinstance(one, bool) == isinstance(other, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _words(value: Any) -> str:
    if value is _UNSET:
        return "(not set)"
    if isinstance(value, str) and value and not value.isspace():
        return value if len(value) <= _short.maxstring else _short.repr(value)[1:-1]
    text = json.dumps(_plain(value), default=str)
    return text if len(text) <= _short.maxstring else _short.repr(text)[1:-1]


def _default(name: str) -> Any:
    """The default of a setting by its dotted name; of what has none, as an entry of a mapping, ``_UNSET``."""
    here: Any = _defaults()
    for part in name.split("."):
        here = here.get(part, _UNSET) if isinstance(here, Mapping) else _UNSET
    return here


@functools.cache
def _defaults() -> dict[str, Any]:
    return to_dict(Config())
