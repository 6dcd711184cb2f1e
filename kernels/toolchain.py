"""Compilers, headers and libraries for one (stack, target platform, Python), with a fingerprint.

`describe` is cheap: it queries the compiler, the interpreter and the lock, so a wheel's key takes a fraction of a
second. `assemble` installs missing parts into the cache.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from core import files, lockfile, shell, tools, workspace
from core import source as sources
from core.errors import HearthError, SourceError, SupportError, ToolError
from core.stack import Platform, Stack, stacks
from kernels import compat, pythons

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.source import Pinned

# Compile-time packages. The stack's other packages (sympy, filelock ...) do not affect kernels.
_COMPILE_TIME = ("torch==", "nvidia-")

# nvcc with what it calls, and its own headers. Importing torch needs only the latter.
_PROGRAMS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")
_COMPILER = (*_PROGRAMS, "nvidia-cuda-cccl", "nvidia-cuda-runtime")


@dataclass(frozen=True)
class Toolchain:
    """The identity of every input that can change the output, and its place in the cache.

    `kernel_fingerprint` covers the inputs of kernel objects. With `missing` parts, only stack, platform and Python are
    known.
    """

    stack: Stack
    platform: Platform
    python: str
    cxx: str
    cxx_version: str
    cuda_home: str
    interpreter: str
    python_include: str
    parts: tuple[tuple[str, str], ...] = ()
    missing: tuple[HearthError, ...] = ()

    @property
    def native(self) -> bool:
        """Whether the target is this machine's platform."""
        return self.platform is Platform.local()

    @property
    def kernel_fingerprint(self) -> str:
        """Hash of all parts except Python."""
        return _digest([part for part in self.parts if part[0] != "python"])

    @property
    def view(self) -> Path:
        """The folder of symlinks that compile commands use, so that commands contain no path of this machine."""
        name = f"{self.stack.name}-{self.platform.cpu}-{self.kernel_fingerprint[:12]}"
        return workspace.current().cache / "toolchains" / name

    @property
    def abi_tag(self) -> str:
        """CPython's tag: `cp312`."""
        return "cp" + self.python.replace(".", "")

    @property
    def python_folder(self) -> str:
        """The name of the folder for one Python: objects and links of other headers are in another one."""
        return f"{self.abi_tag}-{_digest(dict(self.parts)['python'])[:12]}"

    @property
    def site(self) -> Path:
        """The stack installed for the target: torch's headers and libraries, and torch's import dependencies."""
        return self.view / self.python_folder / "site"

    def nvidia_library(self, name: str) -> Path | None:
        """A library of one of NVIDIA's packages that torch requires, such as cublas; None if they lack it."""
        return next(iter(sorted(self.site.glob(f"nvidia/*/lib/lib{name}.so.*"))), None)


def describe(stack: Stack, platform: Platform, python: str) -> Toolchain:
    """Find every part; uv installs a missing Python.

    Raises ToolError with the package to install, or SupportError if the stack lacks the platform or the Python.
    """
    _check_support(stack, platform, python)
    launcher()
    cxx, cxx_version = _host_compiler(stack, platform)
    cuda_home, cuda_identity = _cuda(stack)
    interpreter, include, headers = pythons.find(python)
    return Toolchain(
        stack=stack,
        platform=platform,
        python=python,
        cxx=cxx,
        cxx_version=cxx_version,
        cuda_home=cuda_home,
        interpreter=interpreter,
        python_include=include,
        parts=(
            ("cuda", cuda_identity),
            ("cxx", cxx_version),
            ("torch", _digest([line for line in _packages(stack) if line.startswith(_COMPILE_TIME)])),
            ("python", headers),
        ),
    )


def look(stack: Stack, platform: Platform, python: str) -> Toolchain:
    """Do the same as `describe`, but install nothing, and raise no ToolError: it goes into `missing`."""
    _check_support(stack, platform, python)
    if missing := errors(stack, platform, python):
        return Toolchain(stack, platform, python, "", "", "", "", "", missing=tuple(missing))
    return describe(stack, platform, python)


def _check_support(stack: Stack, platform: Platform, python: str) -> None:
    if platform.value not in stack.platforms:
        raise SupportError(
            "recipe-support",
            f"stack {stack.name} has no {platform.value}",
            cause=f"torch {stack.torch} has no CUDA build for it",
            hint=f"platforms of {stack.name}: {', '.join(stack.platforms)}",
        )
    if python not in stack.pythons:
        raise SupportError(
            "recipe-support",
            f"stack {stack.name} has no Python {python}",
            hint=f"Pythons of {stack.name}: {', '.join(stack.pythons)}",
        )


