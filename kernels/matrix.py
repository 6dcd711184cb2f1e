"""The builds of a request: recipes x archs x stack x Pythons x platform, each with its key or the reason to skip it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import packaging
from packaging.specifiers import SpecifierSet

from core import arch as archs
from core import console, files, manifest
from core.errors import HearthError, SupportError, UsageError, suggest
from core.stack import Platform, Stack, find_stack, stacks
from kernels import recipe as recipes_of
from kernels import toolchain as toolchains

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from core.arch import Arch
    from core.source import Pinned
    from kernels.recipe import Module, Recipe
    from kernels.toolchain import Toolchain

    Describe = Callable[[Stack, Platform, str], Toolchain]

BUILDER = 4
"""Increase it when a change of Hearth changes wheels: link line, metadata, wheel layout."""


@dataclass(frozen=True)
class Build:
    """A wheel to build: Recipe x Archs x Stack x Python x Platform, with a profile.

    A fat wheel has several archs. They are as the recipe needs them: see `canonical`.
    """

    recipe: Recipe
    archs: tuple[Arch, ...]
    profile: str
    toolchain: Toolchain

    @property
    def arch(self) -> str:
        """The archs as `--arch` takes them: `8.9;12.0`."""
        return ";".join(map(str, self.archs))

    def target(self, arch: Arch) -> str:
        """nvcc's name of an arch's target: `121a`."""
        return _target(self.recipe, arch)

    def of(self, module: Module) -> Build:
        """The build with only the archs that a module is compiled for."""
        named = module.archs or self.recipe.archs
        return replace(self, archs=tuple(each for each in self.archs if each.capability in named))

    @property
    def modules(self) -> list[Module]:
        """The extension modules of these archs."""
        return [module for module in self.recipe.modules if self.of(module).archs]

    @property
    def singles(self) -> dict[str, Build]:
        """The build of each target, by its label: `sm120a`, or `sm89.ptx`. Archs may have a target in common."""
        labels = [f"sm{self.target(arch)}{'.ptx' if arch.ptx else ''}" for arch in self.archs]
        found = {label: replace(self, archs=(arch,)) for label, arch in zip(labels, self.archs, strict=True)}
        return {label: each for label, each in found.items() if f"{label}.ptx" not in found}

    @property
    def label(self) -> str:
        """Its targets in names: `sm89.sm120a`."""
        return ".".join(self.singles)

    @property
    def version(self) -> str:
        """The wheel's version, with stack, torch, arch and profile in its local label."""
        stack = self.toolchain.stack
        label = f"{stack.name if self.recipe.stable_torch else stack.label}.{self.label}"
        return f"{self.recipe.version}+{label}{f'.{self.profile}' if self.profile else ''}"

    def tag(self, platform: str) -> str:
        """The wheel's compatibility tag, with this platform tag."""
        return f"{self.python_tag}-{platform}"

    @property
    def python_tag(self) -> str:
        """The first two parts of the tag: Python and its ABI."""
        tags = {"abi3": f"{self.recipe.python_tag}-abi3", "none": "py3-none"}
        return tags.get(self.recipe.abi, f"{self.toolchain.abi_tag}-{self.toolchain.abi_tag}")

    def module_file(self, module: Module) -> str:
        """The path of an extension module in the wheel."""
        chain = self.toolchain
        cpython = f".cpython-{chain.python.replace('.', '')}-{chain.platform.cpu}-linux-gnu.so"
        return module.path + {"cpython": cpython, "abi3": ".abi3.so", "none": ".so"}[self.recipe.abi]

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
        return manifest.index(self.toolchain.stack.name, self.arch)

    @property
    def identifier(self) -> str:
        """The name of this build in lists and messages, and of its log.

        It names each arch, with a target that has another number: `sm89.80`. Labels name targets alone.
        """
        chain = self.toolchain
        archs = []
        for arch in self.archs:
            own, target = f"{arch.major}{arch.minor}", self.target(arch)
            name = target if target.startswith(own) else f"{own}.{target}"
            archs.append(f"sm{name}{'.ptx' if arch.ptx else ''}")
        python = chain.abi_tag if self.recipe.abi == "cpython" else self.python_tag
        tail = f"{python}-{chain.platform.value}{f'-{self.profile}' if self.profile else ''}"
        return f"{self.recipe.name}-{self.recipe.version}-{chain.stack.name}-{'.'.join(archs)}-{tail}"

    @property
    def source_folder(self) -> str:
        """The folder of the patched source, shared by all archs, Python versions and profiles without own patches.

        Messages of kernels contain its path, so another one for each arch would give each its own host code.
        """
        return f"{self.recipe.name}{self._patched}-{self.toolchain.view.name}/src"

    @property
    def _patched(self) -> str:
        """The profile, if the recipe has patches for some profiles only: they change the source and the kernels."""
        return f"-{self.profile}" if any(patch.profiles for patch in self.recipe.patches) else ""

    @property
    def folder(self) -> str:
        """The folder of kernel objects, shared by all Python versions and profiles."""
        return f"{self.recipe.name}-{self.label}{self._patched}-{self.toolchain.view.name}"

    @property
    def python_folder(self) -> str:
        """Its subfolder for one Python version and profile: bindings and linked modules."""
        return f"{self.folder}/{self.toolchain.python_folder}{f'-{self.profile}' if self.profile else ''}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that can change a byte of the wheel."""
        recipe, chain = self.recipe, self.toolchain
        chosen = recipe.profiles.get(self.profile)
        patches = recipe.patches_for(chain.stack, self.profile)
        return {
            "builder": BUILDER,
            "source": _tree(recipe),
            "origins": [[each.name, each.version, _origin(each)] for each in (recipe, *recipe.extra)],
            "extra": [[each.into, _tree(each)] for each in recipe.extra],
            "generate": [[each.script, each.args, each.tree] for each in recipe.generate],
            "patches": [[patch.file, files.sha256(recipe.path / "patches" / patch.file)] for patch in patches],
            "headers": files.tree_hash(recipe.path / recipe.headers) if recipe.headers else "",
            "include": recipe.include,
            "flags": {"cxx": recipe.flags.cxx, "nvcc": recipe.flags.nvcc},
            "profile": [self.profile, chosen.defines if chosen else (), chosen.exclude if chosen else ()],
            "modules": [[each.inputs, self.of(each).label] for each in self.modules],
            "abi": [recipe.abi, recipe.stable_torch and recipe.torch],
            "files": [recipe.root, recipe.files, recipe.exclude_files, recipe.license_files],
            "metadata": [
                recipe.name,
                self.version,
                recipe.summary,
                recipe.license,
                recipe.homepage,
                recipe.python,
            ],
            "requires": recipe.requires,
            "targets": list(self.singles),
            "stack": [chain.stack.name, chain.stack.torch, chain.stack.cuda, chain.stack.cxx11_abi, chain.stack.cxx],
            "platform": chain.platform.value,
            "python": chain.python,
            "toolchain": dict(chain.parts),
            "zlib": _zlib(),
            "writers": _writers(),
        }

    @cached_property
    def key(self) -> str:
        """The hash of the inputs: builds with the same key produce the same bytes."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def _tree(source: Pinned) -> str:
    """The hash of a source: its pin, or that of the recipe's own folder."""
    own = source.source[0].folder
    return files.tree_hash(source.path / own) if own else source.tree


