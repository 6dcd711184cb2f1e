"""Custom nodes and locks: which nodes are known, and what is pinned."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING

from invoke.context import Context  # `command` evaluates annotations

from core import console
from core.command import command
from core.errors import UsageError
from core.flags import DryRun, Output, Sudo

if TYPE_CHECKING:
    from lock.updates.proposal import Request


@command(name="list", default=True)
def list_nodes(_: Context, *, out: Output) -> None:
    """List the known custom nodes with their sets, and the rejected ones with the reason.

    They are in `recipes/comfyui/nodes.toml`. A profile, mode or host chooses sets and names with
    `nodes = ["recommended"]`; a deploy then installs them. `inv lock` resolves their requirements beforehand.
    How: docs/how-to/add-a-node.md

        inv nodes
    """
    from lock import nodes

    found = nodes.catalogue()
    console.show(found, nodes.rows(found), as_json=out.json)


@command(
    help={
        "address": "a repository, or URL@REV with a branch, tag or commit (default: its latest commit)",
        "why": "the purpose of the node; required",
    }
)
def add(_: Context, address: str, why: str = "") -> None:
    """Pin a custom node by commit and file hash, and add it to the list.

    Warns if there are known problems with the repository. Run `inv lock` afterwards to resolve its requirements.

        inv nodes.add https://github.com/somebody/my-node --why "depth maps"
        inv nodes.add https://github.com/somebody/my-node@v1.2 --why "depth maps"   # a tag
    """
    from lock.updates import node_updates, transaction

    transaction.complete()
    console.say(f"added {node_updates.add(address, why)}; run inv lock to resolve its requirements")


@command(help={"name": "the node to remove"})
def remove(_: Context, name: str) -> None:
    """Remove a custom node from the list and from all sets.

    Run `inv lock` afterwards to update the locked packages.

        inv nodes.remove my-node
    """
    from lock.updates import node_updates, transaction

    transaction.complete()
    node_updates.remove(name)
    console.say(f"removed {name}; run inv lock to update the locked packages")


@command(iterable=["name"], help={"name": "only this node; repeatable (default: all)"})
def update(_: Context, name: list[str], *, how: DryRun, out: Output) -> int:
    """Pin the latest commits of custom nodes, and show what changes.

    Shows commits, requirements, files that run at import, and new capabilities. Run `inv lock` afterwards.
    `inv update nodes` updates all nodes and the locks in one step that can be undone.

        inv nodes.update --dry-run            # show only
        inv nodes.update --name a --name b
    """
    from lock.updates import node_updates, transaction

    transaction.complete()
    found = node_updates.update(name, dry_run=how.dry_run)
    console.show(found, node_updates.rows(found), as_json=out.json)
    return how.code(changes=bool(found))


@command(help={"workflow": "a workflow of the editor or API, or a picture, video or sound with one"})
def search(_: Context, workflow: str, *, out: Output) -> int:
    """Find the custom nodes that a workflow needs. Exit code 1 if a node type is unknown.

    A known node is listed for a type if its code contains the name of the type.

        inv nodes.search workflow.json
    """
    from pathlib import Path

    from lock.updates import node_updates

    found = node_updates.search(Path(workflow))
    console.show(found, node_updates.search_rows(found), as_json=out.json)
    return int(any(not names for names in found.values()))


@command(help={"check": "change nothing; fail if a lock is out of date"})
def lock(_: Context, check: bool = False) -> None:
    """Update the locks: uv.lock (tool, stacks, CUDA compiler) and the environments of every known ComfyUI.

    Run it after changing pyproject.toml, app.toml or nodes.toml. It names versions that no host selects, nor a channel.

        inv lock
        inv lock --check   # in CI
    """
    from core import lockfile
    from deploy import host
    from lock import application, resolution
    from lock.updates import transaction

    if not check:
        transaction.complete()
    lockfile.renew(check=check)
    for name in resolution.compile_all(check=check):
        console.say(f"updated {name}")
    for place in application.unused(each.comfyui for each in host.hosts().hosts.values()):
        console.say(f"no host and no channel selects {place}; to remove it: rm -r {shlex.quote(str(place))}")
    console.say("the locks are up to date")


PART = "comfyui, nodes, stack, tool or all"
COOLDOWN = "ignore what is younger than this, such as 14d or 36h (default: ignore nothing)"


@command(
    name="update",
    positional=["part"],
    optional=["part"],
    help={
        "part": f"{PART} (default: all)",
        "to": "a version of ComfyUI, or of torch for `stack` (default: the newest)",
        "cooldown": COOLDOWN,
        "channel": "move this channel of ComfyUI, stable or latest, instead of the pinned version",
        "undo": "restore the files of before the last update",
        "propose": "write a git branch, a patch and a report; neither this checkout's files nor a host change",
        "host": "with --propose: make the trial of the new release on this host; nothing is put in service",
        "output": "with --propose: the folder of the report and the patch (default: .update/proposal)",
    },
)
def update_all(
    _: Context,
    part: str | None = None,
    to: str = "",
    cooldown: str = "",
    channel: str = "",
    undo: bool = False,
    propose: bool = False,
    host: str = "",
    output: str = "",
    *,
    sudo: Sudo,
    how: DryRun,
    out: Output,
) -> int:
    """Move to newer versions: ComfyUI, custom nodes, torch and its CUDA compiler, or the tool's own packages.

    Changes app.toml, nodes.toml, stacks.toml, pyproject.toml and the locks together, or none of them if the new
    versions do not fit together. Skips versions that are known to be bad. Hosts change with the next `inv deploy`.
    How: docs/how-to/update.md

        inv update --dry-run                 # show only
        inv update comfyui --to 0.30.0
        inv update comfyui --channel latest  # hosts with `comfyui = "latest"`
        inv update --undo
        inv update --propose --host spark    # for a timer or CI
    """
    from deploy import host as hosts
    from deploy.preview import of_update
    from lock.updates import node_updates, transaction, update, upstream
    from lock.updates.proposal import Request

    if (undo or how.dry_run) if propose else (host or output):
        what = "--propose excludes --undo and --dry-run; --host and --output need it"
        raise UsageError("usage", what, hint="inv update --propose --host HOST")
    if undo:
        changed = transaction.undo()
        console.show(changed, (f"restored {each}" for each in changed), as_json=out.json)
        return 0
    kept = frozenset(each.comfyui for each in hosts.hosts().hosts.values())
    wanted = Request(part or "all", to, upstream.cutoff(cooldown), channel, kept)
    if propose:
        return _propose(wanted, host, output, sudo, out)
    made, failures = update.update(wanted, dry_run=how.dry_run, look=of_update)
    console.show(made, update.rows(made), as_json=out.json)
    if failures:
        raise node_updates.together(failures)
    if made.files and not how.dry_run:
        console.say("next: inv deploy; to go back: inv update --undo")
    return how.code(changes=bool(made.files))


def _propose(wanted: Request, host: str, output: str, sudo: Sudo, out: Output) -> int:
    """Write a proposal and show where it is; raises the error of its trial or of an upstream afterwards."""
    from deploy import trial
    from deploy.host import select
    from deploy.preview import of_update
    from lock.updates import propose

    attempt = partial(trial.attempt, *select(host, ""), ask_sudo=sudo.ask_sudo) if host else None
    place = propose.folder(output)
    report, error = propose.propose(wanted, place, of_update, attempt, host)
    console.show(report, propose.rows(report, place), as_json=out.json)
    if error:
        raise error
    return 0


@command(
    name="outdated",
    positional=["part"],
    optional=["part"],
    help={
        "part": f"kernels, {PART} (default: all)",
        "cooldown": COOLDOWN,
    },
)
def list_outdated(_: Context, part: str | None = None, cooldown: str = "", *, out: Output) -> None:
    """List newer versions of ComfyUI, custom nodes, torch, kernels, uv and the tool's packages, with their ages.

    Changes nothing; `inv update` moves to them. Newer sources of kernels are for `inv kernels.pin`.

        inv outdated
        inv outdated nodes --cooldown 14d
    """
    from lock.updates import node_updates, outdated, upstream
    from lock.updates.proposal import Request

    found, failures = outdated.outdated(Request(part or "all", before=upstream.cutoff(cooldown)))
    console.show(found, outdated.rows(found, failures), as_json=out.json)
    if failures:
        raise node_updates.together(failures)
