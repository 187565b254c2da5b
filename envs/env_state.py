"""The state of other people's environments between two steps, read from their layers: an environment and its wrappers.

A layer says its own state where it has both ``get_state()`` and ``set_state(state)``, of plain data
(``envs.plain_state``); else its attributes are its state, where all of them are plain data.
"""

from __future__ import annotations

import hashlib
from typing import Any

from shoal.envs.plain_state import DoesNotFit, NotPlain, Reader, Writer, from_plain, to_plain

_MADE_ANEW = frozenset(("env", "spec", "metadata", "_metadata", "_cached_spec", "_saved_kwargs", "render_mode"))
"""Attributes that do not change while an environment is played."""
_OF_GYMNASIUM = frozenset(("screen", "clock", "surf", "isopen", "window", "window_surface"))
"""What gymnasium's own environments draw pictures with."""
_LARGE_TABLES = {"gymnasium.envs.toy_text.taxi": "P", "gymnasium.envs.toy_text.cliffwalking": "P"}
"""Of modules of gymnasium, the table that their environments make alike every time. It is compared, not stored: it has
tens of thousands of parts."""
_RANDOM = ("_np_random", "_np_random_seed")


def get_state(env: Any) -> list[dict[str, Any]]:
    """The state of an environment as plain data, outermost layer first.

    Raises:
        NotPlain: it cannot be told, or ``get_state`` of a layer raised; the message says why.
    """
    layers = _layers(env)
    writer, found = Writer(layers), []
    for layer in layers:
        kind = type(layer)
        if _says_its_state(layer):
            try:
                told = layer.get_state()
            except Exception as error:
                raise NotPlain(f"{kind.__qualname__}.get_state raised {type(error).__name__}: {error}") from error
            try:
                own = getattr(layer, "__dict__", {})  # an object of another language has none
                random = to_plain({name: own[name] for name in _RANDOM if name in own})
                found.append({"class": _name(kind), "told": to_plain(told), "random": random})
            except NotPlain:
                raise
            except Exception as error:  # what other people's objects do when they are looked at
                raise NotPlain(f"what {kind.__qualname__}.get_state says cannot be read: {error!r}") from error
        elif not hasattr(layer, "__dict__"):
            raise NotPlain(f"{kind.__qualname__} has neither get_state and set_state nor attributes")
        else:
            try:
                attributes = writer.attributes(layer, kind.__qualname__, but=_constant(layer))
            except NotPlain:
                raise
            except Exception as error:  # what other people's objects do when they are looked at
                raise NotPlain(f"{kind.__qualname__} cannot be read: {type(error).__name__}: {error}") from error
            found.append({"class": _name(kind), "attributes": attributes, "table": _table(layer)})
    return found


def set_state(env: Any, state: Any) -> None:
    """Put an environment that was just reset into ``state``.

    Raises:
        DoesNotFit: it is no state of this environment, which is unusable then; or ``set_state`` of a layer raised.
    """
    layers = _layers(env)
    if not isinstance(state, list) or len(state) != len(layers):
        raise DoesNotFit("it is the state of another environment, or of other wrappers")
    try:
        reader = Reader(layers)
    except Exception as error:  # as in ``get_state``
        raise DoesNotFit(f"{type(env).__qualname__} cannot be read: {type(error).__name__}: {error}") from error
    read: list[tuple[Any, Any]] = []
    for layer, part in zip(layers, state, strict=True):
        if not isinstance(part, dict) or part.get("class") != _name(type(layer)):
            raise DoesNotFit(f"it is not the state of a {type(layer).__qualname__}")
        if _says_its_state(layer) != ("told" in part):
            raise DoesNotFit(f"{type(layer).__qualname__} had other methods when it was saved")
        if "told" in part:
            random = Reader([]).read(part.get("random"), None)
            if not isinstance(random, dict) or not random.keys() <= set(_RANDOM):
                raise DoesNotFit("its random generator is damaged")
            read.append((from_plain(part["told"]), random))
        else:
            read.append((None, reader.attributes(part.get("attributes"), layer, but=_constant(layer))))
            if part.get("table") != _table(layer):
                raise DoesNotFit(f"{type(layer).__qualname__} has another table than a fresh one")
    # Set only now: a state that does not fit leaves the environment as it was.
    for layer, (told, attributes) in zip(layers, read, strict=True):
        if _says_its_state(layer):
            try:
                layer.set_state(told)
            except Exception as error:
                what = f"{type(layer).__qualname__}.set_state raised {type(error).__name__}: {error}"
                raise DoesNotFit(what) from error
        if attributes:
            vars(layer).update(attributes)
    for space, generator in reader.generators:
        vars(space)["_np_random"] = generator


def _layers(env: Any) -> list[Any]:
    found = [env]
    while (inner := getattr(found[-1], "__dict__", {}).get("env")) is not None:
        if any(inner is layer for layer in found):
            break  # a way back to an outer one
        found.append(inner)
    return found


def _says_its_state(layer: Any) -> bool:
    kind = type(layer)
    return callable(getattr(kind, "get_state", None)) and callable(getattr(kind, "set_state", None))


def _constant(layer: Any) -> frozenset[str]:
    module = type(layer).__module__
    table = {_LARGE_TABLES[module]} if module in _LARGE_TABLES else frozenset[str]()
    own = module.startswith("gymnasium.envs.") and getattr(layer, "screen", None) is None
    return _MADE_ANEW | table | (_OF_GYMNASIUM if own else frozenset())


def _table(layer: Any) -> str | None:
    """A digest of the large table of a layer that has one."""
    name = _LARGE_TABLES.get(type(layer).__module__)
    return None if name is None else hashlib.sha256(repr(vars(layer).get(name)).encode()).hexdigest()


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
