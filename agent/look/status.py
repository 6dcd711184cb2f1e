"""How ComfyUI and its machine are right now: what `facts` does not tell, since it changes by the second."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from agent.api import endpoint, queue, system_stats, takes_connections
from agent.files import Fault, Json, meminfo
from agent.layout import Site
from agent.look.facts import STALE, answering, facts
from agent.look.gpu import gpus
from agent.serve.services import ours

PATIENCE = 2.0
"""Seconds for each answer of ComfyUI's: it gives these between two steps of a job, from memory."""

VERIFIED = 300
"""Seconds for which parts that were found whole count as whole: looking at 66,000 files takes a core's half second."""


def status(site: Site, request: Json) -> Json:
    """The host's facts, with parts that were verified lately taken as they are, and how everything is now."""
    answering(site, request, STALE)
    return glance(site, request)


def glance(site: Site, request: Json) -> Json:
    """Facts and what is live, of one question to the driver: opening its library wakes a GPU that sleeps."""
    devices = ours(site, gpus())
    found = facts(site, request, devices, VERIFIED)
    return {"facts": found, "live": _live(site, found["service"]["pid"], devices)}


def _live(site: Site, pid: int, devices: list[Json]) -> Json:
    """ComfyUI's own answers, memory, disks and the service's time. `time` is this machine's clock."""
    return {
        "time": time.time(),
        "uptime": _age(pid),
        "comfyui": _comfyui(site),
        "memory": meminfo(),
        "gpus": devices,
        "disks": {str(path): _disk(path) for path in _places(site)},
    }


def _comfyui(site: Site) -> Json:
    """What ComfyUI says of itself: `state` is answers, silent (it takes connections, and says nothing), or closed."""
    started, place = time.monotonic(), endpoint(site)
    try:
        stats = system_stats(place, PATIENCE)
        running, waiting = queue(place, PATIENCE)
    except (OSError, ValueError) as error:
        return {"state": "silent" if takes_connections(place) else "closed", "reason": str(error)}
    return {
        "state": "answers",
        "seconds": time.monotonic() - started,
        "version": stats["version"],
        "torch": stats["torch"],
        "devices": stats["devices"],
        "running": [{"id": each["id"], "nodes": each["nodes"], "since": each["queued"]} for each in running],
        "pending": waiting.total,
    }


def _places(site: Site) -> list[Path]:
    return [site.prefix, site.data, *map(Path, site.elsewhere.values())]


def _disk(path: Path) -> Json:
    """Room at a place, in bytes and inodes (`files`; None where a file system makes them as it goes)."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return {"fault": error.strerror or str(error)}
    files = {"files_free": disk.f_favail, "files": disk.f_files} if disk.f_files else {}
    return {"free": disk.f_bavail * disk.f_frsize, "total": disk.f_blocks * disk.f_frsize, **files}


def _age(pid: int) -> float | None:
    """Seconds since a process was started (proc(5), stat: starttime, the 20th after the name)."""
    with suppress(OSError, ValueError, IndexError, Fault):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    return None
