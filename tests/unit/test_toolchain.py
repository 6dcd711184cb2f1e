"""What a build takes from this machine: compilers, launchers, Pythons, emulators and folders, or why it cannot."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import ninja
import pytest

from core import source, tools, workspace
from core.stack import Platform, find_stack
from kernels import emulation, graph, inspection, pythons, recipe, toolchain
from kernels.matrix import Request, select
from tests.conftest import FIXTURES, Hearth
from tests.errors import kind_of, raises
from tests.unit.test_inspection import archive

Script = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    toolchain._host_compiler.cache_clear()
    yield
    toolchain._host_compiler.cache_clear()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Write a program that is first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def write(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write


def host_compiler() -> str:
    return toolchain._host_compiler(find_stack("cu130"), Platform.local())[0]


@pytest.mark.needs("g++")
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_cxx_is_no_choice(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    monkeypatch.setenv("CXX", empty)
    assert host_compiler() == "g++"


@pytest.mark.parametrize(
    ("cxx", "kind", "says"),
    [
        ("ccache g++", "compiler-missing", "HEARTH_COMPILER_LAUNCHER"),
        ("g++ -m64", "compiler-missing", "HEARTH_COMPILER_LAUNCHER"),
        ("no-such-compiler", "compiler-missing", "apt-get install g++"),
        ("/usr", "compiler-missing", "apt-get install g++"),
        ("true", "compiler-missing", "compiles no C++"),
        ("false", "compiler-missing", "compiles no C++"),
    ],
)
def test_a_cxx_that_is_no_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, cxx: str, kind: str, says: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with raises(kind) as raised:
        host_compiler()
    assert says in f"{raised.value}"


@pytest.mark.needs("g++")
def test_clang_and_a_file_that_cannot_be_run_are_errors(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    clang = script("clang++", '#!/bin/sh\nexec g++ -D__clang__=1 -U__GNUC__ -D__GNUC__=4 "$@"\n')
    monkeypatch.setenv("CXX", str(clang))
    with raises("compiler-version", match="Clang"):
        host_compiler()
    monkeypatch.setenv("CXX", str(script("no-interpreter", 'exec g++ "$@"\n')))
    with raises("program-missing", match="cannot be run"):
        host_compiler()


@pytest.mark.needs("g++")
@pytest.mark.parametrize("name", ["as", "ld", "objcopy"])
def test_another_assembler_or_linker_in_path_changes_the_key(script: Script, name: str) -> None:
    """GCC takes both from PATH, where conda's may be first; its version may be the same."""
    chain = toolchain.describe(find_stack("cu130"), Platform.local(), "3.11")
    script(name, f'#!/bin/sh\nexec /usr/bin/{name} "$@"\n')
    toolchain._host_compiler.cache_clear()
    other = toolchain.describe(find_stack("cu130"), Platform.local(), "3.11")
    assert other.kernel_fingerprint != chain.kernel_fingerprint


