"""Secrets of the service: encrypted for this machine if systemd can, else files that only their owner can read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress

from agent.files import AgentError, write
from agent.journal import note_change
from agent.layout import Layout
from agent.schema.live import Stored
from agent.schema.requests import SecretChange

ENCRYPTED = ".cred"
"""File suffix of encrypted secrets."""


def secrets(layout: Layout) -> dict[str, str]:
    """Return the names of the stored secrets and their storage: "encrypted" or "plain"."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for path in sorted(layout.secrets.iterdir()):
            if not path.name.startswith("."):
                found[path.name.removesuffix(ENCRYPTED)] = "encrypted" if path.suffix == ENCRYPTED else "plain"
    return found


def keep(layout: Layout, asked: SecretChange) -> Stored:
    """Store a secret, or delete it; return its storage. Raises AgentError."""
    name, value = asked.name, asked.value
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise AgentError("usage", f"{name!r} is not a variable name", "", "use a name such as HF_TOKEN")
    layout.secrets.mkdir(parents=True, exist_ok=True)
    layout.secrets.chmod(0o700)
    plain, encrypted = layout.secrets / name, layout.secrets / f"{name}{ENCRYPTED}"
    how = ""
    if value is not None:
        how = "plain"
        if sealed := _encrypted(layout, name, value.encode()):
            write(encrypted, sealed, 0o600)
            how = "encrypted"
        else:
            write(plain, value.encode(), 0o600)
    for path, kept in ((plain, "plain"), (encrypted, "encrypted")):
        if how != kept:
            path.unlink(missing_ok=True)
    action = f"{'remove' if value is None else 'set'} secret {name}"
    note_change(layout, action, asked.who)
    return Stored(how)


def _encrypted(layout: Layout, name: str, value: bytes) -> bytes:
    """Return the secret encrypted by systemd for this machine (TPM or host key); empty if not supported."""
    if layout.scope != "system" or not shutil.which("systemd-creds"):
        return b""
    words = ["systemd-creds", "encrypt", f"--name={name}", "-", "-"]
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, input=value, capture_output=True, check=True, timeout=30, env=environment).stdout
    return b""
