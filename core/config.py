"""Loads a TOML file into a frozen noun, strictly: unknown keys are refused with their path and a near match."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from core import foreign
from core.errors import ConfigError, TreeError, near

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


def load(path: Path, kind: type[T]) -> T:
    """Load the TOML file at `path` as a `kind` (a msgspec type). Raises ConfigError, as `convert` does."""
    return convert(path, table(path), kind)


def convert(path: Path, raw: dict[str, Any], kind: type[T]) -> T:
    """Convert the table `raw`, read from `path`, to a `kind`.

    Raises ConfigError with the file, the place in it and, for an unknown key, the nearest known one.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        unknown = re.search(r"unknown field `([^`]+)`", text)
        hint = near(unknown[1], _keys(kind, text)) if unknown else ""
        raise ConfigError(f"{path}: {text}", hint=hint) from error


DOTS = 200
"""Dots in a line: the parser takes a minute for a key of 100,000 parts. Only what a bundle brings has many."""


def table(path: Path) -> dict[str, Any]:
    """What a TOML file says, which may be a bundle's: of any size, nesting and kind. Raises ConfigError."""
    try:
        text = foreign.content(path).decode()
        if max(line.count(".") for line in text.split("\n")) > DOTS:
            raise ConfigError(f"{path} is not read: a line of it has more than {DOTS} dots")
        return tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except (OSError, TreeError) as error:
        raise ConfigError(error.what if isinstance(error, TreeError) else f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: of a number of 5,000 digits, and of what is no UTF-8
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _keys(kind: Any, message: str) -> set[str]:
    """The keys known at the place that a msgspec message names (`... - at `$.modules[0]``)."""
    place = re.search(r"at `\$([^`]*)`", message)
    info = msgspec.inspect.type_info(kind)
    for step in re.findall(r"\.\w+|\[[^\]]*\]", place[1] if place else ""):
        info = _child(info, step)
    fields = getattr(_without_none(info), "fields", ())
    return {field.encode_name for field in fields}


def _child(info: Any, step: str) -> Any:
    info = _without_none(info)
    if step.startswith("."):
        for field in getattr(info, "fields", ()):
            if field.encode_name == step[1:]:
                return field.type
    return getattr(info, "value_type", None) or getattr(info, "item_type", info)


def _without_none(info: Any) -> Any:
    for option in getattr(info, "types", ()):
        if not isinstance(option, msgspec.inspect.NoneType):
            return option
    return info
