"""Decoding of JSON into this package's dataclasses, for the agent; the client uses msgspec."""

from __future__ import annotations

import functools
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decode(kind: type[T], value: Any, where: str = "", *, lenient: bool = False) -> T:
    """Return `value` as an instance of the dataclass `kind`. Raises ValueError with the first wrong field.

    With `lenient`, as for records of agents of other versions, unknown fields are ignored.
    """
    found: T = _decoded(kind, value, where or kind.__name__, lenient)
    return found


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decoded(kind: Any, value: Any, where: str, lenient: bool) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _object(kind, value, where, lenient)
    if origin in (Union, types.UnionType):  # only `X | None`
        return None if value is None else _decoded(args[0], value, where, lenient)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        inner = args[0] if args[1:] in ((), (...,)) else None
        if inner is None and len(value) != len(args):
            raise ValueError(f"{where} has {len(value)} values instead of {len(args)}")
        return origin(_decoded(inner or args[at], each, f"{where}[{at}]", lenient) for at, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decoded(args[1], each, f"{where}.{key}", lenient) for key, each in value.items()}
    if origin is Literal and value in args:
        return value
    expected = dict if hasattr(kind, "__total__") else kind  # a TypedDict
    if kind is Any or type(value) is expected or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{where} is {type(value).__name__}, expected {getattr(kind, '__name__', kind)}")


def _object(kind: Any, value: Any, where: str, lenient: bool) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, expected an object")
    known = {each.name: each for each in fields(kind)}
    required = {name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    given = {name: each for name, each in value.items() if name in known or not lenient}
    if wrong := sorted((given.keys() - known.keys()) | (required - given.keys())):
        raise ValueError(f"{where}.{wrong[0]} is {'missing' if wrong[0] in required else 'unknown'}")
    hints = _hints(kind)
    return kind(**{name: _decoded(hints[name], each, f"{where}.{name}", lenient) for name, each in given.items()})
