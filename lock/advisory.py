"""Known-bad custom nodes and packages, curated in `recipes/comfyui/known-bad.toml`.

For packages, an online service knows more (`lock/audit.py`); for custom nodes, no such service exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from core import files
from core.config import load
from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path


class Advisory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One known problem of an index `package`, or of the code in a repository (a node, or ComfyUI itself).

    `urls` are the repository's addresses, including old ones. `versions` are the affected ranges; a node's version is
    that of its pyproject.toml. `fixed` is the commit with the fix. Without `versions` and `fixed`, all versions are
    affected and no deploy accepts them. `what` describes the effect, `source` is the reporter, `ids` are public
    identifiers. `inv lock` avoids affected versions of a package; `tolerated` is the reason to keep one.
    """

    what: str
    source: str
    ids: tuple[str, ...] = ()
    package: str = ""
    urls: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    fixed: str = ""
    tolerated: str = ""

    @property
    def outright(self) -> bool:
        """Whether all versions are affected."""
        return not (self.versions or self.fixed)

    @property
    def affected(self) -> str:
        """The affected versions, in words."""
        ranges = [f"versions {' or '.join(self.versions)}"] if self.versions else []
        ranges += [f"all before commit {self.fixed}"] if self.fixed else []
        return f"affected: {', '.join(ranges) or 'all versions'}"

    def has(self, version: str) -> bool | None:
        """Whether a version is affected; None if its version string does not allow a decision."""
        if self.outright:
            return True
        try:
            known = Version(version)
            return any(SpecifierSet(each).contains(known, prereleases=True) for each in self.versions)
        except ValueError:  # not a version, or one with more digits than Python converts to a number
            return None


@dataclass(frozen=True)
class Repository:
    """The code of a repository at a commit: ComfyUI or a node. `version` is empty if unknown."""

    name: str
    url: str
    commit: str
    version: str


@dataclass(frozen=True)
class BadPackage:
    """A locked package that an advisory concerns."""

    name: str
    version: str
    advisory: Advisory

    @property
    def constraint(self) -> str:
        """A constraint that excludes the version."""
        return f"{self.name}!={self.version}"

    @property
    def said(self) -> str:
        """The package, what is wrong, and who says so."""
        return f"{self.name} {self.version}: {self.advisory.what} ({self.advisory.source})"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    advisory: tuple[Advisory, ...]
    same_files: tuple[tuple[str, ...], ...] = ()


def _path() -> Path:
    return files.CHECKOUT / "recipes/comfyui/known-bad.toml"


def clashing(names: Collection[str]) -> list[list[str]]:
    """The packages that install the same files, in groups of which only one can be installed; the best one first."""
    listed = load(_path(), _File).same_files
    groups: list[list[str]] = [[name for name in map(canonicalize_name, group) if name in names] for group in listed]
    return [group for group in groups if len(group) > 1]


def bad_packages(versions: Mapping[str, str], known: Sequence[Advisory] | None = None) -> list[BadPackage]:
    """The packages that have an affected version."""
    concerned = [each for each in known or advisories() if each.package in versions]
    return [
        BadPackage(each.package, versions[each.package], each) for each in concerned if each.has(versions[each.package])
    ]


def advisories() -> tuple[Advisory, ...]:
    """Return the curated list; raises ConfigError for an entry without a subject or with an invalid range."""
    path = _path()
    listed = load(path, _File).advisory
    found = tuple(msgspec.structs.replace(each, package=canonicalize_name(each.package)) for each in listed)
    for each in found:
        if bool(each.package) == bool(each.urls):
            raise ConfigError(
                "config",
                f"{path}: {each.what!r}: has neither `package` nor `urls`, or both",
                hint="set either `package` or `urls`",
            )
        try:
            SpecifierSet(",".join(each.versions))
        except InvalidSpecifier as error:
            raise ConfigError(
                "config", f"{path}: {each.what!r}: {error}", hint="use versions such as '<3.38' or '>=4,<4.0.5'"
            ) from None
    return found


def of(url: str, known: Sequence[Advisory]) -> list[Advisory]:
    """Return the advisories of a repository, regardless of the spelling of its address."""
    return [each for each in known if _same(url) in map(_same, each.urls)]


def _same(url: str) -> str:
    return url.lower().rstrip("/").removesuffix(".git")


def applies(advisory: Advisory, there: Repository, holds: Callable[[str, str, str], bool | None]) -> bool | None:
    """Whether the code of a repository is affected; None if unknown.

    The version decides if the advisory has ranges and the version is known. Otherwise the code is safe if the history
    of its commit contains the fix: `holds` (url, commit, wanted commit) returns that, or None if unknown.
    """
    if advisory.outright or (advisory.versions and there.version):
        listed = advisory.has(there.version)
        if listed is not None:
            return listed
    held = holds(there.url, there.commit, advisory.fixed) if advisory.fixed else None
    return None if held is None else not held
