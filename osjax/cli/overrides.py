"""`--key value` pairs that change a configuration, alike for every command.

Dots reach into sections, dashes equal underscores, and a key whose last name is unique may be given by it alone
(`--num-steps` is `--sampling_option.num_steps`). Of a key given twice the last value counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from osjax.cli.parser import Parser
from osjax.errors import OsjaxError

Help = Mapping[str, Mapping[str, str]]  # title of a group → key → what it does

_SWITCH = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Field:
    """What a key takes.

    parse: from a word to the value, or argparse.ArgumentTypeError; kind: the value's type, as the help calls it;
    default: the configuration's; whole: the key is always given in full, because its last name is the user's own
    or says too little.
    """

    parse: Callable[[str], Any]
    kind: str
    default: Any
    whole: bool = False


class Fields:
    """The keys of a command, by their full names."""

    def __init__(self, fields: Mapping[str, Field]):
        self._fields = dict(fields)
        self._last_names = [key.rpartition(".")[2] for key, field in fields.items() if not field.whole]

    def read(self, parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
        """What `argv` gives: values by full key, and what `parser` knows besides. Raises OsjaxError with one line."""
        values, unknown = parser.parse_known_args([self._canonical(token) for token in argv])
        if unknown:
            raise self._unknown(unknown[0])
        return vars(values)

    def add_to(self, parser: Parser, texts: Help) -> None:
        """One option for each key; the help shows those that have a text."""
        hidden = self._fields.keys() - {key for group in texts.values() for key in group}
        for title, group in texts.items():
            options = parser.add_argument_group(title)
            for key, text in group.items():
                default = _shown(self._fields[key].default, " [{}]")
                self._add(options, key, help=(text + default).replace("%", "%%"))
        for key in hidden:
            self._add(parser, key, help=argparse.SUPPRESS)

    def markdown(self, texts: Help) -> str:
        """The keys as tables, for docs/cli.md."""
        lines = []
        for title, group in texts.items():
            lines += [f"### {title.capitalize()}", "", "| option | default | |", "|---|---|---|"]
            for key, text in group.items():
                lines.append(f"| `--{self.short(key)}` | {_shown(self._fields[key].default, '`{}`')} | {text} |")
            lines.append("")
        return "\n".join(lines)

    def short(self, key: str) -> str:
        """The last name of `key`, if no other key can be meant by it."""
        name = key.rpartition(".")[2]
        return key if self._fields[key].whole or self._last_names.count(name) > 1 else name

    def spellings(self) -> dict[str, str]:
        """Every way to name a key, but for dashes, and the key."""
        return {name: key for key in self._fields for name in (key, self.short(key))}

    def parse(self, key: str, word: str) -> Any:
        """The value of `key` that a word gives, as on a command line. Raises OsjaxError for one of another type."""
        try:
            return self._fields[key].parse(word)
        except argparse.ArgumentTypeError as error:
            raise OsjaxError(f"{self.short(key)}: {error}") from error

    def nearest(self, key: str) -> str:
        """The known key, long or short, that is most like `key`."""
        return difflib.get_close_matches(key, sorted(self.spellings()), n=1, cutoff=0.0)[0]

    def _add(self, options: argparse._ActionsContainer, key: str, help: str) -> None:
        field = self._fields[key]
        options.add_argument(f"--{self.short(key)}", dest=key, type=field.parse, metavar=field.kind.upper(), help=help)

    def _canonical(self, token: str) -> str:
        """`--sampling-option.num-steps=3` → `--num_steps=3`; what is no key stays as it is."""
        if not token.startswith("--"):
            return token
        key, equals, value = token[2:].partition("=")
        key = key.replace("-", "_")
        return f"--{self.short(key) if key in self._fields else key}{equals}{value}"

    def _unknown(self, token: str) -> OsjaxError:
        if not token.startswith("--"):
            return OsjaxError(
                f"{token!r} follows no key: put the configuration first, values after keys, both in quotes"
            )
        key = token[2:].partition("=")[0]
        return OsjaxError(f"unknown option --{key}: did you mean --{self.nearest(key)}?")


def new_parser(command: str, usage: str, description: str, example: str) -> Parser:
    """A parser for keys; what is not given is left out of what it returns. example: a key with its section."""
    return Parser(
        f"osjax {command}",
        usage=usage,
        description=description,
        epilog=f"In keys dashes equal underscores, and a section may be named: {example}.",
        argument_default=argparse.SUPPRESS,
    )


def run_file(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The configuration of that name in `folder`, or of the `.py` file at that path: the file, and nested options.

    Raises OsjaxError for a file that is missing or does not run.
    """
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "base"))
        raise OsjaxError(f"no configuration {name!r}: give the path of a .py file, or one of {', '.join(names)}")
    try:
        options = dict(runpy.run_path(str(path))["get_config"]().items())
    except Exception as error:  # whatever a user's file may raise
        raise OsjaxError(f"{path} does not run ({type(error).__name__}: {error}): mend its get_config()") from error
    return path, {key: value.to_dict() if isinstance(value, ConfigDict) else value for key, value in options.items()}


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.name": value} of nested sections."""
    flat = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def parser_of(kind: type, optional: bool = False) -> Callable[[str], Any]:
    """A function from a word to an int, float, bool or str, or to None if `optional` and the word is None."""
    parse = {int: _integer, float: _number, bool: _switch, str: _text}[kind]
    return lambda word: None if optional and word == "None" else parse(word)


def _integer(word: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", word):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number")
    return int(word)


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word!r} is not a finite number")
    return number


def _switch(word: str) -> bool:
    if word.lower() not in _SWITCH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return _SWITCH[word.lower()]


def _text(word: str) -> str:
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is not UTF-8") from error
    return word


def _shown(default: Any, form: str) -> str:
    """`form` with the default in it, or nothing if there is none to show."""
    if isinstance(default, Mapping):
        default = ", ".join(f"{key} {value}" for key, value in default.items())
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))
    return "" if default in (None, "") else form.format(default)
