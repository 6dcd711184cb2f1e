"""Pins a recipe: fetches its sources, describes them, and writes their hashes into recipe.toml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
import tomlkit
from packaging.metadata import parse_email

from core import console, files
from core.console import counted
from core.errors import SourceError
from core.source import cached
from kernels import source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from core.source import Pinned
    from kernels.recipe import Recipe


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one pin is of: an origin with its files, or a script with what it writes. `before` is the previous pin."""

    origin: str
    tree: str
    before: str
    files: int = 0
    size: int = 0
    content: tuple[str, ...] = ()


def pin(recipe: Recipe, *, replace: bool = False) -> list[Report]:
    """Fetch the sources of a recipe, run its scripts, and write the hashes of both into its file.

    Keys that an sdist's PKG-INFO states are added where the recipe lacks them. Raises SourceError for a pin that would
    change, unless `replace`.
    """
    pinned = source.pinned(recipe)
    found = [_source_report(new, old) for new, old in [(pinned, recipe), *zip(pinned.extra, recipe.extra, strict=True)]]
    for script, old in zip(pinned.generate, recipe.generate, strict=True):
        found.append(Report(origin=script.script, tree=script.tree, before=old.tree))
    changed = [each for each in found if each.before not in ("", each.tree)]
    if changed and not replace:
        raise SourceError(
            "hash-mismatch",
            f"{changed[0].origin} of {recipe.name} differs from its pin",
            cause=f"pinned {changed[0].before}, found {changed[0].tree}",
            hint=f"compare both; if the new one is right: inv kernels.pin {recipe.name} --replace",
        )
    _write(recipe, pinned)
    return found


def _source_report(pinned: Pinned, before: Pinned) -> Report:
    tree = cast("Path", cached(pinned))
    sizes = {name: path.stat().st_size for name, path in files.tree(tree)}
    return Report(
        origin=pinned.source[0].label,
        tree=pinned.tree or files.tree_hash(tree),
        before=before.tree,
        files=len(sizes),
        size=sum(sizes.values()),
        content=tuple(sorted({f"{name.partition('/')[0]}{'/' if '/' in name else ''}" for name in sizes})),
    )


def _write(recipe: Recipe, pinned: Recipe) -> None:
    file = recipe.path / "recipe.toml"
    document: Any = tomlkit.parse(file.read_text())
    if pinned.tree:
        document["tree"] = pinned.tree
    trees = {"extra": [each.tree for each in pinned.extra], "generate": [each.tree for each in pinned.generate]}
    for key, found in trees.items():
        for table, tree in zip(document.get(key, ()), found, strict=True):
            if tree:
                table["tree"] = tree
    for name, value in _stated(cast("Path", cached(pinned))):
        if value and name not in document:
            document[name] = value
    files.write(file, tomlkit.dumps(document))


def _stated(tree: Path) -> Iterator[tuple[str, str]]:
    """Keys of a recipe that an sdist's PKG-INFO states."""
    if (info := tree / "PKG-INFO").is_file():
        raw, _ = parse_email(info.read_bytes())
        yield "summary", raw.get("summary", "")
        yield "license", raw.get("license_expression", "")
        yield "homepage", raw.get("home_page", "") or raw.get("project_urls", {}).get("Homepage", "")
        yield "python", raw.get("requires_python", "")


def rows(found: Sequence[Report]) -> Iterator[str]:
    """What each pin is of."""
    for each in found:
        yield f"{each.origin}: tree {each.tree}{'' if each.before == each.tree else ' (new)'}"
        if each.files:
            yield f"  {counted(each.files, 'file')}, {console.size(each.size)}: {' '.join(each.content)}"
