"""Who keeps ComfyUI running: systemd, the system's or the login's, or where there is none a supervisor of ours."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from agent.files import (
    LINE,
    LOG_BYTES,
    Fault,
    Json,
    discard,
    flock,
    free,
    inherited,
    last_of,
    link,
    read,
    read_some,
    read_text,
    run,
    started,
    write,
)
from agent.journal import now
from agent.layout import Site
from agent.schema.facts import Process, Service
from agent.schema.live import GpuState

UNITS = Path("/etc/systemd/system")


def entries(folder: Path, unit: str) -> list[Path]:
    """A unit's file and its links in a folder of systemd's, also those that lead nowhere, which a glob leaves out."""
    places = [folder / unit, *(wants / unit for wants in folder.glob("*.wants"))]
    return [path for path in places if os.path.lexists(path)]


class Systemd:
    """The service as a unit of the system's or the user's systemd.

    The unit file is a link to `current/<service>.service`: what switches the release switches the unit with it. So
    are those of its companions, `<service>-*`: what waits for mounts, exports metrics or runs by a timer. One with an
    [Install] section is started at boot, and with the service.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = f"systemd-{site.scope}"
        self.unit = f"{site.service}.service"
        self.storage = f"{site.service}-storage.service"  # what waits for mounts, where there are any
        self.apply_unit = f"{site.service}-apply.service"
        system = site.scope == "system"
        self.ctl = ["systemctl"] if system else ["systemctl", "--user"]
        if not system:
            find_runtime()
        self.units = UNITS if system else Path.home() / ".config/systemd/user"
        self.target = "multi-user.target" if system else "default.target"

    def _wants(self, unit: str) -> Path:
        return self.units / f"{self.target}.wants" / unit

    def status(self) -> Service:
        """The state of the service."""
        values = self._shown(self.unit, "ActiveState,SubState,NRestarts,ActiveEnterTimestamp,MainPID")
        died = values.get("SubState") == "auto-restart"  # it is "activating", too
        active = values.get("ActiveState") in ("active", "activating", "reloading") and not died
        stored = os.path.lexists(self.units / self.storage)
        storage = self._shown(self.storage, "ActiveState").get("ActiveState") if stored else ""
        return Service(
            active=active,
            waits=not active and (died or storage in ("active", "activating")),
            state=f"{values.get('ActiveState')} ({values.get('SubState')})",
            enabled=self._wants(self.unit).is_symlink(),
            linked=self._linked(),
            restarts=int(values.get("NRestarts") or 0),
            since=values.get("ActiveEnterTimestamp", ""),
            pid=int(values.get("MainPID") or 0),
        )

    def _shown(self, unit: str, fields: str) -> dict[str, str]:
        lines = run([*self.ctl, "show", unit, f"--property={fields}"]).splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def _links(self) -> dict[Path, str]:
        """The links in systemd's folder that the current release asks for."""
        found = {self.units / self.unit: str(self.site.current / self.unit)}
        for name in self._companions():
            found[self.units / name] = str(self.site.current / name)
            for target in re.findall(r"^WantedBy=(.+)$", read_text(self.site.current / name), re.MULTILINE):
                found[self.units / f"{target}.wants" / name] = f"../{name}"
        return found

    def _companions(self) -> list[str]:
        listed = self.site.current.glob(f"{self.site.service}-*")
        return sorted(path.name for path in listed if path.suffix in (".service", ".timer", ".path"))

    def _linked_companions(self) -> list[str]:
        """The companions that systemd knows, also those of an earlier release."""
        listed = (path for path in self.units.glob(f"{self.site.service}-*") if path.is_symlink())
        return [path.name for path in listed if path.readlink().parent == self.site.current]

    def placed(self) -> list[Path]:
        """All that Hearth put into systemd's folder for this service, and that is there."""
        names = [self.unit, self.apply_unit, *self._linked_companions()]
        return [] if self.foreign() else [path for name in names for path in entries(self.units, name)]

    def _stale(self) -> list[str]:
        """Companions that the current release does not have."""
        return [name for name in self._linked_companions() if not (self.site.current / name).exists()]

    def _linked(self) -> bool:
        links = self._links().items()
        return not self._stale() and all(place.is_symlink() and str(place.readlink()) == to for place, to in links)

    def foreign(self) -> str:
        """The unit's file when somebody else wrote it; one of Hearth's that was edited, or none at all, is drift."""
        place = self.units / self.unit
        text = "" if self._linked() else read_text(place)
        return str(place) if text and WRITTEN not in text else ""

    def install(self) -> None:
        """Make systemd see the current release's unit, and start it at boot."""
        _note(self)
        link(self._wants(self.unit), f"../{self.unit}")
        for place, to in self._links().items():
            link(place, to)
        if stale := self._stale():
            run([*self.ctl, "stop", *stale])
        for path in [path for name in stale for path in entries(self.units, name)]:
            discard(path)
        run([*self.ctl, "daemon-reload"])

    def uninstall(self) -> None:
        """Forget the unit and its companions, which end: there is no release any more."""
        if companions := self._linked_companions():
            self._stop(companions)
        for name in (self.unit, *companions):
            for place in entries(self.units, name):
                discard(place)
        run([*self.ctl, "daemon-reload"])
        subprocess.run([*self.ctl, "reset-failed", self.unit, *companions], capture_output=True)
        discard(choice(self.site))

    def enable(self) -> None:
        """Start the service at boot."""
        link(self._wants(self.unit), f"../{self.unit}")
        run([*self.ctl, "daemon-reload"])

    def disable(self) -> None:
        """Do not start it at boot."""
        discard(self._wants(self.unit))
        run([*self.ctl, "daemon-reload"])

    def start(self, *, wait: bool = True) -> None:
        """Start the service, and its companions as the current release has them; `wait` until they have started."""
        subprocess.run([*self.ctl, "reset-failed", self.unit], capture_output=True)
        how = [] if wait else ["--no-block"]
        run([*self.ctl, "start", *how, self.unit])
        if wanted := sorted({place.name for place in self._links() if place.parent.name.endswith(".wants")}):
            run([*self.ctl, "restart", *how, *wanted])

    def restart(self) -> None:
        """Restart the service alone, however often it was started before."""
        subprocess.run([*self.ctl, "reset-failed", self.unit], capture_output=True)
        run([*self.ctl, "restart", self.unit])

    def stop(self) -> None:
        """Stop the service and wait until it has."""
        self._stop([name for name in (self.storage, self.unit) if os.path.lexists(self.units / name)])

    def _stop(self, units: list[str]) -> None:
        done = subprocess.run([*self.ctl, "stop", *units], capture_output=True, text=True) if units else None
        if done and done.returncode not in (0, 5):  # 5: none of that name is loaded, so none runs (systemctl(1))
            raise Fault("step", f"systemctl stop {' '.join(units)} failed", done.stderr.strip())

    def log(self, lines: int) -> list[str]:
        """The last lines of the service's present or last run."""
        who = ["--user-unit"] if self.site.scope == "user" else ["--unit"]
        shown = run([*self.ctl, "show", self.unit, "--property=InvocationID", "--value"]).strip()
        match = [f"_SYSTEMD_INVOCATION_ID={shown}"] if shown else [*who, self.unit]
        return last_of(["journalctl", "--no-pager", "--reverse", "--output=cat", f"--lines={lines}", *match], lines)

    def timed_log(self, lines: int) -> list[tuple[float | None, str]]:
        """The last lines of a day, also of runs that have ended, each with its time in seconds since 1970."""
        who = "--user-unit" if self.site.scope == "user" else "--unit"
        words = ["journalctl", "--no-pager", "--quiet", "--reverse", "--output=short-unix", "--since=-1d"]
        shown = last_of([*words, f"--lines={lines}", who, self.unit], lines)
        found = (re.match(r"(\d+\.\d+) \S+ [^\s:]+: ?(.*)", line) for line in shown)
        return [(float(each[1]), each[2]) for each in found if each]

    def settle(self) -> None:
        """Start the enabled service where systemd did not find its unit at boot: the prefix was not mounted yet."""
        if self._wants(self.unit).is_symlink() and not self.status().active:
            for words in (["daemon-reload"], ["start", "--no-block", self.unit]):
                subprocess.run([*self.ctl, *words], capture_output=True)

    def go(self) -> None:
        """Start the unit that applies what is pending; it is restarted when killed, and started at boot."""
        limits = _APPLY_LIMITS if self.site.scope == "system" else ""
        text = _APPLY_UNIT.format(
            service=self.site.service,
            python=_python(self.site),
            state=self.site.state,
            target=self.target,
            limits=limits,
        )
        place = self.units / self.apply_unit
        if not place.exists() or place.read_text() != text:
            write(place, text)
            link(self._wants(self.apply_unit), f"../{self.apply_unit}")
            run([*self.ctl, "daemon-reload"])
        subprocess.run([*self.ctl, "reset-failed", self.apply_unit], capture_output=True)
        run([*self.ctl, "start", "--no-block", self.apply_unit])

    def last_go(self) -> list[str]:
        """What became of that unit, and the last lines that it wrote."""
        fields = "ActiveState,SubState,Result,ExecMainCode,ExecMainStatus,NRestarts,Job"
        shown = run([*self.ctl, "show", self.apply_unit, f"--property={fields}"]).split()
        who = "--user-unit" if self.site.scope == "user" else "--unit"
        words = ["--no-pager", "--quiet", "--output=cat", "--lines=12", who, self.apply_unit]
        return [" ".join(shown), *run(["journalctl", *words]).splitlines()]

    def forget(self) -> None:
        """Take that unit away. What it runs goes on to its end, and is not started again when it is killed."""
        if placed := entries(self.units, self.apply_unit):
            for path in placed:
                discard(path)
            run([*self.ctl, "daemon-reload"])


