"""Locks that the kernel drops with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agent.files import Fault, read_text

_LOCK = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def flock(path: Path, *, wait: float = 1) -> Iterator[IO[bytes]]:
    """Hold a lock that the kernel drops with the process; yields its file, opened to append to.

    Raises Fault when another holds it for all of `wait` seconds: `free` holds it for a moment. Whoever may open a file
    may lock it, so it is its owner's alone; one that others may open gives way to a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    renewed = False
    while True:
        with os.fdopen(os.open(path, _LOCK, 0o600), "ab") as file:
            held = _locked(file, fcntl.LOCK_EX)
            if held and not os.fstat(file.fileno()).st_nlink:  # deleted meanwhile: the next one locks another file
                continue
            if _open_to_others(file) and not renewed and (held or not holders(path)):
                renewed = _renew(path)
            elif held:
                yield file
                return
        if time.monotonic() > end:
            hint = f"fuser -v {path}, on the host, shows which; then run the same command again"
            raise Fault("busy", f"{path} is held by another process", "", hint)
        time.sleep(0.01)


def free(path: Path) -> bool:
    """Whether nobody holds the lock file.

    Asked by a shared lock, so that those who ask do not take each other for a holder. Other ways fail: /proc/locks
    shows no lock of another process namespace, and F_OFD_GETLK no flock, which supervisors that run now hold.
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
    """Whether others may open, and so lock it, as they may what an older Hearth has made."""
    return bool(os.fstat(file.fileno()).st_mode & 0o077)


def holders(path: Path) -> list[int]:
    """The processes of this user that hold a lock; of others', none that matters can."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        # the real user: the effective one is root's, too, of a program such as su that somebody has started
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
    """Put a new file, its owner's alone, in the place of a lock file that others may open; one process at a time."""
    fresh = path.with_name(f"{path.name}.new")
    with os.fdopen(os.open(fresh, _LOCK, 0o600), "ab") as file, suppress(FileNotFoundError):
        alone = _locked(file, fcntl.LOCK_EX) and os.path.samestat(os.fstat(file.fileno()), fresh.stat())
        if alone and path.stat().st_mode & 0o077:
            fresh.replace(path)
            return True
    return False
