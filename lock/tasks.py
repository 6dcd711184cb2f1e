"""Custom nodes: which are known, pinned and chosen."""

from __future__ import annotations

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.flags import DryRun, Output


@command(name="list", default=True)
def list_nodes(_: Context, *, out: Output) -> None:
    """List the custom nodes that Hearth knows, and those left out with the reason.

    With their sets, of `recipes/comfyui/nodes.toml`. A profile or a host's override chooses sets and names with
    `nodes = ["recommended"]`; a deploy then puts them on the host, and `inv lock` has resolved what they need.
    How: docs/how-to/add-a-node.md

        inv nodes
    """
    from lock import nodes, report

    report.nodes(nodes.catalogue(), as_json=out.json)


@command(
    help={
        "address": "a repository, or URL@REV: a branch, tag or commit of it (without: its latest commit)",
        "why": "what the node is for; must be given",
    }
)
def add(_: Context, address: str, why: str = "") -> None:
    """Pin a custom node and list it.

    With the hash of its files. A repository of which anything bad is known is warned of. `inv lock` then resolves what
    it needs.

        inv nodes.add https://github.com/somebody/my-node --why "depth maps"
        inv nodes.add https://github.com/somebody/my-node@v1.2 --why "depth maps"   # a tag
    """
    from lock import node_updates

    console.say(f"{node_updates.add(address, why)} is listed; inv lock resolves what it needs")


@command(help={"name": "the node to take off"})
def remove(_: Context, name: str) -> None:
    """Take a custom node off the list.

    Out of all sets, too. `inv lock` then renews the lists of packages.

        inv nodes.remove my-node
    """
    from lock import node_updates

    node_updates.remove(name)
    console.say(f"{name} is not listed any more; inv lock renews the locks")


@command(iterable=["name"], help={"name": "only this node; may be given several times (default: all)"})
def update(_: Context, name: list[str], *, how: DryRun, out: Output) -> int:
    """Pin the latest commits, and show what they bring: commits, requirements, files that run at import.

    `inv lock` then resolves what they need.

        inv nodes.update --dry-run            # only show
        inv nodes.update --name a --name b
    """
    from lock import node_updates, report

    return report.changes(node_updates.update(name, dry_run=how.dry_run), as_json=out.json, dry_run=how.dry_run)


@command()
def outdated(_: Context, *, out: Output) -> None:
    """List the custom nodes whose upstream has another latest commit.

    It only looks: `inv nodes.update` pins.

        inv nodes.outdated
    """
    from lock import node_updates, nodes, report

    report.outdated(node_updates.outdated(nodes.catalogue()), as_json=out.json)


@command(help={"workflow": "a workflow's file, as saved or exported"})
def search(_: Context, workflow: str, *, out: Output) -> int:
    """Say which of the known custom nodes a workflow needs; exit code 1 when some type has none.

    The workflow was saved by the editor or exported for the API. A type counts as a node's when it is named anywhere in
    the node's code.

        inv nodes.search workflow.json
    """
    from pathlib import Path

    from lock import node_updates, report

    return report.providers(node_updates.search(Path(workflow)), as_json=out.json)


@command(help={"check": "fail when a lock is stale, change nothing"})
def lock(_: Context, check: bool = False) -> None:
    """Renew what is locked: uv.lock (tool, stacks, CUDA compiler) and ComfyUI's environments.

    The environments are `recipes/comfyui/locks/`.

        inv lock           # after a change of pyproject.toml, app.toml or nodes.toml
        inv lock --check   # in CI
    """
    from core import lockfile
    from lock import requirements

    lockfile.renew(check=check)
    for name in requirements.compile_all(check=check):
        console.say(f"{name} is compiled anew")
    console.say("the locks are current" if check else "the locks are renewed")
