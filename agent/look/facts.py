"""Collect the state of the host as declared in `agent.schema.facts`."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from agent.files import AgentError, Json, read, read_text, record, recorded
from agent.folders import mounts
from agent.journal import DEPLOYS, AdoptionJournal, SettingsJournal, busy, history, last
from agent.layout import DATA, Layout
from agent.look.accounts import account_problem, group_members, member_rights, user_exists
from agent.look.engine import engine
from agent.look.exporter import exporter
from agent.look.machine import libstdcxx, nvidia, os_release, packages, pythons
from agent.look.ports import port_holder
from agent.look.prefix import prefix_state
from agent.look.storage import databases, folder_problem, free_bytes, mount_state, shares, traps, unused
from agent.parts import damages_of, forked
from agent.schema.facts import Ended, Facts, Paused, Questions, Report, Service
from agent.schema.live import GpuState
from agent.schema.manifest import ReleaseManifest
from agent.schema.records import Proven
from agent.serve.confine import abi as landlock
from agent.serve.managers import manager_of
from agent.serve.secret import secrets
from agent.serve.supervised import Supervised
from agent.serve.systemd import Systemd, login, user_systemd

SIGNERS = Path("/etc/hearth/allowed_signers")
"""Allowed signers of bundles for this host (ssh-keygen(1), ALLOWED SIGNERS). Without it, bundles may be unsigned."""


def facts(layout: Layout, ask: Questions, devices: Sequence[GpuState]) -> Facts:
    """Return the state of this host.

    `devices` are its GPUs (`ours`). Blocks on a mount whose server is down: call `check_folders_respond` first. Raises
    AgentError.
    """
    parts = _parts(layout, ask.verified)
    return Facts(
        **_machine(layout, ask, devices),
        **_storage(layout, ask),
        **_people(layout),
        **_releases(layout),
        **_service(layout, ask),
        parts=parts(),
        engine=engine(layout) if ask.engine else None,
    )


def _machine(layout: Layout, ask: Questions, devices: Sequence[GpuState]) -> Json:
    system = os_release()
    gpus, driver = nvidia(devices)
    glibcxx, cxxabi = libstdcxx()
    return {
        "hostname": socket.gethostname(),
        "os": f"{system.get('ID', 'linux')} {system.get('VERSION_ID', '')}".strip(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "glibc": (os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2],
        "glibcxx": glibcxx,
        "cxxabi": cxxabi,
        "pythons": pythons(layout, ask.pythons),
        "packages": packages(ask.packages),
        "gpus": gpus,
        "driver": driver,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cores": os.cpu_count() or 1,
        "landlock": landlock(),
    }


def _storage(layout: Layout, ask: Questions) -> Json:
    place = next(path for path in [layout.prefix, *layout.prefix.parents] if path.exists())
    disk = os.statvfs(place)
    return {
        "prefix": str(layout.prefix),
        "writable": os.access(place, os.W_OK),
        "disk_free": disk.f_bavail * disk.f_frsize,
        # File systems without a fixed number of inodes report 0 of 0.
        "inodes_free": disk.f_favail if disk.f_files else None,
        "mounts": {path: mount_state(layout, path, wanted) for path, wanted in ask.mounts.items()},
        "places": {path: folder_problem(layout, Path(path), use) for path, use in ask.places.items()} | traps(layout),
        "data_free": {str(path): free_bytes(path) for path in (layout.data, *map(Path, layout.elsewhere.values()))},
        # ComfyUI creates `temp` when it starts and deletes it when it ends.
        "data": all(os.path.lexists(layout.data / name) for name in DATA if name != "temp"),
        "place": prefix_state(layout),
        "shared": shares(layout),
        "unused": tuple(unused(layout)),
        "secrets": secrets(layout),
    }


def _people(layout: Layout) -> Json:
    return {
        "login": login(),
        "root": os.geteuid() == 0,
        "user": user_exists(layout.user),
        "exporter_user": user_exists(layout.exporter),
        "user_problem": account_problem(layout),
        "members": group_members(layout),
        "rights": member_rights(layout),
        # An unreadable file counts as empty: no signers.
        "signers": read_text(SIGNERS) if os.path.lexists(SIGNERS) else None,
    }


def _releases(layout: Layout) -> Json:
    current, problem = "", Report()
    try:
        current = layout.release()
    except AgentError as error:
        problem = error.report
    paths = sorted(layout.releases.glob("*/release.json"))
    manifests = [found for path in paths if (found := recorded(path, ReleaseManifest, lenient=True)).id]
    runs = history(layout)
    return {
        "current": current,
        "current_error": problem,
        "releases": tuple(manifests),
        "altered": tuple(each.id for each in manifests if altered(layout, each)),
        "proven": tuple(_proven(layout, runs)),
        "databases": databases(layout),
        "failed_nodes": recorded(layout.releases / current / "proven", Proven, lenient=True).failed_nodes,
        "incoming": {path.name: path.stat().st_size for path in layout.incoming.glob("*") if path.is_file()},
        "tools": tuple(sorted(path.name for path in (layout.state / "tools").glob("[!.]*"))),
        "busy": busy(layout),
        "last": last(runs),
        "deployed": last(runs, *DEPLOYS),
        "adopted": AdoptionJournal(layout).path.exists(),
        "settings": tuple(sorted(SettingsJournal(layout).in_force())),
    }


def _service(layout: Layout, ask: Questions) -> Json:
    here = layout.scope == "user" or Path("/run/systemd/system").is_dir()
    manager, systemd = manager_of(layout), Systemd(layout)
    return {
        "manager": manager.name if here else "none",
        "lingers": manager.name != "process" or not user_systemd() or Supervised(layout).enabled.exists(),
        "lingered": layout.lingered.exists(),
        "service": manager.status() if here and layout.state.exists() else _NO_SERVICE,
        "foreign_unit": manager.foreign() if here and isinstance(manager, Systemd) else "",
        "placed": tuple(map(str, systemd.placed())),
        "drop_ins": tuple(map(str, sorted(systemd.units.glob(f"{layout.service}*.service.d")))),
        "paused": cast("Paused", read(layout.paused)),
        "port_holder": port_holder(layout.port),
        "metrics_holder": port_holder(ask.metrics_port) if ask.metrics_port else {},
        "exporter": exporter(layout),
    }


STALE, PATIENT = 2.0, 15.0
"""Seconds after which an unresponsive folder counts as dead: for status queries; for the doctor and before a change. A
local disk takes milliseconds; a disk that spins up or an automount takes up to ten seconds."""


def check_folders_respond(layout: Layout, ask: Questions, seconds: float) -> None:
    """Raise AgentError if a folder does not respond in time: stat() on a mount whose server is down blocks."""
    inside = (each["point"] for each in mounts() if each["point"].startswith(f"{layout.prefix}/"))
    places, nowhere = sorted({*ask.mounts, *ask.places, *inside}), subprocess.DEVNULL
    children = {place: subprocess.Popen(["stat", "-f", place], stdout=nowhere, stderr=nowhere) for place in places}
    end = time.monotonic() + seconds
    dead: list[str] = []
    for place, child in children.items():
        try:
            child.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()  # it may be unkillable while it waits for the server, so do not wait for it
            dead.append(place)
    if dead:
        remedy = "on the host: umount --lazy PATH, or wait for its server"
        raise AgentError("storage", f"{', '.join(dead)} does not answer", "its server or disk is down or slow", remedy)


def _parts(layout: Layout, verified: float) -> Callable[[], dict[str, str]]:
    """Start verifying the parts; the returned function waits, returns each part's damage, and caches intact parts."""
    note = layout.state / "verified.json"
    verified_at = recorded(note, dict[str, float], lenient=True)
    known = {name: at for name, at in verified_at.items() if 0 <= time.time() - at < verified}
    begun = time.time()
    names = [path.name for path in sorted(layout.parts.glob("[!.]*"))]
    asked = [layout.parts / name for name in names if name not in known]
    errors = forked(damages_of, asked) if asked else dict

    def answer() -> dict[str, str]:
        found: dict[str, str] = dict.fromkeys(names, "") | errors()
        if asked and layout.state.is_dir():
            with suppress(OSError):  # only a cache
                whole = {name: known.get(name, begun) for name, error in found.items() if not error}
                record(note, whole)
        return found

    return answer


