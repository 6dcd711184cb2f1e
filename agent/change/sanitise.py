"""Removes metadata from the files in the output folder, as the service user and without following links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.files import AgentError
from agent.folders import branches, inside
from agent.layout import Layout
from agent.parts import as_service, drop_root
from agent.sanitise import DRAFT, sanitise
from agent.schema.live import Sanitised

BYTES, FILES = 500_000_000, 500
"""Maximum size and number of files per process, whose time is limited."""

SLOWEST = 5_000_000
"""Bytes per second of the slowest disk that is fast enough."""


def sanitise_outputs(layout: Layout, paths: Sequence[str], write: bool, replace: bool) -> Iterator[Sanitised]:
    """Yield the result for each file below `paths`, which are relative to the output folder. Raises AgentError."""
    root = layout.folder("output")
    for path in paths:
        if path.startswith("/") or ".." in path.split("/"):
            hint = f"use a path relative to {root}, such as portraits/picture.png; without a path: all outputs"
            raise AgentError("usage", f"{path!r} is not below the output folder", "", hint)
    if gone := layout.unmounted():
        raise AgentError("storage", f"{', '.join(gone)} is not mounted", "", "inv doctor shows why")
    pending = as_service(layout, listed, root, [path.strip("/") for path in paths] or [""])
    while pending:
        size, number = 0, 0
        while number < min(FILES, len(pending)) and (not number or size + pending[number][1] < BYTES):
            size, number = size + pending[number][1], number + 1
        names = [name for name, _ in pending[:number]]
        for each in as_service(layout, _sanitise_each, root, names, write, replace, seconds=600 + size / SLOWEST):
            yield Sanitised(**each)
        pending = pending[number:]


def listed(root: Path, paths: Sequence[str]) -> list[tuple[str, int]]:
    """Return the files below folders of `root`, and `paths` that are no folders, each with its size, sorted."""
    drop_root()
    found: dict[str, int] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        try:
            with inside(root, parent) as place:
                status = (place / name).lstat()  # without a name, of the folder itself
            if name and not stat.S_ISDIR(status.st_mode):
                found[path] = status.st_size
                continue
            for each, place in branches(root, path):
                with os.scandir(place) as entries:
                    for entry in entries:
                        if not entry.is_dir(follow_symlinks=False) and not entry.name.startswith(DRAFT):
                            found[each + entry.name] = entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            if error.errno == errno.ENOENT and not path:
                return []  # nothing is deployed
            found[path] = 0  # `sanitise` reports the reason
    return sorted(found.items())


def _sanitise_each(root: Path, names: Sequence[str], write: bool, replace: bool) -> list[Sanitised]:
    drop_root()
    found: list[Sanitised] = []
    for path in names:
        folder, _, name = path.rpartition("/")
        try:
            with inside(root, folder) as place:
                result = sanitise(place, name, write=write, replace=replace)
        except OSError as error:
            result = Sanitised(name, "failed", error=error.strerror or str(error))
        prefix = f"{folder}/" if folder else ""
        found.append(Sanitised(path, result.state, result.removed, result.copy and prefix + result.copy, result.error))
    return found
