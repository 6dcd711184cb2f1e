"""State of ComfyUI's NVIDIA Multi-Process Service (MPS), queried from its control daemon.

Commands are written to the standard input of `nvidia-cuda-mps-control` (docs.nvidia.com/deploy/mps,
"nvidia-cuda-mps-control"); lists are returned as one process id per line.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from agent.files import AgentError, read_some, read_text
from agent.journal import SettingsJournal
from agent.layout import Layout
from agent.look.gpu import process
from agent.processes import run
from agent.schema.live import Mps, MpsClient, MpsServer
from agent.schema.manifest import ReleaseManifest
from agent.serve.managers import manager_of
from agent.serve.sandbox import sandboxed
from agent.serve.systemd import UNITS

CONTROL = "nvidia-cuda-mps-control"


def mps(layout: Layout) -> Mps:
    """Return the state of MPS, its servers and their clients. Raises AgentError if systemctl fails."""
    unit = f"{layout.service}-mps.service"
    pipes = f"/run/{layout.service}-mps"
    here = Path("/run/systemd/system").is_dir() and layout.scope == "system"
    pid = manager_of(layout).status().pid if here and layout.state.exists() else 0
    limits = r"^Environment=(CUDA_MPS_[A-Z_]*(?:PERCENTAGE|LIMIT))=(\S+)$"
    found = Mps(
        on="mps" in SettingsJournal(layout).in_force(),
        control=shutil.which(CONTROL) or "",
        limits=dict(re.findall(limits, read_text(UNITS / unit), re.MULTILINE)),
        service_pid=pid,
        service_knows=f"CUDA_MPS_PIPE_DIRECTORY={pipes}".encode() in _environment(pid),
    )
    if not (here and found.on):
        return found
    shown = run(["systemctl", "show", unit, "--property=ActiveState,SubState,NRestarts"])
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    state = f"{values['ActiveState']} ({values['SubState']})"
    found = replace(found, state=state, restarts=int(values["NRestarts"]))
    if values["ActiveState"] != "active":
        return found
    try:
        percent, servers = _ask_all(found.control, pipes, layout)
    except AgentError as error:
        return replace(found, error=f"{error}: {error.report['cause']}")
    return replace(found, percent=percent, servers=servers)


def _environment(pid: int) -> list[bytes]:
    return read_some(Path(f"/proc/{pid}/environ")).split(b"\0") if pid else []


def _ask_all(control: str, pipes: str, layout: Layout) -> tuple[str, tuple[MpsServer, ...]]:
    """Return the default active thread percentage and the servers. Raises AgentError."""

    def ask(command: str) -> list[str]:
        return _said(control, command, pipes, layout)

    percent = " ".join(ask("get_default_active_thread_percentage"))
    servers: list[MpsServer] = []
    for server in _numbers(ask("get_server_list"))[:SERVERS]:
        found = [process(each) for each in _numbers(ask(f"get_client_list {server}"))[:CLIENTS]]
        state = " ".join(ask(f"get_server_status {server}"))
        servers.append(
            MpsServer(server, state, tuple(MpsClient(each["pid"], each["name"], each["user"]) for each in found))
        )
    return percent, tuple(servers)


def _numbers(lines: list[str]) -> list[int]:
    return [int(each) for each in lines if each.isdecimal()]


SERVERS, CLIENTS = 8, 100
"""Maximum numbers reported: a daemon runs one server per user, and a server accepts 60 clients."""

SECONDS, LONGEST = 5, 65_536
"""Limits for a reply, in seconds and bytes: the daemon runs as the service user and may be compromised."""


def _said(control: str, command: str, pipes: str, layout: Layout) -> list[str]:
    """Send a command as the daemon's user in its unit's sandbox; return the lines of the reply. Raises AgentError.

    Outside the sandbox, a process of that user would let ComfyUI escape (/proc/PID/root).
    """
    unit = read_text(UNITS / f"{layout.service}-mps.service")
    release = ReleaseManifest(environment={"CUDA_MPS_PIPE_DIRECTORY": pipes, "PATH": "/usr/bin:/bin"})
    argv = ["/bin/sh", "-c", 'echo "$1" | "$0"', control, command]
    try:
        output = sandboxed(layout, unit, argv, release, seconds=SECONDS, most=LONGEST).decode(errors="replace")
    except AgentError as error:
        raise AgentError("step", "the MPS daemon does not answer", error.report["cause"] or str(error)) from error
    return [line.strip() for line in output.splitlines() if line.strip()]
