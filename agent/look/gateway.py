"""The installed gateway: independent of ComfyUI's releases, so that people are served while ComfyUI changes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from agent.files import Json, read, read_text
from agent.journal import events
from agent.layout import Layout
from agent.serve.gateway import folder_of, people, validity
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> Json:
    """Return the gateway's `unit` and `configuration` (texts); empty if not installed."""
    unit = Systemd(layout).units / gateway_unit(layout)
    if not unit.is_file():
        return {}
    return {"unit": read_text(unit), "configuration": read_text(current(layout) / "haproxy.cfg")}


def gateway(layout: Layout) -> Json:
    """Return `installed`, whether the unit is `active`, its `people` and `certificate`, and if HAProxy is `there`."""
    folder = folder_of(layout)
    found = {"unit": "", "configuration": "", "active": False, **installed(layout)}
    if found["unit"]:
        words = [*Systemd(layout).ctl, "is-active", "--quiet", gateway_unit(layout)]
        found["active"] = subprocess.run(words, capture_output=True).returncode == 0
    found["people"] = people(layout)
    found["certificate"] = {"names": read(folder / "names.json", lenient=True).get("names", []), **validity(folder)}
    found["there"] = Path("/usr/sbin/haproxy").exists()
    return found


def audit(layout: Layout, lines: int, since: str) -> list[Json]:
    """Return the last `lines` of the gateway's audit log, oldest first; `since` is a time as journalctl reads it."""
    words = ["journalctl", "--no-pager", "--quiet", "--output=cat", f"--lines={lines}"]
    words += [f"--unit={gateway_unit(layout)}", "--grep=^\\{", *([f"--since={since}"] if since else [])]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=60)
    return events(done.stdout)


def gateway_unit(layout: Layout) -> str:
    """Return the name of the gateway's unit."""
    return f"{layout.service}-gateway.service"


def current(layout: Layout) -> Path:
    """Return the link to the gateway's release in service."""
    return layout.prefix / "gateway" / "current"
