"""Measures what packages and sources take on a host. Wheels end with a directory, so they are not downloaded."""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import tomli
import tomlkit
from packaging.utils import canonicalize_name

from core import files, lockfile, source, tools, workspace
from core.errors import SourceError
from core.stack import Platform, stacks
from lock import requirements
from lock.updates import packages, upstream

if TYPE_CHECKING:
    from core.stack import Stack
    from lock.application import Application

Listed = Iterable[tuple[str, int]]
"""Paths of files, each with its size in bytes."""

BLOCK = 4096
"""Bytes of a block: files and folders take whole ones, on ext4, xfs and btrfs."""


def measure_application(app: Application) -> None:
    """Write the size of a ComfyUI and its packages, without those of its stack, to its app.toml; raises SourceError."""
    runs = [each for each in requirements.combinations(app.version) if each[0].default]
    stack, platform, python = (runs or requirements.combinations(app.version))[0]
    lock = requirements.find(stack.name, platform.value, python, app.path)
    theirs = {*map(_name, _runtime(stack))}
    lines = (lock.select([]) if lock else "").replace(" \\\n", "").splitlines()
    wheels = _wheels([line for line in lines if _name(line) not in theirs], platform, python)
    tree, path = source.fetch(app), Path(app.path, "app.toml")
    own = [(str(each.relative_to(tree)), each.stat().st_size) for each in tree.rglob("*") if each.is_file()]
    document: Any = tomlkit.parse(path.read_text())
    _set(document, size_of(own), size_of(wheels))
    files.write(path, tomlkit.dumps(document))


def measure_stacks(names: Iterable[str]) -> None:
    """Write the sizes of stacks' packages to stacks.toml; raises SourceError."""
    path = workspace.current().checkout / "config/stacks.toml"
    document: Any = tomlkit.parse(path.read_text())
    for name in names:
        stack = stacks()[name]
        wheels = _wheels(_runtime(stack), Platform.parse(stack.platforms[0]), stack.pythons[0])
        _set(document[name], size_of(wheels))
    files.write(path, tomlkit.dumps(document))


def _runtime(stack: Stack) -> list[str]:
    """A stack's locked requirements without its compiler, which hosts do not get."""
    compiler = packages.pinned()[stack.name].keys() - {*requirements.TRIO}
    return [line for line in lockfile.requirements(stack.name) if _name(line) not in compiler]


def _name(line: str) -> str:
    return canonicalize_name(re.split(r"==| @ ", line, maxsplit=1)[0])


def _set(table: Any, *sizes: tuple[int, int]) -> None:
    """Write `size` and `files`, rounded up: a few files more or less are no change."""
    for key, taken, unit in zip(("size", "files"), zip(*sizes, strict=True), (10_000_000, 100), strict=True):
        table[key] = tomlkit.parse(f"{key} = {-(-sum(taken) // unit) * unit:_}")[key]


def size_of(listed: Listed) -> tuple[int, int]:
    """The bytes and inodes that files take with their folders, and with the compiled code of Python files.

    That is about as large as its source: for an environment of 108 packages, both numbers are within 1 % of what du and
    find count.
    """
    size, inodes, folders = 0, 0, set[PurePosixPath]()
    for name, length in listed:
        path, compiled = PurePosixPath(name), name.endswith(".py")
        size += -(-length // BLOCK) * BLOCK * (1 + compiled)
        inodes += 1 + compiled
        folders |= {*path.parents, *([path.parent / "__pycache__"] if compiled else [])}
    return size + len(folders) * BLOCK, inodes + len(folders)


def _wheels(lines: Iterable[str], platform: Platform, python: str) -> Listed:
    """The files of the wheels that a host with this platform and Python installs for locked requirements."""
    words = ["pip", "compile", "--quiet", "--no-deps", "--no-header", "--format", "pylock.toml"]
    words += ["--only-binary", ":all:", "--python-version", python, "--python-platform", platform.uv_name]
    done = tools.uv(*words, "--python", sys.executable, "-", input_text="".join(f"{line}\n" for line in lines))
    order = {tag: at for at, tag in enumerate(requirements.tags(platform, python))}

    def rank(wheel: Mapping[str, Any]) -> int:
        known = requirements.wheel(_address(wheel))
        return min((order.get(tag, len(order)) for tag in known[2]), default=0) if known else len(order)

    listed = tomli.loads(done.stdout).get("packages", [])
    best = [_address(min(each.get("wheels") or [each["archive"]], key=rank)) for each in listed]
    with ThreadPoolExecutor() as pool:
        for found in pool.map(_directory, best):
            yield from ((each.filename, each.file_size) for each in found if not each.is_dir())


def _address(wheel: Mapping[str, Any]) -> str:
    return wheel.get("url") or f"file://{wheel['path']}"


def _directory(address: str) -> list[zipfile.ZipInfo]:
    """The directory of a wheel, which is at its end; raises SourceError."""
    if address.startswith("file:"):
        with zipfile.ZipFile(unquote(urlsplit(address).path)) as wheel:
            return wheel.infolist()
    for most in (1 << 16, 1 << 20, 1 << 24):
        with tempfile.TemporaryFile() as file, suppress(zipfile.BadZipFile):
            size, content = upstream.tail(address, most)
            file.seek(size - len(content))  # what is before it is a hole
            file.write(content)
            return zipfile.ZipFile(file).infolist()
    raise SourceError("source-unreachable", f"{address} is not a wheel")
