"""The builds of a request: recipes x archs x stack x Pythons x platform, each with its key or the reason to skip it."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from core import arch as archs
from core import console, files, manifest, workspace
from core.errors import HearthError, SupportError, UsageError, suggest
from core.stack import Platform, Stack, find_stack, stacks
from kernels import recipe as recipes_of
from kernels import toolchain as toolchains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from core.arch import Arch
    from kernels.recipe import Module, Recipe
    from kernels.toolchain import Toolchain

    Describe = Callable[[Stack, Platform, str], Toolchain]

BUILDER = 3
"""Increase it when a change of Hearth changes wheels: link line, metadata, wheel layout."""


@dataclass(frozen=True)
class Build:
    """A wheel to build: Recipe x Arch x Stack x Python x Platform, with a profile."""

    recipe: Recipe
    arch: Arch
    profile: str
    toolchain: Toolchain

    @property
    def target(self) -> str:
        """nvcc's name of the target: `121a`. The user's suffix has precedence over the recipe's."""
        if self.arch.suffix:
            return f"{self.arch.major}{self.arch.minor}{self.arch.suffix}"
        return self.recipe.archs[self.arch.capability]

    @property
    def sass(self) -> str:
        """The only SASS target of every kernel module: `sm_121a`."""
        return f"sm_{self.target}"

    @property
    def modules(self) -> list[Module]:
        """The extension modules of this arch."""
        return self.recipe.modules_for(self.arch.capability)

    @property
    def version(self) -> str:
        """The wheel's version, with stack, torch, arch and profile in its local label."""
        label = f"{self.toolchain.stack.label}.sm{self.target}{'.ptx' if self.arch.ptx else ''}"
        return f"{self.recipe.version}+{label}{f'.{self.profile}' if self.profile else ''}"

    def tag(self, platform: str) -> str:
        """The wheel's compatibility tag, with this platform tag."""
        return f"{self.toolchain.abi_tag}-{self.toolchain.abi_tag}-{platform}"

    def wheel_name(self, platform: str) -> str:
        """The wheel's file name (PyPA binary distribution format), with this platform tag."""
        return f"{self.recipe.file_name}-{self.version}-{self.tag(platform)}.whl"

    @property
    def wheel_pattern(self) -> str:
        """A glob pattern of the wheel's file name: the platform tag depends on the symbols of the linked modules."""
        return self.wheel_name(f"*linux*_{self.toolchain.platform.cpu}")

    @property
    def index(self) -> str:
        """The wheelhouse's index for it: the wheel runs on the requested GPU, whatever the recipe's target is."""
        return manifest.index(self.toolchain.stack.name, str(self.arch))

    @property
    def identifier(self) -> str:
        """The name of this build in lists and messages."""
        chain = self.toolchain
        tail = f"{chain.abi_tag}-{chain.platform.value}{f'-{self.profile}' if self.profile else ''}"
        name = f"{self.recipe.name}-{self.recipe.version}-{chain.stack.name}-sm{self.target}"
        return f"{name}{'ptx' if self.arch.ptx else ''}-{tail}"

    @property
    def folder(self) -> str:
        """The folder of kernel objects, shared by all Python versions and profiles."""
        ptx = "ptx" if self.arch.ptx else ""
        return f"{self.recipe.name}-sm{self.target}{ptx}-{self.toolchain.view.name}"

    @property
    def python_folder(self) -> str:
        """Its subfolder for one Python version and profile: bindings and linked modules."""
        return f"{self.folder}/{self.toolchain.python_folder}{f'-{self.profile}' if self.profile else ''}"

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
            "stack": [chain.stack.name, chain.stack.torch, chain.stack.cuda, chain.stack.cxx11_abi, chain.stack.cxx],
            "platform": chain.platform.value,
            "python": chain.python,
            "toolchain": dict(chain.parts),
            "zlib": _zlib(),
        }

    @cached_property
    def key(self) -> str:
        """The hash of the inputs: builds with the same key produce the same bytes."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


@cache
def _zlib() -> str:
    """The identity of the zlib that compresses wheels: other versions and replacements write other bytes."""
    sample = zlib.compress("".join(map(str, range(10_000))).encode())
    return f"{zlib.ZLIB_RUNTIME_VERSION} {hashlib.sha256(sample).hexdigest()[:16]}"


@dataclass(frozen=True)
class Skipped:
    """A combination that is not built, with the reason."""

    identifier: str
    error: HearthError


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request in the user's words; an empty field means the default of the arch, the recipe or the machine.

    Raises UsageError unless `jobs` is a positive integer.
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
            hint = "give the number of parallel compile jobs, or omit it"
            raise UsageError("usage", f"--jobs must be a positive integer (got {self.jobs!r})", hint=hint)


def wanted_archs(text: str) -> list[Arch]:
    """The requested archs: `text`, else $TORCH_CUDA_ARCH_LIST, else the local GPU's; raises SupportError."""
    known = archs.known_archs()
    text = text or os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if text:
        return archs.parse_list(text, known)
    local = archs.local_gpu()
    if local is None:
        table = ", ".join(f"{name} ({info.gpus})" for name, info in known.items())
        raise SupportError(
            "arch",
            "no compute capability given, and this machine has no NVIDIA GPU",
            cause="neither --arch nor TORCH_CUDA_ARCH_LIST is set",
            hint=f"choose one with --arch: {table}",
        )
    return archs.parse_list(str(local), known)


