"""Requirements of a tree by unknown authors, read as pip reads them.

Unlike pip, it reads no files outside the tree and no variables, and uses no network. docs/decisions/0006-libraries.md
gives the reason for a parser of its own; a test compares it with pip's.
"""

from __future__ import annotations

import codecs
import optparse
import posixpath
import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import tomli

from core import files, foreign
from core.errors import ConfigError
from core.typed import convert

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Listed:
    """What a tree requires, one requirement per string; `ignored` are option lines that have no effect here."""

    requirements: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Requirements and constraints, the latter as `-c NAME<2`."""
        return [*self.requirements, *(f"-c {each}" for each in self.constraints)]


FILES = 50
"""Maximum files that a requirements.txt may include."""


def read(tree: Path, name: str = "requirements.txt") -> Listed:
    """The requirements of a tree: from its requirements.txt, or the file `name`, else from pyproject.toml.

    Raises ConfigError for what cannot be read without running code or using the network; SourceError for special files.
    """
    found = Listed()
    if (tree / name).exists():
        _follow(tree, name, found, set(), constraint=False)
    else:
        _project(tree, found)
    return found


def _follow(tree: Path, name: str, found: Listed, seen: set[tuple[str, bool]], *, constraint: bool) -> None:
    """Add what a requirements file and the files that it includes ask for."""
    if (name, constraint) in seen:
        return
    seen.add((name, constraint))
    if name.startswith(("/", "../")) or ":" in name or not files.plain(name) or len(seen) > FILES:
        raise _unreadable(tree, name, f"only up to {FILES} files of the same tree can be included")
    try:
        content = _decoded(foreign.content(tree / name, foreign.TEXT))
    except OSError as error:
        raise _unreadable(tree, name, str(error.strerror)) from None
    except (LookupError, UnicodeError) as error:
        raise _unreadable(tree, name, str(error)) from None
    for line in _lines(content):
        requirement, words = _split(line)
        try:
            options, _ = _OPTIONS.parse_args(shlex.split(words))
            if not all(re.match(r"sha(256|384|512):", each) for each in options.hash or []):
                raise ValueError("--hash is not such as sha256:0123...")
        except ValueError as error:
            raise _unreadable(tree, name, f"{line[:200]!r}: {error}") from None
        if wanted := (requirement or (options.editable or [""])[0]).strip():
            (found.constraints if constraint else found.requirements).append(_hashed(wanted, options.hash or []))
        elif included := options.requirement or options.constraint:
            inner = posixpath.normpath(posixpath.join(posixpath.dirname(name), included[0]))
            _follow(tree, inner, found, seen, constraint=not options.requirement)
        else:
            found.ignored.append(line)


def _unreadable(tree: Path, name: str, cause: str) -> ConfigError:
    first = "requirements.txt" if (tree / "requirements.txt").exists() else "pyproject.toml"
    hint = f'list its packages in `extra`, and leave the file out: without = ["{first}"]'
    return ConfigError("config", f"{name} of {tree.name} cannot be read", cause=cause, hint=hint)


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its prefix
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
)


def _decoded(data: bytes) -> str:
    """Text in the encoding of its BOM or PEP 263 comment, else UTF-8, else Latin-1 (pip: the locale's)."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(encoding)
    for line in data.split(b"\n", 2)[:2]:
        if line.startswith(b"#") and (named := re.search(rb"coding[:=]\s*([-\w.]+)", line)):
            name = codecs.lookup(named[1].decode("ascii")).name
            if name == "punycode":  # it takes minutes, and no text has it
                raise LookupError("punycode is not an encoding of files")
            return data.decode(name)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _lines(text: str) -> Iterator[str]:
    """Logical lines without comments. pip's own pattern for comments is quadratic."""
    parts: list[str] = []
    for line in [*text.splitlines(), "#"]:  # a comment ends a continued line
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            parts.append(line.strip("\\"))
            continue
        joined = "".join([*parts, f" {line}" if line.lstrip().startswith("#") else line])
        parts = []
        if wanted := re.split(r"(?:^|\s)#", joined, maxsplit=1)[0].strip():
            yield wanted


def _split(line: str) -> tuple[str, str]:
    """Split a line into its requirement and its options. A line that is too long is no option."""
    words = line.split(" ") if len(line) <= foreign.LINE else [line]
    count = next((count for count, word in enumerate(words) if word.startswith("-")), len(words))
    return " ".join(words[:count]).strip(), " ".join(words[count:])


def _hashed(requirement: str, hashes: list[str]) -> str:
    """A requirement with the hash of its address as the address's fragment, uv's form; an index has its own hashes."""
    digests = {each for each in hashes if re.fullmatch(r"sha256:[0-9a-f]{64}", each)}
    address = re.search(r"https?://[^\s#]+(#\S+)?", requirement)
    if address is None or len(digests) != 1 or "sha256=" in (address[1] or ""):
        return requirement
    fragment = f"{'&' if address[1] else '#'}{digests.pop().replace(':', '=')}"
    return requirement[: address.end()] + fragment + requirement[address.end() :]


class _Parser(optparse.OptionParser):
    """pip's options of requirements files; pip uses optparse, too."""

    def error(self, msg: str) -> NoReturn:
        raise ValueError(msg)


_OPTIONS = _Parser(add_help_option=False)
for _names in (
    *("-r --requirement", "-c --constraint", "-e --editable", "--hash", "-C --config-settings --config-setting"),
    *("-i --index-url --pypi-url", "--extra-index-url", "-f --find-links", "--trusted-host", "--use-feature"),
    *("--no-binary", "--only-binary", "--all-releases", "--only-final"),
):
    _OPTIONS.add_option(*_names.split(), action="append")
for _names in ("--no-index", "--prefer-binary", "--require-hashes", "--no-require-hashes", "--pre"):
    _OPTIONS.add_option(_names, action="store_true")


class _Project(msgspec.Struct):
    dependencies: list[str] = []
    dynamic: list[str] = []


def _project(tree: Path, found: Listed) -> None:
    """Add the dependencies of a pyproject.toml, also those that setuptools or Hatch read from files."""
    try:
        table = tomli.loads(foreign.text(tree / "pyproject.toml", foreign.TABLE))
        project = convert(table.get("project", {}), _Project)
    except FileNotFoundError:
        return
    except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise _unreadable(tree, "pyproject.toml", str(error)) from None
    found.requirements.extend(project.dependencies)
    tables = (_at(table, each) for each in ("tool.poetry.dependencies", "tool.flit.metadata.requires"))
    others = [each for listed in tables if isinstance(listed, (dict, list)) for each in listed if each != "python"]
    if others and "dependencies" not in table.get("project", {}):
        raise _unreadable(tree, "pyproject.toml", "its dependencies are in a form of Poetry's or Flit's own")
    if "dependencies" in project.dynamic:
        hatch = "tool.hatch.metadata.hooks.requirements_txt"
        places = ("tool.setuptools.dynamic.dependencies.file", f"{hatch}.files", f"{hatch}.filename")
        named = next(filter(None, (_at(table, each) for each in places)), None)
        if not isinstance(named, (str, list)):
            raise _unreadable(tree, "pyproject.toml", "its dependencies are dynamic: a build would compute them")
        for each in [named] if isinstance(named, str) else named:
            _follow(tree, posixpath.normpath(str(each)), found, set(), constraint=False)


def _at(table: Any, path: str) -> Any:
    for key in path.split("."):
        table = table.get(key) if isinstance(table, dict) else None
    return table
