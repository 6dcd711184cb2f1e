"""Fetches the pinned source of a recipe and checks its hash. Executes no code of the source."""

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
from typing import IO, TYPE_CHECKING, TypeVar, cast

import msgspec

from core import console, files, foreign, tools, workspace
from core.errors import BundleError, ConfigError, HearthError, ProcessError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One origin of a source: git at a commit, an sdist by hash, or a folder of the recipe.

    `subfolder` is the folder of the tree in a commit or an sdist.
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
        """The source's name in messages and manifests."""
        if self.git:
            return f"{self.git}@{self.commit}"
        return f"sdist {self.sdist}=={self.version}" if self.sdist else f"folder {self.folder}"


class Pinned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The pinned source of a recipe. Several sources are tried in order; each must yield the same tree.

    `tree` is the hash of that tree; `paths` and `without` limit it to the needed files, and only these are downloaded
    from git; `submodules` are the included submodules of a git source. `folder` is the recipe's own folder, set when
    it is loaded.
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
    """Raise ConfigError for a source without an origin or a pin."""
    if not recipe.source:
        raise ConfigError(
            "config", f"{recipe.path}: there is no source", hint="add [[source]] with git, sdist or folder"
        )
    for source in recipe.source:
        kinds = [kind for kind in (source.git, source.sdist, source.folder) if kind]
        if len(kinds) != 1:
            raise ConfigError("config", f"{recipe.path}: a source is one of git, sdist, folder")
        for name in (source.folder, source.subfolder):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ConfigError("config", f"{recipe.path}: folder {name!r} is not a relative path without ..")
        if (source.git and not source.commit) or (source.sdist and not (source.version and source.sha256)):
            raise ConfigError("config", f"{recipe.path}: a git source needs commit; an sdist needs version and sha256")
        if source.folder and source.subfolder:
            raise ConfigError("config", f"{recipe.path}: a folder has no `subfolder`: write it into `folder`")
        if source.git and not re.fullmatch("[0-9a-f]{40,64}", source.commit):
            raise ConfigError(
                "config",
                f"{recipe.path}: commit {source.commit!r} is not a full commit hash",
                hint="use 40 hexadecimal digits",
            )


def cached(recipe: Pinned) -> Path | None:
    """The recipe's tree in the cache; None when it must be fetched."""
    if own := recipe.source[0].folder:
        return recipe.path / own
    place = _place(recipe)
    return place if recipe.tree and place.is_dir() else None


def intact(recipe: Pinned) -> Path:
    """The tree of `fetch`, hashed again to detect edits of the cache."""
    tree = fetch(recipe)
    if not recipe.source[0].folder:
        _check(recipe, recipe.source[0], tree)
    return tree


def _place(recipe: Pinned) -> Path:
    return workspace.current().cache / "sources" / f"{recipe.name}-{recipe.tree[:16]}"


def fetch(recipe: Pinned) -> Path:
    """The recipe's pristine source tree in the cache, fetched from the first source that answers.

    Raises SourceError if no source answers, or if the tree's hash is not `tree`. A folder of the recipe itself is not
    checked, because the user may edit it.
    """
    if there := cached(recipe):
        return there
    if not recipe.tree:
        raise SourceError(
            "unpinned",
            f"the source of {recipe.name} {recipe.version} is not pinned",
            cause="its recipe has no `tree`, the hash of the files",
            hint=f"inv kernels.pin {recipe.name} fetches and shows it, and writes the hash",
        )
    place = _place(recipe)
    if workspace.current().bundled:
        raise BundleError(
            "bundle", f"the bundle lacks {recipe.name} {recipe.version}", hint="create it again: inv bundle"
        )
    _fetch_first(recipe, place)
    return place


def _fetch_first(recipe: Pinned, place: Path) -> None:
    """Fetch the tree from the first source that answers; check its hash if the recipe has one."""
    failures: list[str] = []
    hint = "check the network (and git's url.<mirror>.insteadOf, if you use one), then run the same command again"
    for source in recipe.source:
        try:
            with files.atomic_dir(place) as part:
                console.say(f"fetching {recipe.name} {recipe.version} from {source.label}")
                _fetch_with_retries(_fetch_git if source.git else _fetch_sdist, source, recipe, part)
                if not any(part.iterdir()):
                    chosen = source.subfolder or ", ".join(recipe.paths)
                    raise ConfigError("config", f"{source.label} has no file in {chosen or 'it'}")
                if recipe.tree:
                    _check(recipe, source, part)
            return
        except HearthError as error:
            if error.kind in ("hash-mismatch", "unsafe-tree", "config"):
                raise
            failures.append(f"{source.label}: {error.cause or error.what}")
            hint = error.hint if error.kind == "program-missing" else hint
    raise SourceError(
        "source-unreachable",
        f"no source of {recipe.name} {recipe.version} could be fetched",
        cause="\n".join(failures),
        hint=hint,
    )


