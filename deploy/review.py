"""What the code of a node could do, as far as it can be read without running it: for who decides about an update."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from core import files, foreign

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = {
    "starts programs": "subprocess pty pexpect sh plumbum",
    "native code": "ctypes _ctypes cffi pybind11",
    "network": "socket socketserver ssl http urllib urllib3 requests aiohttp httpx websocket websockets ftplib zmq",
    "runs text as code": "marshal pickle dill cloudpickle code codeop runpy shelve",
}
"""Modules that give a power, by its name."""

CALLS = {
    "starts programs": "os.system os.popen os.fork os.exec os.spawn os.posix_spawn asyncio.create_subprocess",
    "native code": "torch.ops.load_library torch.utils.cpp_extension",
    "runs text as code": "eval exec compile __import__ importlib.import_module",
}
"""Calls that do; of dotted ones the beginning."""

_BINARIES = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"\0asm")
_SUFFIXES = (".so", ".dll", ".pyd", ".dylib", ".exe", ".pyc", ".whl", ".jar")


def powers(tree: Path) -> dict[str, set[str]]:
    """The files of a tree that have each power: `.pth` files and programs by what they are, Python by its code."""
    found: dict[str, set[str]] = {}
    for name, path in files.tree(tree):
        for power in _of(name, path):
            found.setdefault(power, set()).add(name)
    return found


def gained(before: Path, after: Path) -> tuple[str, ...]:
    """What a node could not do before, in words: a power, and the files that have it now."""
    old = powers(before)
    fresh = {power: sorted(names - old.get(power, set())) for power, names in sorted(powers(after).items())}
    return tuple(f"{power}: {', '.join(names)}" for power, names in fresh.items() if names)


def _of(name: str, path: Path) -> Iterator[str]:
    if name.endswith(".pth"):
        yield "runs at every start of Python (.pth)"
    with path.open("rb") as file:
        head = file.read(4)
    if name.endswith(_SUFFIXES) or ".so." in Path(name).name or head.startswith(_BINARIES):
        yield "binary"
    if name.endswith((".py", ".pyw")):
        for node in ast.walk(foreign.python(path)):
            yield from _of_node(node)


def _of_node(node: ast.AST) -> Iterator[str]:
    modules: list[str] = []
    called = ""
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        modules = [node.module]
        called = next((f"{node.module}.{alias.name}" for alias in node.names if node.module in ("os", "importlib")), "")
    elif isinstance(node, ast.Call):
        called = _dotted(node.func)
    for power, names in MODULES.items():
        if any(module.partition(".")[0] in names.split() for module in modules):
            yield power
    for power, names in CALLS.items():
        if any(called == name or ("." in name and called.startswith(name)) for name in names.split()):
            yield power


def _dotted(node: ast.expr) -> str:
    """`os.system` of such an expression; empty for anything else. Iterative: a chain may be of any length."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) and len(parts) < 20 else ""