def _python(site: Site) -> str:
    """The Python for a unit that is started at each boot; raises Fault where that is root's, and no Python is.

    Who deploys as root here may do so with one of their login's (uv, pyenv), which that login can replace.
    """
    python = str(getattr(sys, "_base_executable", ""))  # a checkout's environment may be moved or deleted
    python = python if Path(python).is_file() else sys.executable
    if site.scope != "system" or rooted(Path(python)):
        return python
    for each in ("/usr/bin/python3", "/usr/local/bin/python3"):
        with suppress(Fault):
            if rooted(Path(each)) and run([each, "-ISc", "import sys; print(sys.version_info >= (3, 10))"]) == "True\n":
                return each
    what = f"{python} would run as root at each boot, and not root alone may change it"
    raise Fault("step", what, "", "install the system's python3, 3.10 or newer, then run the same command again")


def rooted(path: Path, links: int = 40) -> bool:
    """Whether root alone may change what lies at a path: the file, the folders above it, and links on the way to it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    shared = status.st_mode & (0o022 if status.st_gid else 0o002)
    if status.st_uid or not links or (path != path.parent and not rooted(path.parent, links)):
        return False
    return rooted(path.parent / path.readlink(), links - 1) if stat.S_ISLNK(status.st_mode) else not shared


# What it must be able to do: write anywhere (the prefix, units, places of mounts, sudoers, settings of the kernel),
# change owners, act as the service's user, create it, reach the index, read what other processes are (adopt). No file
# system is hidden or made read-only: in a mount namespace it would not see the mounts that it waits for. Memory has no
# limit: what uv and a kernel's packages need grows with them, and a deploy that is killed for it would begin again.
_APPLY_LIMITS = """\
TasksMax=4096
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID
CapabilityBoundingSet=CAP_SETUID CAP_SYS_PTRACE CAP_AUDIT_WRITE
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
KeyringMode=private
UMask=0022
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""


