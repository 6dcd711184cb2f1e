"""Installations of ComfyUI that Hearth did not make."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system."""

    point: str = "/"
    what: str = ""
    type: str = ""


@dataclass(frozen=True)
class Folder:
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


@dataclass(frozen=True)
class FoundNode:
    """A custom node."""

    name: str
    disabled: bool
    file: bool  # a single file, no folder
    url: str
    commit: str
    edited: tuple[str, ...] | None  # files that differ from the commit; None: not known


@dataclass(frozen=True)
class Unit:
    """A systemd unit that starts it."""

    name: str
    path: str
    aside: bool  # already set aside by `inv adopt`
    user: str
    variables: tuple[str, ...]  # names set by Environment=
    active: bool
    enabled: bool


@dataclass(frozen=True)
class OldProcess:
    """A process that runs it."""

    pid: int
    user: str
    unit: str  # empty: no system unit started it


@dataclass(frozen=True)
class Installation:
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


@dataclass(frozen=True)
class Survey:
    """All installations found."""

    looked: tuple[str, ...]  # paths that were searched
    found: tuple[Installation, ...]
