"""Says of an argument of the command line that is no setting how the setting is written that is meant."""

from __future__ import annotations

import re
import reprlib

NAMED_BY = {"env": "id", "policy": "kind"}
"""The setting of a section that says what the section is about."""

_ENVIRONMENT = re.compile(r"[\w.:/-]*-v\d+|[\w.]+:[\w.:/-]+")
"""What can only be meant as an environment's id."""

_short = reprlib.Repr()
_short.maxstring = 80


def why_no_setting(argument: str) -> str:
    """What is expected in place of ``argument``; empty where it has the form of a setting."""
    if argument.startswith("-") and (option := argument.lstrip("-")):
        path, *value = re.split("[= ]", option, maxsplit=1)
        path = f"{path}.{NAMED_BY[path]}" if path in NAMED_BY else path
        return f"argument {_short.repr(argument)}: settings have no dashes; expected {path}={(value or ['VALUE'])[0]}"
    path, equals, _ = argument.partition("=")
    if not equals or not path or not all(path.split(".")):
        example = f"env.id={argument}" if _ENVIRONMENT.fullmatch(argument) else "learner.batch_size=64"
        return f"argument {_short.repr(argument)}: expected key=value, e.g. {example}"
    return ""


def as_written(arguments: list[str], unknown: list[str], settings: list[str]) -> list[str]:
    """The settings of a command line, and its ``unknown`` options, each with the word after it that is its value.

    Args:
        arguments: all words.
        unknown: those that begin with dashes and are no option of the command.
        settings: those that may be settings.
    """
    left = list(settings)
    found = []
    for option, follows in zip(arguments, [*arguments[1:], ""], strict=True):
        if option not in unknown:
            continue
        if "=" not in option and "=" not in follows and follows in left:
            left.remove(follows)
            option = f"{option} {follows}"
        found.append(option)
    return [*left, *found]