# Not ordered against the service, which it stops and starts itself. OOMPolicy: a compiler or uv that is killed for
# memory must not take the apply with it.
_APPLY_UNIT = """\
[Unit]
Description=Hearth: goes on with a change of {service} that is under way, else sees that it was started
RequiresMountsFor={state}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={python} -I -S {state}/agent.pyz apply {state}/site.json
Restart=on-failure
# A damaged record, or a disk that takes no writes: trying each second would not help. The next boot or command goes on.
RestartPreventExitStatus=3 4
RestartSec=1
OOMPolicy=continue
KillMode=control-group
# Now and then systemd (252, in a container under load) misses that a killed process was the last of its group, and
# starts the next one only after this time. Nothing here needs long to end.
TimeoutStopSec=5
{limits}
[Install]
WantedBy={target}
"""


LONG = 10_000_000
"""Bytes from which on a log is long; at the next start a new one is begun."""


class Supervised:
    """The service under a supervisor of our own: no systemd, no root. Survives the shell that started it."""

    name = "process"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lock = site.state / "supervisor.lock"
        self.record = site.state / "supervisor.json"
        self.output = site.state / "comfyui.log"
        self.times = site.state / "comfyui.times"
        self.enabled = site.state / "enabled"
        self._marked = (0.0, -1)

    def status(self) -> Service:
        """The state of the service."""
        running = not free(self.lock)
        record = read(self.record) if running else {}
        return Service(
            active=running,
            waits=False,  # the supervisor waits for mounts, and it is active
            state="active (supervised)" if running else "inactive (no supervisor)",
            enabled=self.enabled.exists(),
            linked=True,
            restarts=record.get("restarts", 0),
            since=record.get("since", ""),
            pid=_recorded(record, "child"),
        )

    def install(self) -> None:
        """Note that the service shall run."""
        _note(self)
        write(self.enabled, "")

    def uninstall(self) -> None:
        """Forget it."""
        discard(self.enabled)
        discard(choice(self.site))

    def enable(self) -> None:
        """Nothing starts it at boot."""

    def disable(self) -> None:
        """Nothing starts it at boot."""

    def start(self, *, wait: bool = True) -> None:
        """Start the service; raises Fault when its supervisor does not come up. That one waits for mounts itself."""
        if not free(self.lock):
            return
        before = len(read_some(agent_log(self.site)))
        child = detach([sys.executable, "-I", str(self.site.state / "agent.pyz"), "supervise"], self.site)
        up = wait_for(lambda: not free(self.lock) or child.poll() is not None, 30)
        if not up or free(self.lock):
            said = read_some(agent_log(self.site))[before:].decode(errors="replace").strip()
            what = "the supervisor, which runs ComfyUI where there is no systemd, did not start"
            raise Fault("step", what, said[-2000:], f"read {agent_log(self.site)}, then run the same command again")

    def stop(self) -> None:
        """Stop the service and wait until it has; raises Fault when it does not."""
        if free(self.lock):
            return
        # One that has just been started takes a moment to write its record.
        wait_for(lambda: free(self.lock) or _recorded(read(self.record), "pid") != 0, 5)
        pid = _recorded(read(self.record), "pid")
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not (pid or free(self.lock)) or not wait_for(lambda: free(self.lock), 40):
            cause = f"process {pid} holds {self.lock}" if pid else f"{self.record} does not name it: was the disk full?"
            raise Fault(
                "step", "the supervisor does not end", cause, f"on the host: fuser -v {self.lock}, then kill it"
            )

    def log(self, lines: int) -> list[str]:
        """The last lines of the service's present or last run."""
        return end_of(self.output, lines, int(read(self.record, lenient=True).get("offset", 0)))

    def timed_log(self, lines: int) -> list[tuple[float | None, str]]:
        """The last lines, also of runs that have ended; a file has no times."""
        with suppress(OSError), self.output.open(errors="replace") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 200 * lines))
            return [(None, line[:LINE]) for line in log.read(200 * lines).splitlines()[-lines:]]
        return []

    def settle(self) -> None:
        """Nothing starts it at boot."""

    def rotate(self) -> None:
        """Begin a new log when this one has grown long; one older is kept."""
        if self.output.exists() and self.output.stat().st_size > LONG:
            for path in (self.times, self.output):
                with suppress(FileNotFoundError):
                    path.replace(path.with_name(f"{path.name}.1"))

    def note(self, child: int = 0, restarts: int = 0, offset: int | None = None) -> None:
        """Record which processes the supervisor, this one, and its ComfyUI are, and where in the log that begins."""
        if offset is None:
            offset = self.output.stat().st_size if self.output.exists() else 0
        pid = os.getpid()
        record = {"pid": pid, "pid_started": started(pid), "child": child, "child_started": started(child)}
        record |= {"restarts": restarts, "since": now(), "offset": offset}
        with suppress(OSError):  # a full disk must not end the supervisor
            write(self.record, json.dumps(record))

    def mark(self) -> None:
        """Note when the log was how long, every five seconds that it grows: ComfyUI's lines have no times."""
        with suppress(OSError):  # a full disk must not end the supervisor
            at, size = time.time(), self.output.stat().st_size
            if size != self._marked[1] and at - self._marked[0] >= 5:
                self._marked = at, size
                with self.times.open("a") as file:
                    file.write(f"{at:.0f} {size}\n")

    def go(self) -> None:
        """Apply what is pending, in a process of its own."""
        detach([sys.executable, "-I", str(self.site.state / "agent.pyz"), "apply"], self.site)

    def last_go(self) -> list[str]:
        """The last lines that such processes wrote."""
        return read_some(agent_log(self.site)).decode(errors="replace").splitlines()[-12:]


