"""Starting, stopping and taking away a service that is there: plans, empty where it is so already."""

from __future__ import annotations

import functools
import shlex
from typing import TYPE_CHECKING

import msgspec

from agent.schema import change
from core import console
from core.errors import RefusedError, UsageError
from deploy import flow, plan
from deploy.plan import Plan, Refusal
from ops import tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from agent.schema.change import Step
    from deploy.facts import Facts
    from deploy.flow import Outcome
    from deploy.host import Target
    from deploy.plan import Options

    Make = Callable[[Target, Facts, Options], Plan]


# --- plans: pure ---------------------------------------------------------------------------------------------------


def start(target: Target, facts: Facts, _: Options) -> Plan:
    """The plan that starts ComfyUI."""
    refusals = _able(target, facts)
    if facts.paused:
        refusals.append(Refusal(plan.paused(target, facts), f"inv resume --host {target.name}"))
    if facts.service.active:
        return _plan(facts, [], refusals)
    step = change.Start(f"start {target.host.service}", facts.service.state, "inv stop", resume=False)
    return _plan(facts, [step], refusals)


def stop(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI; it comes back at boot, where anything starts it there."""
    until = "inv start" if facts.manager == "process" else "the next boot or inv start"
    title = f"stop {target.host.service} until {until}"
    needed = facts.service.active or facts.service.waits
    needed = needed or bool(facts.busy)  # the run under way may start it
    step = change.Stop(title, facts.service.state, "inv start", options.drain, options.force, pause=False)
    steps = [step] if needed else []
    return _plan(facts, steps, _changeable(target, facts, force=options.force), _ended(facts, force=options.force))


def restart(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI and starts it again; there is always something to do."""
    refusals = _able(target, facts)
    if facts.paused:
        refusals.append(Refusal(plan.paused(target, facts), f"inv resume --host {target.name}"))
    title = f"restart {target.host.service}"
    step = change.Restart(title, "asked for", "nothing", options.drain, options.force)
    return _plan(facts, [step], refusals)


def pause(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that takes ComfyUI out of traffic until somebody resumes it, whatever boots or deploys meanwhile."""
    service = facts.service
    refusals = _changeable(target, facts, force=options.force)
    if not facts.current:
        refusals.append(_nothing(target))
    starts = service.enabled and facts.manager != "process"  # nothing starts a supervised one at boot
    if facts.paused and not (service.active or service.waits or starts or facts.busy):
        return _plan(facts, [], refusals)
    title = f"stop {target.host.service} until inv resume; no boot and no deploy starts it"
    steps = [change.Stop(title, "asked for", "inv resume", options.drain, options.force, pause=True)]
    return _plan(facts, steps, refusals, _ended(facts, force=options.force))


def resume(target: Target, facts: Facts, _: Options) -> Plan:
    """The plan that starts ComfyUI, and has it started at boot."""
    service = facts.service
    if service.active and service.enabled and not facts.paused:
        return _plan(facts, [], _able(target, facts))
    why = plan.paused(target, facts) if facts.paused else "it does not run, or is not started at boot"
    title = f"start {target.host.service}{', also at boot' * (facts.manager != 'process')}"
    return _plan(facts, [change.Start(title, why, "inv pause", resume=True)], _able(target, facts))


def quarantine(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that stops ComfyUI without asking it, and keeps it from the network should anything start it."""
    host = target.host
    title = f"stop {host.service} without asking it, until inv quarantine --undo and inv resume"
    steps: list[Step] = [change.Stop(title, "asked for", "inv resume", options.drain, force=True, pause=True)]
    if facts.paused and not (facts.service.active or facts.service.waits or facts.busy):
        steps = []
    if host.scope == "system" and QUARANTINE not in facts.settings:
        text = "# Written by Hearth: inv quarantine --undo takes it away.\n[Service]\nPrivateNetwork=yes\n"
        place = f"/etc/systemd/system/{host.service}.service.d/zz-hearth-quarantine.conf"
        steps.insert(  # first: a stop that fails must not leave it the network
            0,
            tuning.setting_step(
                QUARANTINE,
                [tuning.file(place, text)],
                f"deny {host.service} the network, whatever starts it",
                "asked for",
                "inv quarantine --undo",
            ),
        )
    notes = [] if host.scope == "system" else ["without root nothing denies it the network, should anything start it"]
    refusals = [] if facts.service.active else _changeable(target, facts, force=True)
    return _plan(facts, steps, refusals, [*notes, *_ended(facts, force=bool(steps))])


def end_quarantine(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that gives the service the network again; it stays paused."""
    title = f"give {target.host.service} the network again; it stays paused until inv resume"
    steps = [tuning.undo_step(QUARANTINE, title, force=options.force)] if QUARANTINE in facts.settings else []
    return _plan(facts, steps, _changeable(target, facts))


QUARANTINE = "quarantine"
"""The setting that denies the network."""


def evidence(target: Target, prefix: str) -> list[str]:
    """What to look at on a host in quarantine: commands for its shell, each with what it shows."""
    service, data = target.host.service, f"{prefix}/data"
    name = f"--host {target.name}"
    system = target.host.scope == "system"
    root, unit = ("sudo ", "--unit") if system else ("", "--user-unit")
    all_data = " ".join([data, *map(shlex.quote, target.host.folders.values())])
    log = f"{root}journalctl {unit} {service}.service --since '7 days ago' --output json > evidence.json"
    return [
        f"inv logs {name} --since '7 days ago'   # what ComfyUI and its nodes said",
        f"inv history {name}                     # who changed what, and from where",
        f"inv doctor {name}                      # damaged parts, files where none belong",
        f"inv audit {name}                       # nodes and packages that are known to be bad",
        f"{root}find {all_data} -newermt '7 days ago' -type f -ls",
        rf"{root}find {all_data} \( -perm /6111 -type f -o -type l -o -type p -o -name '*.py' -o -name '*.so' \) -ls",
        f"{root}ls -la {data}/custom_nodes {data}/nodes {data}/cache",
        log if system else f"{log}; cp {prefix}/state/comfyui.log* .   # the second where no systemd runs it",
    ]


def remove(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that takes the service away, and keeps releases and data."""
    steps = _without_service(target, facts, options)
    if any(path.endswith("-apply.service") for path in facts.placed) or (steps and facts.manager != "process"):
        title, why = "forget the unit that goes on with interrupted changes", "there is nothing left to go on with"
        steps.append(change.Forget(title, why, "inv deploy"))
    kept = [f"kept: releases and data in {facts.prefix}; inv deploy --host {target.name} brings the service back"]
    if facts.settings:
        kept.append(f"kept: {', '.join(facts.settings)}, set outside it; {_undone_by(target, facts)}")
    return _plan(facts, steps, _changeable(target, facts), kept, release="")


def nuke(target: Target, facts: Facts, options: Options, *, data: bool = False) -> Plan:
    """The plan that leaves nothing of Hearth's on a host but the data, and with `data` not that."""
    place = facts.place
    steps = _without_service(target, facts, options)
    units = [unit for path, unit in target.site["mounts"].items() if facts.mounts[path].unit.startswith(_WRITTEN)]
    if units:
        title = f"forget the units {', '.join(units)}; what is mounted stays so until the next boot"
        steps.append(change.ForgetMounts(title, "Hearth wrote them", "inv deploy", tuple(units)))
    rest = [name for name in place.own if name != "state"]
    if rest:
        title = f"delete {', '.join(rest)} in {facts.prefix}"
        steps.append(change.Delete(title, "all releases with their parts", "inv deploy", tuple(rest)))
    top = f"{place.real}/data"
    whole = top not in place.mounts and f"{facts.prefix}/data" not in place.links
    if data and whole and place.data:
        title = f"DELETE {facts.prefix}/data: models, inputs, outputs, workflows, settings"
        steps.append(change.Delete(title, "asked for by --data", "nothing brings it back", ("data",)))
    if steps or "state" in place.own or facts.placed:
        title = f"delete {facts.prefix}/state, with the history of this host"
        steps.append(change.Erase(title, "the last of it", "nothing brings it back"))
    return _plan(facts, steps, _erasable(target, facts), _left(target, facts, data=data and whole), release="")


_WRITTEN = "# Written by Hearth"


def _plan(
    facts: Facts,
    steps: Sequence[Step],
    refusals: Sequence[Refusal],
    notes: Sequence[str] = (),
    release: str | None = None,
) -> Plan:
    """Refusals leave no steps."""
    after = facts.current if release is None else release
    return Plan(facts.current, after, () if refusals else tuple(steps), tuple(refusals), tuple(notes))


def _without_service(target: Target, facts: Facts, options: Options) -> list[Step]:
    """The steps that take the service out of systemd, and people's rights to it."""
    steps: list[Step] = []
    service = target.host.service
    units = [path for path in facts.placed if not path.endswith(f"{service}-apply.service")]
    if facts.current or units or facts.service.active or facts.service.waits:
        title = f"take release {facts.current} out of service" if facts.current else f"take away {service}"
        steps.append(change.Withdraw(title, "asked for", "inv deploy", options.drain, options.force))
    if facts.rights:
        title, why = "take back what members may do by sudo", "there is no service for them any more"
        steps.append(change.Rights(title, why, "inv deploy", ""))
    if facts.lingered:
        title = f"let {facts.login}'s systemd end with its last session again (loginctl disable-linger)"
        steps.append(change.EndLinger(title, "a deploy of Hearth's enabled it", "loginctl enable-linger"))
    return steps


def _ended(facts: Facts, *, force: bool) -> list[str]:
    """The note that a forced stop ends what is under way: it may wait for what that is to end."""
    busy = facts.busy
    return [f"the {busy['action']} by {busy['who']} since {busy['since']} is ended for that"] if busy and force else []


def _changeable(target: Target, facts: Facts, *, force: bool = False) -> list[Refusal]:
    """What keeps a host's service from being changed at all; with `force` it is stopped whatever is under way."""
    found: list[Refusal] = []
    at = f"--host {target.name}"
    if facts.busy and not force:
        who = f"{facts.busy['action']} by {facts.busy['who']} since {facts.busy['since']}"
        found.append(Refusal(f"the host is being changed: {who}", f"inv attach {at}"))
    if facts.current_fault:
        found.append(Refusal(facts.current_fault["what"], facts.current_fault["hint"]))
    if facts.foreign_unit:
        found.append(Refusal(f"{facts.foreign_unit} is not Hearth's", f"systemctl there, or inv adopt {at}"))
    if target.host.scope == "system" and not facts.manager.startswith("systemd"):
        found.append(Refusal("the host runs no systemd", 'set scope = "user" for this host'))
    return found + plan.deployed_otherwise(target, facts)


def _able(target: Target, facts: Facts) -> list[Refusal]:
    """What keeps the service from starting."""
    found = _changeable(target, facts)
    if not facts.current:
        return [*found, _nothing(target)]
    if QUARANTINE in facts.settings:
        found.append(Refusal(f"{target.host.service} is in quarantine", f"inv quarantine --undo --host {target.name}"))
    found += plan.storage(target, facts)
    for path, wanted in target.host.mounts.items():
        if wanted.what and not facts.mounts[path].mounted:
            found.append(Refusal(f"{path} is not mounted", f"inv deploy --host {target.name} mounts it"))
    if holder := plan.port(target, facts):
        found.append(Refusal(holder, "end it, or set another `port` for this host"))
    if not facts.service.linked:
        what = f"what would start is not release {facts.current}'s own unit: it is missing or was changed"
        found.append(Refusal(what, f"inv deploy --host {target.name} puts it right"))
    return found


def _nothing(target: Target) -> Refusal:
    return Refusal(f"nothing is in service on {target.name}", f"inv deploy --host {target.name}")


def _erasable(target: Target, facts: Facts) -> list[Refusal]:
    """What keeps a prefix from being deleted."""
    found = _changeable(target, facts)
    place, prefix = facts.place, facts.prefix
    by_hand = "look at what lies there, and delete by hand what is Hearth's"
    if place.link:
        found.append(
            Refusal(f"{prefix} is a symbolic link to {place.real}", f"set `prefix` to {place.real}, if that is meant")
        )
    if place.mount:
        found.append(Refusal(f"{prefix} is a mount point", by_hand))
    if place.real.count("/") < 2:
        found.append(Refusal(f"{prefix} is {'the root' if place.real == '/' else 'a top-level folder'}", by_hand))
    if place.homes:
        found.append(Refusal(f"{prefix} is or holds the home of {', '.join(place.homes)}", by_hand))
    if place.crossings:
        found.append(Refusal(f"{', '.join(place.crossings)} in {prefix}: a link leads out of there", by_hand))
    if inside := [path for path in place.mounts if not f"{path}/".startswith(f"{place.real}/data/")]:
        found.append(Refusal(f"something is mounted at {', '.join(inside)}", "umount it there first"))
    if (place.own or place.data) and not (place.ours or facts.data):
        found.append(Refusal(f"{prefix} does not look like Hearth's: no state and no release of its own", by_hand))
    if facts.adopted:
        what = "an installation was adopted, and state/ holds what gives it back"
        undo = (
            f"inv adopt --host {target.name} --undo; or, to keep it as it is now, rm {prefix}/state/adopted.jsonl there"
        )
        found.append(Refusal(what, undo))
    if facts.settings:
        what = f"{', '.join(facts.settings)} is set outside {prefix}, and state/ holds what was there before"
        found.append(Refusal(what, _undone_by(target, facts)))
    return found


def _undone_by(target: Target, facts: Facts) -> str:
    """What undoes the settings that are in force."""
    own = {"mps": "inv mps off", "gpu-access": "inv gpu-access --undo", QUARANTINE: "inv quarantine --undo"}
    found = dict.fromkeys(own.get(each, "inv tune --undo") for each in facts.settings)
    return "; ".join(f"{each} --host {target.name}" for each in found)


def _left(target: Target, facts: Facts, *, data: bool) -> list[str]:
    """What a nuke leaves, and where it lies."""
    place, host = facts.place, target.host
    found = [] if data else [f"left: {facts.prefix}/data"] * place.data
    found += [f"left, it is mounted: {path}" for path in place.mounts]
    found += [f"left, {path} leads there: {to}" for path, to in place.links.items()]
    found += [f"left, it lies elsewhere: {path}" for path in (*host.folders.values(), *host.model_roots)]
    others = (*(f"{facts.prefix}/{name}" for name in place.others), *facts.drop_ins)
    found += [f"left, it is not Hearth's: {path}" for path in others]
    if target.site["user"] and facts.user:
        found.append(f"left: the account {host.run_as}, which owns what it wrote; userdel {host.run_as} removes it")
    if target.site["exporter"] and facts.exporter_user:
        who = target.site["exporter"]
        found.append(
            f"left: the account {who} of this machine's exporters, which owns nothing; userdel {who} removes it"
        )
    return found


# --- carried out ---------------------------------------------------------------------------------------------------

PLANS: Mapping[str, Make] = {
    "start": start,
    "stop": stop,
    "restart": restart,
    "pause": pause,
    "resume": resume,
    "quarantine": quarantine,
    "end quarantine": end_quarantine,
    "remove": remove,
    "nuke": nuke,
}

STATES = {
    "start": "ComfyUI runs",
    "stop": "ComfyUI is stopped",
    "restart": "ComfyUI runs again",
    "pause": "ComfyUI is paused",
    "resume": "ComfyUI runs",
    "quarantine": "ComfyUI is stopped and has no network; nothing is deleted",
    "end quarantine": "ComfyUI has the network again, and is paused",
    "remove": "the service is removed, releases and data are kept",
    "nuke": "nothing of Hearth's is left but what was named",
}


def carry_out(
    action: str, names: Sequence[str], options: Options, *, data: bool = False, yes_delete_data_of: str = ""
) -> list[Outcome]:
    """Do one of `PLANS` on hosts; `data` is for nuke.

    Raises RefusedError when nobody agreed, UsageError when the data of several hosts would go.
    """
    consent = _consent(names, yes_delete_data_of, data=data) if data or yes_delete_data_of else None
    make = functools.partial(nuke, data=True) if data else PLANS[action]
    return flow.change(
        names,
        action,
        lambda _, target, facts: make(target, facts, options),
        options,
        state=STATES[action],
        consent=consent,
        converges=action != "restart",
    )


def _consent(names: Sequence[str], named: str, *, data: bool) -> Callable[[], None]:
    """Asks whoever is at the terminal for the host's name, unless it was given already."""
    if not data:
        raise UsageError(
            "--yes-delete-data-of goes with --data", hint="inv nuke --host NAME --data --dry-run shows what goes"
        )
    if len(names) > 1:
        raise UsageError("--data is for one host at a time", hint="inv nuke --host NAME --data")
    if named and named != names[0]:
        what = f"--yes-delete-data-of {named} names another host than {names[0]}"
        raise UsageError(what, hint="nothing was changed; name the host whose data shall go")

    def ask() -> None:
        if not named and not console.typed(f"type {names[0]} to delete its data for good:", names[0]):
            raise RefusedError(
                "nothing was changed: its name was not typed",
                hint=f"at a terminal, type {names[0]}; elsewhere add --yes-delete-data-of {names[0]}",
            )

    return ask


def show_evidence(names: Sequence[str]) -> None:
    """Print what to look at on hosts in quarantine."""
    for name in names:
        target = flow.find_target(name)
        console.data(f"{name}: what to look at")
        for line in evidence(target, target.prefix):
            console.data(console.line(f"  {line}"))


def show(results: Sequence[Outcome], *, as_json: bool, dry_run: bool) -> int:
    """Print how it ended, host by host; returns 2 when a dry run would change anything."""
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in results])
    else:
        for each in results:
            if dry_run and each.changed:
                console.data(f"{each.host}: {len(each.steps)} changes")
            else:
                console.data(
                    f"{each.host}: {each.state}" if each.changed else f"{each.host}: nothing to do, {each.state}"
                )
    return 2 if dry_run and any(each.changed for each in results) else 0
