"""Safe access to folders that other users may change meanwhile: opened component by component, without links."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.files import Json

FOLDER = os.O_PATH | os.O_DIRECTORY  # O_PATH: a folder may be searchable but not readable


def distrusted() -> int:
    """Return the uid whose links are not followed: the service's in a root process that acts as it, else -1."""
    return os.geteuid() if os.geteuid() != os.getuid() else -1


@contextmanager
def opened(folder: Path, *, links: bool = False) -> Iterator[int]:
    """Open a folder component by component and yield its descriptor. Raises OSError if a component is a link.

    With `links`, follow links, such as an operator's, except those of the service (`distrusted`).
    """
    place, names, left = os.open("/", FOLDER), [".", *reversed(folder.parts[1:])], 40  # links, as the kernel follows
    try:
        while names:
            name = names.pop()
            inner = os.open(name, os.O_PATH | os.O_NOFOLLOW if names else os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
            status = os.fstat(inner)
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink("", dir_fd=inner)
                os.close(inner)
                if not links or status.st_uid == distrusted() or not left:
                    whose = " of the service user" if links and left else ""
                    raise OSError(errno.ELOOP, f"{name} in its path is a link{whose}", str(folder))
                names += reversed(Path(target).parts)
                left -= 1
            else:
                os.close(place)
                place = inner
        yield place
    finally:
        os.close(place)


def below(place: int, name: str, *, make: bool = False) -> int:
    """Open a folder below an open one and return its descriptor; `make` creates it. Raises OSError for a link."""
    here = os.dup(place)
    try:
        for each in filter(None, name.split("/")):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(each, dir_fd=here)
            inner = os.open(each, FOLDER | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
    except BaseException:
        os.close(here)
        raise
    return here


@contextmanager
def inside(root: Path, name: str = "", *, make: bool = False) -> Iterator[Path]:
    """Yield a /proc path pinned to the folder `name` below `root`, even if it is replaced meanwhile. Raises OSError.

    Follows links on the way to `root` except the service's; follows none below it.
    """
    with opened(root, links=True) as top, _descriptor(below(top, name, make=make)) as place:
        yield place


LEVELS, WAITING = 100, 30_000_000
"""Maximum nesting depth, and maximum total length of the paths of pending folders in characters."""


def branches(root: Path, name: str = "") -> Iterator[tuple[str, Path]]:
    """Yield every folder of the tree `name` below `root`, itself first: its relative path with a trailing `/`, and a
    pinned path, valid until the next iteration. Follows links like `inside`; skips unreadable folders.

    Stops descending at `LEVELS`, and skips folders when pending paths exceed `WAITING`: only hostile trees get there.
    """
    pending, room = [f"{name}/" if name else ""], WAITING
    with opened(root, links=True) as top:
        while pending:
            name = pending.pop()
            room += len(name)
            with suppress(OSError), _descriptor(below(top, name)) as place:
                yield name, place
                if name.count("/") < LEVELS:
                    with os.scandir(place) as entries:
                        for entry in entries:
                            if room > 0 and entry.is_dir(follow_symlinks=False):
                                pending.append(f"{name}{entry.name}/")
                                room -= len(pending[-1])


@contextmanager
def _descriptor(folder: int) -> Iterator[Path]:
    """Yield the /proc path of an open folder, then close it."""
    try:
        yield Path(f"/proc/self/fd/{folder}")
    finally:
        os.close(folder)


def real(path: Path | str) -> Path:
    """Resolve a path's links. Raises OSError for a link loop."""
    try:
        return Path(os.path.realpath(path))
    except RecursionError:  # 3.12 and older
        raise OSError(errno.ELOOP, "too many levels of links", str(path)) from None


def mounts() -> list[Json]:
    """Return all mounts: point, source and type (/proc/self/mountinfo, proc(5)); the last one at a point is visible."""
    found: list[Json] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        found.append({"point": point, "what": after.split()[1], "type": after.split()[0]})
    return found


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every file and link of a tree with its own status, unordered; paths are relative."""
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(f"{root}/{folder}") as entries:  # a Path for each would double the time of 65,000 files
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                else:
                    yield name, entry.stat(follow_symlinks=False)


def tree(root: Path) -> Iterator[Path]:
    """Yield every folder of a tree, parents first, without following links. Unreadable folders count as empty."""
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        yield Path(folder)
        with suppress(OSError), os.scandir(folder) as entries:
            pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
