"""Secrets of hosts: asked for here, kept there, and given to ComfyUI alone."""

from __future__ import annotations

import re
import shlex
import sys
from getpass import getuser
from socket import gethostname
from typing import TYPE_CHECKING

from core import console, shell
from core.errors import HearthError, SecretError, UsageError
from deploy import connection
from deploy.look import find_target, look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LARGEST = 64_000
"""Characters of a secret: as much as a variable may hold many times over."""


def run(
    action: str, name: str, names: Sequence[str], *, command: str, keyring: bool, ask_sudo: bool, as_json: bool
) -> int:
    """Set or remove a secret of hosts; raises UsageError, SecretError."""
    if action not in ("set", "remove"):
        raise UsageError(f"there is no inv secret {action}", hint="set or remove; inv secrets lists them")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError(f"{name!r} is no variable's name", hint="such as HF_TOKEN")
    value = read(name, command, keyring=keyring) if action == "set" else None
    done: dict[str, dict[str, str]] = {}
    for each in names:
        target = find_target(each)
        with connection.connect(target, ask_sudo) as agent:
            who = f"{getuser()}@{gethostname()}"
            kept = agent.call("secret", name=name, value=value, who=who)["kept"]
        done[each] = {name: kept or "removed"}
        if kept == "plain" and target.host.scope == "system":
            console.say(f"{each}: systemd there cannot encrypt it: it lies in a file that root alone may read")
        if action == "set" and name not in target.host.secrets:
            console.say(f'{each}: ComfyUI gets it once hosts.toml says so: secrets = ["{name}"]; then inv deploy')
        elif action == "set":
            console.say(f"{each}: ComfyUI gets it with its next start: inv restart --host {each}")
    return show(done, as_json=as_json)


def listed(names: Sequence[str], *, ask_sudo: bool, as_json: bool) -> int:
    """Show which secrets hosts keep."""
    found: dict[str, dict[str, str]] = {}
    for each in names:
        target = find_target(each)
        with connection.connect(target, ask_sudo) as agent:
            found[each] = look(agent, target).secrets
    return show(found, as_json=as_json)


def show(found: Mapping[str, Mapping[str, str]], *, as_json: bool) -> int:
    """Print names, and how each is kept."""
    if as_json:
        console.data_json(found)
    else:
        console.table(("host", "secret", ""), [(each, *pair) for each in found for pair in found[each].items()])
    return 0


def read(name: str, command: str, *, keyring: bool) -> str:
    """The secret: a command's output, the keyring's, or what is typed or piped in. Raises SecretError."""
    if command:
        try:
            done = shell.run(shlex.split(command), timeout=300)
        except (HearthError, ValueError) as error:
            raise SecretError(f"--command gave no secret: {command}", cause=str(error)) from error
        value = done.stdout
    elif keyring:
        value = connection.from_keyring("hearth-secret", name)
        if not value:
            raise SecretError(f"the keyring has no {name}", hint=f"keyring set hearth-secret {name}")
    elif sys.stdin.isatty():
        value = console.hidden(f"{name} (it is not shown): ")
    else:
        value = sys.stdin.read(LARGEST + 1)
    value = value.rstrip("\r\n")
    if not value or "\0" in value or len(value) > LARGEST:
        raise SecretError(f"{name} is empty, too long, or binary", hint="nothing was sent")
    return value
