"""The flow behind `inv build-kernels`: from a request to inspected wheels in the wheelhouse."""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING

from core import console, files, workspace
from core.errors import BuildError
from core.manifest import Manifest
from kernels import store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.graph import Graph
    from kernels.matrix import Build, Request


def build_asked(asked: Request, *, force: bool = False) -> list[Manifest]:
    """Build what was requested, and say what is skipped and why. Raises what `select` and `build_kernels` raise."""
    from kernels.matrix import select

    builds, skipped = select(asked)
    for each in skipped:
        console.say(f"skipping {each.identifier}: {each.error.what}")
    return build_kernels(builds, jobs=int(asked.jobs) if asked.jobs else None, force=force)


def build_missing(asked: Sequence[Sequence[str]]) -> None:
    """Build what other packages request with the flags of `inv build-kernels`, each followed by its value."""
    from kernels.matrix import Request

    for words in asked:
        fields = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        build_asked(Request(**fields))


def build_kernels(builds: Sequence[Build], *, jobs: int | None = None, force: bool = False) -> list[Manifest]:
    """Bring every build's wheel into the wheelhouse and return their manifests, in the order of `builds`.

    Concurrent runs take turns; the second finds the wheels of the first. `force` ignores existing wheels and objects.
    """
    done = {} if force else _existing(builds)
    if len(done) < len(builds):
        with files.locked(workspace.current().cache / "build.lock", _say_waiting) as lock:
            done = {} if force else _existing(builds)
            missing = [build for build in builds if build.identifier not in done]
            if not missing:  # the other run has built them
                return [done[build.identifier] for build in builds]
            try:
                done |= _make(missing, jobs, lock, force=force)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise BuildError(
                    "disk-full",
                    "the disk is full",
                    cause=str(error),
                    hint=f"free some space (the cache is {workspace.current().cache}), then run the same command",
                ) from error
    return [done[build.identifier] for build in builds]


def _existing(builds: Sequence[Build]) -> dict[str, Manifest]:
    found = {build.identifier: store.find(build) for build in builds}
    return {identifier: manifest for identifier, manifest in found.items() if manifest is not None}


def _say_waiting() -> None:
    console.say("another build is running; waiting for it to end")


def _make(builds: Sequence[Build], jobs: int | None, lock: int, *, force: bool) -> dict[str, Manifest]:
    """Compile, link, assemble, inspect and admit `builds`; return their manifests by identifier.

    `lock` is the descriptor of the build lock, which the caller holds. `force` deletes existing objects.
    """
    from kernels import graph as graphs
    from kernels import source, toolchain, wheel

    for build in builds:
        wheel.metadata(build)  # otherwise this error would come after the compile
    root = graphs.root()
    for build in {build.folder: build for build in builds}.values():  # Pythons and profiles share a folder
        place = root / build.folder
        if force:
            shutil.rmtree(place, ignore_errors=True)
        patches = build.recipe.patches_for(build.toolchain.stack.cuda)
        source.lay_out(build.recipe, patches, place / "src")
    for build in builds:
        toolchain.assemble(build.toolchain)
    width = graphs.plan_jobs(builds, jobs)
    graph = graphs.write(builds, width)
    graphs.run(graph, width, lock)
    return {build.identifier: _finish(build, graph) for build in builds}


def _finish(build: Build, graph: Graph) -> Manifest:
    """Assemble, inspect and admit one wheel."""
    from kernels import graph as graphs
    from kernels import inspection, wheel  # slow to import, and not needed for a cache hit

    place = graphs.root() / build.python_folder
    modules = {module.name: graph.modules[build.identifier, module.name] for module in build.modules}
    path = wheel.assemble(build, graphs.root() / build.folder / "src", modules, place / "wheel")
    console.say(f"inspecting {path.name}")
    reports = inspection.inspect_modules(path, build)
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
        imported=inspection.prove_import(path, build, reports),
        smoke=inspection.prove_smoke(path, build),
        inputs=build.inputs,
    )
    workspace.current().wheelhouse.admit(path, manifest)
    path.unlink()
    return manifest
