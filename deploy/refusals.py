"""Refusals: every reason why a change would not work on a host, with its fix.

The only place that builds them. Pure: facts and a target in, refusals out. `kind` is data for scripts and tests; the
sentences may change.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from agent.schema.manifest import ReleaseManifest
from core import console
from core.errors import RefusedError
from deploy.host_rules import PLAIN_PATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.facts import Facts
    from deploy.host import Target

RESERVE_DATA = 200_000_000
"""Free space to keep where ComfyUI writes: a cut-over first copies its database, and outputs need space."""

MISSING = "does not exist"
"""The agent's word for a folder that a step can create."""

LANDLOCK_TCP = 4
"""The first version of Landlock that restricts TCP (Linux 6.7)."""

QUARANTINE = "quarantine"
"""The setting that removes the service's network access."""


@dataclass(frozen=True)
class Refusal:
    """One reason why a change of `host` would not work, and its fix.

    `build` has the arguments of `inv build-kernels` if the fix is to build a wheel.
    """

    kind: str
    what: str
    remedy: str
    build: tuple[str, ...] = ()
    host: str = ""


def older(version: str, floor: str) -> bool:
    """Whether a host's version is below a minimum; false for one that is not reported."""
    try:
        return Version(version) < Version(floor)
    except InvalidVersion:
        return False


def refused(what: str, refusals: Sequence[Refusal], host: str = "") -> RefusedError:
    """The error that shows refusals and carries them as data."""
    error = RefusedError(
        "refused",
        what,
        cause="\n".join(each.what for each in refusals),
        hint="\n".join(dict.fromkeys(each.remedy for each in refusals)),
    )
    error.refusals = tuple(replace(each, host=host) for each in refusals)
    return error


def unconfirmed(change: str, remedy: str) -> Refusal:
    """The change was not confirmed."""
    return Refusal("unconfirmed", f"not confirmed: {change}", remedy)


# --- any change ------------------------------------------------------------------------------------------------------


def busy(target: Target, facts: Facts) -> list[Refusal]:
    """Another run changes the host."""
    if not facts.busy:
        return []
    who = f"{facts.busy['action']} by {facts.busy['who']} since {facts.busy['since']}"
    return [Refusal("busy", f"the host is being changed: {who}", f"inv attach --host {target.name}")]


def no_systemd(facts: Facts, remedy: str) -> list[Refusal]:
    """The host runs no systemd, which a system service needs."""
    return (
        [] if facts.manager.startswith("systemd") else [Refusal("no-systemd", "the host does not run systemd", remedy)]
    )


def not_deployed(target: Target, facts: Facts) -> list[Refusal]:
    """No release is in service."""
    what = f"nothing is in service on {target.name}"
    return [] if facts.current else [Refusal("not-deployed", what, f"inv deploy --host {target.name}")]


def unchangeable(target: Target, facts: Facts, *, force: bool = False) -> list[Refusal]:
    """Reasons against any change of the service; `force` stops it even while another run is in progress."""
    found = [] if force else busy(target, facts)
    if facts.current_error:
        found.append(Refusal("foreign-current", facts.current_error["what"], facts.current_error["hint"]))
    if facts.foreign_unit:
        remedy = f"to adopt it: inv adopt --host {target.name}; or manage it on the host with systemctl"
        found.append(Refusal("foreign-unit", f"{facts.foreign_unit} is not Hearth's", remedy))
    if target.host.scope == "system":
        found += no_systemd(facts, 'set scope = "user" for this host')
    return found + deployed_otherwise(target, facts)


def deployed_otherwise(target: Target, facts: Facts) -> list[Refusal]:
    """The configuration has changed since the last deploy in a way that no step supports."""
    found: list[Refusal] = []
    place, host = facts.place, target.host
    first = f"inv remove --host {target.name}, then change it"

    def add(what: str, remedy: str) -> None:
        found.append(Refusal("deployed-otherwise", what, remedy))

    units = (facts.release(facts.current) or ReleaseManifest()).files
    ends = (".container", ".service")
    served = min((each for each in units if each.endswith(ends)), key=len, default="")  # companions are longer
    for old in {served.partition(".")[0], place.service if facts.current else ""} - {"", host.service}:
        what = f"{facts.prefix} was deployed as service {old}, and the configuration says {host.service}"
        add(what, f'set service = "{old}" so that its units are found; {first}')
    if facts.current and place.scope and place.scope != host.scope:
        what = f'{facts.prefix} was deployed with scope = "{place.scope}", and the configuration says "{host.scope}"'
        add(what, f'set scope = "{place.scope}" so that its units are found; {first}')
    if host.scope == "system" and place.user and place.user != host.run_as:
        data = shlex.quote(f"{facts.prefix}/data")
        change = f"inv stop, then on the host: useradd --system {host.run_as}; chown -R {host.run_as}: {data}"
        what = f"{facts.prefix}/data belongs to {place.user}, and the configuration says run_as = {host.run_as}"
        add(what, f'set run_as = "{place.user}"; to change it, then: {change}')
    if place.elsewhere:
        move = f"to move it: {first}, and mv {shlex.quote(place.elsewhere)}/data there"
        what = f"{host.service} is deployed at {place.elsewhere}, and the configuration says {facts.prefix}"
        add(what, f'set prefix = "{place.elsewhere}"; {move}; or, for a second installation, set another `service`')
    return found


