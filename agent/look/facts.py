"""What the host is now."""

from __future__ import annotations

import errno
import grp
import itertools
import json
import os
import platform
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from agent.files import DATABASE, Fault, Json, inside, mounts, read, read_some, read_text, regular, write
from agent.journal import DEPLOYS, Adopted, Settings, busy, history, last
from agent.layout import DATA, SHARED, SHARING, UNUSED, Site, shared
from agent.look.gpu import process
from agent.parts import as_service, faults_of, forked
from agent.schema.facts import Ended, Facts, Gpu, Holder, MountState, Paused, Place, Report, Service
from agent.schema.live import GpuState
from agent.serve.confine import abi as landlock
from agent.serve.secret import secrets
from agent.serve.services import UNITS, Supervised, Systemd, login, manager_of, rooted, user_systemd

T = TypeVar("T")

SIGNERS = Path("/etc/hearth/allowed_signers")
"""Who may sign bundles for this host (ssh-keygen(1), ALLOWED SIGNERS). Without it, a bundle may be unsigned."""


def facts(site: Site, ask: Json, devices: Sequence[GpuState], verified: float = 0) -> Facts:
    """What this host is now. `ask` names the Python versions, mounts, folders and Debian packages to look for.

    `devices` are its GPUs (`ours`). Parts that were found whole within the last `verified` seconds are not looked at
    again. Waits for a folder that does
    not answer: see `answering` first.
    """
    current, fault = "", Report()
    try:
        current = site.release()
    except Fault as error:
        fault = cast("Report", error.report)
    manifests = [read(path, lenient=True) for path in sorted(site.releases.glob("*/release.json"))]
    parts = _parts(site, verified)
    place = next(path for path in [site.prefix, *site.prefix.parents] if path.exists())
    disk = os.statvfs(place)
    os_release = _os_release()
    here = site.scope == "user" or Path("/run/systemd/system").is_dir()
    manager = manager_of(site)
    runs = history(site)
    gpus, driver = _nvidia(devices)
    return Facts(
        hostname=socket.gethostname(),
        os=f"{os_release.get('ID', 'linux')} {os_release.get('VERSION_ID', '')}".strip(),
        machine=platform.machine(),
        kernel=platform.release(),
        glibc=(os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2],
        pythons=_pythons(site, ask["pythons"]),
        gpus=gpus,
        driver=driver,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cores=os.cpu_count() or 1,
        login=login(),
        root=os.geteuid() == 0,
        prefix=str(site.prefix),
        writable=os.access(place, os.W_OK),
        disk_free=disk.f_bavail * disk.f_frsize,
        # Some file systems make inodes as they go, and say 0 of 0.
        inodes_free=disk.f_favail if disk.f_files else None,
        mounts={path: _mount(site, path, wanted) for path, wanted in ask["mounts"].items()},
        places={path: _place(site, Path(path), use) for path, use in ask["places"].items()} | _traps(site),
        data_free={str(path): _free(path) for path in (site.data, *map(Path, site.elsewhere.values()))},
        packages=_packages(ask["packages"]),
        port_holder=port_holder(site.port),
        metrics_holder=port_holder(ask["metrics_port"]) if ask["metrics_port"] else {},
        foreign_unit=manager.foreign() if here and isinstance(manager, Systemd) else "",
        adopted=Adopted(site).path.exists(),
        settings=tuple(sorted(Settings(site).in_force())),
        paused=cast("Paused", read(site.paused)),
        placed=tuple(map(str, Systemd(site).placed())),
        drop_ins=tuple(map(str, sorted(Systemd(site).units.glob(f"{site.service}*.service.d")))),
        lingered=site.lingered.exists(),
        # one that cannot be read lists nobody
        signers=read_text(SIGNERS) if os.path.lexists(SIGNERS) else None,
        place=_prefix(site),
        user=_user_exists(site.user),
        exporter_user=_user_exists(site.exporter),
        user_fault=_foreign_account(site),
        members=_members(site),
        shared=_shares(site),
        unused=tuple(_unused(site)),
        landlock=landlock(),
        secrets=secrets(site),
        rights=_rights(site),
        manager=manager.name if here else "none",
        lingers=manager.name != "process" or not user_systemd() or Supervised(site).enabled.exists(),
        current=current,
        current_fault=fault,
        releases=tuple(each for each in manifests if each),
        altered=tuple(each["id"] for each in manifests if each and altered(site, each)),
        proven=tuple(_proven(site, runs)),
        failed_nodes=read(site.releases / current / "proven", lenient=True).get("failed_nodes", {}),
        # ComfyUI deletes that one when it ends, and makes it when it starts
        data=all(os.path.lexists(site.data / name) for name in DATA if name != "temp"),
        service=manager.status() if here and site.state.exists() else _NO_SERVICE,
        incoming={path.name: path.stat().st_size for path in site.incoming.glob("*") if path.is_file()},
        tools=tuple(sorted(path.name for path in (site.state / "tools").glob("[!.]*"))),
        busy=busy(site),
        last=last(runs),
        deployed=last(runs, *DEPLOYS),
        parts=parts(),
    )


