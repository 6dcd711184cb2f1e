"""ComfyUI's locked environments: one hash-locked list per stack, platform and Python.

A list contains the requirements of ComfyUI and all known nodes, resolved together, so that any selection of nodes is
compatible. Each package records its requesters (`# via`); a host gets the packages that its nodes, ComfyUI and the
stack need.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from core import console, files, lockfile, source, tools, workspace
from core.errors import ConfigError, LockError
from core.stack import Platform, stacks
from lock import application as applications
from lock import nodes
from lock.application import application

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    def _packages(self) -> dict[str, tuple[str, set[str]]]:
        """Each package's requirement with hashes, and its requesters: packages, or requirements files."""
        found: dict[str, tuple[str, set[str]]] = {}
        for block in re.split(r"\n(?=[\w])", self.text):
            lines = block.splitlines()
            name = re.match(r"([\w.-]+)==", lines[0]) if lines else None
            if name is None:
                continue
            comments = [line.partition("#")[2].strip() for line in lines if line.lstrip().startswith("#")]
            requesters = {each.removeprefix("via").strip().removeprefix("-r ") for each in comments} - {""}
            pinned = [line for line in lines if not line.lstrip().startswith("#")]
            found[canonicalize_name(name[1])] = "\n".join(pinned) + "\n", requesters
        return found

    def select(self, requesters: Iterable[str]) -> str:
        """The list without packages that only other nodes than these (or MANAGER) need."""
        reached = self._reached(requesters)
        return "".join(text for name, (text, _) in sorted(self._packages.items()) if name in reached)

    def versions(self, requesters: Iterable[str] | None = None) -> dict[str, str]:
        """The packages' versions by name; with `requesters`, without packages that only other nodes need."""
        pinned = {name: re.split(r"==|[\s;]", text)[1] for name, (text, _) in sorted(self._packages.items())}
        reached = pinned.keys() if requesters is None else self._reached(requesters)
        return {name: version for name, version in pinned.items() if name in reached}

    def _reached(self, requesters: Iterable[str]) -> set[str]:
        """The packages that ComfyUI, the stack and these nodes need."""
        reached = {APP, OWN, *(f"{name}.node.txt" for name in requesters)}
        while fresh := {name for name, (_, via) in self._packages.items() if via & reached} - reached:
            reached |= fresh
        return reached


def folder() -> Path:
    """The folder of the lists: next to the app.toml, or in the recipe if that one has no list of its own."""
    own = applications.folder() / "locks"
    return own if own.is_dir() else workspace.current().checkout / "recipes/comfyui/locks"


def combinations() -> list[tuple[Stack, Platform, str]]:
    """Every stack, platform and Python that has a list."""
    return [
        (stack, Platform.parse(platform), python)
        for stack in stacks().values()
        for platform in stack.platforms
        for python in stack.pythons
    ]


def find(stack: str, platform: str, python: str) -> LockedList | None:
    """The locked list for a combination; None if there is none."""
    lock = LockedList(stack, platform, python, "")
    path = folder() / f"{lock.name}.txt"
    return LockedList(stack, platform, python, path.read_text()) if path.exists() else None


def trio(stack: Stack) -> list[str]:
    """The stack's torch, torchvision and torchaudio, exactly as `uv.lock` pins them."""
    pinned = [line.split()[0] for line in lockfile.requirements(stack.name)]
    return [each for each in pinned if each.partition("==")[0] in TRIO]


