"""Recipes: the data that describes how to obtain and build a kernel package (`recipes/<name>/recipe.toml`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from packaging.version import InvalidVersion, Version

from core.config import load
from core.errors import ConfigError, UsageError, suggest
from core.files import CHECKOUT
from core.source import Pinned, check
from core.stack import stacks

if TYPE_CHECKING:
    from collections.abc import Iterator


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One extension module. Paths are relative to the source tree and may be glob patterns.

    `kernels` (.cu) include no Python header, so one compile serves every Python version; `bindings` (.cpp) are
    compiled for each version. `libraries` are linked in addition to torch's and the CUDA runtime.
    """

    name: str
    bindings: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The module's path in the wheel, without the ABI suffix."""
        return self.name.replace(".", "/")

    @property
    def init(self) -> str:
        """The module name in its init function."""
        return self.name.rpartition(".")[2]


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Compiler flags that affect the machine code or are required to compile the source."""

    cxx: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()


class Patch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change to the source, with its reason; `cuda_below` limits it to older CUDA versions."""

    file: str
    reason: str
    cuda_below: str = ""


class KernelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named subset of the source, such as inference without backward kernels.

    `exclude` drops files by pattern; `defines` are passed to the bindings. Kernel files do not see them, so that
    profiles share kernel objects.
    """

    summary: str
    default: bool = False
    defines: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Recipe(Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to obtain and build one kernel package.

    `archs` maps a plain compute capability to nvcc's target for it (`"12.1" = "121a"`). Other capabilities are not
    supported; `unsupported` may give the reason.

    `seconds` are measured compile times by file pattern: they order the graph and scale the progress bar. `memory_mb`
    is the measured peak memory of one compile.
    """

    summary: str
    license: str
    homepage: str
    archs: dict[str, str]
    stacks: tuple[str, ...]
    modules: tuple[Module, ...]
    python: str
    files: tuple[str, ...]
    license_files: tuple[str, ...]
    memory_mb: int
    exclude_files: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    unsupported: dict[str, str] = msgspec.field(default_factory=dict)
    include: tuple[str, ...] = ()
    headers: str = ""
    flags: Flags = Flags()
    patches: tuple[Patch, ...] = ()
    profiles: dict[str, KernelProfile] = msgspec.field(default_factory=dict)
    seconds: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name in wheel file names (PyPA name normalisation, with underscores)."""
        return re.sub(r"[-_.]+", "_", self.name).lower()

    @property
    def default_profile(self) -> str:
        """The profile to build if none is given; empty for a recipe without profiles."""
        return next((name for name, profile in self.profiles.items() if profile.default), "")

    def modules_for(self, capability: str) -> list[Module]:
        """The modules needed for this compute capability."""
        return [module for module in self.modules if not module.archs or capability in module.archs]

    def patches_for(self, cuda: str) -> list[Patch]:
        """The patches that apply to this CUDA version, in order."""
        return [patch for patch in self.patches if not patch.cuda_below or _numbers(cuda) < _numbers(patch.cuda_below)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def folders() -> list[Path]:
    """The recipe search path: the checkout's folder, then every folder of $HEARTH_RECIPES (`:`-separated).

    Raises UsageError for one without recipes.
    """
    extra = [Path(each).absolute() for each in os.environ.get("HEARTH_RECIPES", "").split(os.pathsep) if each]
    for folder in extra:
        if not any(folder.glob("*/recipe.toml")):
            hint = f"use its parent folder: {folder.parent}" if (folder / "recipe.toml").exists() else ""
            raise UsageError("usage", f"HEARTH_RECIPES: {folder} has no folder with a recipe.toml", hint=hint)
    return [CHECKOUT / "recipes", *extra]


def load_recipe(path: Path) -> Recipe:
    """Load and check the recipe in the folder `path`; raises ConfigError."""
    file = path / "recipe.toml"
    recipe = msgspec.structs.replace(load(file, Recipe), folder=str(path))
    check(recipe)
    if wrong := [f"{what} {value!r}" for what, value, right in _values(recipe) if not right]:
        raise ConfigError("config", f"{file}: not valid: {', '.join(wrong)}", cause=_NAMES)
    for name in (*(f"patches/{patch.file}" for patch in recipe.patches), recipe.headers):
        if not (path / name).exists():
            raise ConfigError("config", f"{file}: {name} does not exist in the recipe's folder")
    for module in recipe.modules:
        for arch in module.archs:
            if arch not in recipe.archs:
                raise ConfigError("config", f"{file}: module {module.name} lists arch {arch}, but the recipe does not")
    return recipe


_NAMES = """\
name: letters, digits, - and _; version: as PyPI writes it, without +; profiles: lower-case letters and digits, one with
default = true; stacks: of config/stacks.toml; archs: "12.1" = "121", "121a" or "121f"; modules: Python names,
each once; memory_mb: positive"""


def _values(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Each value that becomes a part of a wheel's name, label or command line: what it is, the value, is it valid."""
    yield "name", recipe.name, bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?", recipe.name, re.ASCII))
    yield "version", recipe.version, _canonical(recipe.version)
    for profile in recipe.profiles:
        yield "profile", profile, bool(re.fullmatch("[a-z][a-z0-9]*", profile))
    defaults = [name for name, profile in recipe.profiles.items() if profile.default]
    yield "profiles with default = true", ", ".join(defaults), len(defaults) == bool(recipe.profiles)
    for stack in recipe.stacks:
        yield "stack", stack, stack in stacks()
    for arch, target in recipe.archs.items():
        digits = re.fullmatch(r"(\d{1,2})\.(\d)", arch, re.ASCII)
        # Plain code of an older minor version runs, too; "a" is for one capability alone.
        runs = digits and re.fullmatch(f"{digits[1]}[0-{digits[2]}]f?|{digits[1]}{digits[2]}a", target)
        yield "arch", f"{arch} = {target}", bool(runs)
    names = [module.name for module in recipe.modules]
    for name in names:
        valid = all(each.isidentifier() and each.isascii() for each in name.split("."))
        yield "module", name, valid and names.count(name) == 1
    yield "memory_mb", str(recipe.memory_mb), recipe.memory_mb > 0


def _canonical(version: str) -> bool:
    try:
        return str(Version(version)) == version and "+" not in version
    except InvalidVersion:
        return False


def recipes() -> dict[str, Recipe]:
    """All kernel recipes, by name."""
    found: dict[str, Recipe] = {}
    for folder in folders():
        for file in sorted(folder.glob("*/recipe.toml")):
            recipe = load_recipe(file.parent)
            found[recipe.name] = recipe
    return found


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name; raises UsageError with the nearest match."""
    known = recipes()
    if name not in known:
        raise UsageError("unknown-name", f"there is no kernel {name!r}", hint=suggest(name, known))
    return known[name]
