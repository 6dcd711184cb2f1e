"""The workspace of a command: the checkout that it reads, its cache and its wheelhouse."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import console, files
from core.errors import UsageError
from core.wheelhouse import Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Workspace:
    """Three folders: `checkout` (recipes, configuration and locks), `cache` and `wheelhouse`.

    `bundled` is true for an open bundle, which holds everything that a deploy needs: no network is used.
    """

    checkout: Path
    cache: Path
    wheelhouse: Wheelhouse
    bundled: bool = False

    @classmethod
    def own(cls) -> Workspace:
        """The user's workspace: this checkout, $HEARTH_CACHE and $HEARTH_WHEELHOUSE.

        The cache defaults to `hearth` in the user's cache directory (XDG), the wheelhouse to `wheelhouse/` in the
        checkout.
        """
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if Path(base).is_absolute() else str(_home() / ".cache")  # a relative one is ignored (XDG)
        cache = Path(os.environ.get("HEARTH_CACHE") or Path(base, "hearth")).absolute()
        wheelhouse = Path(os.environ.get("HEARTH_WHEELHOUSE") or files.CHECKOUT / "wheelhouse").absolute()
        return cls(files.CHECKOUT, cache, Wheelhouse(wheelhouse))

    @classmethod
    def of_bundle(cls, place: Path) -> Workspace:
        """The workspace of a bundle that is unpacked at `place`."""
        return cls(place / "checkout", place / "cache", Wheelhouse(place / "wheelhouse"), bundled=True)

    def building(self) -> AbstractContextManager[int]:
        """Hold the build lock; wait for the process that holds it. Yields the descriptor."""
        return files.locked(self.cache / "build.lock", _waiting("another build"))

    def reading(self) -> AbstractContextManager[object]:
        """Keep `clearing` away from the cache; several processes can."""
        if not os.access(self.cache, os.W_OK):  # nothing can be cleared
            return nullcontext()
        return files.locked(self.cache / "read.lock", _waiting("inv cache --clear"), shared=True)

    @contextmanager
    def clearing(self) -> Iterator[None]:
        """Wait until no process builds or reads the cache, and keep them waiting."""
        with self.building(), files.locked(self.cache / "read.lock", _waiting("another command")):
            yield


def _waiting(what: str) -> Callable[[], None]:
    return lambda: console.say(f"{what} is running; waiting for it to end")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a container's user without an entry in /etc/passwd
        raise UsageError("usage", "this user has no home folder", hint="set HOME, or HEARTH_CACHE") from error


# One for the process, not a ContextVar: the threads that serve the hosts of a group start with an empty context, and
# would read the user's checkout instead of the bundle. An argument of every function that reads a file would be longer.
_opened: Workspace | None = None


def current() -> Workspace:
    """The workspace of this command: the open bundle's, else the user's own."""
    return _opened or Workspace.own()


@contextmanager
def using(workspace: Workspace) -> Iterator[None]:
    """Make `workspace` the current one for as long as the context lasts."""
    global _opened
    before, _opened = _opened, workspace
    try:
        yield
    finally:
        _opened = before
