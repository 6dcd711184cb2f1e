"""Replace a gateway's configuration, unit or firewall; restore the previous ones if HAProxy does not serve then."""

from __future__ import annotations

import hashlib
import json
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, Note, discard, link, record, recorded, write
from agent.layout import Layout
from agent.locks import flock
from agent.look.gateway import current, gateway_unit, installed, previous
from agent.processes import run
from agent.schema.change import Gateway
from agent.schema.gateway import GatewayBefore
from agent.schema.installed import InstalledGateway
from agent.serve import guard
from agent.serve.gateway import GROUP, certify, folder_of, keep, remember
from agent.serve.systemd import Systemd, entries

SECONDS = 20
"""Time limit for HAProxy to accept a connection."""


def gateway(layout: Layout, step: Gateway, note: Note) -> None:
    """Put the step's gateway in service. On a failure, restore the previous one and raise AgentError.

    Records the previous one first, so that a resumed run restores that one and not the new one.
    """
    kept = layout.state / "gateway-before.json"
    if not kept.exists():
        record(kept, GatewayBefore(installed(layout), _release(layout)))
    before = recorded(kept, GatewayBefore)
    try:
        _certify(layout, step)
        put(layout, step.gateway)
        _await_answer(step.address, step.port)
    except (AgentError, OSError) as error:
        log: list[str] = []
        with suppress(AgentError):
            log = Systemd(layout).log_of(gateway_unit(layout))
        put(layout, before.gateway)
        discard(kept)
        cause = error.report["cause"] or error.report["what"] if isinstance(error, AgentError) else str(error)
        now = "the previous one is" if before.gateway.unit else "nothing is"
        what = f"HAProxy does not serve with the new configuration; {now}"
        hint = "ComfyUI is not affected; read the log above, then run the same command again"
        failure = AgentError("step", f"{what} in service", cause, hint)
        failure.report["log"] = log
        raise failure from None
    record(current(layout) / "step.json", step)
    if before.release and before.release != _release(layout):
        link(previous(layout), before.release)
    discard(kept)
    _prune(layout)


def put(layout: Layout, wanted: InstalledGateway) -> None:
    """Install a gateway, checked by HAProxy first; without a unit, remove it.

    A changed configuration is loaded without ending a connection, a changed unit restarts HAProxy. Raises AgentError
    or OSError.
    """
    systemd, name = Systemd(layout), gateway_unit(layout)
    if not wanted.unit:
        if placed := entries(systemd.units, name):
            run([*systemd.ctl, "disable", "--now", name])
            for path in placed:
                discard(path)
            run([*systemd.ctl, "daemon-reload"])
        guard.remove(layout)
        discard(current(layout))
        return
    _make_user()
    remember(layout)
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True, default=vars).encode()).hexdigest()[:16]
    release = current(layout).parent / "releases" / digest
    write(release / "haproxy.cfg", wanted.configuration)
    record(release / "access.json", wanted.access)
    write(release / "firewall.nft", guard.rules(layout, wanted.access))
    check(layout, str(release / "haproxy.cfg"))
    same = installed(layout).unit == wanted.unit
    link(current(layout), f"releases/{digest}")
    unit = systemd.units / name
    if not same:
        write(unit, wanted.unit)
        run([*systemd.ctl, "daemon-reload"])
        run([*systemd.ctl, "enable", name])
    subprocess.run([*systemd.ctl, "reset-failed", name], capture_output=True)
    run([*systemd.ctl, "reload-or-restart" if same else "restart", name])


def _release(layout: Layout) -> str:
    """The target of the link `current`; empty if there is none."""
    link = current(layout)
    return str(link.readlink()) if link.is_symlink() else ""


def _certify(layout: Layout, step: Gateway) -> None:
    """Make the gateway's certificate if needed, or copy the given one. Raises AgentError or OSError."""
    folder = folder_of(layout)
    folder.mkdir(parents=True, exist_ok=True)
    with flock(folder / "lock", wait=30):
        if not step.certificate:
            certify(folder, step.names)
        else:
            write(folder / "certificate.pem", Path(step.certificate).read_bytes(), 0o640)
            discard(folder / "names.json")
        if not (folder / "users.cfg").exists():
            keep(folder, {})


def check(layout: Layout, configuration: str) -> None:
    """Let HAProxy read a configuration with the people's file. Raises AgentError."""
    run(["/usr/sbin/haproxy", "-c", "-q", "-f", configuration, "-f", str(folder_of(layout) / "users.cfg")])


def _make_user() -> None:
    with suppress(KeyError):
        pwd.getpwnam(GROUP)
        return
    run(["useradd", "--system", "--user-group", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", GROUP])


def _await_answer(address: str, port: int) -> None:
    end, why = time.monotonic() + SECONDS, ""
    while time.monotonic() < end:
        try:
            with socket.create_connection((address, port), 5):
                return
        except OSError as error:
            why = str(error)
        time.sleep(0.2)
    raise AgentError("step", f"{address} port {port} accepts no connection within {SECONDS} s", why)


def _prune(layout: Layout) -> None:
    """Delete all releases but the current and the previous one."""
    kept = {current(layout).resolve(), previous(layout).resolve()}
    for path in (current(layout).parent / "releases").glob("*"):
        if path.resolve() not in kept:
            shutil.rmtree(path, ignore_errors=True)
