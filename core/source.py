"""Fetches the source that a recipe pins and checks it against the recipe's hash. Nothing of it is executed."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import msgspec

from core import console, files, foreign, tools, workspace
from core.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    HearthError,
    ProcessError,
    SourceUnreachableError,
    TreeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place to get a source from: git at a commit, an sdist by hash, or a folder of the recipe.

    `subfolder` is where in an sdist the tree lies.
    """

    git: str = ""
    commit: str = ""
    sdist: str = ""
    version: str = ""
    sha256: str = ""
    subfolder: str = ""
    folder: str = ""

    @property
    def label(self) -> str:
        """The source as messages and manifests name it."""
        if self.git:
            return f"{self.git}@{self.commit}"
        return f"sdist {self.sdist}=={self.version}" if self.sdist else f"folder {self.folder}"


class Pinned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a recipe says of its source. Several sources are tried in order, each must give the same tree.

    `tree` is that tree's hash; `paths` and `without` limit it to what is needed, and of a git source only that is
    downloaded; `submodules` are those of a git source that belong to it. `folder` is the recipe's own folder, set
    when it is loaded.
    """

    name: str
    version: str
    source: tuple[Source, ...]
    tree: str
    paths: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    submodules: tuple[str, ...] = ()
    folder: str = ""

    @property
    def path(self) -> Path:
        """The recipe's own folder."""
        return Path(self.folder)


def check(recipe: Pinned) -> None:
    """Refuse sources that name no place or no pin; raises ConfigError."""
    for source in recipe.source:
        kinds = [kind for kind in (source.git, source.sdist, source.folder) if kind]
        if len(kinds) != 1:
            raise ConfigError(f"{recipe.path}: a source is one of git, sdist, folder")
        if source.folder and (Path(source.folder).is_absolute() or ".." in Path(source.folder).parts):
            raise ConfigError(f"{recipe.path}: folder {source.folder!r} is not below the recipe")
        if (source.git and not source.commit) or (source.sdist and not (source.version and source.sha256)):
            raise ConfigError(f"{recipe.path}: a git source needs commit; an sdist needs version and sha256")
        if source.git and not re.fullmatch("[0-9a-f]{40,64}", source.commit):
            raise ConfigError(
                f"{recipe.path}: commit {source.commit!r} is not a whole commit", hint="40 hexadecimal digits"
            )


def cached(recipe: Pinned) -> Path | None:
    """Where the recipe's tree lies already; None when it must be fetched."""
    if own := recipe.source[0].folder:
        return recipe.path / own
    place = _place(recipe)
    return place if recipe.tree and place.is_dir() else None


def intact(recipe: Pinned) -> Path:
    """The tree as `fetch` gives it, hashed again: what is sent is what was pinned, whoever edited the cache."""
    tree = fetch(recipe)
    if not recipe.source[0].folder:
        _check(recipe, recipe.source[0], tree)
    return tree


def _place(recipe: Pinned) -> Path:
    return workspace.current().cache / "sources" / f"{recipe.name}-{recipe.tree[:16]}"


def fetch(recipe: Pinned) -> Path:
    """The recipe's pristine source tree in the cache, fetched from the first source that answers.

    Raises HashMismatchError when what arrives is not what `tree` pins, SourceUnreachableError when no source
    answers. A folder of the recipe itself is used as it is: it is the user's to edit.
    """
    if there := cached(recipe):
        return there
    place = _place(recipe)
    if workspace.current().bundled:
        raise BundleError(f"the bundle lacks {recipe.name} {recipe.version}", hint="make it again: inv bundle")
    failures: list[str] = []
    for source in recipe.source:
        try:
            with files.atomic_dir(place) as part:
                console.say(f"fetching {recipe.name} {recipe.version} from {source.label}")
                _insist(_fetch_git if source.git else _fetch_sdist, source, recipe, part)
                _check(recipe, source, part)
            return place
        except (HashMismatchError, TreeError):
            raise
        except HearthError as error:
            failures.append(f"{source.label}: {error.cause or error.what}")
    raise SourceUnreachableError(
        f"no source of {recipe.name} {recipe.version} could be fetched",
        cause="\n         ".join(failures),
        hint="check the network (and git's url.<mirror>.insteadOf, if you use one), then run the same command",
    )


def pin(recipe: Pinned) -> Pinned:
    """The recipe with the hash of what its source holds now; the tree is in the cache then. For new pins only."""
    (source,) = recipe.source
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        place = Path(folder) / recipe.name
        place.mkdir()
        console.say(f"fetching {recipe.name} {recipe.version} from {source.label}")
        _fetch_git(source, recipe, place)
        pinned = msgspec.structs.replace(recipe, tree=files.tree_hash(place))
        with files.atomic_dir(_place(pinned)) as part:
            shutil.copytree(place, part, dirs_exist_ok=True, symlinks=True)
    return pinned


