"""The number of parallel compiles: CPUs and memory, within the limits of both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kernels.resources import cpus, free_memory, pools

GB = 10**9


@pytest.mark.parametrize(
    ("need", "jobs", "cores", "free", "expected"),
    [
        ({"a": 1 * GB}, None, 8, 100 * GB, {"a": 8}),
        ({"a": 1 * GB}, None, 8, 3 * GB, {"a": 3}),
        ({"a": 4 * GB, "b": 1 * GB}, None, 16, 22 * GB, {"a": 4, "b": 4}),
        ({"a": 4 * GB, "b": 1 * GB}, None, 16, 4 * GB, {"": 1}),
        ({"a": 4 * GB, "b": 1 * GB}, None, 16, 0, {"": 1}),
        ({"a": 4 * GB}, None, 16, 1 * GB, {"": 1}),
        ({"a": 4 * GB}, 64, 16, 1 * GB, {"": 64}),
    ],
)
def test_compiles_of_all_recipes_fit_into_memory_together(
    need: dict[str, int], jobs: int | None, cores: int, free: int, expected: dict[str, int]
) -> None:
    assert pools(need, jobs, cores, free) == expected


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    listed = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in listed.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
STAT = "anon 5\ninactive_file 1000000\n"
LIMITED = {
    "v2, own group": (
        "0::/a/b\n",
        {"a/b/memory.max": "3000000000\n", "a/b/memory.current": "2000000000\n", "a/b/memory.stat": STAT},
        1_001_000_000,
    ),
    "v2, parent": (
        "0::/a/b\n",
        {"a/b/memory.max": "max\n", "a/memory.max": "500000000\n", "a/memory.current": "100000000\n"},
        400_000_000,
    ),
    "v2, exhausted": ("0::/a\n", {"a/memory.max": "5\n", "a/memory.current": "9\n"}, 0),
    "v2, container": ("0::/\n", {"memory.max": "2000000000\n", "memory.current": "0\n"}, 2_000_000_000),
    "v1": (
        V1,
        {"memory/docker/abc/memory.limit_in_bytes": "3000000000\n", "memory/docker/abc/memory.usage_in_bytes": "0\n"},
        3_000_000_000,
    ),
    "v1, container": (
        V1,
        {"memory/memory.limit_in_bytes": "3000000000\n", "memory/memory.usage_in_bytes": "1000000000\n"},
        2_000_000_000,
    ),
    "v1, no limit": (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8_000_000 * 1024),
    "hybrid": ("0::/a\n", {"unified/a/memory.max": "7\n", "unified/a/memory.current": "0\n"}, 7),
    "no control groups": ("", {}, 8_000_000 * 1024),
}


@pytest.mark.parametrize(("cgroup", "files", "expected"), LIMITED.values(), ids=LIMITED)
def test_memory_is_limited_by_the_control_group(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    root = machine(tmp_path, cgroup, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert free_memory(root) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_cpus_are_limited_by_the_quota(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int | None
) -> None:
    root = machine(tmp_path, cgroup, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert cpus(root) == (expected or len(os.sched_getaffinity(0)))


def test_this_machine_has_a_cpu_and_memory() -> None:
    assert cpus() >= 1
    assert free_memory() > 0


@pytest.mark.parametrize(("most", "expected"), [("1", 1), ("0", 1), ("1000", None), ("many", None), ("", None)])
def test_jobs_are_limited_by_the_variable_of_torch(
    monkeypatch: pytest.MonkeyPatch, most: str, expected: int | None
) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    usual = cpus()
    monkeypatch.setenv("MAX_JOBS", most)
    assert cpus() == (expected or usual)
