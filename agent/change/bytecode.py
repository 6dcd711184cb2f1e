"""Python's bytecode of new parts, which the service cannot write: parts are read-only."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError
from agent.folders import walk
from agent.layout import Layout
from agent.parts import damage_of
from agent.processes import run

HEADER = struct.Struct("<4sLLL")
"""Of a file with bytecode (PEP 552): magic number, flags, the source's time of change and its size."""


def compile_part(layout: Layout, name: str, place: Path, python: str) -> None:
    """Compile the Python files of an unfinished part, with its final path in tracebacks. Raises AgentError.

    `python` is the base interpreter, which runs none of them: the environment's would run its packages' .pth files as
    root.
    """
    words = ["-I", "-S", "-m", "compileall", "-q", "-j", "0", "-s", str(place), "-p", str(layout.parts / name)]
    run([python, *words, str(place)])


def take_bytecode(layout: Layout, name: str, place: Path) -> None:
    """Give an unfinished part the bytecode of its active predecessor for each unchanged source: compileall skips it.

    An update of a few packages leaves 16,000 sources of an environment as they are, and compiling those takes most of
    the step's time. Raises OSError.
    """
    parts: dict[str, str] = {}
    with suppress(AgentError):  # without an active release
        parts = layout.manifest(layout.release()).parts
    for other in parts.values():
        before = layout.parts / other
        same_kind = other.rpartition("-")[0] == name.rpartition("-")[0]
        # Paths in bytecode are strings with their lengths.
        if same_kind and other != name and len(other) == len(name) and not damage_of(before):
            _take(before, place, os.fsencode(f"{before}/"), os.fsencode(f"{layout.parts / name}/"))


def _take(before: Path, place: Path, old: bytes, new: bytes) -> None:
    """Copy the bytecode of unchanged sources, with the path `new` for `old`, and the time of the new source."""
    for path, _ in walk(before):
        folder, cache, file = path.rpartition("__pycache__/")
        module, *suffixes = file.rsplit(".", 2)  # the second is Python's tag
        if not cache or len(suffixes) != 2 or suffixes[1] != "pyc":
            continue
        known, source = (f"{each}/{folder}{module}.py" for each in (before, place))  # a Path for each would take longer
        with suppress(FileNotFoundError, NotADirectoryError, FileExistsError, struct.error):
            was, status, content = os.stat(known), os.stat(source), _read(f"{before}/{path}")  # noqa: PTH116
            magic, *header = HEADER.unpack_from(content)
            same = os.path.samestat(was, status) or _read(known) == _read(source)
            if same and header == _header(was):
                os.makedirs(f"{place}/{folder}{cache}", exist_ok=True)  # noqa: PTH103
                with open(f"{place}/{path}", "xb") as written:  # noqa: PTH123
                    written.write(HEADER.pack(magic, *_header(status)) + content[HEADER.size :].replace(old, new))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def _header(source: os.stat_result) -> list[int]:
    """What bytecode says of its source."""
    return [0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF]
