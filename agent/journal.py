"""Journals of finished and current runs on the host."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar, cast

from agent.files import Json, append, damaged, record, recorded
from agent.layout import Layout
from agent.locks import free
from agent.requester import asker
from agent.schema.decode import decode
from agent.schema.facts import Busy, Ended
from agent.schema.records import AdoptionChange, Event, Plan, SettingChange

T = TypeVar("T")


def pending(layout: Layout) -> Plan:
    """Return the plan in progress. Raises AgentError if it is damaged."""
    return recorded(layout.pending, Plan)


def note_pending(layout: Layout, plan: Plan) -> None:
    """Record the plan in progress. Raises OSError."""
    record(layout.pending, {name: value for name, value in vars(plan).items() if value is not None})


def busy(layout: Layout) -> Busy:
    """Return the run in progress; empty if there is none."""
    plan = pending(layout)
    if not plan.run:
        return {}
    alive = not free(layout.lock)
    return {"run": plan.run, "who": plan.who, "since": plan.since, "action": plan.action, "alive": alive}


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


class Lines(Generic[T]):
    """A file with a line for each event or change, which is on disk before the next action."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self._kind = kind

    def events(self) -> list[T]:
        """Return all lines so far; skip a line truncated by a power loss. Raises AgentError for others than `kind`."""
        try:
            return self.decoded(self.path.read_text(errors="replace"))
        except FileNotFoundError:
            return []

    def decoded(self, text: str) -> list[T]:
        """Decode some of its lines, see `events`."""
        try:
            return [decode(self._kind, each, lenient=True) for each in events(text)]
        except ValueError as error:
            raise damaged(self.path, str(error)) from None

    def add(self, line: T) -> None:
        """Append one line durably, with the time. Raises OSError."""
        append(self.path, {**vars(line), "at": now()})


class Journal(Lines[Event]):
    """Events of a run."""

    def __init__(self, layout: Layout, run_id: str) -> None:
        super().__init__(layout.state / "runs" / f"{run_id}.jsonl", Event)


class AdoptionJournal(Lines[AdoptionChange]):
    """Changes of an adoption. Undo reads them backwards."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.state / "adopted.jsonl", AdoptionChange)


class SettingsJournal(Lines[SettingChange]):
    """Requested changes outside the prefix."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.state / "settings.jsonl", SettingChange)

    def in_force(self) -> dict[str, list[SettingChange]]:
        """Return the changes not undone, by setting, each with its first `old` and latest `new` value."""
        found: dict[str, dict[tuple[str, str], SettingChange]] = {}
        for event in self.events():
            places = found.setdefault(event.setting, {})
            key = event.kind, event.place
            if event.event == "undone":
                places.pop(key, None)
            else:
                places[key] = replace(event, old=places.get(key, event).old)
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
