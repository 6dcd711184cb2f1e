"""Start, stop and remove what a deploy has installed. Every step can be repeated after an interruption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from agent.api import endpoint
from agent.change.exporter import put as put_exporter
from agent.change.gateway import put as put_gateway
from agent.deletion import SafeDeleter
from agent.files import AgentError, Note, discard, read_text, record
from agent.journal import Journal, now, pending
from agent.layout import Layout
from agent.locks import flock
from agent.processes import run, started
from agent.schema.change import (
    Delete,
    Ending,
    EndLinger,
    Erase,
    Forget,
    ForgetMounts,
    Restart,
    Start,
    Stop,
    Withdraw,
)
from agent.schema.facts import Paused
from agent.schema.installed import InstalledExporter, InstalledGateway
from agent.schema.records import Event
from agent.serve.health import drain, first_answer
from agent.serve.managers import Manager, last_words, manager_of
from agent.serve.systemd import UNITS, Systemd, entries


def stop(layout: Layout, step: Stop, note: Note) -> None:
    """Stop ComfyUI when its jobs are done; with `pause` it also stays stopped at boot until resumed.

    Raises AgentError.
    """
    manager = manager_of(layout)
    await_jobs(layout, manager, step, note)
    if step.pause:
        record(layout.paused, Paused(who=pending(layout).who, at=now()))
        manager.disable()
    halt(layout, manager, force=step.force)


def halt(layout: Layout, manager: Manager, *, force: bool) -> None:
    """Stop the service; with `force`, kill all its processes and restart MPS, which runs as the same user."""
    manager.stop()
    if not force:
        return
    mps = f"{layout.service}-mps.service"
    shared = isinstance(manager, Systemd) and (manager.units / mps).exists()
    if shared:  # else systemd restarts it during the kill and counts failures
        run(["systemctl", "stop", mps])
    end_all(layout)
    if shared:
        subprocess.run(["systemctl", "reset-failed", mps], capture_output=True)
        run(["systemctl", "start", "--no-block", mps])


def end_all(layout: Layout) -> None:
    """Kill all processes of the service user, even a fork bomb that survives systemd's kill. Raises AgentError.

    Without a service user, kill confined processes whose unit or supervisor was killed before it could stop them.
    """
    end = time.monotonic() + 20
    while left := _processes(layout.owner()[0]) if layout.user else _strays():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            what = f"processes of {layout.user or 'the service'} do not end: {len(left)}"
            raise AgentError("step", what, f"the first: {left[:5]}", "inspect them on the host; a reboot ends them")
        time.sleep(0.1)


def _processes(user: int) -> list[int]:
    """Return the running processes of a user."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid == user and started(int(folder.name)):
                found.append(int(folder.name))
    return found


def _strays() -> list[int]:
    """Return confined processes (`confine`) without a supervisor or trial of Hearth as ancestor, and in no unit."""
    found: list[int] = []
    for pid in _processes(os.getuid()):
        if _confined(pid) and not re.search(
            r"/user@\d+\.service/.+\.service$", read_text(Path(f"/proc/{pid}/cgroup")), re.M
        ):
            above = pid
            while _confined(above):
                above = int((read_text(Path(f"/proc/{above}/stat")).rpartition(")")[2].split() or "00")[1])
            words = read_text(Path(f"/proc/{above}/cmdline")).split("\0")  # unconfined, so its command line is trusted
            if not {Path(word).name for word in words} & {"agent", "agent.pyz"}:  # agent.pyz: older versions
                found.append(pid)
    return found


def _confined(pid: int) -> bool:
    """Return whether a process has the mark that `confine.main` sets and that it cannot remove."""
    return bool(re.search(r"^Max msgqueue size +\S+ +0 ", read_text(Path(f"/proc/{pid}/limits")), re.MULTILINE))


def start(layout: Layout, step: Start, note: Note) -> None:
    """Start ComfyUI and wait until it responds; with `resume`, also enable it at boot. Raises AgentError."""
    manager = manager_of(layout)
    layout.check_mounted()
    if step.resume:
        manager.enable()
        discard(layout.paused)
    await_answer(layout, manager, note)


def restart(layout: Layout, step: Restart, note: Note) -> None:
    """Stop ComfyUI when its jobs are done, start it, and wait until it responds. Raises AgentError."""
    manager = manager_of(layout)
    await_jobs(layout, manager, step, note)
    halt(layout, manager, force=step.force)
    await_answer(layout, manager, note)


