"""Parts: immutable folders, verified by a stamp."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.deletion import remove
from agent.files import Fault, read, sha256, sync, write
from agent.folders import tree, walk
from agent.layout import Layout


def stamp(root: Path) -> str:
    """A hash over path, size, time, mode and link target of all files: cheap, and any edit changes it.

    The kernel's answers take most of it, so processes share the folders of a large tree.
    """
    found: dict[str, str] = {}
    pending = [""]
    while pending and len(pending) < 500:
        pending += _stamp_folder(root, pending.pop(0), found)
    if pending:
        queue, feed = os.pipe()  # whoever is free takes the next folder's number: they differ by a factor of a thousand
        number = min(os.cpu_count() or 1, 8)
        workers = [forked(_stamp_queued, root, pending, queue, feed) for _ in range(number)]
        os.close(queue)
        with os.fdopen(feed, "wb") as pipe:  # a pipe holds 64 KiB: more can be written only while somebody reads
            pipe.write(b"".join(number.to_bytes(4, "big") for number in range(len(pending))))
        for worker in workers:
            found |= worker()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _stamp_queued(root: Path, folders: list[str], queue: int, feed: int) -> dict[str, str]:
    """The stamps of all folders in and below those whose numbers come from the queue."""
    os.close(feed)  # else the queue had no end
    found: dict[str, str] = {}
    while number := os.read(queue, 4):
        pending = [folders[int.from_bytes(number, "big")]]
        while pending:
            pending += _stamp_folder(root, pending.pop(), found)
    return found


def _stamp_folder(root: Path, folder: str, found: dict[str, str]) -> list[str]:
    """Add the stamp of a folder's own files to `found`; return the folders in it."""
    lines: list[str] = []
    folders: list[str] = []
    place = os.open(f"{root}/{folder}", os.O_RDONLY)  # names within an open folder: a third faster than whole paths
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif folder or entry.name != "PART.json":
                    status = entry.stat(follow_symlinks=False)
                    target = os.readlink(entry.name, dir_fd=place) if stat.S_ISLNK(status.st_mode) else ""
                    lines.append(f"{entry.name} {status.st_size} {status.st_mtime_ns} {status.st_mode} {target}")
    finally:
        os.close(place)
    found[folder] = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return folders


