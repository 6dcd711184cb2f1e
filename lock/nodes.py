"""Custom nodes as data: the known nodes, their sources, and the selection for a host.

`recipes/comfyui/nodes.toml` lists every node with its upstream, commit and tree. No code of a node runs here.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidName, canonicalize_name

from core import console, source
from core.config import load
from core.errors import ConfigError, UsageError, suggest
from lock import application

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One custom node package.

    `tree` is the hash of its files at `commit`. If a `required` node fails to import, the release is unhealthy.
    `without` are files and folders that are not fetched; `submodules` are the ones that are. `extra` are undeclared
    dependencies. `writable` are files and folders (ending in `/`) that it writes; they live in `data/nodes/`. `system`
    are Debian packages that the host must have; `requires` are other nodes that it depends on. `install` is the reason
    to run its `install.py` when it is installed on a host (default: never); `install_network` is the reason to allow
    that script network access.
    """

    url: str
    commit: str
    tree: str
    why: str
    required: bool = False
    without: tuple[str, ...] = ()
    submodules: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    install: str = ""
    install_network: str = ""

    def pinned(self, name: str) -> source.Pinned:
        """Its source, in the form that `core.source` fetches."""
        where = (source.Source(git=self.url, commit=self.commit),)
        return source.Pinned(
            name=name,
            version=self.commit[:9],
            source=where,
            tree=self.tree,
            without=self.without,
            submodules=self.submodules,
        )


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A replacement for a package that ComfyUI or the nodes require; empty: the package is left out."""

    why: str
    requirement: str = ""


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """`nodes.toml`: all known nodes, sets of nodes, package overrides, and left-out nodes with the reason."""

    nodes: dict[str, Node] = {}
    sets: dict[str, tuple[str, ...]] = {}
    override: dict[str, Override] = {}
    left_out: dict[str, str] = {}


def catalogue() -> Catalogue:
    """Return the known nodes, checked. Raises ConfigError or UsageError with the location."""
    path = catalogue_file()
    if not path.exists():
        return Catalogue()
    found = load(path, Catalogue)
    urls: dict[str, str] = {}
    for name, node in found.nodes.items():
        check(str(path), name, node)
        url = node.url.lower().removesuffix("/").removesuffix(".git")
        if other := urls.get(url) or next((each for each in urls.values() if each.lower() == name.lower()), ""):
            raise ConfigError("config", f"{path}: {name} and {other} are the same node", hint="keep one of them")
        urls[url] = name
    for name, members in found.sets.items():
        for each in members:
            if each not in found.nodes:
                raise UsageError("unknown-name", f"{path}: set {name} names {each!r}", hint=suggest(each, found.nodes))
    for name in found.nodes:
        closure(found, [name])
    return msgspec.structs.replace(found, override=_overrides(path, found.override))


def _overrides(path: Path, given: Mapping[str, Override]) -> dict[str, Override]:
    """The overrides by the normal form of their package's name; raises ConfigError."""
    found: dict[str, Override] = {}
    for name, each in given.items():
        try:
            package = canonicalize_name(name, validate=True)
            Requirement(each.requirement or name)
        except (InvalidName, InvalidRequirement) as error:
            cause = str(error).partition("\n")[0]
            raise ConfigError("config", f"{path}: override {name!r} is not valid", cause=cause) from None
        if package in found:
            raise ConfigError("config", f"{path}: [override] has {package} twice", hint="keep one of them")
        found[package] = each
    return found


def catalogue_file() -> Path:
    """The file that lists nodes, next to the app.toml."""
    return application.folder() / "nodes.toml"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(path: str, name: str, node: Node) -> None:
    """Raise ConfigError if a path leaves the node's folder or a pin is invalid. `path` is the file to name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "config", f"{path}: {name!r} is not a valid node name", hint="use letters, digits, dots and dashes"
        )
    if not re.fullmatch(r"[0-9a-f]{40}", node.commit):
        raise ConfigError(
            "config",
            f"{path}: {name}: commit {node.commit!r} is not a full commit hash",
            hint="use 40 hexadecimal digits",
        )
    check_address(f"{path}: {name}", node.url)
    for each in node.system:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", each):  # deb-control(5)
            raise ConfigError(
                "config",
                f"{path}: {name}: {each!r} is not a valid name of a Debian package",
                hint='system = ["ffmpeg"]',
            )
    for each in node.writable:
        parts = Path(each).parts
        if not parts or each.startswith("/") or ".." in parts:
            raise ConfigError(
                "config",
                f"{path}: {name}: writable {each!r} is not below the node",
                hint="use a path such as config.json or cache/",
            )


def check_address(place: str, url: str) -> None:
    """Raise ConfigError unless it is the address of a git repository: https, ssh or a folder."""
    if not source.ADDRESS.fullmatch(url):
        raise ConfigError(
            "config",
            f"{place}: {url!r} is not the address of a repository",
            hint="use https://..., ssh://..., file:///... or git@...; keep passwords in git's credential helper",
        )


def choose(found: Catalogue, wanted: Iterable[str]) -> dict[str, Node]:
    """Return the selected sets' and names' nodes with the nodes that they require, by name.

    Raises UsageError, or ConfigError for a node that is left out.
    """
    names: list[str] = []
    for each in wanted:
        if each in found.sets:
            names += found.sets[each]
        elif each in found.nodes:
            names.append(each)
        elif each in found.left_out:
            raise ConfigError("config", f"node {each} is left out: {found.left_out[each]}")
        else:
            raise UsageError(
                "unknown-name", f"there is no node or set {each!r}", hint=suggest(each, [*found.sets, *found.nodes])
            )
    return {name: found.nodes[name] for name in sorted(closure(found, names))}


def closure(found: Catalogue, names: Sequence[str]) -> set[str]:
    """The nodes with all required nodes; raises ConfigError for a cycle."""
    closed: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            raise ConfigError("config", f"nodes require each other: {' -> '.join((*way, name))}")
        if name not in found.nodes:
            raise UsageError("unknown-name", f"node {way[-1]} requires {name!r}", hint=suggest(name, found.nodes))
        closed.add(name)
        for each in found.nodes[name].requires:
            visit(each, (*way, name))

    for name in names:
        visit(name, ())
    return closed


PARALLEL = 16
"""Parallel fetches; a fetch mostly waits for its server."""


def fetch(chosen: Mapping[str, Node], parallel: int = PARALLEL) -> dict[str, Path]:
    """Fetch the unmodified trees of nodes in parallel, if the cache lacks them.

    Raises the errors of fetching; completed trees stay in the cache.
    """
    missing = {name: node.pinned(name) for name, node in chosen.items() if not source.cached(node.pinned(name))}
    if missing:
        with (
            console.Progress("fetching", len(missing), len(missing)) as progress,
            ThreadPoolExecutor(max_workers=parallel) as pool,
        ):
            for name in pool.map(lambda name: (source.fetch(missing[name]), name)[1], missing):
                progress.step(name, 0, 0)
    return {name: source.fetch(node.pinned(name)) for name, node in chosen.items()}


def rows(found: Catalogue) -> Iterator[str]:
    """A table of the known nodes with their sets, followed by the rejected ones."""
    cells = []
    for name, node in found.nodes.items():
        sets = ", ".join(each for each, members in found.sets.items() if name in members)
        cells.append((name, node.commit[:9], sets or "-", "required" if node.required else "", node.why))
    yield from console.table(("node", "commit", "sets", "", "why"), cells)
    yield from (f"left out: {name}: {reason}" for name, reason in found.left_out.items())