STALE, PATIENT = 2.0, 15.0
"""Seconds after which a folder that does not answer counts as dead: for a glance, and before a change. A local disk
takes milliseconds; one that spins up, or is mounted when it is looked at, up to ten seconds."""


def answering(site: Site, ask: Json, seconds: float) -> None:
    """Raise Fault when a folder does not answer in time: a mount without its server makes who looks wait for ever."""
    inside = (each["point"] for each in mounts() if each["point"].startswith(f"{site.prefix}/"))
    places = sorted({*ask["mounts"], *ask["places"], *inside})
    children = {place: subprocess.Popen(["stat", "-f", place], stdout=-3, stderr=-3) for place in places}
    end = time.monotonic() + seconds
    dead: list[str] = []
    for place, child in children.items():
        try:
            child.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()  # it may not die while it waits for the server; nobody waits for it
            dead.append(place)
    if dead:
        remedy = "on the host: umount --lazy it, or wait for its server"
        raise Fault("storage", f"{', '.join(dead)} does not answer", "its server or its disk is gone, or slow", remedy)


def _parts(site: Site, verified: float) -> Callable[[], dict[str, str]]:
    """Begin to verify the parts; what is returned waits for what is wrong with each, and notes which are whole."""
    note = site.state / "verified.json"
    known = {name: at for name, at in read(note, lenient=True).items() if 0 <= time.time() - at < verified}
    begun = time.time()
    names = [path.name for path in sorted(site.parts.glob("[!.]*"))]
    asked = [site.parts / name for name in names if name not in known]
    faults = forked(faults_of, asked) if asked else dict

    def answer() -> dict[str, str]:
        found: dict[str, str] = dict.fromkeys(names, "") | faults()
        if asked and site.state.is_dir():
            with suppress(OSError):  # it only saves time
                whole = {name: known.get(name, begun) for name, fault in found.items() if not fault}
                write(note, json.dumps(whole))
        return found

    return answer


def _proven(site: Site, runs: list[Ended]) -> list[str]:
    """The releases that passed the health gate, by when they were last put in service, the latest first.

    The history is appended to, so its order is right whatever the clock was. What it does not name comes last.
    """
    served = {run["release"]: number for number, run in enumerate(runs) if run["result"] == "done"}
    names = sorted(path.parent.name for path in site.releases.glob("*/proven"))
    return sorted(names, key=lambda name: -served.get(name, -1))


def altered(site: Site, manifest: Json) -> bool:
    """Whether a release's files or links are not those of its manifest any more; an older Hearth's may name none."""
    place = site.releases / manifest["id"]
    try:
        links = {kind: (place / kind).readlink().name for kind in manifest["parts"]}
        links |= {name: str((place / name).readlink()) for name in manifest.get("links", {})}
        nodes = {name.partition("/")[2] for name in (*links, *manifest.get("empty", ())) if name.startswith("custom_")}
        if "empty" in manifest and {*os.listdir(place / "custom_nodes")} != nodes - {""}:  # noqa: PTH208
            return True  # ComfyUI imports all that is there
        files = {name: (place / name).read_text() for name in manifest.get("files", {})}
    except OSError:
        return True
    return (links, files) != (manifest["parts"] | manifest.get("links", {}), manifest.get("files", {}))


OWN = ("current", "parts", "releases", "secrets", "state")
"""All that Hearth makes in its prefix, but the data."""


