"""Hearth on the host: reads facts, applies plans, and keeps ComfyUI running where there is no systemd.

The client sends this one file; it needs nothing but Python 3.10. Every verb reads one JSON object from standard
input (`site`, and what the verb takes) and answers in JSON lines. What is under way lies in `<prefix>/state`:

    agent.py           this file, as the plan under way was submitted
    pending.json       the plan under way; gone when it has ended
    cut-over.json      how far its cut-over is, so that whoever goes on knows the way back
    runs/<run>.jsonl   what happened, line by line; `follow` reads it
    history.jsonl      how every run ended
    adopted.jsonl      what was taken over from another installation, and its units in adopted/
    lock               held (flock) by the process that applies

A killed process, a closed connection or a power cut leaves these, and the next `apply` goes on from them: under
systemd the apply unit is restarted, also at boot.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import grp
import hashlib
import json
import os
import platform
import pwd
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Fault(Exception):
    """An expected failure: its kind picks the client's error, the rest is shown."""

    def __init__(self, kind: str, what: str, cause: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.report = {"kind": kind, "what": what, "cause": cause, "hint": hint}


# --- files ---------------------------------------------------------------------------------------------------------


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file in one rename that a power cut does not undo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.chmod(mode)
    part.replace(path)
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
    part = place.with_name(f".{place.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    part.replace(place)
    sync(place.parent)


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


def run(argv: list[str], env: dict[str, str] | None = None, timeout: float = 3600) -> str:
    """Run a program to its end and return its output; raises Fault with its last lines when it fails."""
    try:
        done = subprocess.run(argv, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault("step", f"{argv[0]} could not be run", str(error)) from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        full = "No space left" in tail
        raise Fault("disk" if full else "step", f"{' '.join(argv[:3])} failed", tail, FULL if full else "")
    return done.stdout


# --- the place -----------------------------------------------------------------------------------------------------


class Site:
    """Where on this host: the folders of a prefix, and who owns them."""

    def __init__(self, site: Json) -> None:
        self.json = site
        self.prefix = Path(site["prefix"]).expanduser()
        self.service = str(site["service"])
        self.scope = str(site["scope"])  # "system" (root, systemd) or "user"
        self.user = str(site["user"])  # whom the service runs as; empty: whoever runs this
        self.address = str(site["address"])
        self.port = int(site["port"])
        self.mounts: dict[str, str] = site.get("mounts", {})  # systemd's unit for each mount point
        self.elsewhere: dict[str, str] = site.get("folders", {})  # where folders lie that are not in the data
        self.parts = self.prefix / "parts"
        self.releases = self.prefix / "releases"
        self.current = self.prefix / "current"
        self.data = self.prefix / "data"
        self.state = self.prefix / "state"
        self.incoming = self.state / "incoming"
        self.pending = self.state / "pending.json"
        self.history = self.state / "history.jsonl"
        self.lock = self.state / "lock"
        self.cut = self.state / "cut-over.json"
        self.snapshot = self.state / "snapshot"
        self.database = self.data / "user/comfyui.db"

    def release(self) -> str:
        """The current release's id; empty when there is none. Raises Fault when `current` is not Hearth's."""
        if not self.current.is_symlink():
            if self.current.exists():
                raise Fault(
                    "foreign",
                    f"{self.current} is no link of Hearth's",
                    "something else made it, or it was edited by hand",
                    f"look at it, move it away (mv {self.current} {self.current}.old), then deploy again",
                )
            return ""
        target = self.current.readlink()
        if target.parent != Path("releases") or not read(self.releases / target.name / "release.json"):
            raise Fault(
                "foreign",
                f"{self.current} points at {target}, which is no release of Hearth's",
                "the release was deleted or damaged, or the link was edited by hand",
                f"remove the link (rm {self.current}), then deploy again; data/ is not touched by that",
            )
        return target.name

    def folder(self, name: str) -> Path:
        """Where ComfyUI has its models, input, output or user files."""
        return Path(self.elsewhere.get(name) or self.data / name)

    def unmounted(self) -> list[str]:
        """The mount points where nothing is mounted."""
        return [path for path in self.mounts if not os.path.ismount(path)]

    def manifest(self, release: str) -> Json:
        """What a release is; empty when it is not there."""
        return read(self.releases / release / "release.json")

    def owner(self) -> tuple[int, int]:
        """User and group of the data: the service's, or -1 (unchanged) when it runs as whoever runs this."""
        if not self.user:
            return -1, -1
        entry = pwd.getpwnam(self.user)
        return entry.pw_uid, entry.pw_gid


# --- parts ---------------------------------------------------------------------------------------------------------


def stamp(root: Path) -> str:
    """A hash over path, size, time, mode and link target of all files: cheap, and any edit changes it.

    The kernel's answers take most of it, so once there are folders enough, processes share them.
    """
    found: dict[str, str] = {}
    pending = [""]
    while pending and len(pending) < 500:
        pending += _stamp_folder(root, pending.pop(0), found)
    queue, feed = os.pipe()  # whoever is free takes the next folder's number: they differ by a factor of a thousand
    os.write(feed, b"".join(number.to_bytes(4, "big") for number in range(len(pending))))
    os.close(feed)
    workers = [forked(_stamp_queued, root, pending, queue) for _ in range(min(os.cpu_count() or 1, 8))]
    os.close(queue)
    for worker in workers:
        found |= worker()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _stamp_queued(root: Path, folders: list[str], queue: int) -> dict[str, str]:
    """The stamps of all folders in and below those whose numbers come from the queue."""
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


def forked(work: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """Begin work in a process of its own; what is returned waits for its answer, JSON. Raises Fault when it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(work(*given)))
            status = 0
        except Exception as error:
            print(f"{work.__name__}: {error!r}", file=sys.stderr)
        os._exit(status)
    os.close(writer)

    def answer() -> Any:
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        if os.waitpid(child, 0)[1]:
            raise Fault("step", f"{work.__name__} failed", "a file cannot be read or written, or there is no memory")
        return json.loads(said)

    return answer


def as_service(site: Site, work: Callable[..., Any], *given: Any) -> Any:
    """Do work in the data as whom the service runs as: root would follow whatever link that one left there."""
    user, group = site.owner()

    def lowered() -> Any:
        if site.user:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
        os.umask(0o002)
        return work(*given)

    return forked(lowered)()


def contents(root: Path) -> dict[str, str]:
    """The SHA-256 of every file of a tree, with an `x` behind it for an executable one."""
    found: dict[str, str] = {}
    for name, status in walk(root):
        if name != "PART.json" and stat.S_ISREG(status.st_mode):
            found[name] = sha256(root / name) + ("x" if status.st_mode & 0o100 else "")
    return found


@contextmanager
def part(site: Site, name: str) -> Iterator[Path]:
    """Make a part in one rename: yields an empty folder to fill, then seals it. One that is there is replaced.

    A sealed part is read-only and says in PART.json what it holds.
    """
    place = site.parts / name
    site.parts.mkdir(parents=True, exist_ok=True)
    for stale in site.parts.glob(f".{name}.*"):
        remove(stale)
    fresh = site.parts / f".{name}.{os.getpid()}"
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        remove(fresh)  # above all when the disk is full: what comes next must be able to write
        raise
    size = 0
    for path, status in walk(fresh):
        size += status.st_size
        if stat.S_ISREG(status.st_mode):
            (fresh / path).chmod(0o555 if status.st_mode & 0o100 else 0o444)
    write(fresh / "PART.json", json.dumps({"part": name, "bytes": size, "stamp": stamp(fresh)}), 0o444)
    os.sync()
    for folder, _, _ in os.walk(fresh):
        Path(folder).chmod(0o555)
    fresh.chmod(0o755)  # a folder must be writable to be renamed by who is not root
    if place.exists():  # a damaged one: aside first, so that what runs from it keeps its open files
        place.rename(site.parts / f".{name}.damaged")
    fresh.rename(place)
    place.chmod(0o555)
    remove(site.parts / f".{name}.damaged")


def fault_of(place: Path) -> str:
    """What is wrong with a part; empty when nothing is."""
    record = read(place / "PART.json")
    if not record:
        return "it was never finished"
    try:
        whole = record.get("stamp") == stamp(place)
    except (OSError, Fault) as error:
        return f"it cannot be read: {error}"
    return "" if whole else "it was changed after it was made"


# --- facts ---------------------------------------------------------------------------------------------------------


def facts(site: Site, ask: Json) -> Json:
    """What this host is now. `ask` names the Python versions, mounts, folders and Debian packages to look for."""
    try:
        current, fault = site.release(), {}
    except Fault as error:
        current, fault = "", error.report
    manifests = [read(path) for path in sorted(site.releases.glob("*/release.json"))]
    proven = sorted(site.releases.glob("*/proven"), key=lambda path: -path.stat().st_mtime_ns)
    places = sorted(site.parts.glob("[!.]*"))
    parts = {place.name: forked(fault_of, place) for place in places}
    place = next(path for path in [site.prefix, *site.prefix.parents] if path.exists())
    disk = os.statvfs(place)
    os_release = _os_release()
    here = site.scope == "user" or Path("/run/systemd/system").is_dir()
    manager = manager_of(site)
    return {
        "hostname": socket.gethostname(),
        "os": f"{os_release.get('ID', 'linux')} {os_release.get('VERSION_ID', '')}".strip(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "glibc": (os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2],
        "pythons": _pythons(site, ask["pythons"]),
        "gpus": _gpus(),
        "driver": _driver(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cores": os.cpu_count() or 1,
        "login": login(),
        "root": os.geteuid() == 0,
        "prefix": str(site.prefix),
        "writable": os.access(place, os.W_OK),
        "disk_free": disk.f_bavail * disk.f_frsize,
        # Some file systems make inodes as they go, and say 0 of 0.
        "inodes_free": disk.f_favail if disk.f_files else None,
        "mounts": {path: _mount(site, path, wanted) for path, wanted in ask["mounts"].items()},
        "places": {path: _place(site, Path(path), use) for path, use in ask["places"].items()},
        "data_free": {str(path): _free(path) for path in (site.data, *map(Path, site.elsewhere.values()))},
        "packages": _packages(ask["packages"]),
        "port_holder": _port_holder(site),
        "foreign_unit": manager.foreign() if here and isinstance(manager, Systemd) else "",
        "adopted": Adopted(site).path.exists(),
        "user": _user_exists(site.user),
        "members": _members(site.user),
        "shared": not _user_exists(site.user) or not site.user or all(_shared(site, site.data / name) for name in DATA),
        "rights": _rights(site),
        "manager": manager.name if here else "none",
        "lingers": manager.name != "process" or not _user_systemd() or Supervised(site).enabled.exists(),
        "current": current,
        "current_fault": fault,
        "releases": [each for each in manifests if each],
        "altered": [each["id"] for each in manifests if each and altered(site, each)],
        "proven": [path.parent.name for path in proven],
        "failed_nodes": read(site.releases / current / "proven").get("failed_nodes", {}),
        "data": all(os.path.lexists(site.data / name) for name in DATA),
        "service": manager.status() if here and site.state.exists() else dict(_NO_SERVICE),
        "incoming": {path.name: path.stat().st_size for path in site.incoming.glob("*") if path.is_file()},
        "tools": sorted(path.name for path in (site.state / "tools").glob("[!.]*")),
        "busy": busy(site),
        "last": last_line(site.history),
        "parts": {name: fault() for name, fault in parts.items()},
    }


def altered(site: Site, manifest: Json) -> bool:
    """Whether a release's files or links are not those of its manifest any more; an older Hearth's may name none."""
    place = site.releases / manifest["id"]
    try:
        links = {kind: (place / kind).readlink().name for kind in manifest["parts"]}
        links |= {name: str((place / name).readlink()) for name in manifest.get("links", {})}
        files = {name: (place / name).read_text() for name in manifest.get("files", {})}
    except OSError:
        return True
    return (links, files) != (manifest["parts"] | manifest.get("links", {}), manifest.get("files", {}))


_NO_SERVICE = {
    "active": False,
    "state": "absent",
    "enabled": False,
    "linked": False,
    "restarts": 0,
    "since": "",
    "pid": 0,
}


def _os_release() -> dict[str, str]:
    with suppress(OSError):
        return platform.freedesktop_os_release()
    return {}


def _user_exists(name: str) -> bool:
    with suppress(KeyError):
        return not name or bool(pwd.getpwnam(name))
    return False


def _members(group: str) -> list[str]:
    try:
        return sorted(grp.getgrnam(group).gr_mem) if group else []
    except KeyError:
        return []


def _mount(site: Site, path: str, wanted: Json) -> Json:
    """A mount point: what is mounted there, our own unit for it, and why what is wanted could not be mounted."""
    found = {"mounted": os.path.ismount(path), "source": "", "unit": "", "fault": "", "remedy": ""}
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            cells, _, rest = line.partition(" - ")
            place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), cells.split()[4])
            if place == path:
                found["source"] = rest.split()[1]  # of several, the last one is on top
    with suppress(OSError):
        found["unit"] = (UNITS / site.mounts[path]).read_text()
    what, kind = wanted["what"], wanted["type"]
    if not what or found["mounted"]:
        return found
    if what.startswith("/dev/mapper/") and not Path(what).exists():
        found["fault"] = "this encrypted or logical volume is not open"
        found["remedy"] = f"on the host: cryptsetup open DEVICE {Path(what).name} (or vgchange -ay); it is mounted then"
    elif what.startswith("/") and not Path(what).exists():
        found["fault"], found["remedy"] = "the host has no such device", "connect it, or correct `what`"
    elif kind.startswith(("nfs", "cifs")) and not shutil.which(f"mount.{kind}", path="/sbin:/usr/sbin"):
        package = "nfs-common" if kind.startswith("nfs") else "cifs-utils"
        found["fault"], found["remedy"] = f"the host has no mount.{kind}", f"on the host: apt-get install {package}"
    elif Path(path).is_dir() and any(os.scandir(path)):
        found["fault"] = "there are files in the folder itself, which the mount would hide"
        found["remedy"] = f"move them away first: ls {path}"
    return found


def _place(site: Site, path: Path, use: str) -> str:
    """What is wrong with a folder that is to be read, or written by the service; empty when nothing is."""
    if not path.exists():
        return "is not there"
    if not path.is_dir():
        return "is no folder"
    need = os.R_OK | os.X_OK | (os.W_OK if use == "write" else 0)
    if _user_exists(site.user) and not as_service(site, os.access, str(path), need):
        return f"cannot be {'written' if use == 'write' else 'read'} by the service"
    return ""


def _free(path: Path) -> int:
    """The bytes that are left for files in a folder."""
    disk = os.statvfs(next(each for each in (path, *path.parents) if each.exists()))
    return disk.f_bavail * disk.f_frsize


def _shared(site: Site, folder: Path) -> bool:
    """Whether what one member of the group puts into a folder of the service's, every other may change."""
    try:
        status = folder.stat()
        if status.st_uid != site.owner()[0]:
            return True  # another's is another's affair
        return bool(status.st_mode & stat.S_ISGID) and os.getxattr(folder, SHARING) == SHARED
    except OSError as error:  # a file system without such lists does without, a folder that is not there is no fault
        return error.errno in (errno.ENOTSUP, errno.ENOENT)


def _acl(*entries: tuple[int, int]) -> bytes:
    """An access control list as the kernel keeps it (acl(5), include/uapi/linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, may, 0xFFFFFFFF) for tag, may in entries)


SHARING = "system.posix_acl_default"
SHARED = _acl((0x01, 7), (0x04, 7), (0x20, 5))
"""Owner and group may all, others read: what is made in a folder gets this, whatever its maker's umask says."""


def _rights(site: Site) -> str | None:
    """What members may do by sudo, as our file says; None where there is no sudo."""
    if not site.user or not shutil.which("visudo", path="/usr/sbin:/sbin"):
        return None
    with suppress(OSError):
        return _sudoers(site).read_text()
    return ""


def _sudoers(site: Site) -> Path:
    return Path(f"/etc/sudoers.d/hearth-{site.service}")


def _pythons(site: Site, wanted: list[str]) -> dict[str, str]:
    """Interpreters by minor version. A system service sees no home folder, so only the system's count for it."""
    places = "/usr/bin:/usr/local/bin" if site.scope == "system" else os.environ.get("PATH", "/usr/bin")
    code = "import sys; print(sys._base_executable, '%d.%d' % sys.version_info[:2])"
    found: dict[str, str] = {}
    for version in wanted:
        program = shutil.which(f"python{version}", path=places)
        if program is None:
            continue
        if sys.prefix == sys.base_prefix and Path(program).resolve() == Path(sys.executable).resolve():
            found[version] = program  # the one that runs this: no need to start it
            continue
        done = subprocess.run([program, "-ISc", code], capture_output=True, text=True)
        answer = done.stdout.split()
        if len(answer) == 2 and answer[1] == version:
            found[version] = answer[0]
    return found


def _packages(wanted: list[str]) -> dict[str, bool]:
    """Which of these Debian packages are installed; empty where there is no dpkg to tell."""
    if not wanted or not shutil.which("dpkg-query"):
        return {}
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *wanted]
    shown = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()  # fails when it lacks one
    return {name: f"{name} installed" in shown for name in wanted}


def _gpus() -> list[Json]:
    """The NVIDIA GPUs, as nvidia-smi sees them. Memory in bytes; a GPU that names none shares the machine's."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    gpus: list[Json] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, capability, memory = (cell.strip() for cell in line.split(","))
        unified = not memory.isdecimal()  # GB10 answers [N/A]
        gpus.append(
            {
                "name": name,
                "capability": capability,
                "memory": None if unified else int(memory) << 20,
                "unified": unified,
            }
        )
    return gpus


def _driver() -> str:
    """The NVIDIA driver's version; empty without one."""
    with suppress(OSError):
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else ""
    return ""


def _port_holder(site: Site) -> Json:
    """Who listens on the site's port: pid and name, as far as this user may see; empty when nobody does."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == site.port:
                    inodes.add(f"socket:[{cells[9]}]")
    if not inodes:
        return {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(str(each.readlink()) in inodes for each in (folder / "fd").iterdir()):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return {"pid": int(folder.name), "command": " ".join(words[:3]).strip()}
    return {"pid": 0, "command": "a process of another user"}


def busy(site: Site) -> Json:
    """Who is changing this host now: the run under way; empty when nobody is."""
    plan = read(site.pending)
    if not plan:
        return {}
    return {key: plan[key] for key in ("run", "who", "since", "action")} | {"alive": not free(site.lock)}


def last_line(path: Path) -> Json:
    """The last line of a JSON lines file."""
    try:
        lines = path.read_text().splitlines()
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- service managers ----------------------------------------------------------------------------------------------


UNITS = Path("/etc/systemd/system")


class Systemd:
    """The service as a unit of the system's or the user's systemd.

    The unit file is a link to `current/<service>.service`: what switches the release switches the unit with it.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = f"systemd-{site.scope}"
        self.unit = f"{site.service}.service"
        self.storage = f"{site.service}-storage.service"  # what waits for mounts, where there are any
        self.apply_unit = f"{site.service}-apply.service"
        system = site.scope == "system"
        self.ctl = ["systemctl"] if system else ["systemctl", "--user"]
        self.units = UNITS if system else Path.home() / ".config/systemd/user"
        self.target = "multi-user.target" if system else "default.target"

    def _wants(self, unit: str) -> Path:
        return self.units / f"{self.target}.wants" / unit

    def status(self) -> Json:
        """How the service is: running, enabled, restarts, since when."""
        fields = "ActiveState,SubState,NRestarts,ActiveEnterTimestamp,MainPID"
        shown = run([*self.ctl, "show", self.unit, f"--property={fields}"])
        values = dict(line.partition("=")[::2] for line in shown.splitlines())
        return {
            # "auto-restart" is activating, too: it has died and waits
            "active": values.get("ActiveState") in ("active", "activating", "reloading")
            and values.get("SubState") != "auto-restart",
            "state": f"{values.get('ActiveState')} ({values.get('SubState')})",
            "enabled": self._wants(self.unit).is_symlink(),
            "linked": self._linked(),
            "restarts": int(values.get("NRestarts") or 0),
            "since": values.get("ActiveEnterTimestamp", ""),
            "pid": int(values.get("MainPID") or 0),
        }

    def _linked(self) -> bool:
        wanted = [
            name for name in (self.unit, self.storage) if name == self.unit or (self.site.current / name).exists()
        ]
        places = [(self.units / name, self.site.current / name) for name in wanted]
        return all(place.is_symlink() and place.readlink() == target for place, target in places)

    def foreign(self) -> str:
        """The unit's file when somebody else wrote it; one of Hearth's that was edited, or none at all, is drift."""
        place = self.units / self.unit
        text = "" if self._linked() else _text(place)
        return str(place) if text and WRITTEN not in text else ""

    def install(self) -> None:
        """Make systemd see the current release's unit, and start it at boot."""
        link(self.units / self.unit, self.site.current / self.unit)
        link(self._wants(self.unit), f"../{self.unit}")
        if (self.site.current / self.storage).exists():
            link(self.units / self.storage, self.site.current / self.storage)
        else:
            (self.units / self.storage).unlink(missing_ok=True)
        run([*self.ctl, "daemon-reload"])

    def uninstall(self) -> None:
        """Forget the unit: there is no release any more."""
        for place in (self._wants(self.unit), self.units / self.unit, self.units / self.storage):
            place.unlink(missing_ok=True)
        run([*self.ctl, "daemon-reload"])

    def start(self) -> None:
        """Start the service."""
        subprocess.run([*self.ctl, "reset-failed", self.unit], capture_output=True)
        run([*self.ctl, "start", self.unit])

    def stop(self) -> None:
        """Stop the service and wait until it has."""
        units = [name for name in (self.storage, self.unit) if os.path.lexists(self.units / name)]
        if units:
            run([*self.ctl, "stop", *units])

    def log(self, lines: int) -> list[str]:
        """The last lines of the service's present or last run."""
        who = ["--user-unit"] if self.site.scope == "user" else ["--unit"]
        shown = run([*self.ctl, "show", self.unit, "--property=InvocationID", "--value"]).strip()
        match = [f"_SYSTEMD_INVOCATION_ID={shown}"] if shown else [*who, self.unit]
        return run(["journalctl", "--no-pager", "--output=cat", f"--lines={lines}", *match]).splitlines()

    def settle(self) -> None:
        """Start the enabled service where systemd did not find its unit at boot: the prefix was not mounted yet."""
        if self._wants(self.unit).is_symlink() and not self.status()["active"]:
            for words in (["daemon-reload"], ["start", "--no-block", self.unit]):
                subprocess.run([*self.ctl, *words], capture_output=True)

    def go(self) -> None:
        """Start the unit that applies what is pending; it is restarted when killed, and started at boot."""
        text = _APPLY_UNIT.format(
            service=self.site.service, python=sys.executable, state=self.site.state, target=self.target
        )
        place = self.units / self.apply_unit
        if not place.exists() or place.read_text() != text:
            write(place, text)
            link(self._wants(self.apply_unit), f"../{self.apply_unit}")
            run([*self.ctl, "daemon-reload"])
        subprocess.run([*self.ctl, "reset-failed", self.apply_unit], capture_output=True)
        run([*self.ctl, "start", "--no-block", self.apply_unit])


# Not ordered against the service, which it stops and starts itself. OOMPolicy: a compiler or uv that is killed for
# memory must not take the apply with it.
_APPLY_UNIT = """\
[Unit]
Description=Hearth: goes on with a change of {service} that is under way, else sees that it was started
RequiresMountsFor={state}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={python} -I {state}/agent.py apply {state}/site.json
Restart=on-failure
RestartSec=1
OOMPolicy=continue
KillMode=control-group

[Install]
WantedBy={target}
"""


class Supervised:
    """The service under a supervisor of our own: no systemd, no root. Survives the shell that started it."""

    name = "process"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lock = site.state / "supervisor.lock"
        self.record = site.state / "supervisor.json"
        self.output = site.state / "comfyui.log"
        self.enabled = site.state / "enabled"

    def status(self) -> Json:
        """How the service is: running, enabled, restarts, since when."""
        running = self.lock.exists() and not free(self.lock)
        record = read(self.record) if running else {}
        return {
            "active": running,
            "state": "active (supervised)" if running else "inactive (no supervisor)",
            "enabled": self.enabled.exists(),
            "linked": True,
            "restarts": record.get("restarts", 0),
            "since": record.get("since", ""),
            "pid": record.get("child", 0),
        }

    def install(self) -> None:
        """Note that the service shall run."""
        self.enabled.touch()

    def uninstall(self) -> None:
        """Forget it."""
        self.enabled.unlink(missing_ok=True)

    def start(self) -> None:
        """Start the service."""
        if not self.status()["active"]:
            detach([sys.executable, "-I", str(self.site.state / "agent.py"), "supervise"], self.site)
            wait_for(lambda: not free(self.lock), 10)

    def stop(self) -> None:
        """Stop the service and wait until it has."""
        record = read(self.record)
        if self.status()["active"] and record:
            os.kill(record["pid"], signal.SIGTERM)
            if not wait_for(lambda: free(self.lock), 40):
                raise Fault("step", "the supervisor does not end", f"process {record['pid']}", "look at it with ps")

    def log(self, lines: int) -> list[str]:
        """The last lines of the service's present or last run."""
        with suppress(OSError), self.output.open(errors="replace") as log:
            log.seek(read(self.record).get("offset", 0))
            return log.read().splitlines()[-lines:]
        return []

    def settle(self) -> None:
        """Nothing starts it at boot."""

    def go(self) -> None:
        """Apply what is pending, in a process of its own."""
        detach([sys.executable, "-I", str(self.site.state / "agent.py"), "apply"], self.site)


Manager = Systemd | Supervised


def manager_of(site: Site) -> Manager:
    """How services are run here: by the system's systemd, the user's where it outlives the login, or by Hearth.

    What Hearth supervises once stays so: two managers would start the service twice.
    """
    lingers = Path("/var/lib/systemd/linger", login()).exists()
    if site.scope == "system" or (lingers and not Supervised(site).enabled.exists() and _user_systemd()):
        return Systemd(site)
    return Supervised(site)


def login() -> str:
    """Who runs this; the number where it has no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _user_systemd() -> bool:
    """Whether the login has a systemd of its own that answers."""
    if not (Path("/run/systemd/system").is_dir() and os.environ.get("XDG_RUNTIME_DIR")):
        return False
    with suppress(OSError):
        done = subprocess.run(["systemctl", "--user", "show", "--property=Version"], capture_output=True)
        return done.returncode == 0
    return False


def detach(argv: list[str], site: Site) -> None:
    """Start a process that no shell, connection or Ctrl-C of ours ends."""
    log = (site.state / "agent.log").open("ab")
    with log:
        subprocess.Popen(
            [*argv, str(site.state / "site.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until the condition holds; say whether it did in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


# What a unit would get, too; whatever else the shell has set is not the service's.
_INHERITED = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "TZ", "USER", "XDG_RUNTIME_DIR")


def supervise(site: Site) -> None:
    """Run the current release until told to stop (SIGTERM); start it again when it dies, five times in five minutes."""
    manager = Supervised(site)
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT)  # ComfyUI handles SIGINT, not SIGTERM

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN: ComfyUI would inherit that, and never stop
    with flock(manager.lock):
        starts: list[float] = []
        restarts = 0
        while not stopping:
            if missing := site.unmounted():
                with manager.output.open("a") as output:
                    output.write(f"{now()} waiting for {' and '.join(missing)} to be mounted\n")
                wait_for(lambda: stopping or not site.unmounted(), 60)
                continue
            release = site.manifest(site.release())
            if manager.output.exists() and manager.output.stat().st_size > 10_000_000:
                manager.output.replace(manager.output.with_suffix(".log.1"))
            with manager.output.open("ab") as log:
                begin = log.tell()
                inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
                environment = {**inherited, **release["environment"]}
                child = subprocess.Popen(
                    release["argv"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=site.data
                )
                record = {"pid": os.getpid(), "child": child.pid, "restarts": restarts, "since": now()}
                record["offset"] = begin
                write(manager.record, json.dumps(record))
                if stopping:  # told so between the loop's test and the start
                    child.send_signal(signal.SIGINT)
                patience, gone = 30.0, False
                while child.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(0.5)
                    if not gone and site.unmounted():  # it must not write into the empty mount point
                        gone = True
                        child.send_signal(signal.SIGINT)
                    patience -= 0.5 if stopping or gone else 0
                    if patience < 0:
                        child.kill()
            if gone:
                continue
            starts = [each for each in starts if each > time.monotonic() - 300] + [time.monotonic()]
            if len(starts) >= 5:
                break
            restarts += 1
            if not stopping:
                time.sleep(2)


# --- ComfyUI -------------------------------------------------------------------------------------------------------


def ask(site: Site, path: str, body: Json | None = None, timeout: float = 5) -> Any:
    """Ask the running ComfyUI; bytes for a picture, else parsed JSON. Raises OSError or ValueError."""
    import urllib.request  # half of this file's start, and most verbs ask nothing

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a machine needs no proxy to reach itself
    address = "127.0.0.1" if site.address in ("0.0.0.0", "") else site.address
    host = f"[{address}]" if ":" in address else address
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://{host}:{site.port}{path}", data, {"Content-Type": "application/json"})
    with direct.open(request, timeout=timeout) as answer:
        raw = answer.read()
    return raw if path.startswith("/view") else json.loads(raw)


def drain(site: Site, seconds: float, force: bool, note: Callable[[str], None]) -> None:
    """Wait until ComfyUI has no job left; raises Fault naming the jobs when it does not end in time."""
    end = time.monotonic() + seconds
    said = ""
    while True:
        try:
            queue = ask(site, "/queue")
        except (OSError, ValueError):
            return  # not answering: nothing to wait for
        running = [str(job[1]) for job in queue["queue_running"]]
        waiting = len(queue["queue_pending"])
        if not running and not waiting:
            return
        jobs = f"{len(running)} running ({', '.join(running)}), {waiting} waiting"
        if force:
            note(f"cutting jobs short: {jobs}")
            return
        if time.monotonic() > end:
            raise Fault(
                "drain",
                f"ComfyUI is still working after {seconds:.0f} s: {jobs}",
                "",
                "wait and run again, give it longer (--drain SECONDS), or cut the jobs short (--force)",
            )
        if jobs != said:
            note(f"waiting for jobs: {jobs}")
            said = jobs
        time.sleep(0.5)


def gate(site: Site, manager: Manager, release: Json, note: Callable[[str], None]) -> None:
    """Prove that the release serves: it answers, is the one asked for, and makes a picture. Raises Fault if not.

    What was found is kept with the release, in `proven`: its node types with the module that each is from, and nodes
    that could not be imported.
    """
    wanted = release["gate"]
    started = time.monotonic()
    stats = _first_answer(site, manager, wanted["seconds"])
    system = stats["system"]
    note(f"answers after {time.monotonic() - started:.1f} s: ComfyUI {system['comfyui_version']}")
    argv = release["argv"][release["argv"].index(f"{release['code']}/main.py") :]
    kinds = sorted({device["type"] for device in stats["devices"]})
    checks = [
        ("ComfyUI", system["comfyui_version"], wanted["version"]),
        ("its command line", " ".join(system["argv"]), " ".join(argv)),
        ("torch", system["pytorch_version"].partition("+")[0], wanted["torch"]),
    ]
    for what, found, expected in checks:
        if found != expected:
            raise Fault("gate", f"{what} is not the release's", f"found {found}, wanted {expected}")
    if wanted["cuda"] and "cuda" not in kinds:
        raise Fault("gate", "ComfyUI sees no CUDA device", f"it runs on {', '.join(kinds)}", "inv facts shows the GPUs")
    lines = _output(site, manager, "Import times for custom nodes:" if release.get("nodes") else "")
    if wanted["attention"]:
        used = next((line.strip() for line in lines if re.search(r"Using .* attention", line)), "nothing it logged")
        if wanted["attention"].lower() not in used.lower():
            raise Fault("gate", f"the attention in use is not {wanted['attention']}", f"ComfyUI says: {used}")
        note(f"attention: {wanted['attention']}")
    failed = _failed_nodes(lines)
    for name, reason in failed.items():
        if name in wanted.get("required", ()):
            raise Fault("gate", f"node {name} cannot be imported, and is required", reason)
        note(f"node {name} cannot be imported: {reason}")
    _picture(site, note)
    types = {
        name: each.get("python_module", "") for name, each in sorted(ask(site, "/object_info", timeout=60).items())
    }
    proof = {"at": now(), "failed_nodes": failed, "types": types}
    write(site.releases / release["id"] / "proven", json.dumps(proof))


def _output(site: Site, manager: Manager, until: str) -> list[str]:
    """What ComfyUI has written since it started, without colours; waits a little for a line with `until`."""
    lines: list[str] = []
    for _ in range(20):
        with suppress(Fault, OSError):
            lines = manager.log(100_000)
        if not lines:  # a journal that is not ours to read: ComfyUI itself keeps its last 300 writes
            lines = "".join(str(each["m"]) for each in ask(site, "/internal/logs/raw")["entries"]).splitlines()
        if any(until in line for line in lines):
            break
        time.sleep(0.25)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


def _failed_nodes(lines: list[str]) -> dict[str, str]:
    """The custom nodes that ComfyUI could not import, each with the last line of its traceback."""
    failed: dict[str, str] = {}
    for line in lines:
        if found := re.search(r"\(IMPORT FAILED\): .*/([^/]+)$", line):
            name = found[1].strip()
            why = [each.partition(" for custom nodes: ")[2] for each in lines if f"/{name} module for custom" in each]
            failed[name] = why[-1] if why else "it has no NODE_CLASS_MAPPINGS and no comfy_entrypoint"
    return failed


def _say_changed_types(site: Site, before: str, after: str, note: Callable[[str], None]) -> None:
    """Say which node types are gone since the release before, and which another node provides: workflows use them.

    Of two nodes with the same type ComfyUI takes the one that it loads last, without a word.
    """
    old, new = (read(site.releases / name / "proven").get("types", {}) for name in (before, after))
    gone = sorted(set(old) - set(new))
    moved = [
        f"{name} ({new[name]}, before {old[name]})"
        for name in sorted(set(old) & set(new))
        # an older Hearth kept names only; a newer ComfyUI may move its own
        if isinstance(old, dict) and old[name] != new[name] and new[name].startswith("custom_nodes.")
    ]
    for what, names in (("are gone", gone), ("another node provides now", moved)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            note(f"node types that {what}: {', '.join(names[:20])}{more}")


def _first_answer(site: Site, manager: Manager, seconds: float) -> Any:
    """The first /system_stats of the service; raises Fault when it dies or the time is over."""
    end = time.monotonic() + seconds
    restarts = manager.status()["restarts"]
    while True:
        try:
            return ask(site, "/system_stats")
        except (OSError, ValueError):
            pass
        status = manager.status()
        if not status["active"] or status["restarts"] > restarts:
            raise Fault("gate", "ComfyUI died while it started", status["state"])
        if time.monotonic() > end:
            raise Fault("gate", f"ComfyUI does not answer after {seconds:.0f} s", status["state"])
        time.sleep(0.25)


def _picture(site: Site, note: Callable[[str], None]) -> None:
    """Run a workflow that needs no model, fetch its picture, and leave nothing behind."""
    started = time.monotonic()
    color = time.time_ns() % (1 << 24)  # ComfyUI would answer the same workflow from its cache, without the file
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "hearth-gate/proof"}},
    }
    try:
        prompt = str(ask(site, "/prompt", {"prompt": workflow})["prompt_id"])
        while not (done := ask(site, f"/history/{prompt}").get(prompt)):
            if time.monotonic() - started > 120:
                raise Fault("gate", "a workflow without models does not end within 120 s")
            time.sleep(0.1)
        (image,) = done["outputs"]["2"]["images"]
        raw = ask(site, f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault("gate", "a workflow without models makes no picture", repr(error)) from error
    finally:
        shutil.rmtree(site.folder("output") / "hearth-gate", ignore_errors=True)
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[16:24] != b"\0\0\0\x40\0\0\0\x40":
        raise Fault("gate", "the picture that came back is not the one asked for", f"{len(raw)} bytes")
    note(f"a picture came back after {time.monotonic() - started:.1f} s")


# --- adopting ------------------------------------------------------------------------------------------------------
#
# A ComfyUI that somebody else installed: read, never run. Its folders belong to whoever ran it, who may have put a
# link anywhere; so what root changes there is opened name by name, and no link is followed.


WRITTEN = "written by Hearth for release"
"""In the first line of every unit of Hearth's (recipes/comfyui/units/)."""

FOLDERS = ("models", "input", "output", "user")


def survey(site: Site, path: str) -> Json:
    """What ComfyUI installations are here: the one at `path`, or those at the usual places."""
    units, processes = _units(site), _processes()
    looked = [path] if path else _usual_places(site, units, processes)
    found: dict[str, Json] = {}
    for each in looked:
        place = Path(os.path.realpath(Path(each).expanduser()))
        with suppress(PermissionError):  # a home that is not for this login
            # Hearth's own have a PART.json.
            if (place / "main.py").is_file() and (place / "comfy").is_dir() and not (place / "PART.json").exists():
                found[str(place)] = _installation(site, place, units, processes)
    return {"looked": looked, "found": list(found.values())}


def _usual_places(site: Site, units: list[Json], processes: list[Json]) -> list[str]:
    """Where units and processes say, and where the guides of ComfyUI and comfy-cli put it."""
    homes = sorted({entry.pw_dir for entry in pwd.getpwall() if entry.pw_uid == 0 or 1000 <= entry.pw_uid < 65534})
    fixed = [str(site.prefix / "ComfyUI"), str(site.prefix), "/opt/comfyui/ComfyUI", "/opt/ComfyUI", "/opt/comfyui"]
    fixed += ["/srv/comfyui/ComfyUI", "/srv/ComfyUI", "/srv/comfyui"]
    fixed += [f"{home}/{each}" for home in homes for each in ("comfy/ComfyUI", "ComfyUI", "comfyui")]
    return list(dict.fromkeys([each["place"] for each in (*units, *processes) if each["place"]] + fixed))


def _installation(site: Site, place: Path, units: list[Json], processes: list[Json]) -> Json:
    """All about one installation that can be read."""
    own = [each for each in processes if each["place"] == str(place)]
    through = {each["unit"] for each in own} | {f"{site.service}.service"}
    started = [each for each in units if each["place"] == str(place) or each["name"] in through]
    argv: list[str] = next((each["argv"] for each in (*own, *started) if each["argv"]), [])
    base = Path(_flag(argv, "--base-directory") or place)
    folders = {}
    for name in FOLDERS:
        folder = base / name
        if told := _flag(argv, f"--{name}-directory"):
            folder = place / told
        folders[name] = _folder(folder, site.data)
    configs = [base / "extra_model_paths.yaml", place / "extra_model_paths.yaml"]
    configs += [place / argv[number + 1] for number, word in enumerate(argv[:-1]) if word == _MODEL_PATHS]
    version = re.search(r'^(?:__version__|version) *= *"([^"]+)"', _text(place / "comfyui_version.py"), re.MULTILINE)
    return {
        "path": str(place),
        "version": version[1] if version else "",
        **_repository(place),
        **_installed(place, [each["program"] for each in (*own, *started)]),
        "folders": folders,
        "paths": "\n".join(_text(each) for each in dict.fromkeys(configs)),
        "nodes": _nodes(base / "custom_nodes"),
        "argv": argv,
        "units": started,
        "processes": own,
        "holds_port": _port_holder(site).get("pid", -1) in [each["pid"] for each in own],
    }


_MODEL_PATHS = "--extra-model-paths-config"


def _flag(argv: list[str], name: str) -> str:
    """The value of a flag; empty when it is not given."""
    for number, word in enumerate(argv):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and number + 1 < len(argv):
            return argv[number + 1]
    return ""


def _text(path: Path) -> str:
    """The start of a text file; empty when there is none."""
    return _content(path, 200_000).decode(errors="replace")


def _content(path: Path, limit: int = -1) -> bytes:
    """What is in a file, up to `limit` bytes; nothing when it is a pipe or a device that somebody put there."""
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(limit)
    return b""


def _units(site: Site) -> list[Json]:
    """The units that have to do with ComfyUI and are not Hearth's, also those that were set aside."""
    found: dict[str, Json] = {}
    known = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
    for folder in [*(Path(each, "systemd/system") for each in known), site.state / "adopted"]:
        for path in sorted(folder.glob("*.service")):
            text = _text(path)
            named = path.name == f"{site.service}.service" or re.search(r"comfy|main\.py", text, re.IGNORECASE)
            if path.name in found or WRITTEN in text or not named:
                continue
            text += "\n".join(_text(each) for each in sorted((UNITS / f"{path.name}.d").glob("*.conf")))
            values = dict(re.findall(r"^(\w+) *= *(.+)$", text.replace("\\\n", " "), re.MULTILINE))
            user, command = values.get("User", "root"), values.get("ExecStart", "").lstrip("@-:+!")
            place, argv = _started(command, values.get("WorkingDirectory", "/").lstrip("-"))
            place = os.path.expanduser(place.replace("~", f"~{user}", 1))  # noqa: PTH111  Path fails on unknown users
            shown: dict[str, str] = {}
            if Path("/run/systemd/system").is_dir():
                ask = ["systemctl", "show", path.name, "--property=ActiveState,UnitFileState"]
                lines = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
                shown = dict(line.partition("=")[::2] for line in lines)
            found[path.name] = {
                "name": path.name,
                "path": str(path),
                "aside": folder == site.state / "adopted",
                "place": place and os.path.realpath(place),
                "argv": argv,
                "program": command.split(" ")[0],
                "user": user,
                "variables": sorted(set(re.findall(r'^Environment *= *"?(\w+)=', text, re.MULTILINE))),
                "active": shown.get("ActiveState") in ("active", "activating", "reloading"),
                "enabled": shown.get("UnitFileState", "").startswith("enabled"),
            }
    return list(found.values())


def _started(command: str, folder: str, depth: int = 0) -> tuple[str, list[str]]:
    """The folder and the flags of the ComfyUI that a command starts; a script that it names is read, not run."""
    for words in _commands(command):
        if words[0] == "cd" and len(words) > 1:
            folder = str(Path(folder, words[1]))
        for number, word in enumerate(words):
            if word.endswith("main.py"):
                return str(Path(folder, word).parent), _plain(words[number + 1 :])
            if word == "launch" and "comfy" in [Path(each).name for each in words[:number]]:  # comfy-cli's
                workspace = [each.partition("=")[2] for each in words if each.startswith("--workspace=")]
                after = words.index("--") + 1 if "--" in words else len(words)
                return (workspace or ["~/comfy/ComfyUI"])[0], _plain(words[after:])
            inner = word if " " in word else _text(Path(folder, word)) if "/" in word else ""
            if depth < 3 and (inner == word or inner.startswith("#!")):
                place, argv = _started(inner, folder, depth + 1)
                if place:
                    return place, argv
    return "", []


def _commands(text: str) -> list[list[str]]:
    """The commands of a shell's script, as words; a line that no shell would read is left out."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        with suppress(ValueError):
            found.append([])
            for word in shlex.split(line, comments=True):
                found[-1] += [word.rstrip(";")] if word not in ("&&", "||", ";") else []
                if word.endswith(("&&", "||", ";")):
                    found.append([])
    return [words for words in found if words]


def _plain(words: list[str]) -> list[str]:
    """Flags up to a redirection or pipe, without what only a shell knows."""
    end = next((number for number, word in enumerate(words) if re.match(r"[0-9]?[<>|&]", word)), len(words))
    return [word for word in words[:end] if not word.startswith("$")]


def _processes() -> list[Json]:
    """The processes that run a main.py, with the folder of it and the unit that they belong to."""
    found: list[Json] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, KeyError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            number = next((number for number, word in enumerate(words) if word.endswith("main.py")), 0)
            if not number:
                continue
            unit = re.search(r"/system\.slice/([^/\n]+\.service)", (folder / "cgroup").read_text())
            place = Path(os.path.realpath((folder / "cwd").readlink() / words[number]))
            found.append(
                {
                    "pid": int(folder.name),
                    "user": pwd.getpwuid(folder.stat().st_uid).pw_name,
                    "place": str(place.parent),
                    "program": words[0],
                    "argv": words[number + 1 :],
                    "unit": unit[1] if unit else "",
                }
            )
    return found


def _installed(place: Path, programs: list[str]) -> Json:
    """The Python and torch of its environment, by the names of folders."""
    named = [Path(each).parent.parent for each in programs if each.startswith("/")]
    for environment in (*named, place / ".venv", place / "venv", place.parent / "venv", place.parent / ".venv"):
        for packages in environment.glob("lib/python3*/site-packages"):
            torch = [each.name[6:-10] for each in packages.glob("torch-*.dist-info")]
            return {"python": packages.parent.name[6:], "torch": (torch or [""])[0], "environment": str(environment)}
    return {"python": "", "torch": "", "environment": ""}


def _folder(place: Path, data: Path) -> Json:
    """A folder of ComfyUI's: what and where it is, whose, how large, and whether a rename brings it into `data`.

    What is in a link's target or a mount is not counted: it may be a network's.
    """
    real = Path(os.path.realpath(place))
    kind = "link" if place.is_symlink() else "folder" if place.is_dir() else "missing"
    found: Json = {"place": str(place), "real": str(real), "kind": kind, "mount": {}, "rename": False}
    found |= {"bytes": 0, "files": 0, "owner": "", "people": [], "links": {}, "mounts": []}
    if not real.is_dir():
        return found
    mounts = _mounts()
    mount = _mount_of(real, mounts)
    status = real.stat()
    with suppress(KeyError):
        found["owner"] = pwd.getpwuid(status.st_uid).pw_name
        found["people"] = [found["owner"]] if status.st_uid >= 1000 else []
        found["people"] += grp.getgrgid(status.st_gid).gr_mem
    found["mount"] = mount
    found["mounts"] = [each for each in mounts if each["point"].startswith(f"{real}/")]
    if kind == "folder" and mount["point"] != str(real) and not found["mounts"]:
        there = next(path for path in (data, *data.parents) if path.exists()).resolve()
        found["rename"] = mount == _mount_of(there, mounts) and status.st_dev == there.stat().st_dev
        for name, each in walk(real):
            found["files"] += 1
            found["bytes"] += each.st_size
            if stat.S_ISLNK(each.st_mode) and len(found["links"]) < 100:
                found["links"][name] = target = str((real / name).readlink())
                if target.startswith("/") and (far := _mount_of(Path(target), mounts)) not in (mount, *found["mounts"]):
                    found["mounts"].append(far)
    return found


def _mounts() -> list[Json]:
    """What is mounted: where, what and of which type (/proc/self/mountinfo, proc(5))."""
    found: list[Json] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        found.append({"point": point, "what": after.split()[1], "type": after.split()[0]})
    return found


def _mount_of(path: Path, mounts: list[Json]) -> Json:
    """The mount that a path is on: of those above it the lowest, of one place the latest."""
    above = {str(each) for each in (path, *path.parents)}
    return max((each for each in reversed(mounts) if each["point"] in above), key=lambda each: len(each["point"]))


def _nodes(folder: Path) -> list[Json]:
    """The custom nodes: trees with where they come from, and single files."""
    found: list[Json] = []
    for place in sorted([*folder.glob("*"), *folder.glob(".disabled/*")]):
        disabled = place.name.endswith(".disabled") or place.parent != folder
        name = place.name.removesuffix(".disabled")
        if place.is_dir() and not name.startswith((".", "__")):
            found.append({"name": name, "disabled": disabled, "file": False, **_repository(place)})
        elif name.endswith(".py") and name != "websocket_image_save.py":  # that one is ComfyUI's own
            found.append({"name": name, "disabled": disabled, "file": True, "url": "", "commit": "", "edited": None})
    return found


def _repository(place: Path) -> Json:
    """Where a tree comes from, its commit, and which of its files were edited (None: nobody can tell)."""
    folder = place / ".git"
    if folder.is_file():
        folder = place / _text(folder).partition("gitdir:")[2].strip()
    head = _text(folder / "HEAD").strip()
    if head.startswith("ref: "):
        packed = [line.split() for line in _text(folder / "packed-refs").splitlines()]
        head = _text(folder / head[5:]).strip() or next((line[0] for line in packed if line[1:] == [head[5:]]), "")
    commit = head if re.fullmatch(r"[0-9a-f]{40}", head) else ""
    origin = re.search(r'^\[remote "origin"\][^\[]*?^\s*url\s*=\s*(\S+)', _text(folder / "config"), re.MULTILINE)
    if not commit:  # from the registry of nodes, which leaves no history
        origin = re.search(r'^Repository *= *"([^"]+)', _text(place / "pyproject.toml"), re.MULTILINE)
    url = re.sub(r"(://)[^/@]*@", r"\1", origin[1]) if origin else ""  # there may be a password in it
    return {"url": url, "commit": commit, "edited": _edited(place, folder, commit) if commit else None}


def _edited(place: Path, folder: Path, commit: str) -> list[str] | None:
    """The files of a working tree that are not its commit's; None where git is missing or cannot tell.

    A repository's configuration can name programs, hooks and filters that git then runs: git is given a folder of
    our own, with that one's objects and a copy of its index, and sees no configuration at all.
    """
    if not shutil.which("git"):
        return None
    with tempfile.TemporaryDirectory(prefix="hearth-") as own:
        (Path(own) / "HEAD").write_text(f"{commit}\n")
        (Path(own) / "refs").mkdir()
        (Path(own) / "index").write_bytes(_content(folder / "index"))
        environment = {"PATH": os.environ.get("PATH", "/usr/bin"), "GIT_DIR": own, "GIT_WORK_TREE": str(place)}
        environment |= {"GIT_OBJECT_DIRECTORY": str(folder / "objects"), "GIT_OPTIONAL_LOCKS": "0"}
        environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
        words = ["git", "status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=all"]
        done = subprocess.run([*words, "--no-renames"], cwd=place, env=environment, capture_output=True)
    if done.returncode:
        return None
    return [line[3:] for line in done.stdout.decode(errors="replace").split("\0") if line]


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


def rename(source: Path, target: Path) -> None:
    """Rename, following no link, and never onto something that is there (renameat2, glibc 2.28); raises OSError."""
    import ctypes  # a megabyte that no other verb needs

    with opened(source.parent) as here, opened(target.parent) as there:
        names = os.fsencode(source.name), os.fsencode(target.name)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(here, names[0], there, names[1], 1):  # RENAME_NOREPLACE
            code = ctypes.get_errno()
            if code != errno.EINVAL or os.path.lexists(target):
                raise OSError(code, os.strerror(code), str(source), None, str(target))
            os.rename(*names, src_dir_fd=here, dst_dir_fd=there)  # some file systems (NFS, older ZFS) know no such flag
        os.fsync(there)
        os.fsync(here)


def retire(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Take what served before out of service: its jobs awaited, its units stopped, disabled and set aside."""
    drain(Site({**site.json, "address": "127.0.0.1", "port": step["port"]}), step["drain"], step["force"], note)
    record = Adopted(site)
    known = {event["unit"]["name"] for event in record.events() if event["event"] == "unit"}
    for unit in step["units"]:
        if unit["name"] not in known:
            record.add("unit", unit=unit)
    for unit in step["units"]:
        if not os.path.lexists(unit["path"]):
            continue
        run(["systemctl", "stop", unit["name"]])
        # Drop-ins, too: they would change Hearth's unit of that name.
        own = [UNITS / f"{unit['name']}.d", UNITS / unit["name"]]
        for place in own:
            _copy(place, site.state / "adopted" / place.name)
        if unit["enabled"]:
            run(["systemctl", "disable", unit["name"]])
        for place in own:
            _drop(place)
    run(["systemctl", "daemon-reload"])
    for each in _processes():
        if each["place"] == step["path"]:
            what = f"the old ComfyUI still runs: pid {each['pid']} of {each['user']}"
            raise Fault("step", what, "no unit that was stopped is its own", "end it, then run the same command again")


def _copy(source: Path, target: Path) -> None:
    """Copy a unit or its drop-ins as they are, links as links; /etc may be another file system than the prefix."""
    if not os.path.lexists(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.fresh")
    for stale in (fresh, target):
        _drop(stale)
    run(["cp", "-a", str(source), str(fresh)])
    fresh.rename(target)
    os.sync()


def _drop(place: Path) -> None:
    remove(place) if place.is_dir() and not place.is_symlink() else place.unlink(missing_ok=True)


def adopt(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Rename a folder of the old installation into the data, and let the service read and write it."""
    record = Adopted(site)
    source, target = Path(step["source"]), site.data.resolve() / step["name"]
    if step["name"] == "user":
        _keep_database(site, source, record)
    left = _bring(source, target, record)
    for each in left[:20]:
        note(f"left where it is, the data has one of that name: {each}")
    if left[20:]:
        note(f"and {len(left) - 20} more of these")
    moved = [Path(event["target"]) for event in record.events() if event["event"] == "rename"]
    linked = sum(_own(site, each, record) for each in dict.fromkeys(moved) if target in (each, *each.parents))
    if linked:
        note(f"{linked} files have several names, and keep their owners and modes")


def _bring(source: Path, target: Path, record: Adopted) -> list[str]:
    """Rename a folder, or what is in it where there is one already; answers what had to stay."""
    if not os.path.lexists(source):
        return []
    with suppress(OSError), opened(target.parent) as place:
        os.rmdir(target.name, dir_fd=place)  # an empty one is as good as none
    if not os.path.lexists(target):
        record.add("rename", source=str(source), target=str(target))
        rename(source, target)
        return []
    if any(each.is_symlink() or not each.is_dir() for each in (source, target)):
        return [str(source)]
    return [left for each in sorted(source.iterdir()) for left in _bring(each, target / each.name, record)]


def _own(site: Site, root: Path, record: Adopted) -> int:
    """Give a tree to the service and its group, what it was recorded before; answers how many files had to be left."""
    user, group = site.owner()
    linked = 0
    with opened(root.parent) as parent:
        linked += _own_entries(parent, root.parent, [root.name], (user, group), record)
        if stat.S_ISDIR(os.lstat(root.name, dir_fd=parent).st_mode):
            for folder, folders, files, place in os.fwalk(root.name, dir_fd=parent, follow_symlinks=False):
                linked += _own_entries(place, root.parent / folder, [*folders, *files], (user, group), record)
    return linked


def _own_entries(place: int, folder: Path, names: list[str], owner: tuple[int, int], record: Adopted) -> int:
    """The same for some entries of an open folder."""
    changes: list[tuple[list[Any], int]] = []
    linked = 0
    for name in names:
        status = os.lstat(name, dir_fd=place)
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            linked += 1  # another name of it may be elsewhere, of somebody else's
            continue
        mode = stat.S_IMODE(status.st_mode)
        wanted = {stat.S_IFDIR: mode | 0o2770, stat.S_IFREG: mode | 0o660}.get(stat.S_IFMT(status.st_mode), mode)
        if (status.st_uid, status.st_gid, mode) != (*owner, wanted):
            changes.append(([name, status.st_uid, status.st_gid, mode], wanted))
    if changes:
        record.add("own", folder=str(folder), entries=[before for before, _ in changes])
    for (name, *_), wanted in changes:
        _give(place, name, *owner, wanted)
    return linked


def _give(place: int, name: str, user: int, group: int, mode: int) -> None:
    """Set owner and mode of an entry of an open folder, of a link its own; what has several names is left alone."""
    kind = stat.S_IFMT(os.lstat(name, dir_fd=place).st_mode)
    if kind == stat.S_IFLNK:
        os.chown(name, user, group, dir_fd=place, follow_symlinks=False)
    elif kind in (stat.S_IFREG, stat.S_IFDIR):
        entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        try:
            if kind == stat.S_IFDIR or os.fstat(entry).st_nlink == 1:
                os.fchown(entry, user, group)
                os.fchmod(entry, mode)
        finally:
            os.close(entry)


def _keep_database(site: Site, folder: Path, record: Adopted) -> None:
    """Copy the old ComfyUI's database: a newer version migrates it, and the old one would not start any more."""
    kept = site.state / "adopted/database"
    if kept.exists() or not folder.is_dir():
        return
    fresh = kept.with_name(".database")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    for name, (content, *owner, mode) in _database(folder).items():
        (fresh / name).write_bytes(content)
        os.chown(fresh / name, *owner)
        (fresh / name).chmod(mode)
    record.add("database", folder=str(folder))
    os.sync()
    fresh.rename(kept)


def _database(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """The files of a ComfyUI's database with owner, group and mode. It is small, an index of models and pictures."""
    found: dict[str, tuple[bytes, int, int, int]] = {}
    with opened(folder) as place:
        for path in folder.glob("comfyui.db*"):
            with suppress(OSError), open(path.name, "rb", opener=_within(place)) as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and ".newer-" not in path.name:
                    mode = stat.S_IMODE(status.st_mode)
                    found[path.name] = file.read(), status.st_uid, status.st_gid, mode
    return found


def _within(place: int) -> Callable[[str, int], int]:
    """An opener of names in an open folder that follows no link and waits for no pipe."""
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=place)


def _return_database(site: Site, folder: Path) -> None:
    """Put the old database back where a newer version has changed it; the newer one stays beside it."""
    before, present = _database((site.state / "adopted/database").resolve()), _database(folder)
    if before == present:
        return
    for name in present:
        rename(folder / name, folder / f"{name}.newer-{now()}")
    with opened(folder) as place:
        for name, (content, *owner, mode) in before.items():
            with open(name, "xb", opener=_within(place)) as file:
                file.write(content)
                os.fchown(file.fileno(), *owner)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())


def withdraw(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Take the current release out of service. It stays here: a deploy or rollback brings it back."""
    if not site.current.is_symlink():
        return
    drain(site, step["drain"], step["force"], note)
    manager = manager_of(site)
    manager.stop()
    manager.uninstall()
    site.current.unlink()


def unadopt(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put back all that adopting changed, the last first: owners and modes, folders, database, units."""
    record = Adopted(site)
    stuck: list[str] = []
    for event in reversed(record.events()):
        try:
            _undo(site, event)
        except (Fault, OSError) as error:
            stuck.append(str(error))
    if stuck:
        hint = "look at them, then run the same command again"
        raise Fault("step", f"{len(stuck)} things could not be put back", "\n".join(stuck[:20]), hint)
    shutil.rmtree(site.state / "adopted", ignore_errors=True)
    record.path.rename(record.path.with_name("adopted.undone.jsonl"))


def _undo(site: Site, event: Json) -> None:
    """Take one line of the record back, as far as it was done."""
    if event["event"] == "own" and Path(event["folder"]).is_dir():
        with opened(Path(event["folder"])) as place:
            for name, user, group, mode in event["entries"]:
                with suppress(FileNotFoundError):
                    _give(place, name, user, group, mode)
                with suppress(OSError):  # what a deploy added since
                    os.removexattr(f"/proc/self/fd/{place}/{name}", SHARING, follow_symlinks=False)
    elif event["event"] == "rename" and os.path.lexists(event["target"]):
        rename(Path(event["target"]), Path(event["source"]))
    elif event["event"] == "database" and (site.state / "adopted/database").is_dir():
        _return_database(site, Path(event["folder"]))
    elif event["event"] == "unit":
        unit = event["unit"]
        for own in (UNITS / unit["name"], UNITS / f"{unit['name']}.d"):
            if not os.path.lexists(own):
                _copy(site.state / "adopted" / own.name, own)
        run(["systemctl", "daemon-reload"])
        if unit["enabled"]:
            run(["systemctl", "enable", unit["name"]])
        if unit["active"]:
            run(["systemctl", "start", unit["name"]])


# --- steps ---------------------------------------------------------------------------------------------------------


def account(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Create the system user, with its group, that the service runs as."""
    with suppress(KeyError):
        pwd.getpwnam(site.user)
        note(f"{site.user} is there")
        return
    home = str(site.data)
    run(["useradd", "--system", "--user-group", "--home-dir", home, "--shell", "/usr/sbin/nologin", site.user])


def members(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put the named users, and only them, into the service's group."""
    run(["gpasswd", "--members", ",".join(step["members"]), site.user])


def rights(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Write what members may do by sudo; a file that sudo would not take is never put there: it would lock all out."""
    place = _sudoers(site)
    if not step["text"]:
        place.unlink(missing_ok=True)
        return
    draft = site.state / "sudoers"
    write(draft, step["text"], 0o440)
    run(["visudo", "--check", "--strict", f"--file={draft}"])
    draft.unlink()
    write(place, step["text"], 0o440)


def mount(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Mount a file system by a unit of its own, now and at boot; an encrypted volume's, whenever it is opened."""
    path, unit = Path(step["path"]), site.mounts[step["path"]]
    mounted = os.path.ismount(path)
    path.mkdir(parents=True, exist_ok=True)
    if not mounted and any(os.scandir(path)):
        hint = f"move them away first: ls {path}"
        raise Fault("step", f"there are files in {path} itself, which the mount would hide", "", hint)
    write(UNITS / unit, step["text"])
    link(UNITS / "multi-user.target.wants" / unit, f"../{unit}")
    if step["what"].startswith("/dev/"):
        device = run(["systemd-escape", "--path", "--suffix=device", step["what"]]).strip()
        link(UNITS / f"{device}.wants" / unit, f"../{unit}")
    run(["systemctl", "daemon-reload"])
    done = subprocess.run(["systemctl", "reload" if mounted else "start", unit], capture_output=True, text=True)
    if done.returncode:
        tail = run(["journalctl", "--no-pager", "--output=cat", "--lines=5", f"--unit={unit}"])
        hint = "look whether the server or device answers, then run the same command again"
        raise Fault("step", f"{step['what']} cannot be mounted at {path}", tail.strip() or done.stderr.strip(), hint)


def linger(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Let the login's systemd run without a session, from boot on; where that is not allowed, Hearth supervises."""
    done = subprocess.run(["loginctl", "enable-linger"], capture_output=True, text=True)
    if done.returncode:
        note(f"loginctl enable-linger: {done.stderr.strip()}: ComfyUI is supervised by Hearth instead")


def folders(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Lay the prefix out. Folders that are there, mounts or links, stay where they are, with what is in them."""
    for folder in (site.parts, site.releases, site.state, site.incoming):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (site.data, *map(Path, site.elsewhere.values())):
        if folder.exists() or folder.is_symlink():
            continue
        fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
        fresh.mkdir(parents=True)
        os.chown(fresh, *site.owner())
        fresh.rename(folder)
    as_service(site, _share, site.data, list(site.elsewhere.values()))


def _share(data: Path, elsewhere: list[str]) -> None:
    """Make the folders of the data, and let the group change whatever lies in them and elsewhere."""
    for name in DATA:
        if not (data / name).is_symlink():
            (data / name).mkdir(exist_ok=True)
    for root in (str(data), *elsewhere):
        for name, _, _ in os.walk(root):
            place = Path(name)
            if place.stat().st_uid == os.geteuid():  # another's is another's affair
                place.chmod(place.stat().st_mode | 0o2770)
                with suppress(OSError):  # NFS 4 has lists of another kind
                    os.setxattr(place, SHARING, SHARED)


# custom_nodes: ComfyUI stops when its base directory has none
DATA = ("models", "input", "output", "user", "temp", "cache", "custom_nodes")


def receive_blob(site: Site, digest: str) -> Path:
    """A blob that the client sent; raises Fault when it is not there whole."""
    path = site.incoming / digest
    if not path.exists() or sha256(path) != digest:
        path.unlink(missing_ok=True)
        raise Fault("step", f"what was sent is damaged: {digest[:12]}", "", "run the same command again")
    return path


def tool(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put the pinned uv where the steps find it."""
    place = site.state / "tools" / step["name"]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.copyfile(receive_blob(site, step["blob"]), part)
        part.chmod(0o755)
        part.replace(place)


def app(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make the application's tree."""
    with part(site, step["part"]) as place:
        _unpack(site, step, place)
        run([step["python"], *_compileall(site, step, place), str(place)])
        _corners(site, step, place)


def _unpack(site: Site, step: Json, place: Path) -> None:
    """Fill a part with a tree: what was sent, and the rest from parts that have those very files."""
    with tarfile.open(receive_blob(site, step["blob"])) as archive:
        archive.extractall(place)  # the client's own archive, checked by hash; 3.10 may lack the filters
    for name, source in step["reuse"].items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(site.parts / source, place / name)
    for path, _, _ in os.walk(place):
        Path(path).chmod(0o755)
    if contents(place) != step["files"]:
        raise Fault("step", f"the tree of {step['part']} is not the one that was planned", "a part was changed")


def node(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make a custom node's tree."""
    with part(site, step["part"]) as place:
        _unpack(site, step, place)
        # Some nodes carry files that no Python parses; ComfyUI tells which nodes cannot be imported.
        subprocess.run([step["python"], *_compileall(site, step, place), str(place)], capture_output=True)
        if step["install"]:
            _install(site, step, place)
        _corners(site, step, place)


def _corners(site: Site, step: Json, place: Path) -> None:
    """Make what a tree writes links into the data, seeded once with what it came with."""
    for name in step["writable"]:
        inside, kept = place / name.rstrip("/"), site.data / step["keeps"] / name.rstrip("/")
        as_service(site, _seed, inside, kept, name.endswith("/"))
        remove(inside) if inside.is_dir() else inside.unlink(missing_ok=True)
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.symlink_to(kept)


def _seed(source: Path, place: Path, folder: bool) -> None:
    """Give the data what a node came with, or an empty folder; a file that it did not come with is left to the node."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    if source.is_dir():
        shutil.copytree(source, fresh, copy_function=shutil.copyfile)
    elif folder:
        fresh.mkdir()
    elif source.exists():
        shutil.copyfile(source, fresh)
    else:
        return
    fresh.rename(place)


def own(root: Path, user: int, group: int) -> None:
    """Change who owns a tree that nobody else can reach yet."""
    for path in (root, *root.rglob("*")):
        os.chown(path, user, group, follow_symlinks=False)


def _install(site: Site, step: Json, place: Path) -> None:
    """Run a node's install.py as whom the service runs as, in the tree that is being made."""
    user, group = site.owner()
    if site.user:
        own(place, user, group)
    python = site.parts / step["install"] / "bin/python"
    environment = {**os.environ, "HOME": str(site.data / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    who: Json = {"user": user, "group": group, "extra_groups": []} if site.user else {}
    done = subprocess.run(
        [str(python), "install.py"], cwd=place, env=environment, capture_output=True, text=True, timeout=1800, **who
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise Fault("step", f"the install.py failed: {step['title']}", tail)
    if site.user:
        own(place, 0, 0)


def _compileall(site: Site, step: Json, place: Path) -> list[str]:
    """Compile Python files in a part that is being made; their tracebacks name its final place."""
    return ["-m", "compileall", "-q", "-j", "0", "-s", str(place), "-p", str(site.parts / step["part"])]


_NEVER_IMPORTED = ("tests", "test", "docs", "examples", "benchmarks")
"""Folders that packages leave beside their own by mistake, many of them the same ones."""


def _refuse_overwritten(environment: Path) -> None:
    """Raise Fault when two packages brought the same module with other contents: the one installed last has it."""
    owners: dict[str, tuple[str, str]] = {}
    for record in sorted(environment.glob("lib/python*/site-packages/*.dist-info/RECORD")):
        package = record.parent.name.partition("-")[0].replace("_", "-")
        with record.open(newline="") as file:
            for path, digest, _ in csv.reader(file):
                if path.partition("/")[0] in _NEVER_IMPORTED or not path.endswith((".py", ".so")):
                    continue
                other, held = owners.setdefault(path, (package, digest))
                if held != digest:
                    raise Fault(
                        "step",
                        f"{other} and {package} both bring {path}, and one has overwritten the other's",
                        "which one a node gets is chance",
                        f"decide which stays: [override.{package}] in nodes.toml, then inv lock",
                    )


_NO_NETWORK = "failed to fetch|error sending request|dns error|connection refused|network is unreachable|timed out"


def env(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Make the virtual environment from the locked list and the kernel wheels, every file by its hash."""
    uv = str(site.state / "tools" / step["tool"])
    # uv links what it installs to its cache: one of our own, lest somebody else's environment change with a part's.
    own_cache = str(site.state / "cache/uv")
    environment = {"UV_CACHE_DIR": own_cache, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
    wheels = site.state / "wheels"
    wheels.mkdir(exist_ok=True)
    for wheel in step["wheels"]:
        link(wheels / wheel["file"], receive_blob(site, wheel["sha256"]))
    with part(site, step["part"]) as place:
        venv = ["venv", "--quiet", "--relocatable", "--no-project", "--python", step["python"]]
        run([uv, *venv, str(place)], environment)
        listed = site.state / f"requirements-{os.getpid()}.txt"
        listed.write_text(step["requirements"])
        argv = [uv, "pip", "sync", "--quiet", "--python", f"{place}/bin/python", "--require-hashes", "--strict"]
        argv += ["--only-binary", ":all:", "--find-links", str(wheels)]
        argv += ["--no-index"] if step["offline"] else []
        # A damaged part may have been linked from the cache, which is then damaged too.
        argv += ["--no-cache"] if step["repair"] else []
        try:
            run([*argv, str(listed)], environment)
        except Fault as fault:
            if not step["offline"] and re.search(_NO_NETWORK, fault.report["cause"], re.IGNORECASE):
                raise Fault("offline", "the host cannot reach the package index", fault.report["cause"]) from None
            raise
        finally:
            listed.unlink()
        _refuse_overwritten(place)
        # Some packages ship templates and tests that no Python parses; what cannot be compiled is not imported.
        subprocess.run([f"{place}/bin/python", *_compileall(site, step, place), f"{place}/lib"], capture_output=True)
    shutil.rmtree(wheels)


def release(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Write the release: its manifest, its files (the unit above all), and links to its parts."""
    manifest = step["release"]
    place = site.releases / manifest["id"]
    place.mkdir(parents=True, exist_ok=True)
    for kind, name in manifest["parts"].items():
        link(place / kind, f"../../{'../' * kind.count('/')}parts/{name}")
    for name, target in manifest["links"].items():
        link(place / name, target)
    for name in manifest.get("folders", ()):  # what the unit mounts onto, which systemd would make as root
        as_service(site, os.makedirs, name, 0o777, True)
    for name, text in manifest["files"].items():
        write(place / name, text)
    write(place / "release.json", json.dumps(manifest, indent=1))


def preflight(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Import what the release must be able to import, while the old one still serves."""
    manifest = site.manifest(step["release"])
    code = "".join(f"import {name}; " for name in manifest["gate"]["imports"]) or "import torch"
    run([manifest["argv"][0], "-I", "-c", code], {**manifest["environment"], "CUDA_VISIBLE_DEVICES": ""})


def cut_over(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Take the old release out of service and the new one in; take it back when it is not healthy."""
    manager = manager_of(site)
    target = site.manifest(step["to"])
    record = read(site.cut)
    if not record:
        if missing := site.unmounted():
            what = f"{' and '.join(missing)} went away since the plan was made"
            raise Fault("step", what, "", "mount it there, then run the same command again")
        previous = site.release()
        if previous:
            drain(site, step["drain"], step["force"], note)
        record = {"previous": previous, "was_active": manager.status()["active"], "reverting": {}, "log": []}
        write(site.cut, json.dumps(record))
    if not record["reverting"]:
        try:
            if site.release() != step["to"] or step["restart"]:
                manager.stop()
                _snapshot(site)
                link(site.current, f"releases/{step['to']}")
            manager.install()
            manager.start()
            gate(site, manager, target, note)
            _say_changed_types(site, record["previous"], step["to"], note)
        except Exception as error:  # whatever it is, what ran before must run again
            report = error.report if isinstance(error, Fault) else Fault("gate", repr(error)).report
            record["reverting"] = report
            write(site.cut, json.dumps(record))
            with suppress(Fault, OSError):
                record["log"] = manager.log(25)
    if record["reverting"]:
        try:
            _revert(site, manager, record, note)
        except (Fault, OSError) as error:
            if isinstance(error, Fault) and error.report["kind"] == "gate" and "log" in error.report:
                raise
            why = f"{record['reverting']['what']} ({record['reverting']['cause']})"
            what = f"release {step['to']} is not healthy, and going back failed: {error}"
            raise Fault("step", what, why, "inv facts shows how it is; inv deploy tries again") from error


def _snapshot(site: Site) -> None:
    """Keep ComfyUI's database as it is while nobody writes it: a newer version migrates it and an older one stops."""
    fresh = site.snapshot.with_name(".snapshot")
    for folder in (fresh, site.snapshot):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir()
    os.chown(fresh, *site.owner())
    as_service(site, _copy_database, site.database.parent, fresh)
    os.sync()
    fresh.rename(site.snapshot)


def _copy_database(source: Path, place: Path) -> None:
    """Replace the database in `place` by the one in `source`."""
    for path in place.glob("comfyui.db*"):
        path.unlink()
    for path in source.glob("comfyui.db*"):
        shutil.copy2(path, place / path.name)


def _revert(site: Site, manager: Manager, record: Json, note: Callable[[str], None]) -> None:
    """Bring back what ran before; always raises the Fault that made it necessary."""
    previous = record["previous"]
    note(f"not healthy, going back to {previous or 'no release'}")
    manager.stop()
    if site.snapshot.exists():
        as_service(site, _copy_database, site.snapshot, site.database.parent)
    report = dict(record["reverting"])
    if previous:
        link(site.current, f"releases/{previous}")
        manager.install()
        if record["was_active"]:
            manager.start()
            _first_answer(site, manager, site.manifest(previous)["gate"]["seconds"])
        report["cause"] += f"\nrelease {previous} is back" + (" and answers" if record["was_active"] else "")
    else:
        manager.uninstall()
        site.current.unlink(missing_ok=True)
        report["cause"] += "\nthere was no release before, so none runs now"
    fault = Fault("gate", f"release {read(site.pending)['release']} is not healthy: {report['what']}", report["cause"])
    fault.report["hint"] = report["hint"] or "read the log above; inv deploy tries again"
    fault.report["log"] = record["log"]
    raise fault


def serve(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Run what is current: the unit in place, started at boot, started now and healthy."""
    manager = manager_of(site)
    manager.install()
    manager.start()
    current = site.release()
    gate(site, manager, site.manifest(current), note)


def prune(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Delete releases that are not kept, then what only they needed, blobs that are used up, and old journals."""
    current = site.release()
    for path in site.releases.glob("*"):
        if path.name not in (*step["keep"], current):
            shutil.rmtree(path)
    named = {part for path in site.releases.glob("*/release.json") for part in read(path)["parts"].values()}
    for path in site.parts.glob("*"):
        if path.name not in named:
            remove(path)
            if path.name.startswith("env-"):  # its packages lie in uv's cache too, several GB that nothing else needs
                shutil.rmtree(site.state / "cache", ignore_errors=True)
    shutil.rmtree(site.incoming)
    site.incoming.mkdir()
    journals = {line["run"] for line in history(site)[-JOURNALS:]} | {read(site.pending).get("run")}
    for path in (site.state / "runs").glob("*.jsonl"):
        if path.stem not in journals:
            path.unlink()


JOURNALS = 50
"""So many of the last runs keep their journal; a line of every run stays in the history."""


STEPS: dict[str, Callable[[Site, Json, Callable[[str], None]], None]] = {
    "account": account,
    "linger": linger,
    "members": members,
    "rights": rights,
    "mount": mount,
    "folders": folders,
    "tool": tool,
    "app": app,
    "env": env,
    "node": node,
    "release": release,
    "preflight": preflight,
    "cut-over": cut_over,
    "serve": serve,
    "prune": prune,
    "retire": retire,
    "adopt": adopt,
    "withdraw": withdraw,
    "unadopt": unadopt,
}


# --- runs ----------------------------------------------------------------------------------------------------------


def now() -> str:
    """The time, UTC, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Journal:
    """What happened in a run, on disk line by line before the next thing is done."""

    def __init__(self, site: Site, run_id: str) -> None:
        self.path = site.state / "runs" / f"{run_id}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def events(self) -> list[Json]:
        """All lines so far; one that a power cut tore is left out."""
        found: list[Json] = []
        with suppress(FileNotFoundError):
            for line in self.path.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def add(self, event: str, **values: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write("\n" * self._torn() + json.dumps({"at": now(), "event": event, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _torn(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:
            return False


class Adopted(Journal):
    """What adopting changes, each line on disk before that is done: undoing reads it backwards."""

    def __init__(self, site: Site) -> None:
        self.path = site.state / "adopted.jsonl"


def submit(site: Site, plan: Json) -> Json:
    """Take a plan over and start applying it; raises Fault when another is under way or the host has changed."""
    for folder in (site.prefix, site.state):
        folder.mkdir(parents=True, exist_ok=True)
    with flock(site.state / "submit.lock", wait=True):  # moments: whoever is first leaves its plan
        if other := busy(site):
            if not other["alive"]:
                manager_of(site).go()  # whoever applied it was killed, and nobody started it again
            raise Fault(
                "busy",
                f"a {other['action']} is under way on this host: {other['who']}, since {other['since']}",
                "",
                "watch it with inv attach, then run the same command again",
            )
        if site.release() != plan["base"]:
            raise Fault("busy", "the host was changed since the plan was made", "", "run the same command again")
        write(site.state / "site.json", json.dumps(site.json))
        write(site.state / "agent.py", Path(__file__).read_text())
        Journal(site, plan["run"]).add("begin", who=plan["who"], action=plan["action"], release=plan["release"])
        write(site.pending, json.dumps({**plan, "since": now()}))
        manager_of(site).go()
    return {"run": plan["run"]}


def apply(site: Site) -> None:
    """Apply the pending plan from where it stands. Ends with a line in the history, however it ends."""
    with flock(site.lock):
        plan = read(site.pending)
        if not plan:
            manager_of(site).settle()
            return
        journal = Journal(site, plan["run"])
        done = {event["step"] for event in journal.events() if event["event"] == "done"}
        fault: Json = {}
        for number, step in enumerate(plan["steps"]):
            if number in done:
                continue
            journal.add("step", step=number, title=step["title"])
            try:
                STEPS[step["kind"]](site, step, lambda text: journal.add("note", text=text))
            except Fault as error:
                fault = error.report
            except OSError as error:
                fault = _os_fault(error, step)
            except Exception as error:  # a fault of Hearth's own: doing it again would not help
                fault = Fault("step", f"could not {step['title']}", repr(error), "this is a fault of Hearth's").report
            if fault:
                break
            journal.add("done", step=number)
        result = {"gate": "reverted"}.get(fault.get("kind", ""), "failed") if fault else "done"
        asked = {key: plan[key] for key in ("run", "who", "action", "release", "base")}
        line = {"at": now(), "result": result, **asked, "error": fault.get("what", "")}
        with suppress(OSError), site.history.open("a") as file:  # a full disk must not keep the run from ending
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            journal.add("end", result=result, fault=fault)
        shutil.rmtree(site.snapshot, ignore_errors=True)
        site.cut.unlink(missing_ok=True)
        site.pending.unlink()


def _os_fault(error: OSError, step: Json) -> Json:
    full = error.errno in (28, 122)  # ENOSPC, EDQUOT
    hint = FULL if full else "run the same command again"
    return Fault("disk" if full else "step", f"could not {step['title']}", str(error), hint).report


FULL = "free some space or inodes, then run the same command again"


def follow(site: Site, run_id: str) -> Iterator[Json]:
    """Yield the events of a run, as they come, up to its end."""
    journal = Journal(site, run_id)
    seen, quiet, gone = 0, 0.0, False
    while True:
        events = journal.events()
        yield from events[seen:]
        if any(event["event"] == "end" for event in events):
            return
        if gone:
            raise Fault("step", "the run ended without a record", "the disk may be full", "inv facts shows it")
        quiet = quiet + 0.1 if len(events) == seen else 0.0
        seen = len(events)
        if quiet > 10:
            gone = read(site.pending).get("run") != run_id  # its last line may have come this very moment
            if not gone and free(site.lock):
                manager_of(site).go()
            yield {"event": "alive"}  # shows that the connection still is
            quiet = 0.0
        time.sleep(0.1)


def receive(site: Site, digest: str, size: int, offset: int) -> Json:
    """Write standard input to a blob from `offset` on, until it is whole; answers how much is there.

    Two clients that send the same blob do so one after the other; the second finds it there.
    """
    site.incoming.mkdir(parents=True, exist_ok=True)
    path = site.incoming / digest
    part = site.incoming / f"{digest}.part"
    if path.exists():
        return {"size": size}
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return {"size": size}
        file.truncate(offset)  # what another client wrote meanwhile comes again
        while block := sys.stdin.buffer.read(1 << 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        there = part.stat().st_size
        if there >= size:
            if sha256(part) != digest:
                part.unlink()
                raise Fault("step", "what was sent is damaged", "", "run the same command again")
            part.rename(path)
    return {"size": there}


def history(site: Site) -> list[Json]:
    """How every run on this host ended, oldest first."""
    try:
        return [json.loads(line) for line in site.history.read_text().splitlines()]
    except OSError:
        return []


def say(value: object) -> None:
    """One line of JSON to whoever asked."""
    print(json.dumps(value), flush=True)


def main(argv: list[str]) -> int:
    """Do what the verb says; 0, or 3 after a Fault, which is then the last line."""
    verb = argv[0]
    try:
        if verb in ("apply", "supervise"):  # started by a unit or detached: the site is a file
            site = Site(read(Path(argv[1])))
            (apply if verb == "apply" else supervise)(site)
            return 0
        request = json.loads(sys.stdin.buffer.readline())
        site = Site(request["site"])
        if verb == "facts":
            say(facts(site, request))
        elif verb == "contents":
            say({name: contents(site.parts / name) for name in request["parts"]})
        elif verb == "receive":
            say(receive(site, request["sha256"], request["size"], request["offset"]))
        elif verb == "submit":
            say(submit(site, request["plan"]))
        elif verb == "follow":
            for event in follow(site, request["run"]):
                say(event)
        elif verb == "history":
            say(history(site))
        elif verb == "survey":
            say(survey(site, request["path"]))
        else:
            raise Fault("step", f"the agent has no verb {verb!r}")
    except Fault as fault:
        say({"fault": fault.report})
        return 3
    except BrokenPipeError:
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
