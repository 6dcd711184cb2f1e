"""Loads TOML files into frozen structs. An unknown key is an error with its path and the nearest known key."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import tomli

from core import foreign, typed
from core.errors import ConfigError, SourceError, suggest

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")


def load(path: Path, kind: type[T]) -> T:
    """Load the TOML file at `path` as a `kind` (a msgspec type). Raises ConfigError, as `convert` does."""
    return convert(path, table(path), kind)


def convert(path: Path, raw: dict[str, Any], kind: type[T]) -> T:
    """Convert the table `raw`, read from `path`, to a `kind`.

    Raises ConfigError with the file, the key's path and, for an unknown key or value, the known ones.
    """
    try:
        return typed.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        info, more = _at(kind, text)
        hint = ""
        if unknown := re.search(r"unknown field `([^`]+)`", text):
            hint = suggest(unknown[1], [field.encode_name for field in getattr(info, "fields", ())])
        elif values := _values(info):
            wrong = re.match(r"Invalid enum value '(.*)' - at", text, re.DOTALL)
            given = wrong[1] if wrong else ""
            hint = "; ".join(filter(None, [suggest(given, values), more.get(given, "")]))
        raise ConfigError("config", f"{path}: {text}", hint=hint) from error


DOTS = 200
"""Maximum dots in a line: the parser takes a minute for a key of 100,000 parts, which a bundle could contain."""

_parsed: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}
"""Each file that this command has read, with the identity of its content. A bundle's files have their own paths."""


def table(path: Path) -> dict[str, Any]:
    """The content of a TOML file; reads the file again only if it changed. Callers must not modify the result.

    The file may come from a bundle, with any size, nesting and type. Raises ConfigError.
    """
    try:
        about = path.stat()
        state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if path in _parsed and _parsed[path][0] == state:
            return _parsed[path][1]
        content = _parse(path)
        if time.time_ns() - about.st_mtime_ns > 50_000_000:  # otherwise the next change could get the same time stamp
            _parsed[path] = (state, content)
        return content
    except FileNotFoundError as error:
        raise ConfigError("config", f"{path} does not exist") from error
    except (OSError, SourceError) as error:
        raise ConfigError(
            "config",
            error.what if isinstance(error, SourceError) else f"{path} cannot be read: {error}",
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of 5,000 digits, and invalid UTF-8
        raise ConfigError("config", f"{path} is not TOML: {error}") from error


def _parse(path: Path) -> dict[str, Any]:
    text = foreign.content(path).decode("utf-8-sig")  # editors of Windows write a BOM
    if max(line.count(".") for line in text.split("\n")) > DOTS:
        raise ConfigError("config", f"{path} is not accepted: one of its lines has more than {DOTS} dots")
    return tomli.loads(text)


def _at(kind: Any, message: str) -> tuple[Any, dict[str, str]]:
    """The type at the path that a msgspec message names (`... - at `$.modules[0]``), and its hints for wrong values.

    A type gives hints by `Annotated[..., msgspec.Meta(extra={VALUE: HINT})]`.
    """
    place = re.search(r"at (`key` in )?`\$([^`]*)`", message)
    info, hints = _plain(msgspec.inspect.type_info(kind))
    for step in re.findall(r"\.\w+|\[[^\]]*\]", place[2] if place else ""):
        info, hints = _plain(_child(info, step))
    return _plain(info.key_type) if place and place[1] else (info, hints)


def _child(info: Any, step: str) -> Any:
    if step.startswith("."):
        for field in getattr(info, "fields", ()):
            if field.encode_name == step[1:]:
                return field.type
    return getattr(info, "value_type", None) or getattr(info, "item_type", info)


def _plain(info: Any) -> tuple[Any, dict[str, str]]:
    """A type without None and without its annotation, which holds hints for wrong values."""
    info = next((each for each in getattr(info, "types", ()) if not isinstance(each, msgspec.inspect.NoneType)), info)
    return (info.type, info.extra or {}) if isinstance(info, msgspec.inspect.Metadata) else (info, {})


def _values(info: Any) -> list[str]:
    """The permitted values of an enumerated type; of others none."""
    if isinstance(info, msgspec.inspect.EnumType):
        return [str(each.value) for each in info.cls]
    return [str(each) for each in info.values if each] if isinstance(info, msgspec.inspect.LiteralType) else []
