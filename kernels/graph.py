"""Writes one ninja file for all modules of all kernels: longest compile first, no local paths in commands."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ninja.ninja_syntax import Writer

from core import files, workspace
from core.errors import ConfigError, HearthError, UsageError
from kernels import compat
from kernels import toolchain as toolchains
from kernels.source import HEADERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kernels.matrix import Build
    from kernels.recipe import Module, Recipe
    from kernels.toolchain import Toolchain


def root() -> Path:
    """The folder where ninja runs. All paths in the ninja file are relative to it.

    Raises UsageError where they would lead elsewhere.
    """
    place = workspace.current().cache / "build"
    if Path(os.path.realpath(place)).parent != Path(os.path.realpath(place.parent)):
        what, hint = f"{place} is a link to another folder", "link the whole cache instead, or set HEARTH_CACHE"
        raise UsageError("usage", what, cause="compile commands contain ../toolchains", hint=hint)
    return place


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One compile or link step. Paths are relative to `root()`; `seconds` is the expected duration."""

    rule: str
    output: str
    inputs: list[str]
    seconds: float
    variables: dict[str, str]


@dataclass(frozen=True)
class Graph:
    """A ninja file's text, its edges by output, the outputs of each build, and the modules by (build, module name).

    `errors` are the builds that have no place in it: a pattern of their recipe matches no file.
    """

    text: str
    edges: dict[str, Edge]
    outputs: dict[str, set[str]]
    modules: dict[tuple[str, str], Path]
    errors: dict[str, HearthError]

    def name(self, output: str) -> str:
        """The display name of the step that makes `output`: its source file, or the module for a link."""
        edge = self.edges.get(output)
        return edge.inputs[0] if edge and edge.rule in _COMPILES else output

    def seconds(self, output: str) -> float:
        """The expected seconds of the step that makes `output`."""
        return self.edges[output].seconds if output in self.edges else 0.0


def write(builds: Sequence[Build], pools: Mapping[str, int]) -> Graph:
    """Write the graph of `builds`. Their sources must be in place. `pools` limits the compiles of each recipe.

    The folder of kernel objects is not keyed by Python version or profile, so builds that differ only in those share
    the objects.
    """
    text = StringIO()
    writer = Writer(text, width=1_000_000)
    writer.comment("Written by Hearth; a run writes it anew.")
    for name, depth in pools.items():
        writer.pool(f"compile-{name}", depth)
    launcher = toolchains.launcher()
    start = f"{launcher} " if launcher else ""
    for name, body in _RULES.items():
        compiles = name in _COMPILES
        writer.rule(
            name,
            (start if compiles else "") + body,
            description=f"{name} $out",
            depfile="$out.d" if compiles else None,
        )
    edges: dict[str, Edge] = {}
    outputs: dict[str, set[str]] = {}
    modules: dict[tuple[str, str], Path] = {}
    errors: dict[str, HearthError] = {}
    for build in builds:
        try:
            own = [edge for module in build.modules for edge in _module_edges(build, module)]
        except ConfigError as error:
            errors[build.identifier] = error
            continue
        pool = f"compile-{build.recipe.name if build.recipe.name in pools else ''}"
        names = _names(build.source_folder)
        for edge in (each for each in own if each.rule != "link"):
            edge.variables.update(names=names, **({"pool": pool} if edge.rule in _COMPILES else {}))
        edges |= {edge.output: edge for edge in own}
        outputs[build.identifier] = {edge.output for edge in own}
        for module in build.modules:
            modules[build.identifier, module.name] = root() / _module_output(build, module)
    # ninja starts edges of equal weight in file order, so write the longest compile first.
    for edge in sorted(edges.values(), key=lambda edge: -edge.seconds):
        writer.build([edge.output], edge.rule, edge.inputs, variables=edge.variables)
    return Graph(text.getvalue(), edges, outputs, modules, errors)


# --objdir-as-tempdir and --orig_src_path_name: otherwise nvcc mangles internal names with a hash of its temporary file
# name and the source's absolute path, and the same source gives different output in another folder. $name is not the
# path of an existing file: ccache would treat it as a second source and not cache.
# THRUST_*: otherwise thrust, which torch's complex numbers include, puts the arch into names of host code, and objects
# of several archs could not be merged. CUB keeps it in its own: it caches what depends on the arch.
# -fno-canonical-system-headers: otherwise g++ writes resolved header paths into messages (__FILE__).
_RULES = {
    "nvcc": "$nvcc -c $in -o $out -MMD -MF $out.d -MT $out --objdir-as-tempdir "
    "-Xcudafe --orig_src_path_name -Xcudafe $name -ccbin $cxx $std "
    "-DTHRUST_DISABLE_ABI_NAMESPACE -DTHRUST_IGNORE_ABI_NAMESPACE_ERROR "
    "-Xcompiler -fPIC,-fno-canonical-system-headers $flags",
    "cxx": "$cxx -c $in -o $out -MMD -MF $out.d -MT $out $std -fPIC -fno-canonical-system-headers $flags",
    "link": "$cxx -shared -o $out $in -Wl,-s -Wl,--as-needed $libs",
}
_COMPILES = ("nvcc", "cxx")
# The objects of all archs into one; where that is impossible, one compile for all of them.
_RULES["merge"] = f"{{ $python $merge $cxx $out $in || {_RULES['nvcc'].replace('$in', '$source')}; }}"
# Each command records what it wrote, for `run`, and ends with a hash of the names of the source's files: a new header
# may be found before one that a file included until now, and no dependency file names it.
_RULES = {
    name: f"{body} && sha256sum $out{' $out.d' if name in _COMPILES else ''} > $out.sha256 # $names"
    for name, body in _RULES.items()
}


