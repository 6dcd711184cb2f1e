"""Metrics of the host: its release and history, its service, memory, disks and GPUs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from agent.files import Fault, meminfo, read
from agent.journal import DEPLOYS, history, last
from agent.layout import Site
from agent.look.gpu import Nvml

Metrics = Iterable[Metric]
T = TypeVar("T")


class Kept:
    """The content of files, cached until they change: some are long, and most stay unchanged for weeks."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[int, int], Any]] = {}

    def get(self, path: Path, load: Callable[[Path], T]) -> T:
        """The result of `load` for the file; raises OSError without a file."""
        status = path.stat()
        mark = (status.st_mtime_ns, status.st_size)
        if self._kept.get(path, (None,))[0] != mark:
            self._kept[path] = mark, load(path)
        found: T = self._kept[path][1]
        return found


class Release:
    """The current release, how it passed its health gate, and how the last deploy ended."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._kept = Kept()

    def __call__(self) -> Metrics:
        """Raises Fault when `current` is not Hearth's link."""
        if release := self._site.release():
            place = self._site.releases / release
            yield self._kept.get(place / "release.json", _info)
            yield from self._gate(place / "proven")
        if self._site.history.exists():
            yield from self._kept.get(self._site.history, lambda _: _deploy(self._site))

    def _gate(self, proven: Path) -> Metrics:
        passed = proven.exists()
        yield GaugeMetricFamily(
            "hearth_gate_success", "Whether the current release has passed its health gate.", value=passed
        )
        if passed:
            at = self._kept.get(proven, lambda path: _seconds(read(path)["at"]))
            name = "hearth_gate_timestamp_seconds"
            yield GaugeMetricFamily(name, "When the current release last passed its health gate.", value=at)


def _info(path: Path) -> Metric:
    manifest = read(path)
    told = {name: str(manifest[name]) for name in ("version", "torch", "stack", "profile", "python")}
    told["kernels"] = ", ".join(f"{name} {version}" for name, version in sorted(manifest["kernels"].items()))
    # The attention that the gate verified; empty where ComfyUI chooses.
    told["attention"] = manifest["gate"]["attention"]
    return InfoMetricFamily("hearth_release", "The release in service.", {"release": manifest["id"], **told})


def _deploy(site: Site) -> list[Metric]:
    """How the last deploy or rollback ended."""
    ended = last(history(site), *DEPLOYS)
    if not ended:
        return []
    what = "Whether the last deploy or rollback was done."
    when = "When the last deploy or rollback ended."
    return [
        GaugeMetricFamily("hearth_deploy_success", what, value=ended["result"] == "done"),
        GaugeMetricFamily("hearth_deploy_timestamp_seconds", when, value=_seconds(ended["at"])),
    ]


def _seconds(at: str) -> float:
    """A time of the journal, in seconds since 1970."""
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def service(site: Site) -> Metrics:
    """ComfyUI's unit as systemd knows it, and its main process. Raises OSError or SubprocessError."""
    words = ["systemctl", *(["--user"] if site.scope == "user" else []), "show", f"{site.service}.service"]
    done = subprocess.run(
        [*words, "--property=ActiveState,NRestarts,MainPID"], capture_output=True, text=True, timeout=1.5, check=True
    )
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines())
    active = shown["ActiveState"] == "active"
    yield GaugeMetricFamily("hearth_service_active", "Whether systemd runs ComfyUI's unit.", value=active)
    yield CounterMetricFamily(
        "hearth_service_restarts",
        "How often systemd has started ComfyUI again by itself.",
        value=int(shown["NRestarts"]),
    )
    if int(shown["MainPID"]):
        yield from ProcessCollector("hearth_service", lambda: shown["MainPID"], registry=None).collect()


def memory() -> Metrics:
    """The machine's memory; with unified memory it is the GPU's, too."""
    machine = meminfo()
    yield GaugeMetricFamily("hearth_memory_size_bytes", "The machine's memory.", value=machine["MemTotal"])
    what = "Memory that can be had without swapping."
    yield GaugeMetricFamily("hearth_memory_available_bytes", what, value=machine["MemAvailable"])


def disk(site: Site, place: Path) -> Metrics:
    """Space at a path; for the data only if its file system is not the prefix's. Raises OSError."""
    if place != site.prefix and place.stat().st_dev == site.prefix.stat().st_dev:
        return
    room = os.statvfs(place)
    for name, what, blocks in (
        ("hearth_disk_size_bytes", "Size of the file system at a path.", room.f_blocks),
        ("hearth_disk_available_bytes", "Room for those who are not root in the file system at a path.", room.f_bavail),
    ):
        metric = GaugeMetricFamily(name, what, labels=["path"])
        metric.add_metric([str(place)], blocks * room.f_frsize)
        yield metric


_GPU = (
    ("memory_total", "memory_size_bytes", "The GPU's memory; of one that shares the machine's, that.", 1),
    ("memory_used", "memory_used_bytes", "Memory in use.", 1),
    ("utilization", "utilization_ratio", "Part of the time in which the GPU computed.", 100),
    ("temperature", "temperature_celsius", "The GPU's temperature.", 1),
    ("power", "power_watts", "The power that the GPU draws.", 1),
    ("power_limit", "power_limit_watts", "The power that the GPU may draw.", 1),
)
"""Key in `agent.look.gpu`, name of the metric, its help, and the divisor that gives the base unit."""

_NAMES = ("uuid", "name", "driver", "cuda", "capability")


class Gpus:
    """The NVIDIA GPUs. NVML stays initialised: initialising can take a second, and wakes GPUs that sleep."""

    def __init__(self, *, needed: bool) -> None:
        self._needed = needed
        self._nvml: Nvml | None = None

    def __call__(self) -> Metrics:
        """Raises Fault when the driver does not answer and a GPU is needed."""
        try:
            self._nvml = self._nvml or Nvml()
            found = self._nvml.gpus()
        except Fault:
            self._close()
            if self._needed:
                raise
            return []
        if not all(gpu["name"] for gpu in found):  # one is lost, or the driver was replaced: initialise again next time
            self._close()
        up = GaugeMetricFamily("hearth_gpu_up", "Whether the driver reaches the GPU.", labels=["gpu"])
        info = InfoMetricFamily("hearth_gpu", "The GPUs.", labels=["gpu"])
        metrics = {key: GaugeMetricFamily(f"hearth_gpu_{name}", what, labels=["gpu"]) for key, name, what, _ in _GPU}
        for gpu in found:
            up.add_metric([str(gpu["index"])], bool(gpu["name"]))
            names = {name: str(gpu[name] or "") for name in _NAMES}
            info.add_metric([str(gpu["index"])], {**names, "unified": str(gpu["unified"]).lower()})
            for key, _, _, units in _GPU:
                if gpu[key] is not None:
                    metrics[key].add_metric([str(gpu["index"])], gpu[key] / units)
        return [metric for metric in (up, info, *metrics.values()) if metric.samples]

    def _close(self) -> None:
        if self._nvml:
            self._nvml.__exit__()
        self._nvml = None
