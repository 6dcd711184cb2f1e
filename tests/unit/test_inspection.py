"""Inspection of wheels: a check that cannot run is an error, and foreign or damaged wheels are described."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from core import arch as archs
from core.arch import Arch, LocalGpu
from core.manifest import ModuleReport
from core.stack import Platform
from kernels import compat, inspection, toolchain
from kernels.elf import Elf
from kernels.matrix import Request, select
from tests.errors import raises

HOST_ONLY = ModuleReport("m", (), (), 0, (), 0, (), "", "", 1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cuobjdump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for cuobjdump, to be written by the test."""
    program = tmp_path / "cuobjdump"
    program.touch(0o755)
    monkeypatch.setattr(toolchain, "cuobjdump", lambda: program)
    return program


@pytest.mark.parametrize(
    "body",
    [
        "exit 1",
        "exit 255",
        "echo 'ELF file 1: a.1.sm_60.cubin'; echo 'cuobjdump fatal : Invalid ELF' >&2; exit 1",
        "echo 'does not contain device code' >&2; exit 1",
        "kill -9 $$",
    ],
)
def test_machine_code_that_cannot_be_read_is_an_error(cuobjdump: Path, body: str) -> None:
    cuobjdump.write_text(f"#!/bin/sh\n{body}\n")
    with raises("inspection"):
        inspection.device_code(Path("m.so"))


def test_a_module_of_host_code_has_no_machine_code(cuobjdump: Path) -> None:
    cuobjdump.write_text("#!/bin/sh\necho \"File 'm.so' does not contain device code\" >&2\nexit 255\n")
    assert inspection.device_code(Path("m.so")) == ([], ())


@pytest.mark.process
@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("arch", "sass", "ptx", "kernels", "faults"),
    [
        ("8.9", (), (), False, 0),
        ("8.9", (), (), True, 1),
        ("8.9", ("sm_89",), (), True, 0),
        ("8.9", ("sm_89",), (), False, 0),
        ("8.9", ("sm_90",), (), False, 1),
        ("8.9", ("sm_80", "sm_89"), (), True, 1),
        ("8.9", ("sm_89",), ("sm_89",), True, 1),
        ("8.9+PTX", (), (), True, 2),
        ("8.9+PTX", ("sm_89",), ("sm_89",), True, 0),
        ("9.0+PTX", ("sm_90a",), (), True, 0),
        ("12.0f+PTX", ("sm_120f",), ("sm_120f",), True, 0),
        ("8.9;12.0", ("sm_120a", "sm_89"), (), True, 0),
        ("8.9;12.0", ("sm_89",), (), True, 1),
        ("8.9;12.0", ("sm_120a", "sm_89", "sm_90a"), (), True, 1),
        ("8.0;8.9", ("sm_89",), (), "sageattention._qattn_sm89", 0),
        ("8.0;8.9", ("sm_80", "sm_89"), (), "sageattention._qattn_sm89", 1),
    ],
)
def test_a_module_with_kernels_contains_code_for_the_target_only(
    arch: str, sass: tuple[str, ...], ptx: tuple[str, ...], kernels: bool | str, faults: int
) -> None:
    (build,), _ = select(Request(arch=arch, kernel="sageattention", python="3.11", fat=True))
    report = msgspec.structs.replace(HOST_ONLY, sass=sass, ptx=ptx)
    name = kernels if isinstance(kernels, str) else "sageattention._fused"
    module = next(each for each in build.modules if each.name == name)
    assert len(list(inspection._code_errors(report, build, module if kernels else None))) == faults


ADA, BLACKWELL = LocalGpu(Arch(8, 9), "GPU-1"), LocalGpu(Arch(12, 0), "GPU-2")


@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("gpus", "arch", "detail"),
    [
        ([BLACKWELL, ADA], "8.9", "GPU-1"),
        ([ADA, BLACKWELL], "12.0", "GPU-2"),
        ([ADA], "8.9", "GPU-7"),
        ([BLACKWELL, ADA], "8.9;9.0;12.0", "GPU-1; GPU-2"),
        ([ADA, BLACKWELL], "9.0", ""),
        ([], "9.0", ""),
    ],
)
def test_smoke_test_runs_on_a_gpu_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[LocalGpu], arch: str, detail: str
) -> None:
    (build,), _ = select(Request(arch=arch, kernel="sageattention", python="3.11", fat=True))
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho $CUDA_VISIBLE_DEVICES\n")
    interpreter.chmod(0o755)
    build = replace(build, toolchain=replace(build.toolchain, interpreter=str(interpreter)))
    monkeypatch.setattr(archs, "local_gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")  # the user's choice, where all GPUs are alike
    proof = inspection.prove_smoke(archive(tmp_path / "w.whl", {"m.py": b""}), build)
    assert (proof.result, proof.detail if detail else "") == ("passed" if detail else "not run", detail)


