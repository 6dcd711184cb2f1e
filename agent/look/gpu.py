"""Query NVIDIA GPUs through the driver's library (NVML) with nvidia-ml-py (`import pynvml`).

A query may be unsupported, fail, or return an impossible value. The value is then None, and is listed in the GPU's
`unsupported` or explained in its `errors`. pynvml is imported only if the driver's library exists, since the import
takes about 20 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.files import AgentError, Json, meminfo, read_some, read_text
from agent.look.accounts import user_name

UNIFIED = ("12.1",)
"""Compute capabilities of GPUs with unified memory (GB10). NVML does not report their memory, or reports all of the
machine's (nvitop#208, nvtop#463)."""

_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}  # NVML_COMPUTEMODE_*; 1 is no longer supported
_PIDS = 1 << 22  # the kernel's PID_MAX_LIMIT


class Nvml:
    """NVML, initialised until the end of the `with` block. Raises AgentError without the library or a driver."""

    def __init__(self) -> None:
        try:
            ctypes.CDLL("libnvidia-ml.so.1")
            import pynvml

            self._nvml: Any = pynvml
            pynvml.nvmlInit()
        except Exception as error:  # OSError or NVMLError, which is unknown before the import
            hint = "on the host: nvidia-smi must list the GPU; install or load the NVIDIA driver"
            raise AgentError("gpu", "the NVIDIA driver's library (NVML) does not answer", str(error), hint) from error

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def gpus(self) -> list[Json]:
        """Return the current state of all GPUs. Raises AgentError if the driver does not report their number."""
        try:
            count = _within(self._nvml.nvmlDeviceGetCount(), 1000)
        except (self._nvml.NVMLError, ValueError) as error:
            raise AgentError("gpu", "the NVIDIA driver does not report the number of GPUs", str(error)) from error
        return [_Device(self._nvml, index).report() for index in range(count)]


class _Device:
    """One GPU; each failed query is added to `errors` or `unsupported`."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml = nvml
        self.index = index
        self.errors: list[str] = []
        self.unsupported: list[str] = []
        self.handle: Any = None
        self.handle = self._get("device", lambda: nvml.nvmlDeviceGetHandleByIndex(index))

    def _get(self, what: str, query: Callable[[], Any]) -> Any:
        """Return a query's result, or record the reason and return None."""
        try:
            return query()
        except self.nvml.NVMLError_NotSupported:
            self.unsupported.append(what)
        except (self.nvml.NVMLError, ValueError) as error:  # ValueError: impossible, or not UTF-8
            self.errors.append(f"{what}: {error}")
        return None

    def report(self) -> Json:
        """Return the GPU's state (see `gpus`). Without a handle, all values are None and `errors` has one entry."""
        nvml, handle = self.nvml, self.handle
        queries: dict[str, Callable[[], Any]] = {
            "name": lambda: _text(nvml.nvmlDeviceGetName(handle)),
            "uuid": lambda: _text(nvml.nvmlDeviceGetUUID(handle)),
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "cuda": lambda: _cuda(nvml.nvmlSystemGetCudaDriverVersion_v2()),
            "temperature": lambda: _within(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), 150),
            "power": lambda: _watts(nvml.nvmlDeviceGetPowerUsage(handle)),
            "power_limit": lambda: _watts(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)),
            "clock_sm": lambda: _within(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), 100_000),
            "clock_memory": lambda: _within(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM), 100_000),
            "persistence": lambda: bool(_within(nvml.nvmlDeviceGetPersistenceMode(handle), 1)),
            "compute_mode": lambda: _compute_mode(nvml.nvmlDeviceGetComputeMode(handle)),
        }

        def get(what: str, query: Callable[[], Any]) -> Any:
            return self._get(what, query) if handle else None

        capability = get("capability", lambda: _capability(*nvml.nvmlDeviceGetCudaComputeCapability(handle)))
        total, used, source = get("memory", lambda: self._memory(capability)) or (None, None, None)
        busy, memory_busy = get("utilization", self._utilization) or (None, None)
        processes: list[Json] = []
        for kind, name in (("compute", "Compute"), ("graphics", "Graphics"), ("mps", "MPSCompute")):
            listed = getattr(nvml, f"nvmlDeviceGet{name}RunningProcesses_v3")
            processes += self._processes(kind, get(f"{kind} processes", lambda: listed(handle)) or [], total)  # noqa: B023
        return {
            "index": self.index,
            "capability": capability,
            "memory_total": total,
            "memory_used": used,
            "unified": source == "meminfo",
            "memory_source": source,
            "utilization": busy,
            "memory_utilization": memory_busy,
            **{what: get(what, query) for what, query in queries.items()},
            "processes": processes,
            "unsupported": self.unsupported,
            "errors": self.errors,
        }

    def _memory(self, capability: str | None) -> tuple[int, int, str]:
        """Return total and used bytes and their source: /proc/meminfo for unified memory. Raises ValueError.

        Uses version 1 of the structure, which every driver supports: `used` includes the driver's reserved memory.
        """
        if capability in UNIFIED:
            return _shared_memory()
        try:
            memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
        except self.nvml.NVMLError_NotSupported:
            return _shared_memory()
        if not memory.total or memory.used > memory.total:
            raise ValueError(f"implausible: {memory.used} of {memory.total} bytes used")
        return memory.total, memory.used, "nvml"

    def _utilization(self) -> tuple[int, int]:
        rates = self.nvml.nvmlDeviceGetUtilizationRates(self.handle)
        return _within(rates.gpu, 100), _within(rates.memory, 100)

    def _processes(self, kind: str, listed: list[Any], total: int | None) -> list[Json]:
        """Return NVML's processes, without impossible ones."""
        found: list[Json] = []
        for each in listed:
            if not 0 < each.pid <= _PIDS:
                self.errors.append(f"{kind} processes: implausible: process {each.pid}")
                continue
            used = each.usedGpuMemory
            if used is not None and total is not None and used > total:
                self.errors.append(f"{kind} processes: implausible: process {each.pid} uses {used} bytes")
                used = None
            found.append({**process(each.pid), "bytes": used, "kind": kind})
        return found