def _origin(source: Pinned) -> dict[str, str]:
    """Where a source is from, as the SBOM names it."""
    found: dict[str, str] = msgspec.to_builtins(source.source[0])
    return found


@cache
def _writers() -> list[str]:
    """The libraries that write METADATA, the SBOM and the platform tag. importlib.metadata would take 8 ms."""
    names = ("auditwheel-", "cyclonedx_python_lib-", "packageurl_python-", "packaging-")
    site = Path(packaging.__file__).parent.parent
    return sorted(each.stem for each in site.glob("*.dist-info") if each.name.startswith(names))


@cache
def _zlib() -> str:
    """The identity of the zlib that compresses wheels: other versions and replacements write other bytes."""
    sample = zlib.compress("".join(map(str, range(10_000))).encode())
    return f"{zlib.ZLIB_RUNTIME_VERSION} {hashlib.sha256(sample).hexdigest()[:16]}"


@dataclass(frozen=True)
class Skipped:
    """A combination that is not built, with the reason."""

    identifier: str
    kernel: str
    error: HearthError

    @property
    def reason(self) -> str:
        """What is missing, and why."""
        return ": ".join(" ".join(each.split()) for each in (self.error.what, self.error.cause) if each)


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
    fat: bool = False

    def __post_init__(self) -> None:
        if self.jobs and not (self.jobs.isdecimal() and int(self.jobs)):
            hint = "give the number of parallel compile jobs, or omit it"
            raise UsageError("usage", f"--jobs must be a positive integer (got {self.jobs!r})", hint=hint)


