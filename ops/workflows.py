"""Checks workflows against the ComfyUI of this checkout, of a host, or of another version."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core import source, workspace
from core.errors import ConfigError, HearthError, UsageError
from lock import application, interface, node_updates, workflows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lock.interface import Interface
    from lock.workflows import Finding, Node

Workflows = dict[str, "list[list[Node]] | HearthError"]
"""Workflows by file name, or the reason why a file cannot be read."""


class Report(msgspec.Struct, frozen=True):
    """The findings of a workflow, or the reason why it cannot be read.

    With another version, findings are what it changes; `already` counts those that the pinned ComfyUI has as well.
    """

    file: str
    findings: tuple[Finding, ...] = ()
    already: int = 0
    error: str = ""

    @property
    def breaks(self) -> bool:
        """Whether the workflow does not run any more."""
        return any(not each.muted and each.kind != "replaced" for each in self.findings)


class Checked(msgspec.Struct, frozen=True):
    """The reports of a check, and what the workflows were checked against."""

    against: str
    reports: tuple[Report, ...]
    failed: HearthError | None = None


def check(names: Sequence[str], host: str, to: str, *, ask_sudo: bool) -> Checked:
    """Check workflow files against a host or version (default: the pinned ComfyUI and the known nodes).

    Without names: those in `config/workflows`, and those saved on the host. Raises UsageError; an unreadable file is
    reported, and the others are checked.
    """
    if host and to:
        raise UsageError("usage", "--host and --to exclude each other", hint="use one of them")
    saved: Workflows = {}
    old = None
    if host:
        new, saved = _running(host, saved=not names, ask_sudo=ask_sudo)
    else:
        new = interface.read_cached(source.fetch(application.application()))
    found = {**_files(names), **saved}
    if not found:
        where = f"on {host}" if host else "in config/workflows"
        raise UsageError("usage", f"there are no workflows {where}", hint="name workflow files with --file")
    if to:
        old, new = new, interface.read_cached(tree(to))
    elif not host:
        new = _with_nodes(new, found)
    reports = tuple(_report(name, each, new, old) for name, each in found.items())
    failed = next((each for each in found.values() if isinstance(each, HearthError)), None)
    return Checked(host or f"ComfyUI {to or application.version()}", reports, failed)


def compare(to: str) -> list[interface.Change]:
    """The changes of node types from the pinned ComfyUI to another version."""
    if not to:
        raise UsageError("usage", "no version to compare with", hint="name one with --to")
    return interface.compare(
        interface.read_cached(source.fetch(application.application())), interface.read_cached(tree(to))
    )


def tree(version: str) -> Path:
    """The tree of a ComfyUI version, channel or folder; raises UsageError, SourceError and ConfigError."""
    if "/" in version or (Path(version) / "nodes.py").is_file():
        return Path(version)
    if version in (application.PINNED, *application.CHANNELS, *application.versions()):
        return source.fetch(application.application(version))
    app = application.application()
    origin = next((each for each in app.source if each.git), None)
    if origin is None:
        raise UsageError(
            "unknown-name", f"{version!r} is not a folder with a ComfyUI", cause="app.toml names no git source",
            hint="name a folder",
        )  # fmt: skip
    commit = node_updates.newest(origin.git, f"refs/tags/v{version}")
    at = source.Source(git=origin.git, commit=commit)
    pinned = source.pin(msgspec.structs.replace(app, version=version, source=(at,), tree="", paths=_CODE))
    return source.fetch(pinned)


_CODE = ("comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "folder_paths.py",
         "node_helpers.py", "nodes.py")  # fmt: skip
"""The parts of ComfyUI that define node types."""


def _files(names: Sequence[str]) -> Workflows:
    own = workspace.current().checkout / "config/workflows"
    paths = [str(each) for each in sorted(own.rglob("*")) if each.is_file()] if not names else []
    for name in map(os.path.expanduser, names):
        paths += ("" if Path(name).exists() else sorted(glob(name, recursive=True))) or [name]  # noqa: PTH207  absolute patterns, too
    found: Workflows = {}
    for path in paths:
        try:
            found[path] = workflows.read(Path(path))
        except ConfigError as error:
            found[path] = error
    return found


def _running(host: str, *, saved: bool, ask_sudo: bool) -> tuple[Interface, Workflows]:
    """The node types of a host's running ComfyUI, and the workflows that its users saved."""
    from deploy import connection
    from deploy.look import find_target

    with connection.connect(find_target(host), ask_sudo) as agent:
        answer = agent.call("node-types", workflows=saved)
    found: Workflows = {}
    for name, content in sorted(answer["workflows"].items()):
        label = f"{host}:{name}"
        try:
            unread = "it has no nodes" if content else "it is too large, or not JSON"
            found[label] = workflows.graphs(label, [content], unread)
        except ConfigError as error:
            found[label] = error
    return interface.reported(answer["types"]), found


def _with_nodes(own: Interface, found: Workflows) -> Interface:
    """ComfyUI's node types and those of the known nodes that the workflows use; their inputs are not known."""
    used = {node.type for each in found.values() if isinstance(each, list) for graph in each for node in graph}
    lacking = used - own.types.keys() - own.replaced.keys() - workflows.EDITOR
    provided = node_updates.providers(lacking) if lacking else {}
    others = {name: interface.NodeType(by[0], None, None, complete=False) for name, by in provided.items() if by}
    return msgspec.structs.replace(own, types={**own.types, **others})


def _report(name: str, found: list[list[Node]] | HearthError, new: Interface, old: Interface | None) -> Report:
    if isinstance(found, HearthError):
        return Report(name, error=str(found))
    now = {each: None for graph in found for each in workflows.check(graph, new, old)}
    before = {each for graph in found for each in workflows.check(graph, old)} if old else set()
    return Report(name, tuple(each for each in now if each not in before), len(before & now.keys()))


def summary(checked: Checked) -> dict[str, Any]:
    """The reports for JSON."""
    reports = [{**msgspec.to_builtins(each), "breaks": each.breaks} for each in checked.reports]
    return {"against": checked.against, "workflows": reports}


SAYS = {
    "type": "{0.type} does not exist{1}",
    "replaced": "ComfyUI replaces {0.type} by {0.name}",
    "input": "{0.type} has no input {0.name}",
    "output": "{0.type}.{0.name} is connected to {0.detail}, which does not exist",
    "value": "{0.type}.{0.name} does not accept {0.detail}",
    "range": "{0.type}.{0.name} does not accept {0.detail}",
    "link": "{0.type}.{0.name} is connected to {0.detail}",
    "required": "{0.type}.{0.name} is required and has no value",
}


def rows(checked: Checked) -> Iterator[str]:
    """One line per finding, with all nodes that have it, and a count of the workflows."""
    for each in checked.reports:
        if each.error:
            continue
        nodes: dict[str, list[str]] = {}
        for one in each.findings:
            line = SAYS[one.kind].format(one, f" ({one.detail})" * bool(one.detail)) + ", but is muted" * one.muted
            nodes.setdefault(line, []).append(one.node)
        if nodes or each.already:
            yield f"{each.file}:"
        yield from (f"  {line}: node {', '.join(dict.fromkeys(ids))}" for line, ids in nodes.items())
        if each.already:
            yield f"  unchanged: {each.already} findings that the pinned ComfyUI has as well"
    broken, read = sum(each.breaks for each in checked.reports), sum(not each.error for each in checked.reports)
    yield f"{read - broken} of {read} workflows fit {checked.against}"
