"""ComfyUI's database across releases: its copies, and the release that can open it.

A newer ComfyUI migrates the database when it starts, and an older one then refuses it. What follows the service's
files runs as the service's user.
"""

from __future__ import annotations

import os
import re
from contextlib import closing, suppress
from pathlib import Path

from agent.deletion import SafeDeleter, remove
from agent.files import AgentError, copy, discard, read_text, regular, retried, sha256, sync
from agent.folders import inside
from agent.layout import DATABASE, Layout
from agent.parts import drop_root


def forget(place: Path) -> None:
    """Delete a copy of the database. What cannot be deleted wastes only space.

    The database itself goes first, so that the rest is not taken for a copy. The service can write there.
    """
    for path in (place / DATABASE[0], place) * 2:  # one retry
        if os.path.lexists(path):
            SafeDeleter().delete(path)


def revisions(layout: Layout, release: str) -> set[str]:
    """The migrations that a release's ComfyUI knows; empty if none can be read."""
    found = (layout.releases / release / "app/alembic_db/versions").glob("*.py")
    known = (re.search(r"""^revision\b[^=\n]*=\s*["']([^"'\n]+)""", read_text(each), re.MULTILINE) for each in found)
    return {each[1] for each in known if each}


def revision(folder: Path) -> str:
    """The last migration of the database in a folder; empty without one, or if it cannot be read."""
    import sqlite3

    with suppress(FileNotFoundError, sqlite3.Error), inside(folder) as here:
        path = here / DATABASE[0]
        if regular(path):
            drop_root()  # parses a file that the service wrote
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as opened:
                found = opened.execute("select version_num from alembic_version").fetchone()
                return str(found[0])[:200] if found else ""
    return ""


LARGEST = 20_000_000_000
"""Maximum size of the database in bytes. It is an index of models and pictures, normally some MB."""


def reserve(source: Path, place: Path) -> None:
    """Reserve disk space for a copy of the database, so that a full disk is detected before anything is stopped.

    Raises AgentError if the database exceeds LARGEST: a custom node may have inflated it.
    """
    with inside(source) as here:
        for name in filter(lambda name: regular(here / name), DATABASE):
            with suppress(FileNotFoundError):
                size = (here / name).lstat().st_size
                if size > LARGEST:
                    what = f"{source / name} is {size} bytes, more than ComfyUI's database can have ({LARGEST})"
                    raise AgentError(
                        "step", what, "", f"inv stop --force; inspect it, then move it away: mv {source / name} …"
                    )
                descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                try:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)


def take_snapshot(source: Path, place: Path) -> None:
    """Copy the database while nothing writes to it: a newer ComfyUI migrates it, and an older one then refuses it."""
    with inside(source) as here:
        for name in DATABASE:
            if regular(here / name):  # not through a link: this process can read files that the unit hides
                copy(here / name, place / name)
            else:
                discard(place / name)


def restore(snapshot: Path, place: Path, keep: bool = False) -> None:
    """Restore the database file by file. Raises OSError and keeps the snapshot if a file cannot be restored.

    The WAL and journal come first: SQLite would apply newer ones to the older database. On a full disk, the snapshot's
    files are moved, except with `keep`.
    """
    with inside(place) as here:
        for name in reversed(DATABASE):
            for draft in here.glob(f".{name}.*"):  # left by a killed restore
                with suppress(OSError):
                    draft.unlink()
            kept, now = snapshot / name, here / name
            if not kept.exists() or not regular(now):
                retried(lambda now=now: remove(now))  # type: ignore[misc]  # it may be a folder now
            if kept.exists() and (not regular(now) or sha256(kept) != sha256(now)):
                try:
                    retried(lambda kept=kept, now=now: copy(kept, now))  # type: ignore[misc]
                except OSError:
                    if keep:
                        raise
                    os.replace(kept, now)  # a full disk has room for this, on the same file system  # noqa: PTH105
        retried(lambda: sync(here))  # the snapshot is deleted after this