Manager = Systemd | Supervised


def manager_of(site: Site) -> Manager:
    """How services are run here: by the system's systemd, the user's where it outlives the login, or by Hearth.

    What installed the service stays in charge of it, whoever asks: two managers would start it twice. Raises Fault
    when that is the user's systemd and it does not answer.
    """
    systemd, supervised = Systemd(site), Supervised(site)
    if site.scope == "system":
        return systemd
    name = read(choice(site)).get("manager")
    if not name:  # nothing is installed, or by a Hearth that did not note it
        lingers = Path("/var/lib/systemd/linger", login()).exists()
        placed = (systemd.units / systemd.unit).is_symlink()
        by_systemd = not supervised.enabled.exists() and (placed or (lingers and user_systemd()))
        name = systemd.name if by_systemd else supervised.name
    if name == supervised.name:
        return supervised
    if not user_systemd():
        what = f"{login()}'s systemd, which runs {site.service} here, does not answer"
        cause = f"it ends with {login()}'s last session unless it lingers; its socket is in /run/user/{os.getuid()}"
        raise Fault(
            "step", what, cause, f"on the host: loginctl enable-linger {login()}, then run the same command again"
        )
    return systemd


def choice(site: Site) -> Path:
    """The file that says which manager runs the service."""
    return site.state / "manager.json"


