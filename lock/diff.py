"""The differences between two releases: a pure function over their manifests."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from agent.schema.manifest import ReleaseManifest
from core.typed import from_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Change:
    """One difference: kind, name and both values; a missing value is empty."""

    kind: str
    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Difference:
    """The differences between the releases `old` and `new`, and the parts that they share.

    `files` is a unified diff of the unit and a release's other files, with each release's own id replaced by `@`.
    `unknown` are kinds that cannot be compared, because an older Hearth made one release and did not record them.
    """

    old: str
    new: str
    changes: tuple[Change, ...]
    files: tuple[str, ...]
    shared: tuple[str, ...]
    unknown: tuple[str, ...]


_PLAIN = {
    "version": "ComfyUI",
    "stack": "stack",
    "torch": "torch",
    "python": "Python",
    "platform": "platform",
    "profile": "profile",
}


def compare(old: ReleaseManifest, new: ReleaseManifest) -> Difference:
    """Compare two releases' manifests."""
    before, after = _kinds(_nameless(old)), _kinds(_nameless(new))
    unknown = tuple(kind for kind in before if before[kind] is None or after[kind] is None)
    changes: list[Change] = []
    for kind, left in before.items():
        right = after[kind]
        if left is not None and right is not None:
            differing = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
            changes += [Change(kind, name, left.get(name, ""), right.get(name, "")) for name in differing]
    shared = tuple(name for name, part in old.parts.items() if new.parts.get(name) == part)
    return Difference(old.id, new.id, tuple(changes), tuple(_files(old, new)), shared, unknown)


def _nameless(manifest: ReleaseManifest) -> ReleaseManifest:
    """A manifest with its own id, which every path of a release contains, replaced by `@`."""
    return from_json(msgspec.json.encode(manifest).replace(manifest.id.encode(), b"@"), ReleaseManifest)


def _kinds(manifest: ReleaseManifest) -> dict[str, Mapping[str, str] | None]:
    """All compared values, by kind and name; None for kinds that the manifest does not record."""
    wheels = manifest.wheels
    return {
        "release": {word: getattr(manifest, key) for key, word in _PLAIN.items()},
        "package": manifest.packages,
        "node": {name: f"{node.url} {node.commit}" for name, node in manifest.nodes.items()},
        "kernel": manifest.kernels,
        # a rebuilt wheel is different, even with the same version
        "wheel": None
        if wheels is None
        else {name: f"{each.file} sha256:{each.sha256}" for name, each in wheels.items()},
        "flag": _flags(manifest.argv),
        "variable": manifest.environment,
        "gate": {name: json.dumps(value) for name, value in vars(manifest.gate).items() if name not in _PLAIN},
        "part": manifest.parts,
    }


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """The flags of a command line with their values; the first two words are the interpreter and main.py."""
    found: dict[str, list[str]] = {}
    for word in argv[2:]:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return {name: " ".join(values) or "on" for name, values in found.items()}


def _files(old: ReleaseManifest, new: ReleaseManifest) -> Iterator[str]:
    before, after = _nameless(old).files, _nameless(new).files
    for name in sorted(before.keys() | after.keys()):
        left, right = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        yield from difflib.unified_diff(left, right, f"{old.id}/{name}", f"{new.id}/{name}", lineterm="", n=1)


def rows(found: Difference) -> Iterator[str]:
    """One line per difference, then the diff of the files."""
    if not (found.changes or found.files):
        yield f"{found.old} and {found.new} do not differ"
    for each in found.changes:
        name = each.name if each.kind == "release" else f"{each.kind} {each.name}"
        yield f"{name}: {each.old or 'none'} -> {each.new or 'none'}"
    yield from found.files
    yield f"shared parts: {', '.join(found.shared) or 'none'}"
    if found.unknown:
        yield f"not compared, because an older Hearth did not record it: {', '.join(found.unknown)}"
