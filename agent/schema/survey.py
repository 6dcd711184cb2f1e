"""Installations of ComfyUI that Hearth did not make."""

from __future__ import annotations

from dataclasses import field

from agent.schema.record import Record


class FileSystem(Record):
    """A mounted file system."""

    point: str = "/"
    what: str = ""
    type: str = ""


class Folder(Record):
    """One of ComfyUI's folders. Files are counted only if a rename can move it into the data."""

    place: str
    real: str  # the path with symbolic links resolved
    kind: str  # "folder", "link" or "missing"
    mount: FileSystem = field(default_factory=FileSystem)  # its file system
    rename: bool = False  # a single rename can move it into Hearth's data
    bytes: int = 0
    files: int = 0
    owner: str = ""
    people: tuple[str, ...] = ()  # its owner and the members of its group
    links: dict[str, str] = field(default_factory=dict)  # symbolic links in it and their targets, 100 at most
    mounts: tuple[FileSystem, ...] = ()  # mounts inside it or at its links' targets
    foreign: str = ""  # why it must not be adopted; empty: it may be


class FoundNode(Record):
    """A custom node."""

    name: str
    disabled: bool
    file: bool  # a single file, no folder
    url: str
    commit: str
    edited: tuple[str, ...] | None  # files that differ from the commit; None: not known


class Unit(Record):
    """A systemd unit that starts it."""

    name: str
    path: str
    aside: bool  # already set aside by `inv adopt`
    user: str
    variables: tuple[str, ...]  # names set by Environment=
    active: bool
    enabled: bool


class OldProcess(Record):
    """A process that runs it."""

    pid: int
    user: str
    unit: str  # empty: no system unit started it


class Installation(Record):
    """An installation of ComfyUI."""

    path: str
    version: str
    url: str
    commit: str
    edited: tuple[str, ...] | None  # files that differ from the commit; None: not known
    python: str  # minor version of its environment
    torch: str
    environment: str  # path
    folders: dict[str, Folder]  # models, input, output and user
    paths: str  # text of its extra_model_paths.yaml files
    nodes: tuple[FoundNode, ...]
    argv: tuple[str, ...]  # the flags that it was started with
    units: tuple[Unit, ...]
    processes: tuple[OldProcess, ...]
    holds_port: bool  # one of its processes listens on Hearth's port
    owners: tuple[int, ...] = ()  # ids of the users that own or run it


class Survey(Record):
    """All installations found."""

    looked: tuple[str, ...]  # paths that were searched
    found: tuple[Installation, ...]