def _note(manager: Manager) -> None:
    with suppress(OSError):  # a full disk must not stop a revert; the unit or `enabled` says it, too
        write(choice(manager.site), json.dumps({"manager": manager.name}))


def _recorded(record: Json, name: str) -> int:
    """A process of the supervisor's record while it runs, else 0: its number alone may be another process's by now."""
    pid = int(record.get(name, 0))
    since = started(pid)
    if f"{name}_started" in record:
        return pid if since and since == record[f"{name}_started"] else 0
    # An older Hearth's supervisor, which noted no times, runs on after an update.
    ours = b"supervise" in read_some(Path(f"/proc/{record.get('pid', 0)}/cmdline"))
    return pid if since and ours else 0


def last_words(manager: Manager) -> list[str]:
    """The last lines of a service that died: it may have been started again a moment ago, and has said nothing yet."""
    return manager.log(25) or [line for _, line in manager.timed_log(25)]


def ours(site: Site, gpus: list[Json]) -> tuple[GpuState, ...]:
    """The GPUs, with `comfyui` set for the processes of the service and of its MPS server."""
    units = (f"{site.service}.service", f"{site.service}-mps.service")
    child = Supervised(site).status().pid

    def marked(process: Json) -> Process:
        return Process(**process, comfyui=process["unit"] in units or process["pid"] == child != 0)

    return tuple(GpuState(**{**gpu, "processes": tuple(map(marked, gpu["processes"]))}) for gpu in gpus)


