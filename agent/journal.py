"""What was done on the host, and what is under way."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any, cast

from agent.files import Json, append, read
from agent.layout import Layout
from agent.locks import free
from agent.schema.facts import Busy, Ended


def busy(layout: Layout) -> Busy:
    """Who is changing this host now: the run under way; empty when nobody is."""
    plan = read(layout.pending)
    if not plan:
        return {}
    run, who, since, action = (str(plan[key]) for key in ("run", "who", "since", "action"))
    return {"run": run, "who": who, "since": since, "action": action, "alive": not free(layout.lock)}


def now() -> str:
    """The time, UTC, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def events(text: str) -> list[Json]:
    """The lines of a journal; one that a power cut tore is left out."""
    found: list[Json] = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


class Journal:
    """What happened in a run, on disk line by line before the next thing is done."""

    def __init__(self, layout: Layout, run_id: str) -> None:
        self.path = layout.state / "runs" / f"{run_id}.jsonl"

    def events(self) -> list[Json]:
        """All lines so far; one that a power cut tore is left out."""
        try:
            return events(self.path.read_text(errors="replace"))
        except FileNotFoundError:
            return []

    def add(self, event: str, **values: Any) -> None:
        """Append one line."""
        append(self.path, {"at": now(), "event": event, **values})


class Adopted(Journal):
    """What adopting changes, each line on disk before that is done: undoing reads it backwards."""

    def __init__(self, layout: Layout) -> None:
        self.path = layout.state / "adopted.jsonl"


class Settings(Journal):
    """What is changed outside the prefix on request, each line on disk before that is done."""

    def __init__(self, layout: Layout) -> None:
        self.path = layout.state / "settings.jsonl"

    def in_force(self) -> dict[str, list[Json]]:
        """The changes that were not undone, by setting, each with its first `old` value and its latest `new` one."""
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
    """How every run on this host ended, oldest first."""
    try:
        return cast("list[Ended]", events(layout.history.read_text(errors="replace")))
    except OSError:
        return []


DEPLOYS = ("deploy", "rollback")
"""The actions that put a release in service."""


def last(runs: list[Ended], *actions: str) -> Ended:
    """How the last of some runs ended, or the last of these `actions`; empty when there was none."""
    return next((each for each in reversed(runs) if not actions or each["action"] in actions), Ended())
