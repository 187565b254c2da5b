"""The base class of the settings' sections.

Sections lie beside the code that they configure, in packages of which some may not import each other; all may import
this module, which imports none of them.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, CoreSchema, core_schema

LONGEST_SECONDS = 1e9
"""31 years: a timer of more than 292 fails, and an infinite one cannot be started."""

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS)]
"""A period or a time limit."""

NAME_OF_CODE = r"[\w.]+:[\w.<>#]+"
"""What names code of the user's: ``package.module:Name``."""


class Named:
    """Marks a string setting that is one of ``own``, or names code of the user's, which ``yours`` describes.

    Args:
        pattern: a regular expression of names of the user's code.
    """

    def __init__(self, *own: str, yours: str, pattern: str = NAME_OF_CODE) -> None:
        self._own, self._pattern = own, "|".join([*own, pattern])
        self._choices = ", ".join([*own, f"or {yours}"]) if own else yours

    def _check(self, name: str) -> str:
        if not re.fullmatch(self._pattern, name):
            close = difflib.get_close_matches(name, self._own, n=1)
            raise ValueError(f"must be {self._choices}" + (f"; did you mean {close[0]}?" if close else ""))
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the string."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Editors check it by the pattern."""
        return {**handler(schema), "pattern": f"^({self._pattern})$"}


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Section:
    """A group of settings, checked wherever it is made: from a file, from arguments, or by hand.

    pydantic would take numbers in quotes and truth values for numbers. Here they are mistakes, as are unknown names.
    A whole number may be written as a float (``1e6``), a truth value as ``yes``, ``no``, ``on`` or ``off``.

    Raises:
        pydantic.ValidationError: a ``ValueError`` with every value that is of another type or out of its range.
    """

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Convert the other spellings of a number and of a truth value."""

        def read(name: str, value: Any) -> Any:
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
                return int(value)  # a field of floats turns it back
            if isinstance(value, str) and value.lower() in _SWITCHES:
                declared = typing.get_type_hints(cls).get(name)
                if bool in (declared, *typing.get_args(declared)):
                    return _SWITCHES[value.lower()]
            return value

        if isinstance(given, ArgsKwargs):
            return ArgsKwargs(given.args, {name: read(name, value) for name, value in (given.kwargs or {}).items()})
        if isinstance(given, Mapping):
            return {name: read(name, value) for name, value in given.items()}
        return given

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As pydantic's, but a section may be given as a mapping, which strictness would refuse."""
        schema = handler(source)
        typing.cast("dict[str, Any]", handler.resolve_ref_schema(schema))["strict"] = False
        return schema
