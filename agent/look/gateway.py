"""The installed gateway: independent of ComfyUI's releases, so that people are served while ComfyUI changes."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from agent.files import Json, read, read_text
from agent.journal import events
from agent.layout import Layout
from agent.look.ports import port_holder
from agent.serve import guard
from agent.serve.balance import servers
from agent.serve.gateway import folder_of, people, validity
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> Json:
    """Return the gateway's `unit` and `configuration` (texts) and its `access`, for `guard.rules`.

    Empty if it is not installed.
    """
    unit, release = Systemd(layout).units / gateway_unit(layout), current(layout)
    if not unit.is_file():
        return {}
    access = read(release / "access.json", lenient=True)
    return {"unit": read_text(unit), "configuration": read_text(release / "haproxy.cfg"), "access": access}


def _guarded(layout: Layout, access: Json) -> bool:
    """Whether the firewall is loaded, and none of its users was added since."""
    return guard.loaded(layout) and guard.rules(layout, access) == read_text(current(layout) / "firewall.nft")


def gateway(layout: Layout, port: int, names: list[str], certificate: str) -> Json:
    """Return `installed` and what there is besides.

    `servers`: the hosts behind it; `active` and `guarded`: whether the unit runs and its firewall is in force;
    `people`; `certificate` and `given`: the one in service and the given file, for these names; `holder`: another
    program that listens on the port; `journal`: where the audit log is; `previous`: the step of the release before;
    `missing`: programs that are not installed; `kept`: whether there is anything of it.
    """
    folder = folder_of(layout)
    found = {"unit": "", "configuration": "", "access": {}, "active": False, **installed(layout)}
    if found["unit"]:
        words = [*Systemd(layout).ctl, "is-active", "--quiet", gateway_unit(layout)]
        found["active"] = subprocess.run(words, capture_output=True).returncode == 0
    found["people"] = people(layout)
    served = folder / "certificate.pem"
    own = read(folder / "names.json", lenient=True).get("names", [])
    found["certificate"] = {"names": own, **validity(served, names)}
    found["given"] = (
        {"same": _same(Path(certificate), served), **validity(Path(certificate), names)} if certificate else {}
    )
    holder = port_holder(port)
    ours = holder.get("unit") == gateway_unit(layout) or (found["active"] and holder.get("pid", 1) <= 0)  # not found
    found["holder"] = {} if ours else holder
    found["journal"] = _journal()
    found["servers"] = servers(layout)
    found["guarded"] = _guarded(layout, found["access"])
    found["previous"] = read(previous(layout) / "step.json", lenient=True)
    found["missing"] = [path for path in ("/usr/sbin/haproxy", guard.NFT) if not Path(path).exists()]
    found["kept"] = folder.parent.exists()
    return found


def _same(given: Path, served: Path) -> bool:
    with suppress(OSError):
        return given.read_bytes() == served.read_bytes()
    return False


def _journal() -> Json:
    """Return whether the journal is `persistent`, and the `free` and `total` bytes of its disk."""
    persistent = Path("/var/log/journal").is_dir()
    disk = os.statvfs("/var/log/journal" if persistent else "/run")
    return {"persistent": persistent, "free": disk.f_bavail * disk.f_frsize, "total": disk.f_blocks * disk.f_frsize}


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


def previous(layout: Layout) -> Path:
    """Return the link to the gateway's release before that, for a rollback."""
    return layout.prefix / "gateway" / "previous"
