"""Flags that several tasks have, each declared once. A task takes the dataclasses whose flags it wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def flag(default: str | bool, meaning: str) -> Any:
    """A field that is a flag, with its default and what `inv --help` says of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Output:
    """How a result is printed."""

    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class Sudo:
    """How root is had."""

    ask_sudo: bool = flag(
        False, "the sudo password, from the keyring (keyring set hearth-sudo HOST) or asked for once; never stored"
    )


@dataclass(frozen=True)
class Where(Sudo):
    """One host."""

    host: str = flag("", "a host of config/hosts.toml (default: local, this machine)")


@dataclass(frozen=True)
class DryRun:
    """Whether anything is changed at all."""

    dry_run: bool = flag(False, "only show what would be changed; exit code 0: nothing, 2: there would be changes")


@dataclass(frozen=True)
class Agreed(DryRun):
    """A change that asks for confirmation."""

    yes: bool = flag(False, "change it without asking; remove, nuke and adopt need it where there is no terminal")


@dataclass(frozen=True)
class CutOver(DryRun):
    """How the service is stopped, as to go from one release to another."""

    drain: str = flag(
        "60", "seconds to wait for ComfyUI's jobs; when they still run then, nothing is changed (default: 60)"
    )
    force: bool = flag(False, "stop ComfyUI without asking for its jobs: they are interrupted")


@dataclass(frozen=True)
class Tried(CutOver):
    """Whether a release is tried beside the one in service before it replaces it."""

    trial: bool = flag(False, "stop after the trial: the release in service stays untouched")
    no_trial: bool = flag(False, "cut over without a trial: an unhealthy release costs its start and the way back")


@dataclass(frozen=True)
class Change(CutOver, Agreed):
    """A cut-over that somebody at a terminal agrees to."""


@dataclass(frozen=True)
class TriedChange(Tried, Agreed):
    """A cut-over after a trial, that somebody at a terminal agrees to."""
