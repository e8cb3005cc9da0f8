"""Upstream's options by name: those that a model here has, and an error for those that nobody knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from osjax.errors import OsjaxError


def fields_of(options: Mapping[str, Any], config: type, *, unused: Collection[str], model: str) -> dict[str, Any]:
    """The options that are fields of the dataclass `config`; JSON's lists become tuples.

    unused: options that upstream has and that change nothing here. Raises OsjaxError for one that is neither, naming
    it as the `model`'s.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    refuse_unknown(options, fields.union(unused), model)
    known = {name: value for name, value in options.items() if name in fields}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def refuse_unknown(options: Collection[str], known: Collection[str], model: str) -> None:
    """Raises OsjaxError if one of the options is none of those known."""
    unknown = sorted(set(options).difference(known))
    if unknown:
        raise OsjaxError(f"unknown {model} options {', '.join(unknown)}: mend the config of the checkpoint")
