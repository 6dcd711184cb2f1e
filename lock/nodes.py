"""Custom nodes as data: which there are, where they come from, and which of them a host gets.

`recipes/comfyui/nodes.toml` names every node with its upstream, commit and tree. Nothing of a node runs here.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import console, foreign, source
from core.config import load
from core.errors import ConfigError, UsageError, suggest
from lock import application

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One custom node package.

    `tree` is the hash of its files at `commit`. A failed import of a `required` one makes a release unhealthy.
    `without` are files and folders of it that are not fetched, `submodules` those that are; `extra` is what it needs
    and does not ask for. `writable` are files and folders (with a `/` behind) below it that it writes; they live in
    `data/nodes/`. `system` are Debian packages that it needs on the host, `requires` other nodes that it cannot do
    without; `install` is the reason why its own `install.py` may run when it is put on a host (by default it never
    does), `install_network` the reason why that may use the network.
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
        """Its source, as `core.source` fetches it."""
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
    """What is taken instead of whatever ComfyUI and the nodes ask for; empty: the package is left out."""

    why: str
    requirement: str = ""


class Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """`nodes.toml`: all known nodes, sets of them, packages decided otherwise, and nodes left out with the reason."""

    nodes: dict[str, Node] = {}
    sets: dict[str, tuple[str, ...]] = {}
    override: dict[str, Override] = {}
    left_out: dict[str, str] = {}


def catalogue() -> Catalogue:
    """The known nodes, checked. Raises ConfigError or UsageError with the place."""
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
        _closure(found, [name])
    return found


def catalogue_file() -> Path:
    """Where nodes are listed: beside the app.toml."""
    return application.folder() / "nodes.toml"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(path: str, name: str, node: Node) -> None:
    """Refuse what could reach beyond a node's own folder, or is no pin; raises ConfigError. `path` says where it is."""
    if not _NAME.fullmatch(name):
        raise ConfigError("config", f"{path}: {name!r} cannot be a node's name", hint="letters, digits, dots, dashes")
    if not re.fullmatch(r"[0-9a-f]{40}", node.commit):
        raise ConfigError(
            "config", f"{path}: {name}: commit {node.commit!r} is not a whole commit", hint="40 hexadecimal digits"
        )
    check_address(f"{path}: {name}", node.url)
    for each in node.system:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", each):  # deb-control(5)
            raise ConfigError(
                "config", f"{path}: {name}: {each!r} cannot be a Debian package", hint='system = ["ffmpeg"]'
            )
    for each in node.writable:
        parts = Path(each).parts
        if not parts or each.startswith("/") or ".." in parts:
            raise ConfigError(
                "config", f"{path}: {name}: writable {each!r} is not below the node", hint="config.json, or cache/"
            )


def check_address(place: str, url: str) -> None:
    """Refuse what is no address of a repository that git asks by https, ssh or as a folder; raises ConfigError."""
    if not source.ADDRESS.fullmatch(url):
        raise ConfigError(
            "config",
            f"{place}: {url!r} is no address of a repository",
            hint="https://..., ssh://..., file:///... or git@...; passwords belong to git's credential helper",
        )


def choose(found: Catalogue, wanted: Iterable[str]) -> dict[str, Node]:
    """The nodes meant by names of sets and nodes, with those they require, by name.

    Raises UsageError, or ConfigError for one that is left out.
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
    return {name: found.nodes[name] for name in sorted(_closure(found, names))}


def _closure(found: Catalogue, names: Sequence[str]) -> set[str]:
    """The nodes with all that they require; raises ConfigError when nodes require each other."""
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
"""Repositories fetched at once: each waits for its server most of the time."""


def fetch(chosen: Mapping[str, Node], parallel: int = PARALLEL) -> dict[str, Path]:
    """The pristine trees of nodes, fetched at the same time where the cache lacks them.

    Raises what fetching raises; what arrived before stays in the cache.
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


def requirements(tree: Path) -> list[str]:
    """What a node asks for: its requirements.txt, else its pyproject.toml's dependencies, a line each."""
    listed = tree / "requirements.txt"
    if listed.exists():
        joined = _CONTINUED.sub(r"\1", foreign.text(listed).removeprefix("\ufeff"))
        lines = [_COMMENT.split(line, maxsplit=1)[0].strip() for line in joined.splitlines()]
        return [line for line in lines if line]
    named = foreign.pyproject(tree).get("dependencies")
    return [str(each) for each in named] if isinstance(named, list) else []


def rows(found: Catalogue) -> Iterator[str]:
    """A table of the known nodes with their sets, and the rejected ones below."""
    cells = []
    for name, node in found.nodes.items():
        sets = ", ".join(each for each, members in found.sets.items() if name in members)
        cells.append((name, node.commit[:9], sets or "-", "required" if node.required else "", node.why))
    yield from console.table(("node", "commit", "sets", "", "why"), cells)
    yield from (f"left out: {name}: {reason}" for name, reason in found.left_out.items())


# pip's rules for lines; its own comment pattern takes minutes for a line of 256 kB of spaces.
_CONTINUED = re.compile(r"^([^#\n]*)\\\r?\n", re.MULTILINE)
_COMMENT = re.compile(r"(?:^|\s)#")
