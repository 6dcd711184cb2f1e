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


@dataclass(frozen=True)
class Graph:
    """A ninja file's text, the modules it links by (build, module name), each output's expected seconds and source."""

    text: str
    modules: dict[tuple[str, str], Path]
    seconds: dict[str, float]
    sources: dict[str, str]


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

    Kernel objects lie in a folder that knows no Python version, so builds that differ only in that share them.
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
    edges: dict[str, tuple[float, str, str, dict[str, str]]] = {}
    modules: dict[tuple[str, str], Path] = {}
    links: list[tuple[str, list[str], dict[str, str]]] = []
    for build in builds:
        for module in build.modules:
            objects = _compile_edges(build, module, edges)
            output = f"{build.folder}/{build.toolchain.abi_tag}/{module.path}.so"
            modules[build.identifier, module.name] = root() / output
            links.append((output, objects, _link_variables(build, module)))
    # Edges of the same weight start in the order of the file, so the longest compile is written first.
    for output, (_, rule, source, variables) in sorted(edges.items(), key=lambda item: -item[1][0]):
        ninja.build([output], rule, [source], variables=variables)
    for output, objects, variables in links:
        ninja.build([output], "link", objects, variables=variables)
    seconds = {output: edge[0] for output, edge in edges.items()}
    sources = {output: edge[2] for output, edge in edges.items()}
    return Graph(text.getvalue(), modules, seconds | {output: 1.0 for output, _, _ in links}, sources)


# --objdir-as-tempdir and --orig_src_path_name: nvcc otherwise mangles internal names with a hash of its temporary
# file's and the source's absolute path, and the same source gives other bytes in another folder.
# -fno-canonical-system-headers: g++ otherwise writes the resolved path of a header into messages (__FILE__).
_RULES = {
    "nvcc": "$nvcc -c $in -o $out -MMD -MF $out.d -MT $out --objdir-as-tempdir "
    "-Xcudafe --orig_src_path_name -Xcudafe $in -ccbin $cxx -std=c++17 "
    "-Xcompiler -fPIC,-fno-canonical-system-headers $flags",
    "cxx": "$cxx -c $in -o $out -MMD -MF $out.d -MT $out -std=c++17 -fPIC -fno-canonical-system-headers $flags",
    "link": "$cxx -shared -o $out $in -Wl,-s -Wl,--as-needed $libs",
}


def _compile_edges(build: Build, module: Module, edges: dict[str, tuple[float, str, str, dict[str, str]]]) -> list[str]:
    """Add the compile edges of a module to `edges`; return its objects."""
    tree = root() / build.folder / "src"
    chain = build.toolchain
    view = os.path.relpath(chain.view, root())
    profile = build.recipe.profiles.get(build.profile)
    exclude = profile.exclude if profile else ()
    defines = [f"-D{each}" for each in (profile.defines if profile else ())]
    defines.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(chain.stack.cxx11_abi)}")
    own = [f"-I{build.folder}/src/{place}" for place in _include_places(build.recipe)]
    objects: list[str] = []
    for pattern in (*module.kernels, *module.bindings):
        for source in _matches(tree, pattern, exclude, build.recipe):
            variables = {"cxx": chain.cxx}
            if source.endswith(".cu"):
                output = f"{build.folder}/obj/{source}.o"
                includes = _isystem(chain.view, f"{view}/torch/include", f"{view}/nvidia")
                flags = [*build.recipe.flags.nvcc, *defines, *_gencode(build), *own, *includes]
                variables |= {"nvcc": f"{view}/nvcc/bin/nvcc", "flags": " ".join(flags)}
                rule = "nvcc"
            else:
                # A binding carries its module's name, and may be shared between modules.
                output = f"{build.folder}/{chain.abi_tag}/obj/{module.path}/{source}.o"
                site = f"{view}/{chain.abi_tag}/site"
                includes = _isystem(chain.view, f"{site}/torch/include", f"{site}/nvidia")
                # CUDA's headers include crt/, which comes with the compiler, not with the runtime.
                python = f"-isystem {view}/nvcc/include -isystem {view}/{chain.abi_tag}/include"
                name = f"-DTORCH_EXTENSION_NAME={module.init}"
                flags = [*build.recipe.flags.cxx, *defines, name, *own, *includes, python]
                variables |= {"flags": " ".join(flags)}
                rule = "cxx"
            edges[output] = (_seconds(build.recipe, source), rule, f"{build.folder}/src/{source}", variables)
            objects.append(output)
    return objects


def _matches(tree: Path, pattern: str, exclude: Sequence[str], recipe: Recipe) -> list[str]:
    found = sorted(str(path.relative_to(tree)) for path in tree.glob(pattern))
    kept = [name for name in found if not any(fnmatch(name, each) for each in exclude)]
    if not kept:
        raise ConfigError(
            f"{recipe.path / 'recipe.toml'}: no file of the source matches {pattern!r}",
            cause=f"looked in {tree}",
        )
    return kept


def _include_places(recipe: Recipe) -> list[str]:
    return [*([HEADERS] if recipe.headers else []), *recipe.include]


def _isystem(view: Path, torch: str, nvidia: str) -> list[str]:
    """Torch's headers, then CUDA's: cu13 wheels share one include folder, cu12 wheels have one each."""
    cuda = sorted(path.parent.name for path in (view / "nvidia").glob("*/include"))
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
    site = f"{os.path.relpath(chain.view, root())}/{chain.abi_tag}/site"
    cuda = sorted(path.name for path in (chain.site / "nvidia").glob("*") if any(path.glob("lib/libcudart.so.*")))
    runtime = f"{site}/nvidia/{cuda[0]}/lib"
    libs = [f"-L{site}/torch/lib", *(f"-l{each}" for each in _TORCH_LIBRARIES), f"-L{runtime}", "-lcudart"]
    libs += [f"-L{os.path.relpath(chain.view, root())}/stubs", *(f"-l{each}" for each in module.libraries)]
    return {"cxx": chain.cxx, "libs": " ".join(libs)}


_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cuda", "torch_cpu", "c10_cuda", "c10")
