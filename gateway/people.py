"""People of a gateway, and the authority that their browsers must trust."""

from __future__ import annotations

import sys

from core import console
from core.errors import ConfigError, UsageError
from gateway import control

SHORTEST = 10
"""The minimum length of a password: a gateway allows some ten guesses in five minutes."""


def run(action: str, what: str, person: str, name: str, *, token: bool, ask_sudo: bool) -> None:
    """Run `inv gateway users add|remove` or `inv gateway cert`; raises UsageError, ConfigError."""
    if action == "cert":
        _, found = control.find(name)
        if found.certificate:
            what = f"the gateway has a certificate of yours: {found.certificate}"
            raise UsageError("usage", what, hint="only its own authority can be printed")
        console.data(control.authority(name, ask_sudo=ask_sudo).rstrip())
        return
    if action != "users" or what not in ("add", "remove") or not person:
        hint = (
            "inv gateway deploy, rollback, remove, status, users add NAME, users remove NAME, users list, cert or audit"
        )
        raise UsageError(
            "usage", f"inv gateway does not understand {' '.join((action, what, person)).strip()!r}", hint=hint
        )
    if what == "remove":
        found_one = control.change_person(name, "remove", person, ask_sudo=ask_sudo).known
        console.say(f"{person} {'can no longer log in' if found_one else 'had neither a password nor a token'}")
    elif token:
        console.data(control.change_person(name, "token", person, ask_sudo=ask_sudo).token)
    else:
        control.change_person(name, "password", person, ask_sudo=ask_sudo, value=_password(person))
        console.say(f"the password of {person} is set")


def _password(person: str) -> str:
    """Read a new password from the terminal, twice, or from stdin; raises ConfigError."""
    if sys.stdin.isatty():
        value = console.hidden(f"new password of {person} (not shown): ")
        if console.hidden("again: ") != value:
            raise ConfigError("secret", "the two passwords differ", hint="run the same command again")
    else:
        value = sys.stdin.readline().rstrip("\r\n")
    if not SHORTEST <= len(value) <= 200 or not value.isprintable():
        raise ConfigError("secret", f"a password needs {SHORTEST} to 200 printable characters", hint="nothing was sent")
    return value