_PASSING = ("timed out", "reset by peer", "early eof", "hung up", "http/2 stream", "error: 5", "503", "429")
"""What git and the index say when trying again may help."""


def _insist(fetch_one: Callable[[Source, Pinned, Path], None], source: Source, recipe: Pinned, place: Path) -> None:
    """Fetch, and try twice more when the network failed on the way."""
    for pause in (1, 4, 0):
        try:
            return fetch_one(source, recipe, place)
        except (ProcessError, SourceUnreachableError) as error:
            if not pause or not any(sign in f"{error}".lower() for sign in _PASSING):
                raise
            console.say(f"{recipe.name}: the network failed, trying again")
            time.sleep(pause)
            shutil.rmtree(place)
            place.mkdir()
    return None


def _check(recipe: Pinned, source: Source, tree: Path) -> None:
    found = files.tree_hash(tree)
    if found != recipe.tree:
        raise HashMismatchError(
            f"the source of {recipe.name} from {source.label} is not what the recipe pins",
            cause=f"tree {found}, pinned {recipe.tree or '(nothing)'}: altered on the way, or the pin is wrong",
            hint=f"rm -r {shlex.quote(str(tree))} has it fetched again"
            if tree == _place(recipe)
            else f"compare it with the release; only then change `tree` in {recipe.path}",
        )


def _fetch_git(source: Source, recipe: Pinned, place: Path) -> None:
    """Fetch one commit, without history, and write the files that are wanted."""
    tree = foreign.Tree(place, source.label)
    _write_commit(source, recipe, tree, "")
    tree.finish()


def _write_commit(source: Source, recipe: Pinned, tree: foreign.Tree, below: str) -> None:
    """Add a commit's files to a tree, below a folder of it. Blobs of other paths than the wanted never travel.

    Where all is wanted it comes in one answer: each further one would wait for the server again. Nothing is checked
    out: blobs are written as they are, so that no attribute, filter, hook or setting changes a byte. The repository is
    written and not made by git, a program fewer for each of its lines.
    """
    repository = tree.place / ".git"
    own = {"GIT_DIR": str(repository)}
    url = json.dumps(source.git, ensure_ascii=False)  # git quotes its settings in the same way
    config = f'[remote "origin"]\nurl = {url}\n'
    few: list[str] = []
    if recipe.paths or recipe.without:
        config += "[core]\nrepositoryFormatVersion = 1\n[extensions]\npartialClone = origin\n"
        few = ["--filter=blob:none"]
    for name in ("objects", "refs"):
        (repository / name).mkdir(parents=True)
    for name, text in {"HEAD": "ref: refs/heads/main\n", "config": config}.items():
        (repository / name).write_text(text)
    # Without tags the server is not asked what it has: the commit is known.
    fetch = ["fetch", "--quiet", "--no-tags", "--no-auto-maintenance", "--no-write-fetch-head", *few]
    tools.git(*fetch, "--depth=1", "--", "origin", source.commit, env=own)
    with (repository / "names").open("w+b") as raw:
        tools.git("ls-tree", "-r", "-z", "--full-tree", source.commit, output=raw, env=own)
        entries = _entries(raw, source)
    wanted = {
        name: (mode, blob)
        for name, (mode, kind, blob) in entries.items()
        if kind == "blob" and (not recipe.paths or _below(name, recipe.paths)) and not _below(name, recipe.without)
    }
    blobs = "".join(f"{blob}\n" for _, blob in wanted.values())
    if few and blobs:  # cat-file would ask for each one by itself
        tools.git("-c", "fetch.negotiationAlgorithm=noop", *fetch, "--stdin", "origin", input_text=blobs, env=own)
    with (repository / "blobs").open("w+b") as raw:
        tools.git("cat-file", "--batch", input_text=blobs, output=raw, env=own)
        raw.seek(0)
        for name, (mode, _) in wanted.items():
            size = int(raw.readline().split()[2])
            if mode == "120000":
                tree.link(below + name, raw.read(min(size, 4096)))
            else:
                tree.file(below + name, size, files.blocks(raw, size), executable=mode == "100755")
            raw.read(1)  # the line's end
    inner = {name: _submodule(name, source, entries, own) for name in recipe.submodules}
    shutil.rmtree(repository)
    for name, each in inner.items():  # at the commits that the pinned one names
        whole = msgspec.structs.replace(recipe, paths=(), without=(), submodules=())
        _write_commit(each, whole, tree, f"{below}{name}/")