def compile_all(*, check: bool) -> list[str]:
    """Compile every list whose inputs changed and return their names; with `check` raise LockError instead.

    A list's first line contains the hash of its inputs, so checking needs no network. Raises LockError with the
    conflicting nodes, and ConfigError for a requirement that cannot be pinned.
    """
    app, known = application(), nodes.catalogue()
    stale: list[tuple[Stack, Platform, str, Path, str]] = []
    for stack, platform, python in combinations():
        path = folder() / f"{LockedList(stack.name, platform.value, python, '').name}.txt"
        first = (
            f"# Compiled by `inv lock` from ComfyUI {_inputs(app, stack)} and nodes {nodes_hash(known)}; do not edit.\n"
        )
        if not (path.exists() and path.read_text().startswith(first)):
            stale.append((stack, platform, python, path, first))
    names = [path.stem for *_, path, _ in stale]
    if check and stale:
        raise LockError(
            "lock-stale",
            f"the environments of ComfyUI are stale: {', '.join(names)}",
            cause="ComfyUI's version, a node, the stack's torch or the extra packages changed after they were compiled",
            hint="inv lock",
        )
    if stale:
        asked = requirement_inputs(app, known)

        def resolve(stack: Stack, platform: Platform, python: str, path: Path, first: str) -> str:
            second = f"# What they ask for: {asked_hash(asked, known, stack)}\n"
            _, _, body = path.read_text().partition(second) if path.exists() else ("", "", "")
            body = body or _compile(asked, known, stack, platform, python, path)  # new code, same needs
            files.write(path, first + second + body)
            return path.stem

        with (
            console.Progress("resolving", len(stale), len(stale)) as progress,
            ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,  # uv uses one core to resolve
        ):
            for done in as_completed([pool.submit(resolve, *each) for each in stale]):
                progress.step(f"{done.result()}: ComfyUI and {len(known.nodes)} nodes", 1, 0)
    return names


def requirement_inputs(app: Application, known: Catalogue) -> dict[str, list[str]]:
    """The requirements of ComfyUI and every node, by the name of the requirements file that uv gets."""
    trees = nodes.fetch(known.nodes)
    asked = {APP: nodes.requirements(source.fetch(app)), OWN: list(app.extra)}
    asked |= {f"{MANAGER}.node.txt": [app.manager]} if app.manager else {}
    return asked | {
        f"{name}.node.txt": [*pinnable(name, tree, known), *known.nodes[name].extra] for name, tree in trees.items()
    }


# A file with a hash. Code from a repository (git+https) has no hash that uv checks.
_PINNED = re.compile(r"https://[^#]+#(?:[^#]*&)?sha256=[0-9a-f]{64}(?:&[^#]*)?")


def pinnable(name: str, tree: Path, known: Catalogue) -> list[str]:
    """A node's requirements without torch, which the stack pins; raises ConfigError for one without a hash."""
    found: list[str] = []
    for line in nodes.requirements(tree):
        requirement = _parsed(line)
        if requirement is None:
            raise ConfigError(
                "config",
                f"node {name} requires {line[:200]!r}, which is not a requirement that can be pinned",
                hint=f"list the node in [left-out]: {nodes.catalogue_file()}, [left-out]",
            )
        package = canonicalize_name(requirement.name)
        if package in TRIO:
            if requirement.specifier or requirement.url:
                console.say(f"{name} requires {line}: the stack's {package} is kept")
        elif package in known.override:
            found += [each for each in [known.override[package].requirement] if each]
        elif requirement.url and not _PINNED.fullmatch(requirement.url):
            raise ConfigError(
                "config",
                f"node {name} requires {line}, which no hash pins",
                cause="the content of an address can change; only pinned files are deployed",
                hint=f"name a package of the index instead: in {nodes.catalogue_file()}, "
                f'[override.{package}] requirement = "..." why = "..."',
            )
        else:
            found.append(line)
    return found


# Characters that give uv more than a requirement: a variable, a line continuation, an option.
_MORE = re.compile(r"[$\\`\x00-\x1f\x7f-\x9f\u2028\u2029]|(^|\s)[-#]")


def plain(line: str) -> str:
    """Return a requirement unchanged; raises ConfigError for a line that uv would interpret differently."""
    if _parsed(line) is None:
        raise ConfigError(
            "config",
            f"{line[:200]!r} is not a requirement",
            hint="list the node in [left-out], or name a package of the index",
        )
    return line


def _parsed(line: str) -> Requirement | None:
    """Parse a line of requirements; a plain address (`git+https://.../name.git`) is named after its repository."""
    if len(line) > 2000 or _MORE.search(line):
        return None
    with suppress(InvalidRequirement, RecursionError):
        return Requirement(line)
    address = re.fullmatch(r"(?:git\+)?(?:https?|ssh|git)://\S*?/([\w.-]+?)(?:\.git|\.zip|\.whl)?(?:[@#]\S*)?", line)
    return Requirement(f"{address[1]} @ {line}") if address else None


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
        # pip compares tags literally: a newer manylinux does not imply an older one.
        tags = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
        words += [word for each in [*tags, "linux"] for word in ("--platform", f"{each}_{platform.cpu}")]
        words += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
        tools.pip(*words, "--requirement", listed)
        listed.unlink()
    return place


