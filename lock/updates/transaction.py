"""Changes the files that pin everything together: all or none, also after `kill -9` or on a full disk; and undoes it.

A change is made in a draft, a copy of these files, so nothing is written until it is complete. The record in `.update/`
of the checkout holds the old and the new texts, and is durable before the first file is replaced.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import console, files, workspace
from core.errors import HearthError, RefusedError, UsageError
from core.typed import from_json
from lock import application, requirements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Change(msgspec.Struct, frozen=True):
    """The text of a file before and after; None: there is none."""

    old: str | None
    new: str | None


class Record(msgspec.Struct, frozen=True):
    """A change of files, by their paths. `undoes` a previous one, or not."""

    changes: dict[str, Change]
    undoes: bool = False


def _folder() -> Path:
    return workspace.current().checkout / ".update"


@contextmanager
def changing() -> Iterator[None]:
    """Hold the lock of these files while the context lasts; first complete the change of a killed run."""
    with files.locked(_folder() / "lock", _waiting("another update is running")):
        if (pending := _folder() / "pending.json").exists():
            console.say("completing an interrupted update")
            switch(from_json(pending.read_bytes(), Record))
        yield


def complete() -> None:
    """Complete the change of a killed run, if there is one."""
    if (_folder() / "pending.json").exists():
        with changing():
            pass


@contextmanager
def reading() -> Iterator[None]:
    """Keep these files as one change left them while the context lasts; first complete the change of a killed run.

    Others that read do not wait for each other, but the next change waits for all of them.
    """
    here = workspace.current()
    place = _folder() if _folder().exists() else here.checkout
    if here.bundled or not os.access(place, os.W_OK):  # this user changes nothing
        yield
        return
    complete()
    with files.locked(_folder() / "read.lock", _waiting("an update is being written"), shared=True):
        yield


def _waiting(what: str) -> Callable[[], None]:
    return lambda: console.say(f"{what}; waiting for it to end")


class Draft:
    """A copy of the files that an update may change, with the places that they belong to."""

    def __init__(self, place: Path) -> None:
        self.place, self._old = place, dict[Path, str | None]()
        app, here = application.folder(), workspace.current().checkout
        self._roots = {place / "recipes/comfyui": app, place / "config": here / "config", place: here}
        patterns = (("*.toml", "locks/*.txt", "versions/**/*"), ("*.toml",), ("pyproject.toml", "uv.lock"))
        for (copy, folder), names in zip(self._roots.items(), patterns, strict=True):
            copy.mkdir(parents=True, exist_ok=True)
            for path in (each for name in names for each in folder.glob(name) if each.is_file()):
                self._old[path] = _text(path)
                files.write(copy / path.relative_to(folder), path.read_bytes())
        if requirements.folder() != app / "locks":  # $HEARTH_APP has none of its own yet
            for path in requirements.folder().glob("*.txt"):
                files.write(place / "recipes/comfyui/locks" / path.name, path.read_bytes())
        for each in application.application().source:
            if each.folder:  # a ComfyUI of one's own
                (place / "recipes/comfyui" / each.folder).symlink_to(app / each.folder)

    def record(self) -> Record:
        """What differs from the files."""
        new = {Path(self.named(str(each))): _text(each) for each in self.place.rglob("*") if each.is_file()}
        both = {path: Change(self._old.get(path), new.get(path)) for path in sorted({*self._old, *new})}
        return Record({str(path): each for path, each in both.items() if each.old != each.new})

    def named(self, text: str) -> str:
        """A path in the draft, or a text with such, with the places that they belong to."""
        for copy, folder in self._roots.items():
            text = re.sub(rf"{re.escape(str(copy))}(?=/|$)", str(folder), text)
        return text


@contextmanager
def draft() -> Iterator[Draft]:
    """Make a draft the current workspace while the context lasts; errors name the files instead of their copies."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        made = Draft(Path(folder).resolve())
        try:
            with workspace.using(dataclasses.replace(workspace.current(), checkout=made.place)):
                yield made
        except HearthError as error:
            error.what, error.cause, error.hint = map(made.named, (error.what, error.cause, error.hint))
            raise


@contextmanager
def applied(record: Record) -> Iterator[None]:
    """Make a copy of the checkout's pins and configuration, with a change made, the current workspace."""
    here = workspace.current().checkout
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        copy = Path(folder).resolve()
        with reading():
            for name in ("recipes", "config"):
                shutil.copytree(here / name, copy / name, symlinks=True)
            for name in ("pyproject.toml", "uv.lock"):
                shutil.copy(here / name, copy)
        for path, change in record.changes.items():
            place = copy / Path(path).relative_to(here)
            if change.new is None:
                place.unlink()
            else:
                files.write(place, change.new)
        with workspace.using(dataclasses.replace(workspace.current(), checkout=copy)):
            yield


def undo() -> list[str]:
    """Restore the files of before the last update and return their paths; raises UsageError and RefusedError."""
    with changing():
        if not (last := _folder() / "last.json").exists():
            raise UsageError("usage", "there is no update to undo", hint="only the last one can be undone, and once")
        done = from_json(last.read_bytes(), Record)
        switch(Record({path: Change(each.new, each.old) for path, each in done.changes.items()}, undoes=True))
        return [*done.changes]


def switch(record: Record) -> None:
    """Replace the files together, or complete that. Raises RefusedError, and changes none, if one was edited.

    All content is written first, then the record: the renames after that need no space. Waits for commands that read
    these files.
    """
    busy = _waiting("a command such as inv deploy is reading these files")
    with files.locked(_folder() / "read.lock", busy):
        _switch(record)


def _switch(record: Record) -> None:
    left = {Path(path): each for path, each in record.changes.items() if _text(Path(path)) != each.new}
    if edited := [line for path, each in left.items() if _text(path) != each.old for line in _edits(path, each.old)]:
        raise RefusedError(
            "refused",
            "files were edited since; nothing was changed",
            cause="\n".join(edited),
            hint="keep these edits elsewhere and restore the files, for example with git; then run the command again",
        )
    pending, last = _folder() / "pending.json", _folder() / "last.json"
    with ExitStack() as drafts:
        parts = {path: drafts.enter_context(files.draft(path)) for path, each in left.items() if each.new is not None}
        for path, part in parts.items():
            files.write(part, left[path].new or "")
        files.write(pending, msgspec.json.encode(record))
        for path in left:
            if path in parts:
                parts[path].replace(path)
                continue
            path.unlink()
            with suppress(OSError):  # an empty `locks` would count as lists
                path.parent.rmdir()
                path.parent.parent.rmdir()
        os.sync()  # the record goes last
        if record.undoes:
            last.unlink(missing_ok=True)
            pending.unlink()
        else:
            pending.replace(last)


def _text(path: Path) -> str | None:
    """A file's exact text; None if there is none."""
    return path.read_bytes().decode(errors="replace") if path.exists() else None


def _edits(path: Path, old: str | None) -> Iterator[str]:
    """The first lines of the difference between a file and its old text."""
    lines = (old or "").splitlines(), (_text(path) or "").splitlines()
    return islice(difflib.unified_diff(*lines, "before", str(path), lineterm="", n=0), 20)