def errors(stack: Stack, platform: Platform, python: str) -> list[HearthError]:
    """Return all errors that `describe` would raise if it installed nothing."""

    def find_python() -> None:
        if pythons.known(python) is None:
            hint = f"apt-get install python{python}-dev, or uv python install {python}"
            raise ToolError("python-missing", f"there is no Python {python}", hint=hint)
        pythons.find(python)

    found: list[HearthError] = []
    finds: list[Callable[[], object]] = [lambda: _host_compiler(stack, platform), lambda: _cuda(stack)]
    finds += [find_python, launcher]
    for find in finds:
        try:
            find()
        except HearthError as error:
            found += [] if error.what in [each.what for each in found] else [error]
    return found


def lacking(toolchain: Toolchain, source: Pinned) -> list[str]:
    """Return what a build lacks on this machine: what to install first, and what the build itself downloads."""
    stack, local = toolchain.stack, Platform.local()
    lacks = [f"{error.what} ({error.hint or error.cause})" for error in toolchain.missing]
    with suppress(HearthError):  # without uv, which is then in `missing`
        places = {
            stack.name: lockfile.place(stack.name, toolchain.platform, toolchain.python, _packages(stack)),
            f"the compiler of {stack.name}": lockfile.place(stack.name, local, "3.11", _compiler_packages(stack)),
            "cuobjdump": lockfile.place("cuobjdump", local, "3.11"),
        }
        absent = [name for name, place in places.items() if not place.is_dir()]
        lacks += [f"{each} is not installed (the build downloads it)" for each in absent]
    if sources.cached(source) is None:
        pinned = "the build downloads it" if source.tree else "recipe.toml has no `tree` for it"
        lacks.append(f"the source of {source.name} {source.version} is not in the cache ({pinned})")
    return lacks


def launcher() -> str:
    """Return the program before each compile, from HEARTH_COMPILER_LAUNCHER, with its arguments; raises ToolError."""
    words = os.environ.get("HEARTH_COMPILER_LAUNCHER", "").split()
    if words and not shell.which(words[0]):
        what = f"HEARTH_COMPILER_LAUNCHER: {words[0]} is not installed"
        raise ToolError("program-missing", what, hint=f"install {words[0]}, or unset the variable")
    return " ".join(words)


@cache
def _host_compiler(stack: Stack, platform: Platform) -> tuple[str, str]:
    """Return the C++ compiler for `platform` and its identity: compiler, binutils and C library versions."""
    if platform is Platform.local():
        name = os.environ.get("CXX", "").strip() or "g++"
        if not shell.which(name):
            hint = "CXX names one program; HEARTH_COMPILER_LAUNCHER is for ccache" if " " in name else ""
            hint = hint or "apt-get install g++"
            raise ToolError("compiler-missing", f"there is no C++ compiler ({name})", hint=hint)
        name = name if Path(name).name == name else str(Path(name).absolute())  # ninja runs in another folder
    else:
        name = f"{platform.cpu}-linux-gnu-g++"
        if not shell.which(name):
            raise ToolError(
                "cross-compiler-missing",
                f"there is no C++ compiler for {platform.value} ({name})",
                hint=f"apt-get install g++-{platform.cpu.replace('_', '-')}-linux-gnu",
            )
    program = "#include <features.h>\n__clang__ __GNUC__ __GLIBC__ __GLIBC_MINOR__\n"
    asked = tools.build(name, "-E", "-P", "-x", "c++", "-", input_text=program, check=False)
    if asked.returncode or len(asked.stdout.split()) < 4:
        cause = "; ".join(asked.stderr.strip().splitlines()[:2]) or shell.last_words(asked)
        raise ToolError("compiler-missing", f"{name} compiles no C++", cause=cause, hint="apt-get install g++")
    clang, major, *glibc = asked.stdout.split()[-4:]
    if clang != "__clang__":
        raise ToolError("compiler-version", f"{name} is Clang; the build needs GCC", hint="apt-get install g++")
    if int(major) > stack.gcc:
        raise ToolError(
            "compiler-version",
            f"{name} is GCC {major}, which CUDA {stack.cuda} does not accept",
            cause=f"crt/host_config.h of CUDA {stack.cuda} accepts GCC up to {stack.gcc}",
            hint=f"apt-get install g++-{stack.gcc}, then run the same command again with CXX=g++-{stack.gcc}",
        )
    questions = ["--version", "-Wl,--version", *(f"-print-prog-name={each}" for each in _GCC_PROGRAMS)]
    with ThreadPoolExecutor() as pool:  # most of the time of a cache hit that is not Python's start
        answers = pool.map(lambda each: tools.build(name, each, check=each != "-Wl,--version").stdout, questions)
        version, linker, *programs = (answer.strip().partition("\n")[0] for answer in answers)
        # CXX may be a script that adds flags, and distributions patch programs without changing their versions. GCC
        # takes the assembler and the linker from PATH.
        found = [Path(shell.find(each)) for each in (name, *programs) if shell.which(each)]
        identity = _digest([*pool.map(files.sha256, found)])[:16]
    return name, f"{version}; {identity}; {linker or 'unknown linker'}; glibc {'.'.join(glibc)}"


