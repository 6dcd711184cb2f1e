"""Find the process that listens on a port."""

from __future__ import annotations

import itertools
import os
import pwd
import time
from contextlib import suppress
from pathlib import Path

from agent.files import read_some
from agent.look.gpu import process
from agent.schema.facts import Holder

HOLDER_SECONDS = 3.0
"""Time limit for finding the process: another user may have millions of descriptors."""


def port_holder(port: int) -> Holder:
    """Return the process that listens on a port: pid, command and systemd unit; empty if none does.

    Pid 0: not visible to this user; -1: not found in time.
    """
    end = time.monotonic() + HOLDER_SECONDS
    sockets: dict[str, int] = {}
    late = False
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), Path(table).open() as lines:
            for line in itertools.islice(lines, 1, None):
                cells = line.split()
                late = time.monotonic() > end
                if cells[3] != "0A" or late:  # listening sockets come first
                    break
                if int(cells[1].rpartition(":")[2], 16) == port:
                    sockets[f"socket:[{cells[9]}]"] = int(cells[7])
    if not sockets and not late:
        return {}
    places = {place: _uid(place) for place in Path("/proc").glob("[0-9]*")}
    # Processes of the socket's owner come first: the kernel reports the owner, so other users cannot cause delay.
    for place in sorted(places, key=lambda place: places[place] not in sockets.values()):
        with suppress(OSError), os.scandir(place / "fd") as entries:
            for entry in entries:
                if late := time.monotonic() > end:
                    return {"pid": -1, "command": f"{_whose(sockets)} (search timed out)", "unit": None}
                if os.readlink(entry.path) in sockets:  # noqa: PTH115  a Path for each takes longer
                    words = read_some(place / "cmdline", 4096).decode(errors="replace").split("\0")
                    command = " ".join(words[:3]).strip()[:200]
                    return {"pid": int(place.name), "command": command, "unit": process(int(place.name))["unit"]}
    return {"pid": -1 if late else 0, "command": _whose(sockets), "unit": None}


def _uid(process: Path) -> int:
    with suppress(OSError):
        return process.stat().st_uid
    return -1


def _whose(sockets: dict[str, int]) -> str:
    uid = min(sockets.values(), default=-1)
    with suppress(KeyError):
        return f"a process of {pwd.getpwuid(uid).pw_name}" if sockets else "a process of another user"
    return f"a process of user {uid}"
