"""The service under Hearth's supervisor, for hosts without a usable systemd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, discard, read_some, record, recorded, write
from agent.journal import now
from agent.layout import Layout
from agent.locks import free
from agent.processes import LINE, LOG_BYTES, started, wait_for
from agent.schema.facts import Service
from agent.schema.records import Supervision

LONG = 10_000_000
"""Log size in bytes above which the next start rotates the log."""


class Supervised:
    """The service under Hearth's supervisor, without systemd or root. Survives the shell that started it."""

    name = "process"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lock = layout.state / "supervisor.lock"
        self.record = layout.state / "supervisor.json"
        self.output = layout.state / "comfyui.log"
        self.times = layout.state / "comfyui.times"
        self.enabled = layout.state / "enabled"
        self._marked = (0.0, -1)

    def status(self) -> Service:
        """Return the state of the service. Raises AgentError."""
        running = not free(self.lock)
        found = recorded(self.record, Supervision) if running else Supervision()
        return Service(
            active=running,
            waits=False,  # the supervisor waits for mounts, and it is active
            state="active (supervised)" if running else "inactive (no supervisor)",
            enabled=self.enabled.exists(),
            linked=True,
            restarts=found.restarts,
            since=found.since,
            pid=_child(found),
        )

    def install(self) -> None:
        """Record the service as installed and enabled."""
        self.layout.note_manager(self.name)
        write(self.enabled, "")

    def uninstall(self) -> None:
        """Remove the records of the service."""
        discard(self.enabled)
        discard(self.layout.choice)

    def enable(self) -> None:
        """Nothing starts it at boot."""

    def disable(self) -> None:
        """Nothing starts it at boot."""

    def start(self, *, wait: bool = True) -> None:
        """Start the supervisor, which waits for mounts itself. Raises AgentError if it does not start."""
        if not free(self.lock):
            return
        before = len(read_some(agent_log(self.layout)))
        child = detach([sys.executable, "-I", str(self.layout.agent), "supervise"], self.layout)
        up = wait_for(lambda: not free(self.lock) or child.poll() is not None, 30)
        if not up or free(self.lock):
            log = read_some(agent_log(self.layout))[before:].decode(errors="replace").strip()
            what = "the supervisor, which runs ComfyUI without systemd, did not start"
            raise AgentError(
                "step", what, log[-2000:], f"read {agent_log(self.layout)}, then run the same command again"
            )

    def stop(self) -> None:
        """Stop the service and wait until it has stopped. Raises AgentError if it does not."""
        if free(self.lock):
            return
        # A supervisor that has just started needs a moment to write its record.
        wait_for(lambda: free(self.lock) or _supervisor(recorded(self.record, Supervision)) != 0, 5)
        pid = _supervisor(recorded(self.record, Supervision))
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if not (pid or free(self.lock)) or not wait_for(lambda: free(self.lock), 40):
            cause = (
                f"process {pid} has locked {self.lock}"
                if pid
                else f"{self.record} does not name its process; perhaps the disk was full"
            )
            raise AgentError(
                "step",
                "the supervisor does not end",
                cause,
                f"on the host: find the process with fuser -v {self.lock}, then kill it",
            )

    def log(self, lines: int) -> list[str]:
        """Return the last lines of the service's current or most recent run."""
        return end_of(self.output, lines, recorded(self.record, Supervision, lenient=True).offset)

    def timed_log(self, lines: int) -> list[tuple[float | None, str]]:
        """Return the last lines, across runs; the log file has no times."""
        with suppress(OSError), self.output.open(errors="replace") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 200 * lines))
            return [(None, line[:LINE]) for line in log.read(200 * lines).splitlines()[-lines:]]
        return []

    def start_missed(self) -> None:
        """Nothing starts it at boot."""

    def rotate(self) -> None:
        """Rotate the log if it exceeds LONG; keep one older log."""
        if self.output.exists() and self.output.stat().st_size > LONG:
            for path in (self.times, self.output):
                with suppress(FileNotFoundError):
                    path.replace(path.with_name(f"{path.name}.1"))

    def note(self, child: int = 0, restarts: int = 0, offset: int | None = None) -> None:
        """Record this supervisor's process, its ComfyUI process, and the log offset in bytes where that begins."""
        if offset is None:
            offset = self.output.stat().st_size if self.output.exists() else 0
        pid = os.getpid()
        found = Supervision(pid, started(pid), child, started(child), restarts, now(), offset)
        with suppress(OSError):  # a full disk must not end the supervisor
            record(self.record, found)

    def note_log_offset(self) -> None:
        """Record the log's size and the time every five seconds while it grows: ComfyUI's lines have no times."""
        with suppress(OSError):  # a full disk must not end the supervisor
            at, size = time.time(), self.output.stat().st_size
            if size != self._marked[1] and at - self._marked[0] >= 5:
                self._marked = at, size
                with self.times.open("a") as file:
                    file.write(f"{at:.0f} {size}\n")

    def start_apply(self) -> None:
        """Apply the pending plan in a detached process."""
        detach([sys.executable, "-I", str(self.layout.agent), "apply"], self.layout)

    def apply_log(self) -> list[str]:
        """Return the last log lines of detached processes."""
        return read_some(agent_log(self.layout)).decode(errors="replace").splitlines()[-12:]


def _supervisor(found: Supervision) -> int:
    """Return the pid of the supervisor if it is running, else 0."""
    return _running(found, found.pid, found.pid_started)


def _child(found: Supervision) -> int:
    """Return the pid of its ComfyUI if it is running, else 0."""
    return _running(found, found.child, found.child_started)


def _running(found: Supervision, pid: int, begun: str | None) -> int:
    """Return the pid of a recorded process if it is running, else 0. Compares start times, since pids are reused."""
    since = started(pid)
    if begun is not None:
        return pid if since and since == begun else 0
    # Supervisors of older versions, which keep running after an update, recorded no start times.
    ours = b"supervise" in read_some(Path(f"/proc/{found.pid}/cmdline"))
    return pid if since and ours else 0


def end_of(path: Path, lines: int, begin: int = 0) -> list[str]:
    """Return the last lines of a log after byte `begin`; empty without a log."""
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(begin, os.fstat(log.fileno()).st_size - LOG_BYTES))
        return [line[:LINE] for line in log.read(LOG_BYTES).decode(errors="replace").splitlines()[-lines:]]
    return []


def agent_log(layout: Layout) -> Path:
    """Return the path of the log of detached processes."""
    return layout.state / "agent.log"


def detach(argv: list[str], layout: Layout) -> subprocess.Popen[bytes]:
    """Start a process that survives this shell, connection and Ctrl-C."""
    with agent_log(layout).open("ab") as log:
        return subprocess.Popen(
            [*argv, str(layout.state / "site.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
