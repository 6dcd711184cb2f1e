"""What is to be built: recipes, archs, stack, Python and platform crossed, each with its key or why it is skipped."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core import arch as archs
from core import files
from core.errors import ArchError, HearthError, RecipeSupportError, StackArchError, UnknownNameError, UsageError, near
from core.stack import Platform, Stack, find_stack
from kernels import recipe as recipes_of
from kernels import toolchain as toolchains

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.arch import Arch
    from kernels.recipe import Module, Recipe
    from kernels.toolchain import Toolchain

BUILDER = 1
"""Raised when Hearth itself changes a byte of what it builds: link line, metadata, wheel layout."""


@dataclass(frozen=True)
class Build:
    """One wheel to be: Recipe x Arch x Stack x Python x Platform, with a profile."""

    recipe: Recipe
    arch: Arch
    profile: str
    toolchain: Toolchain

    @property
    def target(self) -> str:
        """nvcc's name of the target: `121a`. The user's own suffix wins over the recipe's."""
        if self.arch.suffix:
            return f"{self.arch.major}{self.arch.minor}{self.arch.suffix}"
        return self.recipe.archs[self.arch.capability]

    @property
    def sass(self) -> str:
        """The SASS that every kernel module must hold, and no other: `sm_121a`."""
        return f"sm_{self.target}"

    @property
    def modules(self) -> list[Module]:
        """The extension modules of this arch."""
        return self.recipe.modules_for(self.arch.capability)

    @property
    def version(self) -> str:
        """The wheel's version, its local label naming stack, torch, arch and profile."""
        label = f"{self.toolchain.stack.label}.sm{self.target}{'.ptx' if self.arch.ptx else ''}"
        return f"{self.recipe.version}+{label}{f'.{self.profile}' if self.profile else ''}"

    @property
    def tag(self) -> str:
        """The wheel's compatibility tag."""
        chain = self.toolchain
        return f"{chain.abi_tag}-{chain.abi_tag}-{chain.platform.value}"

    @property
    def wheel_name(self) -> str:
        """The wheel's file name (PyPA binary distribution format)."""
        return f"{self.recipe.file_name}-{self.version}-{self.tag}.whl"

    @property
    def identifier(self) -> str:
        """How lists and messages name this build."""
        chain = self.toolchain
        tail = f"{chain.abi_tag}-{chain.platform.value}{f'-{self.profile}' if self.profile else ''}"
        name = f"{self.recipe.name}-{self.recipe.version}-{chain.stack.name}-sm{self.target}"
        return f"{name}{'ptx' if self.arch.ptx else ''}-{tail}"

    @property
    def folder(self) -> str:
        """The folder its kernel objects are compiled in: the same for every Python version and profile."""
        ptx = "ptx" if self.arch.ptx else ""
        return f"{self.recipe.name}-sm{self.target}{ptx}-{self.toolchain.view.name}"

    @property
    def python_folder(self) -> str:
        """The folder in that one for what no other build shares: bindings and linked modules."""
        return f"{self.folder}/{self.toolchain.abi_tag}{f'-{self.profile}' if self.profile else ''}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that can change a byte of the wheel."""
        recipe, chain = self.recipe, self.toolchain
        chosen = recipe.profiles.get(self.profile)
        patches = recipe.patches_for(chain.stack.cuda)
        source = recipe.source[0]
        return {
            "builder": BUILDER,
            "source": files.tree_hash(recipe.path / source.folder) if source.folder else recipe.tree,
            "patches": [files.sha256(recipe.path / "patches" / patch.file) for patch in patches],
            "headers": files.tree_hash(recipe.path / recipe.headers) if recipe.headers else "",
            "include": recipe.include,
            "flags": {"cxx": recipe.flags.cxx, "nvcc": recipe.flags.nvcc},
            "profile": [self.profile, chosen.defines if chosen else (), chosen.exclude if chosen else ()],
            "modules": [[module.name, module.bindings, module.kernels, module.libraries] for module in self.modules],
            "files": [recipe.files, recipe.exclude_files, recipe.license_files],
            "metadata": [
                recipe.name,
                self.version,
                recipe.summary,
                recipe.license,
                recipe.homepage,
                recipe.python,
            ],
            "requires": recipe.requires,
            "target": [self.target, self.arch.ptx],
            "stack": [chain.stack.name, chain.stack.torch, chain.stack.cuda, chain.stack.cxx11_abi],
            "platform": chain.platform.value,
            "python": chain.python,
            "toolchain": dict(chain.parts),
        }

    @cached_property
    def key(self) -> str:
        """The hash of the inputs: two builds with the same key give the same bytes."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Skipped:
    """A combination that is not built, and why."""

    identifier: str
    error: HearthError


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, as text; an empty field means the default: the arch's, the recipe's or the machine's.

    Raises UsageError for `jobs` that are no number.
    """

    arch: str = ""
    kernel: str = ""
    stack: str = ""
    python: str = ""
    platform: str = ""
    profile: str = ""
    jobs: str = ""

    def __post_init__(self) -> None:
        if self.jobs and not (self.jobs.isdecimal() and int(self.jobs)):
            hint = "give the number of compiles at once, or leave it out"
            raise UsageError(f"--jobs {self.jobs} makes no sense", hint=hint)


