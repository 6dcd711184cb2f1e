"""Converts plain values and JSON to declared types, with msgspec, in one thread at a time.

msgspec 0.22 is not thread-safe when a type is used for the first time: the process crashes if two threads do so at
once. A conversion holds the GIL most of the time anyway, so the lock costs little.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")

_turn = threading.RLock()


def convert(value: object, kind: type[T]) -> T:
    """Convert a plain value, such as a dictionary, to this type. Raises msgspec.ValidationError."""
    with _turn:
        return msgspec.convert(value, kind)


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Decode JSON to this type. Raises msgspec.DecodeError for invalid JSON, and its subclass ValidationError."""
    with _turn:
        return msgspec.json.decode(text, type=kind)
