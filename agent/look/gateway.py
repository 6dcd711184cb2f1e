"""The installed gateway: independent of ComfyUI's releases, so that people are served while ComfyUI changes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, Json, read_text, recorded
from agent.journal import events
from agent.layout import Layout
from agent.look.ports import port_holder
from agent.schema import change
from agent.schema.facts import Holder
from agent.schema.gateway import CertificateNames, GatewayState, Given, LogDisk, Served
from agent.schema.installed import InstalledGateway
from agent.serve import guard
from agent.serve.balance import servers
from agent.serve.gateway import folder_of, people, validity
from agent.serve.systemd import Systemd


def installed(layout: Layout) -> InstalledGateway:
    """Return the installed gateway."""
    unit, release = Systemd(layout).units / gateway_unit(layout), current(layout)
    if not unit.is_file():
        return InstalledGateway()
    access = recorded(release / "access.json", dict[str, tuple[str, ...]], lenient=True)
    return InstalledGateway(read_text(unit), read_text(release / "haproxy.cfg"), access)


def _guarded(layout: Layout, access: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the firewall is loaded, and none of its users was added since."""
    return guard.loaded(layout) and guard.rules(layout, access) == read_text(current(layout) / "firewall.nft")


def gateway(layout: Layout, port: int, names: list[str], certificate: str) -> GatewayState:
    """Return the state of the gateway: its certificate (and the file `certificate`) for `names`, who holds `port`."""
    folder, unit, found = folder_of(layout), gateway_unit(layout), installed(layout)
    words = [*Systemd(layout).ctl, "is-active", "--quiet", unit]
    active = bool(found.unit) and subprocess.run(words, capture_output=True).returncode == 0
    served, given = folder / "certificate.pem", Path(certificate)
    holder = port_holder(port)
    ours = holder.get("unit") == unit or (active and holder.get("pid", 1) <= 0)  # not found
    before = None
    with suppress(AgentError):
        before = recorded(previous(layout) / "step.json", change.Gateway)
    return GatewayState(
        installed=found,
        active=active,
        guarded=_guarded(layout, found.access),
        people=people(layout),
        certificate=Served(
            **vars(validity(served, names)),
            names=recorded(folder / "names.json", CertificateNames, lenient=True).names,
        ),
        given=Given(**vars(validity(given, names)), same=_same(given, served)) if certificate else None,
        holder=Holder() if ours else holder,
        journal=_journal(),
        servers=tuple(servers(layout)),
        previous=before,
        missing=tuple(path for path in ("/usr/sbin/haproxy", guard.NFT) if not Path(path).exists()),
        kept=folder.parent.exists(),
    )


def _same(given: Path, served: Path) -> bool:
    with suppress(OSError):
        return given.read_bytes() == served.read_bytes()
    return False


def _journal() -> LogDisk:
    persistent = Path("/var/log/journal").is_dir()
    disk = os.statvfs("/var/log/journal" if persistent else "/run")
    return LogDisk(persistent, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)


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
