"""The deployed application: its pinned source, and the flags that its parser accepts."""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from packaging.version import InvalidVersion, Version

from core import files, foreign, source, workspace
from core.config import load
from core.errors import ConfigError, SourceError, UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Application(source.Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ComfyUI (`recipes/comfyui/app.toml`).

    `extra` are packages in addition to its requirements; `manager` is the package that `--enable-manager` needs.
    `writable` are its files and folders (ending in `/`) that nodes write; they live in the data. `size` and `files`
    are what a release without custom nodes takes on a host beside its stack, in bytes and inodes; updates measure them.
    """

    extra: tuple[str, ...]
    manager: str = ""
    writable: tuple[str, ...] = ()
    size: int
    files: int


class Channels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`channels.toml`: the version that each channel stands for; empty: none yet."""

    stable: str = ""
    latest: str = ""


PINNED = "pinned"
CHANNELS = Channels.__struct_fields__


def folder() -> Path:
    """The folder of the pinned application: $HEARTH_APP, else `recipes/comfyui`; in a bundle, the latter.

    `versions/VERSION/` below it describes another version in the same way: an app.toml, and its lists in `locks/`.
    """
    own = os.environ.get("HEARTH_APP") if workspace.current().checkout == files.CHECKOUT else ""
    return Path(own or workspace.current().checkout / "recipes/comfyui").absolute()


def channels_file() -> Path:
    """The file that names the version of each channel, next to the app.toml."""
    return folder() / "channels.toml"


def channels() -> dict[str, str]:
    """The versions of the channels that have one."""
    found = load(channels_file(), Channels) if channels_file().exists() else Channels()
    return {name: version for name, version in msgspec.structs.asdict(found).items() if version}


def moving(channel: str) -> str:
    """What an update starts from: the channel if it has a version that is described, else the pinned one."""
    return channel if channels().get(channel) in versions() else PINNED


def versions() -> dict[str, Path]:
    """The folders that describe the known versions: the pinned one, then the others, oldest first."""
    pinned = _described(folder())
    others = [_described(path.parent) for path in folder().glob("versions/*/app.toml")]
    others = sorted((each for each in others if each.version != pinned.version), key=lambda app: Version(app.version))
    return {app.version: app.path for app in (pinned, *others)}


def find(which: str = PINNED) -> Path:
    """The folder that describes a version, or the version of a channel; raises ConfigError.

    A bundle contains only one version, which is the pinned one and that of every channel.
    """
    bundled = workspace.current().bundled
    if which == PINNED or (bundled and which in CHANNELS):
        return folder()
    version = channels().get(which, "") if which in CHANNELS else which
    known = versions()
    if version in known:
        return known[version]
    if not version:
        hint = f"inv update comfyui --channel {which}"
        raise ConfigError("config", f"the channel {which} has no version yet", hint=hint)
    hint = f"{suggest(version, [*known, PINNED, *CHANNELS])}; inv update comfyui --to VERSION fetches another one"
    hint = f"inv update comfyui --channel {which}" if which in CHANNELS else hint
    what = f"there is no ComfyUI {version!r}" + f", which is {which}" * (version != which)
    raise ConfigError("config", what, hint="create the bundle again: inv bundle" if bundled else hint)


def unused(selected: Iterable[str]) -> list[Path]:
    """The folders below `versions` that neither these selections of hosts nor a channel need."""
    names, known = {*selected, *channels().values()}, versions()
    needed = {known.get(each) for each in names}
    return sorted(path.parent for path in folder().glob("versions/*/app.toml") if path.parent not in needed)


def copied(version: str) -> Path:
    """Copy app.toml and lists of the pinned version to the folder of another one: to keep it, or as a start."""
    place = folder() / "versions" / version
    for path in (folder() / "app.toml", *(folder() / "locks").glob("*.txt")):
        files.write(place / path.relative_to(folder()), path.read_bytes())
    return place


def set_channel(name: str, version: str) -> None:
    """Write the version of a channel; raises UsageError for an unknown channel."""
    if name not in CHANNELS:
        raise UsageError("unknown-name", f"there is no channel {name!r}", hint=suggest(name, CHANNELS))
    lines = [f'{key} = "{value}"\n' for key, value in sorted({**channels(), name: version}.items())]
    files.write(
        channels_file(), "".join(["# The version of each channel; a host selects one with `comfyui`.\n", *lines])
    )


def application(which: str = PINNED) -> Application:
    """Return the pinned ComfyUI, or another version, or that of a channel; raises ConfigError.

    A source folder next to the app.toml is used as it is, for a ComfyUI of one's own.
    """
    loaded = _described(find(which))
    source.check(loaded)
    if own := loaded.source[0].folder:
        if not (loaded.path / own).is_dir():
            raise ConfigError("config", f"{loaded.path}/app.toml: there is no folder {own!r} beside it")
        loaded = msgspec.structs.replace(loaded, tree=files.tree_hash(loaded.path / own))
    return loaded


def _described(place: Path) -> Application:
    """What a folder describes; raises ConfigError."""
    loaded = msgspec.structs.replace(load(place / "app.toml", Application), folder=str(place))
    try:
        Version(loaded.version)
    except InvalidVersion:
        hint = "a number such as 0.30.0, or 0.30.0+mine for a ComfyUI of your own"
        raise ConfigError("config", f"{place}/app.toml: {loaded.version!r} is not a version", hint=hint) from None
    if place != folder() and place.name != loaded.version:
        raise ConfigError("config", f"{place}/app.toml describes {loaded.version}", hint="rename the folder")
    return loaded


def version(which: str = PINNED) -> str:
    """Return the version without reading the source."""
    return _described(find(which)).version


def label(app: Application) -> str:
    """What precedes the names of lists in messages: nothing for the pinned application."""
    return "" if app.path == folder() else f"{app.version}/"


def tree(app: Application) -> Path:
    """The application's source, fetched if necessary; raises ConfigError if it is not a ComfyUI."""
    found = source.fetch(app)
    for name in ("comfy/cli_args.py", "folder_paths.py"):
        text(found, name)
    if not (found / "requirements.txt").is_file():  # its pyproject.toml names no packages
        raise _no_comfyui(found, "requirements.txt does not exist")
    return found


def text(tree: Path, name: str) -> str:
    """A Python file of ComfyUI's; raises ConfigError if it cannot be read."""
    try:
        return foreign.content(tree / name, foreign.TEXT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, SourceError) as error:
        raise _no_comfyui(tree, f"{name}: {getattr(error, 'strerror', '') or error}") from None


def _no_comfyui(tree: Path, cause: str) -> ConfigError:
    hint = "name a source with ComfyUI's main.py in app.toml, with `subfolder` if it is not at its root"
    return ConfigError("config", f"{tree} is not a ComfyUI", cause=cause, hint=hint)


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
