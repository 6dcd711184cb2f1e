"""Lays out a recipe's source for the compilers: with additional sources, patches, generated files and headers."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import files, shell, tools
from core.errors import SourceError
from core.source import intact, pin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.recipe import Generate, Patch, Recipe


def lay_out(recipe: Recipe, patches: Sequence[Patch], place: Path) -> None:
    """Write the patched source to `place`, changing only files whose content differs.

    Ninja compares modification times: an unchanged file is not compiled again. Raises SourceError for an unpinned
    source, and for a script that writes other files than when it was pinned.
    """
    fresh = place.with_name(f".{place.name}.fresh")
    _write_patched(recipe, patches, fresh)
    for each in recipe.generate:
        _check_generated(recipe, each, _generate(recipe, each, fresh))
    if recipe.headers:
        shutil.copytree(recipe.path / recipe.headers, fresh / HEADERS)
    _mirror(fresh, place)
    shutil.rmtree(fresh)


HEADERS = ".hearth-include"
"""The folder of the recipe's own headers in the laid-out tree."""


def _write_patched(recipe: Recipe, patches: Sequence[Patch], place: Path) -> None:
    """Write the source with the additional sources and the patches to `place`."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(intact(recipe), place, symlinks=True)
    for each in recipe.extra:
        shutil.copytree(intact(each), place / each.into, symlinks=True, dirs_exist_ok=True)
    for patch in patches:
        _apply(recipe, patch, place)


def _generate(recipe: Recipe, each: Generate, tree: Path) -> str:
    """Run a script in the tree, with the build's environment; returns the hash of the files that it writes."""
    before = _stamps(tree)
    # -s: no package of the user; -B: no bytecode in the tree; and one order of sets, which is random otherwise.
    env = {"PYTHONHASHSEED": "0"}
    done = tools.build(sys.executable, "-sB", each.script, *each.args, cwd=tree, env=env, check=False)
    written = [name for name, stamp in _stamps(tree).items() if stamp != before.get(name)]
    if done.returncode or not written:
        what = f"{each.script} of {recipe.name} {recipe.version} {'failed' if done.returncode else 'writes no file'}"
        raise SourceError("generate", what, cause=shell.last_words(done))
    return files.tree_hash(tree, written)


def _stamps(tree: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file is written, by its path in the tree."""
    stats = {str(path.relative_to(tree)): path.stat() for path in tree.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _check_generated(recipe: Recipe, each: Generate, found: str) -> None:
    if found != each.tree:
        raise SourceError(
            "hash-mismatch" if each.tree else "unpinned",
            f"the files that {each.script} of {recipe.name} {recipe.version} writes differ from the recipe's pin"
            if each.tree
            else f"the files that {each.script} of {recipe.name} {recipe.version} writes are not pinned",
            cause=f"they have the hash {found}, pinned {each.tree or '(nothing)'}",
            hint=f"inv kernels.pin {recipe.name} runs the script again, and writes the hash",
        )


def pinned(recipe: Recipe) -> Recipe:
    """Fetch the sources, run the scripts, and return the recipe with the hashes of both. Nothing is compared.

    Scripts run on the source with the patches that apply to all stacks and profiles.
    """
    own = recipe.source[0].folder
    recipe = msgspec.structs.replace(
        recipe if own else pin(recipe),
        extra=tuple(each if each.source[0].folder else pin(each) for each in recipe.extra),
    )
    if not recipe.generate:
        return recipe
    common = [patch for patch in recipe.patches if not (patch.cuda or patch.torch or patch.profiles)]
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        place = Path(folder) / "src"
        _write_patched(recipe, common, place)
        made = [msgspec.structs.replace(each, tree=_generate(recipe, each, place)) for each in recipe.generate]
    return msgspec.structs.replace(recipe, generate=tuple(made))


def _apply(recipe: Recipe, patch: Patch, tree: Path) -> None:
    file = recipe.path / "patches" / patch.file
    # Without the ceiling, git could find a repository that contains the cache, and skip all paths outside it.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = tools.git("apply", "--whitespace=nowarn", "--", file, cwd=tree, env=ceiling, check=False)
    if done.returncode:
        raise SourceError(
            "patch",
            f"{patch.file} does not apply to {recipe.name} {recipe.version}",
            cause=shell.last_words(done),
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
        os.utime(new)  # before the rename: after a crash between both, the object would seem up to date
        new.replace(old)