def gpus() -> list[Json]:
    """Return the current state of the NVIDIA GPUs, each the fields of `GpuState`; empty without a driver."""
    try:
        with Nvml() as nvml:
            return nvml.gpus()
    except AgentError:
        return []


def process(pid: int) -> Json:
    """Return a process's `pid`, `name`, `user` and systemd `unit`; None for values that /proc does not show.

    The driver may list processes of another PID namespace or container, which are not in /proc.
    """
    place = Path(f"/proc/{pid}")
    words = read_some(place / "cmdline", 4096).decode(errors="replace").split("\0")
    name = Path(words[0]).name or read_text(place / "comm").strip()
    if name.startswith("python"):  # show the script's name, too
        script = next((word for word in words[1:] if word and not word.startswith("-")), "")
        name = f"{name} {Path(script).name}".strip()
    name = "".join(each if each.isprintable() else "?" for each in name)[:60]  # chosen by the process's owner
    user: str | None = None
    with suppress(OSError):
        user = user_name(place.stat().st_uid)
    # cgroups(7): the line of the unified hierarchy, or of systemd's named v1 hierarchy; a container may have both.
    lines = read_text(place / "cgroup").splitlines()
    paths = [line for line in lines if line.startswith("0::") or ":name=systemd:" in line]
    units = [each for path in paths for each in path.split("/") if each.endswith((".service", ".scope"))]
    return {"pid": pid, "name": name or None, "user": user, "unit": units[-1] if units else None}


def _shared_memory() -> tuple[int, int, str]:
    machine = meminfo()
    return machine["MemTotal"], machine["MemTotal"] - machine["MemAvailable"], "meminfo"


def _within(value: int, most: int) -> int:
    """Return the value. Raises ValueError if it is out of range."""
    if not 0 <= value <= most:
        raise ValueError(f"implausible: {value}")
    return value


def _text(text: str) -> str:
    if not text.isprintable() or not text:
        raise ValueError(f"implausible: {text!r}")
    return text


def _watts(milliwatts: int) -> float:
    return _within(milliwatts, 5_000_000) / 1000


def _cuda(version: int) -> str:
    _within(version, 99_999)
    return f"{version // 1000}.{version % 1000 // 10}"


def _capability(major: int, minor: int) -> str:
    return f"{_within(major, 99)}.{_within(minor, 9)}"


def _compute_mode(mode: int) -> str:
    return _MODES.get(_within(mode, max(_MODES)), str(mode))
