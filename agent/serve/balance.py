"""The hosts behind a gateway, through HAProxy's runtime socket: their state, and moving people away from one."""

from __future__ import annotations

import csv
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError
from agent.layout import Layout
from agent.processes import run, wait_for
from agent.schema.gateway import Aside, Server

RUN = Path("/run")
SHARED = "comfyui"
"""The group of hosts among which people are spread. People with a host of their own stay there."""

PATIENCE = 8.0
"""How long to wait for another host: the one before it in a group was restarted, and is checked every 2 seconds."""


def servers(layout: Layout) -> list[Server]:
    """Return the hosts; empty if HAProxy does not run."""
    try:
        listed = _ask(layout, "show stat -1 4 -1").removeprefix("# ")
    except OSError:
        return []
    return [
        Server(each["svname"], each["status"].partition(" ")[0], int(each["scur"]))
        for each in csv.DictReader(listed.splitlines())
        if each["pxname"] == SHARED
    ]


def assigned(layout: Layout) -> dict[str, str]:
    """Return each person's host; empty if HAProxy does not run or has one host."""
    try:
        return dict(re.findall(r" key=(\S+) .* server_key=(\S+)", _ask(layout, f"show table {SHARED}")))
    except OSError:
        return {}


def set_state(layout: Layout, host: str, state: str, seconds: int) -> Aside:
    """Set a host's state: "drain" (new people get others), "maint" (everybody does) or "ready".

    It is ready again after `seconds` unless this is called again: who asked may be killed. Raises AgentError.
    """
    known = {each.name for each in servers(layout)}

    def others() -> bool:
        return any(each.name != host and each.state == "UP" for each in servers(layout))

    if host not in known or state not in ("drain", "maint", "ready"):
        return Aside(done=False)
    if state != "ready":
        if not (len(known) > 1 and wait_for(others, PATIENCE)):
            return Aside(done=False)
        _limit(layout, host, seconds)
    with suppress(OSError):
        if said := _ask(layout, _command(host, state)).strip():
            raise AgentError("step", f"HAProxy does not set {host} to {state}", said)
        if state == "ready":
            subprocess.run(["systemctl", "stop", _timer(layout, host)], capture_output=True)
        return Aside(done=True)
    return Aside(done=False)


TELL = """import socket, sys
with socket.socket(socket.AF_UNIX) as there:
    there.connect(sys.argv[1])
    there.sendall(f"{sys.argv[2]}\\n".encode())
    there.recv(99)"""


def _limit(layout: Layout, host: str, seconds: int) -> None:
    """Let systemd set a host to "ready" after `seconds`, counted from the last call. Raises AgentError."""
    timer = _timer(layout, host)
    if subprocess.run(["systemctl", "restart", timer], capture_output=True).returncode == 0:
        return
    words = ["systemd-run", "--quiet", "--collect", f"--unit={timer.removesuffix('.timer')}"]
    words += [f"--on-active={int(seconds)}", "--timer-property=AccuracySec=1s"]
    run([*words, sys.executable, "-I", "-c", TELL, str(_socket(layout)), _command(host, "ready")])


def _timer(layout: Layout, host: str) -> str:
    return f"{layout.service}-gateway-{host}.timer"


def _command(host: str, state: str) -> str:
    return f"set server {SHARED}/{host} state {state}"


def _socket(layout: Layout) -> Path:
    return RUN / f"{layout.service}-gateway/admin.sock"


def _ask(layout: Layout, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as there:
        there.settimeout(5)
        there.connect(str(_socket(layout)))
        there.sendall(f"{command}\n".encode())
        found = b""
        while block := there.recv(65536):
            found += block
    return found.decode(errors="replace")
