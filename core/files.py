"""Where Hearth's files lie, and the few things done with files everywhere: hash, lock, write in one rename."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHECKOUT = Path(__file__).resolve().parent.parent


_inside: list[Path] = []


@contextmanager
def inside(place: Path) -> Iterator[None]:
    """Take recipes, configuration, locks, cache and wheelhouse from a folder, a bundle's, and from nowhere else."""
    _inside.append(place)
    try:
        yield
    finally:
        _inside.pop()


def checkout() -> Path:
    """Where recipes, profiles and locks lie: the checkout, or the bundle that is open."""
    return _inside[-1] / "checkout" if _inside else CHECKOUT


def cache() -> Path:
    """The cache directory: $HEARTH_CACHE, else `hearth` in the user's cache directory (XDG)."""
    if _inside:
        return _inside[-1] / "cache"
    if chosen := os.environ.get("HEARTH_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hearth"


def wheelhouse() -> Path:
    """Where finished wheels are kept: $HEARTH_WHEELHOUSE, else `wheelhouse/` in the checkout."""
    if _inside:
        return _inside[-1] / "wheelhouse"
    return Path(os.environ.get("HEARTH_WHEELHOUSE") or CHECKOUT / "wheelhouse").absolute()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(root: Path, names: Iterable[str] | None = None) -> str:
    """The SHA-256 of a tree: sorted relative paths, the executable bit and every file's content.

    `names` (relative paths) limits it; times, owners and empty directories do not count.
    """
    if names is None:
        names = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in sorted(names):
        path = root / name
        executable = "x" if path.stat().st_mode & 0o100 else "-"
        digest.update(f"{name}\0{executable}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one rename: whoever reads it sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(content if isinstance(content, bytes) else content.encode())
    part.rename(path)


_making: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """Make the folder `place` in one rename: yields an empty folder to fill, and drops it when the body fails.

    What killed runs left of the same folder is swept away first. Threads that make the same folder do so in turn.
    """
    with _making[place]:
        yield from _whole(place)


def _whole(place: Path) -> Iterator[Path]:
    place.parent.mkdir(parents=True, exist_ok=True)
    for stale in place.parent.glob(f".{place.name}.*"):
        if not Path(f"/proc/{stale.suffix[1:]}").exists():
            shutil.rmtree(stale)
    part = place.with_name(f".{place.name}.{os.getpid()}")
    part.mkdir()
    try:
        yield part
        if not place.exists():  # another run may have made it meanwhile
            part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the lock file at `path`; call `on_wait` first when someone else holds it.

    Yields the descriptor. A `flock` belongs to the open file, so a child that inherits the descriptor keeps
    the lock when this process is killed: the next run then waits for that child instead of racing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
