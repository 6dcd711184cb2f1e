"""Checks workflows against the ComfyUI of this checkout, of a host, or of another version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from core import source
from core.console import counted
from core.errors import HearthError, UsageError
from deploy import connection
from deploy.look import find_target
from deploy.preview import running
from lock import application, interface, workflows
from lock.updates import node_updates, upstream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lock.interface import Interface


class Checked(msgspec.Struct, frozen=True):
    """The reports of a check, and what the workflows were checked against."""

    against: str
    reports: tuple[workflows.Report, ...]
    failed: HearthError | None = None


def check(names: Sequence[str], host: str, to: str, *, ask_sudo: bool) -> Checked:
    """Check workflow files against a host or version (default: the pinned ComfyUI and the known nodes).

    Without names: those in `config/workflows`, and those saved on the host. Raises UsageError; an unreadable file is
    reported, and the others are checked.
    """
    if host and to:
        raise UsageError("usage", "--host and --to exclude each other", hint="use one of them")
    saved: workflows.Workflows = {}
    old = None
    if host:
        target = find_target(host)
        with connection.connect(target, ask_sudo) as agent:
            new, saved = running(agent, host, saved=not names)
    else:
        new = interface.read_cached(source.fetch(application.application()))
    found = {**workflows.collect(names), **saved}
    if not found:
        where = f"on {host}" if host else "in config/workflows"
        raise UsageError("usage", f"there are no workflows {where}", hint="name workflow files with --file")
    if to:
        old, new = new, interface.read_cached(tree(to))
    elif not host:
        new = _with_nodes(new, found)
    reports = tuple(workflows.report(name, each, new, old) for name, each in found.items())
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
    commit = upstream.newest(origin.git, f"refs/tags/v{version}")
    at = source.Source(git=origin.git, commit=commit)
    pinned = source.pin(msgspec.structs.replace(app, version=version, source=(at,), tree="", paths=_CODE))
    return source.fetch(pinned)


_CODE = ("comfy", "comfy_api", "comfy_api_nodes", "comfy_execution", "comfy_extras", "folder_paths.py",
         "node_helpers.py", "nodes.py")  # fmt: skip
"""The parts of ComfyUI that define node types."""


def _with_nodes(own: Interface, found: workflows.Workflows) -> Interface:
    """ComfyUI's node types and those of the known nodes that the workflows use; their inputs are not known."""
    used = {node.type for each in found.values() if isinstance(each, list) for graph in each for node in graph}
    lacking = used - own.types.keys() - own.replaced.keys() - workflows.EDITOR
    provided = node_updates.providers(lacking) if lacking else {}
    others = {name: interface.NodeType(by[0], None, None, complete=False) for name, by in provided.items() if by}
    return msgspec.structs.replace(own, types={**own.types, **others})


def summary(checked: Checked) -> dict[str, Any]:
    """The reports for JSON."""
    reports = [{**msgspec.to_builtins(each), "breaks": each.breaks} for each in checked.reports]
    return {"against": checked.against, "workflows": reports}


def rows(checked: Checked) -> Iterator[str]:
    """One line per finding, with all nodes that have it, and a count of the workflows."""
    for each in checked.reports:
        yield from workflows.rows(each)
    broken, read = sum(each.breaks for each in checked.reports), sum(not each.error for each in checked.reports)
    yield f"{read - broken} of {counted(read, 'workflow')} {'fits' if read == 1 else 'fit'} {checked.against}"
