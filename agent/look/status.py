"""Current state of ComfyUI and its host: values that change by the second and are not in `facts`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agent.api import accepts_connections, endpoint, queue, system_stats
from agent.files import AgentError, meminfo
from agent.layout import Layout
from agent.look.facts import STALE, check_folders_respond, facts
from agent.look.gpu import gpus
from agent.schema.facts import Questions
from agent.schema.live import ComfyUI, Device, Disk, Glance, Live, RunningJob
from agent.serve.managers import ours

PATIENCE = 2.0
"""Time limit for each ComfyUI response in seconds: it responds from memory between two steps of a job."""

VERIFIED = 300
"""Seconds for which an intact part is not verified again: checking 66,000 files takes half a second of CPU time."""


def status(layout: Layout, ask: Questions) -> Glance:
    """Return facts and current state; recently verified parts are not verified again. Raises AgentError."""
    check_folders_respond(layout, ask, STALE)
    return glance(layout, ask)


def glance(layout: Layout, ask: Questions) -> Glance:
    """Return facts and current state from a single NVML query: opening NVML wakes a sleeping GPU."""
    devices = ours(layout, gpus())
    found = facts(layout, replace(ask, verified=VERIFIED), devices)
    live = Live(
        time=time.time(),
        uptime=_age(found.service.pid),
        comfyui=_comfyui(layout),
        memory=meminfo(),
        gpus=devices,
        disks={str(path): _disk(path) for path in _places(layout)},
    )
    return Glance(found, live)


def _comfyui(layout: Layout) -> ComfyUI:
    started, place = time.monotonic(), endpoint(layout)
    try:
        stats = system_stats(place, PATIENCE)
        running, waiting = queue(place, PATIENCE)
    except (OSError, ValueError) as error:
        return ComfyUI("silent" if accepts_connections(place) else "closed", str(error))
    return ComfyUI(
        state="answers",
        seconds=time.monotonic() - started,
        version=stats["version"],
        torch=stats["torch"],
        devices=tuple(Device(**each) for each in stats["devices"]),
        running=tuple(RunningJob(each["id"], each["nodes"], each["queued"]) for each in running),
        pending=waiting.total,
    )


def _places(layout: Layout) -> list[Path]:
    return [layout.prefix, layout.data, *map(Path, layout.elsewhere.values())]


def _disk(path: Path) -> Disk:
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return Disk(error=error.strerror or str(error))
    files = (disk.f_favail, disk.f_files) if disk.f_files else (None, None)
    return Disk(disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize, *files)


def _age(pid: int) -> float | None:
    """Return the seconds since a process was started (proc(5), stat: starttime, the 20th field after the name)."""
    with suppress(OSError, ValueError, IndexError, AgentError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    return None
