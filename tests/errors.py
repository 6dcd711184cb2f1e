"""Assertions on errors."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from core.errors import HearthError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def raises(kind: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[HearthError]]:
    """Expect an error of that kind."""
    with pytest.raises(HearthError, match=match) as raised:
        yield raised
    assert raised.value.kind == kind


def killed(place: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Put a program on PATH that is killed before it writes anything."""
    path = place / "killed" / program
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nkill -9 $$\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def kind_of(stderr: str) -> str:
    """The kind of the last error in the output of a task; empty without one."""
    found = re.findall(r"^(?:\S+: )?error\[([a-z-]+)\]: ", stderr, re.MULTILINE)
    return str(found[-1]) if found else ""
