"""What an environment's attributes hold, as plain data, and back: nothing in it is run as code.

Plain data are None, truth values, numbers, texts, lists, mappings with texts as keys, and numpy arrays of numbers or
texts. Other things are mappings with the key ``"#"``, which names their kind: tuples, sets, deques, random generators,
objects of Python classes. What is reached on two ways is stored once and is one thing again when it is read.

What may hide a state, such as a function that encloses variables, is refused: a state that is read back goes on
exactly, or there is none. Spaces and parts of the program are not stored but compared with those of the fresh thing: a
constructor may draw them at random.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import inspect
import math
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np

MOST_BYTES = 16 * 2**20
"""Bytes of arrays and texts in one state; environments that hold a data set would fill every checkpoint with it."""
MOST_PARTS = 200_000
"""Numbers, texts and containers in one state."""
_DEEPEST = 100
_MOST_BITS = 10_000
"""Of a whole number: JSON takes some more."""
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_KIND = "#"
_NO_PART_OF_A_SPACE = frozenset(("_np_random", "low_repr", "high_repr"))
"""Its generator, and the texts that a Box makes of its bounds when it is printed."""


class NotPlain(ValueError):
    """Something that is not plain data is part of the state; the message says what and where."""


class DoesNotFit(ValueError):
    """Data that was read back is not a state of this thing."""


def to_plain(value: Any, layers: list[Any] | None = None) -> Any:
    """``value`` as plain data, independent of it.

    ``layers`` are things that are known where the data is read: they may be referred to, and are not stored themselves.

    Raises:
        NotPlain: something in it is no data, or there is too much of it.
    """
    return Writer(layers or []).write(value, "it")


def from_plain(plain: Any) -> Any:
    """The value of ``to_plain``.

    Raises:
        DoesNotFit: it is no such data, or has objects or functions in it, which only ``Reader`` finds.
    """
    return Reader([]).read(plain, None)


class Writer:
    """Writes several values that may share parts, of at most ``most_bytes`` together."""

    def __init__(self, layers: list[Any], *, most_bytes: float = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._number: dict[int, int] = {id(layer): index for index, layer in enumerate(layers)}
        self._kept: list[Any] = list(layers)
        """Everything that has a number: an id is one as long as its owner lives."""
        self._layers = len(layers)
        self._begins: list[int] = []
        self._ends: list[int] = []
        """Addresses of all arrays so far, which do not overlap, in order."""
        self._parts = self._bytes = 0

    def write(self, value: Any, where: str, depth: int = 0) -> Any:
        """``value`` as plain data; ``where`` names it in messages."""
        self._count(value, where, depth)
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise NotPlain(f"{where} is a number of {value.bit_length():,} bits")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.generic):
            return {_KIND: "scalar", "value": _numbers(np.asarray(value), where)}
        if _is_static(value):
            return {_KIND: "static", "is": _digest(value, self._kept[: self._layers], where, depth)}
        if (number := self._number.get(id(value))) is not None:
            return {_KIND: "layer" if number < self._layers else "same", "number": number}
        if type(value) is tuple:
            # Numbered when it is complete, as a reader makes it.
            items = [self.write(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            self._remember(value)
            return {_KIND: "tuple", "items": items}
        self._remember(value)
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if type(value) is list:
            return [self.write(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        if type(value) is set:
            return {_KIND: "set", "items": [self.write(item, f"a part of {where}", depth + 1) for item in value]}
        if type(value) is collections.deque:
            items = [self.write(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            return {_KIND: "deque", "items": items, "most": value.maxlen}
        if type(value) is dict:
            if all(type(key) is str and key != _KIND for key in value):
                return {key: self.write(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
            pairs = [
                [self.write(key, f"a key of {where}", depth + 1), self.write(item, f"{where}[{key!r}]", depth + 1)]
                for key, item in value.items()
            ]
            return {_KIND: "mapping", "items": pairs}
        if isinstance(value, gymnasium.Space):
            return self._space(value, where)
        if (state := _random_state(value)) is not None:
            return {_KIND: "random", "state": to_plain(state)}
        if _is_object(value):
            return {_KIND: "object", "class": _name(type(value)), "attributes": self.attributes(value, where, depth)}
        raise NotPlain(f"{where} is a {_name(type(value))}")

    def attributes(self, owner: Any, where: str, depth: int = 0, but: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The attributes of an object, except those named in ``but``."""
        return {
            name: self.write(value, f"{where}.{name}", depth + 1)
            for name, value in vars(owner).items()
            if name not in but
        }

    def _remember(self, value: Any) -> None:
        self._number[id(value)] = len(self._kept)
        self._kept.append(value)

    def _count(self, value: Any, where: str, depth: int) -> None:
        self._parts += 1
        if isinstance(value, np.ndarray):
            self._bytes += value.nbytes
        elif isinstance(value, str):
            self._bytes += len(value)
        if self._parts > MOST_PARTS or self._bytes > self._most_bytes:
            raise NotPlain(f"with {where} it has more than {MOST_BYTES:,} bytes or {MOST_PARTS:,} parts")
        if depth > _DEEPEST:
            raise NotPlain(f"{where} is nested too deeply")

    def _array(self, value: np.ndarray, where: str) -> Any:
        numbers = _numbers(value, where)
        if value.size:
            begin, end = np.lib.array_utils.byte_bounds(value)
            place = bisect.bisect_left(self._begins, begin)
            if (place and self._ends[place - 1] > begin) or (place < len(self._begins) and self._begins[place] < end):
                raise NotPlain(f"{where} shares its memory with another array")
            self._begins.insert(place, begin)
            self._ends.insert(place, end)
        return numbers

    def _space(self, space: gymnasium.Space[Any], where: str) -> dict[str, Any]:
        parts = list(_parts_of(space))
        if any(part._np_random is not None for part in parts):
            raise NotPlain(f"{where} is a space with parts that were sampled from")
        generator = None if space._np_random is None else self.write(space._np_random, f"{where}.np_random")
        return {_KIND: "space", "is": _digest(space, self._kept[: self._layers], where, 0), "random": generator}


