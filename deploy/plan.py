"""Plans: the ordered changes that make a host what is wanted, or every reason why that would not work.

Pure: the same facts and wishes give the same plan; no clock, no file, no network.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from agent.schema import change
from core import console
from core.errors import UsageError
from deploy import host as hosts
from deploy import release as releases
from deploy.exporter import Exporter
from lock import application as applications

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agent.schema.change import Step
    from core.manifest import Manifest
    from deploy.facts import Facts, Process
    from deploy.host import Target
    from lock.application import Application, Flag
    from lock.nodes import Node
    from lock.requirements import Lock


@dataclass(frozen=True)
class Refusal:
    """One reason why a deploy would not work, with its remedy. `build` names the wheel that --build would make."""

    what: str
    remedy: str
    build: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The way from what a host is (`base`, its current release) to `release`. Empty when it is there already."""

    base: str
    release: str
    steps: tuple[Step, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shelf:
    """What the client can give: ComfyUI with its flags, nodes, the locked lists by platform and Python, wheels, uv."""

    application: Application
    flags: Mapping[str, Flag]
    locks: Mapping[tuple[str, str], Lock]
    wheels: Sequence[Manifest]
    uv: str
    nodes: Mapping[str, Node] = field(default_factory=dict)
    model_folders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    exporter: Exporter = field(default_factory=Exporter)


@dataclass(frozen=True)
class Options:
    """How a change is made: `drain` seconds to wait for jobs, and with `force` cut them short then; not at all on a
    `dry_run`; whether to `ask` for the sudo password, and whether a remote host shall be changed. `trial` says whether
    a release is tried beside the one in service before the cut-over: "yes", "no", or "only": nothing is cut over."""

    drain: float = 60
    force: bool = False
    dry_run: bool = False
    ask_sudo: bool = False
    ask: bool = False
    trial: str = "yes"


def seconds(drain: str) -> float:
    """What --drain says; raises UsageError."""
    if not drain.isdecimal():
        raise UsageError(f"--drain {drain} is not a number of seconds", hint="such as: --drain 300")
    return float(drain)


RESERVE_BYTES, RESERVE_FILES = 2_000_000_000, 10_000
"""Left free on a host whatever is deployed: outputs, logs and the database must still find room."""

RESERVE_DATA = 200_000_000
"""Where ComfyUI writes: its database is copied before a cut-over, and pictures must find room after it."""

MISSING = "is not there"
"""What the agent says of a folder that it could make."""

NEEDS_ROOM = 1.2
"""Downloads lie beside what is installed for a while; torch's wheels unpack to about their size, hard-linked."""


def make(target: Target, facts: Facts, shelf: Shelf, options: Options) -> Plan:
    """The plan for a host. With refusals it has no steps."""
    choice, refusals = _choose(target, facts, shelf)
    lacking, notes = _system(facts, shelf)
    refusals += _place(target, facts) + lacking
    if choice is None:
        return Plan(facts.current, "", refusals=tuple(refusals))
    wanted = releases.manifest(choice, facts.prefix)
    if not _holds(facts, choice.env_part):
        refusals += room(target, facts, shelf)
    steps = _steps(target, facts, choice, wanted, options)
    if refusals:
        return Plan(facts.current, wanted["id"], refusals=tuple(refusals))
    return Plan(facts.current, wanted["id"], steps=tuple(steps), notes=(*_notes(target, facts), *notes))


def back(target: Target, facts: Facts, to: str, options: Options) -> Plan:
    """The plan that returns to a kept release."""
    refusals = _place(target, facts)
    wanted = facts.release(to)
    broken = [part for part in (wanted["parts"].values() if wanted else ()) if not _holds(facts, part)]
    if broken:
        what = f"release {to} cannot run any more: {', '.join(broken)} is missing or damaged"
        refusals.append(Refusal(what, "choose another release, or deploy again"))
    unit = (wanted or {}).get("files", {f"{target.host.service}.service": ""}).get(f"{target.host.service}.service")
    if unit is None or (target.host.scope == "system" and unit and f"\nUser={target.host.run_as}\n" not in unit):
        what = f"release {to} was made for another service or user than {target.host.service} and {target.host.run_as}"
        refusals.append(Refusal(what, "choose another release, or deploy again"))
    steps = [_release_step(wanted, "its unit or links were changed")] if wanted and to in facts.altered else []
    steps.append(_cut_over(facts, to, "asked for", options))
    return Plan(facts.current, to, steps=() if refusals else tuple(steps), refusals=tuple(refusals))


def _choose(target: Target, facts: Facts, shelf: Shelf) -> tuple[releases.Choice | None, list[Refusal]]:
    """Which Python, list and wheels; None with the reasons when there is no such combination."""
    stack, profile = target.stack, target.profile
    found: list[Refusal] = []
    if facts.platform not in stack.platforms:
        remedy = f"stack {stack.name} has {', '.join(stack.platforms)}"
        return None, [Refusal(f"the machine is {facts.machine}, and torch {stack.torch} has no build for it", remedy)]
    origin = {name: target.origin.get(f"flags.{name}", "") for name in target.flags}
    for flag in releases.OWN_FLAGS & target.flags.keys():
        what = f"{flag} ({origin[flag]}) is Hearth's own: a release says where it lies and listens"
        found.append(Refusal(what, "leave it out; `folders`, `model_roots`, `listen` and `port` of the host say that"))
    found += [Refusal(what, remedy) for what, remedy in applications.wrong(target.flags, shelf.flags, origin)]
    if len(alone := [flag for flag in releases.TLS_FLAGS if flag in target.flags]) == 1:  # ComfyUI would speak http
        (other,) = set(releases.TLS_FLAGS) - set(alone)
        found.append(Refusal(f"{alone[0]} needs {other}, too", "set both, or neither"))
    if profile.cuda:
        found += gpu(target, facts)
    listed = [each for each in profile.pythons if (facts.platform, each) in shelf.locks]
    python = next((each for each in listed if each in facts.pythons), "")
    if not python:
        packages = " or ".join(f"apt-get install python{each}" for each in listed[:2])
        have = ", ".join(facts.pythons) or "none of them"
        found.append(Refusal(f"no Python {' or '.join(listed)} (there is {have})", f"on the host: {packages}"))
        return None, found
    wheels: list[Manifest] = []
    for kernel in profile.kernels:
        wheel = find_wheel(shelf, kernel, target, facts.platform, python)
        if isinstance(wheel, Refusal):
            found.append(wheel)
        elif Version(wheel.glibc) > Version(facts.glibc):
            what = f"{wheel.file} needs glibc {wheel.glibc}, the host has {facts.glibc}"
            found.append(Refusal(what, "build it on an older system, or there: inv build-kernels --host"))
        else:
            wheels.append(wheel)
    choice = releases.Choice(
        target=target,
        application=shelf.application,
        lock=shelf.locks[facts.platform, python],
        python=python,
        interpreter=facts.pythons[python],
        wheels=tuple(wheels),
        uv=shelf.uv,
        nodes=shelf.nodes,
        model_folders=shelf.model_folders,
        exporter=shelf.exporter,
        secrets={name: facts.secrets.get(name, "plain") for name in target.host.secrets},
    )
    if releases.manager(target) and target.host.scope == "user":
        what = "ComfyUI-Manager could change its own security level: only a system service's unit keeps that from it"
        found.append(Refusal(what, 'set scope = "system" for this host, or leave --enable-manager out'))
    return choice, found


def find_wheel(shelf: Shelf, kernel: str, target: Target, platform: str, python: str) -> Manifest | Refusal:
    """The wheel that fits; of several the highest version, then the inference profile: ComfyUI trains nothing."""
    stack, arch = target.stack, target.profile.arch
    fitting = [
        wheel
        for wheel in shelf.wheels
        if wheel.kernel == kernel
        and wheel.arch == arch
        and (wheel.stack, wheel.torch) == (stack.name, stack.torch)
        and (wheel.python, wheel.platform) == (python, platform)
    ]
    if fitting:
        # without the local label, which names arch and profile and sorts as text
        return max(
            fitting, key=lambda each: (Version(Version(each.version).public), each.profile == "inference", each.key)
        )
    words: tuple[str, ...] = ("--kernel", kernel, "--arch", arch, "--stack", stack.name)
    words += ("--python", python, "--platform", platform)
    what = f"the wheelhouse has no {kernel} for {arch}, {stack.name}, Python {python}, {platform}"
    return Refusal(what, f"inv build-kernels {shlex.join(words)}   (or run again with --build)", words)


def gpu(target: Target, facts: Facts) -> list[Refusal]:
    """What is wrong with the GPU or its driver for that profile."""
    stack, profile = target.stack, target.profile
    found: list[Refusal] = []
    if not facts.gpus:
        what = f"profile {target.profile_name} needs an NVIDIA GPU, and nvidia-smi shows none"
        return [Refusal(what, "install the driver, or choose profile cpu")]
    if facts.driver and _older(facts.driver, stack.driver):
        what = f"the driver is {facts.driver}, and CUDA {stack.cuda} needs {stack.driver}"
        found.append(Refusal(what, 'update the driver, or set stack = "cu124" in the host\'s override'))
    have = sorted({gpu.capability for gpu in facts.gpus})
    if profile.kernels and profile.arch not in have:
        what = f"the GPU is {', '.join(have)}, and profile {target.profile_name} is for {profile.arch}"
        found.append(Refusal(what, f'set arch = "{have[0]}" in the host\'s override, or choose another profile'))
    return found


def others(processes: Sequence[Process]) -> str:
    """Who else computes on a GPU, directly or through MPS, in words; empty when nobody does."""
    found = {each.pid: each for each in processes if each.kind != "graphics" and not each.comfyui}
    return ", ".join(
        f"{each.name or 'a process'} (pid {each.pid}{f', {each.user}' * bool(each.user)}"
        f"{f', {console.size(each.bytes)}' if each.bytes else ''})"
        for each in found.values()
    )


def _older(version: str, floor: str) -> bool:
    try:
        return Version(version) < Version(floor)
    except InvalidVersion:
        return False


def _place(target: Target, facts: Facts) -> list[Refusal]:
    """What the host itself lacks."""
    found: list[Refusal] = []
    host, listen = target.host, target.host.listen.split(",")
    if facts.busy:
        who = f"{facts.busy['action']} by {facts.busy['who']} since {facts.busy['since']}"
        found.append(Refusal(f"the host is being changed: {who}", f"inv attach --host {target.name}"))
    if facts.current_fault:
        found.append(Refusal(facts.current_fault["what"], facts.current_fault["hint"]))
    if facts.paused:  # by somebody with a reason, who may be somebody else
        found.append(Refusal(paused(target, facts), f"inv resume --host {target.name}"))
    if facts.foreign_unit:
        found.append(Refusal(f"{facts.foreign_unit} is not Hearth's", f"inv adopt --host {target.name} takes it over"))
    found += [
        Refusal(f"the host has no secret {name}", f"inv secret set {name} --host {target.name}")
        for name in host.secrets
        if name not in facts.secrets
    ]
    if facts.user_fault:
        remedy = 'set `run_as` to a name of its own, such as "comfyui-service"'
        found.append(Refusal(f"the user {host.run_as} {facts.user_fault}", remedy))
    if host.scope == "user" and target.profile.network == "lan-deny":
        what = "without root nothing tells private addresses from others: mode lan-deny has no effect"
        found.append(Refusal(what, 'set scope = "system" for this host, or mode "offline"'))
    if host.scope == "user" and target.profile.network == "offline" and not (host.confined and facts.landlock >= _TCP):
        why = f"Landlock {facts.landlock} knows no TCP (Linux 6.7 does)" if host.confined else "it is not `confined`"
        what = f"nothing keeps ComfyUI from the network here: mode offline has no effect ({why})"
        found.append(Refusal(what, 'set scope = "system" for this host, or take a newer kernel and confined = true'))
    if target.profile.network != "open" and not all(ipaddress.ip_address(each).is_loopback for each in listen):
        what = f"network = {target.profile.network} shuts out whoever would come to {host.listen}, too"
        found.append(Refusal(what, 'listen = "127.0.0.1", and come by ssh -L or by a proxy on the host'))
    if host.scope == "system" and not facts.manager.startswith("systemd"):
        found.append(Refusal("the host runs no systemd", 'set scope = "user" for this host'))
    if not hosts.PLAIN_PATH.fullmatch(facts.prefix):
        what = f"{facts.prefix} holds characters that units and command lines do not take"
        found.append(Refusal(what, "set a `prefix` of letters, digits and . _ @ + -"))
    found += deployed_otherwise(target, facts)
    if not facts.writable:
        found.append(Refusal(f"{facts.login} may not write to {facts.prefix}", "choose another prefix, or let it"))
    found += storage(target, facts)
    if holder := port(target, facts):
        found.append(Refusal(holder, "end it, or set another `port` for this host"))
    return found + metrics(target, facts)


def metrics(target: Target, facts: Facts) -> list[Refusal]:
    """Why the host could not export the metrics that are wanted of it."""
    found: list[Refusal] = []
    wanted, holder = target.host.metrics_port, facts.metrics_holder
    if wanted and facts.manager == "process" and facts.lingers:
        what = "the host has no systemd for this login, and Hearth's own supervisor runs ComfyUI only, no exporter"
        found.append(Refusal(what, "leave `metrics_port` out for this host"))
    if holder and holder["unit"] != target.exporter_unit:
        what = f"port {wanted} is held by {holder['command']} (pid {holder['pid']})"
        found.append(Refusal(what, "end it, or set another `metrics_port` for this host"))
    return found


def deployed_otherwise(target: Target, facts: Facts) -> list[Refusal]:
    """What was deployed under settings that the configuration has changed since, and that nothing carries over."""
    found: list[Refusal] = []
    place, host = facts.place, target.host
    first = f"inv remove --host {target.name}, then change it"
    units = (facts.release(facts.current) or {}).get("files", {})
    served = min((each for each in units if each.endswith(".service")), key=len, default="")  # companions are longer
    for old in {served.removesuffix(".service"), place.service if facts.current else ""} - {"", host.service}:
        what = f"{facts.prefix} was deployed as service {old}, and the configuration says {host.service}"
        found.append(Refusal(what, f'set service = "{old}", so that its units are found; {first}'))
    if facts.current and place.scope and place.scope != host.scope:
        what = f'{facts.prefix} was deployed with scope = "{place.scope}", and the configuration says "{host.scope}"'
        found.append(Refusal(what, f'set scope = "{place.scope}", so that its units are found; {first}'))
    if host.scope == "system" and place.user and place.user != host.run_as:
        what = f"{facts.prefix}/data belongs to {place.user}, and the configuration says run_as = {host.run_as}"
        data = shlex.quote(f"{facts.prefix}/data")
        change = f"inv stop, then there: useradd --system {host.run_as}; chown -R {host.run_as}: {data}"
        found.append(Refusal(what, f'set run_as = "{place.user}"; to change it, then: {change}'))
    if place.elsewhere:
        what = f"{host.service} is deployed at {place.elsewhere}, and the configuration says {facts.prefix}"
        move = (
            f'set prefix = "{place.elsewhere}"; to move it: {first}, and mv {shlex.quote(place.elsewhere)}/data there'
        )
        found.append(Refusal(what, f"{move}; for a second one set another `service`"))
    return found


def paused(target: Target, facts: Facts) -> str:
    """Who keeps the service from running, and since when."""
    return f"{target.host.service} was paused by {facts.paused['who']} at {facts.paused['at']}"


def storage(target: Target, facts: Facts) -> list[Refusal]:
    """What is wrong with mounts and folders, and cannot be put right by a step."""
    found: list[Refusal] = []
    host = target.host
    for path, wanted in host.mounts.items():
        there = facts.mounts[path]
        if not wanted.what and not there.mounted:
            remedy = f"mount {path} there; writing into the empty mount point would hide it later"
            found.append(Refusal(f"{path} is not mounted", remedy))
        elif wanted.what and there.mounted and target.mount_text(path).split("\nWhere")[0] not in there.unit:
            remedy = f"umount {shlex.quote(path)} there, or leave out `what` for it"
            found.append(Refusal(f"{there.source} is mounted at {path}, and not by Hearth's unit for it", remedy))
        elif wanted.what and there.fault:
            found.append(Refusal(f"{wanted.what} cannot be mounted at {path}: {there.fault}", there.remedy))
    coming = tuple(f"{path}/" for path, wanted in host.mounts.items() if wanted.what and not facts.mounts[path].mounted)
    for path, fault in facts.places.items():
        made = fault == MISSING and path in host.folders.values()
        if fault and not made and not f"{path}/".startswith(coming):
            found.append(
                Refusal(f"{path} {fault}", f"on the host: ls -ld {shlex.quote(path)}; ComfyUI runs as {host.run_as}")
            )
    for path, left in facts.data_free.items():
        if left < RESERVE_DATA:
            what = f"{console.size(left)} free for {path}, {console.size(RESERVE_DATA)} needed"
            found.append(Refusal(what, "free some space there: nothing that ComfyUI writes would find room"))
    return found


def _system(facts: Facts, shelf: Shelf) -> tuple[list[Refusal], list[str]]:
    """What the host lacks for its nodes: refusals for required ones, notes for others."""
    refusals: list[Refusal] = []
    notes: list[str] = []
    for name, node in shelf.nodes.items():
        if lacking := [each for each in node.system if facts.packages.get(each) is False]:
            what = f"node {name} needs {', '.join(lacking)}, which the host lacks"
            remedy = f"on the host: apt-get install {' '.join(lacking)}"
            if node.required:
                refusals.append(Refusal(what, remedy))
            else:
                notes.append(f"{what}; {remedy}")
    return refusals, notes


def port(target: Target, facts: Facts) -> str:
    """Who else holds the port; empty when nobody does or it is the service itself."""
    holder = facts.port_holder
    if not holder or (facts.service.active and holder["pid"] in (0, facts.service.pid)):
        return ""
    return f"port {target.host.port} is held by {holder['command']} (pid {holder['pid']})"


def room(target: Target, facts: Facts, shelf: Shelf) -> list[Refusal]:
    """Whether a new environment finds room. Both figures are measured ones of the recipe."""
    found: list[Refusal] = []
    need = int(shelf.application.size[target.profile.stack] * NEEDS_ROOM) + RESERVE_BYTES
    if facts.disk_free < need:
        what = f"{console.size(facts.disk_free)} free at {facts.prefix}, {console.size(need)} needed"
        found.append(Refusal(what, "free some space there, or set another `prefix`"))
    inodes = shelf.application.files[target.profile.stack] + RESERVE_FILES
    if facts.inodes_free is not None and facts.inodes_free < inodes:
        what = f"{facts.inodes_free} inodes free at {facts.prefix}, {inodes} needed"
        found.append(Refusal(what, "delete small files there, or set another `prefix`"))
    return found


def _holds(facts: Facts, part: str) -> bool:
    return facts.parts.get(part) == ""


def _steps(
    target: Target, facts: Facts, choice: releases.Choice, wanted: dict[str, Any], options: Options
) -> list[Step]:
    """The steps, in order; none when the host is as wanted."""
    host = target.host
    steps: list[Step] = []
    users = [] if facts.user else [host.run_as]
    users += [] if facts.exporter_user else [target.site["exporter"]]
    if users:
        steps.append(account(users, "units run without privileges"))
    if not facts.lingers:
        title = f"let {facts.login}'s systemd run without a login (loginctl enable-linger)"
        why, undo = "ComfyUI would end with your session, and not start at boot", "loginctl disable-linger"
        steps.append(change.Linger(title, why, undo))
    steps += _people(target, facts)
    steps += _mounts(target, facts)
    missing = [path for path, fault in facts.places.items() if fault]
    if not facts.data:
        title = f"lay out {facts.prefix}"
        steps.append(change.Folders(title, "its folders are not all there", f"rm -r {facts.prefix}"))
    elif missing or not facts.shared:
        people = "everybody read" if host.public else "members share, and nobody else see,"
        title = f"make {', '.join(missing)}" if missing else f"let {people} what is in {facts.prefix}/data"
        why = "it is not there" if missing else "its modes or group are others"
        steps.append(change.Folders(title, why, "nothing: no file is touched"))
    steps += _part_steps(facts, choice, wanted)
    if facts.release(wanted["id"]) is None:
        steps.append(_release_step(wanted, "so that it can be returned to"))
    elif facts.release(wanted["id"]) != wanted or wanted["id"] in facts.altered:
        steps.append(_release_step(wanted, "its manifest, unit or links were changed"))
    replaced = any(step.kind in ("app", "env", "node", "release") for step in steps) or not facts.service.linked
    if facts.current != wanted["id"] or replaced:
        why = "what runs is not what it says" if facts.current == wanted["id"] else "it is not the one wanted"
        steps.append(_cut_over(facts, wanted["id"], why, options))
        if options.trial == "only":
            return steps
    elif options.trial == "only":
        return []
    elif not (facts.service.active and facts.service.enabled):
        missing = [name for name in ("active", "enabled") if not getattr(facts.service, name)]
        title = f"start {host.service}"
        steps.append(change.Serve(title, f"it is not {', not '.join(missing)}", f"stop {host.service}"))
    made = any(step.kind in ("app", "env", "node", "exporter", "release", "cut-over") for step in steps)
    steps += _prune(facts, wanted["id"], host.keep, made)
    return steps


def account(users: Sequence[str], why: str) -> Step:
    """The step that creates system users."""
    title = f"create the system user{'s' * (len(users) > 1)} {' and '.join(users)}"
    return change.Account(title, why, "; ".join(f"userdel {user}" for user in users))


def _cut_over(facts: Facts, to: str, why: str, options: Options) -> Step:
    """The step that puts a release in service, or only tries it."""
    before = facts.current or "nothing"
    if options.trial == "only":
        title, undo = f"try {to} beside {before}, which stays in service", "nothing: it leaves nothing behind"
    else:
        title, undo = f"cut over from {before} to {to}", f"back to {before}, also by itself when unhealthy"
    return change.CutOver(title, why, undo, options.drain, options.force, to, options.trial)


def _people(target: Target, facts: Facts) -> list[Step]:
    """Who belongs to the service's group, and what its members may do."""
    host = target.host
    steps: list[Step] = []
    if host.scope != "system":
        return steps
    group = f"{host.run_as}-members"
    there = facts.members if facts.user else ()  # the account's step makes the group
    if there is None or sorted(host.members) != sorted(there):
        title = f"members of group {group}: {', '.join(host.members) or 'nobody'}"
        why, undo = "they may write the data", f"gpasswd --members '{','.join(there or ())}' {group}"
        steps.append(change.Members(title, why, undo, host.members))
    rights = target.rights
    if facts.rights is not None and facts.rights != rights:
        may = " and ".join(["read its log", *(f"{each} it" for each in host.members_may)])
        title = f"let members of {group} {may} (sudo)" if rights else "take back what members may do by sudo"
        steps.append(change.Rights(title, "as configured", "rm the file in /etc/sudoers.d", rights))
    return steps


def _mounts(target: Target, facts: Facts) -> list[Step]:
    """What Hearth itself mounts: a unit for each, started now and at boot."""
    steps: list[Step] = []
    for path, wanted in target.host.mounts.items():
        there, text = facts.mounts[path], target.mount_text(path)
        if wanted.what and not (there.mounted and there.unit == text):
            title = f"mount {wanted.what} at {path} ({wanted.type}{f', {wanted.options}' * bool(wanted.options)})"
            why = (
                "it is not mounted" if not there.mounted else "its unit is another" if there.unit else "it has no unit"
            )
            undo = f"systemctl disable --now '{target.site['mounts'][path]}'"
            steps.append(change.Mount(title, why, undo, path, wanted.what, text))
    return steps


def _release_step(wanted: dict[str, Any], why: str) -> Step:
    title = f"write release {wanted['id']}: ComfyUI {wanted['version']}, torch {wanted['torch']}"
    return change.Release(f"{title}, Python {wanted['python']}", why, "pruned when others serve", wanted)


PRUNED = "pruned when no release names it"


def _part_steps(facts: Facts, choice: releases.Choice, wanted: Mapping[str, Any]) -> list[Step]:
    """The steps that make the parts of a release which the host lacks, or has damaged."""
    python = choice.interpreter
    steps: list[Step] = []

    def why(part: str) -> str:
        fault = facts.parts.get(part, "")
        return f"{part} is damaged: {fault}" if fault else "the host lacks it"

    if not _holds(facts, part := choice.app_part):
        title, writable = f"make {part}: ComfyUI {choice.application.version}", tuple(choice.application.writable)
        steps.append(change.App(title, why(part), PRUNED, part, python, writable, "comfyui"))
    if not _holds(facts, part := choice.env_part):
        if choice.uv not in facts.tools:
            steps.append(change.Tool(f"send uv ({choice.uv[:12]})", "it makes the environment", "pruned later"))
        steps.append(_env_step(choice, why(part), repair=bool(facts.parts.get(part))))
    steps += [
        _node_step(choice, name, part, why(part), wanted)
        for name, part in choice.node_parts.items()
        if not _holds(facts, part)
    ]
    if (part := choice.exporter_part) and not _holds(facts, part):
        steps.append(change.Exporter(f"make {part}: what exports metrics", why(part), PRUNED, part, python))
    return steps


def _env_step(choice: releases.Choice, why: str, *, repair: bool) -> Step:
    kernels = ", ".join(f"{wheel.kernel} {wheel.version}" for wheel in choice.wheels)
    label = f"the environment {choice.lock.name}{f' with {kernels}' if kernels else ''}"
    return change.Env(
        title=f"make {choice.env_part}: {label}",
        why=why,
        undo=PRUNED,
        part=choice.env_part,
        python=choice.interpreter,
        repair=repair,
        requirements=choice.requirements,
        kernels=tuple(wheel.file for wheel in choice.wheels),
        version=choice.python,
        asking=tuple(choice.asking),
    )


def _node_step(choice: releases.Choice, name: str, part: str, why: str, wanted: Mapping[str, Any]) -> Step:
    node = choice.nodes[name]
    step = change.Node(
        title=f"make {part}: node {name} {node.commit[:9]}",
        why=why,
        undo=PRUNED,
        part=part,
        python=choice.interpreter,
        writable=tuple(node.writable),
        keeps=f"nodes/{name}",
        node=name,
    )
    if not node.install:
        return step
    return replace(  # it runs as the service would
        step,
        install=choice.env_part,
        network=bool(node.install_network),
        confined=tuple(wanted.get("confined", ())),
        environment=wanted["environment"],
        unit=wanted["files"][f"{choice.target.host.service}.service"],
    )


def _prune(facts: Facts, wanted: str, keep: int, changes: bool) -> list[Step]:
    """Which releases stay: the wanted one, the one before, and those that served last, up to `keep`."""
    others = [name for name in facts.proven if name not in (wanted, facts.current)]
    kept = [wanted, *([facts.current] if facts.current != wanted and facts.current else [])]
    kept += others[: max(0, keep - len(kept))]
    gone = [each["id"] for each in facts.releases if each["id"] not in kept]
    named = {part for each in facts.releases if each["id"] in kept for part in each["parts"].values()}
    unnamed = [] if changes else [part for part in facts.parts if part not in named]
    if not (changes or gone or unnamed):
        return []
    title = f"prune: keep {', '.join(kept)}"
    return [change.Prune(title, "old releases take room", "deploy it again", tuple(kept))]


def allocator_without_effect(target: Target) -> str:
    """A variable for torch's own allocator, where ComfyUI chooses CUDA's; empty when there is none."""
    if not target.profile.cuda or "--disable-cuda-malloc" in target.flags:
        return ""
    named = (name for name, value in target.env.items() if name.endswith("ALLOC_CONF") and "backend:" not in value)
    return next(named, "")


_TCP = 4

_LACKS = {
    2: "ComfyUI cannot move files from one folder to another (Linux 5.19)",
    3: "only the filter of system calls keeps custom nodes from emptying files that they may not write (Linux 6.2)",
    _TCP: "custom nodes reach every TCP port, and listen at any (Linux 6.7)",
    5: "custom nodes may send any command (ioctl) to a device that is open to them (Linux 6.10)",
    6: "custom nodes can end other processes of {login}, Hearth's too, and reach their abstract sockets (Linux 6.12)",
}
"""What a Landlock lacks that is older than this version of it, and the kernel that has it (landlock(7))."""


def unconfined(target: Target, facts: Facts) -> list[str]:
    """What nothing keeps custom nodes from on a host without root, a sentence each."""
    if target.host.scope != "user":
        return []
    if not (facts.landlock and target.host.confined):
        why = "this kernel has no Landlock" if target.host.confined else "the host is not `confined`"
        return [f"{why}: custom nodes can read and write all that {facts.login} can"]
    lacks = (text.format(login=facts.login) for version, text in _LACKS.items() if facts.landlock < version)
    return [f"this kernel's Landlock is of version {facts.landlock}: {text}" for text in lacks]


def _notes(target: Target, facts: Facts) -> list[str]:
    found = [
        f"ComfyUI starts anew whenever a Python file in {each} changes, jobs or not" for each in target.host.develop
    ]
    for number, gpu in enumerate(facts.gpus if target.profile.cuda else ()):
        if who := others(gpu.processes):
            found.append(f"GPU {number} is used by others, and ComfyUI has that much less of it: {who}")
    if idle := allocator_without_effect(target):
        found.append(f"{idle} means nothing: ComfyUI chooses CUDA's allocator; mode native-allocator chooses torch's")
    if facts.manager == "process" and facts.lingers:
        found.append("this machine has no systemd for you: ComfyUI is supervised by Hearth, and not started at boot")
    if facts.manager == "process" and target.profile.memory_max:
        found.append("nothing limits ComfyUI's memory here: `memory_max` needs systemd")
    if facts.unused:
        names = ", ".join(facts.unused)
        found.append(f"nothing is loaded from {facts.prefix}/data/custom_nodes: {names} (inv nodes.add, or delete it)")
    found += unconfined(target, facts)
    if facts.rights is None and target.rights:
        found.append("the host has no sudo: members cannot read the log or restart ComfyUI by it")
    return found
