"""The deployed application: its pinned source, and the flags that its parser accepts."""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import files, foreign, source, workspace
from core.config import load
from core.errors import ConfigError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping


class Application(source.Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ComfyUI (`recipes/comfyui/app.toml`).

    `extra` are packages in addition to its requirements; `manager` is the package that `--enable-manager` needs.
    `writable` are its files and folders (ending in `/`) that nodes write; they live in the data. `size` and `files`
    are the measured size of an installed release beside its stack, in bytes and inodes.
    """

    extra: tuple[str, ...]
    manager: str = ""
    writable: tuple[str, ...] = ()
    size: int
    files: int


def folder() -> Path:
    """The folder that describes the application: $HEARTH_APP, else `recipes/comfyui`; in a bundle, the latter."""
    own = os.environ.get("HEARTH_APP") if workspace.current().checkout == files.CHECKOUT else ""
    return Path(own or workspace.current().checkout / "recipes/comfyui").absolute()


def application() -> Application:
    """Return the pinned ComfyUI, or the one of $HEARTH_APP, a folder with an app.toml; raises ConfigError.

    A source folder next to the app.toml is used as it is, for a ComfyUI of one's own.
    """
    place = folder()
    loaded = msgspec.structs.replace(load(place / "app.toml", Application), folder=str(place))
    source.check(loaded)
    if own := loaded.source[0].folder:
        loaded = msgspec.structs.replace(loaded, tree=files.tree_hash(place / own))
    return loaded


def version() -> str:
    """Return the pinned version without reading the source."""
    return load(folder() / "app.toml", Application).version


class Flag(msgspec.Struct, frozen=True):
    """One flag of ComfyUI's command line: number of values, type, choices and group.

    `values` is argparse's `nargs` ("0" for a switch, "1" for one value); flags of the same `group` exclude each other.
    """

    name: str
    values: str
    kind: str
    choices: tuple[str, ...]
    group: str


def flags(text: str) -> dict[str, Flag]:
    """Return the flags that a `comfy/cli_args.py` defines, without running it.

    Skips code that it does not understand. Raises ConfigError if the file cannot be parsed.
    """
    found: dict[str, Flag] = {}
    groups: set[str] = set()
    nodes = list(ast.walk(_parsed(text, "comfy/cli_args.py")))
    for node in nodes:
        if isinstance(node, ast.Assign) and _called(node.value) == "add_mutually_exclusive_group":
            groups |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    for node in nodes:
        if (
            not isinstance(node, ast.Call)
            or _called(node) != "add_argument"
            or not isinstance(node.func, ast.Attribute)
        ):
            continue
        names = [name for name in map(_constant, node.args) if name.startswith("-")]
        if not names:
            continue
        words = {word.arg: word.value for word in node.keywords if word.arg}
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        action, count = _constant(words.get("action")), _constant(words.get("nargs"))
        kind = words.get("type")
        flag = Flag(
            name=names[0],
            values="0" if action.startswith("store_") else count if count in _COUNTS else "1" if not count else "*",
            kind=kind.id if isinstance(kind, ast.Name) else "",
            choices=_strings(words.get("choices")),
            group=owner if owner in groups else "",
        )
        found |= dict.fromkeys(names, flag)
    return found


_COUNTS = {"?", "*", "+", *map(str, range(100))}
"""The values of argparse's `nargs` that are understood; for any other, any number of values is accepted."""


def model_folders(text: str) -> dict[str, tuple[str, ...]]:
    """Return the model types that a `folder_paths.py` defines with their folder names, without running it."""
    found: dict[str, tuple[str, ...]] = {}
    for node in _parsed(text, "folder_paths.py").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            joined = [
                call.args for call in ast.walk(node.value) if isinstance(call, ast.Call) and _called(call) == "join"
            ]
            names = [
                _constant(args[1]) for args in joined if len(args) > 1 and getattr(args[0], "id", "") == "models_dir"
            ]
            kind = _constant(node.targets[0].slice)
            if kind and all(names) and names:
                found[kind] = tuple(names)
    return found


def _parsed(text: str, name: str) -> ast.Module:
    """The syntax tree of a ComfyUI file, which may come from a host; raises ConfigError if it cannot be parsed."""
    if len(text) > foreign.TEXT:
        raise ConfigError("config", f"ComfyUI's {name} is larger than {foreign.TEXT // 1000} kB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes and comparisons, which concern only its author
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                "config", f"ComfyUI's {name} cannot be parsed", cause=f"{type(error).__name__}: {error}"
            ) from None


def _called(node: ast.AST | None) -> str:
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def _constant(node: ast.AST | None) -> str:
    """A string, or a number with few digits: Python refuses to format a very long one."""
    value = node.value if isinstance(node, ast.Constant) else None
    return str(value) if isinstance(value, (str, float)) or (isinstance(value, int) and value < 1 << 64) else ""


def _strings(node: ast.AST | None) -> tuple[str, ...]:
    items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else []
    return tuple(_constant(item) for item in items)


def wrong(
    chosen: Mapping[str, str], known: Mapping[str, Flag], origin: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return the problems of flags and their values, each with a fix; empty if there are none.

    `origin` names the setting that contains the flag.
    """
    by = origin or {}
    found: list[tuple[str, str]] = []
    groups: dict[str, list[str]] = {}
    for name, value in chosen.items():
        flag = known.get(name)
        if flag is None:
            found.append((f"this ComfyUI has no flag {name}", suggest(name, known)))
            continue
        if flag.group:
            groups.setdefault(flag.group, []).append(name)
        words = value.split()
        bounds = {"0": (0, 0), "?": (0, 1), "*": (0, 99), "+": (1, 99)}
        low, high = bounds.get(flag.values) or (int(flag.values), int(flag.values))
        if not low <= len(words) <= high:
            found.append((f"{name} takes {flag.values} value(s), not {value!r}", "set `value` accordingly"))
        elif flag.kind in ("int", "float") and not all(_number(word, flag.kind) for word in words):
            found.append((f"{name} takes a number, not {value!r}", "set `value` accordingly"))
        elif flag.choices and not set(words) <= set(flag.choices):
            found.append((f"{name} does not know {value!r}", f"one of {', '.join(flag.choices)}"))
    for names in (each for each in groups.values() if len(each) > 1):
        who = ", ".join(f"{name} is from {by[name]}" for name in names if by.get(name))
        found.append(
            (
                f"{' and '.join(names)} exclude each other",
                f"keep one (`off = true` in the host's override); {who}".removesuffix("; "),
            )
        )
    return found


def _number(word: str, kind: str) -> bool:
    try:
        int(word) if kind == "int" else float(word)
    except ValueError:
        return False
    return True