class Reader:
    """Reads what ``Writer`` wrote, with the same layers and beside what a fresh thing of the same kind has.

    Args:
        layers: as the writer had them, but fresh. The data may have objects of the classes that these have objects of.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._found: list[Any] = list(layers)
        self._layers = layers
        self._classes: dict[str, type] = {}
        self.generators: list[tuple[gymnasium.Space[Any], np.random.Generator | None]] = []
        """Spaces that were read, and what they are to sample with: set only when everything fits."""
        seen: set[int] = set()
        for layer in layers:
            self._learn(layer, 0, seen)

    def read(self, plain: Any, fresh: Any) -> Any:
        """The value; ``fresh`` is what a fresh thing has in its place, from which functions are taken."""
        try:
            return self._read(plain, fresh, 0)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            if isinstance(error, DoesNotFit):
                raise
            raise DoesNotFit(f"it is damaged ({type(error).__name__}: {error})") from error

    def attributes(self, plain: Any, owner: Any, but: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The attributes of an object like ``owner``, whose own stay as they are; those named in ``but`` are not read.

        Raises:
            DoesNotFit: they are not those of such an object.
        """
        if not isinstance(plain, dict) or _KIND in plain:
            raise DoesNotFit(f"expected the attributes of a {type(owner).__qualname__}")
        has = vars(owner)
        if missing := sorted(has.keys() - but - plain.keys()):
            raise DoesNotFit(f"there is no {type(owner).__qualname__}.{missing[0]}")
        found = {}
        for name, part in plain.items():
            # What a fresh one lacks may come later; a method is never replaced.
            if name in but or (name not in has and not _may_come(type(owner), name)):
                raise DoesNotFit(f"{type(owner).__qualname__}.{name} is no attribute that it may have")
            found[name] = self.read(part, has.get(name))
            check_kind(found[name], has.get(name), f"{type(owner).__qualname__}.{name}")
        return found

    def _read(self, plain: Any, fresh: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise DoesNotFit("it is nested too deeply")
        if plain is None or type(plain) in (bool, int, float, str):
            return plain
        if isinstance(plain, np.ndarray):
            return self._remember(_numbers(plain, "an array"))
        if isinstance(plain, list):
            items = self._remember([])
            items += self._items(plain, fresh, depth)
            return items
        if not isinstance(plain, dict):
            raise DoesNotFit(f"a {type(plain).__name__} is no plain data")
        if _KIND not in plain:
            mapping = self._remember({})
            has = fresh if isinstance(fresh, Mapping) else {}
            mapping.update({key: self._read(item, has.get(key), depth + 1) for key, item in plain.items()})
            return mapping
        return self._special(plain[_KIND], plain, fresh, depth)

    def _special(self, kind: Any, plain: dict[str, Any], fresh: Any, depth: int) -> Any:
        if kind == "scalar":
            return _numbers(plain["value"], "a number").reshape(())[()]
        if kind == "static":
            if not _is_static(fresh) or plain["is"] != self._digest(fresh):
                raise DoesNotFit("it has another class or function than a fresh one")
            return fresh
        if kind in ("same", "layer"):
            return self._found[_whole(plain["number"])]
        if kind == "tuple":
            return self._remember(tuple(self._items(plain["items"], fresh, depth)))
        if kind == "set":
            members = self._remember(set())
            members.update(self._items(plain["items"], None, depth))
            return members
        if kind == "deque":
            most = plain["most"]
            queue = self._remember(collections.deque(maxlen=None if most is None else _whole(most)))
            queue.extend(self._items(plain["items"], fresh, depth))
            return queue
        if kind == "mapping":
            pairs = self._remember({})
            for key, item in plain["items"]:
                name = self._read(key, None, depth + 1)
                has = fresh.get(name) if isinstance(fresh, Mapping) else None
                pairs[name] = self._read(item, has, depth + 1)
            return pairs
        if kind == "space":
            if not isinstance(fresh, gymnasium.Space):
                raise DoesNotFit("expected a space")
            if plain["is"] != self._digest(fresh):
                raise DoesNotFit(f"it has another space than {fresh}, which a fresh one has")
            self._remember(fresh)
            generator = self._read(plain["random"], None, depth + 1)
            if not isinstance(generator, np.random.Generator | None):
                raise DoesNotFit("expected a space's random generator")
            self.generators.append((fresh, generator))
            return fresh
        if kind == "random":
            return self._remember(_make_random(from_plain(plain["state"])))
        if kind == "object":
            return self._object(plain, fresh)
        raise DoesNotFit(f"{kind!r} is no kind of data")

    def _items(self, plain: Any, fresh: Any, depth: int) -> Iterator[Any]:
        if not isinstance(plain, list):
            raise DoesNotFit("expected a list")
        has = list(fresh) if type(fresh) in (list, tuple, collections.deque) else []
        for index, item in enumerate(plain):
            yield self._read(item, has[index] if index < len(has) else None, depth + 1)

    def _object(self, plain: dict[str, Any], fresh: Any) -> Any:
        kind: Any = self._classes.get(plain["class"])
        if kind is None:
            raise DoesNotFit(f"a fresh one has no {plain['class']}")
        like = fresh if type(fresh) is kind else kind.__new__(kind)
        made = self._remember(kind.__new__(kind))
        vars(made).update(self.attributes(plain["attributes"], like))
        return made

    def _digest(self, fresh: Any) -> str:
        try:
            return _digest(fresh, self._layers, "it", 0)
        except NotPlain as error:
            raise DoesNotFit(f"of a fresh one, {error}") from error

    def _remember(self, value: Any) -> Any:
        self._found.append(value)
        return value

    def _learn(self, value: Any, depth: int, seen: set[int]) -> None:
        """Learn the classes of all objects that are part of ``value``."""
        if id(value) in seen or depth > _DEEPEST or len(seen) > MOST_PARTS:
            return
        seen.add(id(value))
        parts: Any = ()
        if isinstance(value, list | tuple | collections.deque):
            parts = value
        elif isinstance(value, dict):
            parts = value.values()
        elif hasattr(value, "__dict__") and not _is_static(value) and not isinstance(value, gymnasium.Space):
            if _is_object(value):
                self._classes[_name(type(value))] = type(value)
            parts = vars(value).values()
        for part in list(parts):
            self._learn(part, depth + 1, seen)


def check_kind(value: Any, fresh: Any, where: str) -> None:
    """Raise DoesNotFit where ``value`` can be no later value of what is ``fresh`` now."""
    if isinstance(value, np.ndarray) and isinstance(fresh, np.ndarray):
        # Some of gymnasium's own go from one precision to another.
        if (value.shape, value.dtype.kind) != (fresh.shape, fresh.dtype.kind):
            raise DoesNotFit(f"{where} is {value.dtype} {list(value.shape)}, must be {fresh.dtype} {list(fresh.shape)}")
        return
    if value is None or fresh is None:
        return
    one, other = _family(value), _family(fresh)
    if one != other:
        raise DoesNotFit(f"{where} is {one}, must be {other}")


def _family(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    if isinstance(value, bool | int | float | np.generic):
        return "a number"
    if isinstance(value, list | tuple | collections.deque | np.ndarray):
        return "a sequence"
    return "a space" if isinstance(value, gymnasium.Space) else f"a {type(value).__qualname__}"


def read_arrays(state: Any, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a mapping that has those of ``like``, each of the same shape and type.

    Raises:
        DoesNotFit: one of them is missing or another.
    """
    found = {}
    for name, one in like.items():
        array = state.get(name) if isinstance(state, dict) else None
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (one.shape, one.dtype):
            raise DoesNotFit(f"{name} must be {one.dtype} {list(one.shape)}")
        found[name] = array
    return found


def read_generator(plain: Any) -> np.random.Generator:
    """The generator of ``to_plain``.

    Raises:
        DoesNotFit: it is something else.
    """
    generator = from_plain(plain)
    if not isinstance(generator, np.random.Generator):
        raise DoesNotFit("expected a random generator")
    return generator


def _numbers(array: Any, where: str) -> np.ndarray:
    if not isinstance(array, np.ndarray) or type(array) is not np.ndarray or array.dtype.kind not in "biufcSU":
        raise NotPlain(f"{where} is no array of numbers or texts")
    return array.copy()


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise DoesNotFit(f"expected a whole number, got {number!r}")
    return number


def _may_come(kind: type, name: str) -> bool:
    """Whether objects of the class may get an attribute of this name later."""
    known = inspect.getattr_static(kind, name, None)
    return not callable(known) and not hasattr(known, "__get__")


def _is_static(value: Any) -> bool:
    """Whether it is part of the program: a class, a module, a type of numbers, or a function that keeps no state."""
    if isinstance(value, type | types.ModuleType | np.dtype | np.ufunc):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        # The methods of an object, such as list.append, keep that object.
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType | type)
    if isinstance(value, types.FunctionType):
        # Those of gymnasium's wrappers enclose constants only.
        return value.__closure__ is None or str(value.__module__).startswith("gymnasium.")
    return False


def _digest(value: Any, layers: list[Any], where: str, depth: int) -> str:
    """Of a part of the program or a space: equal for two that do the same.

    Raises:
        NotPlain: it keeps something that is no plain data.
    """
    digest = hashlib.sha256()
    # By a writer of its own: what is compared is not stored, so nothing else may refer to it, and it may be large.
    for part in _in_order(Writer(layers, most_bytes=math.inf).write(_what_it_is(value), where, depth + 1)):
        digest.update(part)
    return digest.hexdigest()


def _what_it_is(value: Any) -> list[Any]:
    if isinstance(value, gymnasium.Space):
        own = {name: part for name, part in vars(value).items() if name not in _NO_PART_OF_A_SPACE}
        sets = {name: sorted(map(repr, part)) for name, part in own.items() if isinstance(part, frozenset)}
        return [_name(type(value)), own | sets]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        keeps = [value.__defaults__, value.__kwdefaults__, cells, vars(value)]
        return [value.__module__, value.__qualname__, _instructions(value.__code__), *keeps]
    if isinstance(value, types.BuiltinFunctionType):
        return [repr(value.__self__), value.__name__]
    return [repr(value)]


def _instructions(code: types.CodeType) -> list[str]:
    """What a function does, the same in every process: not where it stands, nor sets in the order of their hashes."""
    found = [code.co_code.hex(), *code.co_names]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _instructions(constant)
        else:
            found.append(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))
    return found


def _in_order(plain: Any) -> Iterator[bytes]:
    """Plain data as bytes; sets in an order that is the same in every process."""
    if isinstance(plain, np.ndarray):
        yield f"{plain.dtype}{plain.shape}".encode()
        yield plain.tobytes()
    elif isinstance(plain, dict):
        items = plain.items()
        if plain.get(_KIND) == "set":
            items = {"set": sorted(b"".join(_in_order(item)).hex() for item in plain["items"])}.items()
        for key, item in items:
            yield f"{key!r}:".encode()
            yield from _in_order(item)
    elif isinstance(plain, list):
        yield f"{len(plain)}[".encode()
        for item in plain:
            yield from _in_order(item)
    else:
        yield f"{plain!r},".encode()


def _is_object(value: Any) -> bool:
    """Whether it is an object of a Python class, all of whose state is in its attributes."""
    kind: Any = type(value)
    return (
        hasattr(value, "__dict__")
        and kind.__new__ is object.__new__
        and not any("__slots__" in vars(base) and base.__slots__ for base in kind.__mro__)
        and not isinstance(value, types.MethodType | BaseException | gymnasium.Env)
    )


def _name(kind: type) -> str:
    # Classes of other languages may have no module.
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', '?')}"


def _parts_of(space: Any) -> Iterator[gymnasium.Space[Any]]:
    spaces = getattr(space, "spaces", ())
    for part in spaces.values() if isinstance(spaces, Mapping) else spaces:
        yield part
        yield from _parts_of(part)


def _random_state(value: Any) -> Any:
    """The state of a random generator; None for anything else."""
    if type(value) is np.random.Generator:
        bits = type(value.bit_generator).__name__
        return {"generator": bits, "state": value.bit_generator.state} if bits in _BIT_GENERATORS else None
    if type(value) is np.random.RandomState:
        return {"generator": "RandomState", "state": value.get_state(legacy=False)}
    if type(value) is random.Random:
        return {"generator": "random", "state": value.getstate()}
    return None


def _make_random(state: Any) -> Any:
    kind, state = state["generator"], state["state"]
    if kind == "random":
        python = random.Random()
        python.setstate(state)
        return python
    if kind == "RandomState":
        legacy = np.random.RandomState()
        legacy.set_state(state)
        return legacy
    if kind not in _BIT_GENERATORS:
        raise DoesNotFit(f"{kind!r} is no random generator")
    bits = getattr(np.random, kind)()
    bits.state = state
    return np.random.Generator(bits)
