"""Asks several hosts at the same time; a host that times out does not delay the others."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from core import console
from core.errors import ConnectError, HearthError
from deploy import connection
from deploy.look import find_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.connection import Agent
    from deploy.host import Target

T = TypeVar("T")


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The answer of one host, or its error."""

    host: str
    value: T | None
    error: HearthError | None = None


def ask_each(
    names: Sequence[str],
    ask: Callable[[Agent, Target], T],
    *,
    ask_sudo: bool = False,
    seconds: float = 10,
    limited: bool = False,
) -> list[Answer[T]]:
    """Ask all hosts in parallel and return their answers in the order of `names`, after at most `seconds`.

    A single host has no time-out after it is reached, unless `limited`.
    With `ask_sudo`, asks them one by one without a time-out, because the terminal prompts for a password.
    """
    answers: dict[str, Answer[T]] = {}

    def one(name: str) -> None:
        try:
            target = find_target(name)
            with connection.connect(target, ask_sudo, seconds=max(1, int(seconds))) as agent:
                answers[name] = Answer(name, ask(agent, target))
        except HearthError as error:
            answers[name] = Answer(name, None, error)

    if ask_sudo or (len(names) == 1 and not limited):
        for name in names:
            one(name)
    else:  # daemon threads: one that still waits for a host must not delay the exit
        threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    return [answers.get(name) or Answer(name, None, _late(name, seconds)) for name in names]


def collect(answers: Sequence[Answer[T]]) -> dict[str, T]:
    """The answers by host; reports the errors of the others. Raises the error if there is only one host."""
    for each in answers:
        if each.error is not None:
            if len(answers) == 1:
                raise each.error
            console.say(f"{each.host}: {each.error}")
    return {each.host: each.value for each in answers if each.value is not None}


def show(
    answers: Sequence[Answer[T]],
    lines: Callable[[str, T], list[str]],
    plain: Callable[[str, T], dict[str, Any]],
    *,
    as_json: bool,
) -> None:
    """Print the answers of hosts: the `lines` of each, or its `plain` as JSON; errors as `collect` does."""
    seen = collect(answers)
    value = [{"host": name, **plain(name, each)} for name, each in seen.items()]
    console.show(value, (line for name, each in seen.items() for line in lines(name, each)), as_json=as_json)


def code(answers: Sequence[Answer[T]]) -> int:
    """The exit code: 1 if a host did not answer."""
    return int(any(each.value is None for each in answers))


def _late(name: str, seconds: float) -> ConnectError:
    return ConnectError(
        "unreachable",
        f"{name} did not answer within {seconds:.0f} s",
        cause="it is busy or hangs, or the connection is slow",
        hint=f"try inv facts --host {name}, which waits longer",
    )
