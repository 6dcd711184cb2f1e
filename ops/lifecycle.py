"""Start, stop and remove a deployed service. Each action is a plan, which is empty if nothing is to do."""

from __future__ import annotations

import functools
import shlex
from typing import TYPE_CHECKING

from agent.schema import change as schema
from agent.schema.requests import DropIns
from core import console
from core.console import counted
from core.errors import UsageError
from deploy import refusals
from deploy.change import Change, change_each
from deploy.look import find_target
from deploy.plan import Plan
from deploy.refusals import QUARANTINE
from ops import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from agent.schema.change import Step
    from deploy.change import Outcome, Planner
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options

    Make = Callable[[Target, Facts, Options], Plan]


# --- plans: pure ---------------------------------------------------------------------------------------------------


def start(target: Target, facts: Facts, _: Options) -> Plan:
    """The plan that starts ComfyUI."""
    found = refusals.unstartable(target, facts) + refusals.paused(target, facts)
    step = schema.Start(f"start {target.host.service}", facts.service.state, "inv stop", resume=False)
    return Plan.of(facts, [] if facts.service.active else [step], found)


def stop(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI until the next boot, if it starts at boot."""
    until = "inv start" if facts.manager == "process" else "the next boot or inv start"
    title = f"stop {target.host.service} until {until}"
    needed = facts.service.active or facts.service.waits
    needed = needed or bool(facts.busy)  # the current run may start it
    step = schema.Stop(title, facts.service.state, "inv start", options.drain, options.force, pause=False)
    steps = [step] if needed else []
    found = refusals.unchangeable(target, facts, force=options.force)
    return Plan.of(facts, steps, found, _ended(facts, force=options.force))


def restart(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that restarts ComfyUI. It always has a step."""
    found = refusals.unstartable(target, facts) + refusals.paused(target, facts)
    title = f"restart {target.host.service}"
    step = schema.Restart(title, "requested", "nothing", options.drain, options.force)
    return Plan.of(facts, [step], found)


def pause(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI until `resume`; neither a boot nor a deploy starts it."""
    service = facts.service
    found = refusals.unchangeable(target, facts, force=options.force) + refusals.not_deployed(target, facts)
    starts = service.enabled and facts.manager != "process"  # a supervised one is not started at boot
    if facts.paused and not (service.active or service.waits or starts or facts.busy):
        return Plan.of(facts, [], found)
    title = f"stop {target.host.service} until inv resume; no boot and no deploy starts it"
    steps = [schema.Stop(title, "requested", "inv resume", options.drain, options.force, pause=True)]
    return Plan.of(facts, steps, found, _ended(facts, force=options.force))


def resume(target: Target, facts: Facts, _: Options) -> Plan:
    """The plan that starts ComfyUI, now and at boot."""
    service, found = facts.service, refusals.unstartable(target, facts)
    if service.active and service.enabled and not facts.paused:
        return Plan.of(facts, [], found)
    why = next((each.what for each in refusals.paused(target, facts)), "it is not running, or not started at boot")
    title = f"start {target.host.service}{', also at boot' * (facts.manager != 'process')}"
    return Plan.of(facts, [schema.Start(title, why, "inv pause", resume=True)], found)


def quarantine(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI at once and removes its network access, however it is started."""
    host = target.host
    steps: list[Step] = []
    if host.scope == "system" and QUARANTINE not in facts.settings:  # first, since a stop may fail
        text = "# Written by Hearth: inv quarantine --undo removes it.\n[Service]\nPrivateNetwork=yes\n"
        place = f"/etc/systemd/system/{host.service}.service.d/zz-hearth-quarantine.conf"
        title = f"cut {host.service} off from the network, also after a restart"
        drop_in = DropIns({place: text})
        steps.append(settings.apply_step(QUARANTINE, drop_in, title, undo="inv quarantine --undo"))
    if facts.service.active or facts.service.waits or facts.busy or not facts.paused:
        title = f"stop {host.service} at once, until inv quarantine --undo and inv resume"
        steps.append(schema.Stop(title, "requested", "inv resume", options.drain, force=True, pause=True))
    notes = (
        [] if host.scope == "system" else ["without root its network cannot be blocked if another program starts it"]
    )
    found = [] if facts.service.active else refusals.unchangeable(target, facts, force=True)
    return Plan.of(facts, steps, found, [*notes, *_ended(facts, force=bool(steps))])


def end_quarantine(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that restores the service's network access; it stays paused."""
    title = f"restore the network of {target.host.service}; it stays paused until inv resume"
    steps = [settings.undo_step(QUARANTINE, title, force=options.force)] if QUARANTINE in facts.settings else []
    return Plan.of(facts, steps, refusals.unchangeable(target, facts))


def evidence(target: Target, prefix: str) -> list[str]:
    """Commands for inspecting a host in quarantine, each with a description of its output."""
    service, data = target.host.service, f"{prefix}/data"
    name = f"--host {target.name}"
    system = target.host.scope == "system"
    root, unit = ("sudo ", "--unit") if system else ("", "--user-unit")
    all_data = " ".join([data, *map(shlex.quote, target.host.folders.values())])
    log = f"{root}journalctl {unit} {service}.service --since '7 days ago' --output json > evidence.json"
    return [
        f"inv logs {name} --since '7 days ago'   # what ComfyUI and its nodes logged",
        f"inv history {name}                     # who changed what, and from where",
        f"inv doctor {name}                      # damaged parts, files where none belong",
        f"inv audit {name}                       # nodes and packages that are known to be bad",
        f"{root}find {all_data} -newermt '7 days ago' -type f -ls",
        rf"{root}find {all_data} \( -perm /6111 -type f -o -type l -o -type p -o -name '*.py' -o -name '*.so' \) -ls",
        f"{root}ls -la {data}/custom_nodes {data}/nodes {data}/cache",
        log if system else f"{log}; cp {prefix}/state/comfyui.log* .   # the second where no systemd runs it",
    ]


def remove(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that removes the service but keeps releases and data."""
    steps = _without_service(target, facts, options)
    if any(path.endswith("-apply.service") for path in facts.placed) or (steps and facts.manager != "process"):
        title = "remove the apply unit, which resumes interrupted runs"
        steps.append(schema.Forget(title, "no longer needed", "inv deploy"))
    kept = [f"kept: releases and data in {facts.prefix}; inv deploy --host {target.name} brings the service back"]
    if facts.settings:
        kept.append(
            f"kept: {', '.join(facts.settings)}, set outside the prefix; {refusals.settings_undo(target, facts)}"
        )
    return Plan.of(facts, steps, refusals.unchangeable(target, facts), kept, release="")


def nuke(target: Target, facts: Facts, options: Options, *, data: bool = False) -> Plan:
    """The plan that deletes everything of Hearth on a host; the data only with `data`."""
    place = facts.place
    steps = _without_service(target, facts, options)
    units = [unit for path, unit in target.site.mounts.items() if facts.mounts[path].unit.startswith(_WRITTEN)]
    if units:
        title = f"remove the units {', '.join(units)}; the file systems stay mounted until the next boot"
        steps.append(schema.ForgetMounts(title, "Hearth wrote them", "inv deploy", tuple(units)))
    rest = [name for name in place.own if name != "state"]
    if rest:
        title = f"delete {', '.join(rest)} in {facts.prefix}"
        steps.append(schema.Delete(title, "all releases with their parts", "inv deploy", tuple(rest)))
    top = f"{place.real}/data"
    whole = top not in place.mounts and f"{facts.prefix}/data" not in place.links
    if data and whole and place.data:
        title = f"DELETE {facts.prefix}/data: models, inputs, outputs, workflows, settings"
        steps.append(schema.Delete(title, "requested by --data", "impossible", ("data",)))
    if steps or "state" in place.own or facts.placed:
        title = f"delete {facts.prefix}/state, with the history of this host"
        steps.append(schema.Erase(title, "the prefix is otherwise empty", "impossible"))
    notes = _left(target, facts, data=data and whole)
    return Plan.of(facts, steps, refusals.undeletable(target, facts), notes, release="")


_WRITTEN = "# Written by Hearth"


def _without_service(target: Target, facts: Facts, options: Options) -> list[Step]:
    """The steps that remove the service from systemd, and the members' rights to it."""
    steps: list[Step] = []
    service = target.host.service
    units = [path for path in facts.placed if not path.endswith(f"{service}-apply.service")]
    if facts.current or units or facts.service.active or facts.service.waits:
        title = f"take release {facts.current} out of service" if facts.current else f"remove {service}"
        steps.append(schema.Withdraw(title, "requested", "inv deploy", options.drain, options.force))
    if facts.rights:
        title = "remove the members' sudo rules"
        steps.append(schema.Rights(title, "the service is gone", "inv deploy", ""))
    if facts.lingered:
        title = f"let {facts.login}'s systemd end with the last session (loginctl disable-linger)"
        steps.append(schema.EndLinger(title, "a deploy enabled it", "loginctl enable-linger"))
    return steps


def _ended(facts: Facts, *, force: bool) -> list[str]:
    """The note that a forced stop ends the current run, which may wait for this service."""
    busy = facts.busy
    return (
        [f"this aborts the {busy['action']} by {busy['who']}, in progress since {busy['since']}"]
        if busy and force
        else []
    )


def _left(target: Target, facts: Facts, *, data: bool) -> list[str]:
    """The data that a nuke leaves, with its path."""
    place, host = facts.place, target.host
    found = [] if data else [f"kept: {facts.prefix}/data"] * place.data
    found += [f"kept, it is mounted: {path}" for path in place.mounts]
    found += [f"kept, {path} links to it: {to}" for path, to in place.links.items()]
    found += [f"kept, it is outside the prefix: {path}" for path in (*host.folders.values(), *host.model_roots)]
    others = (*(f"{facts.prefix}/{name}" for name in place.others), *facts.drop_ins)
    found += [f"kept, it is not Hearth's: {path}" for path in others]
    if target.site.user and facts.user:
        found.append(
            f"kept: the user {host.run_as}, which owns the files that it wrote; to remove it: userdel {host.run_as}"
        )
    if target.site.exporter and facts.exporter_user:
        who = target.site.exporter
        found.append(
            f"kept: the user {who} of this machine's exporters, which owns no files; to remove it: userdel {who}"
        )
    return found


# --- carried out ---------------------------------------------------------------------------------------------------

ACTIONS: Mapping[str, tuple[Make, str]] = {
    "start": (start, "ComfyUI is running"),
    "stop": (stop, "ComfyUI is stopped"),
    "restart": (restart, "ComfyUI is running again"),
    "pause": (pause, "ComfyUI is paused"),
    "resume": (resume, "ComfyUI is running"),
    "quarantine": (quarantine, "ComfyUI is stopped and has no network; nothing is deleted"),
    "end quarantine": (end_quarantine, "ComfyUI's network is restored; ComfyUI is paused"),
    "remove": (remove, "the service is removed, releases and data are kept"),
    "nuke": (nuke, "Hearth is removed, except for the kept items above"),
}
"""The actions, each with its plan and the host's state afterwards."""


def carry_out(
    action: str, names: Sequence[str], options: Options, *, data: bool = False, yes_delete_data_of: str = ""
) -> list[Outcome]:
    """Run one of `ACTIONS` on hosts; `data` is for nuke.

    Raises RefusedError without confirmation, and UsageError for deleting the data of several hosts.
    """
    agree = _consent(names, yes_delete_data_of, data=data) if data or yes_delete_data_of else None
    make, state = ACTIONS[action]
    make = functools.partial(nuke, data=True) if data else make

    def planner(make: Make) -> Planner:
        return lambda _, target, facts: make(target, facts, options)

    # a restart always has a step: afterwards, `start` must have none
    check = planner(start) if action == "restart" else None
    change = Change(action=action, plan=planner(make), check=check, state=state)
    return change_each(names, change, options, agree=agree)


def _consent(names: Sequence[str], named: str, *, data: bool) -> Callable[[], None]:
    """Ask at the terminal for the host's name, unless --yes-delete-data-of gives it."""
    if not data:
        raise UsageError(
            "usage",
            "--yes-delete-data-of requires --data",
            hint="to see what it deletes: inv nuke --host NAME --data --dry-run",
        )
    if len(names) > 1:
        raise UsageError("usage", "--data works on one host at a time", hint="inv nuke --host NAME --data")
    if named and named != names[0]:
        what = f"--yes-delete-data-of {named} names another host than {names[0]}"
        raise UsageError("usage", what, hint="nothing was changed; name the host whose data to delete")

    def ask() -> None:
        if not named and not console.confirm_name(f"type {names[0]} to delete its data for good:", names[0]):
            remedy = f"at a terminal, type {names[0]}; elsewhere add --yes-delete-data-of {names[0]}"
            unconfirmed = refusals.unconfirmed("the host's name was not typed", remedy)
            raise refusals.refused("nothing was changed", [unconfirmed], host=names[0])

    return ask


def show_evidence(names: Sequence[str]) -> None:
    """Print what to inspect on hosts in quarantine."""
    found = {target.name: evidence(target, target.prefix) for target in map(find_target, names)}
    rows = [
        line
        for name, lines in found.items()
        for line in (f"{name}: places to inspect", *(f"  {each}" for each in lines))
    ]
    console.show(found, rows, as_json=False)


def show(results: Sequence[Outcome], *, as_json: bool, dry_run: bool) -> int:
    """Print the results of hosts; returns 2 if a dry run would change anything."""
    console.show(results, (_row(each, dry_run=dry_run) for each in results), as_json=as_json)
    return 2 if dry_run and any(each.changed for each in results) else 0


def _row(result: Outcome, *, dry_run: bool) -> str:
    if dry_run and result.changed:
        return f"{result.host}: {counted(len(result.steps), 'change')}"
    return f"{result.host}: {result.state}" if result.changed else f"{result.host}: nothing to do, {result.state}"
