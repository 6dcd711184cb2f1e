"""The wheelhouse: finished wheels, each with its manifest beside it. A folder for `--find-links`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from core import console, files
from core import manifest as manifests
from core.errors import HearthError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from core.manifest import Manifest
    from kernels.matrix import Build


@dataclass(frozen=True)
class Entry:
    """One wheel of the wheelhouse with its manifest; `fault` says what is wrong with it, empty when nothing is."""

    manifest: Manifest
    fault: str


def find(build: Build) -> Manifest | None:
    """The manifest of the wheel with this build's key, when the wheel is there, whole and admitted."""
    path = files.wheelhouse() / build.wheel_name
    manifest = manifests.read(path.with_name(path.name + ".json"))
    if manifest is None or manifest.key != build.key or not path.is_file():
        return None
    return manifest if path.stat().st_size == manifest.size else None


def entries() -> list[Entry]:
    """Every wheel of the wheelhouse, its file hashed again."""
    found: list[Entry] = []
    for path in sorted(files.wheelhouse().glob("*.whl.json")):
        manifest = manifests.read(path)
        if manifest is None:
            continue
        wheel = path.with_name(manifest.file)
        fault = ""
        if not wheel.is_file():
            fault = "the wheel is missing"
        elif files.sha256(wheel) != manifest.sha256:
            fault = "the wheel is not the one that was inspected"
        found.append(Entry(manifest, fault))
    return found


def unwanted() -> list[tuple[Path, str]]:
    """Files of the wheelhouse that no recipe asks for any more, each with the reason."""
    house = files.wheelhouse()
    reasons: list[tuple[Path, str]] = []
    listed = {entry.manifest.file: entry for entry in entries()}
    for path in sorted(house.glob("*.whl")):
        entry = listed.get(path.name)
        if entry is None:
            reasons.append((path, "it has no manifest"))
        elif entry.fault:
            reasons.append((path, entry.fault))
        elif reason := _outdated(entry.manifest):
            reasons.append((path, reason))
    orphans = [path for path in sorted(house.glob("*.whl.json")) if not path.with_suffix("").exists()]
    reasons += [(path, "its wheel is missing") for path in orphans]
    reasons += [(path, "left by an interrupted run") for path in sorted(house.glob(".*"))]
    return reasons


def _outdated(manifest: Manifest) -> str:
    """Why no recipe of today gives this wheel; empty when one does."""
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
    return "" if _wanted(builds[0].inputs) == _wanted(manifest.inputs) else "its recipe or source changed since"


def _wanted(inputs: dict[str, Any]) -> str:
    """What the recipe decides. The toolchain is left out: another machine's compiler built what comes from a host."""
    return json.dumps({**inputs, "toolchain": {}}, sort_keys=True)


def prune() -> list[tuple[Path, str]]:
    """Delete what no recipe asks for and return it with the reasons."""
    gone = unwanted()
    for path, _ in gone:
        files.sweep(path)
        path.with_name(path.name + ".json").unlink(missing_ok=True)
    return gone


def summary(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """The wheelhouse for JSON: each manifest, with what is wrong with its wheel."""
    return [{"fault": entry.fault, **msgspec.to_builtins(entry.manifest)} for entry in found]


def rows(found: Sequence[Entry]) -> list[str]:
    """A table of the wheelhouse; "verified" is a wheel whose hash is that of its manifest."""
    cells = [
        (
            each.manifest.file,
            each.manifest.key[:16],
            each.manifest.imported.result,
            each.manifest.smoke.result,
            each.fault or "verified",
        )
        for each in found
    ]
    empty = ["the wheelhouse is empty; fill it with: inv build-kernels --arch 12.1"]
    return console.table(("wheel", "key", "import", "GPU", "state"), cells) if found else empty
