"""Changes of several hosts: confirmed once, the first host alone as a canary, then the others at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from core import console
from core.errors import ConnectError, GroupError, HearthError
from deploy import connection
from deploy import host as hosts
from deploy.refusals import refused, unconfirmed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.change import Outcome
    from deploy.plan import Options

DESTRUCTIVE = ("remove", "nuke", "adopt", "undo adopt")
"""Actions that take away a service or files: they always need a yes, on this machine and without a terminal, too."""


class Consent:
    """The confirmation of a change, asked for once for all hosts of a command.

    Without a terminal only `DESTRUCTIVE` actions need --yes: scripts deploy, and an unhealthy release is rolled back.
    """

    def __init__(self, names: Sequence[str], action: str, options: Options) -> None:
        known = hosts.hosts().hosts
        self._question = f"{action} {', '.join(names)}?"
        self._destroys = action in DESTRUCTIVE
        asks = options.ask and not options.dry_run and (self._destroys or any(known[each].address for each in names))
        self._given = None if asks else True
        self._remedy = "run it again and answer y, or add --yes"

    def __call__(self) -> None:
        """Raises RefusedError unless the change is confirmed."""
        if self._given is None:
            answer = console.confirm(self._question)
            self._given = not self._destroys if answer is None else answer
            if answer is None:
                self._remedy = "add --yes: there is no terminal to ask at; --dry-run shows what it does"
        if not self._given:
            raise refused("nothing was changed", [unconfirmed(self._question[:-1], self._remedy)])


def on_each(
    names: Sequence[str],
    one: Callable[[str], Outcome],
    agree: Callable[[], None],
    *,
    ask_sudo: bool,
    keep_going: bool,
) -> list[Outcome]:
    """Do `one` for every host: the first alone (the canary), then the others at once.

    All questions come before the others begin: first each host's sudo password, then `agree`, which `one` calls after
    it has shown the canary's plan. The error of a single host is raised as it is. Of several hosts, all results are
    reported before GroupError is raised; without `keep_going` no other host is begun after a failure of the canary.
    """
    if len(names) == 1:
        return [one(names[0])]
    known = hosts.hosts().hosts
    for name in names if ask_sudo else ():
        try:
            connection.sudo_password(name, known[name])
        except ConnectError as error:  # its own host reports the lack of sudo
            if error.kind != "sudo":
                raise
    results: list[Outcome] = []
    failed: dict[str, HearthError] = {}

    def attempt(name: str) -> None:
        with console.speaking(name):
            try:
                results.append(one(name))
            except HearthError as error:
                failed[name] = error
                console.say(f"error[{error.kind}]: {error}")

    attempt(names[0])
    rest = list(names[1:]) if keep_going or not failed else []
    if rest:
        agree()
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(attempt, rest))
    if failed:
        raise _failures(names, results, failed, [name for name in names[1:] if name not in rest])
    return results


def _failures(
    names: Sequence[str], results: Sequence[Outcome], failed: dict[str, HearthError], skipped: Sequence[str]
) -> GroupError:
    """The error that sums up a group."""
    error = GroupError(
        "group",
        f"{len(failed)} of {len(names)} hosts failed",
        cause="\n         ".join(
            [f"{each.host}: {each.state or f'release {each.release} is in service'}" for each in results]
            + [f"{name}: {error.what}" for name, error in failed.items()]
            + [f"{name}: skipped, the canary failed" for name in skipped]
        ),
        hint="each host's own error is above; the same command continues with the hosts that are left",
    )
    error.refusals = tuple(refusal for each in failed.values() for refusal in each.refusals)
    return error
