"""Hosts: deploying, releases, and the state of a host."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import Change, Output, Sudo, Trial, TrialChange, Where
from deploy.flags import Fleet, options


@command(
    help={
        "build": "build missing kernel wheels first, unless the deploy is refused for another reason",
        "bundle": "take everything from this file of `inv bundle` and nothing from the network; not with --build",
        "keep-going": "continue with the other hosts of a group if one fails",
        "watch": "for this long, such as 30m, compare users' jobs with those before; roll back if they get worse",
    }
)
def deploy(
    _: Context,
    build: bool = False,
    bundle: str = "",
    keep_going: bool = False,
    watch: str = "",
    *,
    where: Fleet,
    how: TrialChange,
    out: Output,
) -> int:
    """Deploy ComfyUI to a host (default: this machine), with a health check before it takes traffic.

    Brings a host to the state in `config/hosts.toml`: reads its facts, shows the changes, uploads what is missing, and
    builds the new release beside the active one. Tries the new release on a separate port with separate data; only then
    stops ComfyUI and starts the new release. If that one is unhealthy, the deploy rolls back automatically. On this
    machine it needs no root and installs to `~/.local/share/hearth/comfyui`, on port 8188.
    With `--dry-run` it also lists what another ComfyUI, stack or node breaks: docs/how-to/preview-an-update.md
    How: docs/how-to/deploy-to-a-spark.md

        inv deploy --host spark --dry-run     # show the changes
        inv deploy --host spark --trial       # try the release; the active one is not touched
        inv deploy --group home --drain 300   # several hosts; wait five minutes for jobs
        inv deploy --host spark --watch 30m   # then watch users' jobs
        inv deploy --host spark --bundle spark.bundle.tar
    """
    from dataclasses import replace

    from deploy import outcome
    from deploy.deploy import deploy_each
    from deploy.host_rules import duration
    from kernels.build import build_missing

    results = deploy_each(
        where.names(),
        replace(options(where, how), watch=duration(watch) if watch else 0),
        build=build_missing if build else None,
        bundle=bundle,
        keep_going=keep_going,
    )
    console.show(results, outcome.rows(results, dry_run=how.dry_run), as_json=out.json)
    return how.code(changes=any(each.changed for each in results))


@command(
    help={
        "output": "the file to write (default: NAME-VERSION-PLATFORM-pyX.Y.bundle.tar)",
        "platform": "linux_x86_64 or linux_aarch64; together with --python, the host is not contacted "
        "(default: the host's)",
        "python": "such as 3.12 (default: the first Python of the profile that the host has)",
        "sign": "the SSH key to sign with, or `none` (default: $HEARTH_SIGNING_KEY, or your key in ~/.ssh)",
        "verify": "verify this bundle instead: its signature and the hash of every file",
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
    """Write a bundle: one file with everything that `inv deploy --bundle` needs on a host without a network.

    The `id` that it prints is a hash of all contents, and your SSH key signs it. How: docs/how-to/deploy-offline.md

        inv bundle --host spark
        inv bundle --host spark --platform linux_aarch64 --python 3.12   # without contacting the host
        inv bundle --verify spark.bundle.tar                             # after a transfer
    """
    from core import signature
    from deploy import bundle as bundles
    from deploy.deploy import make_bundle

    if verify:
        path = Path(verify)
        found = bundles.verify(path)
    else:
        key = None if sign == "none" else Path(sign) if sign else signature.own_key()
        if key is None and not sign:
            console.say("not signed, because ~/.ssh has no SSH key; name one with --sign")
        place = Path(output) if output else None
        path, found = make_bundle(where.host, place, platform, python, key, ask_sudo=where.ask_sudo)
    console.show(bundles.summary(path, found), bundles.rows(path, found), as_json=out.json)


@command(
    help={
        "host": "the host in config/hosts.toml that the image is for; it is not contacted (default: local)",
        "profile": "instead of a host: any machine of this profile",
        "platform": "linux_x86_64 or linux_aarch64 (default: the usual one of the profile's GPU, or this machine's)",
        "output": "the folder to write or renew (default: NAME-VERSION-PLATFORM.image)",
        "push": "also copy it to this repository of a registry, such as registry.example.org/anna/comfyui",
        "renew-base": "instead, lock the current versions of the base's Debian packages",
    }
)
def image(
    _: Context,
    host: str = "",
    profile: str = "",
    platform: str = "",
    output: str = "",
    push: str = "",
    renew_base: bool = False,
    *,
    out: Output,
) -> None:
    """Write a container image of what a host would get, with the files that run it with Podman or Docker.

    The image is an OCI image layout with one layer for each part, and the SBOM as a referrer. It needs no container
    engine and no emulation; the same checkout gives the same digest on every machine.
    How: docs/how-to/containers.md

        inv image --profile dgx-spark
        inv image --host box --output box.image
        inv image --host box --output box.image --push registry.example.org/anna/comfyui
    """
    from deploy import image as images
    from lock import image_base

    if renew_base:
        count, path = image_base.renew()
        console.say(f"locked {count} Debian packages in {path}")
        return
    found = images.write(images.find_target(host, profile), platform, Path(output) if output else None)
    pushed = images.push(found, push) if push else ""
    console.show(
        {**vars(found), "path": str(found.path), "pushed": pushed}, images.rows(found, pushed), as_json=out.json
    )


@command(help={"to": "the release to return to (default: the previous one)"})
def rollback(_: Context, to: str = "", *, where: Where, how: Trial, out: Output) -> int:
    """Return to a kept release, with the same trial, cut-over and health check as a deploy.

    Nothing is uploaded or built: the host still has all parts of the release.

        inv rollback --host spark             # to the previous release
        inv rollback --host spark --dry-run
    """
    from deploy import deploy, outcome

    results = deploy.rollback(where.host, to, options(where, how))
    console.show(results, outcome.rows(results, dry_run=how.dry_run), as_json=out.json)
    return how.code(changes=any(each.changed for each in results))


@command()
def releases(_: Context, *, where: Where, out: Output) -> None:
    """List the releases that a host keeps, and whether their parts are intact.

    The active release comes first, then earlier ones.

        inv releases --host spark
    """
    from deploy import facts, look

    found = look.facts(where.host, ask_sudo=where.ask_sudo)
    console.show(facts.releases(found), facts.release_rows(found), as_json=out.json)


@command()
def history(_: Context, *, where: Where, out: Output) -> None:
    """Show every change of a host: who made it, when, what it was, and how it ended.

    "Who" is the login and the machine that the change came from.

        inv history --host spark
    """
    from deploy import look, outcome

    found = look.history(where.host, ask_sudo=where.ask_sudo)
    console.show(found, outcome.history_rows(found), as_json=out.json)


@command()
def facts(_: Context, *, where: Where, out: Output) -> None:
    """Show the facts of a host, on which a deploy's plan is based.

    Among them: system, Python versions, GPUs, disk space, mounts, release and service.

        inv facts --host spark
        inv facts --json        # this machine, for a script
    """
    from deploy import facts, look

    found = look.facts(where.host, ask_sudo=where.ask_sudo)
    console.show(found, facts.rows(found), as_json=out.json)


@command(help={"check": "connect to every host and read its facts"})
def hosts(_: Context, check: bool = False, *, sudo: Sudo, out: Output) -> None:
    """Show the configured hosts, merged with their profiles, and the origin of each value.

    They are in `config/hosts.toml`; `local`, this machine, always exists.

        inv hosts
        inv hosts --check   # also connect to each of them
    """
    from deploy import host, look

    names = list(host.hosts().hosts)
    targets = [look.find_target(name) for name in names]
    rows = (row for each in targets for row in host.rows(each))
    console.show([host.summary(each) for each in targets], rows, as_json=out.json)
    if check:
        look.reach(names, ask_sudo=sudo.ask_sudo)


@command()
def attach(_: Context, *, where: Where) -> None:
    """Follow the running change of a host, or show how the last one ended.

    For a change that continues after a lost connection. Exits with the exit code of the change.

        inv attach --host spark
    """
    from deploy import change

    change.attach(where.host, ask_sudo=where.ask_sudo)


@command(
    help={
        "path": "the folder of its main.py (default: search the usual places, units and processes)",
        "by": "rename: move its folders into Hearth's data; reference: keep them, named in hosts.toml "
        "(default: rename)",
        "apply": "stop its units and set them aside; rename models, input, output and user into data/",
        "undo": "move everything back, with owners and modes, and start what ran before; not with --apply",
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
    """Take over an existing ComfyUI installation on a host: its models, pictures, workflows and settings.

    Without `--apply` and `--undo` it only reads, runs nothing of the installation, and proposes lines for
    `config/hosts.toml`. `--dry-run` works with either of them. How: docs/how-to/adopt-an-installation.md

        inv adopt --host box                     # inspect and propose
        inv adopt --host box --apply --dry-run   # show the steps
        inv adopt --host box --apply
        inv adopt --host box --undo
    """
    import msgspec

    from deploy import adopt as adoption

    proposal, outcome = adoption.adopt(where.host, path, by, options(where, how), apply=apply, undo=undo)
    if outcome is None:
        assert proposal is not None  # one of both is given
        console.show(proposal, adoption.rows(proposal), as_json=out.json)
        return 0
    rows = adoption.adopted_rows(proposal, outcome, dry_run=how.dry_run)
    console.show({**msgspec.to_builtins(outcome), "proposal": proposal}, rows, as_json=out.json)
    return how.code(changes=outcome.changed)


@command(
    help={
        "release": "the id of a kept release, current or previous (default: current)",
        "output": "the file to write (default: stdout)",
    }
)
def bom(_: Context, release: str = "current", output: str = "", *, where: Where) -> None:
    """Write the bill of materials (SBOM) of a release on a host, as CycloneDX 1.6 JSON.

    It lists packages, ComfyUI, custom nodes, kernel wheels with SHA-256 and arch, and their compilers (scope
    `excluded`). It is made from the manifest of the release alone: the same release gives the same bytes.

        inv bom --host spark --output spark.cdx.json
        inv bom --host spark --release previous
    """
    from core import files
    from deploy import look
    from deploy.facts import named
    from deploy.release import require_complete
    from lock import sbom

    text = sbom.write(require_complete(named(look.facts(where.host, ask_sudo=where.ask_sudo), release)))
    if output:
        files.write(Path(output), text)
    else:
        console.data(text.rstrip())


@command(help={"old": "the id of a kept release, current or previous", "new": "another one"})
def diff(_: Context, old: str, new: str, *, where: Where, out: Output) -> None:
    """Show the differences between two releases that a host keeps.

    Compares versions, packages, nodes, kernels, flags, variables, the health gate, the parts, and the text of the unit
    (with `@` for the id of each release).

        inv diff previous current --host spark   # what the last deploy changed
    """
    from deploy import look
    from deploy.facts import named
    from lock import diff

    found = look.facts(where.host, ask_sudo=where.ask_sudo)
    changes = diff.compare(named(found, old), named(found, new))
    console.show(changes, diff.rows(changes), as_json=out.json)


@command(
    help={
        "host": "audit the active release of this host (default: everything locked in this checkout)",
        "service": "the address of another service with OSV's API (default: OSV)",
    }
)
def audit(_: Context, host: str = "", service: str = "", *, sudo: Sudo, out: Output) -> int:
    """Look up known vulnerabilities of packages, custom nodes and ComfyUI. Exit code 1 if there are any.

    `uv audit` looks up packages in OSV. Packages, custom nodes and ComfyUI are also compared with
    `recipes/comfyui/known-bad.toml`. "possibly" marks findings that Hearth cannot decide: compare the commits. If the
    service does not respond, the other findings are still shown and the exit code is 74.
    How: docs/how-to/audit-and-compare.md

        inv audit                # everything locked here, before a deploy
        inv audit --host spark   # the active release there
    """
    from deploy import look
    from deploy.facts import named
    from deploy.release import require_complete
    from lock import audit

    if host:
        inventory = audit.deployed(require_complete(named(look.facts(host, ask_sudo=sudo.ask_sudo), "current")))
    else:
        inventory = audit.locked()
    found = audit.check(inventory, service)
    console.show(audit.summary(found), audit.rows(found), as_json=out.json)
    if found.error:
        raise found.error
    return int(any(not each.tolerated for each in found.findings))


@command(name="open", help={"port": "the port on this machine (default: ComfyUI's, or a free one)"})
def open_host(_: Context, port: str = "", *, where: Where) -> None:
    """Open ComfyUI of a host in the browser, through an SSH tunnel, until Ctrl-C.

    For everybody who can log in to the host with SSH. Without a display, prints the address only.

        inv open --host spark
        inv open --host spark --port 8288
    """
    from deploy import browse

    browse.run(where.host, port)