def end_of(path: Path, lines: int, begin: int = 0) -> list[str]:
    """The last lines of a log, of what was written after `begin`; none where there is no log."""
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(begin, os.fstat(log.fileno()).st_size - LOG_BYTES))
        return [line[:LINE] for line in log.read(LOG_BYTES).decode(errors="replace").splitlines()[-lines:]]
    return []


def login() -> str:
    """Who runs this; the number where it has no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def find_runtime() -> None:
    """Name the folder of the login's systemd, as cron does not, and su names another's."""
    runtime = f"/run/user/{os.getuid()}"  # where the user's systemd has it, always (pam_systemd(8))
    if Path(runtime).is_dir():
        os.environ["XDG_RUNTIME_DIR"] = runtime


def user_systemd() -> bool:
    """Whether the login has a systemd of its own that answers."""
    find_runtime()
    if not (Path("/run/systemd/system").is_dir() and os.environ.get("XDG_RUNTIME_DIR")):
        return False
    with suppress(OSError):
        done = subprocess.run(["systemctl", "--user", "show", "--property=Version"], capture_output=True)
        return done.returncode == 0
    return False


def agent_log(site: Site) -> Path:
    """What detached processes said."""
    return site.state / "agent.log"


def detach(argv: list[str], site: Site) -> subprocess.Popen[bytes]:
    """Start a process that no shell, connection or Ctrl-C of ours ends."""
    with agent_log(site).open("ab") as log:
        return subprocess.Popen(
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


def dies_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the kernel kills the new process when this thread ends, however it ends (prctl(2))."""
    import ctypes  # a megabyte that no other verb needs

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def child() -> None:
        prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(1)

    return child


