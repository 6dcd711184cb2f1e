"""The NVIDIA GPUs, told by the driver's own library (NVML): by ctypes, since a host has nothing but Python.

Any call may be one that this GPU does not support, may fail midway, or answer nonsense. That one value is None then,
and the GPU's `unsupported` names it or its `faults` say why. Functions, structures and constants are those of
nvidia-ml-py 13.615.71 (`pynvml.py`).
"""

from __future__ import annotations

import ctypes
import pwd
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from agent.files import Fault, Json, meminfo, read_some, read_text

T = TypeVar("T")

UNIFIED = ("12.1",)
"""Capabilities whose GPUs share the machine's memory (GB10). NVML does not tell how much of it they have, or tells all
that the machine has (nvitop#208, nvtop#463)."""

_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}  # NVML_COMPUTEMODE_*; 1 is not supported any more
_NOT_SUPPORTED, _INSUFFICIENT_SIZE = 3, 7
_UNTOLD = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
_PIDS = 1 << 22  # the kernel's PID_MAX_LIMIT


class _Memory(ctypes.Structure):
    """nvmlMemory_t: the first version, which every driver has. `used` holds what the driver reserves, too."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, in percent of the last sample period."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Process(ctypes.Structure):
    """nvmlProcessInfo_v2_t, which the functions `_v3` fill.

    Drivers 535.43 to 535.86 alone filled a longer one (nvitop#79, #89); no stack runs on any that old.
    """

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Error(Exception):
    """Why a value is not told; `code` is NVML's own, 0 for an answer that makes no sense."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class Nvml:
    """The library, ready until the block ends. Raises Fault where there is none, or no driver behind it."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libnvidia-ml.so.1")
            self._library.nvmlErrorString.restype = ctypes.c_char_p
            self._call("nvmlInit_v2")
        except (OSError, AttributeError, _Error) as error:
            hint = "on the host: nvidia-smi must list the GPU; install or load the NVIDIA driver"
            raise Fault("gpu", "the NVIDIA driver's library (NVML) does not answer", str(error), hint) from error

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(_Error):
            self._call("nvmlShutdown")

    def gpus(self) -> list[Json]:
        """Every GPU as it is now; raises Fault when not even their number is told."""
        try:
            count = self._number(1000, "nvmlDeviceGetCount_v2")
        except _Error as error:
            raise Fault("gpu", "the NVIDIA driver does not tell how many GPUs there are", str(error)) from error
        return [self._gpu(index) for index in range(count)]

    def _gpu(self, index: int) -> Json:
        faults: list[str] = []
        unsupported: list[str] = []
        device = ctypes.c_void_p()
        try:
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        except _Error as error:
            faults.append(f"device: {error}")

        def tell(what: str, ask: Callable[..., T], *words: Any) -> T | None:
            try:
                return ask(*words) if device else None  # without a device the one fault says it all
            except _Error as error:
                if error.code == _NOT_SUPPORTED:
                    unsupported.append(what)
                else:
                    faults.append(f"{what}: {error}")
                return None

        capability = tell("capability", self._capability, device)
        total, used, source = tell("memory", self._memory, device, capability) or (None, None, None)
        busy, memory_busy = tell("utilization", self._utilization, device) or (None, None)
        processes: list[Json] = []
        for kind, name in (("compute", "Compute"), ("graphics", "Graphics"), ("mps", "MPSCompute")):
            ask = f"nvmlDeviceGet{name}RunningProcesses_v3"
            processes += tell(f"{kind} processes", self._processes, ask, device, kind, total, faults) or []
        return {
            "index": index,
            "name": tell("name", self._text, "nvmlDeviceGetName", device),
            "uuid": tell("uuid", self._text, "nvmlDeviceGetUUID", device),
            "capability": capability,
            "driver": tell("driver", self._text, "nvmlSystemGetDriverVersion"),
            "cuda": tell("cuda", self._cuda),
            "memory_total": total,
            "memory_used": used,
            "unified": source == "meminfo",
            "memory_source": source,
            "utilization": busy,
            "memory_utilization": memory_busy,
            "temperature": tell("temperature", self._number, 150, "nvmlDeviceGetTemperature", device, ctypes.c_uint(0)),
            "power": tell("power", self._watts, "nvmlDeviceGetPowerUsage", device),
            "power_limit": tell("power_limit", self._watts, "nvmlDeviceGetEnforcedPowerLimit", device),
            "clock_sm": tell("clock_sm", self._clock, device, 1),  # NVML_CLOCK_SM
            "clock_memory": tell("clock_memory", self._clock, device, 2),  # NVML_CLOCK_MEM
            "persistence": tell("persistence", self._persistence, device),
            "compute_mode": tell("compute_mode", self._compute_mode, device),
            "processes": processes,
            "unsupported": unsupported,
            "faults": faults,
        }

    def _call(self, name: str, *words: object) -> None:
        """Call a function of the library; raises _Error unless it succeeds."""
        try:
            code = getattr(self._library, name)(*words)
        except AttributeError:
            raise _Error(f"the driver has no {name}") from None
        if code:
            said = self._library.nvmlErrorString(code)
            raise _Error(said.decode(errors="replace") if said else f"error {code}", code)

    def _number(self, most: int, name: str, *words: object) -> int:
        found = ctypes.c_uint()
        self._call(name, *words, ctypes.byref(found))
        return _within(found.value, most)

    def _text(self, name: str, *words: object) -> str:
        found = ctypes.create_string_buffer(96)  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, the largest of these
        self._call(name, *words, found, ctypes.c_uint(len(found)))
        text = found.value.decode(errors="replace")
        if not text.isprintable() or not text:
            raise _Error(f"answers {text!r}")
        return text

    def _watts(self, name: str, device: ctypes.c_void_p) -> float:
        return self._number(5_000_000, name, device) / 1000

    def _clock(self, device: ctypes.c_void_p, which: int) -> int:
        return self._number(100_000, "nvmlDeviceGetClockInfo", device, ctypes.c_uint(which))

    def _persistence(self, device: ctypes.c_void_p) -> bool:
        return bool(self._number(1, "nvmlDeviceGetPersistenceMode", device))

    def _cuda(self) -> str:
        version = self._number(99_999, "nvmlSystemGetCudaDriverVersion_v2")
        return f"{version // 1000}.{version % 1000 // 10}"

    def _capability(self, device: ctypes.c_void_p) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        return f"{_within(major.value, 99)}.{_within(minor.value, 9)}"

    def _utilization(self, device: ctypes.c_void_p) -> tuple[int, int]:
        rates = _Utilization()
        self._call("nvmlDeviceGetUtilizationRates", device, ctypes.byref(rates))
        return _within(rates.gpu, 100), _within(rates.memory, 100)

    def _compute_mode(self, device: ctypes.c_void_p) -> str:
        mode = self._number(max(_MODES), "nvmlDeviceGetComputeMode", device)
        return _MODES.get(mode, str(mode))

    def _memory(self, device: ctypes.c_void_p, capability: str | None) -> tuple[int, int, str]:
        """Total, used, and who says so: the machine where the GPU shares its memory."""
        if capability in UNIFIED:
            return _shared_memory()
        memory = _Memory()
        try:
            self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        except _Error as error:
            if error.code == _NOT_SUPPORTED:
                return _shared_memory()
            raise
        if not memory.total or memory.used > memory.total:
            raise _Error(f"answers that {memory.used} of {memory.total} bytes are used")
        return memory.total, memory.used, "nvml"

    def _processes(
        self, name: str, device: ctypes.c_void_p, kind: str, total: int | None, faults: list[str]
    ) -> list[Json]:
        """Who uses the GPU. Asked again when there are more than there were a moment ago."""
        room = 0
        for _ in range(4):
            listed, count = (_Process * room)(), ctypes.c_uint(room)
            try:
                self._call(name, device, ctypes.byref(count), listed if room else None)
                break
            except _Error as error:
                if error.code != _INSUFFICIENT_SIZE:
                    raise
                room = _within(count.value, 10_000) * 2 + 5
        else:
            raise _Error("there are more each time")
        found: list[Json] = []
        for each in listed[: min(count.value, room)]:
            if not 0 < each.pid <= _PIDS:
                faults.append(f"{kind} processes: answers process {each.pid}")
                continue
            held = None if each.used == _UNTOLD else each.used
            if held is not None and total is not None and held > total:
                faults.append(f"{kind} processes: answers that process {each.pid} holds {held} bytes")
                held = None
            found.append({**process(each.pid), "bytes": held, "kind": kind})
        return found


def gpus() -> list[Json]:
    """The NVIDIA GPUs as they are now, one object each; none where there is no driver to ask.

    `index`, `name`, `uuid`, `capability` ("8.9"), `driver`, `cuda` (the newest that the driver runs: "13.0"),
    `memory_total` and `memory_used` in bytes, from `memory_source`: "nvml", or "meminfo" where the GPU shares the
    machine's (`unified`); `utilization` and `memory_utilization` in percent, `temperature` in degrees Celsius, `power`
    and `power_limit` in watts, `clock_sm` and `clock_memory` in MHz, `persistence`, `compute_mode` ("default",
    "prohibited", "exclusive process"), `processes` (see `process`; each with its `bytes` and the `kind` of its work,
    "compute", "graphics" or "mps"). A value that is not told is None: `unsupported` names those that this GPU does not
    have, `faults` has a line for each that failed or made no sense.
    """
    try:
        with Nvml() as nvml:
            return nvml.gpus()
    except Fault:
        return []


def process(pid: int) -> Json:
    """Who a process is: `pid`, `name`, `user` and its systemd `unit`; None is what /proc does not tell.

    Of another namespace, or of a container, the driver may name processes that are not here.
    """
    place = Path(f"/proc/{pid}")
    words = read_some(place / "cmdline", 4096).decode(errors="replace").split("\0")
    name = Path(words[0]).name or read_text(place / "comm").strip()
    if name.startswith("python"):  # which says nothing: what it runs does
        script = next((word for word in words[1:] if word and not word.startswith("-")), "")
        name = f"{name} {Path(script).name}".strip()
    name = "".join(each if each.isprintable() else "?" for each in name)[:60]  # whoever runs it chose it
    user: str | None = None
    with suppress(OSError):
        number = place.stat().st_uid
        try:
            user = pwd.getpwuid(number).pw_name
        except KeyError:
            user = str(number)
    # cgroups(7): the unified hierarchy's line, or that of systemd's own beside the old ones
    lines = read_text(place / "cgroup").splitlines()
    path = next((line for line in lines if line.startswith("0::") or ":name=systemd:" in line), "")
    units = [each for each in path.split("/") if each.endswith((".service", ".scope"))]
    return {"pid": pid, "name": name or None, "user": user, "unit": units[-1] if units else None}


def _shared_memory() -> tuple[int, int, str]:
    machine = meminfo()
    return machine["MemTotal"], machine["MemTotal"] - machine["MemAvailable"], "meminfo"


def _within(value: int, most: int) -> int:
    """A value that can be; raises _Error for another."""
    if not 0 <= value <= most:
        raise _Error(f"answers {value}")
    return value
