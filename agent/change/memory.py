"""Free memory: ComfyUI's, and the page cache, which competes with unified GPU memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

from agent.api import endpoint, unload
from agent.files import AgentError, Note, meminfo, read_text
from agent.layout import Layout
from agent.look.gpu import gpus
from agent.look.samples import running_job
from agent.schema.change import DropCaches
from agent.schema.live import Freed, GpuMemory, Held
from agent.serve.managers import manager_of, ours

UNCHANGED = 3.0
"""Seconds after each of two requests in which memory starts to fall, if at all. A busy machine took more than 3."""

CACHES = Path("/proc/sys/vm/drop_caches")


def free(layout: Layout, wait: float) -> Freed:
    """Ask ComfyUI to unload its models and clear cached results, and wait up to `wait` seconds. Raises AgentError.

    It does so at once or after the running job (main.py, prompt_worker). `freed` is false if that job is still running.
    """
    end = time.monotonic() + wait
    before = held(layout)
    place = endpoint(layout)
    try:
        unload(place)
        job = running_job(layout)
        while job and running_job(layout) == job:
            if time.monotonic() > end:
                return Freed(False, job, before, held(layout))
            time.sleep(0.25)
        after = _settled(layout, before)
        if not _fell(before, after):
            unload(place)  # ComfyUI misses a request that arrives while its worker collects garbage after a job
            after = _settled(layout, before)
    except (OSError, ValueError) as error:
        raise AgentError(
            "step", "ComfyUI does not answer, so its memory is not freed", str(error), "inv status shows its state"
        ) from error
    return Freed(True, job, before, after)


def held(layout: Layout) -> Held:
    """Return the memory in use."""
    used = (
        GpuMemory(gpu.index, gpu.memory_used, sum(each.bytes or 0 for each in gpu.processes if each.comfyui))
        for gpu in ours(layout, gpus())
    )
    status = read_text(Path(f"/proc/{manager_of(layout).status().pid}/status"))
    resident = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), None)
    return Held(tuple(used), resident, meminfo()["MemAvailable"])


def _settled(layout: Layout, before: Held) -> Held:
    """Return the memory in use once it has stopped falling for a second, or has not fallen for UNCHANGED seconds.

    ComfyUI does not report completion, and starts only when its worker wakes up.
    """
    least, since = before, time.monotonic()
    end = since + 15
    while time.monotonic() < min(end, since + (UNCHANGED if least is before else 1)):
        time.sleep(0.25)
        found = held(layout)
        if _fell(least, found):
            least, since = found, time.monotonic()
    return least if least is not before else held(layout)


def _fell(before: Held, after: Held) -> bool:
    """Return whether ComfyUI's memory is smaller, by more than noise."""
    first, second = (sum(gpu.used or 0 for gpu in each.gpus) + (each.resident or 0) for each in (before, after))
    return second < first - 1_000_000


def drop_caches(layout: Layout, step: DropCaches, note: Note) -> None:
    """Write dirty pages to disk, then drop the kernel's caches. Raises AgentError."""
    before = meminfo()
    os.sync()  # dirty pages cannot be dropped
    try:
        CACHES.write_text("3\n")  # page cache, dentries and inodes (proc(5))
    except OSError as error:
        hint = "in a container this is not possible: do it on the machine that runs the container"
        raise AgentError("step", "the kernel refuses to drop its page cache", str(error), hint) from error
    after = meminfo()
    for what, name in (("the page cache", "Cached"), ("available memory", "MemAvailable")):
        note(f"{what}: {_gb(before[name])} before, {_gb(after[name])} after")


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