# --- deploy and rollback ---------------------------------------------------------------------------------------------


def undeployable(target: Target, facts: Facts) -> list[Refusal]:
    """Properties of the host that prevent a release from being put in service."""
    host = target.host
    found = unchangeable(target, facts) + paused(target, facts)
    found += [
        Refusal("no-secret", f"the host has no secret {name}", f"inv secret set {name} --host {target.name}")
        for name in host.secrets
        if name not in facts.secrets
    ]
    if facts.user_problem:
        remedy = 'set `run_as` to a name of its own, such as "comfyui-service"'
        found.append(Refusal("foreign-user", f"the user {host.run_as} {facts.user_problem}", remedy))
    if not PLAIN_PATH.fullmatch(facts.prefix):
        what = f"{facts.prefix} has characters that units and command lines do not allow"
        found.append(Refusal("unusable-prefix", what, "set a `prefix` of letters, digits and . _ @ + -"))
    if not facts.writable:
        what = f"{facts.login} has no write permission for {facts.prefix}"
        found.append(Refusal("not-writable", what, "grant write access, or set another `prefix`"))
    return found + network(target, facts) + storage(target, facts) + port(target, facts) + metrics(target, facts)


def paused(target: Target, facts: Facts) -> list[Refusal]:
    """A user paused the service, possibly for a reason that others do not know."""
    if not facts.paused:
        return []
    what = f"{target.host.service} was paused by {facts.paused['who']} at {facts.paused['at']}"
    return [Refusal("paused", what, f"inv resume --host {target.name}")]


def network(target: Target, facts: Facts) -> list[Refusal]:
    """The profile restricts the network in a way that this host cannot enforce, or that locks its users out."""
    found: list[Refusal] = []
    host, wanted = target.host, target.profile.network
    if host.scope == "user" and wanted == "lan-deny":
        what = "mode lan-deny has no effect: without root private addresses cannot be blocked"
        remedy = 'set scope = "system" for this host, or mode "offline"'
        found.append(Refusal("network-unenforced", what, remedy))
    if host.scope == "user" and wanted == "offline" and not (host.confined and facts.landlock >= LANDLOCK_TCP):
        old = f"Landlock {facts.landlock} cannot restrict TCP; Linux 6.7 and newer can"
        why = old if host.confined else "the host is not `confined`"
        remedy = 'set scope = "system" for this host, or use a newer kernel and confined = true'
        found.append(Refusal("network-unenforced", f"mode offline has no effect here: {why}", remedy))
    listed = host.listen.split(",")
    if wanted != "open" and not all(ipaddress.ip_address(each).is_loopback for each in listed):
        what = f"network = {wanted} also blocks clients that connect to {host.listen}"
        remedy = 'set listen = "127.0.0.1", and connect by ssh -L or through a proxy on the host'
        found.append(Refusal("network-blocks-clients", what, remedy))
    return found


def storage(target: Target, facts: Facts) -> list[Refusal]:
    """Problems of mounts and folders that no step can fix."""
    found: list[Refusal] = []
    host = target.host
    for path, wanted in host.mounts.items():
        there = facts.mounts[path]
        if not wanted.what and not there.mounted:
            found.append(
                not_mounted(
                    path, f"on the host: mount {path}; files written to the empty mount point would be hidden later"
                )
            )
        elif wanted.what and there.mounted and target.mount_text(path).split("\nWhere")[0] not in there.unit:
            remedy = f"on the host: umount {shlex.quote(path)}; or omit `what` for it"
            what = f"{there.source} is mounted at {path}, but not by Hearth's unit"
            found.append(Refusal("foreign-mount", what, remedy))
        elif wanted.what and there.error:
            what = f"{wanted.what} cannot be mounted at {path}: {there.error}"
            found.append(Refusal("unmountable", what, there.remedy))
    coming = tuple(f"{path}/" for path, wanted in host.mounts.items() if wanted.what and not facts.mounts[path].mounted)
    for path, error in facts.places.items():
        made = error == MISSING and path in host.folders.values()
        if error and not made and not f"{path}/".startswith(coming):
            remedy = f"on the host: ls -ld {shlex.quote(path)}; ComfyUI runs as {host.run_as}"
            found.append(Refusal("unusable-folder", f"{path} {error}", remedy))
    for path, left in facts.data_free.items():
        if left < RESERVE_DATA:
            what = f"{console.size(left)} free for {path}, {console.size(RESERVE_DATA)} needed"
            found.append(Refusal("data-full", what, "free some space there; otherwise ComfyUI cannot write its files"))
    return found


