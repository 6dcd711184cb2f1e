"""Reads what strangers wrote: the Python, TOML and text of nodes and of ComfyUI, of any size, nesting and shape."""

from __future__ import annotations

import ast
import os
import stat
import warnings
from typing import TYPE_CHECKING, Any

from core.errors import TreeError

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 8_000_000
"""Bytes of a file that is parsed. ComfyUI's largest Python file has 0.2 MB, nodes have tables of 2 MB."""


def content(path: Path) -> bytes:
    """A file's bytes; raises TreeError when it is too large to be parsed, or no plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for whoever would write into a pipe
    with os.fdopen(descriptor, "rb") as file:
        plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
        read = file.read(LIMIT + 1) if plain else b""
    if not plain or len(read) > LIMIT:
        kind = f"larger than {LIMIT // 1_000_000} MB" if plain else "no plain file"
        raise TreeError(f"{path} is {kind}, and is not read", hint="leave it out of the node or recipe with `without`")
    return read


def text(path: Path) -> str:
    """A file's text, with U+FFFD for bytes that are not UTF-8; raises TreeError as `content` does."""
    return content(path).decode(errors="replace")


def python(path: Path) -> ast.Module:
    """The syntax tree of a Python file, which is not run; an empty one for what is too large or deep, or no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its escapes and comparisons, which are its author's affair
        try:
            return ast.parse(content(path))
        except (TreeError, SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module([], [])


def pyproject(tree: Path) -> dict[str, Any]:
    """The `project` table of a tree's pyproject.toml; empty where there is none, or none that can be read."""
    import tomllib

    try:
        found = tomllib.loads(text(tree / "pyproject.toml")).get("project")
    except (FileNotFoundError, tomllib.TOMLDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
