"""Requests become builds with keys; unsupported ones are refused with their own exit code."""

from __future__ import annotations

import json
import os
import stat
import sys
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core import console
from core.arch import Arch, LocalGpu
from core.errors import SupportError
from core.stack import Platform, find_stack
from kernels import graph, matrix, pythons, recipe, sbom
from kernels.matrix import Request, select
from tests.conftest import FIXTURES, Hearth
from tests.errors import kind_of, raises

pytestmark = pytest.mark.needs("g++", "git")


def plan(hearth: Hearth, *words: str, **env: str) -> list[dict[str, Any]]:
    done = hearth.inv("build-kernels", "--dry-run", "--json", *words, **env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


@pytest.mark.needs("aarch64-linux-gnu-g++")
def test_the_spark_gets_its_own_platform_and_stack(hearth: Hearth) -> None:
    found = [each["identifier"] for each in plan(hearth, "--arch", "12.1", "--python", "3.11")]
    assert found == [
        "flash-attn-2.8.3.post2-cu130-sm121-cp311-linux_aarch64-diffusion",
        "sageattention-2.2.0-cu130-sm121a-cp310-abi3-linux_aarch64-lean",
        "tiny-0.1-cu130-sm121a-cp311-linux_aarch64-plain",
    ]


def test_archs_come_from_the_variable_when_none_is_named(hearth: Hearth) -> None:
    words = ("--kernel", "sageattention", "--python", "3.11")
    found = plan(hearth, *words, TORCH_CUDA_ARCH_LIST="8.9 9.0a")
    assert [each["identifier"] for each in found] == [
        "sageattention-2.2.0-cu130-sm89-cp310-abi3-linux_x86_64-lean",
        "sageattention-2.2.0-cu130-sm90a-cp310-abi3-linux_x86_64-lean",
    ]


def test_what_a_recipe_does_not_support_is_skipped_with_its_reason(hearth: Hearth) -> None:
    found = plan(hearth, "--arch", "8.0", "--python", "3.11")
    skipped = [each for each in found if each["state"] == "skipped"]
    assert len(found) == 3
    (reason,) = [each["reason"] for each in skipped]
    assert reason == "Hearth has no build of tiny 0.1 for 8.0 (A100, A30): tiny was never tried on it"


@pytest.mark.process
def test_several_machines_get_a_part_for_each_recipe_and_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_RECIPES", str(FIXTURES / "recipes"))
    parts = matrix.split(Request(arch="8.0;8.9", python="3.11,3.12", profile="full"))
    assert [(each.arch, each.kernel, each.profile) for each in parts] == [
        ("8.0", "flash-attn", "full"),
        ("8.0", "sageattention", "full"),
        ("8.9", "flash-attn", "full"),
        ("8.9", "sageattention", "full"),
        ("8.9", "tiny", ""),
    ]
    assert {each.python for each in parts} == {"3.11,3.12"}
    (fat,) = matrix.split(Request(arch="8.9;12.0;9.0", kernel="sageattention", fat=True))
    assert (fat.arch, fat.fat, fat.python) == ("8.9;9.0;12.0", True, find_stack().python)
    with raises("recipe-support", match=r"no build of tiny 0.1 for 8.0"):
        matrix.split(Request(arch="8.0", kernel="tiny"))
    with raises("unknown-name", match="'ful'"):
        matrix.split(Request(arch="8.9", kernel="flash-attn", profile="ful"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["--arch", "12.10"], "arch", "not a compute capability"),
        (["--arch", "abc"], "arch", "not a compute capability"),
        (["--arch", "8.9", "--jobs", "-1"], "usage", "--jobs must be a positive integer (got '-1')"),
        (["--arch", "8.9", "--jobs", "many"], "usage", "--jobs must be a positive integer (got 'many')"),
        (["--arch", "5.2"], "arch", "CUDA compilers know 7.5, 8.0"),
        (["--arch", "7.5"], "recipe-support", "for 7.5 (RTX 20, GTX 16, T4)"),
        (["--arch", "8.7"], "stack-arch", "Jetson Orin"),
        (["--arch", "10.3", "--kernel", "sageattention"], "recipe-support", "2.2.0 for 10.3 (B300)"),
        (["--arch", "12.0f", "--kernel", "tiny"], "recipe-support", "not listed in [archs] of its recipe"),
        (["--arch", "Ada"], "arch", "names such as Ada"),
        ([], "arch", "12.1 (GB10 (DGX Spark))"),
        (["--arch", "12.1", "--stack", "cu124", "--platform", "linux_x86_64"], "stack-arch", "CUDA 12.8"),
        (["--arch", "8.0", "--kernel", "tiny"], "recipe-support", "tiny was never tried on it"),
        (["--arch", "8.9", "--python", "3.9"], "recipe-support", "3.11, 3.12, 3.13, 3.14"),
        (["--arch", "8.9", "--stack", "cu124", "--platform", "linux_aarch64"], "recipe-support", "no CUDA build"),
        (["--arch", "8.9", "--kernel", "flash-attn", "--profile", "ful"], "unknown-name", "'full'"),
        (["--arch", "8.9", "--kernel", "causal-conv1d", "--profile", "full"], "unknown-name", "omit --profile"),
        (["--arch", "8.9", "--kernel", "sageatention"], "unknown-name", "'sageattention'"),
        (["--arch", "8.9", "--stack", "cu13"], "unknown-name", "known: cu124, cu130, cu132"),
        (["--arch", "8.9", "--platform", "linux_arm64"], "unknown-name", "linux_aarch64"),
    ],
)
def test_impossible_requests_are_refused(hearth: Hearth, words: list[str], kind: str, says: str) -> None:
    done = hearth.inv("build-kernels", "--dry-run", *words)
    assert kind_of(done.stderr) == kind, done.stderr
    assert says in done.stderr
    assert not done.stdout


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes of a selection."""
    found: list[str] = []
    monkeypatch.setattr(console, "say", found.append)
    return found


def versions(**request: Any) -> list[str]:
    """The label of each selected wheel after the stack: its targets, and the profile."""
    return [f"sm{build.version.partition('.sm')[2]}" for build in select(Request(python="3.11", **request))[0]]


@pytest.mark.parametrize(
    ("arch", "fat", "labels", "archs"),
    [
        ("9.0;9.0a", False, ["sm90a"], ["9.0"]),
        ("9.0,9.0+PTX", False, ["sm90a"], ["9.0"]),
        ("8.9;12.0", False, ["sm89", "sm120a"], ["8.9", "12.0"]),
        ("12.0f", False, ["sm120f"], ["12.0f"]),
        ("12.0f+PTX", False, ["sm120f.ptx"], ["12.0f+PTX"]),
        ("12.0;8.9+PTX", True, ["sm89.ptx.sm120a"], ["8.9+PTX;12.0"]),
        ("9.0;9.0a", True, ["sm90a"], ["9.0"]),
        ("8.9;8.9+PTX", True, ["sm89.ptx"], ["8.9+PTX"]),
        ("8.9;8.9+PTX", False, ["sm89", "sm89.ptx"], ["8.9", "8.9+PTX"]),
        ("12.0;12.0f;12.0f+PTX", True, ["sm120a.sm120f.ptx"], ["12.0;12.0f+PTX"]),
        ("8.9;10.0;12.0", True, ["sm89.sm120a"], ["8.9;12.0"]),
        pytest.param(
            *("8.9;12.0;12.1", True, ["sm89.sm120a", "sm121a"], ["8.9;12.0", "12.1"]),
            id="a wheel for each platform",
            marks=pytest.mark.needs("aarch64-linux-gnu-g++"),
        ),
    ],
)
def test_one_build_for_each_target_or_for_all(arch: str, fat: bool, labels: list[str], archs: list[str]) -> None:
    assert versions(arch=arch, fat=fat, kernel="sageattention") == [f"{each}.lean" for each in labels]
    builds, _ = select(Request(arch=arch, fat=fat, kernel="sageattention", python="3.11"))
    assert [build.arch for build in builds] == archs


def test_repeats_are_built_once() -> None:
    request = Request(arch="8.9 8.9", kernel="sageattention,sageattention", python="3.11, 3.11")
    assert len(select(request)[0]) == 1


def test_archs_with_a_common_target_are_builds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for each lies in its own index; one fat wheel has the code of a target once."""
    usual = recipe.recipes()["sageattention"][0]
    common = msgspec.structs.replace(usual, archs={**usual.archs, "8.6": "80", "8.9": "80"})
    monkeypatch.setattr(recipe, "find_recipes", lambda _: [common])
    request = Request(arch="8.0;8.6;12.0;8.9", kernel="sageattention", python="3.11")
    builds, _ = select(request)
    assert [(build.arch, build.label) for build in builds] == [
        ("8.0", "sm80"), ("8.6", "sm80"), ("8.9", "sm80"), ("12.0", "sm120a"),
    ]  # fmt: skip
    assert len({build.identifier for build in builds}) == 4
    assert "-sm89.80-" in builds[2].identifier
    (one,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    assert (one.identifier, one.index) == (builds[2].identifier, builds[2].index)
    (fat,), _ = select(replace(request, fat=True))
    assert (fat.arch, fat.label, len(graph._gencode(fat))) == ("8.0;8.6;8.9;12.0", "sm80.sm120a", 2)
    (ptx,), _ = select(Request(arch="8.0+PTX;8.9", kernel="sageattention", python="3.11", fat=True))
    assert graph._gencode(ptx) == [f"-gencode=arch=compute_80,code={each}_80" for each in ("sm", "compute")]


def test_each_module_of_a_fat_wheel_has_only_its_archs() -> None:
    (build,), _ = select(Request(arch="8.0;8.9;9.0;12.0", kernel="sageattention", python="3.11", fat=True))
    found = {each.name.rpartition("_")[2]: " ".join(map(build.target, build.of(each).archs)) for each in build.modules}
    every, newer = "80 89 90a 120a", "89 90a 120a"
    assert found == {"sm80": every, "sm89": newer, "sm90": "90a", "fused": every}


def test_there_is_no_ptx_that_runs_nowhere_else(said: list[str]) -> None:
    words = {"arch": "9.0+PTX"}
    assert versions(kernel="sageattention", **words) == ["sm90a.lean"]
    assert len([each for each in said if "compute_90a" in each]) == 1
    said.clear()
    assert versions(kernel="flash-attn", **words) == ["sm90.ptx.diffusion"]
    assert versions(kernel="sageattention", arch="8.9+PTX") == ["sm89.ptx.lean"]
    assert not said


def test_unknown_archs_of_the_variable_are_skipped(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " 5.2 8.0; 10.0 11.0 Ada 12.0+PTX ")
    assert versions(kernel="sageattention") == ["sm80.lean", "sm120a.lean"]
    skipped = [each for each in said if each.startswith("TORCH_CUDA_ARCH_LIST=")]
    assert ["5.2" in skipped[0].partition("skipped")[2], "Ada" in skipped[1].partition("skipped")[2]] == [True, True]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "All")
    with raises("arch", match="TORCH_CUDA_ARCH_LIST=All"):
        select(Request())
    with raises("arch"):
        select(Request(arch="5.2;8.0"))


