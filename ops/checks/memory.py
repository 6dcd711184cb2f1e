"""Checks of memory: killed processes, failed allocations, and the free memory of a GPU with shared memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from core import console
from ops.checks.case import Case, Check
from ops.status import Problem

if TYPE_CHECKING:
    from ops.checks.case import Found


def _out_of_memory(case: Case) -> Found:
    less = f'modes = ["low-memory"] for {case.target.name}, then inv deploy {case.at}'
    if case.probe.oom_kills or case.probe.result == "oom-kill":
        limit = case.target.profile.memory_max
        yield Problem(
            "the kernel killed ComfyUI: out of memory", f"raise memory_max ({limit}), or {less}" if limit else less
        )
    elif killed := [line for line in case.probe.kernel.lines if "Killed process" in line or "oom-kill" in line]:
        yield Problem(f"the kernel killed a process: {killed[-1].strip()[:120]}", less)
    if refused := [line for line in case.lines if re.search(r"Got an OOM|OutOfMemoryError|CUDA out of memory", line)]:
        if fragments := re.findall(r"([\d.]+ GiB) is reserved by PyTorch but unallocated", refused[-1]):
            less += f'; {fragments[0]} is fragmented: modes = ["native-allocator"] may help'
        times = f"{len(refused)} times in the log" if len(refused) > 1 else "once in the log"
        yield Problem(f"the GPU ran out of memory ({times}): {refused[-1].strip()[:120]}", less)


def _unified(case: Case) -> Found:
    if not any(gpu.unified for gpu in case.facts.gpus):
        return
    memory = case.live.memory
    total, free, cached = (memory.get(name, 0) for name in ("MemTotal", "MemFree", "Cached"))
    if total and free < total // 5 and cached > total // 4:
        yield Problem(
            f"the page cache holds {console.size(cached)} of {console.size(total)}; {console.size(free)} is free",
            f"inv drop-caches {case.at}",
        )
    swapped = memory.get("SwapTotal", 0) - memory.get("SwapFree", 0)
    if swapped > total // 20:
        yield Problem(f"{console.size(swapped)} is swapped out, which slows the GPU down", f"inv tune {case.at}")


CHECKS = (
    Check(
        name="out-of-memory",
        question="Did anything run out of memory?",
        detected_by="the unit's cgroup, systemd's result, the kernel log of a week, and ComfyUI's log of a day",
        fix='modes = ["low-memory"] for the host (or a larger `memory_max`, if that is the limit), then inv deploy',
        find=_out_of_memory,
    ),
    Check(
        name="unified-memory",
        question="If CPU and GPU share the memory, is enough of it free for the GPU?",
        detected_by="the page cache and swap in /proc/meminfo",
        fix="inv drop-caches frees the page cache; inv tune lists swappiness",
        severity="warning",
        find=_unified,
    ),
)