def wanted_archs(text: str) -> list[Arch]:
    """The archs asked for: `text`, else $TORCH_CUDA_ARCH_LIST, else the local GPU's; raises ArchError."""
    known = archs.known_archs()
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if text:
        return archs.parse_list(text, known)
    local = archs.local_gpu()
    if local is None:
        table = ", ".join(f"{name} ({info.gpus})" for name, info in known.items())
        raise ArchError(
            "no compute capability given, and this machine has no NVIDIA GPU to ask",
            cause="neither --arch nor TORCH_CUDA_ARCH_LIST is set",
            hint=f"name one with --arch: {table}",
        )
    return archs.parse_list(str(local), known)


def select(request: Request) -> tuple[list[Build], list[Skipped]]:
    """Cross recipes and archs; what a recipe or stack cannot do is skipped with its reason.

    Raises the reason itself when the user named that very kernel, or when nothing is left to build.
    """
    wanted = wanted_archs(request.arch)
    known = archs.known_archs()
    # Every comma-separated name is looked up, so that a mistyped one is refused.
    names = [name.strip() for name in request.kernel.split(",") if name.strip()]
    chosen = [recipes_of.find_recipe(name) for name in names] or list(recipes_of.recipes().values())
    profiles = {name for recipe in chosen for name in recipe.profiles}
    if request.profile and request.profile not in profiles:
        raise UnknownNameError(
            f"there is no profile {request.profile!r} of {', '.join(recipe.name for recipe in chosen)}",
            hint=near(request.profile, profiles) if profiles else "leave --profile out",
        )
    builds: list[Build] = []
    skipped: list[Skipped] = []
    for arch in wanted:
        info = known[arch.capability]
        stack = find_stack(request.stack or info.stack)
        platform = Platform.parse(request.platform or info.platform)
        for python in [each.strip() for each in (request.python or info.python).split(",")]:
            for recipe in chosen:
                try:
                    builds.append(_build(recipe, arch, stack, platform, python, request.profile))
                except (StackArchError, RecipeSupportError) as error:
                    if names:
                        raise
                    skipped.append(Skipped(f"{recipe.name} {arch} {stack.name} {python} {platform.value}", error))
    if not builds and skipped:
        raise skipped[0].error
    return builds, skipped


def _build(recipe: Recipe, arch: Arch, stack: Stack, platform: Platform, python: str, profile: str) -> Build:
    """One build; a recipe without the profile is built as it is by default."""
    if (reason := refusal(recipe, arch, stack)) is not None:
        raise reason
    chosen = profile if profile in recipe.profiles else recipe.default_profile
    return Build(recipe, arch, chosen, toolchains.describe(stack, platform, python))


def refusal(recipe: Recipe, arch: Arch, stack: Stack) -> StackArchError | RecipeSupportError | None:
    """Why this recipe cannot be built for this arch and stack, or None."""
    if arch.capability not in stack.archs:
        return StackArchError(
            f"stack {stack.name} cannot target {arch.capability}",
            cause=stack.archs_reason,
            hint=f"use a stack that can: {', '.join(_stacks_for(arch)) or 'none'}; "
            f"{stack.name} targets {', '.join(stack.archs)}",
        )
    if stack.name not in recipe.stacks:
        return RecipeSupportError(
            f"{recipe.name} {recipe.version} does not support stack {stack.name}",
            cause=recipe.unsupported.get(stack.name, "the recipe does not list it"),
            hint=f"stacks of {recipe.name}: {', '.join(recipe.stacks)}",
        )
    if arch.capability not in recipe.archs:
        return RecipeSupportError(
            f"{recipe.name} {recipe.version} does not support {arch.capability}",
            cause=recipe.unsupported.get(arch.capability, "its source has no kernels for it"),
            hint=f"archs of {recipe.name}: {', '.join(recipe.archs)}",
        )
    return None


def _stacks_for(arch: Arch) -> Sequence[str]:
    from core.stack import stacks

    return [name for name, stack in stacks().items() if arch.capability in stack.archs]