def _names(source: str) -> str:
    """The hash of the paths of all files in a source folder."""
    tree = root() / source
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    return hashlib.sha256("\0".join(paths).encode()).hexdigest()[:12]


def _module_output(build: Build, module: Module) -> str:
    return f"{build.python_folder}/{module.path}.so"


def _module_edges(build: Build, module: Module) -> list[Edge]:
    """The edges of a module: kernels, bindings, and the link."""
    tree = root() / build.source_folder
    profile = build.recipe.profiles.get(build.profile)
    exclude = profile.exclude if profile else ()
    kernels = _matches(tree, module.kernels, exclude, build.recipe)
    bindings = _matches(tree, module.bindings, exclude, build.recipe)
    compiles = [_kernel_edges(build.of(module), module, each) for each in kernels]
    compiles += [[_binding_edge(build, module, each)] for each in bindings]
    link = Edge(
        rule="link",
        output=_module_output(build, module),
        inputs=[edges[-1].output for edges in compiles],
        seconds=1.0,
        variables=_link_variables(build, module),
    )
    return [*(edge for edges in compiles for edge in edges), link]


def _kernel_edges(build: Build, module: Module, source: str) -> list[Edge]:
    """Compile a .cu file; the last edge is the module's object.

    Unless it includes Python's headers, the command depends on neither Python nor the profile. Modules share the object
    of a file that they compile with the same command. For several archs, the objects of each, which builds for that
    arch share, are merged.
    """
    recipe, view = build.recipe, _view(build)
    python = module.kernels_include_python
    own = module.flags.nvcc or module.defines or module.include or python
    place = f"{build.python_folder if python else build.folder}/obj/{f'{module.path}/' if own else ''}"
    flags = [
        *_words([*recipe.flags.nvcc, *module.flags.nvcc, *_defines(build, module, python=python)]),
        *(_abi(build), *_gencode(build), *_includes(build, module), *_isystem(build, python=python)),
    ]
    variables = {
        "nvcc": f"{view}/nvcc/bin/nvcc",
        "cxx": _cxx(build),
        "name": f"{recipe.name}/{source}",
        "flags": " ".join(flags),
    }
    output = f"{place}{source}.o"
    edge = _compile_edge("nvcc", build, source, output, variables)
    if len(build.singles) == 1:
        return [edge]
    singles = [each for single in build.singles.values() for each in _kernel_edges(single, module, source)]
    more = {
        "python": f"{_quoted(sys.executable)} -IS",
        "merge": _quoted(str(files.CHECKOUT / "kernels/merge.py")),
        "source": edge.inputs[0],
    }
    inputs = [each.output for each in singles]
    return [*singles, replace(edge, rule="merge", inputs=inputs, seconds=0.1, variables=edge.variables | more)]


def _binding_edge(build: Build, module: Module, source: str) -> Edge:
    """Compile a .cpp file. The object contains the module's name, so each module compiles its own."""
    flags = [
        *_words([*build.recipe.flags.cxx, *module.flags.cxx, *_defines(build, module, python=True)]),
        *(_abi(build), *_includes(build, module), *_isystem(build, python=True)),
    ]
    variables = {"cxx": _cxx(build), "flags": " ".join(flags)}
    return _compile_edge("cxx", build, source, f"{build.python_folder}/obj/{module.path}/{source}.o", variables)


def _words(flags: Sequence[str]) -> Iterator[str]:
    """Flags of a recipe as ninja and its shell read them."""
    yield from map(_quoted, flags)


def _quoted(word: str) -> str:
    """A word of a command, quoted for the shell and for ninja."""
    return shlex.quote(word).replace("$", "$$")


def _defines(build: Build, module: Module, *, python: bool) -> list[str]:
    """The macros of a file, with those of the profile and the module's name for one that may contain bindings."""
    recipe = build.recipe
    names = [*module.defines, *([f"TORCH_TARGET_VERSION={recipe.torch_target}"] if recipe.stable_torch else [])]
    if python:
        profile = recipe.profiles.get(build.profile)
        names += [*(profile.defines if profile else ()), f"TORCH_EXTENSION_NAME={module.init}"]
        if recipe.abi == "abi3":
            names.append(f"Py_LIMITED_API=0x03{int(recipe.python_tag.removeprefix('cp3')):02X}0000")
    return [f"-D{name}" for name in names]


