"""What is read of fetched sources is kept in the cache: a pinned source never changes."""

from __future__ import annotations

import gc
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from core import files, workspace
from core.typed import from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T", bound=msgspec.Struct)

_CODE = ("api", "evaluate", "interface", "values")
"""The modules of this package that read sources; others read them again."""


def kept(kind: type[T], read: Callable[..., T], *trees: Path) -> T:
    """The result of `read` for these trees, which is read once for fetched sources."""
    place = place_of(kind, *trees)
    if place is None:
        with _uncollected():
            return read(*trees)
    if not place.exists():
        with _uncollected():
            files.write(place, msgspec.json.encode(read(*trees)))
    return from_json(place.read_bytes(), kind)


def place_of(kind: type[msgspec.Struct], *trees: Path) -> Path | None:
    """The file with what was read of these trees; None if they are not all fetched sources."""
    if any(each.parent != workspace.current().cache / "sources" for each in trees):
        return None
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _CODE)
    named = "-".join([*(each.name for each in trees), kind.__name__, hashlib.sha256(code).hexdigest()[:16]])
    return workspace.current().cache / "interfaces" / f"{named}.json"


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile: syntax trees have millions of objects and no cycles."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
