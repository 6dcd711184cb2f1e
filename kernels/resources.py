"""CPUs and free memory of this machine, within the limits of its control groups (containers, systemd units)."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def cpus(root: Path = Path("/")) -> int:
    """The CPUs that this process may use: its affinity, limited by CPU quotas and $MAX_JOBS."""
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1  # macOS has no affinity
    quotas = [_read(folder / "cpu.max").split() for folder in _cgroups(root, "cpu")]
    quotas += [
        [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for folder in _cgroups(root, "cpu")
    ]
    most = os.environ.get("MAX_JOBS", "")  # the limit that torch's extension builder reads
    count = min(count, int(most)) if most.isdecimal() else count
    limits = [
        int(quota) / int(period) for quota, period in (each for each in quotas if len(each) == 2) if quota.isdigit()
    ]
    return max(1, min([count, *map(math.ceil, limits)]))


def free_memory(root: Path = Path("/")) -> int:
    """The bytes that new processes can use: MemAvailable, limited by the memory of every control group above."""
    meminfo = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines())
    free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for folder in _cgroups(root, "memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (most := _read(folder / limit).strip()).isdigit():  # else "max": no limit
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                used = int(_read(folder / usage).strip() or 0) - int(stat.get(cached, 0))  # the kernel drops this cache
                free.append(int(most) - used)
    return max(0, min(free))


def pools(need: Mapping[str, int], jobs: int | None, cores: int, free: int) -> dict[str, int]:
    """The number of parallel compiles of each recipe, by the bytes that one compile of it needs.

    Compiles of all recipes run at the same time and fit into `free` bytes together. If one of each does not fit, all
    are in the pool "", which fits the largest. `jobs` is the user's own number.
    """
    if jobs:
        return {"": jobs}
    if not (each := free // sum(need.values())):
        return {"": max(1, min(cores, free // max(need.values())))}
    return dict.fromkeys(need, min(cores, each))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its parents, for both versions of the interface.

    A container may see other paths than /proc names; its own group is then the root of the mount.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            for mount in ("", "unified") if not controllers else (controllers, controller):
                top = root / "sys/fs/cgroup" / mount
                place = top / path.strip("/")
                yield from (each for each in (place, *place.parents) if each.is_relative_to(top) and each.is_dir())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such controller, or no such file in this version
        return ""