def select(request: Request, describe: Describe = toolchains.describe) -> tuple[list[Build], list[Skipped]]:
    """Combine recipes and archs; unsupported combinations are skipped with the reason.

    `describe` finds a toolchain. Raises the reason if no build remains, also of one of the named kernels.
    """
    stack = find_stack(request.stack)
    if stack.notice:
        console.say(stack.notice)
    # Every comma-separated name is looked up, so that a mistyped one is an error.
    names = _listed(request.kernel)
    known, broken = ({}, {}) if names else recipes_of.known()
    chosen = {name: recipes_of.find_recipes(name) for name in names} or {
        name: same for name, same in known.items() if any(recipe.default for recipe in same)
    }
    profiles = {name for same in chosen.values() for recipe in same for name in recipe.profiles}
    if request.profile and request.profile not in profiles:
        raise UsageError(
            "unknown-name",
            f"there is no profile {request.profile!r} of {', '.join(chosen)}",
            hint=suggest(request.profile, profiles) if profiles else "omit --profile",
        )
    suited = [recipes_of.for_stack(same, stack) for same in chosen.values()]
    builds: dict[str, Build] = {}
    skipped = [Skipped(f"the recipe of {name}", name, why) for name, why in broken.items()]
    notes: dict[str, None] = {}
    for platform, group in _groups(request):
        for python, recipe in itertools.product(_listed(request.python) or [stack.python], suited):
            where = f"{stack.name} {python} {platform.value}"
            usable: list[Arch] = []
            for arch in group:
                if (reason := refusal(recipe, arch, stack)) is None:
                    usable.append(arch)
                    notes |= dict.fromkeys(_note(recipe, arch))
                else:
                    skipped.append(Skipped(f"{recipe.name} {arch} {where}", recipe.name, reason))
            try:
                if usable:
                    found = _build(recipe, usable, request.profile, describe, stack, platform, python)
                    builds.setdefault(found.identifier, found)
            except SupportError as error:
                skipped.append(Skipped(f"{recipe.name} {';'.join(map(str, usable))} {where}", recipe.name, error))
    if not request.python and not all(build.toolchain.native for build in builds.values()):
        notes |= dict.fromkeys([_PYTHON_NOTE])
    built = {build.recipe.name for build in builds.values()}
    for each in skipped:
        if not built or (names and each.kernel not in built):
            raise each.error
    for note in notes:
        console.say(note)
    return list(builds.values()), skipped


_PYTHON_NOTE = "for the Python that runs Hearth, or the newest that torch supports; for the other machine's: --python"


def _listed(text: str) -> list[str]:
    """The words of a comma-separated list, each once."""
    return list(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))


def _groups(request: Request) -> Iterator[tuple[Platform, list[Arch]]]:
    """The archs of each wheel: one each, or with `fat` all that have the platform in common."""
    known = archs.known_archs()
    named = request.arch or os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()  # else the GPUs of this machine
    groups: dict[tuple[str, str], list[Arch]] = {}
    for arch in archs.wanted_archs(request.arch):
        info = known[arch.capability]
        platform = request.platform or (info.platform if named else Platform.local().value)
        groups.setdefault((platform, "" if request.fat else str(arch)), []).append(arch)
    for (platform, _), group in groups.items():
        yield Platform.parse(platform), group


def split(request: Request) -> list[Request]:
    """Divide a request for several machines: one part per recipe and arch. Needs no compiler.

    All Pythons are in one part, since they share the kernel objects. Raises what `select` raises.
    """
    builds, skipped = select(request, toolchains.look)
    for each in skipped:
        console.say(f"skipping {each.identifier}: {each.reason}")
    parts: dict[tuple[str, str], Request] = {}
    for build in builds:
        kernel, arch, fat = build.recipe.name, build.arch, len(build.archs) > 1
        profile = request.profile if request.profile in build.recipe.profiles else ""
        python = request.python or build.toolchain.python  # hosts may run Hearth with another one
        parts[kernel, arch] = replace(request, kernel=kernel, arch=arch, fat=fat, profile=profile, python=python)
    return list(parts.values())


