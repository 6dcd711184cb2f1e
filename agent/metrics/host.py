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

from agent.files import AgentError, meminfo, recorded
from agent.journal import DEPLOYS, history, last
from agent.layout import Layout
from agent.look.gpu import Nvml
from agent.schema.manifest import ReleaseManifest
from agent.schema.records import Proven
from agent.serve.systemd import Systemd

Metrics = Iterable[Metric]
T = TypeVar("T")


class Kept:
    """A cache of loaded files, refreshed when they change: some are long, most stay unchanged for weeks."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[int, int], Any]] = {}

    def get(self, path: Path, load: Callable[[Path], T]) -> T:
        """Return the result of `load` for the file. Raises OSError if it does not exist."""
        status = path.stat()
        mark = (status.st_mtime_ns, status.st_size)
        if self._kept.get(path, (None,))[0] != mark:
            self._kept[path] = mark, load(path)
        found: T = self._kept[path][1]
        return found


class Release:
    """Metrics of the current release, its health gate, and the last deploy."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._kept = Kept()

    def __call__(self) -> Metrics:
        """Yield the metrics. Raises AgentError if `current` is not Hearth's link."""
        if release := self._layout.release():
            place = self._layout.releases / release
            yield self._kept.get(place / "release.json", _info)
            yield from self._gate(place / "proven")
        if self._layout.history.exists():
            yield from self._kept.get(self._layout.history, lambda _: _deploy(self._layout))

    def _gate(self, proven: Path) -> Metrics:
        passed = proven.exists()
        yield GaugeMetricFamily(
            "hearth_gate_success", "Whether the current release has passed its health gate.", value=passed
        )
        if passed:
            at = self._kept.get(proven, lambda path: _seconds(recorded(path, Proven).at))
            name = "hearth_gate_timestamp_seconds"
            yield GaugeMetricFamily(name, "When the current release last passed its health gate.", value=at)


def _info(path: Path) -> Metric:
    manifest = recorded(path, ReleaseManifest)
    labels = {name: str(getattr(manifest, name)) for name in ("version", "torch", "stack", "profile", "python")}
    labels["kernels"] = ", ".join(f"{name} {version}" for name, version in sorted(manifest.kernels.items()))
    # The attention verified by the gate; empty if ComfyUI selects it.
    labels["attention"] = manifest.gate.attention
    return InfoMetricFamily("hearth_release", "The active release.", {"release": manifest.id, **labels})


def _deploy(layout: Layout) -> list[Metric]:
    """Return the result and time of the last deploy or rollback."""
    ended = last(history(layout), *DEPLOYS)
    if not ended:
        return []
    what = "Whether the last deploy or rollback succeeded."
    when = "When the last deploy or rollback ended."
    return [
        GaugeMetricFamily("hearth_deploy_success", what, value=ended["result"] == "done"),
        GaugeMetricFamily("hearth_deploy_timestamp_seconds", when, value=_seconds(ended["at"])),
    ]


def _seconds(at: str) -> float:
    """Convert a journal time to seconds since 1970."""
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def service(layout: Layout) -> Metrics:
    """Yield the state of ComfyUI's unit and main process. Raises OSError or SubprocessError."""
    words = ["systemctl", *(["--user"] if layout.scope == "user" else []), "show", f"{layout.service}.service"]
    done = subprocess.run(
        [*words, "--property=ActiveState,NRestarts,MainPID"], capture_output=True, text=True, timeout=1.5, check=True
    )
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines())
    active = shown["ActiveState"] == "active"
    yield GaugeMetricFamily("hearth_service_active", "Whether ComfyUI's systemd unit is active.", value=active)
    yield CounterMetricFamily(
        "hearth_service_restarts",
        "Automatic restarts of ComfyUI by systemd.",
        value=int(shown["NRestarts"]),
    )
    if pid := Systemd(layout).process(int(shown["MainPID"])):
        yield from ProcessCollector("hearth_service", lambda: pid, registry=None).collect()


def memory() -> Metrics:
    """Yield the machine's memory; with unified memory, it is also the GPU's."""
    machine = meminfo()
    yield GaugeMetricFamily("hearth_memory_size_bytes", "Size of the machine's memory.", value=machine["MemTotal"])
    what = "Memory available without swapping."
    yield GaugeMetricFamily("hearth_memory_available_bytes", what, value=machine["MemAvailable"])


def disk(layout: Layout, place: Path) -> Metrics:
    """Yield the disk space at a path, unless it is on the prefix's file system. Raises OSError."""
    if place != layout.prefix and place.stat().st_dev == layout.prefix.stat().st_dev:
        return
    room = os.statvfs(place)
    for name, what, blocks in (
        ("hearth_disk_size_bytes", "Size of the file system at a path.", room.f_blocks),
        (
            "hearth_disk_available_bytes",
            "Free space for unprivileged users in the file system at a path.",
            room.f_bavail,
        ),
    ):
        metric = GaugeMetricFamily(name, what, labels=["path"])
        metric.add_metric([str(place)], blocks * room.f_frsize)
        yield metric


_GPU = (
    ("memory_total", "memory_size_bytes", "Size of the GPU's memory; the machine's, if the GPU shares it.", 1),
    ("memory_used", "memory_used_bytes", "GPU memory in use.", 1),
    ("utilization", "utilization_ratio", "Share of the time during which the GPU was busy.", 100),
    ("temperature", "temperature_celsius", "The GPU's temperature.", 1),
    ("power", "power_watts", "The GPU's power draw.", 1),
    ("power_limit", "power_limit_watts", "The GPU's power limit.", 1),
)
"""Key in `agent.look.gpu`, metric name, help, and divisor to the base unit."""

_NAMES = ("uuid", "name", "driver", "cuda", "capability")


class Gpus:
    """Metrics of the GPUs. NVML stays initialised: initialisation can take a second and wakes sleeping GPUs."""

    def __init__(self, *, needed: bool) -> None:
        self._needed = needed
        self._nvml: Nvml | None = None

    def __call__(self) -> Metrics:
        """Return the metrics. Raises AgentError if the driver does not respond and a GPU is needed."""
        try:
            self._nvml = self._nvml or Nvml()
            found = self._nvml.gpus()
        except AgentError:
            self._close()
            if self._needed:
                raise
            return []
        if not all(gpu["name"] for gpu in found):  # GPU lost or driver replaced: reinitialise next time
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
