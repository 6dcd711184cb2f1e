"""Deleting trees without following links and without leaving their file system."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agent.files import Fault
from agent.folders import FOLDER, mounts, opened


def remove(path: Path) -> None:
    """Delete a file, a link or a tree, read-only folders too. Follows no link; raises Fault when something is left."""
    sweep = SafeDeleter()
    if os.path.lexists(path):
        sweep.delete(path)
    if left := [*sweep.stuck, *(f"{point} is a mount point" for point in sweep.left)]:
        raise Fault("step", f"{path} cannot be deleted", "\n".join(left[:20]), "run the same command again")


class _Level(NamedTuple):
    """A folder that is being emptied: its path, its identity, entries to go, and how many were kept before it."""

    path: str
    identity: tuple[int, int]
    names: list[str]
    kept: int
    more: bool = False  # than were read at once


class SafeDeleter:
    """Deleting where others may have put links and mounts: no link is followed, and no mount is entered.

    `files` counts what is gone, `left` are the mount points that stay, `stuck` says what could not be deleted. A tree
    may have any depth: only one of its folders is open at a time, and no path to it is used, whose length is limited.
    A folder may have any number of entries, and what cannot be deleted in `seconds` is left.
    """

    def __init__(self, seconds: float = 1800) -> None:
        self._end, self._seconds = time.monotonic() + seconds, seconds
        self.files = 0
        self.left: list[str] = []
        self.stuck: list[str] = []
        self._mounts = {each["point"] for each in mounts()}  # known before they are opened: a dead server's would hang
        self._longest = max([1000, *map(len, self._mounts)])  # of paths: whole ones would fill the memory

    def delete(self, path: Path) -> None:
        """Delete a file, a link, or a folder with all that is in it, as far as that is possible."""
        parent = Path(os.path.realpath(path.parent))
        with opened(parent) as top:
            here, mount = os.dup(top), _mount_id(top)
            way = [_Level(str(parent).rstrip("/"), _identity(top), [path.name], 0)]
            try:
                while way[-1].names or len(way) > 1:
                    if time.monotonic() > self._end:
                        self.stuck.append(f"{path}: there is more than {self._seconds:.0f} s suffice for")
                        return
                    here = self._enter(here, way, mount) if way[-1].names else self._leave(here, way)
            finally:
                os.close(here)

    def _enter(self, here: int, way: list[_Level], mount: str) -> int:
        """Delete the next entry of the open folder, or go into it; returns the folder that is open then."""
        name = way[-1].names.pop()
        path = f"{way[-1].path}/{name}"[-self._longest :]
        other = None
        try:
            if path in self._mounts:
                self.left.append(path)
            elif not stat.S_ISDIR(os.lstat(name, dir_fd=here).st_mode):
                os.unlink(name, dir_fd=here)
                self.files += 1
            else:
                other = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=here)
                if _mount_id(other) != mount:  # whoever may write here could have renamed a folder above it
                    self.left.append(path)
                    return here
                inside = Path(f"/proc/self/fd/{other}")
                with suppress(PermissionError):
                    inside.chmod(0o700)  # a part's are read-only
                os.close(os.open("..", FOLDER, dir_fd=other))  # fails where `_leave` would
                with os.scandir(inside) as entries:
                    names = [each.name for each in itertools.islice(entries, AT_ONCE)]
                kept = len(self.left) + len(self.stuck)
                way.append(_Level(path, _identity(other), names, kept, len(names) == AT_ONCE))
                here, other = other, here
        except FileNotFoundError:
            pass
        except OSError as error:
            self.stuck.append(f"{path}: {error.strerror}")
        finally:
            if other is not None:
                os.close(other)
        return here

    def _leave(self, here: int, way: list[_Level]) -> int:
        """Delete the open folder, if nothing in it was kept; returns the one above it, which is open then."""
        level = way.pop()
        above = os.open("..", FOLDER, dir_fd=here)
        os.close(here)
        if _identity(above) != way[-1].identity:
            self.stuck.append(f"{level.path}: it was moved while it was being deleted")
            way[:] = [way[0]._replace(names=[])]
        elif level.kept == len(self.left) + len(self.stuck):
            name = level.path.rpartition("/")[2]
            try:
                os.rmdir(name, dir_fd=above)
            except OSError as error:
                if level.more and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    way[-1].names.append(name)
                else:
                    self.stuck.append(f"{level.path}: {error.strerror}")
        return above


AT_ONCE = 10_000
"""Entries of a folder whose names are held: millions of them would fill the memory."""


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino


def _mount_id(folder: int) -> str:
    """Which mount an open folder is on: of two that show the same files, too, each has its own (proc(5))."""
    lines = Path(f"/proc/self/fdinfo/{folder}").read_text().splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))