def _prefix(site: Site) -> Place:
    """What the prefix is and what lies in it: as much as must be known before anything there is deleted."""
    prefix, real = site.prefix, os.path.realpath(site.prefix)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(path.name for path in site.prefix.iterdir())
    # Of a killed run: what `link` and `folders` make before they rename it.
    own = [name for name in names if name in OWN or re.fullmatch(r"\.(current|data)\.\w+", name)]
    points = sorted({each["point"] for each in mounts() if each["point"].startswith(f"{real}/")})
    data = (site.data, *(site.data / name for name in DATA))
    deployed = read(site.state / "site.json", lenient=True)
    traces = [*site.state.glob("runs/*.jsonl"), *site.releases.glob("*/release.json")]
    return Place(
        real=real,
        link=prefix.is_symlink(),
        mount=os.path.ismount(prefix),
        homes=tuple(
            sorted(entry.pw_name for entry in pwd.getpwall() if _holds(Path(real), Path(entry.pw_dir), site.data))
        ),
        own=tuple(own),
        others=tuple(name for name in names if name not in (*own, "data")),
        data=os.path.lexists(site.data) and _deletable(f"{real}/data", points),
        crossings=tuple(name for name in own if name != "current" and (prefix / name).is_symlink()),
        mounts=tuple(points),
        links={str(path): target for path in data if (target := _target(path))},
        service=str(deployed.get("service", "")),
        scope=str(deployed.get("scope", "")),
        user=_owner(site, str(deployed.get("user", ""))),
        elsewhere=_elsewhere(site),
        ours=bool(deployed or traces),
    )


def _target(path: Path) -> str:
    with suppress(OSError):
        return str(path.readlink())
    return ""


def _owner(site: Site, user: str) -> str:
    """The user, when the data is that one's."""
    with suppress(OSError, KeyError):
        return user if user and site.data.stat().st_uid == pwd.getpwnam(user).pw_uid else ""
    return ""


def _elsewhere(site: Site) -> str:
    """Another prefix that is there, and that the service's unit leads to; empty when there is none."""
    unit = Systemd(site).units / f"{site.service}.service"
    with suppress(OSError):
        prefix = unit.readlink().parent.parent  # PREFIX/current/SERVICE.service
        if (prefix / "state/site.json").exists() and os.path.realpath(prefix) != os.path.realpath(site.prefix):
            return str(prefix)
    return ""


def _deletable(path: str, points: list[str]) -> bool:
    """Whether more is at a path than mount points and the way to them."""
    pending = [path]
    while pending:
        path = pending.pop()
        if not any(each == path or each.startswith(f"{path}/") for each in points):
            return True
        if path not in points:
            with suppress(OSError), os.scandir(path) as entries:  # the service may put something else there
                pending += [entry.path for entry in itertools.islice(entries, len(points) + 1)]
    return False


def _holds(folder: Path, home: Path, data: Path) -> bool:
    """Whether a folder is somebody's home, or has it in it; the service's own is the data."""
    same = home.name == folder.name and os.path.realpath(home) == str(folder)  # not asked of each: some are a server's
    return home != data and (same or folder in (home, *home.parents))


_NO_SERVICE = Service(active=False, state="absent", enabled=False, linked=False, restarts=0, since="", pid=0)


def _os_release() -> dict[str, str]:
    with suppress(OSError):
        return platform.freedesktop_os_release()
    return {}


def _user_exists(name: str) -> bool:
    with suppress(KeyError):
        return not name or bool(pwd.getpwnam(name))
    return False


def _foreign_account(site: Site) -> str:
    """Why the service must not run as a user that is there; empty when it may.

    Whatever else runs as that user is a way out of the unit's sandbox, by /proc/PID/root.
    """
    with suppress(KeyError):
        entry = pwd.getpwnam(site.user) if site.user else None
        if entry and entry.pw_uid == 0:
            return "is root"
        if entry and entry.pw_dir != str(site.data) and Path(entry.pw_dir).exists():
            return f"has its home in {entry.pw_dir}: what else runs as it would be a way out of the sandbox"
    return ""


def _members(site: Site) -> tuple[str, ...] | None:
    """Who is in the members' group; None when that is not there, or people are in the service's own group."""
    groups = {each.gr_name: each.gr_mem for each in grp.getgrall()} if site.user else {"": []}
    return None if site.group not in groups or groups.get(site.user) else tuple(sorted(groups[site.group]))


def _shares(site: Site) -> bool:
    """Whether the data is the members' to change, and nobody else's to see unless it is public."""
    if not site.user or not _user_exists(site.user) or not site.data.exists():
        return True
    others = site.data.stat().st_mode & 0o7
    fits = others == (0o5 if site.public else 0)
    return fits and _looked(site, lambda: all(_shared(site, site.data / name) for name in SHARED), lambda _: False)


def _unused(site: Site) -> list[str]:
    """What lies where nodes are no longer loaded from, as far as a glance shows."""

    def look() -> list[str]:
        with suppress(FileNotFoundError), os.scandir(site.data / UNUSED) as entries:
            return [entry.name for entry in itertools.islice(entries, 20)]
        return []

    return sorted(_looked(site, look, lambda error: [str(error)]))


