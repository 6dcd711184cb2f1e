"""Makes wheels: sources laid out, toolchains assembled, one graph compiled, each wheel inspected and admitted."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from core import console, files
from core.manifest import Manifest, admit
from kernels import compile as compiling
from kernels import graph as graphs
from kernels import inspection, source, wheel
from kernels import toolchain as toolchains

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kernels.graph import Graph
    from kernels.matrix import Build


def make(builds: Sequence[Build], jobs: int | None, lock: int, *, force: bool) -> dict[str, Manifest]:
    """Compile, link, assemble, inspect and admit `builds`; return their manifests by identifier.

    `lock` is the descriptor of the build lock, which the caller holds. `force` drops what was compiled before.
    """
    root = graphs.root()
    for build in {build.folder: build for build in builds}.values():  # Pythons and profiles share a folder
        place = root / build.folder
        if force:
            shutil.rmtree(place, ignore_errors=True)
        patches = build.recipe.patches_for(build.toolchain.stack.cuda)
        source.lay_out(build.recipe, patches, place / "src")
    for build in builds:
        toolchains.assemble(build.toolchain)
    width = graphs.plan_jobs(builds, jobs)
    graph = graphs.write(builds, width)
    compiling.compile_graph(graph, width, lock)
    return {build.identifier: _finish(build, graph) for build in builds}


def _finish(build: Build, graph: Graph) -> Manifest:
    """Assemble, inspect and admit one wheel."""
    place: Path = graphs.root() / build.own_folder
    modules = {module.name: graph.modules[build.identifier, module.name] for module in build.modules}
    path = wheel.assemble(build, graphs.root() / build.folder / "src", modules, place / "wheel")
    console.say(f"inspecting {path.name}")
    reports = inspection.inspect_modules(path, build.sass, build.arch.ptx, build.toolchain)
    imported = inspection.prove_import(path, build, reports)
    smoke = inspection.prove_smoke(path, build)
    manifest = Manifest(
        file=path.name,
        sha256=files.sha256(path),
        size=path.stat().st_size,
        key=build.key,
        identifier=build.identifier,
        kernel=build.recipe.name,
        version=build.version,
        arch=str(build.arch),
        stack=build.toolchain.stack.name,
        torch=build.toolchain.stack.torch,
        python=build.toolchain.python,
        platform=build.toolchain.platform.value,
        profile=build.profile,
        glibc=inspection.highest([report.glibc for report in reports]),
        glibcxx=inspection.highest([report.glibcxx for report in reports]),
        modules=reports,
        imported=imported,
        smoke=smoke,
        inputs=build.inputs,
    )
    admit(path, manifest)
    path.unlink()
    return manifest
