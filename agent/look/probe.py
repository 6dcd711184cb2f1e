"""Data for the doctor beyond facts and status: logs, permissions, clock, compilers, containers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.files import AgentError, read_text
from agent.layout import DATA, Layout
from agent.look.facts import PATIENT, check_folders_respond
from agent.look.mps import mps
from agent.look.status import glance
from agent.parts import as_service, forked
from agent.processes import run
from agent.schema.decode import decode
from agent.schema.facts import Questions
from agent.schema.live import Containers, Kernel, Mps, Probe, Probed, Torch
from agent.serve.managers import Manager, manager_of
from agent.serve.sandbox import python_of, sandboxed, unit_of
from agent.serve.systemd import Systemd

LINES = 2000
"""Number of log lines to read: enough for a start with many nodes and for the last failure."""


def probe(layout: Layout, ask: Questions) -> Probed:
    """Collect the data for the doctor's checks. Slow parts run in parallel child processes. Raises AgentError."""
    check_folders_respond(layout, ask, PATIENT)
    manager = manager_of(layout)
    access, log = forked(_access, layout, ask.roots), forked(_log, layout)
    kernel, containers, of_mps = forked(_kernel, layout), forked(_containers), forked(mps, layout)
    seen = glance(layout, ask)
    found = Probe(
        result=_result(manager),
        oom_kills=_oom_kills(manager),
        synchronized=_synchronized(),
        compiler=shutil.which("cc") or shutil.which("gcc") or "",
        headers=_headers(layout),
        installed=_installed(layout, ("torch", "torchvision", "torchaudio")),
        torch=_torch(layout) if layout.current.exists() and seen.live.comfyui.state != "answers" else None,
        access=access(),
        log=tuple((at, line) for at, line in log()),
        kernel=decode(Kernel, kernel()),
        containers=decode(Containers, containers()),
        mps=decode(Mps, of_mps()),
    )
    return Probed(seen.facts, seen.live, found)


def _access(layout: Layout, roots: Sequence[str]) -> dict[str, str]:
    """Return the paths that the service cannot read or write but must: data, code and models."""
    wanted = {str(layout.folder(name)): os.W_OK | os.X_OK for name in DATA if name != "models"}
    wanted |= dict.fromkeys([*roots, str(layout.folder("models"))], os.R_OK | os.X_OK)
    if layout.current.exists():
        wanted |= {str(layout.current / name): os.R_OK | os.X_OK for name in ("app", "env")}

    def look() -> dict[str, str]:
        return {
            path: "read" if mode & os.R_OK else "write"
            for path, mode in wanted.items()
            if os.path.lexists(path) and not os.access(path, mode, effective_ids=True)
        }

    try:
        return as_service(layout, look, seconds=10) if not layout.user or _known(layout) else {}
    except AgentError as error:
        return {str(layout.prefix): error.report["what"]}


def _known(layout: Layout) -> bool:
    with suppress(AgentError, KeyError):
        layout.owner()
        return True
    return False


def _kernel(layout: Layout) -> Kernel:
    """Return the kernel's last 20 OOM-kill and GPU error (Xid) messages of the past 7 days."""
    pattern = r"Out of memory: Killed|oom-kill|NVRM: Xid|Memory cgroup out of memory"
    words = ["journalctl", "--dmesg", "--boot=all", "--since=-7d", "--no-pager", "--output=short-iso", "--quiet"]
    for argv in (words, ["dmesg", "--time-format=iso"]):
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=5)
            if done.returncode == 0 and done.stdout:
                lines = [line for line in done.stdout.splitlines() if re.search(pattern, line)]
                return Kernel(True, tuple(lines[-20:]))
    return Kernel(False, ())


def _log(layout: Layout) -> list[list[Any]]:
    """Return the service's last log lines without colours, with times in seconds since 1970 if known."""
    with suppress(AgentError, OSError):
        return [[at, re.sub(r"\x1b\[[0-9;]*m", "", line)] for at, line in manager_of(layout).timed_log(LINES)]
    return []