def _mount(site: Site, path: str, wanted: Json) -> MountState:
    """The state of a mount point."""
    mounted = os.path.ismount(path)
    source = next((each["what"] for each in reversed(mounts()) if each["point"] == path), "")
    unit = read_text(UNITS / site.mounts[path])
    fault, remedy = _unmountable(path, wanted["what"], wanted["type"]) if wanted["what"] and not mounted else ("", "")
    return MountState(mounted, source, unit, fault, remedy)


def _unmountable(path: str, what: str, kind: str) -> tuple[str, str]:
    """Why a file system cannot be mounted at a path, with the remedy; empty when it can."""
    if what.startswith("/dev/mapper/") and not Path(what).exists():
        opening = f"on the host: cryptsetup open DEVICE {shlex.quote(Path(what).name)} (or vgchange -ay)"
        return "this encrypted or logical volume is not open", f"{opening}; it is mounted then"
    if what.startswith("/") and not Path(what).exists():
        return "the host has no such device", "connect it, or correct `what`"
    if kind.startswith(("nfs", "cifs")) and not shutil.which(f"mount.{kind}", path="/sbin:/usr/sbin"):
        package = "nfs-common" if kind.startswith("nfs") else "cifs-utils"
        return f"the host has no mount.{kind}", f"on the host: apt-get install {package}"
    if Path(path).is_dir() and any(os.scandir(path)):
        return "the folder contains files, which the mount would hide", f"move them away first: ls {shlex.quote(path)}"
    return "", ""


def _place(site: Site, path: Path, use: str) -> str:
    """What is wrong with a folder that is to be read, or written by the service; empty when nothing is."""
    if not path.exists():
        return "is not there"
    if not path.is_dir():
        return "is no folder"
    need = os.R_OK | os.X_OK | (os.W_OK if use == "write" else 0)
    inside = None
    if use == "bind":  # the unit mounts it where the service sees it, whatever the folders above it allow
        path, inside = Path(), os.open(path, os.O_PATH)
    try:
        may = not _user_exists(site.user) or as_service(site, _access, str(path), need, inside, seconds=10)
    except Fault as fault:
        return f"cannot be looked at as the service: {fault.report['what']}"
    return "" if may else f"cannot be {'written' if use == 'write' else 'read'} by the service"


def _traps(site: Site) -> dict[str, str]:
    """What lies in the place of ComfyUI's database and is no file: it would wait for a pipe's other end.

    Or in the place of its folder: a link of the service's own leads to what its unit hides from it.
    """
    folder = site.database.parent

    def look() -> dict[str, str]:
        try:
            with inside(folder) as here:
                names = [name for name in DATABASE if os.path.lexists(here / name) and not regular(here / name)]
                return {str(folder / name): "is no regular file" for name in names}
        except OSError as error:
            return {str(folder): f"is refused: {error.strerror}"} if error.errno == errno.ELOOP else {}

    return _looked(site, look, lambda fault: {str(folder): str(fault)})


def _looked(site: Site, look: Callable[[], T], otherwise: Callable[[Exception], T]) -> T:
    """What a look below the data shows, taken as the service and in time: links may lead anywhere, mounts be dead."""
    try:
        found: T = as_service(site, look, seconds=5) if _user_exists(site.user) else look()
        return found
    except KeyError:  # no such group yet
        return look()
    except (OSError, Fault) as error:
        return otherwise(error)


def _access(path: str, need: int, inside: int | None) -> bool:
    return os.access(path, need, dir_fd=inside, effective_ids=True)


def _free(path: Path) -> int:
    """The bytes that are left for files in a folder."""
    disk = os.statvfs(next(each for each in (path, *path.parents) if each.exists()))
    return disk.f_bavail * disk.f_frsize


def _shared(site: Site, folder: Path) -> bool:
    """Whether what one member of the group puts into a folder of the service's, every other may change."""
    try:
        status = folder.stat()
        owner, group = site.sharing()
        if status.st_uid != owner:
            return True  # another's is another's affair
        fits = status.st_gid == group and status.st_mode & stat.S_ISGID
        return bool(fits) and os.getxattr(folder, SHARING) == shared(status.st_mode, owner)
    except KeyError:  # no such group yet
        return False
    except OSError as error:  # a file system without such lists does without, a folder that is not there is no fault
        return error.errno in (errno.ENOTSUP, errno.ENOENT)


def _rights(site: Site) -> str | None:
    """What members may do by sudo, as our file says; None where there is no sudo."""
    if not site.user or not shutil.which("visudo", path="/usr/sbin:/sbin"):
        return None
    with suppress(OSError):
        return sudoers(site).read_text()
    return ""


def sudoers(site: Site) -> Path:
    """What members may do as root."""
    return Path(f"/etc/sudoers.d/hearth-{site.service}")


