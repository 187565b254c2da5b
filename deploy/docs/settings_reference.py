"""The reference of all settings, as Markdown: made of the configuration's classes, their docstrings and JSON schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from shoal.deploy.settings.load import json_schema, to_dict
from shoal.deploy.settings.sections import Config
from shoal.section import Section

MARKER = "<!-- settings: made when the site is built -->"
_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "`true` or `false`"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def settings_reference() -> str:
    """Markdown: a heading for every section of the settings, and an entry for each of its settings."""
    schema = json_schema()
    return "\n".join(_section(Config, "", schema, schema["$defs"], to_dict(Config())))


def _section(
    cls: type, prefix: str, node: Mapping[str, Any], definitions: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> Iterator[str]:
    """``defaults`` is None for the entries of a mapping or list, which have none of their own until one is added."""
    yield from ("", f"## `{prefix.removesuffix('.')}`" if prefix else "## The run", "", _plain(inspect.getdoc(cls)), "")
    helps, inner = _attribute_docstrings(cls), []
    own_first = sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__)
    for field in own_first:
        name, schema = field.name, node["properties"][field.name]
        below = _name_of_section(schema, definitions)
        if below and "$ref" in schema:
            inner.append((below, f"{prefix}{name}.", (defaults or {}).get(name)))
            continue
        if below:
            inner.append((below, f"{prefix}{name}.{'N' if 'items' in schema else 'NAME'}.", None))
        default = (defaults or {}).get(name, schema.get("default", ""))
        said = "none" if default in ("", [], {}, None) else f"`{_yaml(default)}`"
        if name in node.get("required", ()):
            said = "must be given"
        yield f"`{prefix}{name}`"
        yield f": Default: {said}. Values: {_values(schema, definitions)}."
        if name in helps:
            yield from ("", f"  {_plain(helps[name])}")
        yield ""
    for below, where, values in inner:
        yield from _section(_class(below), where, definitions[below], definitions, values)


def _name_of_section(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The name of the section that a setting is, or that its entries are; empty where they are plain values."""
    entries = schema.get("additionalProperties") or schema.get("items") or {}
    for one in (schema, entries, *(entries.get("anyOf", ()) if isinstance(entries, dict) else ())):
        name = one.get("$ref", "").rpartition("/")[2] if isinstance(one, dict) else ""
        if "properties" in definitions.get(name, {}):
            return name
    return ""


def _class(name: str) -> type:
    known, waiting = {}, [Section]
    while waiting:
        cls = waiting.pop()
        known[cls.__name__] = cls
        waiting += cls.__subclasses__()
    return known[name]


def _values(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What may be set, in words."""
    if "anyOf" in schema:
        return ", or ".join(_values(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"a list of: {_values(schema['items'], definitions)}"
    if schema.get("type") == "object" or "$ref" in schema:
        return "a mapping"
    if schema.get("type") == "null":
        return "`null`"
    bounds = [f"{word} {schema[bound]:,}" for bound, word in _BOUNDS.items() if bound in schema]
    return ", ".join([_KINDS[schema["type"]], *bounds])


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a class and of those it derives from."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if not issubclass(one, Section) or one is Section:
            continue
        [body] = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


def _plain(docstring: str | None) -> str:
    """A docstring as one line of Markdown."""
    return " ".join((docstring or "").replace("``", "`").split())


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