def select(request: Request, describe: Describe = toolchains.describe) -> tuple[list[Build], list[Skipped]]:
    """Combine recipes and archs; unsupported combinations are skipped with the reason.

    `describe` finds a toolchain. Raises the reason if the user named the kernel, or if no build remains.
    """
    wanted = wanted_archs(request.arch)
    stack = find_stack(request.stack)
    if stack.notice:
        console.say(stack.notice)
    known = archs.known_archs()
    # Every comma-separated name is looked up, so that a mistyped one is an error.
    names = [name.strip() for name in request.kernel.split(",") if name.strip()]
    chosen = [recipes_of.find_recipe(name) for name in names] or list(recipes_of.recipes().values())
    profiles = {name for recipe in chosen for name in recipe.profiles}
    if request.profile and request.profile not in profiles:
        raise UsageError(
            "unknown-name",
            f"there is no profile {request.profile!r} of {', '.join(recipe.name for recipe in chosen)}",
            hint=suggest(request.profile, profiles) if profiles else "omit --profile",
        )
    builds: list[Build] = []
    skipped: list[Skipped] = []
    for arch in wanted:
        info = known[arch.capability]
        platform = Platform.parse(request.platform or info.platform)
        for python in [each.strip() for each in (request.python or info.python).split(",")]:
            for recipe in chosen:
                try:
                    builds.append(_build(recipe, arch, request.profile, describe, stack, platform, python))
                except SupportError as error:
                    if names or error.kind == "arch":
                        raise
                    skipped.append(Skipped(f"{recipe.name} {arch} {stack.name} {python} {platform.value}", error))
    builds = list({each.identifier: each for each in builds}.values())  # '9.0;9.0a' may be one target
    if not builds and skipped:
        raise skipped[0].error
    return builds, skipped


def split(request: Request) -> list[Request]:
    """Divide a request for several machines: one part per recipe and arch. Needs no compiler.

    All Pythons are in one part, since they share the kernel objects. Raises what `select` raises.
    """
    builds, skipped = select(request, toolchains.look)
    for each in skipped:
        console.say(f"skipping {each.identifier}: {each.error.what}")
    parts: dict[tuple[str, str], Request] = {}
    for build in builds:
        kernel, arch = build.recipe.name, str(build.arch)
        profile = request.profile if request.profile in build.recipe.profiles else ""
        parts[kernel, arch] = replace(request, kernel=kernel, arch=arch, profile=profile)
    return list(parts.values())


def _build(
    recipe: Recipe, arch: Arch, profile: str, describe: Describe, stack: Stack, platform: Platform, python: str
) -> Build:
    """One build; a recipe without the profile uses its default."""
    if (reason := refusal(recipe, arch, stack)) is not None:
        raise reason
    chosen = profile if profile in recipe.profiles else recipe.default_profile
    return Build(recipe, arch, chosen, describe(stack, platform, python))


