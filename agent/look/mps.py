"""NVIDIA's Multi-Process Service for ComfyUI: what its control daemon says, by the commands that it documents.

They go to the standard input of `nvidia-cuda-mps-control` (docs.nvidia.com/deploy/mps, "nvidia-cuda-mps-control");
lists come back as one process id a line.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from agent.files import Fault, Json, read_some, read_text, run
from agent.journal import Settings
from agent.layout import Site
from agent.look.gpu import process
from agent.serve.sandbox import sandboxed
from agent.serve.services import UNITS, manager_of

CONTROL = "nvidia-cuda-mps-control"


def mps(site: Site) -> Json:
    """Whether Hearth turned MPS on here, how its daemon is, its servers with their clients, and what ComfyUI sees.

    `fault` says why the daemon did not answer. `limits` are the unit's; `percent` is what the daemon says of it.
    `service_pid` is ComfyUI's (0: it does not run), `service_knows` whether it was started with the daemon's folder.
    """
    unit = f"{site.service}-mps.service"
    pipes = f"/run/{site.service}-mps"
    control = shutil.which(CONTROL) or ""
    here = Path("/run/systemd/system").is_dir() and site.scope == "system"
    pid = manager_of(site).status()["pid"] if here and site.state.exists() else 0
    found: Json = {
        "on": "mps" in Settings(site).in_force(),
        "control": control,
        "state": "",
        "restarts": 0,
        "limits": dict(
            re.findall(
                r"^Environment=(CUDA_MPS_[A-Z_]*(?:PERCENTAGE|LIMIT))=(\S+)$", read_text(UNITS / unit), re.MULTILINE
            )
        ),
        "percent": "",
        "servers": [],
        "fault": "",
        "service_pid": pid,
        "service_knows": f"CUDA_MPS_PIPE_DIRECTORY={pipes}".encode() in _environment(pid),
    }
    if not (here and found["on"]):
        return found
    shown = run(["systemctl", "show", unit, "--property=ActiveState,SubState,NRestarts"])
    values = dict(line.partition("=")[::2] for line in shown.splitlines())
    found["state"] = f"{values['ActiveState']} ({values['SubState']})"
    found["restarts"] = int(values["NRestarts"])
    if values["ActiveState"] == "active":
        try:
            _ask_all(found, control, pipes, site)
        except Fault as fault:
            found["fault"] = f"{fault}: {fault.report['cause']}"
    return found


def _environment(pid: int) -> list[bytes]:
    return read_some(Path(f"/proc/{pid}/environ")).split(b"\0") if pid else []


def _ask_all(found: Json, control: str, pipes: str, site: Site) -> None:
    def ask(command: str) -> list[str]:
        return _said(control, command, pipes, site)

    found["percent"] = " ".join(ask("get_default_active_thread_percentage"))
    for server in _numbers(ask("get_server_list"))[:SERVERS]:
        clients = [process(each) for each in _numbers(ask(f"get_client_list {server}"))[:CLIENTS]]
        state = " ".join(ask(f"get_server_status {server}"))
        found["servers"].append({"pid": server, "state": state, "clients": clients})


def _numbers(lines: list[str]) -> list[int]:
    return [int(each) for each in lines if each.isdecimal()]


SERVERS, CLIENTS = 8, 100
"""That are told of: a daemon has a server for each user, and a server takes 60 clients."""

SECONDS, LONGEST = 5, 65_536
"""For an answer, and bytes of one: the daemon runs as the service does, and may have been taken over."""


def _said(control: str, command: str, pipes: str, site: Site) -> list[str]:
    """What the daemon answers, asked by its own user in its own unit's sandbox; raises Fault.

    A process of that user outside of it would be a way out for ComfyUI's (/proc/PID/root).
    """
    unit = read_text(UNITS / f"{site.service}-mps.service")
    release = {"environment": {"CUDA_MPS_PIPE_DIRECTORY": pipes, "PATH": "/usr/bin:/bin"}}
    argv = ["/bin/sh", "-c", 'echo "$1" | "$0"', control, command]
    try:
        said = sandboxed(site, unit, argv, release, seconds=SECONDS, most=LONGEST).decode(errors="replace")
    except Fault as fault:
        raise Fault("step", "the MPS daemon does not answer", fault.report["cause"] or str(fault)) from fault
    return [line.strip() for line in said.splitlines() if line.strip()]
