"""The hosts behind a gateway, through HAProxy's runtime socket: their state, and moving people away from one."""

from __future__ import annotations

import csv
import socket
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, Json
from agent.layout import Layout
from agent.processes import wait_for

RUN = Path("/run")
SHARED = "comfyui"
"""The group of hosts among which people are spread. People with a host of their own stay there."""

PATIENCE = 8.0
"""How long to wait for another host: the one before it in a group was restarted, and is checked every 2 seconds."""


def servers(layout: Layout) -> list[Json]:
    """Return the `name`, `state` (such as "UP", "DOWN", "DRAIN", "MAINT") and open `requests` of each host.

    Empty if HAProxy does not run.
    """
    try:
        listed = _ask(layout, "show stat -1 4 -1").removeprefix("# ")
    except OSError:
        return []
    return [
        {"name": each["svname"], "state": each["status"].partition(" ")[0], "requests": int(each["scur"])}
        for each in csv.DictReader(listed.splitlines())
        if each["pxname"] == SHARED
    ]


def set_state(layout: Layout, host: str, state: str) -> Json:
    """Set a host's state: "drain" (new people get others), "maint" (everybody does) or "ready".

    Return whether it was `done`: not if people would have no other host, and had better wait. Raises AgentError.
    """
    known = {each["name"] for each in servers(layout)}

    def others() -> bool:
        return any(each["name"] != host and each["state"] == "UP" for each in servers(layout))

    if host not in known or state not in ("drain", "maint", "ready"):
        return {"done": False}
    if state != "ready" and not (len(known) > 1 and wait_for(others, PATIENCE)):
        return {"done": False}
    with suppress(OSError):
        if not (said := _ask(layout, f"set server {SHARED}/{host} state {state}").strip()):
            return {"done": True}
        raise AgentError("step", f"HAProxy does not set {host} to {state}", said)
    return {"done": False}


def _ask(layout: Layout, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as there:
        there.settimeout(5)
        there.connect(str(RUN / f"{layout.service}-gateway/admin.sock"))
        there.sendall(f"{command}\n".encode())
        found = b""
        while block := there.recv(65536):
            found += block
    return found.decode(errors="replace")
