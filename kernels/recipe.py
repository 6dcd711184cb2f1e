"""Recipes: how one kernel package is obtained and built, as data (`recipes/<name>/recipe.toml`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from core.config import load
from core.errors import ConfigError, UsageError, suggest
from core.files import CHECKOUT
from core.source import Pinned, check


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One extension module. Paths are relative to the source tree and may be glob patterns.

    `kernels` (.cu) see no Python header, so that one compile serves every Python version; `bindings` (.cpp)
    are compiled for each. `libraries` are linked beside torch's and the CUDA runtime.
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
        """The name that its init function carries."""
        return self.name.rpartition(".")[2]


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Compiler flags that change the machine code or let the source compile."""

    cxx: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()


class Patch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change to the source, with its reason; `cuda_below` limits it to older CUDA."""

    file: str
    reason: str
    cuda_below: str = ""


class KernelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named subset of the source, such as inference without backward kernels.

    `exclude` drops files by pattern; `defines` tell the bindings so. Kernel files do not see them, and profiles
    share their objects.
    """

    summary: str
    default: bool = False
    defines: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Recipe(Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one kernel package is obtained and built.

    `archs` maps a plain capability to nvcc's target for it (`"12.1" = "121a"`); what is not there is not
    supported, and `unsupported` may say why.
    `seconds` are measured compile times by file pattern: they order the graph and scale the progress bar.
    `memory_mb` is the measured peak of one compile.
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
        """The name as wheel file names carry it (PyPA name normalisation, with underscores)."""
        return re.sub(r"[-_.]+", "_", self.name).lower()

    @property
    def default_profile(self) -> str:
        """The profile built when none is named; empty for a recipe without profiles."""
        return next((name for name, profile in self.profiles.items() if profile.default), "")

    def modules_for(self, capability: str) -> list[Module]:
        """The modules that this capability needs."""
        return [module for module in self.modules if not module.archs or capability in module.archs]

    def patches_for(self, cuda: str) -> list[Patch]:
        """The patches that apply to this CUDA version, in order."""
        return [patch for patch in self.patches if not patch.cuda_below or _numbers(cuda) < _numbers(patch.cuda_below)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def folders() -> list[Path]:
    """Where recipes are looked for: the checkout's, then every folder of $HEARTH_RECIPES (`:` between)."""
    extra = [Path(each) for each in os.environ.get("HEARTH_RECIPES", "").split(os.pathsep) if each]
    return [CHECKOUT / "recipes", *extra]


def load_recipe(path: Path) -> Recipe:
    """Load and check the recipe in the folder `path`; raises ConfigError."""
    file = path / "recipe.toml"
    recipe = msgspec.structs.replace(load(file, Recipe), folder=str(path))
    check(recipe)
    for name in (*(f"patches/{patch.file}" for patch in recipe.patches), recipe.headers):
        if not (path / name).exists():
            raise ConfigError("config", f"{file}: {name} does not exist in the recipe's folder")
    for module in recipe.modules:
        for arch in module.archs:
            if arch not in recipe.archs:
                raise ConfigError("config", f"{file}: module {module.name} names arch {arch}, the recipe does not")
    return recipe


def recipes() -> dict[str, Recipe]:
    """Every kernel recipe, by name."""
    found: dict[str, Recipe] = {}
    for folder in folders():
        for file in sorted(folder.glob("*/recipe.toml")):
            recipe = load_recipe(file.parent)
            found[recipe.name] = recipe
    return found


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; raises UsageError with the nearest one."""
    known = recipes()
    if name not in known:
        raise UsageError("unknown-name", f"there is no kernel {name!r}", hint=suggest(name, known))
    return known[name]
