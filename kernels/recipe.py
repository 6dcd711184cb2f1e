"""Recipes: the data that describes how to obtain and build a kernel package (`recipes/<name>/recipe.toml`)."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from core.config import load
from core.errors import ConfigError, UsageError, suggest
from core.files import CHECKOUT
from core.source import Pinned, check
from core.stack import stacks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.stack import Stack


# Parts of command lines, and paths in the source tree, which they must not leave.
Flag = Annotated[str, msgspec.Meta(pattern=r"^[ -~]+$(?!\n)")]
Define = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(=[ -~]*)?$(?!\n)")]
Library = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$(?!\n)")]
Inside = Annotated[str, msgspec.Meta(pattern=r"^(?!/)(?!(.*/)?\.\.(/|$))[ -~]+$(?!\n)")]


class Flags(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Compiler flags that affect the machine code or are required to compile the source."""

    cxx: tuple[Flag, ...] = ()
    nvcc: tuple[Flag, ...] = ()


class Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One extension module. Paths are relative to the source tree and may be glob patterns.

    `kernels` (.cu) include no Python header, so one compile serves every Python version; `bindings` (.cpp) are
    compiled for each version. `kernels_include_python` compiles the kernels for each version, too. `libraries` are
    linked in addition to torch's and the CUDA runtime. `defines`, `flags` and `include` are added to the recipe's.
    `functions` are the functions or operators that the package's Python files call: the import checks that they exist.
    Modules of one name must have different `archs`.
    """

    name: str
    bindings: tuple[Inside, ...] = ()
    kernels: tuple[Inside, ...] = ()
    kernels_include_python: bool = False
    archs: tuple[str, ...] = ()
    libraries: tuple[Library, ...] = ()
    defines: tuple[Define, ...] = ()
    include: tuple[Inside, ...] = ()
    flags: Flags = Flags()
    functions: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The module's path in the wheel, without the ABI suffix."""
        return self.name.replace(".", "/")

    @property
    def init(self) -> str:
        """The module name in its init function."""
        return self.name.rpartition(".")[2]

    @property
    def inputs(self) -> dict[str, Any]:
        """What changes its bytes: not for which other archs it is, and not what is looked for in it."""
        fields = msgspec.to_builtins(self) | {"archs": ()}
        return {name: value for name, value in fields.items() if name != "functions"}


