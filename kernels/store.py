"""The wheels of the wheelhouse that match the current recipes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from core import console, workspace
from core.errors import HearthError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.manifest import Manifest
    from core.wheelhouse import Entry
    from kernels.matrix import Build


def find(build: Build) -> Manifest | None:
    """The manifest of the wheel with this build's key; None when it has to be built."""
    return workspace.current().wheelhouse.find(build.wheel_name, build.key)


def prune() -> list[tuple[Path, str]]:
    """Delete the wheels that no recipe produces any more; returns them with the reasons."""
    return workspace.current().wheelhouse.prune(_outdated)


def _outdated(manifest: Manifest) -> str:
    """The reason why no current recipe produces this wheel; empty if one does."""
    from kernels.matrix import Request, select

    try:
        builds, _ = select(
            Request(
                arch=manifest.arch,
                kernel=manifest.kernel,
                stack=manifest.stack,
                python=manifest.python,
                platform=manifest.platform,
                profile=manifest.profile,
            )
        )
    except HearthError as error:
        return error.what
    same = _recipe_inputs(builds[0].inputs) == _recipe_inputs(manifest.inputs)
    return "" if same else "its recipe or source has changed"


def _recipe_inputs(inputs: dict[str, Any]) -> str:
    """The inputs without the toolchain: a wheel built on a host had that machine's compiler."""
    return json.dumps({**inputs, "toolchain": {}, "zlib": ""}, sort_keys=True)


def summary(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """The wheelhouse for JSON: each manifest, with its wheel's problem."""
    return [{"error": entry.error, **msgspec.to_builtins(entry.manifest)} for entry in found]


def rows(found: Sequence[Entry]) -> list[str]:
    """A table of the wheelhouse; the hash of a "verified" wheel matches its manifest."""
    cells = [
        (
            each.manifest.file,
            each.manifest.key[:16],
            each.manifest.imported.result,
            each.manifest.smoke.result,
            each.error or "verified",
        )
        for each in found
    ]
    empty = ["the wheelhouse is empty; build wheels with: inv build-kernels --arch 12.1"]
    return console.table(("wheel", "key", "import", "GPU", "state"), cells) if found else empty
