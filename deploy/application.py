"""The application that hosts run: its pinned source, and the flags that its own parser knows."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import files, source
from core.config import load
from core.errors import near

if TYPE_CHECKING:
    from collections.abc import Mapping


class Application(source.Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ComfyUI (`recipes/comfyui/app.toml`).

    `extra` are packages beside its own requirements, `manager` the one that `--enable-manager` needs; `writable` are
    files and folders (with a `/` behind) of it that nodes write, which lie in the data. `size` and `files` are what an
    installed release takes, in bytes and inodes, by stack; measured.
    """

    extra: tuple[str, ...]
    manager: str = ""
    writable: tuple[str, ...] = ()
    size: dict[str, int]
    files: dict[str, int]


def folder() -> Path:
    """Where the application is described: $HEARTH_APP, else `recipes/comfyui`; in a bundle the latter."""
    own = os.environ.get("HEARTH_APP") if files.checkout() == files.CHECKOUT else ""
    return Path(own or files.checkout() / "recipes/comfyui").absolute()


def application() -> Application:
    """The pinned ComfyUI, or the one of $HEARTH_APP, a folder with an app.toml; raises ConfigError.

    A source that is a folder beside the app.toml is taken as it is: for a ComfyUI of one's own.
    """
    place = folder()
    loaded = msgspec.structs.replace(load(place / "app.toml", Application), folder=str(place))
    source.check(loaded)
    if own := loaded.source[0].folder:
        loaded = msgspec.structs.replace(loaded, tree=files.tree_hash(place / own))
    return loaded


def version() -> str:
    """The version that is pinned, without looking at its source."""
    return load(folder() / "app.toml", Application).version


class Flag(msgspec.Struct, frozen=True):
    """One flag of ComfyUI's command line: how many values it takes, of what type, which choices, in which group.

    `values` is argparse's `nargs` ("0" for a switch, "1" for one value); flags of the same `group` exclude each other.
    """

    name: str
    values: str
    kind: str
    choices: tuple[str, ...]
    group: str


def flags(text: str) -> dict[str, Flag]:
    """The flags that a `comfy/cli_args.py` defines, read without running it."""
    found: dict[str, Flag] = {}
    groups: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and _called(node.value) == "add_mutually_exclusive_group":
            groups |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    for node in ast.walk(ast.parse(text)):
        if (
            not isinstance(node, ast.Call)
            or _called(node) != "add_argument"
            or not isinstance(node.func, ast.Attribute)
        ):
            continue
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        words = {word.arg: word.value for word in node.keywords if word.arg}
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        action, count = _constant(words.get("action")), _constant(words.get("nargs"))
        kind = words.get("type")
        flag = Flag(
            name=names[0],
            values="0" if action.startswith("store_") else count or "1",
            kind=kind.id if isinstance(kind, ast.Name) else "",
            choices=_strings(words.get("choices")),
            group=owner if owner in groups else "",
        )
        found |= dict.fromkeys((name for name in names if name.startswith("-")), flag)
    return found


def model_folders(text: str) -> dict[str, tuple[str, ...]]:
    """The kinds of models that a `folder_paths.py` defines, each with its folders' names, read without running it."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            joined = [call for call in ast.walk(node.value) if _called(call) == "join" and isinstance(call, ast.Call)]
            names = [_constant(call.args[1]) for call in joined if getattr(call.args[0], "id", "") == "models_dir"]
            if names:
                found[_constant(node.targets[0].slice)] = tuple(names)
    return found


def _called(node: ast.AST | None) -> str:
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def _constant(node: ast.AST | None) -> str:
    return str(node.value) if isinstance(node, ast.Constant) and node.value is not None else ""


def _strings(node: ast.AST | None) -> tuple[str, ...]:
    items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else []
    return tuple(_constant(item) for item in items)


def wrong(
    chosen: Mapping[str, str], known: Mapping[str, Flag], origin: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """What is wrong with flags and their values, each with its remedy; empty when nothing is.

    `origin` says who sets a flag.
    """
    by = origin or {}
    found: list[tuple[str, str]] = []
    groups: dict[str, list[str]] = {}
    for name, value in chosen.items():
        flag = known.get(name)
        if flag is None:
            found.append((f"this ComfyUI has no flag {name}", near(name, known)))
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
