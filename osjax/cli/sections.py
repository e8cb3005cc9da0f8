"""Frozen dataclasses from flat options, `{"run.steps": 1000}`, and what their type hints say about a key.

A field is an int, float, bool or str, one of these or None, a tuple of them, a mapping, or a section, which is another
dataclass. A mapping has keys of the user's own, `flow.conditions.t2v`, down to where its values are no mappings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from osjax.cli.overrides import parser_of

Section = TypeVar("Section")


def build(kind: type[Section], options: Mapping[str, Any], prefix: str = "") -> Section:
    """The dataclass `kind` with what `options` say below `prefix`; what they leave out keeps its default.

    A mapping is replaced as a whole by the entries given. The values must be of the right types (`fit` sees to that).
    """
    arguments: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        key = prefix + name
        if dataclasses.is_dataclass(hint):
            arguments[name] = build(hint, options, f"{key}.")
        elif key in options:
            arguments[name] = options[key]
        elif entries := below(options, f"{key}."):
            arguments[name] = _nested(entries)
    return kind(**arguments)


def below(options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The options whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}


def hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """{full key: type hint} of the dataclass and its sections; a mapping is one key."""
    found: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        found |= hints(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def hint_of(kind: type, key: str) -> Any:
    """The type hint of a key or of an entry of a mapping; None for other names, and for sections and whole mappings."""
    hint: Any = kind
    for name in key.split("."):
        if dataclasses.is_dataclass(hint):
            hint = _hints(hint).get(name)
        else:
            hint = typing.get_args(hint)[1] if is_mapping(hint) else None
    return None if dataclasses.is_dataclass(hint) or is_mapping(hint) else hint


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def is_mapping(hint: Any) -> bool:
    """Whether a hint is `Mapping[...]`."""
    return typing.get_origin(hint) is Mapping


def fit(value: Any, hint: Any) -> Any:
    """`value` as its hint wants it: a float may be given as an int and a tuple as a list. Raises TypeError."""
    arguments = typing.get_args(hint)
    if hint is Any or (value is None and type(None) in arguments):
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) != (_length(hint) or len(value)):
            raise TypeError
        return tuple(fit(each, arguments[0]) for each in value)
    kind = arguments[0] if arguments else hint
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def describe(hint: Any) -> str:
    """`int`, `float,float`, `str,...`; `value` for anything."""
    if hint is Any:
        return "value"
    if typing.get_origin(hint) is tuple:
        return ",".join("..." if each is ... else each.__name__ for each in typing.get_args(hint))
    return (typing.get_args(hint) or (hint,))[0].__name__


def word_parser(hint: Any) -> Callable[[str], Any]:
    """A function from a word of the command line to a value; it raises argparse.ArgumentTypeError.

    The values of a tuple are parted by commas or, if there is one, by semicolons: `"a cat, asleep;"` is one of them.
    """
    if hint is Any:
        return _anything
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return lambda word: _several(word, parser_of(arguments[0]), _length(hint))
    return parser_of(arguments[0] if arguments else hint, optional=type(None) in arguments)


def _length(hint: Any) -> int | None:
    """How many values a tuple has; None for any number."""
    arguments = typing.get_args(hint)
    return None if arguments[-1] is ... else len(arguments)


def _several(word: str, parse: Callable[[str], Any], length: int | None) -> tuple[Any, ...]:
    parts = [part.strip() for part in word.split(";" if ";" in word else ",")]
    values = tuple(parse(part) for part in parts if part)
    if length not in (None, len(values)):
        raise argparse.ArgumentTypeError(f"{word!r} has not {length} values")
    return values


def _anything(word: str) -> Any:
    """The value that a word looks like: None, a number, a switch, a tuple of them, or text."""
    if word == "None":
        return None
    if "," in word:
        return _several(word, _anything, None)
    for kind in (int, float, bool):
        try:
            return parser_of(kind)(word)
        except argparse.ArgumentTypeError:
            continue
    return parser_of(str)(word)


def _nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} → {"a": {"b": 1}}, in the order of the names, so that a drawing by weights depends on nothing else."""
    nested: dict[str, Any] = {}
    for key, value in sorted(entries.items()):
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    return nested
