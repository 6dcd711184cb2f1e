"""Adopts an existing installation of ComfyUI, and undoes that."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agent.schema import change as schema
from agent.schema.records import OldUnit
from agent.schema.survey import Survey
from core import console
from core.console import counted
from core.errors import HostError, UsageError
from core.typed import convert
from deploy import connection, refusals
from deploy import host as hosts
from deploy.change import Change, carry_out, change_each
from deploy.group import Consent
from deploy.look import find_target, look
from deploy.plan import Plan, account
from deploy.proposal import propose
from deploy.survey import only, port, without_secrets
from lock import application, nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.schema.change import Step
    from deploy.change import Outcome
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.host import Target
    from deploy.plan import Options
    from deploy.proposal import Proposal


def adopt(
    name: str, path: str, by: str, options: Options, *, apply: bool, undo: bool
) -> tuple[Proposal | None, Outcome | None]:
    """Propose how Hearth adopts the ComfyUI on a host; changes nothing, and returns no outcome.

    `apply` adopts it: it is then out of service, and a deploy finds its folders in place. `undo` restores everything
    that this changed and starts the previous services; it returns no proposal and raises HostError if nothing was
    adopted.
    """
    if by not in ("rename", "reference") or (apply and undo):
        raise UsageError("usage", "use --by rename or --by reference, and only one of --apply and --undo")
    if undo:
        change = Change(action="undo adopt", plan=lambda _, target, facts: put_back(target, facts, options))
        (outcome,) = change_each(hosts.select(name, ""), change, options)
        if not outcome.changed:
            hint = f"inv history --host {outcome.host}"
            raise HostError("no-installation", f"there is no adopted installation on {outcome.host}", hint=hint)
        return None, outcome
    target = find_target(name)
    with connection.connect(target, options.ask_sudo) as agent:
        proposal = _propose(agent, target, look(agent, target), path, by)
    if not apply:
        return proposal, None

    def take(_: Agent, target: Target, facts: Facts) -> Plan:
        return take_over(target, facts, proposal, options)

    def check(agent: Agent, target: Target, facts: Facts) -> Plan:
        left = _propose(agent, target, facts, proposal.installation.path, by)
        # existing files in the data are kept; the run's notes list them
        return take_over(target, facts, replace(left, moves={}), options)

    agree = Consent([target.name], "adopt", options)
    return proposal, carry_out(Change(action="adopt", plan=take, check=check), target, options, agree)


def _propose(agent: Agent, target: Target, facts: Facts, path: str, by: str) -> Proposal:
    found = only(convert(without_secrets(agent.call("survey", path=path)), Survey), target.name)
    text = application.text(application.tree(application.application(target.host.comfyui)), "comfy/cli_args.py")
    return propose(target, facts, found, nodes.catalogue(), application.flags(text), by)


# --- plans: pure -----------------------------------------------------------------------------------------------------

_UNIT = ("name", "path", "active", "enabled")
_UNDO = "inv adopt --undo"


def take_over(target: Target, facts: Facts, proposal: Proposal, options: Options) -> Plan:
    """The plan that adopts an installation: stop its units and disable them, then move folder by folder."""
    found, data = proposal.installation, f"{facts.prefix}/data"
    there = [unit for unit in found.units if not unit.aside]
    # A packaged unit stays in place, stopped and disabled.
    units = {unit.name: unit for unit in there if unit.active or unit.enabled or unit.path.startswith("/etc/")}
    against = refusals.unadoptable(target, facts)
    against += [refusals.loose_process(each.pid, each.user) for each in found.processes if each.unit not in units]
    steps: list[Step] = []
    if units:
        title, why = (
            f"stop {', '.join(units)} and set the unit files aside",
            f"it runs {found.path}, or has the name of Hearth's unit",
        )
        old = tuple(OldUnit(each.name, each.path, each.active, each.enabled) for each in units.values())
        retire = schema.Retire(title, why, _UNDO, options.drain, options.force, old, found.path, port(found))
        steps.append(retire)
    if proposal.moves and not facts.user:
        steps.append(account([target.host.run_as], "the moved files will belong to it"))
    if proposal.moves and not facts.data:
        title, undo = f"create {facts.prefix}", f"rm -r {facts.prefix}"
        steps.append(schema.Folders(title, "some of its folders are missing", undo))
    for name, (place, size, count) in proposal.moves.items():
        title = f"move {place} to {data}/{name} ({counted(count, 'file')}, {console.size(size)})"
        steps.append(schema.Adopt(title, "a rename, without a copy", _UNDO, name, place, tuple(found.owners)))
    return Plan.of(facts, steps, against)


def put_back(target: Target, facts: Facts, options: Options) -> Plan:
    """The plan that undoes an adoption; empty if nothing was adopted."""
    if not facts.adopted:
        return Plan.of(facts, [], [])
    steps: list[Step] = []
    if facts.current:
        title = f"take release {facts.current} out of service"
        why = "the old ComfyUI needs its folders and its port"
        steps.append(schema.Withdraw(title, why, "inv deploy", options.drain, options.force))
    steps.append(schema.Unadopt("restore the old ComfyUI", "requested", "inv adopt --apply"))
    return Plan.of(facts, steps, refusals.unadoptable(target, facts), release="")


def rows(found: Proposal) -> Iterator[str]:
    """The installation, the folders to move, its nodes, the items not adopted, and the lines for hosts.toml."""
    old = found.installation
    version = f"ComfyUI {old.version or 'of an unknown version'} {old.commit[:9]}".rstrip()
    yield f"{old.path}: {version}{f', torch {old.torch}, Python {old.python}' if old.torch else ''}"
    for unit in old.units:
        state = "set aside" if unit.aside else f"{'active' if unit.active else 'stopped'}, runs as {unit.user}"
        yield f"  {unit.name}: {state}"
    for process in old.processes:
        yield f"  pid {process.pid} of {process.user}{', listens on the port' if old.holds_port else ''}"
    for name, (origin, size, count) in found.moves.items():
        yield f"  {name}: {origin}, {counted(count, 'file')}, {console.size(size)}: moved into data/ by a rename"
    for name, remark in found.nodes.items():
        yield f"  node {name}: known, {remark}"
    for what, why in found.left:
        yield f"  not adopted: {what}: {why}"
    yield from ("", "for config/hosts.toml:", "", *found.snippet.splitlines())
    if found.add:
        yield from ("", "unknown nodes: pin them, run inv lock, then add their names to `nodes`:", "")
        yield from (f"    {command}" for command in found.add)


def adopted_rows(found: Proposal | None, outcome: Outcome, *, dry_run: bool) -> Iterator[str]:
    """The result of an adoption, or of its undo, which has no proposal."""
    if dry_run or not outcome.changed:
        yield f"{outcome.host}: {counted(len(outcome.steps), 'change') if outcome.steps else 'no changes'}"
    elif found is None:
        yield f"{outcome.host}: the original installation is restored"
    else:
        yield from rows(found)
        environment = found.installation.environment or "its virtual environment"
        at = f"--host {outcome.host}"
        yield from (
            "",
            f"{outcome.host}: adopted; add the lines above to config/hosts.toml, then run inv deploy {at}",
            f"inv adopt {at} --undo restores the original installation; if you do not need that any more, delete",
            f"{found.installation.path} and {environment} on the host",
        )
