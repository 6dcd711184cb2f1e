"""A proposed update: what is requested, and what moves to which version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.errors import UsageError, suggest
from lock.application import CHANNELS

if TYPE_CHECKING:
    from datetime import datetime

    from lock.preview import Preview
    from lock.updates.node_updates import Change

PARTS = ("comfyui", "nodes", "stack", "kernels", "tool")


@dataclass(frozen=True)
class Move:
    """A new version of something; `date` is its day (empty: unknown). `notes` are facts that the user should know."""

    part: str
    name: str
    old: str
    new: str
    date: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Proposal:
    """An update, made or not: what moves, why newer versions were skipped, effects on nodes, and changed files.

    `warnings` are about what is pinned now. `preview` is what changes and breaks, as far as it is known.
    """

    moves: list[Move] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    nodes: list[Change] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    preview: Preview | None = None


@dataclass(frozen=True)
class Request:
    """What to update: a part (`all`: every one), `to` a version (empty: the newest), that was made `before` a time.

    With a `channel`, only that channel of ComfyUI moves. `kept` are versions of ComfyUI that hosts select.
    """

    part: str
    to: str = ""
    before: datetime | None = None
    channel: str = ""
    kept: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.part not in (*PARTS, "all"):
            hint = suggest(self.part, [*PARTS, "all"])
            raise UsageError("unknown-name", f"there is no part {self.part!r} to update", hint=hint)
        if self.channel and self.channel not in CHANNELS:
            hint = suggest(self.channel, CHANNELS)
            raise UsageError("unknown-name", f"there is no channel {self.channel!r}", hint=hint)
        if self.channel and self.part != "comfyui":
            raise UsageError("usage", "--channel needs comfyui", hint="inv update comfyui --channel latest")
        if self.to and self.part not in ("comfyui", "stack"):
            raise UsageError("usage", "--to needs comfyui or stack", hint="inv update comfyui --to VERSION")

    def includes(self, part: str) -> bool:
        """Whether to update this part."""
        return self.part in (part, "all")

    @property
    def newest(self) -> str:
        """The time as uv takes it."""
        return self.before.strftime("%Y-%m-%dT%H:%M:%SZ") if self.before else ""
