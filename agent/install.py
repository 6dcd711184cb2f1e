"""The agent's own code on this host: unpacked into `state/agents/<hash>`, so that Python keeps its bytecode.

The client's loader runs the archive from memory after comparing its hash, and an unpacked agent only where nobody but
root and the current user can write (`deploy/connection.py`). Units run `state/agent`, a link to the agent that took
their plan over; a release that runs the agent has a link of its own.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from agent.deletion import remove
from agent.files import link, sync
from agent.layout import Layout

RUNNING = Path(__file__).parents[1]
"""What runs now: an archive, or a folder."""

RECENT = 24 * 3600
"""Seconds for which an unpacked agent is kept that nothing links to: another client's commands may run from it."""


def install(layout: Layout) -> None:
    """Make the running agent the one that units run. Raises OSError."""
    place = _unpack(layout) if RUNNING.is_file() else RUNNING
    inside = place.parent == layout.state / "agents"
    link(layout.agent, f"agents/{place.name}" if inside else place)


def keep(layout: Layout) -> None:
    """Unpack the running agent for the next commands, where Hearth has a folder and room for it."""
    if RUNNING.is_file() and layout.state.is_dir():
        with suppress(OSError):
            if not _place(layout).exists():  # else the loader does not trust that place
                _unpack(layout)


def prune(layout: Layout) -> None:
    """Delete unpacked agents that neither a unit nor a release runs, nor a command of the last day."""
    linked = {
        os.path.realpath(path) for path in (layout.agent, layout.exporter_agent, *layout.releases.glob("*/agent"))
    } | {str(RUNNING)}
    for path in (layout.state / "agents").glob("*"):
        with suppress(FileNotFoundError):
            if str(path.resolve()) not in linked and abs(time.time() - path.stat().st_mtime) > RECENT:
                remove(path)


def _place(layout: Layout) -> Path:
    return layout.state / "agents" / hashlib.sha256(RUNNING.read_bytes()).hexdigest()[:16]


def _unpack(layout: Layout) -> Path:
    """Unpack and compile the running archive beside its place and rename it there. Raises OSError.

    Everything is on the disk before the rename. Bytecode is not compared with its source on import (PEP 552), and
    Python writes none later (`__main__.py`): after a power cut it could be cut short.
    """
    import io
    import py_compile
    import zipfile

    place = _place(layout)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    remove(draft)
    try:
        with zipfile.ZipFile(io.BytesIO(RUNNING.read_bytes())) as archive:
            archive.extractall(draft)
        for path in [*draft.rglob("*.py")]:
            with suppress(py_compile.PyCompileError):
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(str(path), doraise=True, invalidation_mode=mode)
        for path in (*draft.rglob("*"), draft):
            path.chmod(0o755 if path.is_dir() else 0o644)  # whatever the umask: some units are not root's
            sync(path)
        place.parent.chmod(0o755)
        if place.exists():  # not one that the loader accepts: aside first, for what runs from it
            place.rename(draft.with_suffix(".old"))
        draft.rename(place)
        sync(place.parent)
    except BaseException:
        remove(draft)
        raise
    remove(draft.with_suffix(".old"))
    return place
