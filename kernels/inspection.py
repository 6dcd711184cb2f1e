"""Inspection of a built wheel before it is admitted: machine code, symbols, C library, smoke test."""

from __future__ import annotations

import errno
import lzma
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.version import Version

from core import arch as archs
from core import console, files, shell, tools, workspace
from core.errors import BuildError
from core.manifest import ModuleReport, Proof
from kernels import toolchain as toolchains
from kernels.elf import Elf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from core.stack import Platform
    from kernels.matrix import Build
    from kernels.recipe import Module
    from kernels.toolchain import Toolchain


def inspect_modules(wheel: Path, build: Build) -> tuple[ModuleReport, ...]:
    """Check every extension module of a wheel; raises BuildError with all problems.

    The wheel must hold the modules of the recipe. One with kernels must contain SASS for exactly its targets, and PTX
    only if it was requested. Its undefined symbols must be defined by torch, the CUDA runtime, NVIDIA's libraries that
    the recipe links, the C and C++ libraries or CPython, and belong to the ABIs that the recipe promises. It must be
    built for the target's CPU and have no RPATH.
    """
    chain = build.toolchain
    with_kernels = {module.name: module for module in build.modules if module.kernels}
    torch, system = list(_torch_libraries(chain)), list(_system_libraries(chain))
    nvidia = list(_nvidia_libraries(build))
    others = [*nvidia, *system, *map(Elf, _python_libraries(chain))]
    toolchains.cuobjdump()  # installed before the threads need it

    def inspect(path: Path) -> tuple[ModuleReport, list[str]]:
        elf = Elf(path)
        report = read_module(elf, path.relative_to(folder))
        module = with_kernels.get(report.name)
        errors = [*_code_errors(report, build, module), *_link_errors(elf, report, chain, [*torch, *others])]
        errors += _abi_errors(elf, report, build, others)
        errors += version_errors(elf, [] if build.recipe.stable_torch else [*torch, *nvidia], system)
        return report, [f"{report.name}: {error}" for error in errors]

    # Threads, because cuobjdump takes most of the time.
    with unpacked(wheel) as folder, ThreadPoolExecutor() as pool:
        found = list(pool.map(inspect, modules(folder)))
    reports = tuple(report for report, _ in found)
    missing = sorted({module.name for module in build.modules} - {report.name for report in reports})
    wrong = [f"{name}: is not in the wheel" for name in missing]
    if wrong := [*wrong, *(error for _, errors in found for error in errors)]:
        raise BuildError(
            "inspection",
            f"{wheel.name} differs from the request",
            cause="\n".join(wrong),
            hint="it was not admitted to the wheelhouse; check the recipe's flags, sources and libraries",
        )
    return reports


def describe_wheel(wheel: Path) -> tuple[ModuleReport, ...]:
    """Describe the extension modules of any wheel; raises BuildError if it is no wheel or contains none."""
    with unpacked(wheel) as folder:
        found = tuple(read_module(Elf(path), path.relative_to(folder)) for path in modules(folder))
        foreign = sorted(path.name for path in folder.rglob("*") if path.suffix in (".so", ".pyd", ".dylib", ".dll"))
    if not found:
        cause = f"{foreign[0]} is for macOS or Windows" if foreign else "it contains only Python files"
        raise BuildError("inspection", f"{wheel} contains no extension module for Linux", cause=cause)
    return found


@contextmanager
def unpacked(wheel: Path) -> Iterator[Path]:
    """Unpack a wheel into a folder of the cache, from which modules can be loaded: /tmp may be mounted noexec."""
    with files.draft(workspace.current().cache / "scratch" / "wheel") as folder:
        folder.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        except OSError as error:
            kind: Literal["disk-full", "inspection"] = "disk-full" if error.errno == errno.ENOSPC else "inspection"
            raise BuildError(kind, f"{wheel} cannot be unpacked", cause=str(error)) from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
            raise BuildError("inspection", f"{wheel} is damaged, or not a wheel", cause=str(error)) from error
        yield folder


def modules(folder: Path) -> list[Path]:
    """The extension modules and shared libraries for Linux in a folder."""
    named = sorted(path for path in folder.rglob("*.so*") if re.search(r"\.so(\.[\d.]+)?$", path.name))
    return [path for path in named if path.is_file() and _starts_with(path, b"\x7fELF")]


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def read_module(elf: Elf, name: Path) -> ModuleReport:
    """Describe one extension module; `name` is its path in the wheel."""
    cubins, ptx = device_code(elf.path)
    needed = tuple(sorted(elf.dynamic["DT_NEEDED"]))
    return ModuleReport(
        name=str(name.with_name(name.name.partition(".")[0])).replace("/", "."),
        sass=tuple(sorted(set(cubins))),
        ptx=ptx,
        cubins=len(cubins),
        needed=needed,
        undefined=len(elf.undefined),
        from_driver=driver_functions(elf),
        glibc=elf.versions.get("GLIBC", ""),
        glibcxx=elf.versions.get("GLIBCXX", ""),
        cxxabi=elf.versions.get("CXXABI", ""),
        size=elf.path.stat().st_size,
    )