def not_mounted(path: str, remedy: str) -> Refusal:
    """A file system that ComfyUI needs is not mounted."""
    return Refusal("not-mounted", f"{path} is not mounted", remedy)


def port(target: Target, facts: Facts) -> list[Refusal]:
    """Another program uses ComfyUI's port."""
    holder = facts.port_holder
    if not holder or (facts.service.active and holder["pid"] in (0, facts.service.pid)):
        return []
    what = f"port {target.host.port} is in use by {holder['command']} (pid {holder['pid']})"
    return [Refusal("port-taken", what, "stop that process, or set another `port` for this host")]


def metrics(target: Target, facts: Facts) -> list[Refusal]:
    """The host cannot export the configured metrics."""
    found: list[Refusal] = []
    wanted, holder = target.host.metrics_port, facts.metrics_holder
    if wanted and facts.manager == "process" and facts.lingers:
        what = "the exporter needs systemd, which this login does not have"
        found.append(Refusal("no-exporter", what, "omit `metrics_port` for this host"))
    if holder and holder["unit"] != target.exporter_unit:
        what = f"port {wanted} is in use by {holder['command']} (pid {holder['pid']})"
        remedy = "stop that process, or set another `metrics_port` for this host"
        found.append(Refusal("metrics-port-taken", what, remedy))
    return found


# --- start, stop, remove ---------------------------------------------------------------------------------------------


def unstartable(target: Target, facts: Facts) -> list[Refusal]:
    """Reasons why the existing service would not start."""
    found = unchangeable(target, facts)
    at = f"--host {target.name}"
    if not facts.current:
        return found + not_deployed(target, facts)
    if QUARANTINE in facts.settings:
        what = f"{target.host.service} is in quarantine"
        found.append(Refusal("quarantine", what, f"inv quarantine --undo {at}"))
    found += storage(target, facts)
    found += [
        not_mounted(path, f"to mount it: inv deploy {at}")
        for path, wanted in target.host.mounts.items()
        if wanted.what and not facts.mounts[path].mounted
    ]
    found += port(target, facts)
    if not facts.service.linked:
        what = f"systemd would not start release {facts.current}: the unit is missing or was changed"
        found.append(Refusal("unlinked", what, f"to repair it: inv deploy {at}"))
    return found


def undeletable(target: Target, facts: Facts) -> list[Refusal]:
    """Reasons why a prefix must not be deleted."""
    found = unchangeable(target, facts)
    place, prefix = facts.place, facts.prefix

    def unsafe(what: str, remedy: str = "inspect it, and delete Hearth's files by hand") -> None:
        found.append(Refusal("unsafe-prefix", what, remedy))

    if place.link:
        unsafe(
            f"{prefix} is a symbolic link to {place.real}",
            f"set `prefix` to {place.real} if that is the intended folder",
        )
    if place.mount:
        unsafe(f"{prefix} is a mount point")
    if place.real.count("/") < 2:
        unsafe(f"{prefix} is {'the root' if place.real == '/' else 'a top-level folder'}")
    if place.homes:
        unsafe(f"{prefix} is or contains the home folder of {', '.join(place.homes)}")
    if place.crossings:
        unsafe(f"{', '.join(place.crossings)} in {prefix}: a link out of the prefix")
    if inside := [path for path in place.mounts if not f"{path}/".startswith(f"{place.real}/data/")]:
        unsafe(f"something is mounted at {', '.join(inside)}", "on the host: umount it first")
    if (place.own or place.data) and not (place.ours or facts.data):
        unsafe(f"{prefix} does not look like a prefix of Hearth: it has neither state nor releases")
    if facts.adopted:
        what = "an installation was adopted, and state/ contains the records that restore it"
        undo = f"inv adopt --host {target.name} --undo; or to keep it, on the host: rm {prefix}/state/adopted.jsonl"
        found.append(Refusal("adopted", what, undo))
    if facts.settings:
        what = f"{', '.join(facts.settings)} is set outside {prefix}, and state/ contains the previous values"
        found.append(Refusal("settings-applied", what, settings_undo(target, facts)))
    return found