def refusal(recipe: Recipe, arch: Arch, stack: Stack) -> SupportError | SupportError | None:
    """The reason why this recipe cannot be built for this arch and stack, or None."""
    if arch.capability not in stack.archs:
        return SupportError(
            "stack-arch",
            f"stack {stack.name} cannot target {arch.capability}",
            cause=stack.archs_reason,
            hint=f"use a stack that can: {', '.join(_stacks_for(arch)) or 'none'}; "
            f"{stack.name} targets {', '.join(stack.archs)}",
        )
    if stack.name not in recipe.stacks:
        return SupportError(
            "recipe-support",
            f"{recipe.name} {recipe.version} does not support stack {stack.name}",
            cause=recipe.unsupported.get(stack.name, "not listed in `stacks` of recipe.toml"),
            hint=f"stacks of {recipe.name}: {', '.join(recipe.stacks)}",
        )
    if arch.capability not in recipe.archs:
        return SupportError(
            "recipe-support",
            f"{recipe.name} {recipe.version} does not support {arch.capability}",
            cause=recipe.unsupported.get(arch.capability, "not listed in [archs] of recipe.toml"),
            hint=f"archs of {recipe.name}: {', '.join(recipe.archs)}",
        )
    return None


def _stacks_for(arch: Arch) -> Sequence[str]:
    return [name for name, stack in stacks().items() if arch.capability in stack.archs]


def summary(builds: Sequence[Build], skipped: Sequence[Skipped]) -> list[dict[str, Any]]:
    """Each build with its key, its state, and what this machine lacks for it, for a dry run.

    The key is None if the toolchain is incomplete. A skipped build has a reason and no key.
    """
    wheelhouse = workspace.current().wheelhouse
    found: list[dict[str, Any]] = []
    for each in builds:
        key = None if each.toolchain.missing else each.key
        exists = key is not None and wheelhouse.find(each.index, each.wheel_pattern, key) is not None
        state = "in the wheelhouse" if exists else "to build"
        lacks = [] if exists else toolchains.lacking(each.toolchain, each.recipe)
        found.append({"identifier": each.identifier, "key": key, "state": state, "lacks": lacks})
    return found + [
        {"identifier": each.identifier, "key": None, "state": "skipped", "reason": each.error.what} for each in skipped
    ]


def rows(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of `summary`, then what each build lacks."""
    cells = []
    for each in found:
        state = f"skipped: {each['reason']}" if "reason" in each else each["state"]
        key = (each["key"] or ("-" if "reason" in each else "unknown"))[:16]
        cells.append((each["identifier"], key, state))
    lacks: dict[str, list[str]] = {}
    for each in found:
        for text in each.get("lacks", ()):
            lacks.setdefault(text, []).append(each["identifier"])
    every = sum("reason" not in each for each in found)
    lines = [f"{text}: {'all builds' if len(names) == every else ', '.join(names)}" for text, names in lacks.items()]
    return [*console.table(("build", "key", "state"), cells), *lines]


def support() -> list[dict[str, str]]:
    """Every recipe crossed with every stack: the archs that it supports, and why it does not support the others."""
    found: list[dict[str, str]] = []
    for recipe in recipes_of.recipes().values():
        for stack in stacks().values():
            refused = {arch: refusal(recipe, archs.Arch.parse(arch), stack) for arch in archs.known_archs()}
            reasons: dict[str, list[str]] = {}
            for arch, error in refused.items():
                if error is not None:
                    reasons.setdefault(error.cause, []).append(arch)
            found.append(
                {
                    "kernel": recipe.name,
                    "version": recipe.version,
                    "stack": stack.name,
                    "archs": " ".join(arch for arch, error in refused.items() if error is None),
                    "profiles": " ".join(recipe.profiles) or "-",
                    "why not": "; ".join(f"{' '.join(archs)}: {cause}" for cause, archs in reasons.items()),
                }
            )
    return found


def support_rows(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A table of `support`, then the reasons."""
    headings = ("kernel", "version", "stack", "archs", "profiles")
    yield from console.table(headings, ([each[heading] for heading in headings] for each in found))
    yield from sorted({f"{each['stack']} does not support {each['why not']}" for each in found if each["why not"]})
