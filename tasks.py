"""The front door: every `inv` task. Each parses, calls and prints; the work is in the subsystems."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.exceptions import Exit
from invoke.tasks import task

from core import console
from core.errors import HearthError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from invoke.context import Context


def command(**options: Any) -> Callable[[Callable[..., int | None]], Any]:
    """An invoke task that shows a HearthError without a traceback and exits with its code.

    Flags that several tasks have are explained once, in `_SHARED`.
    """

    def wrap(body: Callable[..., int | None]) -> Any:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                status = body(*args, **kwargs)
            except HearthError as error:
                raise Exit(f"error: {error}", code=error.exit_code) from error
            except KeyboardInterrupt:
                raise Exit("interrupted; the same command goes on from here", code=130) from None
            except BrokenPipeError:
                raise Exit(code=0) from None
            if status:
                sys.exit(status)

        own = options.pop("help", {})
        names = [name.replace("_", "-") for name in inspect.signature(body).parameters]
        return task(**options, help={**{name: _SHARED[name] for name in names if name in _SHARED}, **own})(run)

    return wrap


_SHARED = {
    "host": "a host of config/hosts.toml (default: local, this machine)",
    "group": "all hosts of a group, the first of them alone at first",
    "ask-sudo": "ask for the sudo password once",
    "json": "print JSON",
    "drain": "seconds to wait for ComfyUI's jobs before the cut-over (default: 60)",
    "force": "cut jobs short that are still running then",
    "dry-run": "only show what would be changed; exit code 2 when anything would",
    "yes": "do not ask",
}

_BUILD_HELP = {
    "arch": "compute capabilities as in TORCH_CUDA_ARCH_LIST: 12.1, '8.9;12.0', 9.0a, '8.9+PTX'",
    "kernel": "only these recipes, comma-separated (default: all)",
    "stack": "cu124 or cu130 (default: the arch's)",
    "python": "Python versions, comma-separated: 3.12,3.11 (default: the arch's)",
    "platform": "linux_x86_64 or linux_aarch64 (default: the arch's)",
    "profile": "a recipe's profile, such as inference or full (default: the recipe's)",
    "jobs": "compiles at once (default: as many as cores and free memory allow)",
    "force": "build again even when the wheelhouse has it",
    "host": "build on this host, natively, and bring the wheels back",
    "dry-run": "only list what would be built",
}


@command(help=_BUILD_HELP)
def build_kernels(
    _: Context,
    arch: str = "",
    kernel: str = "",
    stack: str = "",
    python: str = "",
    platform: str = "",
    profile: str = "",
    jobs: str = "",
    force: bool = False,
    dry_run: bool = False,
    host: str = "",
    json: bool = False,
) -> None:
    """Build kernel wheels for a GPU into wheelhouse/."""
    from kernels import report
    from kernels.build import build_kernels as build_all
    from kernels.matrix import Request, select

    if jobs and not (jobs.isdecimal() and int(jobs)):  # invoke's own int option answers with a traceback
        raise UsageError(f"--jobs {jobs} makes no sense", hint="give the number of compiles at once, or leave it out")
    asked = {"arch": arch, "kernel": kernel, "stack": stack, "python": python, "platform": platform, "profile": profile}
    if host:
        from deploy import workshop

        found = workshop.build(host, {**asked, "jobs": jobs}, force=force, dry_run=dry_run)
        if not dry_run:
            report.wheels(found, as_json=json)
        return
    builds, skipped = select(Request(**asked))
    if dry_run:
        report.plan(builds, skipped, as_json=json)
        return
    report.say_skipped(skipped)
    report.wheels(build_all(builds, jobs=int(jobs) if jobs else None, force=force), as_json=json)


@command(help={"prune": "delete wheels that no recipe asks for any more"})
def wheels(_: Context, prune: bool = False, json: bool = False) -> int:
    """List the wheelhouse, each wheel verified against its manifest."""
    from kernels import report, store

    if prune:
        report.pruned(store.prune())
    return report.wheelhouse(store.entries(), as_json=json)


@command(positional=["path"], help={"path": "a wheel file"})
def inspect_wheel(_: Context, path: str, json: bool = False) -> None:
    """Show what a kernel wheel holds: machine code, symbols, C library."""
    from pathlib import Path

    from kernels import report

    report.one_wheel(Path(path), as_json=json)


@command()
def kernels(_: Context, json: bool = False) -> None:
    """List the kernel recipes: versions, archs and stacks, and why not the others."""
    from kernels import report

    report.recipes(as_json=json)


@command(help={"check": "fail when a lock is stale, change nothing"})
def lock(_: Context, check: bool = False) -> None:
    """Renew what is locked: uv.lock (tool, stacks, CUDA compiler) and ComfyUI's environments."""
    from core import lockfile
    from deploy import environment

    lockfile.renew(check=check)
    for name in environment.compile_all(check=check):
        console.say(f"{name} is compiled anew")
    console.say("the locks are current" if check else "the locks are renewed")


