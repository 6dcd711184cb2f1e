"""Files on the host, and the programs that are run there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Fault(Exception):
    """An expected failure: its kind picks the client's error, the rest is shown."""

    def __init__(self, kind: str, what: str, cause: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.report: Json = {"kind": kind, "what": what, "cause": cause, "hint": hint}


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file in one rename that a power cut does not undo."""
    data = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path, mode) as descriptor:
        _write_all(descriptor, data)


def copy(source: Path, place: Path) -> None:
    """Copy a file with its mode, in one rename that a power cut does not undo."""
    with source.open("rb") as file, _draft(place, stat.S_IMODE(os.fstat(file.fileno()).st_mode)) as descriptor:
        while block := file.read(1 << 20):
            _write_all(descriptor, block)


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
    """Where a file or link is made before it is renamed to `path`; what killed processes left there is removed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    for stale in path.parent.glob(f".{path.name}.*"):
        number = stale.suffix[1:]
        if stale == draft or (number.isdecimal() and not Path(f"/proc/{number}").exists()):
            stale.unlink(missing_ok=True)
    return draft


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
    """Bring a folder's entries to the disk: without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read(path: Path) -> Json:
    """Read a JSON object; empty when there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove(folder: Path) -> None:
    """Delete a tree, read-only folders too."""
    if not folder.exists():
        return
    for path, _, _ in os.walk(folder):
        with suppress(PermissionError):
            Path(path).chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A folder's descriptor; raises OSError when any name on the way to it is a link."""
    place = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in folder.parts[1:]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        yield place
    finally:
        os.close(place)


class Sweep:
    """Deleting where others may have put links and mounts: no link is followed, and no mount is entered.

    `files` counts what is gone, `left` are the mount points that stay, `stuck` says what could not be deleted.
    """

    def __init__(self) -> None:
        self.files = 0
        self.left: list[str] = []
        self.stuck: list[str] = []
        self._mounts = {each["point"] for each in mounts()}  # known before they are opened: a dead server's would hang

    def delete(self, path: Path) -> None:
        """Delete a file, a link, or a folder with all that is in it, as far as that is possible."""
        parent = Path(os.path.realpath(path.parent))
        with opened(parent) as place:
            self._delete(place, path.name, str(parent / path.name), _mount_id(place))

    def _delete(self, place: int, name: str, path: str, mount: str) -> None:
        if path in self._mounts:
            self.left.append(path)
            return
        try:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=place).st_mode):
                os.unlink(name, dir_fd=place)
                self.files += 1
                return
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            try:
                if _mount_id(folder) != mount:  # whoever may write here could have renamed a folder above it
                    self.left.append(path)
                    return
                with suppress(PermissionError):
                    os.fchmod(folder, 0o700)  # a part's are read-only
                before = len(self.left) + len(self.stuck)
                with os.scandir(folder) as entries:
                    names = [entry.name for entry in entries]
                for inner in names:
                    self._delete(folder, inner, f"{path}/{inner}", mount)
            finally:
                os.close(folder)
            if before == len(self.left) + len(self.stuck):
                os.rmdir(name, dir_fd=place)
        except FileNotFoundError:
            return
        except OSError as error:
            self.stuck.append(f"{path}: {error.strerror}")


def _mount_id(folder: int) -> str:
    """Which mount an open folder is on: of two that show the same files, too, each has its own (proc(5))."""
    lines = Path(f"/proc/self/fdinfo/{folder}").read_text().splitlines()
    return next(line for line in lines if line.startswith("mnt_id:"))


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


@contextmanager
def flock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that the kernel drops with the process; wait for it, or raise Fault when another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Fault("busy", f"{path} is held by another process") from None
        yield


def free(path: Path) -> bool:
    """Whether nobody holds the lock file."""
    try:
        with flock(path):
            return True
    except Fault:
        return False


INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),  # for systemctl --user
)
"""What programs get of the agent's environment. The rest is that of whoever started the agent, and PYTHON*, LD_*, PIP_*
and the like would change what they do."""


def inherited(*more: str) -> dict[str, str]:
    """The agent's environment as far as programs get it; `more` are further names, with `*` for any part of one."""
    names = (*INHERITED, *more)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, each) for each in names)}


def run(
    argv: list[str], env: dict[str, str] | None = None, timeout: float = 3600, *, inherit: bool = True, **more: Any
) -> str:
    """Run a program to its end and return its output; raises Fault with its last lines when it fails.

    `env` is added to `inherited`, or without `inherit` is all that it gets; `more` is for subprocess.Popen. After
    `timeout` seconds it is killed, with what it has started.
    """
    more |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    more |= {"env": {**(inherited() if inherit else {}), **(env or {})}, "start_new_session": True}
    try:
        with subprocess.Popen(argv, text=True, errors="replace", **more) as process:
            try:
                output, said = (str(each) for each in process.communicate(timeout=timeout))
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except subprocess.TimeoutExpired as error:
        hint = "run the same command again; look at the host's load and network when that does not help"
        raise Fault("step", f"{' '.join(argv[:3])} did not end within {timeout:.0f} s", "", hint) from error
    except OSError as error:
        raise Fault("step", f"{argv[0]} could not be run", str(error)) from error
    if process.returncode:
        tail = "\n".join((said or output).strip().splitlines()[-8:])
        full = "No space left" in tail
        raise Fault("disk" if full else "step", f"{' '.join(argv[:3])} failed", tail, FULL if full else "")
    return output


def read_text(path: Path) -> str:
    """The start of a text file; empty when there is none."""
    return read_some(path, 200_000).decode(errors="replace")


def read_some(path: Path, limit: int = -1) -> bytes:
    """What is in a file, up to `limit` bytes; nothing when it is a pipe or a device that somebody put there."""
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(limit)
    return b""


def meminfo() -> dict[str, int]:
    """The machine's memory in bytes, as /proc/meminfo names it."""
    lines = (line.split() for line in read_text(Path("/proc/meminfo")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def own(root: Path, user: int, group: int) -> None:
    """Change who owns a tree that nobody else can reach yet."""
    for path in (root, *root.rglob("*")):
        os.chown(path, user, group, follow_symlinks=False)


FULL = "free some space or inodes, then run the same command again"
