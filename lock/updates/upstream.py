"""What upstream has: commits and tags of repositories, and releases of packages, with their dates."""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from core import shell, tools
from core.errors import ProcessError, SourceError, UsageError
from core.stack import find_stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pypi_simple import PyPISimple

    from core.shell import Done


def cutoff(cooldown: str) -> datetime | None:
    """The time before which a release must be, for a cool-down such as `14d` or `36h`; raises UsageError."""
    found = re.fullmatch(r"(\d{1,4})([hd])", cooldown)
    if cooldown and not found:
        raise UsageError("usage", f"{cooldown!r} is not a cool-down", hint="use days or hours: 14d, 36h")
    hours = int(found[1]) * (24 if found[2] == "d" else 1) if found else 0
    return datetime.now(UTC) - timedelta(hours=hours) if hours else None


def newest(url: str, rev: str = "HEAD") -> str:
    """Return the commit of a repository's branch or tag; raises SourceError or UsageError."""
    if re.fullmatch(r"[0-9a-f]{40}", rev):
        return rev
    found = _references(url, rev, f"{rev}^{{}}")
    if not found:
        raise UsageError("unknown-name", f"{url} has no {rev!r}", hint="use a branch, a tag or a full commit hash")
    return found[-1][0]  # for an annotated tag, the commit follows


def newer(url: str, pinned: str, before: datetime | None = None) -> str:
    """Return a repository's last commit, or the last one `before` a time; the pinned one if none is newer.

    The time is what the committer recorded. Raises SourceError and ProcessError.
    """
    commit = newest(url)
    if before is None or commit == pinned:
        return commit
    with history(url, commit) as git:
        words = ("rev-list", "-1", "--first-parent", f"--before={before.isoformat()}", commit)
        done = git(*words, "--not", pinned, check=False)
        done = git(*words) if done.returncode else done  # the history was rewritten
    return done.stdout.strip() or pinned


def latest(url: str) -> tuple[str, datetime]:
    """Return a repository's last commit and when it was made, in one request; raises SourceError."""
    try:
        with history(url, "HEAD", fetch=("--depth=1", "--filter=tree:0")) as git:
            commit, seconds = git("log", "-1", "--format=%H %ct", "FETCH_HEAD").stdout.split()
    except ProcessError as error:
        raise _unreachable(url, error.cause) from None
    return commit, datetime.fromtimestamp(int(seconds), UTC)


def releases(url: str) -> dict[str, str]:
    """The commits of a repository's version tags (`v1.2.3`), the highest version first; raises SourceError."""
    found: dict[Version, tuple[str, str]] = {}
    for commit, reference in _references(url, "--tags"):
        if tag := re.fullmatch(r"refs/tags/v?(\d+(?:\.\d+)+)(?:\^\{\})?", reference, re.ASCII):
            found[Version(tag[1])] = tag[1], commit
    return {name: commit for _, (name, commit) in sorted(found.items(), reverse=True)}


def _references(url: str, *words: str) -> list[tuple[str, str]]:
    """The commits and names of references, as the server lists them."""
    flags = [each for each in words if each.startswith("--")]
    done = tools.git("ls-remote", *flags, "--", url, *(each for each in words if each not in flags), check=False)
    if done.returncode:
        raise _unreachable(url, shell.last_words(done))
    return re.findall(r"^([0-9a-f]{40})\t(.*)$", done.stdout, re.MULTILINE)


def _unreachable(url: str, cause: str) -> SourceError:
    hint = "check the address and the network"
    return SourceError("source-unreachable", f"{url} cannot be reached", cause=cause, hint=hint)


@contextmanager
def history(url: str, *commits: str, fetch: Iterable[str] = ("--filter=tree:0",)) -> Iterator[partial[Done]]:
    """Clone commits with their history, without files, while the context lasts; yields a function that runs git there.

    `fetch` are the options of `git fetch` instead. Raises ProcessError.
    """
    with tempfile.TemporaryDirectory(prefix="hearth-") as place:
        git = partial(tools.git, env={"GIT_DIR": place})
        for name in ("objects", "refs"):  # what `git init` writes, without its process
            Path(place, name).mkdir()
        Path(place, "HEAD").write_text("ref: refs/heads/main\n")
        Path(place, "config").write_text("[core]\nbare = true\n")
        # Without tags, git requests no references if the commits are known.
        git("fetch", "--quiet", "--no-tags", "--no-auto-maintenance", *fetch, "--", url, *commits)
        yield git


