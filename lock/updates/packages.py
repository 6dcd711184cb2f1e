"""Packages of pyproject.toml and uv.lock: the stacks' torch and CUDA compiler, and the tool's own."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit
from packaging.requirements import Requirement
from packaging.version import Version

from core import files, lockfile, shell, tools, workspace
from core.config import table
from core.errors import LockError
from core.stack import Platform, find_stack, stacks
from lock.updates import upstream
from lock.updates.proposal import Move

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from core.stack import Stack
    from lock.updates.proposal import Proposal, Request


def pinned() -> dict[str, dict[str, str]]:
    """The exact pins of every extra of pyproject.toml: versions by package."""
    extras: dict[str, list[str]] = _project()["project"]["optional-dependencies"]
    found = {extra: [line.partition(";")[0].strip().split("==") for line in lines] for extra, lines in extras.items()}
    return {extra: {pin[0]: pin[1] for pin in pins if len(pin) == 2} for extra, pins in found.items()}


def tool_packages() -> list[str]:
    """The packages that Hearth itself, its tests and its documentation ask for."""
    groups: dict[str, list[Any]] = _project()["dependency-groups"]
    lines = [line for lines in groups.values() for line in lines if isinstance(line, str)]
    return sorted({Requirement(line).name for line in lines})


def _project() -> dict[str, Any]:
    return table(workspace.current().checkout / "pyproject.toml")


def _pin(changes: Mapping[str, Mapping[str, str]]) -> None:
    """Write exact pins to pyproject.toml: new versions by extra and package. Comments and markers stay."""
    path = workspace.current().checkout / "pyproject.toml"
    document = tomlkit.parse(path.read_text())
    extras: Any = document["project"]["optional-dependencies"]
    for extra, versions in changes.items():
        for index, line in enumerate(extras[extra]):
            name = line.partition("==")[0]
            if name in versions:
                extras[extra][index] = re.sub(r"==[^;\s]+", f"=={versions[name]}", line, count=1)
    files.write(path, tomlkit.dumps(document))


COMPANIONS = ("torchvision", "torchaudio")
"""They move only if the pinned ones do not fit torch: newer ones may be built for another CUDA and not say so."""


def move_stacks(wanted: Request, made: Proposal) -> None:
    """Move every stack's torch and compiler to the newest for its CUDA; with a version, only those that it fits."""
    found: dict[str, dict[str, str]] = {}
    failed: dict[str, LockError] = {}
    for stack in stacks().values():
        try:
            found[stack.name] = newer(stack, wanted)
        except LockError as error:
            failed[stack.name] = error
    if failed and (not wanted.to or not found):
        raise failed.get(find_stack().name) or [*failed.values()][-1]
    before = pinned()
    _pin(found)
    path = workspace.current().checkout / "config/stacks.toml"
    document: Any = tomlkit.parse(path.read_text())
    for name, versions in found.items():
        if "torch" in versions:
            document[name]["torch"] = versions["torch"]
        for each, new in versions.items():
            date = upstream.package(each, version=new).day
            notes = (f"build the kernels of {name} again: inv build-kernels --stack {name}",) * (each == "torch")
            made.moves.append(Move("stack", f"{name} {each}", before[name][each], new, date, notes))
    files.write(path, tomlkit.dumps(document))


def newer(stack: Stack, wanted: Request) -> dict[str, str]:
    """The packages of a stack that would move, with their new versions for the same CUDA; raises LockError."""
    now = pinned()[stack.name]
    compiler = [f"{name}=={stack.cuda}.*" for name in now if name.startswith("nvidia-")]
    torch = f"torch=={wanted.to}" if wanted.to else f"torch>={now['torch']}"
    found = _solved(stack, [torch, *compiler], wanted)
    if found["torch"] != now["torch"]:
        older = Version(found["torch"]) < Version(now["torch"])
        others = [f"{name}{'<=' if older else '>='}{now[name]}" for name in COMPANIONS if name in now]
        nearest = "highest" if older else "lowest-direct"
        found |= _solved(stack, [f"torch=={found['torch']}", *others], wanted, "--resolution", nearest)
    return {name: found[name] for name, version in now.items() if found.get(name, version) != version}


def _solved(stack: Stack, asked: Sequence[str], wanted: Request, *more: str) -> dict[str, str]:
    """The direct versions that uv chooses for a stack's first platform and Python, all built for its CUDA."""
    built = "".join(f"{name}=={stack.cuda}.*\n" for name in ("cuda-toolkit", "nvidia-cuda-runtime-cu12"))
    with tempfile.TemporaryDirectory(prefix="hearth-") as place:
        Path(place, "built").write_text(built)
        words = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:", *more]
        words += ["--python-platform", Platform.parse(stack.platforms[0]).uv_name, "--python-version", stack.pythons[0]]
        words += ["--exclude-newer", wanted.newest] if wanted.newest else []
        words += ["--constraints", "built", "--python", sys.executable, "-"]
        done = tools.uv(*words, cwd=Path(place), check=False, input_text="".join(f"{each}\n" for each in asked))
    if done.returncode:
        what = f"no {asked[0]} fits the stack {stack.name} (CUDA {stack.cuda})"
        raise LockError("resolution", what, cause=shell.last_words(done, 20), hint="inv outdated stack shows what fits")
    names = {Requirement(each).name for each in asked}
    return {
        name: version for name, _, version in (line.partition("==") for line in done.stdout.split()) if name in names
    }


def move_tool(wanted: Request, made: Proposal) -> None:
    """Move the tool's own packages in uv.lock, and the exact pins of the extras that are no stacks, such as uv's."""
    before, changes = lockfile.versions(), dict[str, dict[str, str]]()
    for extra, versions in pinned().items():
        for name, version in versions.items() if extra not in stacks() else ():
            found = upstream.package(name, wanted.before)
            if Version(found.version) > Version(version):
                changes.setdefault(extra, {})[name] = found.version
    _pin(changes)
    lockfile.upgrade([*tool_packages(), *(name for each in changes.values() for name in each)], wanted.newest)
    for name, new in lockfile.versions().items():
        if name in before and new != before[name]:
            made.moves.append(Move("tool", name, before[name], new))