def _build(
    recipe: Recipe,
    group: Sequence[Arch],
    profile: str,
    describe: Describe,
    stack: Stack,
    platform: Platform,
    python: str,
) -> Build:
    """One build; a recipe without the profile uses its default."""
    chosen = profile if profile in recipe.profiles else recipe.default_profile
    python = python_for(recipe, stack, python)
    if not SpecifierSet(recipe.python).contains(f"{python}.99"):  # of any patch release
        what = f"{recipe.name} {recipe.version} does not support Python {python}"
        raise SupportError("recipe-support", what, cause=f"it needs Python {recipe.python}", hint="choose --python")
    found = Build(recipe, canonical(recipe, group), chosen, describe(stack, platform, python))
    names = [module.name for module in found.modules]
    if twice := {name for name in names if names.count(name) > 1}:
        what = f"{recipe.name} {recipe.version} cannot be built as one wheel for {found.arch}"
        cause = f"{', '.join(sorted(twice))} has other files or flags on some of them"
        raise SupportError("recipe-support", what, cause=cause, hint="omit --fat")
    return found


def python_for(recipe: Recipe, stack: Stack, python: str) -> str:
    """The Python of a build. A wheel for every Python is built with the one that runs Hearth, which is there."""
    return stack.python if recipe.abi != "cpython" and python in ("", *stack.pythons) else python


def _target(recipe: Recipe, arch: Arch) -> str:
    """nvcc's target. The user's suffix has precedence over the recipe's."""
    own = f"{arch.major}{arch.minor}{arch.suffix}"
    return own if arch.suffix else recipe.archs[arch.capability]


def _note(recipe: Recipe, arch: Arch) -> Iterator[str]:
    """Say that there is no PTX, where it was requested.

    PTX of an `a` target runs on that capability alone, for which the wheel has machine code; that of an `f` target on
    the GPUs of its family (CUDA C++ Programming Guide, "Family-Specific Features").
    """
    target = _target(recipe, arch)
    if arch.ptx and target.endswith("a"):
        yield f"{recipe.name}: no PTX for {arch}: PTX of compute_{target} would run on no other GPU"


def canonical(recipe: Recipe, group: Sequence[Arch]) -> tuple[Arch, ...]:
    """The archs without what does not change the wheel.

    That is the suffix that the recipe uses anyway, PTX of `a`, and an arch that is also there with PTX.
    """
    found: set[Arch] = set()
    for arch in group:
        target = _target(recipe, arch)
        suffix = "" if target == recipe.archs[arch.capability] else arch.suffix
        found.add(replace(arch, suffix=suffix, ptx=arch.ptx and not target.endswith("a")))
    return tuple(sorted(each for each in found if each.ptx or replace(each, ptx=True) not in found))


def refusal(recipe: Recipe, arch: Arch, stack: Stack) -> SupportError | None:
    """The reason why this recipe cannot be built for this arch and stack, or None."""
    gpu = f"{arch.capability} ({archs.known_archs()[arch.capability].gpus})"
    if arch.capability not in stack.archs:
        others = ", ".join(_stacks_for(arch))
        return SupportError(
            "stack-arch",
            f"stack {stack.name} does not support {gpu}",
            cause=stack.archs_reason,
            hint=f"use a stack that does: {others}" if others else f"{stack.name} supports {', '.join(stack.archs)}",
        )
    if cause := recipe.unsupported_version(stack):
        suited = [name for name, each in stacks().items() if not recipe.unsupported_version(each)]
        return SupportError(
            "recipe-support",
            f"{recipe.name} {recipe.version} does not support stack {stack.name}",
            cause=recipe.unsupported.get(stack.name, cause),
            hint=f"stacks of {recipe.name}: {', '.join(suited) or 'none'}",
        )
    if arch.capability not in recipe.archs:
        return SupportError(
            "recipe-support",
            f"Hearth has no build of {recipe.name} {recipe.version} for {gpu}",
            cause=recipe.unsupported.get(arch.capability, "not listed in [archs] of its recipe"),
            hint=f"archs of {recipe.name}: {', '.join(recipe.archs)}",
        )
    return None


def _stacks_for(arch: Arch) -> Sequence[str]:
    return [name for name, stack in stacks().items() if arch.capability in stack.archs]
