"""Delete trees without following symlinks or crossing mounts."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agent.files import AgentError
from agent.folders import FOLDER, mounts, opened


def remove(path: Path) -> None:
    """Delete a file, link or tree, even read-only folders. Follows no symlinks.

    Raises AgentError if anything remains.
    """
    sweep = SafeDeleter()
    if os.path.lexists(path):
        sweep.delete(path)
    if left := [*sweep.stuck, *(f"{point} is a mount point" for point in sweep.left)]:
        raise AgentError("step", f"{path} cannot be deleted", "\n".join(left[:20]), "run the same command again")


class _Level(NamedTuple):
    """A folder being emptied: its path, identity (device, inode), remaining names, and prior count of kept entries."""

    path: str
    identity: tuple[int, int]
    names: list[str]
    kept: int
    more: bool = False  # the folder may have more entries than were read


class SafeDeleter:
    """Deletes trees in which others may have placed links and mounts; follows no symlink and enters no mount.

    `files` counts deleted files, `left` lists mount points, `stuck` lists failures. Trees may have any depth: only one
    folder is open at a time, and it is not opened by its path, whose length is limited. Folders may have any number of
    entries. Stops after `seconds`.
    """

    def __init__(self, seconds: float = 1800) -> None:
        self._end, self._seconds = time.monotonic() + seconds, seconds
        self.files = 0
        self.left: list[str] = []
        self.stuck: list[str] = []
        self._mounts = {each["point"] for each in mounts()}  # listed up front: opening a dead server's mount hangs
        self._longest = max([1000, *map(len, self._mounts)])  # kept part of a path: whole paths could fill the memory

    def delete(self, path: Path) -> None:
        """Delete a file, a link or a tree as far as possible."""
        parent = Path(os.path.realpath(path.parent))
        with opened(parent) as top:
            here, mount = os.dup(top), _mount_id(top)
            way = [_Level(str(parent).rstrip("/"), _identity(top), [path.name], 0)]
            try:
                while way[-1].names or len(way) > 1:
                    if time.monotonic() > self._end:
                        self.stuck.append(f"{path}: deleting it takes more than {self._seconds:.0f} s")
                        return
                    here = self._enter(here, way, mount) if way[-1].names else self._leave(here, way)
            finally:
                os.close(here)

    def _enter(self, here: int, way: list[_Level], mount: str) -> int:
        """Delete the next entry of the open folder, or descend into it; return the folder that is then open."""
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
                if _mount_id(other) != mount:  # a parent may have been renamed, hiding the mount point
                    self.left.append(path)
                    return here
                inside = Path(f"/proc/self/fd/{other}")
                with suppress(PermissionError):
                    inside.chmod(0o700)  # a part's folders are read-only
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
        """Delete the open folder if nothing in it was kept; return its parent, which is then open."""
        level = way.pop()
        above = os.open("..", FOLDER, dir_fd=here)
        os.close(here)
        if _identity(above) != way[-1].identity:
            self.stuck.append(f"{level.path}: it was moved during its deletion")
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
"""Maximum number of names read from a folder at once: millions would fill the memory."""


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino


def _mount_id(folder: int) -> str:
    """Return the mount id of an open folder; bind mounts of the same files have different ids (proc(5))."""
    lines = Path(f"/proc/self/fdinfo/{folder}").read_text().splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))
