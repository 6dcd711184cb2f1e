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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from agent.deletion import remove
from agent.files import AgentError, record, recorded, sha256, sync
from agent.folders import tree, walk
from agent.layout import Layout
from agent.schema.records import SealedPart


def stamp(root: Path) -> str:
    """Return a hash over path, size, mtime, mode and link target of all files: cheap, and changed by any edit.

    System calls dominate, so several processes share the folders of a large tree; two would take half as much time
    again in total, and end hardly sooner than one. Raises OSError or AgentError.
    """
    found: dict[str, str] = {}
    pending = [""]
    cores = os.cpu_count() or 1
    while pending and (cores < 4 or len(pending) < 500):
        pending += _stamp_folder(root, pending.pop(0), found)
    if pending:
        queue, feed = os.pipe()  # idle workers take the next folder number: sizes differ a thousandfold
        workers = [forked(_stamp_queued, root, pending, queue, feed) for _ in range(min(cores, 8))]
        os.close(queue)
        with os.fdopen(feed, "wb") as pipe:  # written while workers read: a pipe holds 64 KiB
            pipe.write(b"".join(number.to_bytes(4, "big") for number in range(len(pending))))
        for worker in workers:
            found |= worker()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _stamp_queued(root: Path, folders: list[str], queue: int, feed: int) -> dict[str, str]:
    """Return the stamps of the folders whose numbers are read from the queue, and of their subfolders."""
    os.close(feed)  # else the queue never ends
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
    place = os.open(f"{root}/{folder}", os.O_RDONLY)  # names relative to an open folder are a third faster
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
    """Start `work` in a child process; return a function that waits for its result, which is passed as JSON.

    The function raises OSError if the work did, and AgentError for other failures or after `seconds` from now.
    """
    end = time.monotonic() + seconds if seconds else None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)  # else a write blocks forever instead of failing after the parent's death
        _work(writer, work, given)
    os.close(writer)

    def answer() -> Any:
        with os.fdopen(reader) as pipe:
            if end and not select.select([reader], [], [], max(0, end - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                what = f"{work.__name__} did not end within {seconds:.0f} s"
                raise AgentError("step", what, "", "run the same command again")
            result = pipe.read()
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            why = f"by signal {-code}" if code < 0 else "it could not send its answer"
            if code == -signal.SIGKILL:
                why += ", sent by the kernel for lack of memory (see dmesg) or by a user"
            hint = "run the same command again; if that does not help: inv doctor"
            raise AgentError("step", f"{work.__name__} was ended", why, hint)
        found = json.loads(result)
        if "errno" in found:
            raise OSError(found["errno"], found["error"].partition("] ")[2] or found["error"])
        if "error" in found:
            raise AgentError("step", f"{work.__name__} failed", found["error"])
        return found["answer"]

    return answer


def _work(writer: int, work: Callable[..., Any], given: Sequence[Any]) -> NoReturn:
    """Write the result of `work` to a pipe, and end this process."""
    status = 1
    with suppress(BaseException):
        try:
            result = {"answer": work(*given)}
        except OSError as error:
            result = {"errno": error.errno or 0, "error": str(error)}
        except Exception as error:
            result = {"error": repr(error)}
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(result, default=vars))
        status = 0
    os._exit(status)


def as_service(
    layout: Layout, work: Callable[..., Any], *given: Any, sharing: bool = False, seconds: float = 600
) -> Any:
    """Run `work` in a child process as the service user, so that links are followed with its rights, not root's.

    With `sharing`, it can change files to the members' group. Stops after `seconds`: the service may have created an
    endless tree. Raises like `forked`.
    """
    user, group = layout.owner()
    groups = [layout.sharing()[1]] if sharing and layout.user else []

    def lowered() -> Any:
        if layout.user:
            # Set only the effective uid: with its real uid, the service could send signals to this process.
            os.setgroups(groups)
            os.setresgid(-1, group, -1)
            os.setresuid(-1, user, -1)
            os.umask(0o007)
        else:
            os.umask(0o022)
        return work(*given)

    lowered.__name__ = work.__name__  # for error messages
    return forked(lowered, seconds=seconds)()


def drop_root() -> None:
    """Drop root permanently in a process of `as_service` that parses untrusted data.

    The real uid becomes an unused one, so that the service's processes cannot signal or trace it.
    """
    user, group = os.geteuid(), os.getegid()
    if user != os.getuid():
        known = {each.pw_uid for each in pwd.getpwall()}
        nobody = next(number for number in range(65_533, 1000, -1) if number not in known)
        os.seteuid(0)
        os.setresgid(group, group, group)
        os.setresuid(nobody, user, nobody)


def contents(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a tree, with a trailing `x` for executables."""
    found: dict[str, str] = {}
    for name, status in walk(root):
        if name != "PART.json" and stat.S_ISREG(status.st_mode):
            found[name] = sha256(root / name) + ("x" if status.st_mode & 0o100 else "")
    return found


@contextmanager
def part(layout: Layout, name: str) -> Iterator[Path]:
    """Create a part: yield an empty folder to fill, then seal it and rename it into place, replacing an existing one.

    A sealed part is read-only; PART.json contains its stamp. Raises AgentError or OSError.
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
        remove(fresh)  # free the space: the disk may be full
        raise
    size = 0
    for path, status in walk(fresh):
        size += status.st_size
        if stat.S_ISREG(status.st_mode):
            _seal(fresh / path, 0o555 if status.st_mode & 0o100 else 0o444)
    record(fresh / "PART.json", SealedPart(name, size, stamp(fresh)), 0o444)
    os.sync()
    for folder in tree(fresh):
        _seal(folder, 0o555)
    fresh.chmod(0o755)  # without root, only a writable folder can be renamed
    if place.exists():  # damaged: move it aside, so that running processes keep their open files
        place.rename(layout.parts / f".{name}.damaged")
    fresh.rename(place)
    sync(layout.parts)  # before other synced data refers to it
    place.chmod(0o555)
    remove(layout.parts / f".{name}.damaged")


def _seal(path: Path, mode: int) -> None:
    """Set the mode of a file or folder; do nothing for a link."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISLNK(os.fstat(place).st_mode):
            Path(f"/proc/self/fd/{place}").chmod(mode)
    finally:
        os.close(place)


def damage_of(place: Path) -> str:
    """Return a part's damage; empty if it is intact."""
    try:
        sealed = recorded(place / "PART.json", SealedPart)
        if not sealed.stamp:
            return "it is incomplete"
        whole = sealed.stamp == stamp(place)
    except (OSError, AgentError) as error:
        return f"it cannot be read: {error}"
    return "" if whole else "it was changed after it was made"


def damages_of(places: list[Path]) -> dict[str, str]:
    """Return the damage of each part, by name."""
    return {place.name: damage_of(place) for place in places}