@pytest.mark.needs("g++")
def test_a_compiler_with_a_blank_in_its_path_compiles(tmp_path: Path) -> None:
    place = tmp_path / "a b $c 'd'"
    place.mkdir()
    (place / "g++").symlink_to("/usr/bin/g++")
    (build,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    named = graph._cxx(replace(build, toolchain=replace(build.toolchain, cxx=str(place / "g++"))))
    rule = "rule cxx\n  command = $cxx -xc++ -c $in -o $out\nbuild a.o: cxx a.cpp\n"
    (tmp_path / "build.ninja").write_text(f"{rule}  cxx = {named}\n")
    (tmp_path / "a.cpp").write_text("int a;")
    done = subprocess.run([f"{ninja.BIN_DIR}/ninja", "-C", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert shlex.split(named.replace("$$", "$")) == [str(place / "g++")]


def test_a_launcher_that_is_not_installed_is_an_error(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_COMPILER_LAUNCHER", "no-such-launcher --verbose")
    with raises("program-missing", match="HEARTH_COMPILER_LAUNCHER"):
        toolchain.describe(find_stack("cu130"), Platform.local(), "3.11")
    chain = toolchain.look(find_stack("cu130"), Platform.local(), "3.11")
    assert "program-missing" in [each.kind for each in chain.missing]
    script("no-such-launcher", "")
    assert toolchain.launcher() == "no-such-launcher --verbose"


@pytest.mark.needs("g++", "ccache")
@pytest.mark.parametrize(
    "setting", ["path = {place}", "compiler = {place}/g++", "prefix_command = false", "prefix_command_cpp = false"]
)
def test_the_configuration_of_a_launcher_chooses_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "g++").chmod(0o755)
    (tmp_path / "ccache.conf").write_text(f"{setting.format(place=tmp_path)}\ncache_dir = {tmp_path}/objects\n")
    monkeypatch.setenv("CCACHE_CONFIGPATH", str(tmp_path / "ccache.conf"))
    (tmp_path / "a.cpp").write_text("int a;")
    done = tools.build("ccache", "g++", "-c", "a.cpp", "-o", "a.o", cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.o").exists()


@pytest.mark.needs("g++", "ccache")
def test_the_configuration_of_a_launcher_weakens_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["sloppiness = time_macros", "compiler_check = none", "depend_mode = true", "hard_link = true"]
    settings += ["compiler_type = gcc", "ignore_options = -D*", "hash_dir = true", f"cache_dir = {tmp_path}/objects"]
    (tmp_path / "ccache.conf").write_text("\n".join(settings))
    monkeypatch.setenv("CCACHE_CONFIGPATH", str(tmp_path / "ccache.conf"))
    shown = tools.build("ccache", "--show-config").stdout.splitlines()
    assert [line for line in shown if line.startswith(f"({tmp_path}")] == [
        f"({tmp_path}/ccache.conf) cache_dir = {tmp_path}/objects"
    ]
    (tmp_path / "a.cpp").write_text("int a;")
    for _ in range(2):
        (tmp_path / "a.o").unlink(missing_ok=True)
        tools.build("ccache", "g++", "-c", "a.cpp", "-o", "a.o", cwd=tmp_path)
        assert (tmp_path / "a.o").stat().st_nlink == 1


def test_a_debug_or_free_threaded_python_is_passed_over(script: Script) -> None:
    """Their ABI is another one, and no name of a wheel or module would say so."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("Py_GIL_DISABLED", "Py_DEBUG", "Py_NOTHING"):
        setting = f"import sysconfig; sysconfig.get_config_vars()['{name}'] = 1;"
        script(f"python-{name}", f'#!/bin/sh\nexec {sys.executable} -ISc "{setting} $2"\n')
    asked = [pythons.ask(f"python-Py_{each}", version) for each in ("GIL_DISABLED", "DEBUG")]
    assert asked == [None, None]
    assert pythons.ask("python-Py_NOTHING", version) == pythons.ask(sys.executable, version)
    assert pythons.ask(sys.executable, version)


PACKAGES = """\
#!/bin/sh
for word; do case "$word" in Dir::Cache=*) cache="${word#Dir::Cache=}" ;; esac; done
case "$*" in *" install "*) ;; *) exit 0 ;; esac
touch "$cache/archives/first.deb"
[ -e "$HOME/network" ] || { echo "E: Failed to fetch second.deb" >&2; exit 100; }
touch "$cache/archives/second.deb"
"""
UNPACK = """\
#!/bin/sh
mkdir -p "$3/usr/bin" && touch "$3/usr/bin/python3.11" "$3/$(basename "$2")"
"""


def test_an_interrupted_download_leaves_no_emulated_python(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script("qemu-aarch64-static", "")
    script("apt-get", PACKAGES)
    script("dpkg-deb", UNPACK)
    reason = emulation.runner(Platform.LINUX_AARCH64, "3.11")
    assert isinstance(reason, str)
    assert "python3.11" in reason
    assert not list((tmp_path / "cache/emulation").iterdir())
    (tmp_path / "network").touch()
    found = emulation.runner(Platform.LINUX_AARCH64, "3.11")
    assert isinstance(found, emulation.Runner)
    names = {path.name for path in Path(found.argv[2]).iterdir()}
    assert names == {"usr", "proc", "first.deb", "second.deb"}
    assert "CPU implementer" in Path(found.argv[2], "proc/cpuinfo").read_text()


def test_wheels_are_unpacked_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp may be mounted noexec, and on another, full file system."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with inspection.unpacked(archive(tmp_path / "w.whl", {"a.so": b"x"})) as folder:
        assert folder.is_relative_to(workspace.current().cache)
        assert (folder / "a.so").read_bytes() == b"x"


@pytest.mark.process
@pytest.mark.parametrize("name", ["HEARTH_WHEELHOUSE", "HEARTH_CACHE"])
@pytest.mark.parametrize("place", ["/proc/nowhere", "{file}", "{file}/folder"])
@pytest.mark.needs("g++")
def test_a_folder_that_cannot_be_made_is_an_error_before_the_compile(hearth: Hearth, name: str, place: str) -> None:
    (hearth.place / "file").touch()
    words = ("build-kernels", "--kernel", "tiny", "--arch", "8.9", "--python", "3.11")
    done = hearth.inv(*words, **{name: place.format(file=hearth.place / "file")})
    assert (done.returncode, kind_of(done.stderr)) == (69, "not-writable"), done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("[")]  # a finished step


def test_a_user_without_a_home_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HEARTH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with raises("usage", match="no home folder"):
        workspace.current()
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert workspace.current().cache == Path("/some/cache/hearth")


def test_a_relative_cache_folder_of_xdg_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert workspace.current().cache == Path.home() / ".cache/hearth"


def test_the_cache_may_be_a_link_and_its_build_folder_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile commands contain ../toolchains, which the kernel resolves from the real folder."""
    (tmp_path / "disk/build").mkdir(parents=True)
    (tmp_path / "cache").symlink_to("disk")
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    assert graph.root() == tmp_path / "cache/build"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/build").symlink_to("../disk/build")
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "other"))
    with raises("usage", match=str(tmp_path / "other/build")):
        graph.root()