_GCC_PROGRAMS = ("cc1plus", "as", "ld", "objcopy")
"""What compiles, assembles and links, and merges the objects of fat wheels (kernels/merge.py)."""


@cache
def _cuda(stack: Stack) -> tuple[str, str]:
    """Return the CUDA compiler's home (empty unless it is the system's) and its identity."""
    locked = _digest(_compiler_packages(stack))
    if stack.compiler == "locked":
        return "", f"nvcc of {stack.name} {locked}"
    tried: list[str] = []
    homes = [os.environ.get("CUDA_HOME", ""), f"/usr/local/cuda-{stack.cuda}", "/usr/lib/nvidia-cuda-toolkit"]
    for home in [Path(each) for each in homes if each]:
        nvcc = home / "bin/nvcc"
        if not nvcc.exists():
            tried.append(f"{home}: no bin/nvcc")
            continue
        # Debian's nvcc has no nvcc.profile next to it, but still prints its version.
        text = tools.build(nvcc, "--version", check=False).stdout
        if f"release {stack.cuda}," in text:
            hashes = [files.sha256(_program(home, name)) for name in _NVCC_PROGRAMS]
            return str(home), f"nvcc {_digest(hashes)}, headers {locked}"
        release = next((line for line in text.splitlines() if "release" in line), "no version")
        tried.append(f"{home}: {release.strip()}")
    others = [each.name for each in stacks().values() if each.compiler == "locked"]
    raise ToolError(
        "cuda-missing",
        f"stack {stack.name} needs the CUDA {stack.cuda} compiler, which is not installed",
        cause="; ".join(tried),
        hint=f"install CUDA {stack.cuda} (Debian 13: apt-get install nvidia-cuda-toolkit, from non-free) "
        f"and set CUDA_HOME, or build for another stack: --stack {' or '.join(others)}",
    )


# nvcc, and the programs that it calls to compile a file.
_NVCC_PROGRAMS = ("nvcc", "cicc", "cudafe++", "ptxas", "fatbinary")


def _program(home: Path, name: str) -> Path:
    """Return a CUDA program's path: in NVIDIA's two folders, or in /usr/bin, where Debian installs some of them."""
    for place in (home / "bin", home / "nvvm/bin", home.parent.parent / "bin"):
        if (place / name).exists():
            return (place / name).resolve()
    raise ToolError("cuda-missing", f"the CUDA compiler in {home} has no {name}", hint="install the CUDA toolkit again")


def _packages(stack: Stack) -> list[str]:
    """The locked requirements of a stack, without its compiler."""
    return [line for line in lockfile.requirements(stack.name) if not line.startswith(_PROGRAMS)]


def _compiler_packages(stack: Stack) -> list[str]:
    """The locked requirements of a stack's compiler, or of the headers for the system's."""
    return [line for line in lockfile.requirements(stack.name) if line.startswith(_COMPILER)]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def assemble(toolchain: Toolchain) -> None:
    """Install missing parts of the toolchain into the cache, and create the symlinks that compile commands use."""
    stack, platform = toolchain.stack, toolchain.platform
    site = install_stack(stack, platform, toolchain.python)
    compiler = install_compiler(stack)
    for each in (site, compiler):
        _check_installed(each)
    cuda = _system_cuda(toolchain, compiler) if toolchain.cuda_home else next(compiler.glob("nvidia/cu*"))
    view = toolchain.view
    _link(view / "nvcc", cuda)
    # Any Python version's install works here: torch's headers and CUDA's files are the same for all.
    if not ((view / "torch").exists() and (view / "nvidia").exists()):
        _link(view / "torch", site / "torch")
        _link(view / "nvidia", site / "nvidia")
    _link(toolchain.site, site)
    _link(toolchain.site.with_name("include"), Path(toolchain.python_include))
    stubs = view / "stubs"
    if not (stubs / "libcuda.so").exists():
        stubs.mkdir(exist_ok=True)
        driver_stub(toolchain, stubs)
    if not (stubs / compat.NAME).exists():
        compat.build(toolchain.cxx, stubs / compat.NAME)


