"""ComfyUI's log, from systemd's journal or from the supervisor."""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime
from typing import TYPE_CHECKING

from agent.schema.live import LogLine
from agent.schema.requests import LogQuery
from core import console
from core.errors import HearthError, UsageError
from core.flags import number
from core.typed import convert
from deploy import connection
from deploy.look import find_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LINES = 100
"""The number of lines without --lines and --since."""


def query(lines: str, since: str, grep: str, *, follow: bool) -> LogQuery:
    """The request to the agent. Raises UsageError."""
    try:
        re.compile(grep)
    except re.error as error:
        hint = "use Python's syntax; put a backslash before ( [ . * + ? to match them literally"
        raise UsageError("usage", f"--grep {grep} is not a regular expression", cause=str(error), hint=hint) from None
    count = int(number("lines", lines, whole=True)) if lines else None if since else LINES
    return LogQuery(count, since, grep, follow)


def show(names: Sequence[str], asked: LogQuery, *, ask_sudo: bool, as_json: bool) -> int:
    """Print the logs of hosts, one after the other, or interleaved if followed; returns 130 at Ctrl-C.

    With several hosts, each line starts with its host's name, and 1 is returned if a log cannot be read. With one host,
    raises HostError, or UsageError for an unknown time.
    """
    alone = len(names) == 1
    failed: list[str] = []

    def one(name: str) -> None:
        try:
            with connection.connect(find_target(name), ask_sudo) as agent:
                lines = (convert(each, LogLine) for each in agent.stream("logs", **vars(asked)))
                _print(lines, name, alone=alone, as_json=as_json)
        except HearthError as error:
            if alone:
                raise
            failed.append(name)
            console.say(f"{name}: {error}")

    try:
        if alone or not asked.follow:
            for name in names:
                one(name)
        else:  # daemons: Ctrl-C does not wait for them
            threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    except KeyboardInterrupt:
        return 130
    return int(bool(failed))


def _print(answers: Iterable[LogLine], host: str, *, alone: bool, as_json: bool) -> None:
    """Print lines as they arrive, with the host's name unless it is `alone`; JSON always has it."""
    for each in answers:
        if each.note:
            console.say(console.line(each.note))
        elif each.text is None:
            if console.unread():
                return
        elif as_json:
            line = {"host": host, "at": each.at, "text": console.printable(each.text)}
            console.data(json.dumps(line))
        else:
            when = f"{datetime.fromtimestamp(each.at):%Y-%m-%d %H:%M:%S}  " if each.at else ""
            text = each.text.replace("\n", "\\n")
            console.data(f"{host}  " * (not alone) + when + text, colours=True)