def driver_functions(elf: Elf) -> tuple[str, ...]:
    """The functions of the GPU driver that a module calls. Their library comes with the GPU, not with a package."""
    called = (each for each in elf.undefined if re.match(r"cu[A-Z]", each))
    return tuple(sorted(called)) if "libcuda.so.1" in elf.dynamic["DT_NEEDED"] else ()


def _code_errors(report: ModuleReport, build: Build, module: Module | None) -> Iterator[str]:
    """Yield the problems of the device code, which is for exactly the module's archs. None needs no device code."""
    if module is None and not report.sass and not report.ptx:
        return
    wanted = build.of(module).archs if module else build.archs
    for kind, found, of in (("SASS", report.sass, wanted), ("PTX", report.ptx, [each for each in wanted if each.ptx])):
        targets = {f"sm_{build.target(arch)}" for arch in of}
        if set(found) != targets:
            yield f"contains {kind} for {', '.join(found) or 'none'}, requested {', '.join(sorted(targets)) or 'none'}"


def _link_errors(elf: Elf, report: ModuleReport, chain: Toolchain, providers: Sequence[Elf]) -> Iterator[str]:
    """Yield the problems that would keep a module from loading with its stack."""
    if elf.machine != chain.platform.cpu:
        yield f"is for {elf.machine}, not {chain.platform.cpu}"
        return
    for tag in ("DT_RPATH", "DT_RUNPATH"):
        if elf.dynamic[tag]:
            yield f"carries {tag[3:]} {', '.join(elf.dynamic[tag])}: a path of the build machine"
    missing = set(elf.undefined) - set(report.from_driver)
    for provider in providers:
        missing -= provider.defines(sorted(missing))
    if missing:
        yield f"needs symbols that no library provides: {', '.join(sorted(missing)[:8])}"


def version_errors(elf: Elf, pinned: Sequence[Elf], system: Sequence[Elf]) -> Iterator[str]:
    """Yield the symbols of the C and C++ libraries for which a module names no version: its tag does not cover them.

    The linker records no version if the first library that has the symbol exports it without one. `pinned` are the
    libraries of the wheel's own torch, which has to be there, and from which such a symbol may come.
    """
    loose = set(elf.unversioned)
    for library in pinned:
        loose -= library.defines(sorted(loose))
    if found := sorted(name for library in system for name in library.defines(sorted(loose))):
        yield f"needs symbols of the C and C++ libraries without their versions: {', '.join(found[:8])}"


def platform_tag(modules: Sequence[Elf], platform: Platform) -> str:
    """The oldest manylinux platform with all symbol versions that the modules require; `linux_x86_64` if none has all.

    By auditwheel's policies, without their list of libraries: torch's are in no policy, and METADATA requires torch.
    """
    from auditwheel.architecture import Architecture
    from auditwheel.libc import Libc
    from auditwheel.policy import WheelPolicies

    policies = WheelPolicies(libc=Libc.GLIBC, arch=Architecture(platform.cpu))
    return str(policies.versioned_symbols_policy({str(elf.path): elf.required for elf in modules}).name)


