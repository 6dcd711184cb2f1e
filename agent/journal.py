"""Journals of finished and current runs on the host."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any, cast

from agent.files import Json, append, read
from agent.layout import Layout
from agent.locks import free
from agent.requester import asker
from agent.schema.facts import Busy, Ended


def busy(layout: Layout) -> Busy:
    """Return the run in progress; empty if there is none."""
    plan = read(layout.pending)
    if not plan:
        return {}
    run, who, since, action = (str(plan[key]) for key in ("run", "who", "since", "action"))
    return {"run": run, "who": who, "since": since, "action": action, "alive": not free(layout.lock)}


def now() -> str:
    """Return the current time in UTC as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def events(text: str) -> list[Json]:
    """Parse the lines of a journal; skip a line truncated by a power loss."""
    found: list[Json] = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


class Journal:
    """Events of a run; each line is on disk before the next action."""

    def __init__(self, layout: Layout, run_id: str) -> None:
        self.path = layout.state / "runs" / f"{run_id}.jsonl"

    def events(self) -> list[Json]:
        """Return all events so far; skip a line truncated by a power loss."""
        try:
            return events(self.path.read_text(errors="replace"))
        except FileNotFoundError:
            return []

    def add(self, event: str, **values: Any) -> None:
        """Append one event durably. Raises OSError."""
        append(self.path, {"at": now(), "event": event, **values})


class AdoptionJournal(Journal):
    """Changes of an adoption; each is on disk before it is made. Undo reads them backwards."""

    def __init__(self, layout: Layout) -> None:
        self.path = layout.state / "adopted.jsonl"


class SettingsJournal(Journal):
    """Requested changes outside the prefix; each is on disk before it is made."""

    def __init__(self, layout: Layout) -> None:
        self.path = layout.state / "settings.jsonl"

    def in_force(self) -> dict[str, list[Json]]:
        """Return the changes not undone, by setting, each with its first `old` and latest `new` value."""
        found: dict[str, dict[tuple[str, str], Json]] = {}
        for event in self.events():
            places = found.setdefault(event["setting"], {})
            key = event["kind"], event["place"]
            if event["event"] == "undone":
                places.pop(key, None)
            else:
                places[key] = {**event, "old": places.get(key, event)["old"]}
        return {name: list(places.values()) for name, places in found.items() if places}


def history(layout: Layout) -> list[Ended]:
    """Return the results of all runs on this host, oldest first."""
    try:
        return cast("list[Ended]", events(layout.history.read_text(errors="replace")))
    except OSError:
        return []


def note_change(layout: Layout, action: str, who: str) -> None:
    """Add a change that no run made to the history, as far as the disk permits."""
    line = {"at": now(), "result": "done", "run": "", "action": action, "release": "", "base": "", "error": ""}
    with suppress(OSError):
        append(layout.history, {**line, **asker(who)})


DEPLOYS = ("deploy", "rollback")
"""Actions that put a release in service."""


def last(runs: list[Ended], *actions: str) -> Ended:
    """Return the last run, or the last with one of `actions`; empty if there is none."""
    return next((each for each in reversed(runs) if not actions or each["action"] in actions), Ended())
