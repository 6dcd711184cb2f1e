"""Secrets: read on this machine, stored on hosts, and passed to ComfyUI only."""

from __future__ import annotations

import re
import shlex
import sys
from getpass import getuser
from socket import gethostname
from typing import TYPE_CHECKING

from agent.schema.live import Stored
from agent.schema.requests import SecretChange
from core import console, shell
from core.errors import ConfigError, HearthError, UsageError
from core.typed import convert
from deploy import connection, passwords
from deploy.look import find_target, look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LARGEST = 64_000
"""The maximum length of a secret, in characters; far below what a variable may hold."""


def run(
    action: str, name: str, names: Sequence[str], *, command: str, keyring: bool, ask_sudo: bool
) -> dict[str, dict[str, str]]:
    """Set or remove a secret on hosts, and return how each stores it; raises UsageError, ConfigError."""
    if action not in ("set", "remove"):
        raise UsageError(
            "usage",
            f"unknown action {action!r}",
            hint="use inv secret set or inv secret remove; to list them: inv secrets",
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError("usage", f"{name!r} is not a variable name", hint="use a name such as HF_TOKEN")
    value = read(name, command, keyring=keyring) if action == "set" else None
    done: dict[str, dict[str, str]] = {}
    for each in names:
        target = find_target(each)
        with connection.connect(target, ask_sudo) as agent:
            who = f"{getuser()}@{gethostname()}"
            kept = convert(agent.call("secret", **vars(SecretChange(name, value, who))), Stored).kept
        done[each] = {name: kept or "removed"}
        if kept == "plain" and target.host.scope == "system":
            console.say(f"{each}: its systemd cannot encrypt secrets; it is stored in a file that only root can read")
        if action == "set" and name not in target.host.secrets:
            console.say(f'{each}: to pass it to ComfyUI, add secrets = ["{name}"] to hosts.toml, then inv deploy')
        elif action == "set":
            console.say(f"{each}: ComfyUI reads it at its next start: inv restart --host {each}")
    return done


def listed(names: Sequence[str], *, ask_sudo: bool) -> dict[str, dict[str, str]]:
    """The names of the secrets on each host, and how each is stored."""
    found: dict[str, dict[str, str]] = {}
    for each in names:
        target = find_target(each)
        with connection.connect(target, ask_sudo) as agent:
            found[each] = look(agent, target).secrets
    return found


def rows(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table of secrets by host, and how each is stored."""
    return console.table(("host", "secret", ""), [(each, *pair) for each in found for pair in found[each].items()])


def read(name: str, command: str, *, keyring: bool) -> str:
    """Read a secret from a command's output, the keyring, the terminal or stdin; raises ConfigError."""
    if command:
        try:
            done = shell.run(shlex.split(command), timeout=300)
        except (HearthError, ValueError) as error:
            raise ConfigError("secret", f"--command failed: {command}", cause=str(error)) from error
        value = done.stdout
    elif keyring:
        value = passwords.from_keyring("hearth-secret", name)
        if not value:
            raise ConfigError("secret", f"the keyring has no {name}", hint=f"keyring set hearth-secret {name}")
    elif sys.stdin.isatty():
        value = console.hidden(f"{name} (not shown): ")
    else:
        value = sys.stdin.read(LARGEST + 1)
    value = value.rstrip("\r\n")
    if not value or "\0" in value or len(value) > LARGEST:
        raise ConfigError(
            "secret", f"{name} is empty, too long, or binary", hint="nothing was sent; check the source of the secret"
        )
    return value
