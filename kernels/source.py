"""Lays out a recipe's source for the compilers: patched, with the recipe's own headers."""

from __future__ import annotations

import filecmp
import os
import shutil
from typing import TYPE_CHECKING

from core import tools
from core.errors import SourceError
from core.source import fetch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kernels.recipe import Patch, Recipe


def lay_out(recipe: Recipe, patches: Sequence[Patch], place: Path) -> None:
    """Write the patched source to `place`, changing only files whose content differs.

    Ninja compares modification times: an unchanged file is not compiled again.
    """
    pristine = fetch(recipe)
    fresh = place.with_name(f".{place.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(pristine, fresh, symlinks=True)
    for patch in patches:
        _apply(recipe, patch, fresh)
    if recipe.headers:
        shutil.copytree(recipe.path / recipe.headers, fresh / HEADERS)
    _mirror(fresh, place)
    shutil.rmtree(fresh)


HEADERS = ".hearth-include"
"""The folder of the recipe's own headers in the laid-out tree."""


def _apply(recipe: Recipe, patch: Patch, tree: Path) -> None:
    file = recipe.path / "patches" / patch.file
    # Without the ceiling, git could find a repository that contains the cache, and skip all paths outside it.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = tools.git("apply", "--whitespace=nowarn", "--", file, cwd=tree, env=ceiling, check=False)
    if done.returncode:
        raise SourceError(
            "patch",
            f"{patch.file} does not apply to {recipe.name} {recipe.version}",
            cause=done.stderr.strip(),
            hint="the source has changed: update the patch, or delete it if upstream has applied it",
        )


def _mirror(fresh: Path, place: Path) -> None:
    """Make the files of `place` equal to those of `fresh`, replacing only files that differ."""
    wanted = {path.relative_to(fresh): path.is_dir() for path in fresh.rglob("*")}
    for path in sorted(place.rglob("*"), reverse=True):  # a folder's content before the folder
        if wanted.get(path.relative_to(place)) != path.is_dir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name in (name for name, is_folder in wanted.items() if not is_folder):
        old, new = place / name, fresh / name
        if old.is_file() and old.stat().st_mode == new.stat().st_mode and filecmp.cmp(old, new, shallow=False):
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        new.replace(old)
        os.utime(old)