def take_orphans() -> set[int]:
    """Become the parent of all that outlives its own here (prctl(2)); returns the children that there are already."""
    import ctypes  # a megabyte that no other verb needs

    ctypes.CDLL(None).prctl(36, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    return _children()


def end_descendants(spared: Collection[int] = (), *, seconds: float = 20) -> None:
    """Kill what was started since `take_orphans` returned the `spared`; raises Fault when it does not end.

    Whoever loses its parent by that becomes a child here, and is next. One that forks and ends without a pause is gone
    when it is signalled, but leaves a dead child behind each time: it is looked for until there is none for a while.
    """
    end, quiet = time.monotonic() + seconds, 0
    while quiet < 20:
        left = _children() - set(spared)
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        quiet = 0 if left else quiet + 1
        if left and time.monotonic() > end:
            what = f"{len(left)} processes of ComfyUI's do not end"
            raise Fault(
                "step", what, f"some of them: {sorted(left)[:5]}", "look at them on the host; a reboot ends them"
            )
        time.sleep(0 if left else 0.001)


def end_with_programs(pid: int) -> None:
    """Kill a process and the programs that it has started, each of which leads a session of its own (`files.run`)."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # it starts no more
    programs = _children(pid)
    kills = [(pid, os.kill), *((each, kill) for each in programs for kill in (os.killpg, os.kill))]
    for each, kill in kills:
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or is another user's
            kill(each, signal.SIGKILL)


def _children(parent: int = 0) -> set[int]:
    """The children of a process, by default this one's, dead ones too."""
    parent = parent or os.getpid()
    if lists := list(Path(f"/proc/{parent}/task").glob("*/children")):
        return {int(pid) for each in lists for pid in read_some(each).split()}
    places = {place.name: read_some(place / "stat", 4096) for place in Path("/proc").glob("[0-9]*")}
    # proc(5); its name may hold anything
    return {int(pid) for pid, line in places.items() if line.rpartition(b")")[2].split()[1:2] == [b"%d" % parent]}


def _reap(but: int) -> None:
    """Let go of orphans that have ended, up to the child that is waited for elsewhere."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != but:
            os.waitpid(ended.si_pid, 0)


def copied(pipe: IO[bytes], log: IO[bytes]) -> threading.Thread:
    """Put what comes by a pipe at the end of a file: with the file itself, its writer could empty it."""

    def copy() -> None:
        while block := os.read(pipe.fileno(), 1 << 16):
            with suppress(OSError, ValueError):  # a full disk must not hold it up
                log.write(block)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def supervise(site: Site) -> None:
    """Run the current release until told to stop (SIGTERM); start it again when it dies, five times in five minutes.

    Whatever it has started ends with it.

    What has a unit of its own under systemd is done here: to start anew when a node under development changes, and to
    have ComfyUI give its memory back from time to time.
    """
    from agent.serve.health import free_if_idle  # both use this module
    from agent.serve.watch import Watcher

    manager = Supervised(site)
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT)  # ComfyUI handles SIGINT, not SIGTERM

    def say(text: str) -> None:
        with suppress(OSError), manager.output.open("a") as output:  # a full disk must not end the supervisor
            output.write(f"{now()} {text}\n")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN: ComfyUI would inherit that, and never stop
    take_orphans()
    with flock(manager.lock), ExitStack() as stack:
        stack.callback(end_descendants, seconds=float("inf"))
        manager.note()
        starts: list[float] = []
        restarts = 0
        while not stopping:
            if missing := site.unmounted():
                say(f"waiting for {' and '.join(missing)} to be mounted")
                wait_for(lambda: stopping or not site.unmounted(), 60)
                continue
            release = site.manifest(site.release())
            watcher = Watcher(release.get("develop", []))
            manager.rotate()
            with manager.output.open("ab", buffering=0) as log:
                environment = {**inherited(), **release["environment"]}
                begin = log.tell()
                child = subprocess.Popen(
                    [*release.get("confined", ()), *release["argv"]],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    preexec_fn=dies_with_parent(),
                )
                assert child.stdout is not None
                copying = copied(child.stdout, log)
                manager.note(child.pid, restarts, begin)
                if stopping:  # told so between the loop's test and the start
                    child.send_signal(signal.SIGINT)
                patience, gone, anew = 30.0, False, False
                changed: list[str] = []
                period = release.get("free_memory") or float("inf")
                due = time.monotonic() + period
                while child.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(0.5)
                    _reap(child.pid)
                    manager.mark()
                    if not gone and site.unmounted():  # it must not write into the empty mount point
                        gone = True
                        child.send_signal(signal.SIGINT)
                    changed += watcher.changed()
                    if changed and not anew and not site.pending.exists():  # a deploy that proves it comes first
                        anew = True
                        say(f"{changed[0]} changed: ComfyUI starts anew")
                        child.send_signal(signal.SIGINT)
                    if time.monotonic() > due:
                        due += period
                        say(free_if_idle(site))
                    patience -= 0.5 if stopping or gone or anew else 0
                    if patience < 0:
                        child.kill()
                end_descendants(seconds=float("inf"))
                copying.join(5)
                child.stdout.close()
            if gone or anew:
                continue
            starts = [each for each in starts if each > time.monotonic() - 300] + [time.monotonic()]
            if len(starts) >= 5:
                if not watcher.folders:
                    break
                while not (stopping or watcher.changed()):  # until the node that breaks it is mended
                    time.sleep(1)
                starts = []
            restarts += 1
            if not stopping:
                time.sleep(2)


WRITTEN = "written by Hearth for release"
"""In the first line of every unit of Hearth's (recipes/comfyui/units/)."""
