"""Files on the host, and the programs that are run there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

Json = dict[str, Any]


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


def remove(path: Path) -> None:
    """Delete a file, a link or a tree, read-only folders too. Follows no link; raises Fault when something is left."""
    sweep = Sweep()
    if os.path.lexists(path):
        sweep.delete(path)
    if left := [*sweep.stuck, *(f"{point} is a mount point" for point in sweep.left)]:
        raise Fault("step", f"{path} cannot be deleted", "\n".join(left[:20]), "run the same command again")


_FOLDER = os.O_PATH | os.O_DIRECTORY  # O_PATH asks for no permission to read: one may only be passed through


def distrusted() -> int:
    """Whose links are not followed: the service's, where this is a process of root's that has become it; else -1."""
    return os.geteuid() if os.geteuid() != os.getuid() else -1


@contextmanager
def opened(folder: Path, *, links: bool = False) -> Iterator[int]:
    """Open a folder name by name and yield its descriptor; raises OSError when any name on the way to it is a link.

    With `links` these are followed, as an operator may have made them, but for the service's own (`distrusted`).
    """
    place, names, left = os.open("/", _FOLDER), [".", *reversed(folder.parts[1:])], 40  # links, as the kernel follows
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
            inner = os.open(each, _FOLDER | os.O_NOFOLLOW, dir_fd=here)
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


DATABASE = ("comfyui.db", "comfyui.db-wal", "comfyui.db-shm", "comfyui.db-journal")
"""The files of ComfyUI's database, SQLite's (sqlite.org/tempfiles.html); what else is named alike is the user's."""


def real(path: Path | str) -> Path:
    """Where a path leads, links followed; raises OSError for a chain of them without an end."""
    try:
        return Path(os.path.realpath(path))
    except RecursionError:  # 3.12 and older
        raise OSError(errno.ELOOP, "links lead to links without an end", str(path)) from None


class _Level(NamedTuple):
    """A folder that is being emptied: its path, its identity, entries to go, and how many were kept before it."""

    path: str
    identity: tuple[int, int]
    names: list[str]
    kept: int
    more: bool = False  # than were read at once


class Sweep:
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
                other = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=here)
                if _mount_id(other) != mount:  # whoever may write here could have renamed a folder above it
                    self.left.append(path)
                    return here
                inside = Path(f"/proc/self/fd/{other}")
                with suppress(PermissionError):
                    inside.chmod(0o700)  # a part's are read-only
                os.close(os.open("..", _FOLDER, dir_fd=other))  # fails where `_leave` would
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
        above = os.open("..", _FOLDER, dir_fd=here)
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


def started(pid: int) -> str:
    """When a process was started and in which boot: with its number that names one process; empty when it has ended."""
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # proc(5); its name may hold anything
    if not fields or fields[0] in "ZX":
        return ""
    return f"{fields[19]} {read_text(Path('/proc/sys/kernel/random/boot_id')).strip()}"


INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),  # for systemctl --user
    "XDG_CONFIG_HOME",  # where uv.toml lies
)
"""What programs get of the agent's environment. The rest is that of whoever started the agent, and PYTHON*, LD_*, PIP_*
and the like would change what they do."""

# Indexes, their credentials and certificates, and how the network is reached. Nothing else of uv's: what is installed,
# and where, is decided by the plan.
INDEX = (
    *("UV_INDEX*", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_KEYRING_PROVIDER", "UV_CREDENTIALS_DIR", "NETRC"),
    *("UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_INSECURE_HOST", "UV_HTTP_*", "UV_REQUEST_TIMEOUT", "UV_OFFLINE", "SSL_*"),
    *(name for each in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{each}_PROXY", f"{each}_PROXY".lower())),
)


def inherited(*more: str) -> dict[str, str]:
    """The agent's environment as far as programs get it; `more` are further names, with `*` for any part of one."""
    names = (*INHERITED, *more)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, each) for each in names)}


def confine() -> None:
    """Remove all other variables from this process, so that programs lack them however they are started.

    Programs also speak English then, which the agent reads, and take file names in UTF-8.
    """
    kept = inherited(*INDEX) | {"LC_ALL": "C.UTF-8"}
    os.environ.clear()
    os.environ.update(kept)


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


LOG_BYTES = 4_000_000
"""Bytes of a log that are looked at, its last: ComfyUI and ten nodes say some 50 kB while they start."""

LINE = 2000
"""Characters of a line of a log that are shown: whoever writes it may never end one."""


def last_of(argv: list[str], lines: int) -> list[str]:
    """The last lines of what a program shows backwards, in their order, as far as they fit into `LOG_BYTES`."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=inherited()
            )
        except OSError as error:
            raise Fault("step", f"{argv[0]} could not be run", str(error)) from error
        with process:
            assert process.stdout is not None
            raw = process.stdout.read(LOG_BYTES)
            process.kill()  # it may have more to say
        if not raw:
            said.seek(0)
            if why := said.read(LINE).decode(errors="replace").strip():
                raise Fault("step", f"{' '.join(argv[:3])} failed", why)
    return [line[:LINE] for line in reversed(raw.decode(errors="replace").splitlines()[:lines])]


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
