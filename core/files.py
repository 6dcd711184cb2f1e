"""Files: hash, list, lock, and write in one rename."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from core import console
from core.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHECKOUT = Path(__file__).resolve().parent.parent


def blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file, in blocks."""
    while block := file.read(min(size, 1 << 16)):
        size -= len(block)
        yield block


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LARGEST = 200_000_000
"""Maximum bytes of a file in a source tree."""

LARGEST_WHEEL = 4_000_000_000
"""Maximum bytes of a package whose hash the index states: torch and cuBLAS have almost a gigabyte each."""


def tree(root: Path, largest: int = LARGEST) -> list[tuple[str, Path]]:
    """List every file of a tree by its relative path, sorted, to hash, pack or bundle the tree.

    A symbolic link to a file of the same tree counts as that file. Raises SourceError for other links, which would send
    other files of this machine, and for devices, pipes, sockets, huge files and names with control characters.
    """
    real, found = Path(os.path.realpath(root)), []
    pending = [root]
    while pending:
        if len(pending[-1].parts) - len(root.parts) > 100:
            raise SourceError("unsafe-tree", f"{root.name}: {pending[-1].relative_to(root)} is too deep", hint=_REFUSED)
        with os.scandir(pending.pop()) as entries:
            listed = list(entries)
        pending += [Path(entry.path) for entry in listed if entry.is_dir(follow_symlinks=False)]
        for path in (Path(entry.path) for entry in listed):
            name = os.fsencode(path.relative_to(root)).decode(errors="backslashreplace")
            inside = not path.is_symlink() or _real(path).is_relative_to(real)
            if not plain(name) or name != str(path.relative_to(root)):
                what = f"{root.name}: the name {name!r} is not UTF-8, or has control characters"
                raise SourceError("unsafe-tree", what, hint=_REFUSED)
            if inside and path.is_file():
                if path.stat().st_size > largest:
                    what = f"{root.name}: {name} is larger than {largest // 1_000_000} MB"
                    raise SourceError(
                        "unsafe-tree", what, cause="trees contain code; models are not sent", hint=_REFUSED
                    )
                found.append((name, path))
            elif not inside or path.is_symlink() or not path.is_dir():
                kind = f"a link to {path.readlink()}" if path.is_symlink() else "a device, pipe or socket"
                raise SourceError(
                    "unsafe-tree",
                    f"{root.name}: {name} is {kind}",
                    cause="only files, and links to files of the same tree, are hashed, packed or sent",
                    hint=_REFUSED,
                )
    return sorted(found)


def plain(name: str) -> bool:
    """Whether a file name is UTF-8 without control characters, tabs and newlines."""
    return console.printable(name) == name and not {"\n", "\t"} & set(name)


def _real(link: Path) -> Path:
    """The target of a link; `/` when it does not exist or the kernel cannot follow it."""
    try:
        return Path(os.path.realpath(link, strict=True))
    except OSError:
        return Path("/")


_REFUSED = "delete it from your own folder; exclude it from a node or recipe with `without`"


def tree_hash(root: Path, names: Iterable[str] | None = None) -> str:
    """The SHA-256 of a tree: sorted relative paths, the executable bit and every file's content.

    `names` (relative paths) limits it to files whose links the caller has checked. Times, owners and empty folders do
    not count.
    """
    digest = hashlib.sha256()
    for name, path in tree(root) if names is None else ((name, root / name) for name in sorted(names)):
        executable = "x" if path.stat().st_mode & 0o100 else "-"
        digest.update(f"{name}\0{executable}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def draft(place: Path) -> Iterator[Path]:
    """Yield a path for a file or folder that the caller then renames to `place`.

    It is in a locked folder next to `place`, which is deleted at the end. Folders of killed runs are deleted first:
    the kernel has released their locks, also on a shared home. Process ids would not identify them: they repeat in
    containers and mean nothing on another machine.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for stale in place.parent.glob(f".{glob.escape(place.name)}.*"):
        sweep(stale)
    lock = None
    while lock is None:  # another run's sweep may come between the next two lines, and delete the folder
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        lock = _lock(folder)
    try:
        yield folder / place.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(stale: Path) -> None:
    """Delete the folder of a killed run; keep one that is locked or belongs to another user."""
    with suppress(PermissionError):
        if not stale.is_dir():  # older versions left plain files, too
            stale.unlink(missing_ok=True)
        elif (lock := _lock(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a draft's folder; None when another process has locked or deleted it."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)  # NFS locks only what is open for writing
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), (folder / "lock").stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one rename: readers see the old or the new content, also after a power cut."""
    with draft(path) as part:
        with part.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


_making: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)


@contextmanager
def atomic_dir(place: Path) -> Iterator[Path]:
    """Create the folder `place` in one rename: yield an empty folder to fill, and delete it when the body fails.

    Threads that create the same folder take turns. Of several processes, the first one's folder stays.
    """
    with _making[place], draft(place) as part:
        part.mkdir()
        yield part
        os.sync()  # an existing folder counts as complete, also after a power cut
        try:
            part.rename(place)
        except OSError:
            if not place.is_dir():
                raise


@contextmanager
def locked(path: Path, on_wait: Callable[[], None], *, shared: bool = False) -> Iterator[int]:
    """Hold the lock file at `path`; call `on_wait` first when another process holds it.

    A `shared` lock excludes only those that are not.

    Yields the descriptor. A `flock` belongs to the open file, so a child that inherits the descriptor keeps
    the lock when this process is killed, and the next run waits for that child.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, kind)
        yield descriptor
    finally:
        os.close(descriptor)
