"""Interprets ssh's messages when it cannot reach a host: the error, its cause and the next command."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from core.errors import ConnectError, HearthError

if TYPE_CHECKING:
    from collections.abc import Mapping


def unreachable(stderr: str, name: str, settings: Mapping[str, str], retry: str) -> HearthError:
    """The error for an ssh that did not log in to the host `name`.

    `stderr` is ssh's stderr, `settings` are those of `ssh -G`, `retry` is the command that connects in a terminal.
    """
    user, host, port = (settings[key] for key in ("user", "hostname", "port"))
    cause = "\n".join([line for line in stderr.splitlines() if line.strip("@ ")][-6:])
    # Our ssh reports only a closed connection: the rejected key is that of a jump host.
    jump = re.search("exchange_identification|UNKNOWN port", stderr)
    of = f"a jump host of {name}" if jump else f"{name} ({host})"
    if found := _host_key(stderr, cause, of, settings, retry):
        return found
    if "Permission denied (" in stderr or "Too many authentication failures" in stderr:
        return ConnectError(
            "unreachable",
            f"SSH authentication failed for {user} on {name}",
            cause=cause,
            hint=f"try: {retry}; a key with a passphrase must be in your SSH agent (ssh-add)",
        )
    return ConnectError(
        "unreachable", f"{name} cannot be reached ({user}@{host}:{port})", cause=cause, hint=f"try: {retry}"
    )


def _host_key(stderr: str, cause: str, of: str, settings: Mapping[str, str], retry: str) -> ConnectError | None:
    """The error for a host key that ssh rejects; None if that was not the reason."""
    port, host = (shlex.quote(settings[key]) for key in ("port", "hostname"))
    scan = f"`ssh-keyscan -p {port} {host} | ssh-keygen -lf -`"
    if "HOST IDENTIFICATION HAS CHANGED" in stderr:
        offered = re.search(r"key sent .* is\s+(SHA256:\S+\w)", stderr)
        known = re.search("Offending .*", stderr)
        listed = re.search(r"Host key for (\S+) has changed", stderr)
        entry = (listed[1] if listed else settings["hostname"]).replace("'", "'\\''")
        return ConnectError(
            "host-key",
            f"the host key of {of} has CHANGED",
            cause=f"offered: {offered[1] if offered else '?'}; known: {known[0] if known else '?'}. "
            "The host was reinstalled, or this is a man-in-the-middle attack",
            hint=f"compare it with {scan}; only if it is right: ssh-keygen -R '{entry}', "
            f"then connect once with: {retry}",
        )
    if "REVOKED" in stderr or "revoked" in stderr:
        return ConnectError(
            "host-key", f"the host key of {of} is revoked", cause=cause, hint="ask the host's administrator"
        )
    if "Certificate invalid" in stderr:
        return ConnectError("host-key", f"the host certificate of {of} is not valid", cause=cause, hint=f"try: {retry}")
    if "Host key verification failed" in stderr:
        return ConnectError(
            "host-key",
            f"the host key of {of} is not known",
            cause="neither your known_hosts files nor the system's list it or an authority that certified it",
            hint=f"compare the output of {scan} with the host's own key; then connect once with: {retry}",
        )
    return None
