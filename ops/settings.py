"""System settings: drop-in files outside Hearth's prefix, which a host records and deletes to undo them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.schema.change import Set, Unset
from agent.schema.requests import SettingsQuery
from agent.schema.settings import State
from core.typed import convert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.schema.change import Step
    from agent.schema.requests import DropIns
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.plan import Options


def settled(state: State, name: str) -> bool:
    """Whether every place of a setting has its wanted value."""
    return all(each.now == each.wanted for each in state.seen[name])


def look(agent: Agent, wanted: Mapping[str, DropIns]) -> State:
    """The state of some settings on a host."""
    return convert(agent.call("settings", **msgspec.to_builtins(SettingsQuery({**wanted}))), State)


def apply_step(
    name: str, setting: DropIns, title: str, *, undo: str, why: str = "requested", stops: Options | None = None
) -> Step:
    """The step that applies a setting; `stops` is as in `undo_step`."""
    return Set(title, why, undo, *_stopping(stops), name, setting.files, setting.groups)


def undo_step(name: str, title: str, *, force: bool, stops: Options | None = None) -> Step:
    """The step that undoes a setting; with `force` it also overwrites later changes by others.

    With `stops`, ComfyUI is stopped before it and started afterwards.
    """
    return Unset(title, "requested", "run the same command without --undo", *_stopping(stops), (name,), force)


def _stopping(stops: Options | None) -> tuple[float, bool, bool]:
    return (stops.drain, stops.force, True) if stops else (0, False, False)


def stopped(facts: Facts, options: Options) -> Options | None:
    """The options for stopping ComfyUI if it runs: it reads the setting at its start."""
    return options if facts.service.active else None