def _pythons(site: Site, wanted: list[str]) -> dict[str, str]:
    """Interpreters by minor version. A system service sees no home folder, so only the system's count for it."""
    places = "/usr/bin:/usr/local/bin" if site.scope == "system" else os.environ.get("PATH", "/usr/bin")
    code = "import sys; print(sys._base_executable, '%d.%d' % sys.version_info[:2])"
    found: dict[str, str] = {}
    for version in wanted:
        program = shutil.which(f"python{version}", path=places)
        if program is None or (site.scope == "system" and not rooted(Path(program))):  # root will run it
            continue
        if sys.prefix == sys.base_prefix and Path(program).resolve() == Path(sys.executable).resolve():
            found[version] = program  # the one that runs this: no need to start it
            continue
        done = subprocess.run([program, "-ISc", code], capture_output=True, text=True)
        answer = done.stdout.split()
        if len(answer) == 2 and answer[1] == version and (site.scope != "system" or rooted(Path(answer[0]))):
            found[version] = answer[0]
    return found


def _packages(wanted: list[str]) -> dict[str, bool]:
    """Which of these Debian packages are installed; empty where there is no dpkg to tell."""
    if not wanted or not shutil.which("dpkg-query"):
        return {}
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *wanted]
    shown = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()  # fails when it lacks one
    return {name: f"{name} installed" in shown for name in wanted}


def _nvidia(found: Sequence[GpuState]) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs to deploy to, and the driver's version.

    A GPU that does not report its compute capability (it fell off the bus) is left out.
    """
    if not found:
        return _nvidia_smi(), _driver()
    named = (
        Gpu(
            gpu.name or "NVIDIA GPU",
            gpu.capability,
            None if gpu.unified else gpu.memory_total,
            gpu.unified,
            gpu.processes,
        )
        for gpu in found
        if gpu.capability
    )
    return tuple(named), found[0].driver or _driver()


def _nvidia_smi() -> tuple[Gpu, ...]:
    """The GPUs as nvidia-smi lists them: it may find a driver whose library cannot be loaded here (Nix, containers)."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    found: list[Gpu] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, capability, memory = (cell.strip() for cell in line.split(","))
        unified = not memory.isdecimal()  # GB10 answers [N/A]
        total = None if unified else int(memory) << 20
        found.append(Gpu(name, capability, total, unified))
    return tuple(found)


def _driver() -> str:
    """The NVIDIA driver's version, as its kernel module tells it; empty without one."""
    with suppress(OSError):
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else ""
    return ""


HOLDER_SECONDS = 3.0
"""For finding who listens on a port: whoever has millions of descriptors must not keep anybody waiting."""


def port_holder(port: int) -> Holder:
    """Who listens on a port: pid, name and systemd's unit; empty when nobody does.

    Pid 0 is one that this user may not see, -1 one that was not found in time.
    """
    end = time.monotonic() + HOLDER_SECONDS
    sockets: dict[str, int] = {}
    late = False
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), Path(table).open() as lines:
            for line in itertools.islice(lines, 1, None):
                cells = line.split()
                late = time.monotonic() > end
                if cells[3] != "0A" or late:  # those that listen come first
                    break
                if int(cells[1].rpartition(":")[2], 16) == port:
                    sockets[f"socket:[{cells[9]}]"] = int(cells[7])
    if not sockets and not late:
        return {}
    places = {place: _uid(place) for place in Path("/proc").glob("[0-9]*")}
    # Those of the socket's own user first: the kernel tells it, and others cannot hide among theirs.
    for place in sorted(places, key=lambda place: places[place] not in sockets.values()):
        with suppress(OSError), os.scandir(place / "fd") as entries:
            for entry in entries:
                if late := time.monotonic() > end:
                    return {"pid": -1, "command": f"{_whose(sockets)}, not found in time", "unit": None}
                if os.readlink(entry.path) in sockets:  # noqa: PTH115  a Path for each takes longer
                    words = read_some(place / "cmdline", 4096).decode(errors="replace").split("\0")
                    command = " ".join(words[:3]).strip()[:200]
                    return {"pid": int(place.name), "command": command, "unit": process(int(place.name))["unit"]}
    return {"pid": -1 if late else 0, "command": _whose(sockets), "unit": None}


def _uid(process: Path) -> int:
    with suppress(OSError):
        return process.stat().st_uid
    return -1


def _whose(sockets: dict[str, int]) -> str:
    uid = min(sockets.values(), default=-1)
    with suppress(KeyError):
        return f"a process of {pwd.getpwuid(uid).pw_name}" if sockets else "a process of somebody's"
    return f"a process of user {uid}"
