"""GPU access: checks the devices' modes and groups; on request restricts them to a group, or restores them.

NVIDIA's nodes are not udev devices: the driver's tools (nvidia-modprobe, libcuda) create them, and set owner and mode
from the driver's parameters on every use (`ModifyDeviceFiles`). So the udev rule of many guides
(`SUBSYSTEM=="nvidia"`) matches nothing; only the parameters count (NVIDIA's driver README, "How and why are
permissions set on the device files?"). udev manages only the render nodes below /dev/dri.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import msgspec

from agent.schema.requests import DropIns
from agent.schema.settings import Access, Node
from core import console
from core.errors import UsageError
from core.typed import convert
from deploy import fleet, refusals
from deploy.change import Change, change_each
from deploy.look import look as facts_of
from deploy.plan import Plan
from ops import lifecycle, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.schema.settings import State
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options

NAME, GROUP = "gpu-access", "gpu-users"

_HEAD = "# Written by Hearth: inv gpu-access --undo removes it.\n"
_DEVICES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/nvidia-uvm*", "/dev/nvidia-modeset")
_FILES = {
    # Options for device files that the driver creates; it reads them when it is loaded.
    "/etc/modprobe.d/hearth-gpu-access.conf": f"{_HEAD}options nvidia NVreg_DeviceFileUID=0 "
    f"NVreg_DeviceFileGID=@gid:{GROUP}@ NVreg_DeviceFileMode=0660\n",
    "/etc/udev/rules.d/70-hearth-gpu-access.rules": f'{_HEAD}SUBSYSTEM=="drm", KERNEL=="renderD*", DRIVERS=="nvidia", '
    f'GROUP="{GROUP}", MODE="0660"\n',
    # The existing device files.
    "/etc/tmpfiles.d/hearth-gpu-access.conf": _HEAD + "".join(f"z {each} 0660 - {GROUP} -\n" for each in _DEVICES),
}


def users(target: Target) -> list[str]:
    """The users who need the GPU: the service's, the exporter's, and the members."""
    return list(filter(None, dict.fromkeys([target.host.run_as, target.site.exporter, *target.host.members])))


def setting(target: Target) -> DropIns:
    """The drop-in files that restrict the GPU to a group, and the group."""
    return DropIns(_FILES, {GROUP: tuple(users(target))})


# --- plans: pure ---------------------------------------------------------------------------------------------------


def keep(target: Target, facts: Facts, state: State, access: Access, options: Options) -> Plan:
    """The plan that restricts the GPU to the group."""
    found = refusals.unsettable(target, facts)
    if missing := [name for name, groups in access.users.items() if groups is None]:
        found.append(refusals.no_user(target, missing))
    if settings.settled(state, NAME):
        return Plan.of(facts, [], found)
    title = f"restrict the GPU to group {GROUP}: {', '.join(users(target))}"
    stops = settings.stopped(facts, options)
    step = settings.apply_step(NAME, setting(target), title, undo="inv gpu-access --undo", stops=stops)
    notes = [
        "all others lose access to the GPU: logins, the desktop and containers",
        f"users who are logged in get the group at their next login: {', '.join(users(target)[1:]) or 'none'}",
        "the driver applies this to its device files once it is reloaded: reboot (first update-initramfs -u, where "
        "the initramfs has the driver)",
    ]
    return Plan.of(facts, [step], found, notes)


def give_back(target: Target, facts: Facts, state: State, options: Options) -> Plan:
    """The plan that restores the previous access."""
    if NAME not in state.applied:
        return Plan.of(facts, [], [])
    title = f"remove the restriction: group {GROUP}, the driver's option and the udev rule"
    step = settings.undo_step(NAME, title, force=options.force, stops=settings.stopped(facts, options))
    return Plan.of(facts, [step], refusals.unsettable(target, facts))


# --- carried out ---------------------------------------------------------------------------------------------------


def run(names: Sequence[str], options: Options, *, apply: bool, undo: bool, as_json: bool) -> int:
    """Run `inv gpu-access`: check, restrict to the group (`apply`) or lift the restriction (`undo`)."""
    if apply and undo:
        raise UsageError("usage", "--apply and --undo exclude each other", hint="run the command twice, once with each")
    if not (apply or undo):
        return show(look(names, ask_sudo=options.ask_sudo), as_json=as_json)

    def planner(agent: Agent, target: Target, facts: Facts) -> Plan:
        state = settings.look(agent, {NAME: setting(target)})
        if undo:
            return give_back(target, facts, state, options)
        return keep(target, facts, state, convert(agent.call("access", users=users(target)), Access), options)

    action, state = ("undo gpu-access", "the GPU is unrestricted") if undo else (NAME, f"only {GROUP} can use the GPU")
    results = change_each(names, Change(action=action, plan=planner, state=state), options)
    return lifecycle.show(results, as_json=as_json, dry_run=options.dry_run)


def look(names: Sequence[str], *, ask_sudo: bool = False) -> list[fleet.Answer[Access]]:
    """The GPU access of hosts."""

    def one(agent: Agent, target: Target) -> Access:
        who = users(target) if target.host.scope == "system" else [facts_of(agent, target).login]
        return convert(agent.call("access", users=who), Access)

    return fleet.ask_each(names, one, ask_sudo=ask_sudo, seconds=30)


# --- shown ---------------------------------------------------------------------------------------------------------


def show(answers: Sequence[fleet.Answer[Access]], *, as_json: bool) -> int:
    """Print the GPU access; returns 1 if a user who needs the GPU lacks access, or a host did not answer."""
    fleet.show(answers, lines, lambda _, access: msgspec.to_builtins(access), as_json=as_json)
    return int(any(each.value is None or _denied(each.value) for each in answers))


def _denied(access: Access) -> list[Node]:
    """Device files that CUDA needs and a user cannot open. CUDA does not need render nodes."""
    optional = ("/dev/dri/", "/dev/nvidia-modeset", "/dev/nvidia-caps")
    return [each for each in access.nodes if each.denied and not each.place.startswith(optional)]


def lines(name: str, access: Access) -> list[str]:
    """A host's GPU access in words."""
    if not access.nodes:
        return [f"{name}: there are no /dev/nvidia* and /dev/dri/render*; next: inv doctor --host {name}"]
    rows = [
        (each.place, f"{each.mode:04o}", f"{each.owner}:{each.group}", ", ".join(each.denied) or "-")
        for each in access.nodes
    ]
    found = [f"{name}:", *console.table(("device", "mode", "owner", "cannot use it"), rows)]
    found += [f"driver: {', '.join(f'{key}={value}' for key, value in access.driver.items())}"] if access.driver else []
    found += [f"rule: {each.file}: {each.rule}"[:100] for each in access.rules]
    found += [f"user {who} does not exist" for who, groups in access.users.items() if groups is None]
    if denied := _denied(access):
        groups = {each.group for each in denied} - {"root"}
        join = f"on the host: usermod -aG {shlex.quote(groups.pop())} USER" if len(groups) == 1 else ""
        found.append(f"{name}: some required users cannot use the GPU; next: "
                     f"{join + '; or ' if join else ''}inv gpu-access --host {name} --apply")  # fmt: skip
    else:
        found.append(f"{name}: all required users can use the GPU")
    return found
