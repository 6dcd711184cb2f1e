"""File locks, which the kernel releases when their process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agent.files import AgentError, read_text

_LOCK = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def flock(path: Path, *, wait: float = 1) -> Iterator[IO[bytes]]:
    """Hold a lock file; yield the file, opened for appending. The kernel releases the lock when the process ends.

    Waits up to `wait` seconds, as `free` holds the lock briefly, then raises AgentError. Anyone who can open a file can
    lock it, so only its owner may; a lock file that others can open is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    renewed = False
    while True:
        with os.fdopen(os.open(path, _LOCK, 0o600), "ab") as file:
            held = _locked(file, fcntl.LOCK_EX)
            if held and not os.fstat(file.fileno()).st_nlink:  # deleted meanwhile: lock the new file
                continue
            if _open_to_others(file) and not renewed and (held or not holders(path)):
                renewed = _renew(path)
            elif held:
                yield file
                return
        if time.monotonic() > end:
            hint = f"find it on the host with fuser -v {path}; when it has ended, run the same command again"
            raise AgentError("busy", f"another process has locked {path}", "", hint)
        time.sleep(0.01)


def free(path: Path) -> bool:
    """Return whether no process holds the lock file.

    Tries a shared lock, so that concurrent callers do not block each other. /proc/locks misses locks of other PID
    namespaces, and F_OFD_GETLK does not see flock, which running supervisors hold.
    """
    try:
        with path.open("rb") as file:
            return _locked(file, fcntl.LOCK_SH) or (_open_to_others(file) and not holders(path))
    except FileNotFoundError:
        return True


def _locked(file: IO[bytes], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_to_others(file: IO[bytes]) -> bool:
    """Return whether other users can open and so lock the file, like lock files of older versions."""
    return bool(os.fstat(file.fileno()).st_mode & 0o077)


def holders(path: Path) -> list[int]:
    """Return this user's processes that hold a lock; other users' cannot hold one that matters."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        # Compare the real uid: a setuid program such as su, started by another user, also has root's effective uid.
        if f"\nUid:\t{os.getuid()}\t" in read_text(process / "status"):
            with suppress(OSError):  # it has ended
                locked = [each.name for each in (process / "fdinfo").iterdir() if " FLOCK " in read_text(each)]
                if any(_same(process / "fd" / name, path) for name in locked):
                    found.append(int(process.name))
    return found


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


def _renew(path: Path) -> bool:
    """Replace a lock file that others can open by a private one, one process at a time; return whether replaced."""
    fresh = path.with_name(f"{path.name}.new")
    with os.fdopen(os.open(fresh, _LOCK, 0o600), "ab") as file, suppress(FileNotFoundError):
        alone = _locked(file, fcntl.LOCK_EX) and os.path.samestat(os.fstat(file.fileno()), fresh.stat())
        if alone and path.stat().st_mode & 0o077:
            fresh.replace(path)
            return True
    return False
