"""Folders that somebody else may change meanwhile: opened name by name, no link followed."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.files import Json

FOLDER = os.O_PATH | os.O_DIRECTORY  # O_PATH asks for no permission to read: one may only be passed through


def distrusted() -> int:
    """The user whose links are not followed: the service's, in a process of root that acts as it; else -1."""
    return os.geteuid() if os.geteuid() != os.getuid() else -1


@contextmanager
def opened(folder: Path, *, links: bool = False) -> Iterator[int]:
    """Open a folder component by component and yield its descriptor; raises OSError if a component is a link.

    With `links` they are followed, as an operator may have made them, except those of the service (`distrusted`).
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
                    whose = " of the service's" if links and left else ""
                    raise OSError(errno.ELOOP, f"{name} on the way is a link{whose}", str(folder))
                names += reversed(Path(target).parts)
                left -= 1
            else:
                os.close(place)
                place = inner
        yield place
    finally:
        os.close(place)


def below(place: int, name: str, *, make: bool = False) -> int:
    """Open a folder below an open one, and make it first if need be; raises OSError for a link on the way to it."""
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
    """A folder below another, as a path that leads to it alone, whatever is put in its place. Raises OSError.

    On the way to `root` links are followed that are not the service's, below it none is.
    """
    with opened(root, links=True) as top, _descriptor(below(top, name, make=make)) as place:
        yield place


LEVELS, WAITING = 100, 30_000_000
"""Folders in each other, and characters of the paths of those that are still to be looked at."""


def branches(root: Path, name: str = "") -> Iterator[tuple[str, Path]]:
    """Every folder of the tree `name` below a folder, itself first: its path from there, with a `/` behind, and a path
    that leads to it alone until the next is asked for. Links as `inside`; what cannot be looked into counts as empty.

    Those that are `LEVELS` deep are the last, and no more wait than their paths fit into `WAITING`: who means well
    makes no such trees.
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
    """The path of an open folder, which is closed afterwards."""
    try:
        yield Path(f"/proc/self/fd/{folder}")
    finally:
        os.close(folder)


def real(path: Path | str) -> Path:
    """Where a path leads, links followed; raises OSError for a chain of them without an end."""
    try:
        return Path(os.path.realpath(path))
    except RecursionError:  # 3.12 and older
        raise OSError(errno.ELOOP, "links lead to links without an end", str(path)) from None


def mounts() -> list[Json]:
    """What is mounted: where, what and of which type (/proc/self/mountinfo, proc(5)); of one place the last is seen."""
    found: list[Json] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        found.append({"point": point, "what": after.split()[1], "type": after.split()[0]})
    return found


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and link of a tree with its own status, in no order; paths are relative."""
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
    """Every folder of a tree, each before those in it, no link followed. One that cannot be listed counts as empty."""
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        yield Path(folder)
        with suppress(OSError), os.scandir(folder) as entries:
            pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
