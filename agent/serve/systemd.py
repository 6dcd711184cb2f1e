"""The service as a systemd unit of the system or user manager."""

from __future__ import annotations

import os
import pwd
import re
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, discard, link, read_text, write
from agent.layout import Layout
from agent.processes import last_of, run, wait_for
from agent.schema.facts import Service

UNITS, QUADLETS = Path("/etc/systemd/system"), Path("/etc/containers/systemd")


def entries(folder: Path, unit: str) -> list[Path]:
    """Return a unit's file and links in a systemd folder, including dangling links, which a glob omits."""
    places = [folder / unit, *(wants / unit for wants in folder.glob("*.wants"))]
    return [path for path in places if os.path.lexists(path)]


class Systemd:
    """The service as a unit of the system or user manager.

    The unit file is a link to `current/<service>.service`, so that switching the release switches the unit. So are the
    files of its companions `<service>-*`, which wait for mounts or run on a timer. Companions with an [Install] section
    are started at boot and with the service. A release that runs in a container has `<service>.container` instead, of
    which Quadlet makes the unit `<service>.service` at each reload.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.name = f"systemd-{layout.scope}"
        self.unit = f"{layout.service}.service"
        self.container = f"{layout.service}.container"
        self.storage = f"{layout.service}-storage.service"  # waits for mounts, if any
        self.apply_unit = f"{layout.service}-apply.service"
        self.exporter_unit = f"{layout.service}-exporter.service"
        system = layout.scope == "system"
        self.ctl = ["systemctl"] if system else ["systemctl", "--user"]
        if not system:
            find_runtime()
        self.units = UNITS if system else Path.home() / ".config/systemd/user"
        self.quadlets = QUADLETS if system else Path.home() / ".config/containers/systemd"
        self.target = "multi-user.target" if system else "default.target"

    def place(self, name: str) -> Path:
        """Return where a unit's or container's file is installed."""
        return (self.quadlets if name.endswith(".container") else self.units) / name

    def _contained(self) -> bool:
        """Return whether the current release runs in a container."""
        return (self.layout.current / self.container).exists()

    def _wants(self, unit: str) -> Path:
        return self.units / f"{self.target}.wants" / unit

    def status(self) -> Service:
        """Return the state of the service. Raises AgentError."""
        values = self._shown(self.unit, "ActiveState,SubState,NRestarts,ActiveEnterTimestamp,MainPID")
        died = values.get("SubState") == "auto-restart"  # its ActiveState is "activating"
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
            pid=self.process(int(values.get("MainPID") or 0)),
        )

    def process(self, main: int) -> int:
        """Return ComfyUI's process for the unit's main process: in a container, that is the engine's monitor."""
        if main and self._contained():
            return int((read_text(Path(f"/proc/{main}/task/{main}/children")).split() or ["0"])[0])
        return main

    def _shown(self, unit: str, fields: str) -> dict[str, str]:
        lines = run([*self.ctl, "show", unit, f"--property={fields}"]).splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def _links(self) -> dict[Path, str]:
        """Return the current release's links in systemd's folder: path -> target."""
        main = self.container if self._contained() else self.unit
        found = {self.place(main): str(self.layout.current / main)}
        for name in self._companions():
            found[self.units / name] = str(self.layout.current / name)
            for target in re.findall(r"^WantedBy=(.+)$", read_text(self.layout.current / name), re.MULTILINE):
                found[self.units / f"{target}.wants" / name] = f"../{name}"
        return found

    def _companions(self) -> list[str]:
        listed = self.layout.current.glob(f"{self.layout.service}-*")
        found = {path.name for path in listed if path.suffix in (".service", ".timer", ".path")}
        return sorted(found - {self.exporter_unit})  # older releases contain it, too

    def _linked_companions(self) -> list[str]:
        """Return the linked companions, including those of an earlier release."""
        return [path.name for path in self.units.glob(f"{self.layout.service}-*") if self._ours(path)]

    def _ours(self, path: Path) -> bool:
        """Return whether a path is a link to a file of the current release, which may lack it."""
        return path.is_symlink() and path.readlink().parent == self.layout.current

    def placed(self) -> list[Path]:
        """Return Hearth's files in systemd's folder for this service."""
        main = [self.unit, self.container]
        names = dict.fromkeys([*main, self.apply_unit, self.exporter_unit, *self._linked_companions()])
        return [] if self.foreign() else [path for name in names for path in self._entries(name)]

    def _entries(self, name: str) -> list[Path]:
        return entries(self.place(name).parent, name)

    def _stale(self) -> list[str]:
        """Return linked files of an earlier release that the current one lacks."""
        main = self.unit if self._contained() else self.container
        lacking = [name for name in self._linked_companions() if not (self.layout.current / name).exists()]
        return [*lacking, *([main] if self._ours(self.place(main)) else [])]

    def _linked(self) -> bool:
        links = self._links().items()
        return not self._stale() and all(place.is_symlink() and str(place.readlink()) == to for place, to in links)

    def foreign(self) -> str:
        """Return the unit file's path if Hearth did not write it, else empty. An edited or missing unit is drift."""
        for place in () if self._linked() else (self.place(self.unit), self.place(self.container)):
            if (text := read_text(place)) and WRITTEN not in text:
                return str(place)
        return ""

    def install(self) -> None:
        """Install and enable the current release's unit and companions; remove stale ones. Raises AgentError."""
        self.layout.note_manager(self.name)
        for place, to in self._links().items():
            link(place, to)
        stale = self._stale()
        if companions := [name for name in stale if name not in (self.unit, self.container)]:
            run([*self.ctl, "stop", *companions])
        for path in [path for name in stale for path in self._entries(name)]:
            discard(path)
        link(self._wants(self.unit), f"../{self.unit}")
        run([*self.ctl, "daemon-reload"])

    def uninstall(self) -> None:
        """Stop the companions; remove the unit and the companions. Raises AgentError."""
        if companions := self._linked_companions():
            self._stop(companions)
        for name in (self.unit, self.container, *companions):
            for place in self._entries(name):
                discard(place)
        run([*self.ctl, "daemon-reload"])
        subprocess.run([*self.ctl, "reset-failed", self.unit, *companions], capture_output=True)
        discard(self.layout.choice)

    def enable(self) -> None:
        """Enable the service at boot."""
        link(self._wants(self.unit), f"../{self.unit}")
        run([*self.ctl, "daemon-reload"])

    def disable(self) -> None:
        """Disable the service at boot."""
        discard(self._wants(self.unit))
        run([*self.ctl, "daemon-reload"])

    def start(self, *, wait: bool = True) -> None:
        """Start the service and restart its companions; `wait` until they have started. Raises AgentError."""
        subprocess.run([*self.ctl, "reset-failed", self.unit], capture_output=True)
        how = [] if wait else ["--no-block"]
        contained = self._contained()  # its start lasts until ComfyUI answers
        run([*self.ctl, "start", *(["--no-block"] if contained else how), self.unit])
        if contained and wait:
            wait_for(lambda: not self.status().state.startswith("inactive"), 10)
        if wanted := sorted({place.name for place in self._links() if place.parent.name.endswith(".wants")}):
            run([*self.ctl, "restart", *how, *wanted])

    def restart(self) -> None:
        """Restart the service without its companions; resets the start limit first. Raises AgentError."""
        subprocess.run([*self.ctl, "reset-failed", self.unit], capture_output=True)
        how = ["--no-block"] if self._contained() else []  # its start lasts until ComfyUI answers, which may be never
        run([*self.ctl, "restart", *how, self.unit])

    def stop(self) -> None:
        """Stop the service and wait until it has stopped. Raises AgentError."""
        storage = [self.storage] if os.path.lexists(self.units / self.storage) else []
        main = any(os.path.lexists(self.place(name)) for name in (self.unit, self.container))
        self._stop([*storage, *([self.unit] if main else [])])

    def _stop(self, units: list[str]) -> None:
        done = subprocess.run([*self.ctl, "stop", *units], capture_output=True, text=True) if units else None
        if done and done.returncode not in (0, 5):  # 5: not loaded, so not running (systemctl(1))
            raise AgentError("step", f"systemctl stop {' '.join(units)} failed", done.stderr.strip())

    def log(self, lines: int) -> list[str]:
        """Return the last lines of the service's current or most recent run. Raises AgentError."""
        who = ["--user-unit"] if self.layout.scope == "user" else ["--unit"]
        shown = run([*self.ctl, "show", self.unit, "--property=InvocationID", "--value"]).strip()
        match = [f"_SYSTEMD_INVOCATION_ID={shown}"] if shown else [*who, self.unit]
        return last_of(["journalctl", "--no-pager", "--reverse", "--output=cat", f"--lines={lines}", *match], lines)

    def timed_log(self, lines: int) -> list[tuple[float | None, str]]:
        """Return the last lines of the past day, across runs, with times in seconds since 1970. Raises AgentError."""
        who = "--user-unit" if self.layout.scope == "user" else "--unit"
        words = ["journalctl", "--no-pager", "--quiet", "--reverse", "--output=short-unix", "--since=-1d"]
        shown = last_of([*words, f"--lines={lines}", who, self.unit], lines)
        found = (re.match(r"(\d+\.\d+) \S+ [^\s:]+: ?(.*)", line) for line in shown)
        return [(float(each[1]), each[2]) for each in found if each]

    def start_missed(self) -> None:
        """At boot, start the enabled service if systemd could not load its unit because the prefix was not mounted."""
        if self._wants(self.unit).is_symlink() and not self.status().active:
            for words in (["daemon-reload"], ["start", "--no-block", self.unit]):
                subprocess.run([*self.ctl, *words], capture_output=True)

    def start_apply(self) -> None:
        """Write, enable and start the apply unit. systemd restarts it if it is killed. Raises AgentError."""
        limits = _APPLY_LIMITS if self.layout.scope == "system" else ""
        text = _APPLY_UNIT.format(
            service=self.layout.service,
            python=_python(self.layout),
            state=self.layout.state,
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

    def apply_log(self) -> list[str]:
        """Return the state of the apply unit and its last log lines. Raises AgentError."""
        fields = "ActiveState,SubState,Result,ExecMainCode,ExecMainStatus,NRestarts,Job"
        shown = run([*self.ctl, "show", self.apply_unit, f"--property={fields}"]).split()
        return [" ".join(shown), *self.log_of(self.apply_unit)]

    def log_of(self, unit: str) -> list[str]:
        """Return the last log lines of another unit. Raises AgentError."""
        who = "--user-unit" if self.layout.scope == "user" else "--unit"
        words = ["journalctl", "--no-pager", "--quiet", "--output=cat", "--lines=12", who, unit]
        return run(words).splitlines()

    def remove_apply_unit(self) -> None:
        """Remove the apply unit. A run in progress continues, but is not restarted if it is killed."""
        if placed := entries(self.units, self.apply_unit):
            for path in placed:
                discard(path)
            run([*self.ctl, "daemon-reload"])


def _python(layout: Layout) -> str:
    """Return the Python for a unit started at boot. Raises AgentError if it runs as root and no Python is root-only.

    A user who deploys as root may run a Python of their own (uv, pyenv), which their login can replace.
    """
    python = str(getattr(sys, "_base_executable", ""))  # a virtual environment may be moved or deleted
    python = python if Path(python).is_file() else sys.executable
    if layout.scope != "system" or rooted(Path(python)):
        return python
    for each in ("/usr/bin/python3", "/usr/local/bin/python3"):
        with suppress(AgentError):
            if rooted(Path(each)) and run([each, "-ISc", "import sys; print(sys.version_info >= (3, 10))"]) == "True\n":
                return each
    what = f"{python} would run as root at each boot, but users other than root can change it"
    raise AgentError("step", what, "", "install the system's python3, 3.10 or newer, then run the same command again")


def rooted(path: Path, links: int = 40) -> bool:
    """Return whether only root can change a path: the file, its parent folders, and links on the way."""
    try:
        status = path.lstat()
    except OSError:
        return False
    shared = status.st_mode & (0o022 if status.st_gid else 0o002)
    if status.st_uid or not links or (path != path.parent and not rooted(path.parent, links)):
        return False
    return rooted(path.parent / path.readlink(), links - 1) if stat.S_ISLNK(status.st_mode) else not shared


# The apply unit must write anywhere (prefix, units, mount points, sudoers, kernel settings), change owners, act as and
# create the service user, reach the package index, and inspect other processes (adopt). No file system is hidden or
# read-only: in a mount namespace, it would not see the mounts it waits for. Memory is unlimited: uv's needs grow with
# the packages, and a deploy killed for memory would start over.
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


# Not ordered relative to the service, which it stops and starts itself. OOMPolicy: an OOM kill of a compiler or of uv
# must not end the apply.
_APPLY_UNIT = """\
[Unit]
Description=Hearth: resumes an interrupted change of {service}, or starts it if it is not running
RequiresMountsFor={state}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={python} -I -S {state}/agent apply {state}/site.json
Restart=on-failure
# After a damaged record or a read-only disk a retry each second does not help. The next boot or command resumes.
RestartPreventExitStatus=3 4
RestartSec=1
OOMPolicy=continue
KillMode=control-group
# Now and then systemd (252, in a container under load) misses that a killed process was the last of its group, and
# starts the next one only after this time. Every process here ends quickly.
TimeoutStopSec=5
{limits}
[Install]
WantedBy={target}
"""


def login() -> str:
    """Return the current user's name, or its uid if it has no name, as in some containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def find_runtime() -> None:
    """Set XDG_RUNTIME_DIR to this user's: cron does not set it, and su keeps another user's."""
    runtime = f"/run/user/{os.getuid()}"  # fixed by pam_systemd(8)
    if Path(runtime).is_dir():
        os.environ["XDG_RUNTIME_DIR"] = runtime


def user_systemd() -> bool:
    """Return whether the user's systemd responds."""
    find_runtime()
    if not (Path("/run/systemd/system").is_dir() and os.environ.get("XDG_RUNTIME_DIR")):
        return False
    with suppress(OSError):
        done = subprocess.run(["systemctl", "--user", "show", "--property=Version"], capture_output=True)
        return done.returncode == 0
    return False


WRITTEN = "written by Hearth for release"
"""Marker in the first line of Hearth's units (recipes/comfyui/units/)."""
