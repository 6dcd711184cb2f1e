"""The flow behind `inv build-kernels`: from a request to inspected wheels in the wheelhouse."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from core import console, files, version, workspace
from core.errors import BuildError, HearthError, os_error
from core.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kernels.graph import Graph
    from kernels.importer import Importer
    from kernels.matrix import Build, Request


def build_asked(asked: Request, *, force: bool = False) -> list[Manifest]:
    """Build what was requested, and say what is skipped and why. Raises what `select` and `build_kernels` raise."""
    from kernels.matrix import select

    builds, skipped = select(asked)
    for each in skipped:
        console.say(f"skipping {each.identifier}: {each.reason}")
    return build_kernels(builds, jobs=int(asked.jobs) if asked.jobs else None, force=force)


def build_missing(asked: Sequence[Sequence[str]]) -> None:
    """Build what other packages request with the flags of `inv build-kernels`, each followed by its value."""
    from kernels.matrix import Request

    for words in asked:
        fields: dict[str, Any] = {
            flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        build_asked(Request(**fields))


def build_kernels(builds: Sequence[Build], *, jobs: int | None = None, force: bool = False) -> list[Manifest]:
    """Bring every build's wheel into the wheelhouse and return their manifests, in the order of `builds`.

    Each wheel is admitted as soon as it is complete; a failed build ends no other one. The errors of all builds are
    raised at the end. Concurrent runs take turns; the second finds the wheels of the first. `force` ignores existing
    wheels and objects.
    """
    workspace.current().wheelhouse.arrange()
    errors: dict[str, HearthError] = {}
    done = {} if force else _existing(builds, errors)
    if len(done) + len(errors) < len(builds):
        workspace.current().wheelhouse.check_writable()  # otherwise this error would come after the compile
        with workspace.current().building() as lock:
            done = {} if force else _existing(builds, errors)
            missing = [each for each in builds if each.identifier not in {*done, *errors}]
            try:
                _make(missing, jobs, lock, done, errors, force)
            except OSError as error:
                if (known := os_error(error)) is None or known.kind != "disk-full":
                    raise
                raise BuildError(known.kind, known.what, cause=known.cause, hint=known.hint) from error
    if errors:
        raise _all(errors, len(builds))
    return [done[build.identifier] for build in builds]


def _all(errors: Mapping[str, HearthError], builds: int) -> HearthError:
    """One error for all: itself, or of the common kind, or of kind `several`."""
    first, *others = errors.values()
    if not others:
        return first
    what = f"{len(errors)} of {builds} builds failed; the other wheels are in the wheelhouse"
    cause = "\n".join(f"{name}: {error}" for name, error in errors.items())
    if all(each.kind == first.kind for each in others):
        return type(first)(first.kind, what, cause=cause)
    return BuildError("several", what, cause=cause)


def _existing(builds: Sequence[Build], errors: dict[str, HearthError]) -> dict[str, Manifest]:
    """The existing wheels; builds whose key cannot be computed, for lack of a compiler, go into `errors`."""
    found: dict[str, Manifest] = {}
    for build in builds:
        with _collected(build, errors):
            if manifest := workspace.current().wheelhouse.find(build.index, build.wheel_pattern, build.key):
                found[build.identifier] = manifest
    return found


@contextmanager
def _collected(build: Build, errors: dict[str, HearthError]) -> Iterator[None]:
    """Put an error of this build into `errors`."""
    try:
        yield
    except HearthError as error:
        errors[build.identifier] = error
    except OSError as error:
        if (known := os_error(error)) is None:
            raise
        own = known.kind in BuildError.kinds
        errors[build.identifier] = (
            BuildError(known.kind, known.what, cause=known.cause, hint=known.hint) if own else known
        )


def _make(
    builds: Sequence[Build],
    jobs: int | None,
    lock: int,
    done: dict[str, Manifest],
    errors: dict[str, HearthError],
    force: bool,
) -> None:
    """Compile, link, assemble, inspect and admit `builds`; their manifests go into `done`, or an error into `errors`.

    `lock` is the descriptor of the build lock, which the caller holds. `force` deletes existing objects.
    """
    from kernels import graph as graphs
    from kernels import resources, source, toolchain, wheel
    from kernels import run as runs
    from kernels.importer import Importer

    laid: set[str] = set()  # archs, Pythons and profiles share a folder
    for build in builds:
        with _collected(build, errors):
            wheel.metadata(build)  # otherwise this error would come after the compile
            if force:
                for each in (build, *build.singles.values()):
                    shutil.rmtree(graphs.root() / each.folder, ignore_errors=True)
            if build.source_folder not in laid:
                patches = build.recipe.patches_for(build.toolchain.stack, build.profile)
                source.lay_out(build.recipe, patches, graphs.root() / build.source_folder)
                laid.add(build.source_folder)
            wheel.source_files(build, graphs.root() / build.source_folder)
            toolchain.assemble(build.toolchain)
    ready = {build.identifier: build for build in builds if build.identifier not in errors}
    if not ready:
        return
    cores = resources.cpus()
    need = {build.recipe.name: build.recipe.memory_mb * 1_000_000 for build in ready.values()}
    pools = resources.pools(need, jobs, cores, resources.free_memory())
    graph = graphs.write(list(ready.values()), pools)
    importers: dict[str, Importer] = {}
    with ExitStack() as stack:

        def prepare(identifier: str) -> None:
            importers[identifier] = stack.enter_context(Importer(ready[identifier].toolchain))

        def complete(identifier: str) -> None:
            if identifier not in importers:
                prepare(identifier)
            with _collected(ready[identifier], errors), importers[identifier] as importer:
                done[identifier] = _finish(ready[identifier], graph, importer)

        width = jobs or min(cores, sum(pools.values()))
        errors |= graph.errors | runs.run(graph, width, lock, complete, prepare)


def _finish(build: Build, graph: Graph, importer: Importer) -> Manifest:
    """Assemble, inspect and admit one wheel."""
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and not needed for a cache hit

    from kernels import graph as graphs
    from kernels import inspection, wheel

    place = graphs.root() / build.python_folder
    modules = {module.name: graph.modules[build.identifier, module.name] for module in build.modules}
    path = wheel.assemble(build, graphs.root() / build.source_folder, modules, place / "wheel")
    console.say(f"inspecting {path.name}")
    with ThreadPoolExecutor(1) as pool:  # the two take equally long, and most of the time after a short compile
        imported = pool.submit(importer.prove, path, build)
        reports = inspection.inspect_modules(path, build)  # its error says more, and comes first
    manifest = Manifest(
        file=path.name,
        sha256=files.sha256(path),
        size=path.stat().st_size,
        key=build.key,
        identifier=build.identifier,
        kernel=build.recipe.name,
        version=build.version,
        arch=build.arch,
        stack=build.toolchain.stack.name,
        torch=build.recipe.torch if build.recipe.stable_torch else build.toolchain.stack.torch,
        python=build.toolchain.python if build.recipe.abi == "cpython" else "",
        platform=build.toolchain.platform.value,
        profile=build.profile,
        glibc=inspection.highest([report.glibc for report in reports]),
        glibcxx=inspection.highest([report.glibcxx for report in reports]),
        cxxabi=inspection.highest([report.cxxabi for report in reports]),
        modules=reports,
        imported=imported.result(),
        smoke=inspection.prove_smoke(path, build),
        inputs=build.inputs,
        hearth=version.own(),
    )
    place = workspace.current().wheelhouse.admit(path, manifest)
    console.say(f"finished {place}")
    path.unlink()
    return manifest
