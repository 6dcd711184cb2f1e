"""Removes metadata from pictures, videos and sounds: here, or in a host's output folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.sanitise import DRAFT, sanitise
from agent.schema.live import Sanitised
from core import console
from core.console import counted
from core.errors import UsageError
from core.typed import convert
from deploy import connection
from deploy.look import find_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def here(paths: Sequence[str], *, write: bool, replace: bool) -> Iterator[Sanitised]:
    """Sanitise files, and all files below folders, of this machine. Links are not followed."""
    if not paths:
        raise UsageError("usage", "no file is named", hint="name files or folders, or a host: --host NAME")
    for path in map(Path, paths):
        for folder, name in _below(path) if path.is_dir() and not path.is_symlink() else [(path.parent, path.name)]:
            found = sanitise(folder, name, write=write, replace=replace)
            copy = found.copy and str(folder / found.copy)
            yield Sanitised(str(folder / name), found.state, found.removed, copy, found.error)


def _below(root: Path) -> Iterator[tuple[Path, str]]:
    for place, folders, names in os.walk(root):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*names, *links]):
            if not name.startswith(DRAFT):
                yield Path(place), name


def on_host(host: str, paths: Sequence[str], *, write: bool, replace: bool, ask_sudo: bool) -> Iterator[Sanitised]:
    """Sanitise files of a host's output folder; `paths` are relative to it, none are all."""
    with connection.connect(find_target(host), ask_sudo) as agent:
        for each in agent.stream("sanitise", paths=list(paths), write=write, replace=replace):
            yield convert(each, Sanitised)


_STATES = {
    "dirty": "would be cleaned",
    "written": "cleaned",
    "copied": "a clean copy exists",
    "clean": "nothing to remove",
    "unknown": "not supported",
    "failed": "failed",
}


def show(found: Iterable[Sanitised], host: str, paths: Sequence[str], *, as_json: bool) -> int:
    """Print the results as they come; returns 1 if a file failed, 2 if a dry run would clean any.

    One of `paths` that is not supported has failed; in a folder such a file is only listed.
    """
    named = {os.path.normpath(path) for path in paths}
    results: list[Sanitised] = []

    def each() -> Iterator[Sanitised]:
        for result in found:
            failed = result.state == "unknown" and os.path.normpath(result.path) in named
            results.append(dataclasses.replace(result, state="failed") if failed else result)
            yield results[-1]

    lines = rows(list(each()) if as_json else each(), results)
    value = [{"host": host, **msgspec.to_builtins(result)} for result in results]
    console.show(value, lines, as_json=as_json)
    states = {result.state for result in results}
    return 1 if "failed" in states else 2 if "dirty" in states else 0


def rows(found: Iterable[Sanitised], results: Sequence[Sanitised]) -> Iterator[str]:
    """A line for each file with metadata or an error, then the number of `results` in each state."""
    for each in found:
        if each.error:
            yield f"{each.path}: {each.error}"
        elif each.removed:
            to = f" -> {each.copy}" if each.copy else ""
            listed = ", ".join(each.removed[:8]) + ", ..." * (len(each.removed) > 8)
            yield f"{each.path}{to}: {_STATES[each.state]}: {listed}"
    counts = {text: sum(each.state == state for each in results) for state, text in _STATES.items()}
    listed = ", ".join(f"{number} {text}" for text, number in counts.items() if number)
    yield f"{counted(len(results), 'file')}: {listed}"