def _proven(layout: Layout, runs: list[Ended]) -> list[str]:
    """Return the releases that passed the health gate, most recently deployed first; unknown ones come last.

    Uses the order of the append-only history, which does not depend on the clock.
    """
    served = {run["release"]: number for number, run in enumerate(runs) if run["result"] == "done"}
    names = sorted(path.parent.name for path in layout.releases.glob("*/proven"))
    return sorted(names, key=lambda name: -served.get(name, -1))


def altered(layout: Layout, manifest: ReleaseManifest) -> bool:
    """Return whether a release's files or links differ from its manifest; older manifests may list none."""
    place = layout.releases / manifest.id
    try:
        links = {kind: (place / kind).readlink().name for kind in manifest.parts}
        links |= {name: str((place / name).readlink()) for name in manifest.links}
        nodes = {name.partition("/")[2] for name in (*links, *(manifest.empty or ())) if name.startswith("custom_")}
        if manifest.empty is not None and {*os.listdir(place / "custom_nodes")} != nodes - {""}:  # noqa: PTH208
            return True  # ComfyUI imports every entry
        files = {name: (place / name).read_text() for name in manifest.files}
    except OSError:
        return True
    return (links, files) != (manifest.parts | manifest.links, manifest.files)


_NO_SERVICE = Service(active=False, state="absent", enabled=False, linked=False, restarts=0, since="", pid=0)
