"""Hosts: what is put on them, what they keep and what they are."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # `command` evaluates annotations

from core.command import command
from core.flags import Change, Output, Sudo, Tried, TriedChange, Where
from deploy.flags import Fleet, options


@command(
    help={
        "build": "build kernel wheels when they are all that is missing",
        "bundle": "take everything from this file of `inv bundle`, and nothing from a network; not with --build",
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
    how: TriedChange,
    out: Output,
) -> int:
    """Put ComfyUI on a host (default: this machine), health-checked before it takes traffic.

    Makes a host what `config/hosts.toml` says: reads its facts, shows the changes, sends what it lacks, and builds
    everything beside the release in service. The new release is tried there, on a port and data of its own; only then
    ComfyUI is stopped, and the new release takes over. If that one is not healthy, the old one runs again. On this
    machine it needs no root: everything is below `~/.local/share/hearth/comfyui`, on port 8188.
    How: docs/how-to/deploy-to-a-spark.md

        inv deploy --host spark --dry-run     # what would be changed
        inv deploy --host spark --trial       # try it there; the release in service is not touched
        inv deploy --group home --drain 300   # several hosts; give jobs five minutes
        inv deploy --host spark --bundle spark.bundle.tar
    """
    from deploy import flow, report
    from kernels.build import build_missing

    results = flow.deploy_each(
        where.names(),
        options(where, how),
        build=build_missing if build else None,
        bundle=bundle,
        keep_going=keep_going,
    )
    return report.outcomes(results, as_json=out.json, dry_run=how.dry_run)


@command(
    help={
        "output": "the file to write (default: NAME-VERSION-PLATFORM-pyX.Y.bundle.tar)",
        "platform": "linux_x86_64 or linux_aarch64; with --python too, no host is asked (default: the host's)",
        "python": "such as 3.12 (default: the first of the profile's that the host has)",
        "sign": "the SSH key that signs it, or `none` (default: $HEARTH_SIGNING_KEY, else yours in ~/.ssh)",
        "verify": "check this bundle instead: its signature, and the whole file with every hash",
    }
)
def bundle(
    _: Context,
    output: str = "",
    platform: str = "",
    python: str = "",
    sign: str = "",
    verify: str = "",
    *,
    where: Where,
    out: Output,
) -> None:
    """Write one file with all that a host needs, for `inv deploy --bundle` where no network is.

    The `id` that it shows is one hash over all of it, which your SSH key signs. How: docs/how-to/deploy-offline.md

        inv bundle --host spark
        inv bundle --host spark --platform linux_aarch64 --python 3.12   # without a way to the host
        inv bundle --verify spark.bundle.tar                             # did it arrive whole?
    """
    from core import console, signature
    from deploy import bundle as bundles
    from deploy import flow, report

    if verify:
        report.bundle(Path(verify), bundles.verify(Path(verify)), as_json=out.json)
        return
    key = None if sign == "none" else Path(sign) if sign else signature.own_key()
    if key is None and not sign:
        console.say("not signed: there is no SSH key in ~/.ssh, and --sign names none")
    place = Path(output) if output else None
    path, found = flow.make_bundle(where.host, place, platform, python, key, ask_sudo=where.ask_sudo)
    report.bundle(path, found, as_json=out.json)


@command(help={"to": "the release to return to (default: the one that served last)"})
def rollback(_: Context, to: str = "", *, where: Where, how: Tried, out: Output) -> int:
    """Return to a kept release: the same trial, cut-over and health check.

    Nothing is sent or built: its parts are still there.

        inv rollback --host spark             # to the one that served before
        inv rollback --host spark --dry-run
    """
    from deploy import flow, report

    results = flow.rollback(where.host, to, options(where, how))
    return report.outcomes(results, as_json=out.json, dry_run=how.dry_run)


@command()
def releases(_: Context, *, where: Where, out: Output) -> None:
    """List the releases that a host keeps.

    And whether their parts are whole.

        inv releases --host spark
    """
    from deploy import flow, report

    report.releases(flow.facts(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def history(_: Context, *, where: Where, out: Output) -> None:
    """Show every change on a host: who, when, what, and how it ended.

    Who: the login and the machine that it came from.

        inv history --host spark
    """
    from deploy import flow, report

    report.history(flow.history(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command()
def facts(_: Context, *, where: Where, out: Output) -> None:
    """Show what a host is now.

    As a deploy sees it.

        inv facts --host spark
        inv facts --json        # this machine, for a script
    """
    from deploy import flow, report

    report.facts(flow.facts(where.host, ask_sudo=where.ask_sudo), as_json=out.json)


@command(help={"check": "reach every host and read its facts"})
def hosts(_: Context, check: bool = False, *, sudo: Sudo, out: Output) -> None:
    """Show the hosts, merged with their profiles, and where each value comes from.

    They are in `config/hosts.toml`; `local`, this machine, is always there.

        inv hosts
        inv hosts --check   # and reach every one of them
    """
    from deploy import flow, host, report

    names = list(host.hosts().hosts)
    report.configuration(names, as_json=out.json)
    if check:
        flow.reach(names, ask_sudo=sudo.ask_sudo)


@command()
def attach(_: Context, *, where: Where) -> None:
    """Watch what is under way on a host, or see how its last change ended.

    For a change that goes on after the connection was lost. The exit code is the change's own.

        inv attach --host spark
    """
    from deploy import flow

    flow.attach(where.host, ask_sudo=where.ask_sudo)


@command(
    help={
        "path": "the folder of its main.py (default: the usual places, and what units and processes run)",
        "by": "rename: its folders become Hearth's data; reference: they stay, hosts.toml names them (default: rename)",
        "apply": "stop its units and put them aside; move models, input, output and user into the data, by rename",
        "undo": "put everything back, with owners and modes, and start what ran before; not with --apply",
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
    """Take over a ComfyUI that is on a host already: its models, pictures, workflows and settings.

    Without `--apply` and `--undo` it only reads, runs nothing of the installation, and proposes lines for
    `config/hosts.toml`; `--dry-run` goes with either of them. How: docs/how-to/adopt-an-installation.md

        inv adopt --host box                     # look and propose
        inv adopt --host box --apply --dry-run   # the steps
        inv adopt --host box --apply
        inv adopt --host box --undo
    """
    from deploy import flow, report

    proposal, outcome = flow.adopt(where.host, path, by, options(where, how), apply=apply, undo=undo)
    return report.adopted(proposal, outcome, as_json=out.json, dry_run=how.dry_run)


@command(
    help={
        "release": "a kept release's id, current or previous (default: current)",
        "output": "the file to write (default: stdout)",
    }
)
def bom(_: Context, release: str = "current", output: str = "", *, where: Where) -> None:
    """Write the bill of materials of a release on a host: CycloneDX 1.6.

    Made from the release's manifest alone, as JSON: packages, ComfyUI, custom nodes, kernel wheels with their SHA-256
    and arch, and the compilers that made them (scope `excluded`). The same release gives the same bytes.

        inv bom --host spark --output spark.cdx.json
        inv bom --host spark --release previous
    """
    from deploy import flow, report
    from deploy.facts import named
    from lock import sbom

    report.bill(sbom.write(named(flow.facts(where.host, ask_sudo=where.ask_sudo), release)), output)


@command(help={"old": "a kept release's id, current or previous", "new": "another one"})
def diff(_: Context, old: str, new: str, *, where: Where, out: Output) -> None:
    """Show what differs between two releases that a host keeps.

    Versions, packages, nodes, kernels, flags, variables, the gate, the parts, and the unit's text (with `@` for each
    release's own id).

        inv diff previous current --host spark   # what the last deploy changed
    """
    from deploy import flow, report
    from deploy.facts import named
    from lock.diff import compare

    facts = flow.facts(where.host, ask_sudo=where.ask_sudo)
    report.difference(compare(named(facts, old), named(facts, new)), as_json=out.json)


@command(
    help={
        "host": "what this host's current release holds (default: all that is locked in this checkout)",
        "service": "the address of another service that speaks OSV's API (default: OSV itself)",
    }
)
def audit(_: Context, host: str = "", service: str = "", *, sudo: Sudo, out: Output) -> int:
    """Look up what is known against packages, custom nodes and ComfyUI; exit code 1 when there is anything.

    Packages are looked up by `uv audit`, which asks OSV; packages, custom nodes and ComfyUI also in
    `recipes/comfyui/known-bad.toml`. "perhaps" marks what Hearth cannot tell: compare the commits. When the service
    does not answer, what is known without it is shown, and the exit code is 74. How: docs/how-to/audit-and-compare.md

        inv audit                # all that is locked here, before it is deployed
        inv audit --host spark   # what runs there
    """
    from deploy import report
    from lock import audit

    return report.audit(audit.check(audit.stock(host, ask_sudo=sudo.ask_sudo), service), as_json=out.json)