def _compile_edge(rule: str, build: Build, source: str, output: str, variables: dict[str, str]) -> Edge:
    return Edge(
        rule=rule,
        output=output,
        inputs=[f"{build.source_folder}/{source}"],
        seconds=_seconds(build.recipe, source),
        variables={"std": f"-std={build.toolchain.stack.cxx}", **variables},
    )


def _cxx(build: Build) -> str:
    return _quoted(build.toolchain.cxx)


def _view(build: Build) -> str:
    return os.path.relpath(build.toolchain.view, root())


def _abi(build: Build) -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(build.toolchain.stack.cxx11_abi)}"


def _includes(build: Build, module: Module) -> list[str]:
    """The recipe's header folder, which comes first, then the source's include folders."""
    recipe = build.recipe
    places = [*([HEADERS] if recipe.headers else []), *module.include, *recipe.include]
    return list(_words([f"-I{build.source_folder}/{place}" for place in places]))


def _matches(tree: Path, patterns: Sequence[str], exclude: Sequence[str], recipe: Recipe) -> list[str]:
    """The files of the source that match, each once; raises ConfigError for a pattern without one."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = sorted(str(path.relative_to(tree)) for path in tree.glob(pattern) if path.is_file())
        kept = [name for name in names if not any(fnmatch(name, each) for each in exclude)]
        if not kept:
            what = f"{recipe.path / 'recipe.toml'}: no file of the source matches {pattern!r}"
            raise ConfigError("config", what, cause=f"looked in {tree}")
        found |= dict.fromkeys(kept)
    if odd := [name for name in found if not re.fullmatch(r"[\w.+,@=/-]+", name, re.ASCII)]:
        what = f"{recipe.path / 'recipe.toml'}: {odd[0]!r} cannot be compiled: ninja would misread its name"
        raise ConfigError("config", what, hint="rename the file with a patch")
    return list(found)


def _isystem(build: Build, *, python: bool) -> list[str]:
    """Torch's headers, then CUDA's and Python's. cu13 wheels share one include folder; cu12 wheels have one each.

    Without `python`, the paths depend on no Python version.
    """
    view = _view(build)
    own = f"{view}/{build.toolchain.python_folder}"
    site = f"{own}/site" if python else view
    cuda = sorted(path.parent.name for path in (build.toolchain.view / "nvidia").glob("*/include"))
    places = [f"{site}/torch/include", f"{site}/torch/include/torch/csrc/api/include"]
    places += [f"{site}/nvidia/{each}/include" for each in cuda]
    if python:
        places += [f"{view}/nvcc/include"]  # CUDA's headers include crt/, which ships with the compiler
        places += [f"{own}/include"] if build.recipe.abi != "none" else []
    return [f"-isystem {place}" for place in places]


def _gencode(build: Build) -> list[str]:
    flags: list[str] = []
    for arch in (single.archs[0] for single in build.singles.values()):
        target = build.target(arch)
        flags.append(f"-gencode=arch=compute_{target},code=sm_{target}")
        if arch.ptx:
            flags.append(f"-gencode=arch=compute_{target},code=compute_{target}")
    return flags


def _seconds(recipe: Recipe, source: str) -> float:
    """The measured compile seconds of a file, or a default for its type."""
    for pattern, seconds in recipe.seconds.items():
        if fnmatch(source, pattern):
            return seconds
    return 60.0 if source.endswith(".cu") else 20.0


def _link_variables(build: Build, module: Module) -> dict[str, str]:
    chain = build.toolchain
    view = _view(build)
    site = f"{view}/{chain.python_folder}/site"
    runtime = next(chain.site.glob("nvidia/*/lib/libcudart.so")).parent.relative_to(chain.site)
    libraries = [
        f"{view}/stubs/{compat.NAME}",
        *(f"-L{site}/torch/lib", f"-L{site}/{runtime}", f"-L{view}/stubs"),
        *(f"-l{each}" for each in (*(_SYSTEM_LIBRARIES if build.recipe.stable_torch else ()), *_TORCH_LIBRARIES)),
        "-lcudart",
        # Keep the recipe's libraries even if no symbol needs them: the driver stub defines none.
        *(f"-Wl,--no-as-needed {_library(chain, site, each)}" for each in module.libraries),
    ]
    return {"cxx": _cxx(build), "libs": " ".join(libraries)}


def _library(chain: Toolchain, site: str, name: str) -> str:
    """The linker's words for a library: NVIDIA's packages have it under its versioned name alone."""
    if found := chain.nvidia_library(name):
        return f"-L{site}/{found.parent.relative_to(chain.site)} -l:{found.name}"
    return f"-l{name}"


# Torch's libraries export parts of libstdc++, without versions. A module takes them from there where torch is the
# stack's own, and so runs with an older libstdc++. Other torches need not have them: there the system's libraries come
# first, and the linker records their versions, which decide the wheel's tag.
_SYSTEM_LIBRARIES = ("stdc++", "gcc_s", "m", "c")
_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cuda", "torch_cpu", "c10_cuda", "c10")
