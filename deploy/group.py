"""Changes of several hosts: one confirmation, the first host as a canary, then the others in parallel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from core import console
from core.console import counted
from core.errors import ConnectError, GroupError, HearthError
from deploy import host as hosts
from deploy import passwords
from deploy.refusals import refused, unconfirmed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.change import Outcome
    from deploy.plan import Options

DESTRUCTIVE = ("remove", "remove gateway", "nuke", "adopt", "undo adopt")
"""Actions that remove a service or files. They always need confirmation, also locally and without a terminal."""


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
        self._remedy = "run the same command again and answer y, or add --yes"

    def __call__(self) -> None:
        """Raises RefusedError unless the change is confirmed."""
        if self._given is None:
            answer = console.confirm(self._question)
            self._given = not self._destroys if answer is None else answer
            if answer is None:
                self._remedy = "add --yes, since there is no terminal to ask at; --dry-run shows the changes"
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
    """Run `one` for every host: the first one alone (the canary), then the others in parallel.

    All prompts come before the others begin: first each host's sudo password, then `agree`, which `one` calls after it
    has shown the canary's plan. The error of a single host is raised unchanged. With several hosts, all results are
    reported before GroupError is raised; without `keep_going`, a failure of the canary stops the command.
    """
    if len(names) == 1:
        return [one(names[0])]
    known = hosts.hosts().hosts
    for name in names if ask_sudo else ():
        try:
            passwords.sudo_password(name, known[name])
        except ConnectError as error:  # reported with its host
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
    """The error for a group with failures."""
    error = GroupError(
        "group",
        f"{len(failed)} of {counted(len(names), 'host')} failed",
        cause="\n".join(
            [f"{each.host}: {each.state or f'release {each.release} is in service'}" for each in results]
            + [f"{name}: {error.what}" for name, error in failed.items()]
            + [f"{name}: skipped, the canary failed" for name in skipped]
        ),
        hint="read each host's error above; the same command continues with the remaining hosts",
    )
    error.refusals = tuple(refusal for each in failed.values() for refusal in each.refusals)
    error.previews = {each.host: each.preview for each in results if each.preview}
    error.previews |= {name: made for each in failed.values() for name, made in each.previews.items()}
    return error
