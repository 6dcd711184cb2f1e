"""NVIDIA's Multi-Process Service for ComfyUI: what its control daemon says, by the commands that it documents.

They go to the standard input of `nvidia-cuda-mps-control` (docs.nvidia.com/deploy/mps, "nvidia-cuda-mps-control");
lists come back as one process id a line.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from agent.files import Fault, read_some, read_text
from agent.journal import Settings
from agent.layout import Layout
from agent.look.gpu import process
from agent.processes import run
from agent.schema.live import Mps, MpsClient, MpsServer
from agent.serve.managers import manager_of
from agent.serve.sandbox import sandboxed
from agent.serve.systemd import UNITS

CONTROL = "nvidia-cuda-mps-control"


def mps(layout: Layout) -> Mps:
    """The state of MPS, its servers and their clients."""
    unit = f"{layout.service}-mps.service"
    pipes = f"/run/{layout.service}-mps"
    here = Path("/run/systemd/system").is_dir() and layout.scope == "system"
    pid = manager_of(layout).status().pid if here and layout.state.exists() else 0
    limits = r"^Environment=(CUDA_MPS_[A-Z_]*(?:PERCENTAGE|LIMIT))=(\S+)$"
    found = Mps(
        on="mps" in Settings(layout).in_force(),
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
    except Fault as fault:
        return replace(found, fault=f"{fault}: {fault.report['cause']}")
    return replace(found, percent=percent, servers=servers)


def _environment(pid: int) -> list[bytes]:
    return read_some(Path(f"/proc/{pid}/environ")).split(b"\0") if pid else []


def _ask_all(control: str, pipes: str, layout: Layout) -> tuple[str, tuple[MpsServer, ...]]:
    """The default thread percentage, and the servers; raises Fault."""

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
"""That are told of: a daemon has a server for each user, and a server takes 60 clients."""

SECONDS, LONGEST = 5, 65_536
"""For an answer, and bytes of one: the daemon runs as the service does, and may have been taken over."""


def _said(control: str, command: str, pipes: str, layout: Layout) -> list[str]:
    """What the daemon answers, asked by its own user in its own unit's sandbox; raises Fault.

    A process of that user outside of it would be a way out for ComfyUI's (/proc/PID/root).
    """
    unit = read_text(UNITS / f"{layout.service}-mps.service")
    release = {"environment": {"CUDA_MPS_PIPE_DIRECTORY": pipes, "PATH": "/usr/bin:/bin"}}
    argv = ["/bin/sh", "-c", 'echo "$1" | "$0"', control, command]
    try:
        said = sandboxed(layout, unit, argv, release, seconds=SECONDS, most=LONGEST).decode(errors="replace")
    except Fault as fault:
        raise Fault("step", "the MPS daemon does not answer", fault.report["cause"] or str(fault)) from fault
    return [line.strip() for line in said.splitlines() if line.strip()]
