"""One ninja file over all modules of all kernels: longest compile first, no path of this machine in a command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ninja.ninja_syntax import Writer

from core import files
from core.errors import ConfigError
from kernels.source import HEADERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.matrix import Build
    from kernels.recipe import Module, Recipe


def root() -> Path:
    """Where ninja runs: every path in its file is relative to here."""
    return files.cache() / "build"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One step of the graph: a compile or a link. Paths are relative to `root()`, `seconds` are expected."""

    rule: str
    output: str
    inputs: list[str]
    seconds: float
    variables: dict[str, str]


@dataclass(frozen=True)
class Graph:
    """A ninja file's text, its edges by output, and the linked modules by (build, module name)."""

    text: str
    edges: dict[str, Edge]
    modules: dict[tuple[str, str], Path]

    def name(self, output: str) -> str:
        """What people call the step that makes `output`: the source it compiles, or the module."""
        edge = self.edges.get(output)
        return edge.inputs[0] if edge and edge.rule != "link" else output

    def seconds(self, output: str) -> float:
        """The expected seconds of the step that makes `output`."""
        return self.edges[output].seconds if output in self.edges else 0.0


def plan_jobs(builds: Sequence[Build], jobs: int | None) -> int:
    """How many compiles run at once: one a core, as far as the free memory holds the largest of them.

    `jobs` overrides. Memory is MemAvailable of /proc/meminfo, in kB there.
    """
    if jobs:
        return jobs
    cores = len(os.sched_getaffinity(0))
    need = max((build.recipe.memory_mb for build in builds), default=1) * 1000
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0])
    return max(1, min(cores, free // need))


def write(builds: Sequence[Build], jobs: int) -> Graph:
    """Write the graph of `builds`, whose sources are laid out already.

    Kernel objects lie in a folder that knows no Python version and no profile, so builds that differ only in
    those share them.
    """
    text = StringIO()
    ninja = Writer(text, width=1_000_000)
    ninja.comment("Written by Hearth; a run writes it anew.")
    ninja.pool("compile", jobs)
    launcher = os.environ.get("HEARTH_COMPILER_LAUNCHER", "")
    start = f"{launcher} " if launcher else ""
    for name, body in _RULES.items():
        compiles = name != "link"
        ninja.rule(
            name,
            (start if compiles else "") + body,
            description=f"{name} $out",
            depfile="$out.d" if compiles else None,
            pool="compile" if compiles else None,
        )
    edges: dict[str, Edge] = {}
    modules: dict[tuple[str, str], Path] = {}
    for build in builds:
        for module in build.modules:
            objects = _compile_edges(build, module)
            output = f"{build.own_folder}/{module.path}.so"
            link = Edge(
                rule="link",
                output=output,
                inputs=[edge.output for edge in objects],
                seconds=1.0,
                variables=_link_variables(build, module),
            )
            edges |= {edge.output: edge for edge in [*objects, link]}
            modules[build.identifier, module.name] = root() / output
    # Edges of the same weight start in the order of the file, so the longest compile is written first.
    for edge in sorted(edges.values(), key=lambda edge: -edge.seconds):
        ninja.build([edge.output], edge.rule, edge.inputs, variables=edge.variables)
    return Graph(text.getvalue(), edges, modules)


# --objdir-as-tempdir and --orig_src_path_name: nvcc otherwise mangles internal names with a hash of its temporary
# file's and the source's absolute path, and the same source gives other bytes in another folder. $name is no path of
# a file here: ccache would take it for a second source and not cache.
# -fno-canonical-system-headers: g++ otherwise writes the resolved path of a header into messages (__FILE__).
_RULES = {
    "nvcc": "$nvcc -c $in -o $out -MMD -MF $out.d -MT $out --objdir-as-tempdir "
    "-Xcudafe --orig_src_path_name -Xcudafe $name -ccbin $cxx -std=c++17 "
    "-Xcompiler -fPIC,-fno-canonical-system-headers $flags",
    "cxx": "$cxx -c $in -o $out -MMD -MF $out.d -MT $out -std=c++17 -fPIC -fno-canonical-system-headers $flags",
    "link": "$cxx -shared -o $out $in -Wl,-s -Wl,--as-needed $libs",
}


def _compile_edges(build: Build, module: Module) -> list[Edge]:
    """The compile edges of a module, kernels first."""
    tree = root() / build.folder / "src"
    profile = build.recipe.profiles.get(build.profile)
    exclude = profile.exclude if profile else ()
    kernels = [name for pattern in module.kernels for name in _matches(tree, pattern, exclude, build.recipe)]
    bindings = [name for pattern in module.bindings for name in _matches(tree, pattern, exclude, build.recipe)]
    return [
        *(_kernel_edge(build, source) for source in kernels),
        *(_binding_edge(build, module, source) for source in bindings),
    ]


def _kernel_edge(build: Build, source: str) -> Edge:
    """A .cu file. Nothing in its command depends on Python or the profile."""
    view = _view(build)
    includes = _isystem(build, f"{view}/torch/include", f"{view}/nvidia")
    flags = [*build.recipe.flags.nvcc, _abi(build), *_gencode(build), *_own_includes(build), *includes]
    variables = {
        "nvcc": f"{view}/nvcc/bin/nvcc",
        "cxx": build.toolchain.cxx,
        "name": f"{build.recipe.name}/{source}",
        "flags": " ".join(flags),
    }
    return _compile_edge("nvcc", build, source, f"{build.folder}/obj/{source}.o", variables)


def _binding_edge(build: Build, module: Module, source: str) -> Edge:
    """A .cpp file. It carries its module's name, so modules that share one compile it each."""
    view, tag = _view(build), build.toolchain.abi_tag
    includes = [
        *_isystem(build, f"{view}/{tag}/site/torch/include", f"{view}/{tag}/site/nvidia"),
        f"-isystem {view}/nvcc/include",  # CUDA's headers include crt/, which comes with the compiler
        f"-isystem {view}/{tag}/include",
    ]
    name = f"-DTORCH_EXTENSION_NAME={module.init}"
    profile = build.recipe.profiles.get(build.profile)
    defines = [f"-D{each}" for each in profile.defines] if profile else []
    flags = [*build.recipe.flags.cxx, *defines, _abi(build), name, *_own_includes(build), *includes]
    variables = {"cxx": build.toolchain.cxx, "flags": " ".join(flags)}
    return _compile_edge("cxx", build, source, f"{build.own_folder}/obj/{module.path}/{source}.o", variables)


def _compile_edge(rule: str, build: Build, source: str, output: str, variables: dict[str, str]) -> Edge:
    return Edge(
        rule=rule,
        output=output,
        inputs=[f"{build.folder}/src/{source}"],
        seconds=_seconds(build.recipe, source),
        variables=variables,
    )


def _view(build: Build) -> str:
    return os.path.relpath(build.toolchain.view, root())


def _abi(build: Build) -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(build.toolchain.stack.cxx11_abi)}"


def _own_includes(build: Build) -> list[str]:
    """The recipe's header folder, ahead of everything, then the source's."""
    recipe = build.recipe
    return [f"-I{build.folder}/src/{place}" for place in (*([HEADERS] if recipe.headers else []), *recipe.include)]


def _matches(tree: Path, pattern: str, exclude: Sequence[str], recipe: Recipe) -> list[str]:
    found = sorted(str(path.relative_to(tree)) for path in tree.glob(pattern))
    kept = [name for name in found if not any(fnmatch(name, each) for each in exclude)]
    if not kept:
        raise ConfigError(
            f"{recipe.path / 'recipe.toml'}: no file of the source matches {pattern!r}",
            cause=f"looked in {tree}",
        )
    return kept


def _isystem(build: Build, torch: str, nvidia: str) -> list[str]:
    """Torch's headers, then CUDA's: cu13 wheels share one include folder, cu12 wheels have one each."""
    cuda = sorted(path.parent.name for path in (build.toolchain.view / "nvidia").glob("*/include"))
    places = [torch, f"{torch}/torch/csrc/api/include", *(f"{nvidia}/{each}/include" for each in cuda)]
    return [f"-isystem {place}" for place in places]


def _gencode(build: Build) -> list[str]:
    target = build.target
    flags = [f"-gencode=arch=compute_{target},code=sm_{target}"]
    if build.arch.ptx:
        flags.append(f"-gencode=arch=compute_{target},code=compute_{target}")
    return flags


def _seconds(recipe: Recipe, source: str) -> float:
    """The measured seconds of a file; of one nobody measured, a guess by its kind."""
    for pattern, seconds in recipe.seconds.items():
        if fnmatch(source, pattern):
            return seconds
    return 60.0 if source.endswith(".cu") else 20.0


def _link_variables(build: Build, module: Module) -> dict[str, str]:
    chain = build.toolchain
    view = _view(build)
    site = f"{view}/{chain.abi_tag}/site"
    runtime = next(chain.site.glob("nvidia/*/lib/libcudart.so")).parent.relative_to(chain.site)
    libraries = [
        *(f"-L{site}/torch/lib", f"-L{site}/{runtime}", f"-L{view}/stubs"),
        *(f"-l{each}" for each in (*_TORCH_LIBRARIES, "cudart")),
        # What the recipe names is needed, whether or not a symbol shows it: the driver's stub defines none.
        *(f"-Wl,--no-as-needed -l{each}" for each in module.libraries),
    ]
    return {"cxx": chain.cxx, "libs": " ".join(libraries)}


_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cuda", "torch_cpu", "c10_cuda", "c10")
