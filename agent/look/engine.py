"""The container engine: Podman, its generator, control groups, subordinate ids, and the GPU's CDI devices."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, read_text
from agent.layout import Layout
from agent.processes import run
from agent.schema.facts import Engine
from agent.serve.systemd import login

CGROUPS = Path("/sys/fs/cgroup")
CDI = (Path("/etc/cdi"), Path("/run/cdi"))
SUBIDS = (Path("/etc/subuid"), Path("/etc/subgid"))
GENERATORS = ("/usr/lib/systemd", "/lib/systemd", "/usr/local/lib/systemd", "/etc/systemd")


def engine(layout: Layout) -> Engine:
    """Return what this host has for containers."""
    version = ""
    if program := shutil.which("podman"):
        with suppress(OSError, AgentError):
            version = (re.findall(r"version (\S+)", run([program, "--version"], timeout=20)) or ["?"])[0]
    kind = "system" if layout.scope == "system" else "user"
    return Engine(
        version=version,
        quadlet=any(Path(each, f"{kind}-generators/podman-{kind}-generator").exists() for each in GENERATORS),
        controllers=_controllers(layout),
        subids=all(map(_listed, SUBIDS)),
        devices=tuple(sorted({device for folder in CDI for device in _devices(folder)})),
    )


def _controllers(layout: Layout) -> tuple[str, ...] | None:
    """Return the controllers for units of the scope; a login's systemd gets those that the system delegates."""
    if not (CGROUPS / "cgroup.controllers").exists():
        return None
    own = CGROUPS / f"user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service"
    place = own if layout.scope == "user" and own.exists() else CGROUPS
    return tuple(read_text(place / "cgroup.controllers").split())


def _listed(path: Path) -> bool:
    """Return whether the login has a range in a file such as /etc/subuid."""
    return bool(re.search(rf"^({re.escape(login())}|{os.getuid()}):\d+:[1-9]", read_text(path), re.MULTILINE))


def _devices(folder: Path) -> list[str]:
    """Return the GPU's devices in the CDI files of a folder, which are YAML or JSON."""
    found: list[str] = []
    for path in [*folder.glob("*.yaml"), *folder.glob("*.json")]:
        text = read_text(path)
        if re.search(r"""["']?kind["']?:\s*["']?nvidia\.com/gpu\b""", text):
            names = re.findall(r"""["']?name["']?:\s*["']?([\w.:-]+)""", text)
            found += [f"nvidia.com/gpu={name}" for name in names]
    return found
