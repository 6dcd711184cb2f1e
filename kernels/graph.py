"""Writes and runs one ninja file for all modules of all kernels: longest compile first, no local paths in commands."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import ninja
from ninja.ninja_syntax import Writer

from core import console, files, shell, tools, workspace
from core.errors import BuildError, ConfigError, HearthError
from kernels.source import HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from kernels.matrix import Build
    from kernels.recipe import Module, Recipe


def root() -> Path:
    """The folder where ninja runs. All paths in the ninja file are relative to it."""
    return workspace.current().cache / "build"


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
    """A ninja file's text, its edges by output, and the linked modules by (build, module name)."""

    text: str
    edges: dict[str, Edge]
    modules: dict[tuple[str, str], Path]

    def name(self, output: str) -> str:
        """The display name of the step that makes `output`: its source file, or the module for a link."""
        edge = self.edges.get(output)
        return edge.inputs[0] if edge and edge.rule != "link" else output

    def seconds(self, output: str) -> float:
        """The expected seconds of the step that makes `output`."""
        return self.edges[output].seconds if output in self.edges else 0.0


def plan_jobs(builds: Sequence[Build], jobs: int | None) -> int:
    """Return the number of parallel compiles: one per core, limited by free memory and the largest compile.

    `jobs` overrides it. Free memory is MemAvailable of /proc/meminfo, in kB.
    """
    if jobs:
        return jobs
    cores = os.cpu_count() or 1
    if sys.platform == "linux":  # macOS has no affinity
        cores = len(os.sched_getaffinity(0))
    need = max((build.recipe.memory_mb for build in builds), default=1) * 1000
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0])
    return max(1, min(cores, free // need))


def write(builds: Sequence[Build], jobs: int) -> Graph:
    """Write the graph of `builds`. Their sources must be in place.

    The folder of kernel objects is not keyed by Python version or profile, so builds that differ only in those share
    the objects.
    """
    text = StringIO()
    writer = Writer(text, width=1_000_000)
    writer.comment("Written by Hearth; a run writes it anew.")
    writer.pool("compile", jobs)
    launcher = os.environ.get("HEARTH_COMPILER_LAUNCHER", "")
    start = f"{launcher} " if launcher else ""
    for name, body in _RULES.items():
        compiles = name != "link"
        writer.rule(
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
            output = f"{build.python_folder}/{module.path}.so"
            link = Edge(
                rule="link",
                output=output,
                inputs=[edge.output for edge in objects],
                seconds=1.0,
                variables=_link_variables(build, module),
            )
            edges |= {edge.output: edge for edge in [*objects, link]}
            modules[build.identifier, module.name] = root() / output
    # ninja starts edges of equal weight in file order, so write the longest compile first.
    for edge in sorted(edges.values(), key=lambda edge: -edge.seconds):
        writer.build([edge.output], edge.rule, edge.inputs, variables=edge.variables)
    return Graph(text.getvalue(), edges, modules)


# --objdir-as-tempdir and --orig_src_path_name: otherwise nvcc mangles internal names with a hash of its temporary file
# name and the source's absolute path, and the same source gives different output in another folder. $name is not the
# path of an existing file: ccache would treat it as a second source and not cache.
# -fno-canonical-system-headers: otherwise g++ writes resolved header paths into messages (__FILE__).
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
    """Compile a .cu file. The command does not depend on Python or the profile."""
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
    """Compile a .cpp file. The object contains the module's name, so each module compiles its own."""
    view, tag = _view(build), build.toolchain.python_folder
    includes = [
        *_isystem(build, f"{view}/{tag}/site/torch/include", f"{view}/{tag}/site/nvidia"),
        f"-isystem {view}/nvcc/include",  # CUDA's headers include crt/, which ships with the compiler
        f"-isystem {view}/{tag}/include",
    ]
    name = f"-DTORCH_EXTENSION_NAME={module.init}"
    profile = build.recipe.profiles.get(build.profile)
    defines = [f"-D{each}" for each in profile.defines] if profile else []
    flags = [*build.recipe.flags.cxx, *defines, _abi(build), name, *_own_includes(build), *includes]
    variables = {"cxx": build.toolchain.cxx, "flags": " ".join(flags)}
    return _compile_edge("cxx", build, source, f"{build.python_folder}/obj/{module.path}/{source}.o", variables)


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
    """The recipe's header folder, which comes first, then the source's include folders."""
    recipe = build.recipe
    return [f"-I{build.folder}/src/{place}" for place in (*([HEADERS] if recipe.headers else []), *recipe.include)]


def _matches(tree: Path, pattern: str, exclude: Sequence[str], recipe: Recipe) -> list[str]:
    found = sorted(str(path.relative_to(tree)) for path in tree.glob(pattern))
    kept = [name for name in found if not any(fnmatch(name, each) for each in exclude)]
    if not kept:
        raise ConfigError(
            "config",
            f"{recipe.path / 'recipe.toml'}: no file of the source matches {pattern!r}",
            cause=f"looked in {tree}",
        )
    return kept


def _isystem(build: Build, torch: str, nvidia: str) -> list[str]:
    """Torch's headers, then CUDA's. cu13 wheels share one include folder; cu12 wheels have one each."""
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
        *(f"-L{site}/torch/lib", f"-L{site}/{runtime}", f"-L{view}/stubs"),
        *(f"-l{each}" for each in (*_TORCH_LIBRARIES, "cudart")),
        # Keep the recipe's libraries even if no symbol needs them: the driver stub defines none.
        *(f"-Wl,--no-as-needed -l{each}" for each in module.libraries),
    ]
    return {"cxx": chain.cxx, "libs": " ".join(libraries)}


_TORCH_LIBRARIES = ("torch_python", "torch", "torch_cuda", "torch_cpu", "c10_cuda", "c10")


# finished / total / running, then the edge's description. `_follow` parses this.
_STATUS = "@@ %f %t %r "


def run(graph: Graph, jobs: int, lock: int) -> None:
    """Bring every object and module of the graph up to date. Results of an interrupted run are kept.

    `lock` is the file descriptor of the held build lock. Compilers inherit it, so the lock is held until the last one
    has exited, even if this process is killed.

    Raises BuildError with the failing file and the log's path.
    """
    place = root()
    files.write(place / "build.ninja", graph.text)
    argv = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", str(jobs)]
    pending = _pending(argv, place)
    if not pending:
        return
    weight = sum(map(graph.seconds, pending))
    log = place / "log.txt"
    with console.Progress("compiling", weight, len(pending)) as progress, log.open("w") as text:
        env = tools.build_environment() | {"NINJA_STATUS": _STATUS}
        output = shell.lines(argv, cwd=place, env=env, pass_fds=[lock])
        status = _follow(output, graph, progress, text.write)
    if status:
        raise _explain(log.read_text(), graph, log, jobs)


def _pending(argv: Sequence[str], place: Path) -> list[str]:
    """The outputs that ninja would make, from a dry run."""
    done = tools.build(*argv, "-n", "-C", place, env={"NINJA_STATUS": _STATUS}, check=False)
    return [line.split()[5] for line in done.stdout.splitlines() if line.startswith("@@")]


def _follow(
    lines: Generator[str, None, int], graph: Graph, progress: console.Progress, log: Callable[[str], object]
) -> int:
    """Convert ninja's output to progress and write all of it to the log; return ninja's exit status."""
    while True:
        try:
            line = next(lines)
        except StopIteration as stop:
            return int(stop.value)
        log(line + "\n")
        if line.startswith("@@"):
            _, finished, total, running, _, output = line.split(maxsplit=5)
            # ninja still counts the finished step as running; another one takes its place while any are left
            left = min(int(running), int(total) - int(finished))
            progress.step(graph.name(output), graph.seconds(output), left)


def _explain(text: str, graph: Graph, log: Path, jobs: int) -> HearthError:
    """Return the error for a failed run, derived from the compilers' output."""
    failed = re.search(r"^FAILED: (?:\[code=\d+\] )?(\S+)", text, re.MULTILINE)
    name = graph.name(failed[1]) if failed else "the build"
    said = text[failed.start() :] if failed else text
    # The command line is long and not useful here; it is in the log.
    tail = [line for line in said.splitlines()[2:] if line.strip() and not line.startswith(("@@", "ninja:"))][-12:]
    if re.search(r"No space left on device", said):
        return BuildError(
            "disk-full",
            f"the disk is full: {name} could not be written",
            cause="No space left on device",
            hint="free some space (inv wheels --prune; the cache is "
            f"{workspace.current().cache}), then run the same command: finished files are kept",
        )
    if re.search(r"died due to signal 9|Killed signal terminated|signal: Killed|^Killed$", said, re.MULTILINE):
        return BuildError(
            "out-of-memory",
            f"the machine ran out of memory while compiling {name}",
            cause=f"a compiler was killed (signal 9) with {jobs} jobs at once",
            hint=f"run again with fewer: --jobs {max(1, jobs // 2)} (finished files are kept)",
        )
    return BuildError("compile", f"{name} does not build", cause="\n         ".join(tail), hint=f"the whole log: {log}")
