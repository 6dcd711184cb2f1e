"""What is known to be bad: custom nodes and packages, curated in `recipes/comfyui/known-bad.toml`.

Of packages a service knows more (`lock/audit.py`); of custom nodes none knows anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from core import files
from core.config import load
from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Advisory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing that is bad: a `package` of the index, or what lies in a repository (a node, or ComfyUI itself).

    `urls` are the repository's addresses, old ones too. `versions` are ranges, each of them bad; a node's version is
    that of its pyproject.toml. `fixed` is the commit that repaired it. Where neither is said all of it is bad, and no
    deploy takes it. `what` it does, `source` who says so, `ids` what the world calls it.
    """

    what: str
    source: str
    ids: tuple[str, ...] = ()
    package: str = ""
    urls: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    fixed: str = ""

    @property
    def outright(self) -> bool:
        """Whether every version is bad."""
        return not (self.versions or self.fixed)

    @property
    def affected(self) -> str:
        """What is affected, in words."""
        told = [f"versions {' or '.join(self.versions)}"] if self.versions else []
        told += [f"all before commit {self.fixed}"] if self.fixed else []
        return f"affected: {', '.join(told) or 'all of it'}"

    def has(self, version: str) -> bool | None:
        """Whether a version is affected; None when that cannot be told from it."""
        if self.outright:
            return True
        try:
            known = Version(version)
            return any(SpecifierSet(each).contains(known, prereleases=True) for each in self.versions)
        except ValueError:  # no version, or one of more digits than Python takes for a number
            return None


@dataclass(frozen=True)
class Repository:
    """What comes from a repository at a commit: ComfyUI, or a node. `version` is empty where nobody knows it."""

    name: str
    url: str
    commit: str
    version: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    advisory: tuple[Advisory, ...]


def advisories() -> tuple[Advisory, ...]:
    """The curated list; raises ConfigError for an entry that names nothing, or a range that is none."""
    path = files.CHECKOUT / "recipes/comfyui/known-bad.toml"
    found = load(path, _File).advisory
    for each in found:
        if bool(each.package) == bool(each.urls):
            raise ConfigError("config", f"{path}: {each.what!r}: of what?", hint="either `package` or `urls`")
        try:
            SpecifierSet(",".join(each.versions))
        except InvalidSpecifier as error:
            raise ConfigError(
                "config", f"{path}: {each.what!r}: {error}", hint="versions such as '<3.38' or '>=4,<4.0.5'"
            ) from None
    return found


def of(url: str, known: Sequence[Advisory]) -> list[Advisory]:
    """What is known of a repository, however its address is written."""
    return [each for each in known if _same(url) in map(_same, each.urls)]


def _same(url: str) -> str:
    return url.lower().rstrip("/").removesuffix(".git")


def applies(advisory: Advisory, there: Repository, holds: Callable[[str, str, str], bool | None]) -> bool | None:
    """Whether what lies in a repository is affected; None when that cannot be told.

    Its version decides where the entry has ranges and the version is known. Otherwise it is safe when the repair is in
    the history of its commit, which `holds` (url, commit, the commit to look for) tells, or None.
    """
    if advisory.outright or (advisory.versions and there.version):
        told = advisory.has(there.version)
        if told is not None:
            return told
    held = holds(there.url, there.commit, advisory.fixed) if advisory.fixed else None
    return None if held is None else not held
