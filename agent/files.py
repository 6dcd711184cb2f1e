"""Files of the host: read, written in one rename, synced."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Note = Callable[[str], None]
"""Reports something that happened, to whoever follows the run."""


class Fault(Exception):
    """An expected failure: its kind picks the client's error, the rest is shown."""

    def __init__(self, kind: str, what: str, cause: str = "", hint: str = "") -> None:
        what, cause, hint = (cut(text) for text in (what, cause, hint))  # others' words may be in them
        super().__init__(what)
        self.report: Json = {"kind": kind, "what": what, "cause": cause, "hint": hint}


def cut(text: str, limit: int = 10_000) -> str:
    """The beginning of a text that may be of any length."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file in one rename that a power cut does not undo."""
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path, mode) as descriptor:
        _write_all(descriptor, data)


def copy(source: Path, place: Path) -> None:
    """Copy a regular file with its mode, in one rename that a power cut does not undo; raises OSError for another.

    A copy belongs to whoever makes it, so it is nothing that runs as its owner: the original may be somebody else's.
    """
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "no regular file", str(source))
        with _draft(place, mode & 0o777) as descriptor:
            while block := file.read(1 << 20):
                _write_all(descriptor, block)


def regular(path: Path) -> bool:
    """Whether a file is there, and no link, pipe or device."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


@contextmanager
def _draft(path: Path, mode: int) -> Iterator[int]:
    """A new file's descriptor; synced and renamed to `path` at the end, removed when that or the body fails."""
    draft = _draft_of(path)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            yield descriptor
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync(path.parent)


def _draft_of(path: Path) -> Path:
    """Where a file or link is made before it is renamed to `path`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # of a killed process that had the same number
    return draft


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of `write` and `link` in a folder: a draft lives for moments.

    One of another process namespace (containers that share a prefix) looks ended: its write fails, and can be repeated.
    """
    for draft in folder.glob(".*.*"):
        number = draft.suffix[1:]
        with suppress(FileNotFoundError):
            if number.isdecimal() and (
                _ended(int(number)) or not 0 <= time.time() - draft.lstat().st_mtime < DRAFT_SECONDS
            ):
                draft.unlink()


def _ended(pid: int) -> bool:
    """Whether there is no such process any more."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


DRAFT_SECONDS = 5


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def append(path: Path, line: Json) -> None:
    """Add a line of JSON: on the disk when this returns, and none of it in a line that a power cut tore."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        _write_all(descriptor, b"\n" * bool(torn) + json.dumps(line).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        sync(path.parent)


def sync(folder: Path) -> None:
    """Bring a folder's entries to the disk: without it a rename or deletion may be lost with the power.

    Also one that came before something else was synced: btrfs writes what is asked for, and nothing that is older.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file or link, if it is there; a power cut does not bring it back."""
    with suppress(FileNotFoundError):
        path.unlink()
        sync(path.parent)


def link(place: Path, target: Path | str) -> None:
    """Point the symbolic link `place` at `target`, in one rename."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(place)
    draft.symlink_to(target)
    draft.replace(place)
    sync(place.parent)


def retried(act: Callable[[], object]) -> None:
    """Do what must not fail, such as a step of a revert: three times, a moment apart, before its error is raised."""
    for pause in RETRIES:
        try:
            act()
            return
        except (OSError, Fault):
            time.sleep(pause)
    act()


RETRIES = [0.1, 1.0]
"""Seconds between the attempts of `retried`: a disk that is full for a moment, a systemd that reloads."""


def os_fault(error: OSError, what: str) -> Fault:
    """The Fault that stands for an error of the operating system's; `what` could not be done."""
    remedies = {
        errno.ENOSPC: FULL,
        errno.EDQUOT: FULL,
        errno.EROFS: "the file system is read-only: see dmesg, check the disk, remount it, then run the command again",
        errno.EIO: "the disk reports errors: see dmesg and smartctl before anything is written there again",
    }
    kind = "disk" if error.errno in remedies else "step"
    return Fault(kind, what, str(error), remedies.get(error.errno or 0, "run the same command again"))


def read(path: Path, *, lenient: bool = False) -> Json:
    """Read a JSON object; empty when there is no such file. One that cannot be read is not the same: raises OSError.

    Raises Fault when it is damaged; `lenient` takes it for a missing one, right for what the next deploy writes again.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    if lenient:
        return {}
    hint = f"look at it; if it is of no use, delete it (rm {path}) and run the same command again"
    raise Fault("step", f"{path} is damaged: it holds no JSON object", "a disk error, or an edit by hand", hint)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """The start of a text file; empty when there is none."""
    return read_some(path).decode(errors="replace")


def read_some(path: Path, limit: int = 200_000, *, follow: int = 0) -> bytes:
    """What is in a file, up to `limit` bytes; nothing when it is a pipe or a device that somebody put there.

    It may have any length, as what a process says of itself in /proc. With O_NOFOLLOW for `follow` a link is none.
    """
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | follow), "rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(limit)
    return b""


def meminfo() -> dict[str, int]:
    """The machine's memory in bytes, as /proc/meminfo names it."""
    lines = (line.split() for line in read_text(Path("/proc/meminfo")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


FULL = "free some space or inodes, then run the same command again"
