"""Edits of bytes and of JSON trees as plain data: strategies that draw them, and functions that make them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Edit = list[Any]
PLACES = st.integers(0, 2**31) | st.integers(0, 400) | st.integers(-400, -1)
"""Where in the data, modulo its size: anywhere, near its beginning or near its end."""

_HEX = st.binary(min_size=1, max_size=24).map(bytes.hex)
_WORDS = st.sampled_from(
    (0, 1, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
)

byte_edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), PLACES, _HEX),
        st.tuples(st.just("word"), PLACES, st.sampled_from((1, 2, 4, 8)), _WORDS | st.integers(0, 2**64 - 1)),
        st.tuples(st.just("insert"), PLACES, _HEX),
        st.tuples(st.just("remove"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("repeat"), PLACES, st.integers(1, 64), st.integers(2, 100)),
        st.tuples(st.just("cut"), PLACES),
    ).map(list),
    max_size=3,
)


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    """``data`` after these edits."""
    for kind, place, *rest in edits:
        at = place % (len(data) + 1)
        match kind:
            case "set":
                new = bytes.fromhex(rest[0])
                data = data[:at] + new + data[at + len(new) :]
            case "word":
                size, number = rest
                data = data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]
            case "insert":
                data = data[:at] + bytes.fromhex(rest[0]) + data[at:]
            case "remove":
                data = data[:at] + data[at + rest[0] :]
            case "repeat":
                data = data[:at] + data[at : at + rest[0]] * rest[1] + data[at + rest[0] :]
            case "cut":
                data = data[:at]
    return data


def _deep(kind: str) -> Any:
    value: Any = 1
    for _ in range(200):
        value = [value] if kind == "list" else {"a": value}
    return value


texts = st.text(max_size=12) | st.sampled_from(
    ("", "\x00", "\ud800", "é" * 300, "../../x", "/dev/zero", "1e400", "nan", "a:b", "os:system", "-1", "{", "%s")
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from((255, 256, 2**31, 2**63, -(2**63) - 1, 10**18, 10**30, 10**400)),
    st.floats(allow_nan=True),
    st.sampled_from((1e308, -0.0, 1e-320, 0.5, float("nan"), float("inf"), float("-inf"))),
)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
) | st.sampled_from(("deep", "broad"))

tree_edits = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 2000), values),
        st.tuples(st.just("drop"), st.integers(0, 2000)),
        st.tuples(st.just("copy"), st.integers(0, 2000), st.integers(0, 2000)),
        st.tuples(st.just("add"), st.integers(0, 2000), texts, values),
        st.tuples(st.just("nudge"), st.integers(0, 2000), st.integers(-2, 2)),
    ).map(list),
    max_size=3,
)


def tree_edited(document: Any, edits: Sequence[Edit]) -> Any:
    """A JSON document after these edits: node n, counted from the root, is put, dropped, copied or added to."""
    root = [copy.deepcopy(document)]
    for kind, number, *rest in edits:
        nodes = list(_nodes(root))
        parent, key = nodes[number % len(nodes)]
        match kind:
            case "put":
                parent[key] = _expanded(rest[0])
            case "drop":
                del parent[key]
                if not root:
                    root.append(None)
            case "copy":
                source, name = nodes[rest[0] % len(nodes)]
                parent[key] = copy.deepcopy(source[name])
            case "add" if isinstance(parent[key], dict):
                parent[key][rest[0]] = _expanded(rest[1])
            case "add" if isinstance(parent[key], list):
                parent[key].append(_expanded(rest[1]))
            case "nudge" if type(parent[key]) in (int, float):
                parent[key] += rest[0]
    return root[0]


def _expanded(value: Any) -> Any:
    match value:
        case "deep":
            return _deep("list")
        case "broad":
            return list(range(5000))
    return value


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every node below ``value``, parents first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _nodes(inner)