def device_code(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the SASS target of each cubin in a module, and the PTX targets, as cuobjdump lists them.

    Raises BuildError if cuobjdump cannot read the module.
    """
    listed: list[list[str]] = []
    for option in ("--list-elf", "--list-ptx"):
        done = tools.build(toolchains.cuobjdump(), option, path, check=False)
        if done.returncode and not (done.returncode == 255 and "does not contain device code" in done.stderr):
            cause = f"cuobjdump {option} ended with {done.returncode}: {shell.last_words(done)}"
            raise BuildError("inspection", f"the machine code of {path.name} cannot be read", cause=cause)
        listed.append(re.findall(r"\.(sm_\d+[af]?)\.(?:cubin|ptx)", done.stdout))
    cubins, ptx = listed
    return cubins, tuple(sorted(set(ptx)))


def _abi_errors(elf: Elf, report: ModuleReport, build: Build, others: Sequence[Elf]) -> Iterator[str]:
    """Yield the undefined symbols outside the ABIs of Python and torch that the recipe promises.

    `others` are the libraries besides torch's.
    """
    recipe, undefined = build.recipe, set(elf.undefined)
    python = {name for name in undefined if re.match("_?Py[A-Z_]", name)}
    if recipe.abi == "abi3":
        python -= limited_api(recipe.python_tag)
    if python and recipe.abi != "cpython":
        yield f"uses Python outside abi = {recipe.abi!r}: {', '.join(sorted(python)[:8])}"
    if recipe.stable_torch:
        for library in others:
            undefined -= library.defines(sorted(undefined))
        stable = {name for name in undefined if re.match("(aoti_torch|torch)_", name)}  # the C functions of its shim
        if unstable := sorted(undefined - stable - {*report.from_driver}):
            yield f"uses torch outside its stable ABI: {', '.join(unstable[:8])}"


def limited_api(oldest: str) -> set[str]:
    """The symbols of Python's stable ABI since a version: `cp310`."""
    from abi3info import DATAS, FUNCTIONS
    from abi3info.models import PyVersion

    version = PyVersion(3, int(oldest.removeprefix("cp3")))
    return {symbol.name for symbol, entry in [*FUNCTIONS.items(), *DATAS.items()] if entry.added <= version}


def _torch_libraries(chain: Toolchain) -> Iterator[Elf]:
    """Torch's libraries, those that are most likely to define a kernel's symbol first."""
    for name in ("libtorch_python", "libc10", "libc10_cuda", "libtorch_cpu", "libtorch_cuda", "libtorch"):
        yield Elf(chain.site / f"torch/lib/{name}.so")


def _nvidia_libraries(build: Build) -> Iterator[Elf]:
    """NVIDIA's libraries that may define a kernel's symbols."""
    for name in sorted({"cudart", *(name for module in build.modules for name in module.libraries)}):
        if library := build.toolchain.nvidia_library(name):
            yield Elf(library)


def _system_libraries(chain: Toolchain) -> Iterator[Elf]:
    """The C and C++ libraries of the target, in whose symbols are versions."""
    loader = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}[chain.platform.cpu]
    for name in ("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", loader):
        found = Path(tools.build(chain.cxx, f"-print-file-name={name}").stdout.strip())
        if found.is_absolute():
            yield Elf(found.resolve())


def _python_libraries(chain: Toolchain) -> list[Path]:
    """The files of the build machine's CPython of that version that define its symbols: program or libpython.

    The symbol names are the same on every platform, so they are valid for the target, too.
    """
    code = "import sys, sysconfig as s; print(sys.executable); print(s.get_config_var('LIBDIR'))"
    executable, folder = tools.build(chain.interpreter, "-Ic", code).stdout.splitlines()
    library = Path(folder) / f"libpython{chain.python}.so.1.0"
    return [Path(executable).resolve(), *([library] if library.exists() else [])]


def prove_smoke(wheel: Path, build: Build) -> Proof:
    """Run the recipe's smoke test on a GPU of each of the wheel's compute capabilities that this machine has.

    Raises BuildError if it fails; otherwise returns "not run" with the reason.
    """
    if not (build.recipe.path / "smoke.py").exists():
        return Proof("not run", "the recipe has no smoke.py")
    gpus = archs.local_gpus() if build.toolchain.native else []
    local = list(dict.fromkeys(gpu.arch.capability for gpu in gpus))
    wanted = [each for each in (arch.capability for arch in build.archs) if each in local]
    if not wanted:
        have = f": it has {', '.join(local)}" if local else ""
        return Proof("not run", f"this machine has no GPU of capability {build.arch}{have}")
    with unpacked(wheel) as folder:
        path = f"{folder}:{build.toolchain.site}:{files.CHECKOUT}"  # for kernels/smoke.py
        said = [_smoke(wheel, build, path, archs.device_environment(gpus, each)) for each in wanted]
    return Proof("passed", "; ".join(said))


def _smoke(wheel: Path, build: Build, path: str, devices: Mapping[str, str]) -> str:
    """Run the smoke test on one GPU, and return its last line; raises BuildError if it fails."""
    env = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **devices}
    done = tools.build(build.toolchain.interpreter, build.recipe.path / "smoke.py", env=env, check=False, timeout=3600)
    if done.returncode:
        raise BuildError(
            "inspection",
            f"{wheel.name} failed its smoke test on the GPU of this machine",
            cause=shell.last_words(shell.Done(done.args, done.returncode, done.stdout + done.stderr, ""), 12),
            hint="it was not admitted to the wheelhouse",
        )
    return done.stdout.strip().splitlines()[-1]


def highest(versions: Sequence[str]) -> str:
    """The highest of some versions; empty if there are none."""
    return max((version for version in versions if version), key=Version, default="")


def rows(modules: Sequence[ModuleReport]) -> Iterator[str]:
    """A table of a wheel's compiled modules, followed by the libraries that each needs."""
    headings = ("module", "SASS", "PTX", "cubins", "undefined", "glibc", "GLIBCXX", "size")
    cells = [
        (
            each.name,
            ",".join(each.sass) or "-",
            ",".join(each.ptx) or "-",
            str(each.cubins),
            str(each.undefined),
            each.glibc or "-",
            each.glibcxx or "-",
            console.size(each.size),
        )
        for each in modules
    ]
    yield from console.table(headings, cells)
    yield from (f"{each.name} needs {', '.join(each.needed)}" for each in modules)
