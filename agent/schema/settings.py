"""Settings outside the prefix, and access to the GPU's device files."""

from __future__ import annotations

from agent.schema.record import Record


class Seen(Record):
    """A place that a setting changes, see `agent.change.settings`."""

    kind: str  # "file", "value" (of the kernel), "device", "group" or "unit"
    place: str
    now: str | None  # None: there is no such file or group
    wanted: str
    writable: bool


class Applied(Record):
    """A change in force."""

    kind: str
    place: str
    old: str | None = None  # None: there was no such file or group
    new: str = ""


class State(Record):
    """Settings by name: the changes in force, and the state of the places asked for."""

    applied: dict[str, tuple[Applied, ...]]
    seen: dict[str, tuple[Seen, ...]]


class Node(Record):
    """A device file."""

    place: str
    mode: int
    owner: str
    group: str
    denied: tuple[str, ...]  # of the users asked for, those that may not read and write it


class Rule(Record):
    """A udev rule that names such devices."""

    file: str
    rule: str


class Access(Record):
    """Access to the GPU."""

    nodes: tuple[Node, ...]
    driver: dict[str, str]  # the driver's parameters for device files
    rules: tuple[Rule, ...]
    users: dict[str, tuple[str, ...] | None]  # groups of each user asked for; None: no such user