CXX = {Platform.LINUX_X86_64: "g++", Platform.LINUX_AARCH64: "aarch64-linux-gnu-g++"}
MODULES = {
    "nothing": ("", "manylinux_2_(5|17)"),
    "std::string": ("#include <string>\nstd::string f(long n) { return std::to_string(n) + 'x'; }", "manylinux_2_24"),
    "GLIBCXX_3.4.29": ("namespace std { void __throw_bad_array_new_length(); }\n"
                       "void f() { std::__throw_bad_array_new_length(); }", "manylinux_2_34"),
    "GLIBC_2.33": ("#include <sys/stat.h>\nint f(struct stat* s) { return stat(\"/\", s); }", "manylinux_2_34"),
    "GLIBC_2.36": ("#include <cstdlib>\nint f() { return arc4random(); }", "manylinux_2_36"),
}  # fmt: skip


@pytest.mark.process
@pytest.mark.needs(*CXX.values())
@pytest.mark.parametrize("platform", CXX, ids=CXX.values())
@pytest.mark.parametrize(("source", "expected"), MODULES.values(), ids=MODULES)
def test_a_platform_tag_is_what_the_symbols_allow(
    tmp_path: Path, platform: Platform, source: str, expected: str
) -> None:
    words = [CXX[platform], "-shared", "-fPIC", "-x", "c++", "-o", str(tmp_path / "m.so"), "-"]
    subprocess.run(words, input=source, text=True, check=True)
    elf = Elf(tmp_path / "m.so")
    assert re.fullmatch(f"{expected}_{platform.cpu}", inspection.platform_tag([elf], platform))
    assert re.fullmatch(f"{expected}_{platform.cpu}", inspection.platform_tag([elf, elf], platform))


def test_a_symbol_version_of_no_policy_has_no_manylinux_tag() -> None:
    newer, older = Elf(Path("a.so")), Elf(Path("b.so"))
    vars(newer)["required"], vars(older)["required"] = {"GLIBC_9.99"}, {"GLIBC_2.17"}
    assert inspection.platform_tag([newer, older], Platform.LINUX_X86_64) == "linux_x86_64"
    assert inspection.platform_tag([older], Platform.LINUX_X86_64) == "manylinux_2_17_x86_64"


@pytest.mark.process
@pytest.mark.needs(*CXX.values())
@pytest.mark.parametrize("platform", CXX, ids=CXX.values())
def test_shared_pointers_need_no_newer_c_library(tmp_path: Path, platform: Platform) -> None:
    """Compiled against glibc 2.32 and newer, their reference counts read a variable that older ones lack."""
    own, module = tmp_path / "compat.a", tmp_path / "m.so"
    source = "#include <memory>\nstd::shared_ptr<int> kept;\nvoid keep(std::shared_ptr<int> it) { kept = it; }\n"
    compat.build(CXX[platform], own)
    words = [CXX[platform], "-shared", "-fPIC", "-o", str(module), "-x", "c++", "-", "-x", "none", str(own)]
    subprocess.run(words, input=source, text=True, check=True)
    elf = Elf(module)
    assert inspection.platform_tag([elf], platform) in ("manylinux_2_5_x86_64", "manylinux_2_17_aarch64")
    assert not elf.defines(["__libc_single_threaded"])


ISOC23 = """
extern "C" long __isoc23_strtol(const char*, char**, int);
extern "C" unsigned long long __isoc23_strtoull(const char*, char**, int);
extern "C" int __isoc23_sscanf(const char*, const char*, ...);
extern "C" long number(const char* text) { return __isoc23_strtol(text, nullptr, 16); }
extern "C" long scan(const char* text) { int found = -1; __isoc23_sscanf(text, "%d", &found); return found; }
extern "C" unsigned long long large(const char* text) { return __isoc23_strtoull(text, nullptr, 10); }
"""
"""What the headers of glibc 2.38 make of strtol, sscanf and strtoull."""


def link(cxx: str, module: Path, source: str, *words: str | Path) -> Elf:
    argv = [cxx, "-shared", "-fPIC", "-o", module, "-x", "c++", "-", "-x", "none", *words]
    subprocess.run(argv, input=source, text=True, check=True)
    return Elf(module)


