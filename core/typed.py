"""Values of declared types from plain ones: msgspec's conversions, one at a time.

A type that two threads use for the first time at once crashes the process: msgspec 0.22 lets another thread run while
it prepares the type. Conversions hold the GIL anyway, so the lock costs nothing.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")

_turn = threading.RLock()


def convert(value: object, kind: type[T]) -> T:
    """A value of this type, such as a struct of a dictionary. Raises msgspec.ValidationError."""
    with _turn:
        return msgspec.convert(value, kind)


def from_json(text: bytes | str, kind: type[T]) -> T:
    """The value of this type that JSON contains. Raises msgspec.DecodeError, or ValidationError, one of its kinds."""
    with _turn:
        return msgspec.json.decode(text, type=kind)
