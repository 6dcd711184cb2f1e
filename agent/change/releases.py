"""Steps that write a release, serve it, and delete old ones."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress

from agent.change.database import forget
from agent.deletion import remove
from agent.files import Note, link, record, write
from agent.install import prune as prune_agents
from agent.journal import history, pending
from agent.layout import Layout
from agent.locks import free
from agent.schema.change import Prune, Release, Serve
from agent.serve.health import gate
from agent.serve.managers import manager_of


def release(layout: Layout, step: Release, note: Note) -> None:
    """Write a release: its manifest, its files such as the unit, and links to its parts."""
    manifest = step.release
    place = layout.releases / manifest.id
    place.mkdir(parents=True, exist_ok=True)
    for kind, name in manifest.parts.items():
        link(place / kind, f"../../{'../' * kind.count('/')}parts/{name}")
    for name, target in manifest.links.items():
        link(place / name, target)
    for name in manifest.empty or ():
        (place / name).mkdir(parents=True, exist_ok=True)
    for name, text in manifest.files.items():
        write(place / name, text)
    if manifest.develop or manifest.free_memory or manifest.confined:  # these features run the agent
        link(place / "agent", os.path.relpath(layout.agent.resolve(), place.resolve()))
    record(place / "release.json", manifest)


def serve(layout: Layout, step: Serve, note: Note) -> None:
    """Install, enable and start the current release's unit, and check its health. Raises AgentError."""
    manager = manager_of(layout)
    manager.install()
    manager.start()
    current = layout.release()
    gate(layout, manager, layout.manifest(current), note)


def prune(layout: Layout, step: Prune, note: Note) -> None:
    """Delete old releases, unused parts and agents, used blobs and old journals. Raises AgentError."""
    current = layout.release()
    for path in layout.releases.glob("*"):
        if path.name not in (*step.keep, current):
            remove(path)
            forget(layout.databases / path.name)
    kept = [layout.manifest(path.parent.name) for path in layout.releases.glob("*/release.json")]
    named = {part for each in kept for part in each.parts.values()}
    for path in layout.parts.glob("*"):
        if path.name not in named:
            remove(path)
            if path.name.startswith("env-"):  # uv's cache holds the same packages, several unneeded GB
                shutil.rmtree(layout.state / "cache", ignore_errors=True)
    plan = pending(layout)
    used, old = json.dumps(plan.steps), 24 * 3600  # seconds; newer blobs may belong to another client's next plan
    for path in layout.incoming.glob("*"):
        with suppress(FileNotFoundError):
            needless = path.name.partition(".")[0] in used or abs(time.time() - path.stat().st_mtime) > old
            if needless and free(path):
                path.unlink()
    prune_agents(layout)
    journals = {line["run"] for line in history(layout)[-JOURNALS:]} | {plan.run}
    for path in (layout.state / "runs").glob("*.jsonl"):
        if path.stem not in journals:
            path.unlink()


JOURNALS = 50
"""Number of journals to keep; the history keeps a line for every run."""
