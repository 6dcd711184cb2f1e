"""Read and write the host's files: atomic, and durable across a power loss."""

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
from typing import Any, TypeVar

from agent.schema.decode import decode
from agent.schema.facts import Report

T = TypeVar("T")
Json = dict[str, Any]
Note = Callable[[str], None]
"""Reports an event to the clients that follow the run."""


class AgentError(Exception):
    """An expected failure: `kind` selects the client's error class; the other fields are displayed."""

    def __init__(self, kind: str, what: str, cause: str = "", hint: str = "") -> None:
        what, cause, hint = (cut(text) for text in (what, cause, hint))  # may contain untrusted text
        super().__init__(what)
        self.report: Report = {"kind": kind, "what": what, "cause": cause, "hint": hint}


def cut(text: str, limit: int = 10_000) -> str:
    """Truncate a text to `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file atomically and durably. Raises OSError."""
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path, mode) as descriptor:
        _write_all(descriptor, data)


def copy(source: Path, place: Path) -> None:
    """Copy a regular file with its mode, atomically and durably. Raises OSError for other file types.

    Clears setuid and setgid: the copy belongs to this process's user, the original may belong to another.
    """
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(source))
        with _draft(place, mode & 0o777) as descriptor:
            while block := file.read(1 << 20):
                _write_all(descriptor, block)


def regular(path: Path) -> bool:
    """Return whether a path is a regular file, without following symlinks."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


@contextmanager
def _draft(path: Path, mode: int) -> Iterator[int]:
    """Yield a new file's descriptor; sync it and rename it to `path` at the end, or delete it on an error."""
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
    """Return the temporary path of a file or link that is then renamed to `path`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # of a killed process with the same pid
    return draft


def remove_drafts(folder: Path) -> None:
    """Delete drafts that killed processes left in a folder (`write`, `link`): a draft exists for moments only.

    A process in another PID namespace (containers that share a prefix) looks ended; its write fails and can be retried.
    """
    for draft in folder.glob(".*.*"):
        number = draft.suffix[1:]
        with suppress(FileNotFoundError):
            if number.isdecimal() and (
                _ended(int(number)) or not 0 <= time.time() - draft.lstat().st_mtime < DRAFT_SECONDS
            ):
                draft.unlink()


def _ended(pid: int) -> bool:
    """Return whether a process no longer exists."""
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
    """Append a line of JSON durably, on a new line even if a power loss has truncated the last one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        _write_all(descriptor, b"\n" * bool(torn) + json.dumps(line, default=vars).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        sync(path.parent)


def sync(folder: Path) -> None:
    """Sync a folder's entries: otherwise a power loss may undo a rename or deletion.

    Syncing something else later is not enough: btrfs writes only what was synced, not older changes.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file or link durably, if it exists."""
    with suppress(FileNotFoundError):
        path.unlink()
        sync(path.parent)


def link(place: Path, target: Path | str) -> None:
    """Point the symbolic link `place` at `target`, atomically and durably."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft_of(place)
    draft.symlink_to(target)
    draft.replace(place)
    sync(place.parent)


def retried(act: Callable[[], object]) -> None:
    """Run an action that must not fail, such as a step of a revert, up to three times. Raises its last error."""
    for pause in RETRIES:
        try:
            act()
            return
        except (OSError, AgentError):
            time.sleep(pause)
    act()


RETRIES = [0.1, 1.0]
"""Seconds between the attempts of `retried`, for a briefly full disk or a reloading systemd."""


def os_error(error: OSError, what: str) -> AgentError:
    """Convert an OSError to an AgentError; `what` says what failed."""
    remedies = {
        errno.ENOSPC: FULL,
        errno.EDQUOT: FULL,
        errno.EROFS: "the file system is read-only: check dmesg, remount it, then run the same command again",
        errno.EIO: "the disk reports errors: check dmesg and smartctl before writing to it again",
    }
    kind = "disk" if error.errno in remedies else "step"
    return AgentError(kind, what, str(error), remedies.get(error.errno or 0, "run the same command again"))


def read(path: Path, *, lenient: bool = False) -> Json:
    """Read a JSON object; empty if the file does not exist. Raises OSError if it cannot be read.

    Raises AgentError if it is damaged; with `lenient`, return an empty object, for files that the next deploy rewrites.
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
    raise damaged(path, "it is not a JSON object")


def recorded(path: Path, kind: type[T], *, lenient: bool = False) -> T:
    """Read the dataclass (or a dictionary of it) that an agent of any version has written; see `read`.

    Missing fields have their defaults. Raises AgentError if it is damaged; with `lenient`, return `kind()`.
    """
    try:
        return decode(kind, read(path, lenient=lenient), lenient=True)
    except ValueError as error:
        if lenient:
            return kind()
        raise damaged(path, str(error)) from None


def damaged(path: Path, why: str) -> AgentError:
    """Return the error for a damaged record."""
    hint = f"inspect it; if you do not need it, delete it (rm {path}) and run the same command again"
    return AgentError("step", f"{path} is damaged: {why}", "a disk error, or a manual edit", hint)


def record(path: Path, value: object, mode: int = 0o644) -> None:
    """Write a dataclass as JSON (`recorded`), atomically and durably. Raises OSError."""
    write(path, json.dumps(value, default=vars), mode)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """Return the beginning of a text file; empty if it cannot be read (see `read_some`)."""
    return read_some(path).decode(errors="replace")


def read_some(path: Path, limit: int = 200_000, *, follow: int = 0) -> bytes:
    """Return up to `limit` bytes of a file; empty if it cannot be read or is not a regular file.

    The limit guards against endless files, such as those in /proc that a process controls. `follow=O_NOFOLLOW` rejects
    symlinks.
    """
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | follow), "rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(limit)
    return b""


def meminfo() -> dict[str, int]:
    """Return /proc/meminfo in bytes, by its field names."""
    lines = (line.split() for line in read_text(Path("/proc/meminfo")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


FULL = "free some space or inodes, then run the same command again"
