"""Flags of the tasks that change hosts: which hosts, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.flags import Confirmation, CutOver, DryRun, Sudo, Trial, Where, flag, number

if TYPE_CHECKING:
    from deploy.plan import Options


@dataclass(frozen=True)
class Fleet(Where):
    """One host, or a group."""

    group: str = flag(
        "",
        "all hosts of a group; a change rolls out to the first host, then to the others once that one is healthy",
    )

    def names(self) -> list[str]:
        """The names of the chosen hosts; raises UsageError."""
        from deploy.host import select

        return select(self.host, self.group)


def options(sudo: Sudo, how: DryRun, *, force: bool = False) -> Options:
    """The options of a change, from its flags; raises UsageError. `force` belongs to tasks with their own flag."""
    from core.errors import UsageError
    from deploy.plan import Options

    cut = how if isinstance(how, CutOver) else CutOver()
    asks = isinstance(how, Confirmation) and not how.yes
    trial = "yes"
    if isinstance(how, Trial):
        if how.trial and how.no_trial:
            raise UsageError("usage", "--trial and --no-trial exclude each other", hint="use one of them")
        trial = "only" if how.trial else "no" if how.no_trial else "yes"
    return Options(number("drain", cut.drain, whole=True), cut.force or force, how.dry_run, sudo.ask_sudo, asks, trial)
