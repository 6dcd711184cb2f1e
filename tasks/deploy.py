"""Hosts: what is put on them, what they keep and what they are."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from tasks.command import command
from tasks.flags import Change, CutOver, Fleet, Output, Sudo, Where


@command(
    help={
        "build": "build kernel wheels that the wheelhouse lacks",
        "bundle": "take everything from this file of `inv bundle`, and nothing from a network",
        "keep-going": "go on with a group's other hosts when one fails",
    }
)
def deploy(
    _: Context,
    build: bool = False,
    bundle: str = "",
    keep_going: bool = False,
    *,
    where: Fleet,
    how: Change,
    out: Output,
) -> int:
    """Put ComfyUI on a host (default: this machine), proven before it takes traffic."""
    from deploy import flow, plan, report
    from kernels.build import build_missing

    results = flow.deploy_each(
        where.host,
        where.group,
        plan.options(how.drain, how.force),
        dry_run=how.dry_run,
        ask_sudo=where.ask_sudo,
        ask=not how.yes,
        build=build_missing if build else None,
        bundle=bundle,
        keep_going=keep_going,
    )
    return report.outcomes(results, as_json=out.json, dry_run=how.dry_run)


@command(
    help={
        "output": "the file to write (default: named after host, version, platform and Python)",
        "platform": "linux_x86_64 or linux_aarch64 (default: the host is asked)",
        "python": "the host's Python, such as 3.12 (default: the host is asked)",
        "verify": "check this bundle instead, every file of it",
    }
)
def bundle(
    _: Context, output: str = "", platform: str = "", python: str = "", verify: str = "", *, where: Where, out: Output
) -> None:
    """Write one file with all that a host needs, for `inv deploy --bundle` where no network is."""
    from deploy import flow, report

    path, found = flow.bundle(where.host, output, platform, python, verify, ask_sudo=where.ask_sudo)
    report.bundle(path, found, as_json=out.json)


@command(help={"to": "the release to return to (default: the one that served last)"})
def rollback(_: Context, to: str = "", *, where: Where, how: CutOver, out: Output) -> int:
    """Return to a kept release: the same cut-over with the same proof."""
    from deploy import flow, plan, report

    options = plan.options(how.drain, how.force)
    result = flow.rollback(where.host, to, options, dry_run=how.dry_run, ask_sudo=where.ask_sudo)
    return report.outcomes([result], as_json=out.json, dry_run=how.dry_run)


@command()
def releases(_: Context, *, where: Where, out: Output) -> None:
    """List the releases that a host keeps."""
    from deploy import flow, report

    report.releases(flow.facts(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def history(_: Context, *, where: Where, out: Output) -> None:
    """Show every change on a host: who, when, what, and how it ended."""
    from deploy import flow, report

    report.history(flow.history(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def facts(_: Context, *, where: Where, out: Output) -> None:
    """Show what a host is now."""
    from deploy import flow, report

    report.facts(flow.facts(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command(help={"check": "reach every host and read its facts"})
def hosts(_: Context, check: bool = False, *, sudo: Sudo, out: Output) -> None:
    """Show the hosts, merged with their profiles, and where each value comes from."""
    from deploy import flow, host, report

    names = list(host.hosts().hosts)
    report.configuration(names, as_json=out.json)
    if check:
        flow.reach(names, ask_sudo=sudo.ask_sudo)


@command()
def attach(_: Context, *, where: Where) -> None:
    """Watch what is under way on a host, or see how its last change ended."""
    from deploy import flow

    flow.attach(where.host, ask_sudo=where.ask_sudo)


@command(
    help={
        "path": "where it is there (default: the usual places, and what units and processes run)",
        "by": "rename: its folders become Hearth's data; reference: they stay, and hosts.toml names them",
        "apply": "take it over; without this, only look and propose",
        "undo": "put everything back, and start what ran before",
    }
)
def adopt(
    _: Context,
    path: str = "",
    by: str = "rename",
    apply: bool = False,
    undo: bool = False,
    *,
    where: Where,
    how: Change,
    out: Output,
) -> int:
    """Take over a ComfyUI that is on a host already: its models, pictures, workflows and settings."""
    from deploy import flow, plan, report

    proposal, outcome = flow.adopt(
        where.host,
        path,
        by,
        plan.options(how.drain, how.force),
        apply=apply,
        undo=undo,
        dry_run=how.dry_run,
        ask_sudo=where.ask_sudo,
        ask=not how.yes,
    )
    return report.adopted(proposal, outcome, as_json=out.json, dry_run=how.dry_run)


@command(
    help={"release": "a kept release, current or previous (default: current)", "output": "a file (default: stdout)"}
)
def bom(_: Context, release: str = "current", output: str = "", *, where: Where) -> None:
    """Write the bill of materials of a release on a host: CycloneDX 1.6."""
    from deploy import bill, flow, report

    report.bill(bill.write(flow.facts(where.host, ask_sudo=where.ask_sudo).named(release)), output)


@command(help={"old": "a kept release, current or previous", "new": "another one"})
def diff(_: Context, old: str, new: str, *, where: Where, out: Output) -> None:
    """Show what differs between two releases that a host keeps."""
    from deploy import difference, flow, report

    facts = flow.facts(where.host, ask_sudo=where.ask_sudo)
    report.difference(difference.compare(facts.named(old), facts.named(new)), as_json=out.json)


@command(
    help={
        "host": "the current release of this host (default: all that is locked in this checkout)",
        "service": "the address of a service that speaks OSV's API (default: OSV itself)",
    }
)
def audit(_: Context, host: str = "", service: str = "", *, sudo: Sudo, out: Output) -> int:
    """Look up what is known against packages, custom nodes and ComfyUI; exit code 1 when there is anything."""
    from deploy import audit, report

    return report.audit(audit.check(audit.stock(host, ask_sudo=sudo.ask_sudo), service), as_json=out.json)
