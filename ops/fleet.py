"""Asking hosts, all at once: whoever does not answer in time holds nobody up."""

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
    """What one host said, or why it said nothing."""

    host: str
    value: T | None
    error: HearthError | None = None


def ask_each(
    names: Sequence[str], ask: Callable[[Agent, Target], T], *, ask_sudo: bool = False, seconds: float = 10
) -> list[Answer[T]]:
    """Ask every host at once, and give their answers in the order of `names`, after `seconds` at the latest.

    With `ask_sudo` one after the other, each as long as it takes: its password is asked for at the terminal.
    """
    answers: dict[str, Answer[T]] = {}

    def one(name: str) -> None:
        try:
            target = find_target(name)
            with connection.connect(target, ask_sudo, seconds=max(1, int(seconds))) as agent:
                answers[name] = Answer(name, ask(agent, target))
        except HearthError as error:
            answers[name] = Answer(name, None, error)

    if ask_sudo or len(names) == 1:
        for name in names:
            one(name)
    else:  # daemons: what still waits for a host must not keep the program from ending
        threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    return [answers.get(name) or Answer(name, None, _late(name, seconds)) for name in names]


def heard(answers: Sequence[Answer[T]]) -> dict[str, T]:
    """What hosts said, by name; says why some said nothing. Raises the error of a host that is the only one."""
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
    """Print what hosts said, a host's `lines` or as JSON its `plain`; errors as `heard` does."""
    seen = heard(answers)
    if as_json:
        console.data_json([{"host": name, **plain(name, value)} for name, value in seen.items()])
        return
    for name, value in seen.items():
        for line in lines(name, value):
            console.data(console.line(line))


def _late(name: str, seconds: float) -> ConnectError:
    return ConnectError(
        f"{name} does not answer within {seconds:.0f} s",
        cause="it is busy or hangs, or the way there is slow",
        hint=f"inv facts --host {name} waits longer",
    )