P = TypeVar("P", bound=Pinned)


def pin(recipe: P) -> P:
    """Fetch the source and return the recipe with its hash. For new pins only: nothing is compared."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        place = Path(folder) / recipe.name
        _fetch_first(msgspec.structs.replace(recipe, tree=""), place)
        pinned = msgspec.structs.replace(recipe, tree=files.tree_hash(place))
        with files.atomic_dir(_place(pinned)) as part:
            shutil.copytree(place, part, dirs_exist_ok=True, symlinks=True)
    return pinned


TRANSIENT = ("timed out", "reset by peer", "early eof", "hung up", "http/2 stream", "error: 5", "503", "429")
"""Parts of messages of git and the index after which a retry may succeed."""


def _fetch_with_retries(
    fetch_one: Callable[[Source, Pinned, Path], None], source: Source, recipe: Pinned, place: Path
) -> None:
    """Fetch, with two retries after transient network errors."""
    for pause in (1, 4, 0):
        try:
            return fetch_one(source, recipe, place)
        except (ProcessError, SourceError) as error:
            transient = error.kind in ("process", "source-unreachable")
            if not pause or not transient or not any(sign in f"{error}".lower() for sign in TRANSIENT):
                raise
            console.say(f"{recipe.name}: network error, retrying")
            time.sleep(pause)
            shutil.rmtree(place)
            place.mkdir()
    return None


def _check(recipe: Pinned, source: Source, tree: Path) -> None:
    found = files.tree_hash(tree)
    if found != recipe.tree:
        raise SourceError(
            "hash-mismatch",
            f"the source of {recipe.name} from {source.label} differs from the recipe's pin",
            cause=f"tree {found}, pinned {recipe.tree}: altered in transit, or the pin is wrong",
            hint=f"rm -r {shlex.quote(str(tree))}, then run the same command again to fetch it"
            if tree == _place(recipe)
            else f"compare it with the release; only then change `tree` in {recipe.path}",
        )


def _fetch_git(source: Source, recipe: Pinned, place: Path) -> None:
    """Fetch one commit, without history, and write the files that are wanted."""
    tree = foreign.Tree(place, source.label)
    _write_commit(source, recipe, tree, "")
    tree.finish()


def _write_commit(source: Source, recipe: Pinned, tree: foreign.Tree, below: str) -> None:
    """Add a commit's files to a tree, below a folder of it. Only the blobs of wanted paths are downloaded.

    All files come in one response if all are wanted, which saves round trips. Nothing is checked out: blobs are written
    as they are, so that no attribute, filter, hook or setting changes a byte. The repository is written without git,
    which saves processes.
    """
    repository = tree.place / ".git"
    own = {"GIT_DIR": str(repository)}
    url = json.dumps(source.git, ensure_ascii=False)  # git quotes its settings in the same way
    config = f'[remote "origin"]\nurl = {url}\n'
    few: list[str] = []
    if recipe.paths or recipe.without or source.subfolder:
        config += "[core]\nrepositoryFormatVersion = 1\n[extensions]\npartialClone = origin\n"
        few = ["--filter=blob:none"]
    for name in ("objects", "refs"):
        (repository / name).mkdir(parents=True)
    for name, text in {"HEAD": "ref: refs/heads/main\n", "config": config}.items():
        (repository / name).write_text(text)
    # Without tags, git does not ask the server for its references: the commit is known.
    fetch = ["fetch", "--quiet", "--no-tags", "--no-auto-maintenance", "--no-write-fetch-head", *few]
    tools.git(*fetch, "--depth=1", "--", "origin", source.commit, env=own)
    with (repository / "names").open("w+b") as raw:
        tools.git("ls-tree", "-r", "-z", "--full-tree", source.commit, output=raw, env=own)
        entries = _entries(raw, source)
    wanted = {
        inner: (mode, blob)
        for name, (mode, kind, blob) in entries.items()
        if kind == "blob" and (inner := _wanted(name, source, recipe))
    }
    blobs = "".join(f"{blob}\n" for _, blob in wanted.values())
    if few and blobs:  # else cat-file would request each blob separately
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
    modules = {name: _submodule(name, source, entries, own) for name in recipe.submodules}
    shutil.rmtree(repository)
    for name, each in modules.items():  # at the commits that the pinned one names
        whole = msgspec.structs.replace(recipe, paths=(), without=(), submodules=())
        _write_commit(each, whole, tree, f"{below}{name}/")


def _entries(raw: IO[bytes], source: Source) -> dict[str, list[str]]:
    """Parse the output of `git ls-tree -r -z`: mode, type and object of each path. Raises SourceError for too many."""
    if (size := raw.seek(0, os.SEEK_END)) > LISTED:
        raise SourceError(
            "unsafe-tree",
            f"{source.label} has too many files",
            cause=f"their names have {size} bytes",
            hint=foreign.LEAVE_OUT,
        )
    raw.seek(0)
    found: dict[str, list[str]] = {}
    for line in raw.read().split(b"\0")[:-1]:
        about, _, name = line.partition(b"\t")
        found[os.fsdecode(name)] = about.decode().split()
    return found


LISTED = 20_000_000
"""Maximum bytes of all names of a commit, about 100,000 files. A few nested trees can describe any number."""


def _submodule(name: str, source: Source, entries: Mapping[str, Sequence[str]], own: Mapping[str, str]) -> Source:
    """The source of a submodule; raises ConfigError when the commit has no submodule of that path."""
    output = ""
    name = f"{source.subfolder}/{name}" if source.subfolder else name
    if ".gitmodules" in entries:
        words = ["config", "--blob", entries[".gitmodules"][2], "-z", "--get-regexp", r"^submodule\..*\.(path|url)$"]
        output = tools.git(*words, env=own, check=False).stdout
    values = dict(each.split("\n", 1) for each in output.split("\0")[:-1])
    url = next(
        (values.get(f"{key[:-4]}url", "") for key, path in values.items() if (key[-5:], path) == (".path", name)), ""
    )
    if not url or entries.get(name, ("",))[0] != "160000":
        raise ConfigError(
            "config", f"{source.label} has no submodule {name!r}", hint="set `submodules` to paths in the repository"
        )
    if url.startswith(("./", "../")):  # relative to the repository's own address
        base = source.git.rstrip("/")
        while url.startswith(("./", "../")):
            step, _, url = url.partition("/")
            base = base.rpartition("/")[0] if step == ".." else base
        url = f"{base}/{url}"
    kind = url.partition("://")[0]
    if not (ADDRESS.fullmatch(url) and (kind != "file" or source.git.startswith(("file:", "/")))):
        raise SourceError(
            "unsafe-tree",
            f"{source.label}: submodule {name!r} comes from {url!r}",
            cause="a remote repository's submodules must have https or ssh addresses",
            hint="remove it from `submodules`",
        )
    return Source(git=url, commit=entries[name][2])


ADDRESS = re.compile(r"(https://(?![^/]*:[^/]*@)|ssh://|file:///|[\w.-]+@[\w.-]+:)(?!-)[\w.~/@:+%-]+", flags=re.ASCII)
"""Allowed addresses of repositories that the operator did not write: https, ssh, or a folder."""


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
                raise SourceError(
                    "hash-mismatch",
                    f"no sdist {source.sdist}=={source.version} on the index has the pinned hash",
                    cause=f"pinned sha256 {source.sha256}, offered "
                    + ", ".join(package.digests.get("sha256", "none") for package in matching),
                    hint="compare it with the release; only then change the recipe",
                )
            if not pinned:
                raise SourceError("source-unreachable", f"the index has no sdist {source.sdist}=={source.version}")
            client.download_package(pinned[0], archive)
    except DigestMismatchError as error:
        raise SourceError(
            "hash-mismatch", f"the sdist {source.sdist}=={source.version} was altered in transit", cause=str(error)
        ) from error
    except (RequestException, ValueError) as error:
        raise SourceError("source-unreachable", f"the package index did not answer: {error}") from error

    unpack(archive, foreign.Tree(place, source.label), lambda name: _wanted(name, source, recipe))
    archive.unlink()


def unpack(archive: Path, tree: foreign.Tree, wanted: Callable[[str], str]) -> None:
    """Fill a tree from an sdist, whose only folder is NAME-VERSION; `wanted` maps a file to its path, "" skips it."""
    with gzip.open(archive) as raw:
        for member, blocks in foreign.members(cast("IO[bytes]", raw), tree.label):
            name = wanted(member.name.partition("/")[2])
            if name and member.issym():
                tree.link(name, os.fsencode(member.linkname))
            elif name and member.isreg():
                tree.file(name, member.size, blocks, executable=bool(member.mode & 0o100))
    tree.finish()


def _wanted(name: str, source: Source, recipe: Pinned) -> str:
    """The path in the tree of a file of a commit or an archive; empty for one that is left out."""
    folder = f"{source.subfolder.strip('/')}/" if source.subfolder else ""
    inner = name.removeprefix(folder)
    inside = name.startswith(folder) and (not recipe.paths or _below(inner, recipe.paths))
    return inner if inside and not _below(inner, recipe.without) else ""


def _below(name: str, paths: Sequence[str]) -> bool:
    """Whether a file is one of these, or in one of these folders; `*` stands for any part of a name."""
    parts = name.split("/")
    patterns = [path.strip("/").split("/") for path in paths]
    return any(len(each) <= len(parts) and all(map(fnmatchcase, parts, each)) for each in patterns)