@pytest.mark.process
@pytest.mark.needs(*CXX.values())
@pytest.mark.parametrize("platform", CXX, ids=CXX.values())
def test_numbers_are_read_without_a_newer_c_library(tmp_path: Path, platform: Platform) -> None:
    compat.build(CXX[platform], tmp_path / "compat.a")
    elf = link(CXX[platform], tmp_path / "m.so", ISOC23, tmp_path / "compat.a")
    assert not [name for name in elf.undefined if "isoc23" in name]
    assert not elf.defines(["__isoc23_strtol", "__isoc23_wcstol"])
    assert inspection.platform_tag([elf], platform) in ("manylinux_2_12_x86_64", "manylinux_2_17_aarch64")
    if platform is Platform.local():
        module = ctypes.CDLL(str(tmp_path / "m.so"))
        assert (module.number(b"7f"), module.scan(b" 42 "), module.large(b"9")) == (127, 42, 9)


@pytest.mark.process
@pytest.mark.needs(*CXX.values())
@pytest.mark.parametrize("platform", CXX, ids=CXX.values())
def test_a_large_allocation_needs_no_newer_cxx_library(tmp_path: Path, platform: Platform) -> None:
    compat.build(CXX[platform], tmp_path / "compat.a")
    elf = link(CXX[platform], tmp_path / "m.so", MODULES["GLIBCXX_3.4.29"][0], tmp_path / "compat.a")
    assert "GLIBCXX_3.4.29" not in elf.required
    assert inspection.platform_tag([elf], platform) != f"manylinux_2_34_{platform.cpu}"


@pytest.mark.needs("g++")
def test_a_symbol_without_a_version_is_reported(tmp_path: Path) -> None:
    """Torch's libraries export parts of libstdc++ without versions, which the linker takes first."""
    source = MODULES["GLIBCXX_3.4.29"][0]
    export = "namespace std { void __throw_bad_array_new_length() { throw 1; } }"
    torch = link("g++", tmp_path / "libtorch.so", export)
    system = [Elf(Path(subprocess.check_output(("g++", "-print-file-name=libstdc++.so.6"), text=True).strip()))]
    after = link("g++", tmp_path / "after.so", source, tmp_path / "libtorch.so")
    before = link("g++", tmp_path / "before.so", source, "-lstdc++", tmp_path / "libtorch.so")
    unbound = link("g++", tmp_path / "unbound.so", source, "-nodefaultlibs")
    name = "_ZSt28__throw_bad_array_new_lengthv"
    assert [name in each.unversioned for each in (after, before, unbound)] == [True, False, True]
    counts = [len([*inspection.version_errors(after, certain, system)]) for certain in ([torch], [])]
    assert counts == [0, 1]  # the stack's own torch has it; another torch need not
    assert not [*inspection.version_errors(before, [], system)]
    assert [*inspection.version_errors(unbound, [], system)]
    assert inspection.platform_tag([before], Platform.local()) == f"manylinux_2_34_{Platform.local().cpu}"


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"m.so": b"\xcf\xfa\xed\xfe not ELF"}, "macOS or Windows"),
        ({"m.cp312-win_amd64.pyd": b"MZ"}, "macOS or Windows"),
        ({"m.so": b""}, "macOS or Windows"),
        ({"m.py": b"", "notes.sorted": b""}, "only Python files"),
        ({}, "only Python files"),
    ],
)
def test_a_wheel_without_modules_for_linux_says_what_it_contains(
    tmp_path: Path, members: dict[str, bytes], cause: str
) -> None:
    with raises("inspection") as raised:
        inspection.describe_wheel(archive(tmp_path / "w.whl", members))
    assert cause in raised.value.cause


def test_a_damaged_member_is_an_error(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.whl", {"m.so": os.urandom(5000) + bytes(5000)})
    content = bytearray(path.read_bytes())
    content[40:2000] = bytes(1960)
    path.write_bytes(content)
    with raises("inspection"):
        inspection.describe_wheel(path)


def test_a_versioned_library_is_a_module_too(tmp_path: Path, cuobjdump: Path) -> None:
    cuobjdump.write_text("#!/bin/sh\necho 'does not contain device code' >&2\nexit 255\n")
    library = Path(str(find_spec("msgspec._core").origin)).read_bytes()  # type: ignore[union-attr]  # any will do
    (found,) = inspection.describe_wheel(archive(tmp_path / "w.whl", {"x.libs/libz.so.1": library}))
    assert (found.name, found.sass) == ("x.libs.libz", ())
    assert not list((tmp_path / "cache/scratch").iterdir())


def test_the_limited_api_grows_with_the_version() -> None:
    oldest, newer = inspection.limited_api("cp310"), inspection.limited_api("cp311")
    assert {"PyModule_Create2", "PyExc_ValueError"} <= oldest
    assert "PyObject_GetBuffer" in newer - oldest
    assert "_PyLong_AsByteArray" not in newer