def cuobjdump() -> Path:
    """Return the locked cuobjdump; install it if the cache lacks it."""
    return next(lockfile.install("cuobjdump", Platform.local(), "3.11").glob("nvidia/*/bin/cuobjdump"))


def install_stack(stack: Stack, platform: Platform, python: str) -> Path:
    """Install a stack without its compiler for a platform and Python into its own cache folder."""
    return lockfile.install(stack.name, platform, python, pinned=_packages(stack), finish=_repair)


def install_compiler(stack: Stack) -> Path:
    """Install a stack's compiler, or the headers for the system's, into its own cache folder. Any Python will do."""
    return lockfile.install(stack.name, Platform.local(), "3.11", pinned=_compiler_packages(stack), finish=_repair)


def _repair(site: Path) -> None:
    """Create two symlinks that a CUDA installation has and the wheels lack; linkers and torch look for them."""
    for runtime in site.glob("nvidia/*/lib/libcudart.so.*"):
        _link(runtime.with_name("libcudart.so"), Path(runtime.name))
        _link(runtime.parent.with_name("lib64"), Path("lib"))


def _check_installed(site: Path) -> None:
    """Compare headers and the compiler's programs with their packages; raises SourceError. The key names these.

    Files that are as old and as large as at the installation are not hashed: there are 14,000. Libraries are left out:
    no byte of them is in a wheel.
    """
    installed = site.stat().st_mtime
    for record in site.glob("*.dist-info/RECORD"):
        with record.open(newline="", encoding="utf-8") as lines:
            for name, digest, size in csv.reader(lines):
                if digest and re.search("/(bin|include|nvvm)/", name):
                    path = site / name
                    with suppress(OSError):
                        found = path.stat()
                        if found.st_size == int(size) and (found.st_mtime <= installed or _recorded(path) == digest):
                            continue
                    what = f"{path} is not the file of its package"
                    hint = f"delete {site}, then run the same command again: it is downloaded again"
                    raise SourceError("hash-mismatch", what, cause="the cache was edited or damaged", hint=hint)


def _recorded(path: Path) -> str:
    """The hash of a file as RECORD has it."""
    digest = base64.urlsafe_b64encode(bytes.fromhex(files.sha256(path))).decode()
    return f"sha256={digest.rstrip('=')}"


def _system_cuda(toolchain: Toolchain, headers: Path) -> Path:
    """Link the system's compiler programs into a separate tree, with a profile that finds no system headers.

    The system's nvcc may come with headers of another version; the build uses the stack's locked `headers`.
    """
    home = Path(toolchain.cuda_home)
    place = workspace.current().cache / "installed" / f"system-nvcc-{_digest(dict(toolchain.parts)['cuda'])[:12]}"
    if place.is_dir():
        return place
    with files.atomic_dir(place) as part:
        (part / "bin").mkdir()
        (part / "nvvm/bin").mkdir(parents=True)
        for name in _NVCC_PROGRAMS:
            shutil.copy2(_program(home, name), part / ("nvvm/bin" if name == "cicc" else "bin") / name)
        shutil.copytree(next(headers.glob("nvidia/*/nvvm/libdevice")), part / "nvvm/libdevice")
        for include in sorted(headers.glob("nvidia/*/include")):
            shutil.copytree(include, part / "include", dirs_exist_ok=True)
        (part / "bin/nvcc.profile").write_text(_PROFILE)
    return place


# NVIDIA's nvcc.profile, reduced to this tree.
_PROFILE = """\
TOP = $(_HERE_)/..
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(CICC_PATH):$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
"""


def driver_stub(toolchain: Toolchain, folder: Path, functions: Sequence[str] = ()) -> None:
    """Build a stub libcuda.so.1 in `folder`. The real one comes with the GPU driver, which build machines lack.

    Linking needs no `functions`, since a module may leave symbols undefined. Importing does.
    """
    stub = folder / "libcuda.so.1"
    body = "".join(f'extern "C" void {name}() {{}}\n' for name in functions)
    words = [toolchain.cxx, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c++", "-o"]
    tools.build(*words, stub, "-", input_text=body)
    _link(folder / "libcuda.so", Path(stub.name))


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target` atomically, by rename."""
    if link.is_symlink() and link.readlink() == target:
        return
    with files.draft(link) as part:
        part.symlink_to(target)
        part.replace(link)
