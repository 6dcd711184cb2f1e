"""Reads untrusted archives, Python, TOML and text of any size and nesting."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import tarfile
import warnings
import zlib
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import tomli

from core import files
from core.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

LIMIT = 1_000_000
"""Maximum bytes of a parsed Python file; parsing takes 1,000 times as much memory. ComfyUI's largest has 0.2 MB."""

TEXT, TABLE = 256_000, 32_000
"""Maximum bytes of a requirements.txt, and of a pyproject.toml, which may take seconds to parse."""

LINE = 2000
"""Maximum characters of a requirement."""

FILES, DEPTH, TOTAL = 100_000, 64, 2_000_000_000
"""Limits of a tree: files and links, nested folders, bytes. flash-attention has 12,000 files and 0.1 GB."""

LEAVE_OUT = "exclude it from the node or recipe with `without`"


class Tree:
    """A folder filled from a commit or archive; raises SourceError for content that no source tree needs."""

    def __init__(self, place: Path, label: str) -> None:
        self.place, self.label = place, label
        self._entries = self._bytes = 0
        self._links: dict[str, str] = {}

    def file(self, name: str, size: int, blocks: Iterable[bytes], *, executable: bool) -> None:
        """Write a file of that size."""
        path = self._new(name, size)
        try:
            with path.open("xb") as file:
                file.writelines(blocks)
        except (FileExistsError, IsADirectoryError) as error:
            raise self._twice(name) from error
        path.chmod(0o755 if executable else 0o644)

    def link(self, name: str, target: bytes) -> None:
        """Remember a symbolic link."""
        self._new(name, 0)
        if not 0 < len(target) < 4096 or b"\0" in target:
            raise SourceError(
                "unsafe-tree", f"{self.label}: {name!r} is a link to a path that does not exist", hint=LEAVE_OUT
            )
        if name in self._links:
            raise self._twice(name)
        self._links[name] = os.fsdecode(target)

    def finish(self) -> None:
        """Replace links by copies of their targets. Call it last, so that nothing is written through a link."""
        for name, target in self._links.items():
            try:
                (self.place / name).symlink_to(target)
            except FileExistsError as error:
                raise self._twice(name) from error
        found = {name: path for name, path in files.tree(self.place) if name in self._links}
        for name, path in found.items():
            self._count(name, path.stat().st_size)
            shutil.copy(path, self.place / ".git")  # a name that nothing else has
            (self.place / ".git").replace(path)

    def _new(self, name: str, size: int) -> Path:
        parts = name.split("/")
        if {"", ".", "..", ".git"} & {part.lower() for part in parts} or not files.plain(name):
            raise SourceError("unsafe-tree", f"{self.label}: {name!r} is not allowed as a file name", hint=LEAVE_OUT)
        if len(parts) > DEPTH or max(len(os.fsencode(part)) for part in parts) > 250 or len(os.fsencode(name)) > 2000:
            raise SourceError(
                "unsafe-tree", f"{self.label}: {name[:100]!r}... is too long, or nested too deeply", hint=LEAVE_OUT
            )
        self._count(name, size)
        path = self.place.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise self._twice(name) from error
        return path

    def _count(self, name: str, size: int) -> None:
        self._entries, self._bytes = self._entries + 1, self._bytes + size
        if not 0 <= size <= files.LARGEST or self._bytes > TOTAL or self._entries > FILES:
            most = (
                f"a tree has at most {FILES} files of {files.LARGEST // 1_000_000} MB, and {TOTAL // 1_000_000_000} GB"
            )
            raise SourceError("unsafe-tree", f"{self.label} is too large, at {name!r}", cause=most, hint=LEAVE_OUT)

    def _twice(self, name: str) -> SourceError:
        return SourceError(
            "unsafe-tree", f"{self.label} has {name!r} twice, or both as a file and as a folder", hint=LEAVE_OUT
        )


@contextmanager
def _archive_errors(label: str, where: str) -> Iterator[None]:
    """Convert the exceptions of tarfile and zlib to SourceError."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError, RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        cause = f"damaged, truncated or malicious, at {where!r}: {error!r}"
        raise SourceError(
            "unsafe-tree", f"{label} is not an archive that can be unpacked", cause=cause[:500]
        ) from error


class _Rationed:
    """A tar archive of which at most `left` bytes are read: tarfile reads headers of any length into memory."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self.left = raw, HEADERS

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("a header is too long")
        return self._raw.read(size)


HEADERS = 1 << 20
"""Maximum bytes of headers before a member: its name and other pax records."""


def members(raw: IO[bytes], label: str) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """Yield the members of an uncompressed tar archive, each with its content in blocks to read before the next one.

    Raises SourceError with the member's name for anything but files, folders and symbolic links: hard links, devices,
    and sparse files, which are huge when unpacked. At most one block is in memory.
    """
    ration, last, count, total = _Rationed(raw), "its start", 0, 0

    def content(file: IO[bytes] | None) -> Iterator[bytes]:
        with _archive_errors(label, last):
            while block := file.read(1 << 16) if file else b"":
                yield block

    with (
        _archive_errors(label, "its headers"),
        tarfile.open(fileobj=ration, mode="r|") as archive,  # type: ignore[call-overload]  # it needs `read` alone
    ):
        while member := archive.next():
            last, count, total = member.name, count + 1, total + member.size
            if not (member.isreg() or member.isdir() or member.issym()) or member.issparse() or member.size < 0:
                raise SourceError(
                    "unsafe-tree", f"{label}: {last} is not a regular file, a folder or a link to one", hint=LEAVE_OUT
                )
            if count > FILES or total > TOTAL:
                raise SourceError("unsafe-tree", f"{label} is too large, at {last!r}", hint=LEAVE_OUT)
            ration.left = member.size + HEADERS
            yield member, content(archive.extractfile(member) if member.isreg() else None)
            archive.members = []  # tarfile would keep all of them


def content(path: Path, limit: int = LIMIT) -> bytes:
    """A file's bytes; raises SourceError for more than `limit` bytes and for anything but a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not block on a pipe
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceError("unsafe-tree", f"{path} is not a regular file", hint=LEAVE_OUT)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            read = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(read) > limit:
        raise SourceError("unsafe-tree", f"{path} is larger than {limit // 1000} kB", hint=LEAVE_OUT)
    return read


def text(path: Path, limit: int = TEXT) -> str:
    """A file's text without BOM, with U+FFFD for bytes that are not UTF-8; raises SourceError as `content` does."""
    return content(path, limit).decode("utf-8-sig", "replace")


def parsed(path: Path) -> ast.Module | None:
    """The syntax tree of a Python file, which is not executed; None if it is too large or cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes and comparisons, which concern only its author
        try:
            return ast.parse(content(path))
        except (SourceError, SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def python(path: Path) -> ast.Module:
    """As `parsed`, with an empty tree instead of None."""
    return parsed(path) or ast.Module([], [])


def pyproject(tree: Path) -> dict[str, Any]:
    """The `project` table of a tree's pyproject.toml; empty if it is missing or cannot be parsed."""
    try:
        found = tomli.loads(text(tree / "pyproject.toml", TABLE)).get("project")
    except (FileNotFoundError, ValueError, RecursionError):  # also an integer of 5,000 digits
        return {}
    return found if isinstance(found, dict) else {}
