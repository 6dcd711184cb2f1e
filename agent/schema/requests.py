"""Requests with more than a few values: the client makes them, and the agent decodes them for the verb's function."""

from __future__ import annotations

from dataclasses import field

from agent.schema.record import Record


class LogQuery(Record):
    """Which lines of ComfyUI's log to show."""

    lines: int | None = None  # the number of last lines; None: all
    since: str = ""  # a time in journalctl's syntax
    grep: str = ""  # a regular expression, matched without colours
    follow: bool = False  # also new lines, without end


class SecretChange(Record):
    """Store a secret, or delete it."""

    name: str
    value: str | None  # None: delete it
    who: str


class DropIns(Record):
    """A setting: files by path, and members that groups get; `agent/change/settings.py` says what the files change."""

    files: dict[str, str]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


class SettingsQuery(Record):
    """Settings whose places are looked at, by name."""

    settings: dict[str, DropIns]


class GatewaySecret(Record):
    """A change of what a gateway keeps secret.

    "password" and "token": set a person's password, or add a token and return it. "remove": forget a person.
    "certificate": make the authority and a certificate for `names`, if needed.
    """

    action: str
    who: str
    person: str = ""
    value: str = ""  # the password
    names: tuple[str, ...] = ()