def _inputs(app: Application, stack: Stack) -> str:
    """The hash of a list's inputs except the nodes."""
    return hashlib.sha256(json.dumps([app.tree, app.extra, app.manager, trio(stack)]).encode()).hexdigest()[:16]


def nodes_hash(known: Catalogue) -> str:
    """The hash of the nodes' part of every list's inputs; it is in the list's first line."""
    listed = [[name, node.tree, node.extra] for name, node in sorted(known.nodes.items())]
    decided = [[name, each.requirement] for name, each in sorted(known.override.items())]
    return hashlib.sha256(json.dumps([listed, decided]).encode()).hexdigest()[:16]


def _other(name: str, requirement: str) -> bool:
    """Whether an override replaces the package by another one, or by none."""
    return not requirement or canonicalize_name(Requirement(requirement).name) != canonicalize_name(name)


def asked_hash(asked: Mapping[str, Sequence[str]], known: Catalogue, stack: Stack) -> str:
    """The hash of all requirements that a list resolves; it is in the list's second line."""
    decided = {name: each.requirement for name, each in known.override.items()}
    listed = json.dumps([asked, decided, trio(stack)], sort_keys=True)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def _compile(
    asked: Mapping[str, Sequence[str]], known: Catalogue, stack: Stack, platform: Platform, python: str, old: Path
) -> str:
    """Resolve one list, keeping existing pins where possible. Raises LockError."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as name:
        place = Path(name)
        pinned = trio(stack)
        for file, lines in asked.items():
            listed = [*(pinned if file == OWN else []), *map(plain, lines)]
            (place / file).write_text("".join(f"{line}\n" for line in listed))
        decided = [each.requirement for each in known.override.values() if each.requirement]
        (place / "overrides").write_text("\n".join([*pinned, *decided]) + "\n")
        # uv cannot replace one package by another: exclude it for dependencies; the nodes' own lines are already
        # replaced.
        gone = [name for name, each in known.override.items() if _other(name, each.requirement)]
        (place / "excludes").write_text("\n".join(gone))

        def resolve(chosen: Iterable[str], *more: str) -> Any:
            words = ["pip", "compile", "--quiet", "--no-header", "--generate-hashes", "--only-binary", ":all:"]
            words += ["--python-version", python, "--python-platform", platform.uv_name]
            words += ["--overrides", "overrides", "--excludes", "excludes", *more, *chosen]
            return tools.uv(*words, "--python", sys.executable, cwd=place, check=False)

        if old.exists():  # uv keeps the pins of an existing output file where possible
            shutil.copy(old, place / "list")
        done = resolve(asked, "--output-file", "list")
        if done.returncode == 0:
            return (place / "list").read_text()
        alone = [APP, OWN]
        rest = [file for file in asked if file not in alone]
        with ThreadPoolExecutor() as pool:
            single = dict(zip(rest, pool.map(lambda file: resolve([*alone, file]), rest), strict=True))
            without = dict(zip(rest, pool.map(lambda file: resolve(set(asked) - {file}), rest), strict=True))
    bad = [file.removesuffix(".node.txt") for file, each in single.items() if each.returncode]
    helps = [file.removesuffix(".node.txt") for file, each in without.items() if each.returncode == 0]
    raise LockError(
        "resolution",
        f"no set of versions meets all requirements of ComfyUI and its nodes ({old.stem})",
        cause=done.stderr.strip().replace(".node.txt", "").replace("\n", "\n         "),
        hint=(f"not available even alone: {', '.join(bad)}. " if bad else "")
        + (
            f"it resolves without {' or without '.join(helps)}: move it to [left-out]"
            if helps
            else "move several nodes to [left-out]"
        )
        + f" in {nodes.catalogue_file()}, or set the package there with [override.PACKAGE] and a reason",
    )
