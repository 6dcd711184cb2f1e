"""Flags that several tasks share, each declared once. A task takes the dataclasses whose flags it needs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from core import console
from core.errors import RefusedError, UsageError


def flag(default: str | bool, meaning: str) -> Any:
    """A dataclass field for a flag, with its default and its text in `inv --help`."""
    return field(default=default, metadata={"help": meaning})


def number(name: str, text: str, least: float = 0, most: float = math.inf, *, whole: bool = False) -> float:
    """Parse the number that a flag was given; raises UsageError."""
    if re.fullmatch(r"\d+" if whole else r"\d+(\.\d+)?", text) and least <= float(text) <= most:
        return float(text)
    bounds = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
    what = f"--{name} must be a {'whole ' * whole}number {bounds} (got {text!r})"
    raise UsageError("usage", what, hint=f"for example: --{name} {min(max(least, 10), most):g}")


@dataclass(frozen=True)
class Output:
    """Output format."""

    json: bool = flag(False, "print JSON")


@dataclass(frozen=True)
class Sudo:
    """Privilege escalation."""

    ask_sudo: bool = flag(
        False, "take the sudo password from the keyring (keyring set hearth-sudo HOST), or ask for it; never stored"
    )


@dataclass(frozen=True)
class Where(Sudo):
    """One host."""

    host: str = flag("", "a host in config/hosts.toml (default: local, this machine)")


@dataclass(frozen=True)
class DryRun:
    """Whether to change anything."""

    dry_run: bool = flag(False, "show the changes and make none; exit code 0: no changes, 2: there would be changes")

    def code(self, *, changes: bool) -> int:
        """The exit code of a task that made these `changes`, or on a dry run would make them."""
        return 2 if self.dry_run and changes else 0


@dataclass(frozen=True)
class Confirmation(DryRun):
    """Changes that ask for confirmation."""

    yes: bool = flag(
        False,
        "do not ask for confirmation; remove, nuke, adopt, wheels --prune and cache --clear require it without a "
        "terminal",
    )

    def require(self, question: str) -> None:
        """Ask before files of this machine are deleted; raises RefusedError unless it is confirmed."""
        if self.yes or (answer := console.confirm(question)):
            return
        hint = "run the same command again and answer y, or add --yes"
        if answer is None:
            hint = "add --yes, since there is no terminal to ask at; --dry-run shows what would be deleted"
        raise RefusedError("refused", "nothing was deleted", cause="it was not confirmed", hint=hint)


@dataclass(frozen=True)
class CutOver(DryRun):
    """Options for stopping the service."""

    drain: str = flag(
        "60", "seconds to wait for ComfyUI's jobs; if any still run after that, nothing is changed (default: 60)"
    )
    force: bool = flag(False, "stop ComfyUI at once and interrupt its jobs")


@dataclass(frozen=True)
class Trial(CutOver):
    """Whether to try a release next to the active one before the cut-over."""

    trial: bool = flag(False, "stop after the trial; the active release is not touched")
    no_trial: bool = flag(False, "cut over without a trial; an unhealthy release then interrupts the service")


@dataclass(frozen=True)
class Change(CutOver, Confirmation):
    """A cut-over that asks for confirmation."""


@dataclass(frozen=True)
class TrialChange(Trial, Confirmation):
    """A cut-over after a trial, which asks for confirmation."""