class Extra(Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An additional source, such as CUTLASS. It is placed into the folder `into` of the tree."""

    into: Inside
    tree: str = ""


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Python script of the source that writes more source files. `tree` is the hash of what it writes."""

    script: Inside
    args: tuple[str, ...] = ()
    tree: str = ""


class Patch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change to the source, with its reason; `cuda`, `torch` and `profiles` limit it to these."""

    file: str
    reason: str
    cuda: str = ""
    torch: str = ""
    profiles: tuple[str, ...] = ()


class KernelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named subset of the source, such as inference without backward kernels.

    `exclude` drops files by pattern; `defines` are passed to the bindings. Kernel files do not see them, so that
    profiles share kernel objects.
    """

    summary: str
    default: bool = False
    defines: tuple[Define, ...] = ()
    exclude: tuple[str, ...] = ()


class Recipe(Pinned, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to obtain and build one kernel package.

    `archs` maps a plain compute capability to nvcc's target for it (`"12.1" = "121a"`). Other capabilities are not
    supported; `unsupported` may give the reason.

    `torch` and `cuda` are the supported versions (`">=2.6"`). `abi = "abi3"` uses only Python's limited API of the
    version that `python` begins with, and "none" no Python. With `stable_torch`, the modules use only LibTorch's stable
    ABI, and the wheel runs with every version in `torch`. Without `default`, it is built only if named.

    `seconds` are measured compile times by file pattern: they order the graph and scale the progress bar. `memory_mb`
    is the measured peak memory of one compile.
    """

    archs: dict[str, str]
    modules: tuple[Module, ...]
    default: bool = True
    tree: str = ""
    summary: str = ""
    license: str = ""
    homepage: str = ""
    python: str = ""
    torch: str = ""
    cuda: str = ""
    abi: Literal["cpython", "abi3", "none"] = "cpython"
    stable_torch: bool = False
    extra: tuple[Extra, ...] = ()
    generate: tuple[Generate, ...] = ()
    root: Inside = "."
    files: tuple[Inside, ...] = ()
    exclude_files: tuple[str, ...] = ()
    license_files: tuple[Inside, ...] = ()
    requires: tuple[str, ...] = ()
    unsupported: dict[str, str] = msgspec.field(default_factory=dict)
    include: tuple[Inside, ...] = ()
    headers: str = ""
    flags: Flags = Flags()
    patches: tuple[Patch, ...] = ()
    profiles: dict[str, KernelProfile] = msgspec.field(default_factory=dict)
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    memory_mb: int = 4500

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

    def patches_for(self, stack: Stack, profile: str) -> list[Patch]:
        """The patches that apply to this stack and profile, in order."""
        return [
            patch
            for patch in self.patches
            if stack.cuda in SpecifierSet(patch.cuda)
            and stack.torch in SpecifierSet(patch.torch)
            and (not patch.profiles or profile in patch.profiles)
        ]

    def unsupported_version(self, stack: Stack) -> str:
        """The reason why this stack's torch or CUDA does not suit the recipe; empty if both do."""
        wanted = {"torch": (self.torch, stack.torch), "CUDA": (self.cuda, stack.cuda)}
        return "; ".join(
            f"it needs {name} {versions}, and the stack has {version}"
            for name, (versions, version) in wanted.items()
            if version not in SpecifierSet(versions)
        )

    @property
    def python_tag(self) -> str:
        """The oldest Python that an abi3 wheel supports, as wheel tags name it: `cp310`."""
        oldest = re.match(r">=3\.(\d+)", self.python)
        return f"cp3{oldest[1]}" if oldest else ""

    @property
    def torch_target(self) -> str:
        """The oldest torch that a wheel on LibTorch's stable ABI supports, as its headers encode it."""
        major, minor, *_ = *Version(self.torch.removeprefix(">=").partition(",")[0]).release, 0
        return f"0x{major:02X}{minor:02X}000000000000"

    @property
    def unpinned(self) -> list[str]:
        """The sources and scripts whose `tree` is empty."""
        pins = [(self.source[0].folder or self.tree, self.name)]
        pins += [(each.source[0].folder or each.tree, each.name) for each in self.extra]
        pins += [(each.tree, each.script) for each in self.generate]
        return [name for tree, name in pins if not tree]


def folders() -> list[Path]:
    """The recipe search path: the checkout's folder, then every folder of $HEARTH_RECIPES (`:`-separated).

    Raises UsageError for one without recipes.
    """
    extra = [Path(each).absolute() for each in os.environ.get("HEARTH_RECIPES", "").split(os.pathsep) if each]
    for folder in extra:
        if not any(folder.glob("*/recipe.toml")):
            own = (folder / "recipe.toml").exists()
            hint = f"use its parent folder: {folder.parent}" if own else "correct the variable, or unset it"
            raise UsageError("usage", f"HEARTH_RECIPES: {folder} has no folder with a recipe.toml", hint=hint)
    return [CHECKOUT / "recipes", *extra]


def load_recipe(path: Path) -> Recipe:
    """Load and check the recipe in the folder `path`; raises ConfigError."""
    file = path / "recipe.toml"
    recipe = load(file, Recipe)
    extra = tuple(msgspec.structs.replace(each, folder=str(path)) for each in recipe.extra)
    recipe = msgspec.structs.replace(recipe, folder=str(path), extra=extra)
    for each in (recipe, *extra):
        check(each)
    checks = (*_values(recipe), *_versions(recipe))
    if wrong := [f"{what} {value!r}" for what, value, right in checks if not right]:
        raise ConfigError("config", f"{file}: not valid: {', '.join(wrong)}", cause=_NAMES)
    missing = [f"patches/{patch.file}" for patch in recipe.patches if not (path / "patches" / patch.file).is_file()]
    missing += [f"{recipe.headers}/"] if recipe.headers and not (path / recipe.headers).is_dir() else []
    if missing:
        raise ConfigError("config", f"{file}: {', '.join(missing)} does not exist in the recipe's folder")
    for module in recipe.modules:
        for arch in module.archs:
            if arch not in recipe.archs:
                raise ConfigError("config", f"{file}: module {module.name} lists arch {arch}, but the recipe does not")
    return recipe


_NAMES = """\
name: letters, digits, - and _; version: as PyPI writes it, without +; profiles: lower-case letters and digits, one with
default = true; archs: "12.1" = "121", "121a" or "121f"; modules: Python names, each once for an arch, at least one for
each arch, with bindings or kernels; torch, cuda, python: versions, such as ">=2.6"; abi = "abi3" needs
python = ">=3.10", or another first version; stable_torch needs a first version in torch; patterns: ** is a whole part
of a path; memory_mb, seconds: positive"""


def _values(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Each value that becomes a part of a wheel's name or label: what it is, the value, is it valid."""
    yield "name", recipe.name, bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?", recipe.name, re.ASCII))
    yield "version", recipe.version, _canonical(recipe.version)
    for profile in recipe.profiles:
        yield "profile", profile, bool(re.fullmatch("[a-z][a-z0-9]*", profile))
    defaults = [name for name, profile in recipe.profiles.items() if profile.default]
    yield "profiles with default = true", ", ".join(defaults), len(defaults) == bool(recipe.profiles)
    for patch in recipe.patches:
        yield f"profiles of {patch.file}", ", ".join(patch.profiles), set(patch.profiles) <= recipe.profiles.keys()
    for arch, target in recipe.archs.items():
        digits = re.fullmatch(r"(\d{1,2})\.(\d)", arch, re.ASCII)
        # Plain code of an older minor version runs, too; "a" is for one capability alone.
        runs = digits and re.fullmatch(f"{digits[1]}[0-{digits[2]}]f?|{digits[1]}{digits[2]}a", target)
        yield "arch", f"{arch} = {target}", bool(runs)
        names = [module.name for module in recipe.modules_for(arch)]
        yield f"modules for {arch}", ", ".join(names), 0 < len(names) == len({*names})
    for module in recipe.modules:
        valid = all(each.isidentifier() and each.isascii() for each in module.name.split("."))
        python = module.kernels_include_python and recipe.abi == "none"
        yield "module", module.name, valid and bool(module.bindings or module.kernels) and not python
    own = [each for module in recipe.modules for each in (*module.bindings, *module.kernels)]
    for pattern in (*recipe.files, *own):
        yield "pattern", pattern, all(part == "**" or "**" not in part for part in pattern.split("/"))
    for pattern, seconds in recipe.seconds.items():
        yield f"seconds of {pattern}", str(seconds), 0 <= seconds < math.inf
    into = [each.into.strip("/") for each in recipe.extra]
    yield "into", ", ".join(into), len(into) == len({*into})
    yield "memory_mb", str(recipe.memory_mb), recipe.memory_mb > 0


def _versions(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Ranges of versions."""
    patches = [versions for patch in recipe.patches for versions in (patch.cuda, patch.torch)]
    for versions in (recipe.torch, recipe.cuda, recipe.python, *patches):
        yield "versions", versions, _specifier(versions)
    yield "python of abi3", recipe.python, recipe.abi != "abi3" or bool(recipe.python_tag)
    oldest = bool(re.match(r">=\d+\.\d+", recipe.torch))
    yield "torch of stable_torch", recipe.torch, not recipe.stable_torch or oldest


def _specifier(text: str) -> bool:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        return False
    return True


def _canonical(version: str) -> bool:
    try:
        return str(Version(version)) == version and "+" not in version
    except InvalidVersion:
        return False


def known() -> tuple[dict[str, list[Recipe]], dict[str, ConfigError]]:
    """All valid kernel recipes, by name, and the errors of the others, which keep no other kernel from being built.

    Several of a name are for different stacks. Those in a later folder replace all of their name in earlier ones.
    """
    found, errors = _load()
    return {each[0].name: each for each in found.values() if not isinstance(each, ConfigError)}, errors


def recipes() -> dict[str, list[Recipe]]:
    """All valid kernel recipes, by name."""
    return known()[0]


def find_recipes(name: str) -> list[Recipe]:
    """Return the recipes of that name, as package indexes compare names (PyPA).

    Raises UsageError with the nearest match, or the ConfigError of a recipe that is not valid.
    """
    found = _load()[0].get(canonicalize_name(name))
    if isinstance(found, ConfigError):
        raise found
    if found is None:
        raise UsageError("unknown-name", f"there is no kernel {name!r}", hint=suggest(name, recipes()))
    return found


def _load() -> tuple[dict[str, list[Recipe] | ConfigError], dict[str, ConfigError]]:
    """The recipes of each normalised name, or why there are none; and the error of each that is not valid.

    A recipe that is not valid never reveals one of its name in an earlier folder, which it was to replace.
    """
    found: dict[str, list[Recipe] | ConfigError] = {}
    errors: dict[str, ConfigError] = {}
    for folder in folders():
        here: dict[str, list[Recipe]] = {}
        wrong: dict[str, ConfigError] = {}
        for file in sorted(folder.glob("*/recipe.toml")):
            try:
                recipe = load_recipe(file.parent)
                here.setdefault(canonicalize_name(recipe.name), []).append(recipe)
            except ConfigError as error:
                wrong[canonicalize_name(_stated_name(file))] = error
        for name, same in here.items():
            if conflict := _conflict(same):
                wrong[name] = conflict
        found |= here
        found |= {name: error for name, error in wrong.items() if name not in here or len(here[name]) > 1}
        errors = {name: error for name, error in errors.items() if name not in here} | wrong
    return found, errors


def _conflict(same: Sequence[Recipe]) -> ConfigError | None:
    """The error of recipes with one name: two build wheels of one file name, or they spell the name differently."""
    names = sorted({each.name for each in same})
    if len(names) > 1:
        what = f"{' and '.join(str(each.path) for each in same)}: {' and '.join(names)} are one name for installers"
        return ConfigError("config", what, hint="use the same spelling, or other names")
    for stack in stacks().values() if len(same) > 1 else ():
        suited = [str(each.path) for each in same if not each.unsupported_version(stack)]
        if len(suited) > 1:
            what = f"{' and '.join(suited)} both build {names[0]} for stack {stack.name}"
            return ConfigError("config", what, hint="limit `torch` or `cuda` in one of them")
    return None


def _stated_name(file: Path) -> str:
    """The name in a recipe that is not valid, else that of its folder."""
    text = ""
    with suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"""^name *= *["'](.+?)["']""", text.partition("\n[")[0], re.MULTILINE)
    return found[1] if found else file.parent.name


def for_stack(same: Sequence[Recipe], stack: Stack) -> Recipe:
    """The one of the recipes of a name that suits this stack, else the first of them."""
    return next((each for each in same if not each.unsupported_version(stack)), same[0])
