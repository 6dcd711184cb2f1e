"""Secrets in configuration: recognised by name or format, and refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from core.config import table
from core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

# Words (split at -, _ and capitals) and substrings that mark the name of a secret.
_SECRET = {"key", "keys", "token", "auth", "bearer", "pass", "pwd", "pat", "cookie", "sas", "dsn", "private"}
_SECRET_PARTS = ("passw", "passphrase", "secret", "credential", "apikey", "accesskey", "privatekey", "authtoken")
# Formats of secrets: tokens with a distinctive prefix, and passwords in addresses.
TOKEN = re.compile(r"\b(hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA)[A-Za-z0-9_-]{12,}")
_SECRET_VALUE = re.compile(
    rf"{TOKEN.pattern}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]*:(?!\d+(/|$))[^\s@]+@|://(?=[^/\s:@]*\d)[^/\s:@]{8,}@"
)


def names_secret(name: str) -> bool:
    """Whether the name of a key, variable or flag is a secret's; a host's `secrets` contain only names."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    return name != "secrets" and (bool(_SECRET & {*words}) or any(part in "".join(words) for part in _SECRET_PARTS))


def refuse_secrets(path: Path) -> None:
    """Refuse keys with a secret's name and values in a secret's format, at any depth; raises ConfigError."""

    def walk(value: object, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                named = place in ("hosts.", "groups.", "gateways.") or re.fullmatch(r"gateways\..*\.users\.", place)
                if not named and names_secret(key):  # else the key is the name of a machine or person
                    refuse(f"{place}{key}")
                walk(inner, f"{place}{key}.")
        elif isinstance(value, list):
            for inner in value:
                walk(inner, place)
        elif isinstance(value, str) and _SECRET_VALUE.search(value):
            refuse(place.rstrip("."))

    def refuse(place: str) -> None:
        raise ConfigError(
            "secret",
            f"{path}: {place} looks like a secret",
            cause="this file is copied, backed up and shown; secrets do not belong in it",
            hint="for sudo use --ask-sudo; for ComfyUI use inv secret set NAME and the host's `secrets`",
        )

    walk(table(path), "")
