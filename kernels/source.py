"""Fetches a recipe's source, checks it against the recipe's hash, patches it. Nothing of it is executed."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from core import console, files, shell
from core.errors import HashMismatchError, HearthError, PatchError, SourceUnreachableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.recipe import Patch, Recipe, Source


def fetch(recipe: Recipe) -> Path:
    """The recipe's pristine source tree in the cache, fetched from the first source that answers.

    Raises HashMismatchError when what arrives is not what `tree` pins, SourceUnreachableError when no source
    answers. A folder of the recipe itself is used as it is: it is the user's to edit.
    """
    first = recipe.source[0]
    if first.folder:
        return recipe.path / first.folder
    place = files.cache() / "sources" / f"{recipe.name}-{recipe.tree[:16]}"
    if recipe.tree and place.is_dir():
        return place
    failures: list[str] = []
    for source in recipe.source:
        try:
            with files.whole(place) as part:
                console.say(f"fetching {recipe.name} {recipe.version} from {source.label}")
                (_fetch_git if source.git else _fetch_sdist)(source, part)
                _check(recipe, source, part)
            return place
        except HashMismatchError:
            raise
        except HearthError as error:
            failures.append(f"{source.label}: {error.cause or error.what}")
    raise SourceUnreachableError(
        f"no source of {recipe.name} {recipe.version} could be fetched",
        cause="\n         ".join(failures),
        hint="check the network (and git's url.<mirror>.insteadOf, if you use one), then run the same command",
    )


def _check(recipe: Recipe, source: Source, tree: Path) -> None:
    found = files.tree_hash(tree)
    if found != recipe.tree:
        raise HashMismatchError(
            f"the source of {recipe.name} from {source.label} is not what the recipe pins",
            cause=f"tree {found}, pinned {recipe.tree or '(nothing)'}: altered on the way, or the pin is wrong",
            hint=f"compare it with the release; only then change `tree` in {recipe.path / 'recipe.toml'}",
        )


def _fetch_git(source: Source, place: Path) -> None:
    """Fetch one commit, without history, and check out only `paths`: blobs of other paths never travel."""
    git = ["git", "-C", str(place), "-c", "advice.detachedHead=false"]
    quiet = {"GIT_TERMINAL_PROMPT": "0"}
    shell.run([*git, "init", "--quiet"])
    shell.run([*git, "remote", "add", "origin", source.git])
    shell.run([*git, "config", "extensions.partialClone", "origin"])
    if source.paths:
        patterns = [f"/{path}" for path in source.paths]
        shell.run([*git, "sparse-checkout", "set", "--no-cone", *patterns])
    shell.run([*git, "fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", source.commit], env=quiet)
    shell.run([*git, "checkout", "--quiet", source.commit], env=quiet)
    shutil.rmtree(place / ".git")


def _fetch_sdist(source: Source, place: Path) -> None:
    """Download an sdist by name and SHA-256 from the user's index and unpack it without running it."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, DigestMismatchError, PyPISimple
    from requests import RequestException

    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or PYPI_SIMPLE_ENDPOINT
    archive = place / "sdist.tar.gz"
    try:
        with PyPISimple(endpoint=index) as client:
            page = client.get_project_page(source.sdist)
            matching = [
                package
                for package in page.packages
                if package.package_type == "sdist" and package.version == source.version
            ]
            pinned = [package for package in matching if package.digests.get("sha256") == source.sha256]
            if matching and not pinned:
                raise HashMismatchError(
                    f"no sdist {source.sdist}=={source.version} on the index has the pinned hash",
                    cause=f"pinned sha256 {source.sha256}, offered "
                    + ", ".join(package.digests.get("sha256", "none") for package in matching),
                    hint="compare it with the release; only then change the recipe",
                )
            if not pinned:
                raise SourceUnreachableError(f"the index has no sdist {source.sdist}=={source.version}")
            client.download_package(pinned[0], archive)
    except DigestMismatchError as error:
        raise HashMismatchError(
            f"the sdist {source.sdist}=={source.version} was altered on the way", cause=str(error)
        ) from error
    except (RequestException, ValueError) as error:
        raise SourceUnreachableError(f"the package index did not answer: {error}") from error
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]  # an sdist holds one folder, NAME-VERSION
            if not source.paths or any(f"{name}/".startswith(f"{path}/") for path in source.paths):
                tar.extract(member.replace(name=name), place, filter="data")
    archive.unlink()


def lay_out(recipe: Recipe, patches: Sequence[Patch], place: Path) -> None:
    """Lay the patched source at `place`, touching only files whose content differs.

    Ninja goes by modification times: a file left alone is a file not compiled again.
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
"""Where the recipe's own headers lie in the laid-out tree."""


def _apply(recipe: Recipe, patch: Patch, tree: Path) -> None:
    file = recipe.path / "patches" / patch.file
    # Without the ceiling, git would find a repository around the cache and skip every path outside it.
    ceiling = {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = shell.run(["git", "apply", "--whitespace=nowarn", str(file)], cwd=tree, env=ceiling, check=False)
    if done.returncode:
        raise PatchError(
            f"{patch.file} does not apply to {recipe.name} {recipe.version}",
            cause=done.stderr.strip(),
            hint="the source changed under the patch: make it anew, or drop it if upstream took it",
        )


def _mirror(fresh: Path, place: Path) -> None:
    """Make `place` hold exactly what `fresh` holds, replacing only what differs."""
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if not path.is_dir()}
    for path in [path for path in place.rglob("*") if not path.is_dir()]:
        if path.relative_to(place) not in wanted:
            path.unlink()
    for name in wanted:
        old, new = place / name, fresh / name
        if old.is_file() and old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes():
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        new.replace(old)
        os.utime(old)