def _options(drain: str, force: bool) -> Any:
    from deploy.plan import Options

    if not drain.isdecimal():
        raise UsageError(f"--drain {drain} makes no sense", hint="give seconds, such as --drain 300")
    return Options(drain=float(drain), force=force)


@command(
    help={
        "build": "build kernel wheels that the wheelhouse lacks",
        "bundle": "take everything from this file of `inv bundle`, and nothing from a network",
        "keep-going": "go on with a group's other hosts when one fails",
    }
)
def deploy(
    _: Context,
    host: str = "",
    group: str = "",
    dry_run: bool = False,
    build: bool = False,
    bundle: str = "",
    drain: str = "60",
    force: bool = False,
    ask_sudo: bool = False,
    keep_going: bool = False,
    yes: bool = False,
    json: bool = False,
) -> int:
    """Put ComfyUI on a host (default: this machine), proven before it takes traffic."""
    from contextlib import nullcontext
    from pathlib import Path

    from deploy import bundle as bundles
    from deploy import flow, report
    from deploy.host import select
    from kernels.build import build_missing

    if build and bundle:
        raise UsageError("--build and --bundle exclude each other", hint="a bundle holds the wheels that it needs")
    with bundles.opened(Path(bundle)) if bundle else nullcontext() as opened:
        one = functools.partial(
            flow.deploy,
            options=_options(drain, force),
            dry_run=dry_run,
            ask_sudo=ask_sudo,
            ask=not yes,
            build=build_missing if build else None,
            bundle=opened,
        )
        results = flow.on_each(select(host, group), one, keep_going=keep_going)
    report.outcomes(results, as_json=json, dry_run=dry_run)
    return 2 if dry_run and any(result.changed for result in results) else 0


@command(
    help={
        "host": "the host that it is for (default: local, this machine)",
        "output": "the file to write (default: named after host, version, platform and Python)",
        "platform": "linux_x86_64 or linux_aarch64 (default: the host is asked)",
        "python": "the host's Python, such as 3.12 (default: the host is asked)",
        "verify": "check this bundle instead, every file of it",
    }
)
def bundle(
    _: Context,
    host: str = "",
    output: str = "",
    platform: str = "",
    python: str = "",
    verify: str = "",
    ask_sudo: bool = False,
    json: bool = False,
) -> None:
    """Write one file with all that a host needs, for `inv deploy --bundle` where no network is."""
    from pathlib import Path

    from deploy import bundle as bundles
    from deploy import flow, report

    if verify:
        report.bundle(Path(verify), bundles.verify(Path(verify)), as_json=json)
        return
    place = Path(output) if output else None
    report.bundle(*flow.make_bundle(host, place, platform, python, ask_sudo=ask_sudo), as_json=json)


@command(name="list", default=True)
def nodes_list(_: Context, json: bool = False) -> None:
    """List the custom nodes that Hearth knows, and those left out with the reason."""
    from deploy import nodes, report

    report.nodes(nodes.catalogue(), as_json=json)


@command(
    name="add",
    positional=["address"],
    help={"address": "a repository, or URL@REV: a branch, tag or commit of it", "why": "what the node is for"},
)
def nodes_add(_: Context, address: str, why: str = "") -> None:
    """Pin a custom node and list it."""
    from deploy import curate

    console.say(f"{curate.add(address, why)} is listed; inv lock resolves what it needs")


@command(name="remove", positional=["name"], help={"name": "a node's name"})
def nodes_remove(_: Context, name: str) -> None:
    """Take a custom node off the list."""
    from deploy import curate

    curate.remove(name)
    console.say(f"{name} is not listed any more; inv lock renews the locks")


@command(name="update", iterable=["name"], help={"name": "only this node, may be given several times (default: all)"})
def nodes_update(_: Context, name: list[str], dry_run: bool = False, json: bool = False) -> int:
    """Pin the latest commits, and show what they bring: commits, requirements, files that run at import."""
    from deploy import curate, report

    changes = curate.update(name, dry_run=dry_run)
    report.changes(changes, as_json=json)
    return 2 if dry_run and changes else 0


@command(name="outdated")
def nodes_outdated(_: Context, json: bool = False) -> None:
    """List the custom nodes whose upstream has another latest commit."""
    from deploy import curate, nodes, report

    report.outdated(curate.outdated(nodes.catalogue()), as_json=json)


@command(name="search", positional=["workflow"], help={"workflow": "a workflow's file, as saved or exported"})
def nodes_search(_: Context, workflow: str, json: bool = False) -> int:
    """Say which of the known custom nodes a workflow needs; exit code 1 when some type has none."""
    from pathlib import Path

    from deploy import curate, report

    found = curate.search(Path(workflow))
    report.providers(found, as_json=json)
    return int(any(not names for names in found.values()))


@command(help={"to": "the release to return to (default: the one that served last)"})
def rollback(
    _: Context,
    host: str = "",
    to: str = "",
    dry_run: bool = False,
    drain: str = "60",
    force: bool = False,
    ask_sudo: bool = False,
    json: bool = False,
) -> int:
    """Return to a kept release: the same cut-over with the same proof."""
    from deploy import flow, report

    result = flow.rollback(host, to, _options(drain, force), dry_run=dry_run, ask_sudo=ask_sudo)
    report.outcomes([result], as_json=json, dry_run=dry_run)
    return 2 if dry_run else 0


