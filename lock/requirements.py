"""ComfyUI's locked environments: one hash-locked list per stack, platform and Python.

A list contains the requirements of ComfyUI and all known nodes, resolved together, so that any selection of nodes is
compatible. Each package records its requesters (`# via`); a host gets the packages that its nodes, ComfyUI and the
stack need.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

from core import console, files, foreign, lockfile, tools, workspace
from core.errors import ConfigError, LockError
from core.stack import Platform, stacks
from lock import application as applications
from lock import nodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from packaging.tags import Tag
    from packaging.version import Version

    from core.stack import Stack
    from lock.application import Application
    from lock.nodes import Catalogue

TRIO = ("torch", "torchvision", "torchaudio")
APP, OWN = "comfyui.txt", "hearth.txt"
"""The requesters of packages: ComfyUI, Hearth (the stack's torch, `extra`), and nodes, as `NODE.node.txt`."""

MANAGER = "ComfyUI-Manager"
"""Handled like a node, although it is not one: ComfyUI uses it with `--enable-manager`."""


@dataclass(frozen=True)
class LockedList:
    """One locked list: its combination and its text, one requirement with hashes per line (pip's format)."""

    stack: str
    platform: str
    python: str
    text: str

    @property
    def name(self) -> str:
        """The list's file name without the suffix."""
        return f"{self.stack}-{self.platform}-cp{self.python.replace('.', '')}"

    def fits(self, known: Catalogue) -> bool:
        """Whether the list was compiled with these nodes."""
        return f"and nodes {nodes_hash(known)};" in self.text.partition("\n")[0]

    @cached_property
    def unavailable(self) -> dict[str, str]:
        """The nodes whose requirements the list lacks, because no packages for its combination meet them: reasons."""
        head = re.match(r"(#.*\n)*", self.text)
        return dict(re.findall(r"^# Without (\S+): (.*)$", head[0], re.MULTILINE)) if head else {}

    @cached_property
    def _pinned(self) -> dict[str, str]:
        """Each package's version."""
        return dict(sorted(map(_pin, re.findall(r"^\w.*", self.text, re.MULTILINE))))

    @cached_property
    def _packages(self) -> dict[str, tuple[str, set[str]]]:
        """Each package's requirement with hashes, and its requesters: packages, or requirements files."""
        found: dict[str, tuple[str, set[str]]] = {}
        for block in re.split(r"^(?=\w)", self.text, flags=re.MULTILINE)[1:]:
            lines = block.splitlines()
            comments = [line.partition("#")[2].strip() for line in lines if line.lstrip().startswith("#")]
            requesters = {each.removeprefix("via").strip().removeprefix("-r ") for each in comments} - {""}
            pinned = [line for line in lines if not line.lstrip().startswith("#")]
            found[_pin(lines[0])[0]] = "\n".join(pinned) + "\n", {each for each in requesters if each[:3] != "-c "}
        return found

    def select(self, requesters: Iterable[str]) -> str:
        """The list without packages that only other nodes than these (or MANAGER) need."""
        reached = self._reached(requesters)
        return "".join(text for name, (text, _) in sorted(self._packages.items()) if name in reached)

    def versions(self, requesters: Iterable[str] | None = None) -> dict[str, str]:
        """The packages' versions by name; with `requesters`, without packages that only other nodes need."""
        reached = self._pinned.keys() if requesters is None else self._reached(requesters)
        return {name: version for name, version in self._pinned.items() if name in reached}

    @property
    def files(self) -> set[str]:
        """The requirements files whose packages the list has."""
        return {each for _, via in self._packages.values() for each in via if each.endswith(".txt")}

    def requesters(self, package: str) -> list[str]:
        """The packages and nodes that require a package."""
        return sorted(each.removesuffix(".node.txt") for each in self._packages[package][1])

    def _reached(self, requesters: Iterable[str]) -> set[str]:
        """The packages that ComfyUI, the stack and these nodes need."""
        reached = {APP, OWN, *(f"{name}.node.txt" for name in requesters)}
        while fresh := {name for name, (_, via) in self._packages.items() if via & reached} - reached:
            reached |= fresh
        return reached


def _pin(text: str) -> tuple[str, str]:
    """Name and version of a locked requirement: `name==1 ...`, or `name @ ADDRESS ...` of a wheel."""
    if pinned := re.match(r"([\w.-]+)==([^\s;]+)", text):
        return canonicalize_name(pinned[1]), pinned[2]
    if (pinned := re.match(r"[\w.-]+ @ (\S+)", text)) and (found := wheel(pinned[1])):
        return found[0], str(found[1])
    line = text.partition("\n")[0]
    raise LockError("lock-stale", f"a locked list has the line {line[:200]!r}, which pins no package", hint="inv lock")


def wheel(url: str) -> tuple[str, Version, frozenset[Tag]] | None:
    """Name, version and tags of the wheel at an address; None if it is another file."""
    with suppress(InvalidWheelFilename):
        name, version, _, tags = parse_wheel_filename(unquote(re.split(r"[?#]", url)[0].rpartition("/")[2]))
        return name, version, tags
    return None


def offline(text: str) -> str:
    """Locked requirements for a host that has the wheels: names and versions in place of addresses."""
    return re.sub(r"^[\w.-]+ @ \S+", lambda found: "==".join(_pin(found[0])), text, flags=re.MULTILINE)


def folder(place: Path | None = None) -> Path:
    """The folder of the lists of the application in `place` (default: the pinned one): `locks`, next to the app.toml.

    $HEARTH_APP without lists uses the recipe's.
    """
    place = place or applications.folder()
    shared = place == applications.folder() and not (place / "locks").is_dir()
    return (workspace.current().checkout / "recipes/comfyui" if shared else place) / "locks"


def combinations(comfyui: str = "") -> list[tuple[Stack, Platform, str]]:
    """Every stack, platform and Python that has a list; with a version, only stacks that run it."""
    return [
        (stack, Platform.parse(platform), python)
        for stack in stacks().values()
        if (stack.runs(comfyui) if comfyui else not stack.builds_only)
        for platform in stack.platforms
        for python in stack.pythons
    ]


def find(stack: str, platform: str, python: str, place: Path | None = None) -> LockedList | None:
    """The locked list for a combination, of the application in `place` (default: the pinned one); None if missing."""
    lock = LockedList(stack, platform, python, "")
    path = folder(place) / f"{lock.name}.txt"
    return LockedList(stack, platform, python, path.read_text()) if path.exists() else None


def trio(stack: Stack) -> list[str]:
    """The stack's torch, torchvision and torchaudio, exactly as `uv.lock` pins them."""
    pinned = [line.split()[0] for line in lockfile.requirements(stack.name)]
    return [each for each in pinned if each.partition("==")[0] in TRIO]


def requirement_inputs(app: Application, known: Catalogue) -> dict[str, list[str]]:
    """The requirements of ComfyUI and every node, by the name of the requirements file that uv gets.

    Constraints are in a file of their own: `constraints_of` the name.
    """
    from lock import requirement_files

    if pinned := sorted(known.override.keys() & {*TRIO}):
        what = f"{nodes.catalogue_file()}: [override] has {pinned[0]}, which the stack pins"
        raise ConfigError("config", what, hint="remove it; to move the stack: inv update stack --to VERSION")
    trees = nodes.fetch(known.nodes)
    own = requirement_files.read(applications.tree(app))
    asked = {APP: own.requirements, OWN: list(app.extra)}
    asked |= {constraints_of(APP): pinnable("ComfyUI", own.constraints, known)} if own.constraints else {}
    asked |= {f"{MANAGER}.node.txt": [app.manager]} if app.manager else {}
    for name, tree in trees.items():
        listed = requirement_files.read(tree)
        for line in listed.ignored:
            console.say(f"{name} lists {line[:200]!r}: ignored, packages come from your index as wheels")
        asked[f"{name}.node.txt"] = [*pinnable(name, listed.requirements, known), *known.nodes[name].extra]
        if listed.constraints:
            asked[constraints_of(f"{name}.node.txt")] = pinnable(name, listed.constraints, known)
    return asked


def constraints_of(file: str) -> str:
    """The name of the file with the constraints of a requirements file."""
    return file.removesuffix(".txt") + ".constraints.txt"


def named(app: Application, known: Catalogue) -> set[str]:
    """The packages that ComfyUI, `extra` and the nodes name themselves, whatever their markers."""
    from lock import requirement_files

    listed = map(requirement_files.read, [applications.tree(app), *nodes.fetch(known.nodes).values()])
    lines = [line for each in listed for line in (*each.requirements, *each.constraints)]
    lines += [*app.extra, app.manager, *(line for node in known.nodes.values() for line in node.extra)]
    return {canonicalize_name(each.name) for each in map(parsed, lines) if each}


CONSTRAINT = "-c "
"""What precedes a constraint among requirements, as in pip's files."""


def required(app: Application, known: Catalogue) -> list[str]:
    """The requirements of ComfyUI itself and `extra`, with the replacements of [override], and constraints."""
    from lock import requirement_files

    own = requirement_files.read(applications.tree(app))
    asked = [each for each in map(parsed, map(plain, [*own.requirements, *app.extra])) if each]
    decided = [(str(each), known.override.get(canonicalize_name(each.name))) for each in asked]
    limits = [f"{CONSTRAINT}{each}" for each in pinnable("ComfyUI", own.constraints, known)]
    return [*(text for line, other in decided if (text := other.requirement if other else line)), *limits]


def uncovered(lock: LockedList, wanted: Iterable[str], requesters: Iterable[str]) -> dict[str, str]:
    """The requirements that a list's packages for these requesters do not meet, with the version that it has or ""."""
    there, found = lock.versions(requesters), dict[str, str]()
    for line in wanted:
        requirement = Requirement(line.removeprefix(CONSTRAINT))
        absent = line.startswith(CONSTRAINT) and canonicalize_name(requirement.name) not in there
        if not absent and applies(requirement, Platform(lock.platform), lock.python):
            version, pinned = there.get(canonicalize_name(requirement.name), ""), wheel(requirement.url or "")
            fits = version and requirement.specifier.contains(version, prereleases=True)
            if not fits or (pinned and str(pinned[1]) != version):
                found[str(requirement)] = version
    return found


def pinnable(name: str, lines: Sequence[str], known: Catalogue) -> list[str]:
    """A node's requirements without those that never apply, and without torch, which the stack pins.

    Raises ConfigError for one without a hash.
    """
    found: list[str] = []
    for line in lines:
        requirement = parsed(line)
        if requirement is None:
            raise ConfigError(
                "config",
                f"node {name} requires {line[:200]!r}, which is not a requirement that can be pinned",
                cause="it is malformed, an option, or a file or folder of the node",
                hint="set the node's packages in `extra` and leave its own list out, for example "
                f'without = ["requirements.txt"], or list the node in [left-out]: {nodes.catalogue_file()}',
            )
        package = canonicalize_name(requirement.name)
        if not any(applies(requirement, platform, python) for _, platform, python in combinations()):
            continue
        if package in TRIO:
            if requirement.specifier or requirement.url:
                console.say(f"{name} requires {line}: the stack's {package} is kept")
        elif package in known.override:
            found += [each for each in [known.override[package].requirement] if each]
        elif requirement.url and not (_PINNED.fullmatch(requirement.url) and wheel(requirement.url)):
            raise ConfigError(
                "config",
                f"node {name} requires {line}, which is not a wheel that a hash pins",
                cause="the content of an address can change, and building a package runs its code",
                hint=f"name a package of the index instead, below [override] of {nodes.catalogue_file()}: "
                f'{package} = {{ requirement = "...", why = "..." }}',
            )
        else:
            found.append(str(requirement))
    return found


# A wheel with a hash. Code from a repository (git+https) has no hash that uv checks.
_PINNED = re.compile(r"https://[^#?]+\.whl#(?:[^#]*&)?sha256=[0-9a-f]{64}(?:&[^#]*)?")


def applies(requirement: Requirement, platform: Platform, python: str) -> bool:
    """Whether a requirement's marker is true for a list. uv evaluates it for the first release of the Python, too."""
    environment = {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": platform.cpu,
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


# Characters that give uv more than a requirement: a variable, a line continuation, an option.
_MORE = re.compile(r"[$\\`\x00-\x1f\x7f-\x9f\u2028\u2029]|(^|\s)[-#]")


def plain(line: str) -> str:
    """Return a requirement unchanged; raises ConfigError for a line that uv would interpret differently."""
    found = parsed(line)
    if found is None or (found.url and not re.match(r"(?!file:)[a-z+]+://", found.url, re.IGNORECASE)):
        raise ConfigError(
            "config",
            f"{line[:200]!r} is not a requirement",
            hint="list the node in [left-out], or name a package of the index",
        )
    return line


def parsed(line: str) -> Requirement | None:
    """Parse a line of requirements; a plain address or path is named after `#egg=`, its archive or repository."""
    line = line.replace("\t", " ")
    if len(line) > foreign.LINE or _MORE.search(line):
        return None
    # As pip splits: the marker after an address without a name needs a space, that of any other requirement none.
    address, _, marker = line.partition("; " if re.match(r"[a-z+]+://", line, re.IGNORECASE) else ";")
    address, marker = address.strip(), f" ; {marker}" if marker.strip() else ""
    with suppress(InvalidRequirement, RecursionError):
        return Requirement(address + marker)
    with suppress(InvalidRequirement, RecursionError):
        name = "" if " @ " in line else _named(address)
        return Requirement(f"{name} @ {address}".removeprefix(" @ ") + marker)
    return None


def _named(address: str) -> str:
    """The name that the address or path of a package has in itself; empty if it has none."""
    if egg := re.search(r"[#&]egg=([\w.-]+)", address):
        return egg[1]
    if found := wheel(address):
        return found[0]
    with suppress(InvalidSdistFilename):
        return parse_sdist_filename(unquote(re.split(r"[?#]", address)[0].rpartition("/")[2]))[0]
    repository = _ADDRESS.fullmatch(address)
    return repository[1] if repository else ""


_ADDRESS = re.compile(r"(?:git\+)?(?:https?|ssh|git)://\S*?/([\w.-]+?)(?:\.git|\.zip)?(?:[@#?]\S*)?", re.IGNORECASE)


def download(lock: LockedList, requesters: Iterable[str], platform: Platform) -> Path:
    """Download all wheels of these nodes into a cache folder, for a host without access to the index."""
    text = lock.select(requesters)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    place = workspace.current().cache / "wheels" / f"{lock.name}-{digest}"
    if place.is_dir():
        return place
    console.say(f"downloading the packages of {lock.name}")
    tag = lock.name.rpartition("-")[2]
    with files.atomic_dir(place) as part:
        listed = part / "requirements.txt"
        listed.write_text(text)
        words: list[str | Path] = ["download", "--quiet", "--require-hashes", "--no-deps", "--dest", part]
        words += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", lock.python]
        words += [word for each in platform_tags(platform) for word in ("--platform", each)]
        words += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
        tools.pip(*words, "--requirement", listed)
        listed.unlink()
    return place


def platform_tags(platform: Platform) -> list[str]:
    """The platform tags of wheels. pip compares them literally: a newer manylinux does not imply an older one."""
    names = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
    return [f"{each}_{platform.cpu}" for each in [*names, "linux"]]


def tags(platform: Platform, python: str) -> list[Tag]:
    """The tags of the wheels that a Python can install, the best first."""
    version, platforms = tuple(map(int, python.split("."))), platform_tags(platform)
    interpreter = f"cp{python.replace('.', '')}"
    return [*cpython_tags(version, platforms=platforms), *compatible_tags(version, interpreter, platforms)]


def nodes_hash(known: Catalogue) -> str:
    """The hash of the nodes' part of every list's inputs; it is in the list's first line."""
    listed = [[name, node.tree, node.extra] for name, node in sorted(known.nodes.items())]
    decided = [[name, each.requirement] for name, each in sorted(known.override.items())]
    return hashlib.sha256(json.dumps([listed, decided]).encode()).hexdigest()[:16]
