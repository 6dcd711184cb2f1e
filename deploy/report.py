"""What the deploy tasks print: tables and JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core import console, files
from deploy import host as hosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.bundle import Opened
    from deploy.change import Outcome
    from deploy.facts import Facts, MountState
    from deploy.proposal import Proposal
    from lock.audit import Audit
    from lock.diff import Difference


def _say(text: str) -> None:
    """A line with words of hosts and repositories in it."""
    console.data(console.line(text))


def outcomes(results: Sequence[Outcome], *, as_json: bool, dry_run: bool) -> int:
    """How a deploy or rollback ended, host by host; returns 2 when a dry run would change anything."""
    code = 2 if dry_run and any(each.changed for each in results) else 0
    if as_json:
        console.data_json([msgspec.to_builtins(each) for each in results])
        return code
    for each in results:
        if dry_run:
            console.data(f"{each.host}: {len(each.steps)} changes" if each.changed else f"{each.host}: nothing to do")
        elif each.state:
            _say(f"{each.host}: {each.state}")
        elif each.changed:
            console.data(
                f"{each.host}: release {each.release} is in service{f' at {each.address}' * bool(each.address)}"
            )
        else:
            console.data(f"{each.host}: nothing to do, release {each.release} is in service at {each.address}")
    return code


def releases(facts: Facts, *, as_json: bool) -> None:
    """The releases kept on a host: the current one, those that served before, the latest first, and unproven ones."""
    if as_json:
        console.data_json([{**each, "current": each["id"] == facts.current} for each in facts.releases])
        return
    rows = []
    order = [facts.current, *facts.proven]
    for each in sorted(facts.releases, key=lambda each: order.index(each["id"]) if each["id"] in order else len(order)):
        faults = [f"{part}: {facts.parts.get(part, 'missing')}" for part in each["parts"].values()]
        faults += ["its unit or links were changed"] if each["id"] in facts.altered else []
        bad = "; ".join(fault for fault in faults if not fault.endswith(": "))
        kernels = ", ".join(f"{name} {version}" for name, version in each["kernels"].items()) or "-"
        proven = "served before" if each["id"] in facts.proven else "never healthy"
        mark = "current" if each["id"] == facts.current else proven
        stack = f"{each['stack']}, torch {each['torch']}"
        rows.append((each["id"], each["version"], stack, each["python"], kernels, mark, bad or "whole"))
    console.table(("release", "ComfyUI", "stack", "Python", "kernels", "", "parts"), rows)


def bundle(path: Path, opened: Opened, *, as_json: bool) -> None:
    """What a bundle holds, and who signed it; its id is a hash over all of it."""
    found = opened.bundle
    if as_json:
        about = {key: value for key, value in msgspec.to_builtins(found).items() if key != "files"}
        about |= {"file": str(path), "id": opened.id, "origin": opened.origin}
        console.data_json({**about, "bytes": found.size, "files": len(found.files)})
        return
    kernels = [f"{name} {version}" for name, version in found.kernels.items()]
    rows = [
        ("bundle", f"{path}, whole: {len(found.files)} files, {console.size(found.size)}"),
        ("id", opened.id),
        ("origin", opened.origin),
        ("for", f"profile {found.profile}, {found.platform}, Python {found.python}"),
        ("ComfyUI", found.version),
        ("kernels", ", ".join(kernels) or "none"),
        ("nodes", ", ".join(found.asking) or "none"),
    ]
    console.table(("", ""), rows)


def proposal(found: Proposal, *, as_json: bool) -> None:
    """What becomes of an installation: the lines for hosts.toml, what is moved, its nodes, what is not taken over."""
    if as_json:
        console.data_json(msgspec.to_builtins(found))
        return
    old = found.installation
    version = f"ComfyUI {old.version or 'of an unknown version'} {old.commit[:9]}".rstrip()
    _say(f"{old.path}: {version}{f', torch {old.torch}, Python {old.python}' if old.torch else ''}")
    for unit in old.units:
        where = "put aside" if unit.aside else f"{'runs' if unit.active else 'stopped'}, as {unit.user}"
        _say(f"  {unit.name}: {where}")
    for process in old.processes:
        _say(f"  pid {process.pid} of {process.user}{', holds the port' if old.holds_port else ''}")
    for name, (source, size, count) in found.moves.items():
        _say(f"  {name}: {source}, {count} files, {console.size(size)}: a rename brings it to the data")
    for name, remark in found.nodes.items():
        _say(f"  node {name}: known, {remark}")
    for what, why in found.left:
        _say(f"  not taken over: {what}: {why}")
    console.data(f"\nfor config/hosts.toml:\n\n{found.snippet}")
    if found.add:
        console.data("nodes that Hearth does not know yet; then inv lock, and their names in `nodes`:\n")
        for command in found.add:
            _say(f"    {command}")


def adopted(found: Proposal | None, outcome: Outcome | None, *, as_json: bool, dry_run: bool) -> int:
    """How taking over, or undoing that (then there is no proposal), ended, or what is proposed (then no outcome).

    Returns 2 when a dry run would change anything.
    """
    if outcome is None:
        assert found is not None
        proposal(found, as_json=as_json)
        return 0
    if as_json:
        console.data_json({**msgspec.to_builtins(outcome), "proposal": msgspec.to_builtins(found)})
    elif dry_run or not outcome.changed:
        console.data(f"{outcome.host}: {len(outcome.steps) or 'no'} changes")
    elif found is None:
        console.data(f"{outcome.host}: all is where it was")
    else:
        proposal(found, as_json=False)
        environment = found.installation.environment or "its virtual environment"
        console.data(
            f"\n{outcome.host}: adopted; with those lines, inv deploy --host {outcome.host} puts it in service"
        )
        console.data(f"inv adopt --host {outcome.host} --undo puts it back; when that is not wanted any more, delete")
        _say(f"{found.installation.path} and {environment} there")
    return 2 if dry_run and outcome.changed else 0


def history(lines: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """How every run on a host ended, oldest first."""
    if as_json:
        console.data_json(list(lines))
        return
    rows = [(each["at"], each["who"], each["action"], each["release"], each["result"], each["error"]) for each in lines]
    console.table(("when", "who", "what", "release", "result", ""), rows)


def facts(found: Facts, *, as_json: bool) -> None:
    """What a host is now."""
    if as_json:
        console.data_json(msgspec.to_builtins(found))
        return
    gpus = [f"{gpu.name} ({gpu.capability})" for gpu in found.gpus]
    bad = [f"{name}: {fault}" for name, fault in found.parts.items() if fault]
    rows = [
        ("host", found.hostname),
        ("system", f"{found.os}, {found.machine}, kernel {found.kernel}, glibc {found.glibc}"),
        ("Python", ", ".join(f"{version} ({path})" for version, path in found.pythons.items()) or "none that fits"),
        ("GPU", ", ".join(gpus) or "none"),
        ("driver", found.driver or "none"),
        (
            "memory",
            f"{console.size(found.memory)}{', shared with the GPU' if any(g.unified for g in found.gpus) else ''}",
        ),
        ("free at " + found.prefix, f"{console.size(found.disk_free)}, {found.inodes_free or 'no limit of'} inodes"),
        ("mounts", "; ".join(_mounted(path, each) for path, each in found.mounts.items()) or "none asked for"),
        ("services by", found.manager),
        ("release", found.current or "none"),
        ("service", found.service.state + (f" since {found.service.since}" if found.service.since else "")),
        ("parts", "; ".join([f"{len(found.parts) - len(bad)} whole", *bad])),
        ("failed nodes", "; ".join(f"{name}: {why}" for name, why in found.failed_nodes.items()) or "none"),
        ("under way", f"{found.busy['action']} by {found.busy['who']}" if found.busy else "nothing"),
    ]
    console.table(("", ""), rows)


def _mounted(path: str, mount: MountState) -> str:
    return f"{path}: {mount.source}" if mount.mounted else f"{path}: not mounted, ComfyUI waits for it"


def configuration(names: Sequence[str], *, as_json: bool) -> None:
    """Hosts merged with their profiles, and where each value comes from."""
    from deploy.look import find_target

    targets = [find_target(name) for name in names]
    if as_json:
        console.data_json(
            [
                {
                    "name": each.name,
                    "address": each.host.address,
                    "profile": each.profile_name,
                    "modes": each.host.modes,
                    "site": each.site,
                    "flags": each.flags,
                    "env": each.env,
                    "origin": each.origin,
                    "values": msgspec.to_builtins(each.profile),
                }
                for each in targets
            ]
        )
        return
    for each in targets:
        where = each.host.address or "this machine"
        console.data(f"{each.name}: {where}, {each.prefix}, {each.host.listen}:{each.host.port}, {each.host.scope}")
        for key, origin in each.origin.items():
            kind, _, name = key.partition(".")
            value = getattr(each.profile, kind)
            setting = value[name] if name else value
            if isinstance(setting, hosts.Setting):
                shown = f"{name}{f' {setting.value}' if setting.value else ''}{' (off)' if setting.off else ''}"
                console.data(f"  {shown:44} {origin}: {setting.why}")
            elif setting not in ("", (), {}):
                text = ", ".join(setting) if isinstance(setting, tuple) else str(setting)
                console.data(f"  {kind + ' = ' + text:44} {origin}")


def difference(found: Difference, *, as_json: bool) -> None:
    """What differs between two releases."""
    if as_json:
        console.data_json(msgspec.to_builtins(found))
        return
    if not (found.changes or found.files):
        console.data(f"{found.old} and {found.new} differ in nothing")
    for each in found.changes:
        name = each.name if each.kind == "release" else f"{each.kind} {each.name}"
        _say(f"{name}: {each.old or 'none'} -> {each.new or 'none'}")
    for line in found.files:
        _say(line)
    _say(f"the same parts: {', '.join(found.shared) or 'none'}")
    if found.unknown:
        console.say(f"not compared, for an older Hearth did not note it: {', '.join(found.unknown)}")


def bill(text: str, output: str) -> None:
    """A bill of materials, to a file where one is named."""
    if output:
        files.write(Path(output), text)
    else:
        console.data(text.rstrip())


def audit(found: Audit, *, as_json: bool) -> int:
    """What is known against what was looked at; returns 1 when there is anything.

    Raises AuditServiceError, after all that is known without the service was told.
    """
    if as_json:
        plain = msgspec.to_builtins(replace(found, fault=None))
        console.data_json({**plain, "fault": found.fault.what if found.fault else ""})
    else:
        _findings(found)
    if found.fault:
        raise found.fault
    return int(bool(found.findings))


def _findings(found: Audit) -> None:
    for each in found.findings:
        perhaps = "" if each.certain else "perhaps: "
        _say(f"{each.name} {each.at}: {perhaps}{each.what}")
        _say(f"    {'; '.join(text for text in (', '.join(each.ids), each.remedy, each.source) if text)}")
        if each.where:
            _say(f"    in {', '.join(each.where)}")
    asked = "no service was asked" if found.fault else "by the vulnerability service"
    console.data(
        f"{len(found.findings)} findings: {found.packages} packages ({asked}), and with {found.repositories} "
        f"repositories by the {found.advisories} entries of known-bad.toml"
    )
