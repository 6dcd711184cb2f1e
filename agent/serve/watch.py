"""Restart ComfyUI when Python files of nodes under development change."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

from agent.layout import Layout
from agent.processes import wait_for
from agent.serve.systemd import Systemd


class Watcher:
    """Reports changed Python files in these folders, once they are unchanged between two polls.

    Compares sizes and mtimes (3 ms for 600 files in 120 folders), which also works on network drives.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = folders
        self.known = self.last = _files(folders)

    def changed(self) -> list[str]:
        """Return the files changed since the last report; none while they still change between calls."""
        before, self.last = self.last, _files(self.folders)
        if self.last in (self.known, before):
            found, self.known = _different(self.known, self.last), self.last
            return found
        return []


def _files(folders: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return every Python file's size and mtime; skip hidden folders, which ComfyUI does not import."""
    found: dict[str, tuple[int, int]] = {}
    pending = list(folders)
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending += [] if entry.name.startswith((".", "__pycache__")) else [entry.path]
                elif entry.name.endswith(".py"):
                    with suppress(OSError):  # deleted meanwhile
                        status = entry.stat()
                        found[entry.path] = (status.st_size, status.st_mtime_ns)
    return found


def _different(one: dict[str, tuple[int, int]], other: dict[str, tuple[int, int]]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def watch(layout: Layout) -> None:
    """Restart the service whenever a node under development changes; never returns.

    A stopped service stays stopped; a failed one is started again. Waits during a run.
    """
    manager = Systemd(layout)
    watcher = Watcher(layout.manifest(layout.release()).develop)
    while True:
        time.sleep(1)
        if names := watcher.changed():
            wait_for(lambda: not layout.pending.exists(), float("inf"))
            again = not manager.status().state.startswith("inactive")
            print(f"{names[0]} changed: {'restarting ComfyUI' if again else 'ComfyUI is stopped'}", flush=True)
            if again:
                manager.restart()