def _result(manager: Manager) -> str:
    """Return systemd's result of the last run: success, exit-code, oom-kill, start-limit-hit, …"""
    if not isinstance(manager, Systemd):
        return ""
    with suppress(AgentError):
        return run([*manager.ctl, "show", manager.unit, "--property=Result", "--value"]).strip()
    return ""


def _oom_kills(manager: Manager) -> int:
    """Return the number of processes killed at the service's memory limit since it was started."""
    if isinstance(manager, Systemd):
        with suppress(AgentError, OSError, StopIteration, ValueError):
            group = run([*manager.ctl, "show", manager.unit, "--property=ControlGroup", "--value"]).strip()
            events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text().splitlines() if group else []
            return int(next(line.split()[1] for line in events if line.startswith("oom_kill ")))
    return 0


def _synchronized() -> bool | None:
    """Return whether the clock is synchronised; None if not reported."""
    with suppress(OSError, AgentError):
        answer = run(["timedatectl", "show", "--property=NTPSynchronized", "--value"], timeout=3).strip()
        return {"yes": True, "no": False}.get(answer)
    return None


def _headers(layout: Layout) -> str:
    """Return the path of Python.h for the release's Python, which Triton needs at run time; empty if missing."""
    python = layout.current / "env/bin/python"
    version = re.search(r"^version_info = (\d+\.\d+)", read_text(layout.current / "env/pyvenv.cfg"), re.MULTILINE)
    if not (python.exists() and version):
        return ""
    home = python.resolve().parent.parent
    places = [home / f"include/python{version[1]}/Python.h", Path(f"/usr/include/python{version[1]}/Python.h")]
    return next((str(path) for path in places if path.exists()), "")


def _installed(layout: Layout, names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of these packages in the current environment, from their dist-info."""
    found: dict[str, str] = {}
    for path in layout.current.glob("env/lib/python3*/site-packages/*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
        if name in names:
            found[name] = version
    return found


def _torch(layout: Layout) -> Torch:
    """Return what torch reports about CUDA in the current environment, run in the service's sandbox."""
    script = "import json, torch; found = {'version': torch.__version__, 'available': torch.cuda.is_available()}; "
    script += "print(json.dumps(found))"
    release = layout.manifest(layout.release())
    try:
        argv = [python_of(layout, release), "-I", "-B", "-c", script]
        return decode(Torch, json.loads(sandboxed(layout, unit_of(layout, release), argv, release, seconds=60)))
    except AgentError as error:
        return Torch(error=error.report["cause"] or error.report["what"])
    except (ValueError, TypeError, KeyError) as error:
        return Torch(error=str(error))


def _enabled(unit: str) -> bool:
    """Return whether a system unit is started at boot."""
    with suppress(OSError, AgentError):
        return run(["systemctl", "is-enabled", unit], timeout=5).strip() == "enabled"
    return False


def _containers() -> Containers:
    """Return the installed container engines, NVIDIA's toolkit, and the GPU's CDI devices."""
    toolkit = ""
    devices: list[str] = []
    if program := shutil.which("nvidia-ctk"):
        with suppress(OSError, AgentError):
            toolkit = (re.findall(r"version (\S+)", run([program, "--version"], timeout=5)) or ["?"])[0]
        with suppress(OSError, AgentError):
            devices = re.findall(r"nvidia\.com/gpu=\S+", run([program, "cdi", "list"], timeout=5))
    units = (Path(each, "systemd/system/nvidia-cdi-refresh.service") for each in ("/etc", "/usr/lib"))
    return Containers(
        engines=tuple(name for name in ("docker", "podman") if shutil.which(name)),
        toolkit=toolkit,
        devices=tuple(devices),
        refresh=any(each.exists() for each in units),
        lasting=any(Path("/etc/cdi").glob("*.*")) or _enabled("nvidia-cdi-refresh.service"),
    )
