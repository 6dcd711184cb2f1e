"""Sudo passwords and other secrets, from the system's keyring or typed. Kept only in memory."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from core import console
from core.errors import ConnectError

if TYPE_CHECKING:
    from deploy.host import Host


def sudo_password(name: str, host: Host) -> str:
    """The sudo password of a host, asked for once; empty if root is not needed. Raises ConnectError."""
    if not host.address or host.scope != "system":
        return ""
    with _asking:  # with several hosts, one prompt at a time
        if name not in known:
            known[name] = _ask_password(name)
        return known[name]


_asking = threading.Lock()
known: dict[str, str] = {}
"""The sudo passwords of this process, by host."""


def from_keyring(service: str, name: str) -> str:
    """A secret from the system's keyring; empty if it has none, or if there is no keyring."""
    import keyring

    with suppress(keyring.errors.KeyringError):
        return keyring.get_password(service, name) or ""
    return ""


def _ask_password(name: str) -> str:
    """From the system's keyring, else typed. Kept only in memory."""
    if found := from_keyring("hearth-sudo", name):
        return found
    if sys.stdin.isatty():
        with suppress(EOFError):
            return console.hidden(f"sudo password on {name}: ")
    raise ConnectError(
        "sudo", f"no terminal to ask for the sudo password of {name} at", hint=f"run: keyring set hearth-sudo {name}"
    )
