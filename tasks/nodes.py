"""Custom nodes: which are known, pinned and chosen."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from tasks.command import command
from tasks.flags import DryRun, Output


@command(name="list", default=True)
def list_nodes(_: Context, *, out: Output) -> None:
    """List the custom nodes that Hearth knows, and those left out with the reason."""
    from deploy import nodes, report

    report.nodes(nodes.catalogue(), as_json=out.json)


@command(help={"address": "a repository, or URL@REV: a branch, tag or commit of it", "why": "what the node is for"})
def add(_: Context, address: str, why: str = "") -> None:
    """Pin a custom node and list it."""
    from deploy import curate

    console.say(f"{curate.add(address, why)} is listed; inv lock resolves what it needs")


@command(help={"name": "a node's name"})
def remove(_: Context, name: str) -> None:
    """Take a custom node off the list."""
    from deploy import curate

    curate.remove(name)
    console.say(f"{name} is not listed any more; inv lock renews the locks")


@command(iterable=["name"], help={"name": "only this node, may be given several times (default: all)"})
def update(_: Context, name: list[str], *, how: DryRun, out: Output) -> int:
    """Pin the latest commits, and show what they bring: commits, requirements, files that run at import."""
    from deploy import curate, report

    return report.changes(curate.update(name, dry_run=how.dry_run), as_json=out.json, dry_run=how.dry_run)


@command()
def outdated(_: Context, *, out: Output) -> None:
    """List the custom nodes whose upstream has another latest commit."""
    from deploy import curate, nodes, report

    report.outdated(curate.outdated(nodes.catalogue()), as_json=out.json)


@command(help={"workflow": "a workflow's file, as saved or exported"})
def search(_: Context, workflow: str, *, out: Output) -> int:
    """Say which of the known custom nodes a workflow needs; exit code 1 when some type has none."""
    from pathlib import Path

    from deploy import curate, report

    return report.providers(curate.search(Path(workflow)), as_json=out.json)
