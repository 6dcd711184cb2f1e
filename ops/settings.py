"""Settings outside Hearth's prefix: files, kernel values, groups, devices, units. A host records and restores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from deploy.plan import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.plan import Options

Place = dict[str, Any]
"""One place that a setting changes, as `agent/change/settings.py` lists the kinds."""


class Seen(msgspec.Struct, frozen=True):
    """A place as it is, as the setting wants it, and whether the kernel lets it be written."""

    kind: str
    place: str
    now: Any
    wanted: Any
    writable: bool


class Applied(msgspec.Struct, frozen=True):
    """A change in force: the value before, and the value that was set."""

    kind: str
    place: str
    old: Any
    new: Any


class State(msgspec.Struct, frozen=True):
    """A host's settings, by name: those applied, and the places of those asked for."""

    applied: dict[str, tuple[Applied, ...]]
    seen: dict[str, tuple[Seen, ...]]

    def settled(self, name: str) -> bool:
        """Whether every place of a setting is as wanted."""
        return all(each.now == each.wanted for each in self.seen[name])


def look(agent: Agent, wanted: Mapping[str, Sequence[Place]]) -> State:
    """The state of some settings on a host."""
    return msgspec.convert(agent.call("settings", changes=wanted), State)


def file(place: str, text: str, **more: str) -> Place:
    """A file that a setting writes, and that undoing it removes."""
    return {"kind": "file", "place": place, "text": text, **more}


def apply_step(
    name: str, places: Sequence[Place], title: str, *, undo: str, why: str = "asked for", around: Mapping[str, Any] = {}
) -> Step:
    """The step that applies a setting."""
    return Step("set", title, why, undo, {"setting": name, "changes": list(places), "serves": False, **around})


def undo_step(name: str, title: str, *, force: bool, around: Mapping[str, Any] = {}) -> Step:
    """The step that undoes a setting; with `force` also what somebody changed since."""
    values = {"settings": [name], "overwrite": force, "serves": False, **around}
    return Step("unset", title, "asked for", "the same command without --undo", values)


def stopped(facts: Facts, options: Options) -> dict[str, Any]:
    """Values of a step around which ComfyUI, if it runs, is stopped and started: it must see the setting at start."""
    return {"serves": True, "drain": options.drain, "force": options.force} if facts.service.active else {}
