"""The machine: its system, Python interpreters, packages and GPUs."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.layout import Layout
from agent.schema.facts import Gpu
from agent.schema.live import GpuState
from agent.serve.systemd import rooted


def os_release() -> dict[str, str]:
    """Return the fields of /etc/os-release; empty if it is missing."""
    with suppress(OSError):
        return platform.freedesktop_os_release()
    return {}


def libstdcxx() -> tuple[str, str]:
    """Return the newest GLIBCXX and CXXABI versions of the libstdc++ that programs load; empty if there is none."""
    content = b""
    with suppress(OSError):
        ctypes.CDLL("libstdc++.so.6")
        loaded = re.search(r"/.*/libstdc\+\+\.so\.6.*", Path("/proc/self/maps").read_text())
        content = Path(loaded[0]).read_bytes() if loaded else b""
    return _newest(rb"GLIBCXX_(\d+(?:\.\d+)+)\0", content), _newest(rb"CXXABI_(\d+(?:\.\d+)+)\0", content)


def _newest(version: bytes, content: bytes) -> str:
    """Return the newest version that a pattern finds. One that begins with plain text takes a sixth of the time."""
    found = re.findall(version, content)
    return max(found, key=lambda each: [*map(int, each.split(b"."))], default=b"").decode()


def pythons(layout: Layout, wanted: Sequence[str]) -> dict[str, str]:
    """Return interpreters by minor version. A system service sees no home folders, so it gets only the system's."""
    places = "/usr/bin:/usr/local/bin" if layout.scope == "system" else os.environ.get("PATH", "/usr/bin")
    code = "import sys; print(sys._base_executable, '%d.%d' % sys.version_info[:2])"
    found: dict[str, str] = {}
    for version in wanted:
        program = shutil.which(f"python{version}", path=places)
        if program is None or (layout.scope == "system" and not rooted(Path(program))):  # root will run it
            continue
        if sys.prefix == sys.base_prefix and Path(program).resolve() == Path(sys.executable).resolve():
            found[version] = program  # this interpreter: no need to start it
            continue
        done = subprocess.run([program, "-ISc", code], capture_output=True, text=True)
        answer = done.stdout.split()
        if len(answer) == 2 and answer[1] == version and (layout.scope != "system" or rooted(Path(answer[0]))):
            found[version] = answer[0]
    return found


def packages(wanted: Sequence[str]) -> dict[str, bool]:
    """Return whether each of these Debian packages is installed; empty without dpkg."""
    if not wanted or not shutil.which("dpkg-query"):
        return {}
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *wanted]
    shown = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()  # fails if one is missing
    return {name: f"{name} installed" in shown for name in wanted}


def nvidia(found: Sequence[GpuState]) -> tuple[tuple[Gpu, ...], str]:
    """Return the usable GPUs and the driver's version.

    Omits GPUs that do not report a compute capability (fallen off the bus).
    """
    if not found:
        return _nvidia_smi(), driver_version()
    named = (
        Gpu(
            gpu.name or "NVIDIA GPU",
            gpu.capability,
            None if gpu.unified else gpu.memory_total,
            gpu.unified,
            gpu.processes,
        )
        for gpu in found
        if gpu.capability
    )
    return tuple(named), found[0].driver or driver_version()


def _nvidia_smi() -> tuple[Gpu, ...]:
    """Return the GPUs from nvidia-smi, which may find a driver whose library cannot be loaded (Nix, containers)."""
    if not shutil.which("nvidia-smi"):
        return ()
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    found: list[Gpu] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, capability, memory = (cell.strip() for cell in line.split(","))
        unified = not memory.isdecimal()  # GB10 answers [N/A]
        total = None if unified else int(memory) << 20
        found.append(Gpu(name, capability, total, unified))
    return tuple(found)


def driver_version() -> str:
    """Return the NVIDIA driver's version from its kernel module; empty if not loaded."""
    with suppress(OSError):
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else ""
    return ""
