"""Assertions on errors."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from core.errors import HearthError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def raises(kind: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[HearthError]]:
    """Expect an error of that kind."""
    with pytest.raises(HearthError, match=match) as raised:
        yield raised
    assert raised.value.kind == kind


def kind_of(stderr: str) -> str:
    """The kind of the last error in the output of a task; empty without one."""
    found = re.findall(r"^(?:\S+: )?error\[([a-z-]+)\]: ", stderr, re.MULTILINE)
    return str(found[-1]) if found else ""