@pytest.mark.parametrize("name", ["torch/include/a.h", "nvidia/cu13/bin/ptxas", "torch/lib/a.so"])
@pytest.mark.parametrize("content", [b"edited", None, b"0" * 21, b"0" * 17])  # two as long as the originals
def test_an_edited_header_or_compiler_in_the_cache_is_not_used(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    lines = []
    for each in ("torch/include/a.h", "nvidia/cu13/bin/ptxas", "torch/lib/a.so"):
        (tmp_path / each).parent.mkdir(parents=True)
        (tmp_path / each).write_text(each)
        digest = base64.urlsafe_b64encode(hashlib.sha256(each.encode()).digest()).decode().rstrip("=")
        lines.append(f"{each},sha256={digest},{len(each)}\n")
    (tmp_path / "torch-2.dist-info").mkdir()
    (tmp_path / "torch-2.dist-info/RECORD").write_text("".join([*lines, "torch-2.dist-info/RECORD,,\n"]))
    toolchain._check_installed(tmp_path)
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_bytes(content)
    with nullcontext() if name.endswith(".so") else raises("hash-mismatch", match=name):
        toolchain._check_installed(tmp_path)


def test_a_program_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with raises("program-missing", match="uv cannot be run"):
        tools.uv("--version")


def test_a_missing_git_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    where = source.Source(git=f"file://{tmp_path}", commit="a" * 40)
    with raises("source-unreachable") as raised:
        source.fetch(source.Pinned(name="it", version="1", source=(where,), tree="b" * 64))
    assert raised.value.hint == "install git"


@pytest.mark.parametrize("place", ["nowhere", "recipes/tiny", ""])
def test_a_recipe_folder_without_recipes_is_an_error(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("HEARTH_RECIPES", str(FIXTURES / place))
    with raises("usage", match="HEARTH_RECIPES"):
        recipe.recipes()


def test_a_recipe_is_utf8_in_every_locale(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes('summary = "für"'.encode())
    code = (
        "import sys; from pathlib import Path; from core import config; print(ascii(config.table(Path(sys.argv[1]))))"
    )
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, str(tmp_path / "x.toml")]
    assert (
        subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout == "{'summary': 'f\\xfcr'}\n"
    )


@pytest.mark.needs("g++")
def test_two_names_of_one_target_are_one_build() -> None:
    builds, _ = select(Request(arch="9.0;9.0a", kernel="sageattention", python="3.11, 3.11"))
    assert len(builds) == 1
