"""System settings: drop-in files outside Hearth's prefix, which a host records and deletes to undo them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from agent.schema.change import Set, Unset
from agent.schema.settings import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.schema.change import Step
    from deploy.connection import Agent
    from deploy.facts import Facts
    from deploy.plan import Options


@dataclass(frozen=True)
class Around:
    """Whether ComfyUI is stopped before a step and started after it, and how."""

    serves: bool = False
    drain: float = 0
    force: bool = False


NOTHING = Around()


@dataclass(frozen=True)
class Setting:
    """Drop-in files by path, and members that groups get; `agent/change/settings.py` says what the files change."""

    files: dict[str, str]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


def settled(state: State, name: str) -> bool:
    """Whether every place of a setting has its wanted value."""
    return all(each.now == each.wanted for each in state.seen[name])


def look(agent: Agent, wanted: Mapping[str, Setting]) -> State:
    """The state of some settings on a host."""
    return msgspec.convert(agent.call("settings", settings=msgspec.to_builtins(wanted)), State)


def apply_step(
    name: str, setting: Setting, title: str, *, undo: str, why: str = "requested", around: Around = NOTHING
) -> Step:
    """The step that applies a setting."""
    return Set(title, why, undo, name, setting.files, setting.groups, around.serves, around.drain, around.force)


def undo_step(name: str, title: str, *, force: bool, around: Around = NOTHING) -> Step:
    """The step that undoes a setting; with `force` it also overwrites later changes by others."""
    undo = "run the same command without --undo"
    return Unset(title, "requested", undo, (name,), force, around.serves, around.drain, around.force)


def stopped(facts: Facts, options: Options) -> Around:
    """Stop ComfyUI before a step and start it afterwards, if it runs: it reads the setting at start."""
    return Around(True, options.drain, options.force) if facts.service.active else NOTHING