@command()
def facts(_: Context, host: str = "", ask_sudo: bool = False, json: bool = False) -> None:
    """Show what a host is now."""
    from deploy import flow, report

    report.facts(flow.facts(host, ask_sudo=ask_sudo), as_json=json)


@command()
def releases(_: Context, host: str = "", ask_sudo: bool = False, json: bool = False) -> None:
    """List the releases that a host keeps."""
    from deploy import flow, report

    report.releases(flow.facts(host, ask_sudo=ask_sudo), as_json=json)


@command()
def history(_: Context, host: str = "", ask_sudo: bool = False, json: bool = False) -> None:
    """Show every change on a host: who, when, what, and how it ended."""
    from deploy import flow, report

    report.history(flow.history(host, ask_sudo=ask_sudo), as_json=json)


@command(help={"check": "reach every host and read its facts"})
def hosts(_: Context, check: bool = False, ask_sudo: bool = False, json: bool = False) -> None:
    """Show the hosts, merged with their profiles, and where each value comes from."""
    from deploy import flow, report
    from deploy import host as configured

    names = list(configured.hosts().hosts)
    report.configuration(names, as_json=json)
    if check:
        flow.reach(names, ask_sudo=ask_sudo)


@command()
def attach(_: Context, host: str = "", ask_sudo: bool = False) -> None:
    """Watch what is under way on a host, or see how its last change ended."""
    from deploy import flow

    flow.attach(host, ask_sudo=ask_sudo)


@command(
    help={"release": "a kept release, current or previous (default: current)", "output": "a file (default: stdout)"}
)
def bom(_: Context, host: str = "", release: str = "current", output: str = "", ask_sudo: bool = False) -> None:
    """Write the bill of materials of a release on a host: CycloneDX 1.6."""
    from pathlib import Path

    from core import files
    from deploy import bill, flow

    text = bill.write(flow.facts(host, ask_sudo=ask_sudo).named(release))
    if output:
        files.write(Path(output), text)
    else:
        console.data(text.rstrip())


@command(positional=["old", "new"], help={"old": "a kept release, current or previous", "new": "another one"})
def diff(_: Context, old: str, new: str, host: str = "", ask_sudo: bool = False, json: bool = False) -> None:
    """Show what differs between two releases that a host keeps."""
    from deploy import flow, report
    from deploy.difference import compare

    facts = flow.facts(host, ask_sudo=ask_sudo)
    report.difference(compare(facts.named(old), facts.named(new)), as_json=json)


@command(
    help={
        "host": "the current release of this host (default: all that is locked in this checkout)",
        "service": "the address of a service that speaks OSV's API (default: OSV itself)",
    }
)
def audit(_: Context, host: str = "", service: str = "", ask_sudo: bool = False, json: bool = False) -> int:
    """Look up what is known against packages, custom nodes and ComfyUI; exit code 1 when there is anything."""
    from deploy import audit as audits
    from deploy import flow, report

    stock = audits.deployed(flow.facts(host, ask_sudo=ask_sudo).named("current")) if host else audits.locked()
    found = audits.check(stock, service)
    report.audit(found, as_json=json)
    if found.fault:
        raise found.fault
    return int(bool(found.findings))


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
    host: str = "",
    path: str = "",
    by: str = "rename",
    apply: bool = False,
    undo: bool = False,
    dry_run: bool = False,
    drain: str = "60",
    force: bool = False,
    ask_sudo: bool = False,
    yes: bool = False,
    json: bool = False,
) -> int:
    """Take over a ComfyUI that is on a host already: its models, pictures, workflows and settings."""
    from deploy import flow, report

    if by not in ("rename", "reference") or (apply and undo):
        raise UsageError("say --by rename or --by reference, and one of --apply and --undo")
    how: dict[str, Any] = {"dry_run": dry_run, "ask_sudo": ask_sudo, "ask": not yes}
    if undo:
        outcome = flow.unadopt(host, _options(drain, force), **how)
        report.adopted(None, outcome, as_json=json, dry_run=dry_run)
    elif apply:
        proposal, outcome = flow.adopt(host, path, by, _options(drain, force), **how)
        report.adopted(proposal, outcome, as_json=json, dry_run=dry_run)
    else:
        report.proposal(flow.survey(host, path, by, ask_sudo=ask_sudo), as_json=json)
        return 0
    return 2 if dry_run and outcome.changed else 0


ns = Collection(
    build_kernels,
    wheels,
    inspect_wheel,
    kernels,
    deploy,
    bundle,
    rollback,
    releases,
    history,
    facts,
    hosts,
    attach,
    adopt,
    lock,
    bom,
    diff,
    audit,
)
ns.add_collection(Collection("nodes", nodes_list, nodes_add, nodes_remove, nodes_update, nodes_outdated, nodes_search))
