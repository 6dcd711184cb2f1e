"""The agent's code on this host: unpacked into `state/agents/<hash>`, so that Python caches its bytecode.

The client's loader runs the archive from memory after checking its hash, and an unpacked agent only if no user except
root and the current user can write to it (`deploy/connection.py`). Units run `state/agent`, a link to the agent that
accepted their plan; a release that runs the agent has a separate link.
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
"""The running agent: an archive or a folder."""

RECENT = 24 * 3600
"""Seconds to keep an unpacked agent without links: another client's commands may be running from it."""


def install(layout: Layout) -> None:
    """Make units use the running agent. Raises OSError."""
    place = _unpack(layout) if RUNNING.is_file() else RUNNING
    inside = place.parent == layout.state / "agents"
    link(layout.agent, f"agents/{place.name}" if inside else place)


def keep(layout: Layout) -> None:
    """Unpack the running agent for later commands, if the state folder exists and has space."""
    if RUNNING.is_file() and layout.state.is_dir():
        with suppress(OSError):
            if not _place(layout).exists():  # exists: the loader does not trust it
                _unpack(layout)


def prune(layout: Layout) -> None:
    """Delete unpacked agents older than RECENT that no unit or release links to. Raises AgentError."""
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
    """Unpack and compile the running archive to a temporary folder and rename it into place. Raises OSError.

    Everything is synced before the rename. Bytecode is not checked against its source on import (PEP 552), and Python
    writes none later (`__main__.py`), since a power loss could truncate it.
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
            path.chmod(0o755 if path.is_dir() else 0o644)  # independent of the umask: some units do not run as root
            sync(path)
        place.parent.chmod(0o755)
        if place.exists():  # not accepted by the loader: move it aside, it may be running
            place.rename(draft.with_suffix(".old"))
        draft.rename(place)
        sync(place.parent)
    except BaseException:
        remove(draft)
        raise
    remove(draft.with_suffix(".old"))
    return place