def await_jobs(layout: Layout, manager: Manager, step: Ending, note: Note) -> None:
    """Wait until ComfyUI has no jobs, with the step's `drain` seconds and `force`. Raises AgentError on a timeout."""
    if manager.status().active:  # else another ComfyUI holds the port
        drain(endpoint(layout), step.drain, step.force, note)


def await_answer(layout: Layout, manager: Manager, note: Note) -> None:
    """Start ComfyUI and wait until it responds. Raises AgentError with its log if it does not."""
    began = time.monotonic()
    manager.start()
    try:
        stats = first_answer(endpoint(layout), manager, layout.manifest(layout.release()).gate.seconds)
    except AgentError as error:
        error.report |= {
            "kind": "silent",
            "hint": "read the log above; to return to the previous release: inv rollback",
        }
        with suppress(AgentError, OSError):
            error.report["log"] = last_words(manager)
        raise
    note(f"answers after {time.monotonic() - began:.1f} s: ComfyUI {stats['version']}")


def withdraw(layout: Layout, step: Withdraw, note: Note) -> None:
    """Take the current release out of service. It stays on disk for a later deploy or rollback. Raises AgentError."""
    manager = manager_of(layout)
    await_jobs(layout, manager, step, note)
    halt(layout, manager, force=step.force)
    manager.uninstall()
    if isinstance(manager, Systemd):
        put_exporter(layout, InstalledExporter())
    discard(layout.paused)
    if layout.current.is_symlink():
        discard(layout.current)


def end_linger(layout: Layout, step: EndLinger, note: Note) -> None:
    """Disable lingering: the user's systemd again ends with the last session."""
    run(["loginctl", "disable-linger"])
    discard(layout.lingered)


def forget(layout: Layout, step: Forget, note: Note) -> None:
    """Remove the apply unit, which resumes interrupted runs; it is Hearth's last unit."""
    Systemd(layout).remove_apply_unit()


def forget_mounts(layout: Layout, step: ForgetMounts, note: Note) -> None:
    """Remove Hearth's mount units. Existing mounts stay until the next boot."""
    for unit in step.units:
        for path in entries(UNITS, unit):
            discard(path)
    run(["systemctl", "daemon-reload"])


def delete(layout: Layout, step: Delete, note: Note) -> None:
    """Delete the step's names from the prefix. Raises AgentError if something cannot be deleted."""
    if "gateway" in step.names:
        put_gateway(layout, InstalledGateway())
    _sweep([layout.prefix / name for name in step.names], note)


RUN = ("agent", "agents", "lock", "pending.json", "runs", "site.json", "submit.lock")
"""Files in `state/` that a run needs up to its end, and that the next run needs to resume it."""


def erase(layout: Layout, step: Erase, note: Note) -> None:
    """Delete Hearth's state except this run's files, which `finish_erase` deletes. Raises AgentError."""
    _sweep([path for path in layout.state.iterdir() if path.name not in RUN], note)


def _sweep(paths: list[Path], note: Note) -> None:
    sweep = SafeDeleter()
    for path in paths:
        sweep.delete(path)
    os.sync()  # deleted files must not reappear after a power loss
    note(f"deleted files: {sweep.files}")
    for point in sweep.left:
        note(f"kept, it is a mount point: {point}")
    if sweep.stuck:
        more = [f"and {len(sweep.stuck) - 20} more"] if len(sweep.stuck) > 20 else []
        what = f"paths that could not be deleted: {len(sweep.stuck)}"
        hint = "inspect them (lsattr shows immutable files), then run the same command again"
        raise AgentError("step", what, "\n".join([*sweep.stuck[:20], *more]), hint)


def finish_erase(layout: Layout, journal: Journal) -> None:
    """End an erase run: record its end, then delete all remaining state including the journal.

    Clients that follow the run read the last line from the open journal, and wait until the state is gone: the next
    look at the host must not see half of it.
    """
    with flock(layout.state / "submit.lock", wait=30):  # no client may submit a plan meanwhile
        layout.pending.unlink()
        Systemd(layout).remove_apply_unit()
        sweep = SafeDeleter()
        # Hundreds of files, so they go before the end: the client reads the facts at once, and must not run a
        # half-deleted agent.
        agents = layout.state / ".agents"
        with suppress(FileNotFoundError):
            (layout.state / "agents").rename(agents)
            sweep.delete(agents)
        journal.add(Event("end", result="done", erases=True))
        sweep.delete(layout.state)
        os.sync()
    with suppress(OSError):  # it still contains the data or foreign files
        layout.prefix.rmdir()
