"""The flow behind `inv build-kernels`: from what was asked to inspected wheels in the wheelhouse."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from core import console, files
from core.errors import DiskFullError
from kernels import store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.manifest import Manifest
    from kernels.matrix import Build, Request


def build_asked(asked: Request, *, force: bool = False) -> list[Manifest]:
    """Build what was asked for, and say what is skipped and why. Raises what `select` and `build_kernels` raise."""
    from kernels.matrix import select

    builds, skipped = select(asked)
    for each in skipped:
        console.say(f"skipping {each.identifier}: {each.error.what}")
    return build_kernels(builds, jobs=int(asked.jobs) if asked.jobs else None, force=force)


def build_kernels(builds: Sequence[Build], *, jobs: int | None = None, force: bool = False) -> list[Manifest]:
    """Bring every build's wheel into the wheelhouse and return their manifests, in the order of `builds`.

    Two runs at once take turns; what the first made, the second finds. `force` builds anew from nothing.
    """
    done = {} if force else _already(builds)
    if len(done) < len(builds):
        from kernels.make import make  # what compiles and inspects is slow to import, and seldom needed

        with files.locked(files.cache() / "build.lock", _say_waiting) as lock:
            done = {} if force else _already(builds)
            missing = [build for build in builds if build.identifier not in done]
            if not missing:  # the run that we waited for has built them
                return [done[build.identifier] for build in builds]
            try:
                done |= make(missing, jobs, lock, force=force)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise DiskFullError(
                    "the disk is full",
                    cause=str(error),
                    hint=f"free some space (the cache is {files.cache()}), then run the same command",
                ) from error
    return [done[build.identifier] for build in builds]


def _already(builds: Sequence[Build]) -> dict[str, Manifest]:
    found = {build.identifier: store.find(build) for build in builds}
    return {identifier: manifest for identifier, manifest in found.items() if manifest is not None}


def _say_waiting() -> None:
    console.say("another build is running; waiting for it to end")


def build_missing(asked: Sequence[Sequence[str]]) -> None:
    """Build what others ask for in the words of `inv build-kernels`: flags, each with its value."""
    from kernels.matrix import Request

    for words in asked:
        fields = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        build_asked(Request(**fields))
