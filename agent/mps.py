"""NVIDIA's Multi-Process Service for ComfyUI: what its control daemon says, by the commands that it documents.

They go to the standard input of `nvidia-cuda-mps-control` (docs.nvidia.com/deploy/mps, "nvidia-cuda-mps-control");
lists come back as one process id a line.
"""

from __future__ import annotations

import pwd
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.files import Fault, Json, read_some, read_text, run
from agent.gpu import process
from agent.journal import Settings
from agent.services import UNITS, manager_of
from agent.site import Site

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
    for server in _numbers(ask("get_server_list")):
        clients = [process(each) for each in _numbers(ask(f"get_client_list {server}"))]
        state = " ".join(ask(f"get_server_status {server}"))
        found["servers"].append({"pid": server, "state": state, "clients": clients})


def _numbers(lines: list[str]) -> list[int]:
    return [int(each) for each in lines if each.isdecimal()]


def _said(control: str, command: str, pipes: str, site: Site) -> list[str]:
    """What the daemon answers, asked by its own user; raises Fault when it does not within five seconds."""
    who: dict[str, Any] = {}
    with suppress(KeyError):
        entry = pwd.getpwnam(site.user)
        who = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    env = {"CUDA_MPS_PIPE_DIRECTORY": pipes, "PATH": "/usr/bin:/bin"}
    try:
        done = subprocess.run(
            [control], input=f"{command}\n", env=env, cwd="/", capture_output=True, text=True, timeout=5, **who
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault("step", "the MPS daemon does not answer", str(error)) from error
    if done.returncode:
        raise Fault("step", "the MPS daemon does not answer", (done.stderr or done.stdout).strip()[-300:])
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
