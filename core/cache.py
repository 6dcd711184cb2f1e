"""The directories of the cache: their purpose and size, and their removal."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import console, files, workspace
from core.errors import UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

KNOWN = {
    "agents": ("agents", "agents, packed for hosts"),
    "bundles": ("bundles", "bundles that are being used"),
    "downloads": ("wheels", "packages for hosts without a package index; downloaded again"),
    "emulation": ("emulation", "Pythons of other platforms, to import wheels; downloaded again"),
    "exports": ("exports", "the locked lists of uv.lock"),
    "installed": ("installed", "torch, CUDA compilers and tools; downloaded again, several gigabytes"),
    "interfaces": ("interfaces", "what the code of ComfyUI and custom nodes defines and uses"),
    "layers": ("layers", "digests of images' layers, and bases of containers; without them, both are written again"),
    "objects": ("build", "compiled objects and build logs; without them, the next build compiles everything"),
    "pycache": ("pycache", "compiled Python files of torch"),
    "scratch": ("scratch", "temporary files of inspections"),
    "sources": ("sources", "sources of kernels, ComfyUI and custom nodes; fetched again"),
    "strings": ("strings", "node types of custom nodes"),
    "toolchains": ("toolchains", "links to the parts of each toolchain"),
}
"""Each directory by its name in commands: its folder, and what Hearth keeps there and makes again when needed."""


@dataclass(frozen=True)
class Directory:
    """A directory of the cache; `size` in bytes. It is `kept` if Hearth did not make it, or other caches share it."""

    name: str
    path: str
    size: int
    content: str
    kept: bool


def directories() -> list[Directory]:
    """Every directory of the cache that is not empty."""
    here, found = workspace.current().cache, list[Directory]()
    names = {folder: name for name, (folder, _) in KNOWN.items()}
    for path in sorted(here.iterdir()) if here.is_dir() else ():
        if not path.name.startswith(".") and path.is_dir() and any(path.iterdir()):
            name = names.get(path.name, path.name)
            content = KNOWN[name][1] if name in KNOWN else "not part of the cache; kept"
            content = f"a link to {path.readlink()}; kept" if path.is_symlink() else content
            kept = path.is_symlink() or name not in KNOWN
            found.append(Directory(name, str(path), _size(path), content, kept))
    return found


def choose(found: Sequence[Directory], text: str) -> list[Directory]:
    """The directories with these comma-separated names, or `all` that can be cleared; raises UsageError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in {*KNOWN, "all"}:
            hint = suggest(name, [*KNOWN, "all"])
            raise UsageError("unknown-name", f"the cache has no directory {name!r}", hint=hint)
    return [each for each in found if not each.kept and ("all" in names or each.name in names)]


def clear(chosen: Sequence[Directory]) -> None:
    """Delete the content of directories, except for drafts of running processes. Waits for builds and deploys."""
    with workspace.current().clearing():
        for path in (path for each in chosen for path in Path(each.path).iterdir()):
            if path.name.startswith("."):
                files.sweep(path)
            else:
                with files.draft(path) as part:  # a folder is complete or absent, also when this process is killed
                    path.rename(part)


def total(found: Sequence[Directory]) -> str:
    """The size of all these directories, formatted."""
    return console.size(sum(each.size for each in found))


def _size(place: Path) -> int:
    """The bytes in a tree; each file counts once, whatever the number of its names."""
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):  # deleted just now
                found = Path(folder, name).lstat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def rows(found: Sequence[Directory]) -> list[str]:
    """A table of the cache."""
    cells = [(each.name, console.size(each.size), each.content) for each in found]
    return [*console.table(("directory", "size", "content"), cells), f"{total(found)} in {workspace.current().cache}"]