def dates(url: str, commits: Iterable[str]) -> dict[str, datetime]:
    """When these commits were made; raises ProcessError."""
    wanted = [*commits]
    if not wanted:
        return {}
    with history(url, *wanted, fetch=("--depth=1", "--filter=tree:0")) as git:
        lines = git("log", "--no-walk=unsorted", "--format=%H %ct", *wanted).stdout.split("\n")
    found = dict(line.split() for line in lines if line)
    return {commit: datetime.fromtimestamp(int(found[commit]), UTC) for commit in wanted}


@cache
def entries(url: str, commit: str) -> dict[str, str]:
    """The modes of all files of a commit, by name; raises ProcessError."""
    with history(url, commit, fetch=("--depth=1", "--filter=blob:none")) as git:
        listed = git("ls-tree", "-r", "-z", "--full-tree", commit).stdout.split("\0")[:-1]
    return {name: about[:6] for about, _, name in (line.partition("\t") for line in listed)}


def holds(url: str, commit: str, wanted: str) -> bool | None:
    """Whether a commit's history contains another commit; None if the repository cannot be queried."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):  # untrusted input from a host: git would parse --words as options
        return None
    try:
        with history(url, commit) as git:
            return {0: True, 1: False}.get(git("merge-base", "--is-ancestor", wanted, commit, check=False).returncode)
    except ProcessError:
        return None


@dataclass(frozen=True)
class Release:
    """A version of a package; `date` is when it was uploaded, if the index says that."""

    version: str
    date: datetime | None

    @property
    def day(self) -> str:
        """The day of the date, or nothing."""
        return f"{self.date:%Y-%m-%d}" if self.date else ""


@cache
def _index(address: str) -> PyPISimple:
    """A client of an index, whose connections all packages share; a connection's TLS takes longer than a page."""
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

    return PyPISimple(endpoint=address or PYPI_SIMPLE_ENDPOINT)


_CONNECTIONS = BoundedSemaphore(6)
"""Connections to the index at a time."""


def package(name: str, before: datetime | None = None, version: str = "") -> Release:
    """A package's newest release on the user's index, or the one of a `version`; raises SourceError.

    Yanked releases, pre-releases, and those that do not run on the oldest Python of the default stack do not count, nor
    do those that were not uploaded `before` a time.
    """
    from pypi_simple import NoSuchProjectError
    from requests import RequestException

    try:
        with _CONNECTIONS:
            files = _index(tools.index()).get_project_page(name).packages
    except (RequestException, NoSuchProjectError) as error:
        cause, hint = f"{error}", "check the network and the index"
        raise SourceError("source-unreachable", f"{name} was not found on the index", cause=cause, hint=hint) from None
    python, found = find_stack().pythons[0], dict[Version, Release]()
    for each in {each.version: each for each in reversed(files)}.values():  # the files of a release say the same
        try:
            number = Version(each.version or "")
            fits = SpecifierSet(each.requires_python or "").contains(f"{python}.0")
        except (InvalidVersion, InvalidSpecifier):
            continue
        young = before is not None and (each.upload_time is None or each.upload_time > before)
        if str(number) == version or not (version or each.is_yanked or number.is_prerelease or young or not fits):
            found[number] = Release(str(number), each.upload_time)
    if not found:
        when = f" before {before:%Y-%m-%d}" if before else ""
        raise SourceError("source-unreachable", f"the index has no release of {name}{when}")
    return found[max(found)]


def tail(address: str, most: int) -> tuple[int, bytes]:
    """The size of a file of the index, and its last bytes: at most this many; raises SourceError."""
    from requests import RequestException

    try:
        headers = {"Range": f"bytes=-{most}", "Accept-Encoding": "identity"}
        with _CONNECTIONS, _index(tools.index()).s.get(address, headers=headers, stream=True, timeout=30) as answer:
            answer.raise_for_status()
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers["Content-Length"]
            if answer.status_code != 206 and int(whole) > most:
                raise SourceError("source-unreachable", f"the server of {address} does not send parts of files")
            return int(whole), answer.content
    except (RequestException, LookupError, ValueError) as error:
        hint = "check the network and the index"
        raise SourceError("source-unreachable", f"{address} cannot be read", cause=str(error), hint=hint) from None