def settings_undo(target: Target, facts: Facts) -> str:
    """The commands that undo the settings in force."""
    own = {"mps": "inv mps off", "gpu-access": "inv gpu-access --undo", QUARANTINE: "inv quarantine --undo"}
    found = dict.fromkeys(own.get(each, "inv tune --undo") for each in facts.settings)
    return "; ".join(f"{each} --host {target.name}" for each in found)


# --- adopt, settings of the machine ----------------------------------------------------------------------------------


def unadoptable(target: Target, facts: Facts) -> list[Refusal]:
    """Reasons why folders and units of others cannot be moved."""
    by_hand = "move its folders by hand to the data folder that inv facts shows"
    if target.host.scope == "user":
        what = "moving other users' folders and units needs root, but this host's scope is user"
        return [Refusal("no-root", what, f'set scope = "system", or {by_hand}'), *busy(target, facts)]
    return no_systemd(facts, by_hand) + busy(target, facts)


def unsettable(target: Target, facts: Facts) -> list[Refusal]:
    """Reasons against changing anything outside the prefix."""
    if target.host.scope == "user":
        what = 'scope = "user" changes nothing outside the login\'s own folders'
        return [Refusal("no-root", what, f'set scope = "system" for {target.name}, or do it by hand on the host')]
    if not facts.root:
        remedy = "log in as root, or as a user with sudo (--ask-sudo)"
        return [Refusal("no-root", f"needs root, but the login is {facts.login}", remedy)]
    return no_systemd(facts, "do it by hand on the host: only systemd can keep it after a reboot") + busy(target, facts)


def loose_process(pid: int, user: str) -> Refusal:
    """The ComfyUI to adopt runs without a unit that could be stopped."""
    what = f"the old ComfyUI runs without a system unit: pid {pid} of {user}"
    return Refusal("loose-process", what, "stop it; folders in use are not moved")


def unfit_setting(name: str, why: str, remedy: str = "omit it") -> Refusal:
    """A setting does not apply to the host, or has no use there."""
    return Refusal("unfit-setting", f"{name}: {why}", remedy)


def no_mps(target: Target, facts: Facts, control: str, gpus: Sequence[int]) -> list[Refusal]:
    """Reasons why MPS cannot be enabled; `gpus` are the GPUs that limits name."""
    found = unsettable(target, facts) + not_deployed(target, facts)
    at = f"--host {target.name}"
    if not facts.gpus:
        found.append(Refusal("no-gpu", "the driver shows no NVIDIA GPU", f"inv doctor {at}"))
    elif not target.profile.cuda:
        what = f"profile {target.host.profile} computes on the CPU"
        found.append(Refusal("cpu-profile", what, "choose a profile for a GPU"))
    if not control:
        remedy = "on the host: apt-get install nvidia-cuda-mps (Ubuntu: nvidia-compute-utils-VERSION)"
        found.append(Refusal("no-mps", "nvidia-cuda-mps-control is not installed", remedy))
    if wrong := [each for each in gpus if each >= len(facts.gpus)]:
        what = f"there is no GPU {wrong[0]}; the host has {len(facts.gpus)}"
        found.append(Refusal("no-such-gpu", what, f"inv gpu {at}"))
    return found


def mps_off(target: Target) -> Refusal:
    """Limits have no effect while MPS is off."""
    return Refusal("mps-off", "MPS is off", f"inv mps on --host {target.name}, with the same limits")


def no_user(target: Target, names: Sequence[str]) -> Refusal:
    """The host lacks users who need access to the GPU."""
    remedy = f"run inv deploy --host {target.name} first, or remove them from `members`"
    return Refusal("no-user", f"{target.name} has no user {', '.join(names)}", remedy)


def undroppable(target: Target, facts: Facts, *, force: bool) -> list[Refusal]:
    """Reasons against dropping the page cache."""
    found = busy(target, facts) + not_deployed(target, facts)
    if not facts.root:
        by_hand = "on the host: sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'"
        found.append(Refusal("no-root", f"only root can drop the page cache, but the login is {facts.login}", by_hand))
    if not force and not any(gpu.unified for gpu in facts.gpus):
        what = "no GPU of this host shares the machine's memory, so the page cache takes no memory from a GPU"
        found.append(Refusal("no-unified-gpu", what, "keep the cache, which saves reading files again; or use --force"))
    return found
