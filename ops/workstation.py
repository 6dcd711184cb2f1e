"""This machine: whether it can deploy to hosts and build kernels, and what is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core import console, shell, workspace
from core.arch import known_archs
from core.stack import Platform, find_stack
from deploy import host as hosts
from deploy.profile import profiles as known_profiles
from ops.status import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from core.errors import HearthError
    from deploy.profile import Profile
    from ops.checks import Severity

NAME = "this machine"
ELSEWHERE = "use inv build-kernels --host NAME"
BUILD_BYTES = 15_000_000_000
"""Measured cache size of the default stack, its compiler and a build: 10 GB, and the objects."""

PROGRAMS = {
    "git": {"linux": "apt-get install git", "darwin": "xcode-select --install"},
    "uv": {"linux": "pipx install uv", "darwin": "brew install uv"},
    "ssh": {"linux": "apt-get install openssh-client", "darwin": "brew install openssh"},
}
"""The programs that a deploy runs, and how to install each."""


@dataclass(frozen=True)
class Seen:
    """This machine's capabilities, one line each, and its problems."""

    abilities: tuple[str, ...]
    problems: tuple[tuple[Severity, Problem], ...]


def look() -> Seen:
    """Check this machine for deploys, and on Linux for builds of the configured hosts' kernels."""
    linux = sys.platform == "linux"
    missing = [name for name in PROGRAMS if not shell.which(name)]
    found: list[tuple[Severity, Problem]] = [
        ("error", Problem(f"{name} is not installed", PROGRAMS[name].get(sys.platform, f"install {name}")))
        for name in missing
    ]
    where = "to this machine and to other hosts" if linux else "to other hosts; ComfyUI itself runs on Linux"
    deploys = f"no: {' and '.join(missing)} not installed" if missing else f"yes, {where}"
    builds = f"no: kernels are built on Linux; {ELSEWHERE}"
    if linux:
        asked = [hosts.target(name).profile for name in hosts.hosts().hosts if name != hosts.LOCAL]
        asked = [each for each in asked if each.kernels]
        severity: Severity = "error" if asked else "warning"  # without hosts, a build may not be wanted
        profiles = asked or [each for each in known_profiles().values() if each.kernels]
        problems = {each.arch: _build_errors(each) for each in profiles}
        builds = _builds(problems, [each for each in missing if each != "ssh"])
        for arch, each in problems.items():
            found += [(severity, Problem(f"no local builds for {arch}: {error.what}", error.hint)) for error in each]
        found += [*_emulators(problems), *_disk()]
    found += _wheels()
    ordered = sorted(set(found), key=lambda each: (each[0] != "error", each[1].what))
    return Seen((f"deploy: {deploys}", f"local builds: {builds}"), tuple(ordered))


def _build_errors(profile: Profile) -> list[HearthError]:
    """The problems that prevent a build of a profile's kernels here."""
    from kernels import toolchain

    stack = find_stack(profile.stack)
    return toolchain.errors(stack, Platform.parse(known_archs()[profile.arch].platform), stack.python)


def _builds(problems: Mapping[str, Sequence[HearthError]], missing: Sequence[str]) -> str:
    """Whether kernels can be built here, for which archs, and what is missing."""
    able = ", ".join(arch for arch, errors in problems.items() if not errors)
    reasons = [f"{each} is not installed" for each in missing]
    reasons = reasons or sorted({error.what for errors in problems.values() for error in errors})
    if not reasons:
        return f"yes, for {able}"
    why = f"{'; '.join(reasons)}; {ELSEWHERE}"
    return f"yes, for {able}; not for other archs: {why}" if able and not missing else f"no: {why}"


def _emulators(archs: Iterable[str]) -> Iterator[tuple[Severity, Problem]]:
    for arch in archs:
        cpu = Platform.parse(known_archs()[arch].platform).cpu
        if cpu != platform.machine() and not (shell.which(f"qemu-{cpu}-static") or shell.which(f"qemu-{cpu}")):
            what = f"the import of wheels for {arch} cannot be tested here: there is no emulator for {cpu}"
            yield "warning", Problem(what, "apt-get install qemu-user-static")


def _wheels() -> Iterator[tuple[Severity, Problem]]:
    for entry in workspace.current().wheelhouse.verify():
        if entry.error:
            yield "error", Problem(f"{entry.manifest.file}: {entry.error}", "to build it again: inv build-kernels")


def _disk() -> Iterator[tuple[Severity, Problem]]:
    cache = workspace.current().cache
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < BUILD_BYTES:
        what = f"{console.size(free)} free at {place}; a build needs {console.size(BUILD_BYTES)}"
        yield "warning", Problem(what, "inv cache --clear, or set HEARTH_CACHE to a folder on a larger disk")