def _entries(raw: IO[bytes], source: Source) -> dict[str, list[str]]:
    """What `git ls-tree -r -z` wrote to a file: mode, kind and object of each path; raises TreeError for too many."""
    if (size := raw.seek(0, os.SEEK_END)) > LISTED:
        raise TreeError(f"{source.label} has too many files", cause=f"{size} bytes of names", hint=foreign.LEAVE_OUT)
    raw.seek(0)
    found: dict[str, list[str]] = {}
    for line in raw.read().split(b"\0")[:-1]:
        about, _, name = line.partition(b"\t")
        found[os.fsdecode(name)] = about.decode().split()
    return found


LISTED = 20_000_000
"""Bytes of all names of a commit: 100,000 files. A few trees, each many times in the next, make any number."""


def _submodule(name: str, source: Source, entries: Mapping[str, Sequence[str]], own: Mapping[str, str]) -> Source:
    """Where a submodule is to be had; raises ConfigError when the commit has none of that path."""
    told = ""
    if ".gitmodules" in entries:
        words = ["config", "--blob", entries[".gitmodules"][2], "-z", "--get-regexp", r"^submodule\..*\.(path|url)$"]
        told = tools.git(*words, env=own, check=False).stdout
    said = dict(each.split("\n", 1) for each in told.split("\0")[:-1])
    url = next(
        (said.get(f"{key[:-4]}url", "") for key, path in said.items() if (key[-5:], path) == (".path", name)), ""
    )
    if not url or entries.get(name, ("",))[0] != "160000":
        raise ConfigError(
            f"{source.label} has no submodule {name!r}", hint="`submodules` has its path in the repository"
        )
    if url.startswith(("./", "../")):  # relative to the repository's own address
        base = source.git.rstrip("/")
        while url.startswith(("./", "../")):
            step, _, url = url.partition("/")
            base = base.rpartition("/")[0] if step == ".." else base
        url = f"{base}/{url}"
    kind = url.partition("://")[0]
    if not (ADDRESS.fullmatch(url) and (kind != "file" or source.git.startswith(("file:", "/")))):
        raise TreeError(
            f"{source.label}: submodule {name!r} comes from {url!r}",
            cause="a repository elsewhere cannot name a folder of this machine, nor another way than https and ssh",
            hint="leave it out of `submodules`",
        )
    return Source(git=url, commit=entries[name][2])


ADDRESS = re.compile(r"(https://(?![^/]*:[^/]*@)|ssh://|file:///|[\w.-]+@[\w.-]+:)(?!-)[\w.~/@:+%-]+", flags=re.ASCII)
"""Of a repository that git asks by https or ssh, or that is a folder: what is not the operator's own has no other."""


def _fetch_sdist(source: Source, recipe: Pinned, place: Path) -> None:
    """Download an sdist by name and SHA-256 from the user's index and unpack it without running it."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, DigestMismatchError, PyPISimple
    from requests import RequestException

    index = tools.index() or PYPI_SIMPLE_ENDPOINT
    archive = place.with_name("sdist.tar.gz")
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

    def wanted(name: str) -> str:
        if source.subfolder:
            inside = name.startswith(f"{source.subfolder}/")
            name = name.removeprefix(f"{source.subfolder}/") if inside else ""
        chosen = not recipe.paths or _below(name, recipe.paths)
        return name if chosen and not _below(name, recipe.without) else ""

    unpack(archive, foreign.Tree(place, source.label), wanted)
    archive.unlink()


def unpack(archive: Path, tree: foreign.Tree, wanted: Callable[[str], str]) -> None:
    """Fill a tree from an sdist, whose one folder is NAME-VERSION; `wanted` names a file there, or says no (empty)."""
    with gzip.open(archive) as raw:
        for member, blocks in foreign.members(cast("IO[bytes]", raw), tree.label):
            name = wanted(member.name.partition("/")[2])
            if name and member.issym():
                tree.link(name, os.fsencode(member.linkname))
            elif name and member.isreg():
                tree.file(name, member.size, blocks, executable=bool(member.mode & 0o100))
    tree.finish()


def _below(name: str, paths: Sequence[str]) -> bool:
    """Whether a file is one of these, or in one of these folders; `*` stands for any part of a name."""
    parts = name.split("/")
    patterns = [path.strip("/").split("/") for path in paths]
    return any(len(each) <= len(parts) and all(map(fnmatchcase, parts, each)) for each in patterns)