def test_named_kernel_without_any_build_is_an_error() -> None:
    builds, skipped = select(Request(arch="8.9;10.0", kernel="sageattention", python="3.11"))
    assert (len(builds), [each.kernel for each in skipped]) == (1, ["sageattention"])
    with raises("recipe-support"):
        select(Request(arch="10.0", kernel="sageattention,flash-attn", python="3.11"))


def test_every_local_gpu_gets_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    gpus = [LocalGpu(Arch(*each), "GPU-1") for each in ((7, 5), (12, 0), (8, 9), (8, 9))]
    monkeypatch.setattr("core.arch.local_gpus", lambda: gpus)
    builds, skipped = select(Request(kernel="sageattention", python="3.11"))
    assert [build.arch for build in builds] == ["8.9", "12.0"]
    assert {build.toolchain.platform for build in builds} == {Platform.local()}
    assert [("7.5" in each.identifier, type(each.error)) for each in skipped] == [(True, SupportError)]


ONE = ("--kernel", "tiny", "--arch", "8.9", "--python", "3.11")


def key(hearth: Hearth, *words: str) -> str:
    (found,) = plan(hearth, *ONE, *words)
    assert found["key"]
    return str(found["key"])


def test_the_key_has_the_zlib_that_compresses(monkeypatch: pytest.MonkeyPatch) -> None:
    (build,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    real, first = zlib.compress, build.key
    monkeypatch.setattr(zlib, "compress", lambda data: real(data, 1))
    matrix._zlib.cache_clear()
    assert replace(build).key != first
    monkeypatch.undo()
    matrix._zlib.cache_clear()
    assert replace(build).key == first


def test_the_key_has_the_origin_that_the_sbom_names() -> None:
    """Several origins have the same tree."""
    (build,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    mirror = msgspec.structs.replace(build.recipe.source[0], git="https://example.org/mirror")
    other = replace(build, recipe=msgspec.structs.replace(build.recipe, source=(mirror,)))
    assert b"example.org/mirror" in sbom.write(other)
    assert other.inputs["source"] == build.inputs["source"]
    assert other.key != build.key


def test_the_key_has_the_libraries_that_write_a_wheel() -> None:
    (build,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    names = ("auditwheel", "cyclonedx-python-lib", "packageurl-python", "packaging")
    assert build.inputs["writers"] == [f"{name.replace('-', '_')}-{version(name)}" for name in names]


@pytest.mark.process
def test_key_covers_every_build_input(hearth: Hearth) -> None:
    first = key(hearth)
    assert key(hearth, "--profile", "small") != first
    for name, old, new in [
        ("src/csrc/sum.cu", "total = 0", "total = 0.0f"),
        ("src/tiny/__init__.py", "any", "every"),
        ("include/tiny.h", "float buffers", "buffers"),
        ("recipe.toml", 'nvcc = ["-O1"]', 'nvcc = ["-O2"]'),
        ("recipe.toml", '"89"', '"86"'),
    ]:
        hearth.edit(name, old, new)
        changed = key(hearth)
        assert changed != first, name
        first = changed
    compiler = hearth.place / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    assert plan(hearth, *ONE, CXX=str(compiler))[0]["key"] != first
    hearth.edit("recipe.toml", "memory_mb = 700", "memory_mb = 800")
    hearth.edit("recipe.toml", 'reason = "shows', 'reason = "demonstrates')
    assert key(hearth) == first


def programs(folder: Path, names: list[str]) -> str:
    """A PATH with only these of the real programs."""
    folder.mkdir()
    for name in names:
        for place in os.environ["PATH"].split(os.pathsep):
            if (Path(place) / name).exists():
                (folder / name).symlink_to(Path(place) / name)
                break
    return str(folder)


def test_a_missing_compiler_is_named_with_its_package(hearth: Hearth) -> None:
    path = programs(hearth.place / "bin", ["uv", "git"])
    done = hearth.inv("build-kernels", "--arch", "8.9", PATH=path)
    assert (done.returncode, kind_of(done.stderr)) == (25, "compiler-missing")
    assert "apt-get install g++" in done.stderr
    done = hearth.inv("build-kernels", "--arch", "12.1", PATH=path)
    assert (done.returncode, kind_of(done.stderr)) == (25, "cross-compiler-missing")
    assert "apt-get install g++-aarch64-linux-gnu" in done.stderr


@pytest.mark.process
@pytest.mark.parametrize("tools", [["uv", "git"], []], ids=["no compiler", "not even uv"])
def test_a_dry_run_lists_what_is_missing_and_installs_nothing(hearth: Hearth, tools: list[str]) -> None:
    (hearth.cache / "installed").unlink()
    (hearth.cache / "exports").unlink()
    env = {"PATH": programs(hearth.place / "bin", tools), "UV_PYTHON_INSTALL_DIR": str(hearth.place / "pythons")}
    other = "3.13" if sys.version_info[:2] == (3, 12) else "3.12"
    found = plan(hearth, "--arch", "8.9;12.1", "--kernel", "tiny,flash-attn", "--python", other, **env)
    assert [(each["key"], each["state"]) for each in found] == [(None, "to build")] * 4
    packages = {"8.9": "apt-get install g++)", "12.1": "apt-get install g++-aarch64-linux-gnu)"}
    for each, arch in zip(found, ("8.9", "8.9", "12.1", "12.1"), strict=True):
        lacks = "\n".join(each["lacks"])
        assert packages[arch] in lacks
        assert ("the source of flash-attn" in lacks) == each["identifier"].startswith("flash-attn")
        assert f"there is no Python {other} (" in lacks or "uv is not installed" in lacks
    assert not (hearth.place / "pythons").exists()
    assert {path.name for path in hearth.cache.iterdir()} <= {"emulation", "exports", "pycache"}
    assert not list(hearth.wheelhouse.glob("*"))


def test_a_dry_run_does_not_contact_a_host(hearth: Hearth) -> None:
    words = ("--host", "nowhere", "--kernel", "tiny", "--python", "3.11")
    (found,) = plan(hearth, *words, "--arch", "8.9")
    assert found["identifier"] == "tiny-0.1-cu130-sm89-cp311-linux_x86_64-plain"
    done = hearth.inv("build-kernels", "--dry-run", *words)
    assert kind_of(done.stderr) == "usage"


def test_a_compiler_too_new_for_cuda_is_refused(hearth: Hearth) -> None:
    newer = hearth.place / "g++-99"
    newer.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    newer.chmod(newer.stat().st_mode | stat.S_IXUSR)
    done = hearth.inv("build-kernels", "--arch", "8.9", CXX=str(newer))
    assert (done.returncode, kind_of(done.stderr)) == (25, "compiler-version")
    assert "apt-get install g++-15" in done.stderr


def test_missing_cuda_compiler_error_lists_searched_places(hearth: Hearth) -> None:
    done = hearth.inv("build-kernels", "--arch", "8.9", "--stack", "cu124", "--python", "3.11", CUDA_HOME="/nowhere")
    assert (done.returncode, kind_of(done.stderr)) == (25, "cuda-missing")
    assert "/nowhere: no bin/nvcc" in done.stderr
    assert "nvidia-cuda-toolkit" in done.stderr


def test_a_deprecated_stack_is_noted(hearth: Hearth) -> None:
    words = ("build-kernels", *ONE, "--dry-run")
    noted = ["is deprecated" in hearth.inv(*words, *more).stderr for more in ((), ("--stack", "cu124"))]
    assert noted == [False, True]


def test_the_stack_chooses_the_standard_of_the_language() -> None:
    (build,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    older = msgspec.structs.replace(build.toolchain.stack, cxx="c++17")
    other = replace(build, toolchain=replace(build.toolchain, stack=older))
    assert other.key != build.key
    standards = [graph._compile_edge("cxx", each, "a.cpp", "a.o", {}).variables["std"] for each in (build, other)]
    assert standards == [f"-std={find_stack().cxx}", "-std=c++17"]


def test_a_missing_python_is_named(hearth: Hearth) -> None:
    path = programs(hearth.place / "bin", ["uv", "git", "g++", "as", "ld"])
    empty = {"UV_PYTHON_INSTALL_DIR": str(hearth.place / "none"), "UV_PYTHON_DOWNLOADS": "never"}
    other = "3.12" if sys.version_info[:2] == (3, 13) else "3.13"  # the running one is never missing
    done = hearth.inv("build-kernels", "--arch", "8.9", "--python", other, PATH=path, **empty)
    assert (done.returncode, kind_of(done.stderr)) == (25, "python-missing")
    assert f"uv python install {other}" in done.stderr
    assert f"apt-get install python{other}-dev" in done.stderr


def test_this_interpreter_describes_itself_as_a_started_one_does() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    asked = pythons.ask(sys.executable, version)
    assert asked is not None
    assert pythons.own(version) == (asked if Path(asked[2], "Python.h").exists() else None)
    assert pythons.own("3.8") is None