def forked(work: Callable[..., Any], *given: Any, seconds: float | None = None) -> Callable[[], Any]:
    """Begin work in a process of its own; what is returned waits for its answer, which crosses as JSON.

    That raises OSError where the work did, and Fault for anything else that ended it, or when it takes longer than
    `seconds` from now.
    """
    end = time.monotonic() + seconds if seconds else None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)  # else writing would not fail, but wait for ever, once the parent is gone
        status = 1
        with suppress(BaseException):
            try:
                said = {"answer": work(*given)}
            except OSError as error:
                said = {"errno": error.errno or 0, "error": str(error)}
            except Exception as error:
                said = {"error": repr(error)}
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(said, default=vars))
            status = 0
        os._exit(status)
    os.close(writer)

    def answer() -> Any:
        with os.fdopen(reader) as pipe:
            if end and not select.select([reader], [], [], max(0, end - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise Fault("step", f"{work.__name__} did not end within {seconds:.0f} s", "", "run it again")
            said = pipe.read()
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            why = f"by signal {-code}" if code < 0 else "it could not tell its answer"
            if code == -signal.SIGKILL:
                why += ": the kernel's, where memory is too little (dmesg tells), or somebody's"
            raise Fault("step", f"{work.__name__} was ended", why, "run it again; inv doctor")
        found = json.loads(said)
        if "errno" in found:
            raise OSError(found["errno"], found["error"].partition("] ")[2] or found["error"])
        if "error" in found:
            raise Fault("step", f"{work.__name__} failed", found["error"])
        return found["answer"]

    return answer


def as_service(
    layout: Layout, work: Callable[..., Any], *given: Any, sharing: bool = False, seconds: float = 600
) -> Any:
    """Run `work` in a child process as the service user, so that links are followed with its rights, not root's.

    With `sharing` it may give files to the members' group. Ends after `seconds`, as the service may have made a tree
    without end. Raises as `forked` does.
    """
    user, group = layout.owner()
    groups = [layout.sharing()[1]] if sharing and layout.user else []

    def lowered() -> Any:
        if layout.user:
            # The effective user alone: the real one decides who may send signals, and the service could stop this.
            os.setgroups(groups)
            os.setresgid(-1, group, -1)
            os.setresuid(-1, user, -1)
            os.umask(0o007)
        else:
            os.umask(0o022)
        return work(*given)

    lowered.__name__ = work.__name__  # for messages
    return forked(lowered, seconds=seconds)()


def forsake_root() -> None:
    """Give up root for good in a process of `as_service` that parses what the service wrote.

    Its real user becomes an unused id: processes of the service could otherwise signal or trace it.
    """
    user, group = os.geteuid(), os.getegid()
    if user != os.getuid():
        known = {each.pw_uid for each in pwd.getpwall()}
        nobody = next(number for number in range(65_533, 1000, -1) if number not in known)
        os.seteuid(0)
        os.setresgid(group, group, group)
        os.setresuid(nobody, user, nobody)


def contents(root: Path) -> dict[str, str]:
    """The SHA-256 of every file of a tree, with an `x` behind it for an executable one."""
    found: dict[str, str] = {}
    for name, status in walk(root):
        if name != "PART.json" and stat.S_ISREG(status.st_mode):
            found[name] = sha256(root / name) + ("x" if status.st_mode & 0o100 else "")
    return found


@contextmanager
def part(layout: Layout, name: str) -> Iterator[Path]:
    """Make a part: yields an empty folder to fill, then seals it and renames it into place, replacing an existing one.

    A sealed part is read-only; PART.json holds its stamp.
    """
    place = layout.parts / name
    layout.parts.mkdir(parents=True, exist_ok=True)
    for stale in layout.parts.glob(f".{name}.*"):
        remove(stale)
    fresh = layout.parts / f".{name}.{os.getpid()}"
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        remove(fresh)  # the disk may be full, and what follows must be able to write
        raise
    size = 0
    for path, status in walk(fresh):
        size += status.st_size
        if stat.S_ISREG(status.st_mode):
            _seal(fresh / path, 0o555 if status.st_mode & 0o100 else 0o444)
    write(fresh / "PART.json", json.dumps({"part": name, "bytes": size, "stamp": stamp(fresh)}), 0o444)
    os.sync()
    for folder in tree(fresh):
        _seal(folder, 0o555)
    fresh.chmod(0o755)  # a folder must be writable to be renamed by who is not root
    if place.exists():  # a damaged one: aside first, so that what runs from it keeps its open files
        place.rename(layout.parts / f".{name}.damaged")
    fresh.rename(place)
    sync(layout.parts)  # before anything that is synced relies on it
    place.chmod(0o555)
    remove(layout.parts / f".{name}.damaged")


def _seal(path: Path, mode: int) -> None:
    """Set the mode of a file or folder, but not of the target of a link."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISLNK(os.fstat(place).st_mode):
            Path(f"/proc/self/fd/{place}").chmod(mode)
    finally:
        os.close(place)


def fault_of(place: Path) -> str:
    """What is wrong with a part; empty when nothing is."""
    try:
        record = read(place / "PART.json")
        if not record:
            return "it was never finished"
        whole = record.get("stamp") == stamp(place)
    except (OSError, Fault) as error:
        return f"it cannot be read: {error}"
    return "" if whole else "it was changed after it was made"


def faults_of(places: list[Path]) -> dict[str, str]:
    """What is wrong with each of some parts, by name."""
    return {place.name: fault_of(place) for place in places}
