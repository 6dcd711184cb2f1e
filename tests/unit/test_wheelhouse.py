"""The wheelhouse as an index: installers get the wheel for one GPU, next to wheels for others; prune."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core import files, manifest, workspace
from core.arch import Arch
from core.manifest import Manifest
from core.stack import Platform, find_stack
from core.wheelhouse import Wheelhouse
from kernels import matrix, store, wheel
from kernels.recipe import Recipe, load_recipe
from kernels.toolchain import Toolchain
from tests import plans
from tests.conftest import FIXTURES, Hearth
from tests.errors import kind_of, raises
from tests.kills import killer

ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
TARGETS = {"8.0": "80", "8.6": "86", "8.9": "89", "9.0": "90a", "10.0": "100a", "12.0": "120a"}
LIBRARY = Path(str(find_spec("PIL._imagingmorph").origin))  # type: ignore[union-attr]  # any small one will do
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def recipe(**values: object) -> Recipe:
    return msgspec.structs.replace(load_recipe(FIXTURES / "recipes/tiny"), archs=TARGETS, **values)


def build(arch: str, profile: str = "plain", **values: object) -> matrix.Build:
    stack = find_stack("cu130")
    chain = Toolchain(stack, Platform.local(), PYTHON, "", "", "", "", "", ())
    return matrix.Build(recipe(**values), tuple(map(Arch.parse, arch.split(";"))), profile, chain)


def described(build: matrix.Build, content: Path) -> Manifest:
    found = plans.wheel(
        build.recipe.name, file=content.name, version=build.version, arch=build.arch, key=build.key,
        python=build.toolchain.python, platform=build.toolchain.platform.value, profile=build.profile,
        inputs=msgspec.to_builtins(build.inputs), size=content.stat().st_size,
    )  # fmt: skip
    return manifest.decode(manifest.encode(msgspec.structs.replace(found, sha256=files.sha256(content))).encode())


def make(build: matrix.Build, scratch: Path) -> tuple[Path, Manifest]:
    """A wheel by Hearth's own writer; its modules are a library that ends with the GPU's name."""
    module = scratch / "module.so"
    module.write_bytes(LIBRARY.read_bytes() + f"sm_{build.target(build.archs[0])}".encode())
    path = wheel.assemble(
        build, FIXTURES / "recipes/tiny/src", {each.name: module for each in build.modules}, scratch / "wheels"
    )
    return path, described(build, path)


def admit(house: Wheelhouse, build: matrix.Build, scratch: Path) -> Manifest:
    path, found = make(build, scratch)
    house.admit(path, found)
    return found


# --- install ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """A wheelhouse with the wheels of six GPUs, in a folder whose name needs quotes."""

    house: Wheelhouse
    wheels: dict[str, Manifest]
    more: tuple[Manifest, ...]

    def index(self, arch: str) -> Path:
        return self.house.folder / self.wheels[arch].index


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    place = tmp_path_factory.mktemp("filled")
    house = Wheelhouse(place / "a, 'b' $c;ü/wheelhouse")
    wheels = {arch: admit(house, build(arch), place) for arch in ARCHS}
    more = [build("8.9+PTX"), build("8.9", "small"), build("12.0", "small"), build("9.0", version="0.2")]
    return Filled(house, wheels, tuple(admit(house, each, place) for each in more))


TOOLS = {"uv": ("uv", "pip", "install"), "pip": (sys.executable, "-I", "-m", "pip", "install")}


OTHER_INDEXES = dict.fromkeys(("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX"), "http://127.0.0.1:9/simple")
"""Nothing answers there."""


def installed(words: list[str], target: Path, **env: str) -> str:
    """The version of the only package that a command installs."""
    env |= {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {"NO_PROXY": "127.0.0.1"}
    words = [*words, *(["--python", sys.executable] if words[0] == "uv" else []), "--target", str(target)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (info,) = target.glob("*.dist-info")
    code = next((target / "tiny").glob("_sum*.so")).read_bytes()[LIBRARY.stat().st_size :].decode()
    version = info.name.removeprefix("tiny-").removesuffix(".dist-info")
    assert re.search(r"\.sm(\w+)", version)[1] == code.removeprefix("sm_")  # type: ignore[index]
    return version


@pytest.mark.installer
@pytest.mark.parametrize("tool", TOOLS)
def test_the_printed_command_installs_exactly_its_wheel(filled: Filled, tool: str, tmp_path: Path) -> None:
    for number, found in enumerate((filled.wheels["8.0"], filled.wheels["8.9"], *filled.more)):
        words = shlex.split(filled.house.install_command(found))
        assert words[:3] == ["uv", "pip", "install"]
        assert installed([*TOOLS[tool], *words[3:]], tmp_path / str(number), **OTHER_INDEXES) == found.version


@pytest.mark.installer
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("option", ["--find-links", "--index-url"])
def test_a_folder_has_the_wheels_of_one_gpu(filled: Filled, tool: str, option: str, tmp_path: Path) -> None:
    """Also for a command that names no version: by its label, sm90a would be the highest of all."""
    for arch in ("8.9", "12.0"):
        where = ["--no-index", option] if option == "--find-links" else [option]
        words = [*TOOLS[tool], "--no-deps", *where, filled.index(arch).as_uri(), "tiny"]
        assert re.search(rf"\.sm{TARGETS[arch]}\b", installed(words, tmp_path / arch))


@pytest.mark.installer
@pytest.mark.parametrize("tool", TOOLS)
def test_an_altered_wheel_is_not_installed_from_an_index(filled: Filled, tool: str, tmp_path: Path) -> None:
    place = tmp_path / "wheelhouse"
    shutil.copytree(filled.house.folder, place)
    for path in (place / filled.wheels["8.6"].index).glob("*.whl"):
        shutil.copy(filled.house.place(filled.wheels["8.9"]), path)
    words = [*TOOLS[tool], "--no-deps", "--index-url", (place / "cu130/sm_86").as_uri(), "tiny"]
    words += ["--python", sys.executable] if tool == "uv" else []
    done = subprocess.run([*words, "--target", tmp_path / "x"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()


@pytest.fixture
def served(filled: Filled, tmp_path: Path) -> Iterator[tuple[dict[str, str], str]]:
    """The printed commands by arch, and the address."""
    hearth = Hearth(tmp_path / "hearth")
    server = hearth.start("wheels", "--serve", "--port", "0", HEARTH_WHEELHOUSE=str(filled.house.folder))
    assert server.stdout
    lines: list[str] = []
    while not (lines and lines[-1].startswith("serving ")):
        lines.append(server.stdout.readline())
        assert lines[-1]
    found = re.search(r"at (http://127\.0\.0\.1:\d+)/", lines[-1])
    assert found
    try:
        yield {arch: next(line for line in lines if f"=={each.version}\n" in line) for arch, each in
               filled.wheels.items()}, found[1]  # fmt: skip
    finally:
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=30)
        assert server.returncode == 0
        assert "Traceback" not in rest
        assert "interrupted" not in rest


@pytest.mark.installer
@pytest.mark.parametrize("tool", TOOLS)
def test_served_wheels_are_installed(
    filled: Filled, served: tuple[dict[str, str], str], tool: str, tmp_path: Path
) -> None:
    commands, address = served
    for arch in ("8.6", "9.0"):
        words = shlex.split(commands[arch])
        assert installed([*TOOLS[tool], *words[3:]], tmp_path / arch) == filled.wheels[arch].version
        words = [*TOOLS[tool], "--no-deps", "--index-url", f"{address}/{filled.wheels[arch].index}", "tiny"]
        assert re.search(rf"\.sm{TARGETS[arch]}\b", installed(words, tmp_path / f"{arch}-any"))


@pytest.mark.parametrize("port", ["", "x", "-1", "65536", "1e3"])
def test_invalid_port_is_a_usage_error(tmp_path: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = port or str(used.getsockname()[1])
        done = Hearth(tmp_path / "hearth").inv("wheels", "--serve", f"--port={port}")
    assert (done.returncode, kind_of(done.stderr)) == (15, "usage")


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "index"),
    [
        ("8.9", "cu130/sm_89"),
        ("8.9+PTX", "cu130/sm_89"),
        ("9.0a", "cu130/sm_90"),
        ("12.1f", "cu130/sm_121"),
        ("10.0", "cu130/sm_100"),
        ("8.9;12.0", "cu130/sm_89.sm_120"),
        ("../8.9", "cu130/sm_89"),
    ],
)
def test_index_of_an_arch(arch: str, index: str) -> None:
    assert manifest.index("cu130", arch) == index


def test_targets_of_an_older_arch_are_in_their_own_index(tmp_path: Path) -> None:
    """A recipe may build 8.0 code for 8.9: both wheels have the same name and key."""
    house = Wheelhouse(tmp_path / "house")
    first = build("8.0")
    second = replace(first, recipe=recipe(summary=first.recipe.summary), archs=(Arch(8, 9),))
    second = replace(second, recipe=msgspec.structs.replace(second.recipe, archs={**TARGETS, "8.9": "80"}))
    assert (second.wheel_pattern, second.key) == (first.wheel_pattern, first.key)
    made = admit(house, first, tmp_path)
    assert house.find(first.index, first.wheel_pattern, first.key) == made
    assert house.find(second.index, second.wheel_pattern, second.key) is None
    admit(house, second, tmp_path)
    assert [each.arch for each in house.wheels()] == ["8.0", "8.9"]


def test_a_wheel_for_several_gpus_is_in_the_index_of_each(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    single = admit(house, build("8.9"), tmp_path)
    path, fat = make(build("12.0"), tmp_path)
    fat = msgspec.structs.replace(fat, arch="8.9;12.0")
    assert house.admit(path, fat) == tmp_path / "house/cu130/sm_89.sm_120" / fat.file
    for index, names in {"sm_89": 2, "sm_120": 1, "sm_89.sm_120": 1}.items():
        page = tmp_path / "house/cu130" / index / "tiny/index.html"
        links = [tuple(each.split("#sha256=")) for each in re.findall('href="(.*?)"', page.read_text())]
        assert len(links) == names
        for address, digest in links:
            target = (page.parent / address.replace("%2B", "+")).resolve()
            assert files.sha256(target) == digest
    assert {each.arch for each in house.wheels()} == {single.arch, fat.arch}


@pytest.mark.installer
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("option", ["--find-links", "--index-url"])
def test_the_folder_of_each_gpu_finds_a_fat_wheel(tmp_path: Path, tool: str, option: str) -> None:
    house = Wheelhouse(tmp_path / "house")
    fat = admit(house, build("8.9;12.0"), tmp_path)
    admit(house, build("9.0"), tmp_path)
    moved = house.folder.rename(tmp_path / "moved")  # links are relative
    for number, index in enumerate(("sm_89", "sm_120")):
        where = ["--no-index", option] if option == "--find-links" else [option]
        words = [*TOOLS[tool], "--no-deps", *where, (moved / "cu130" / index).as_uri()]
        assert installed([*words, f"tiny=={fat.version}"], tmp_path / str(number)) == fat.version


def test_links_to_a_fat_wheel_come_and_go_with_it(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    fat = admit(house, build("8.9;12.0"), tmp_path)
    links = [house.folder / "cu130" / index / fat.file for index in ("sm_89", "sm_120")]
    assert [files.sha256(link) for link in links] == [fat.sha256] * 2
    assert house.wheels() == [fat]
    links[0].unlink()  # as in a wheelhouse of an older version of Hearth
    mine = links[0].with_name("mine.whl")
    mine.symlink_to("../nowhere.whl")
    house.arrange()
    assert all(link.is_symlink() for link in links)
    house.delete(house.verify())
    assert [link.is_symlink() for link in (*links, mine)] == [False, False, True]
    assert len(pages := list(house.folder.rglob("index.html"))) == 6
    assert not [page for page in pages if "href" in page.read_text()]


def test_a_fat_wheel_with_the_name_of_anothers_replaces_nothing(tmp_path: Path) -> None:
    """Of archs with a common target, both wheels have one name and the same bytes; each in its own folder."""
    house = Wheelhouse(tmp_path / "house")
    common = msgspec.structs.replace(recipe(), archs={**TARGETS, "8.9": "80"})
    one = replace(build("8.0"), recipe=common)
    both = replace(one, archs=(Arch(8, 0), Arch(8, 9)))
    for first, second in ((one, both), (both, one)):
        made = [admit(house, each, tmp_path) for each in (first, second)]
        assert len({each.file for each in made}) == 1
        place = house.folder / "cu130/sm_80" / made[0].file
        assert not (place.is_symlink() and second is one)
        assert {each.arch for each in house.wheels()} == {"8.0", "8.0;8.9"}
        assert not [each for each in house.verify() if each.error]
        house.delete(house.verify())


def test_a_damaged_wheel_of_the_same_size_is_built_again(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    single = build("8.9")
    place = house.place(admit(house, single, tmp_path))
    assert house.find(single.index, single.wheel_pattern, single.key)
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    assert house.find(single.index, single.wheel_pattern, single.key) is None


def flat(folder: Path, scratch: Path, *builds: matrix.Build) -> list[Manifest]:
    """Wheels as older versions of Hearth left them."""
    folder.mkdir()
    listed = []
    for each in builds:
        path, found = make(each, scratch)
        shutil.copy(path, folder)
        (folder / f"{found.file}.json").write_text(manifest.encode(found))
        listed.append(found)
    return listed


@pytest.mark.parametrize("end", ["", ".json"])
def test_a_folder_in_the_place_of_a_wheel_is_kept_and_named(tmp_path: Path, end: str) -> None:
    house, one = Wheelhouse(tmp_path / "house"), build("8.9")
    path, found = make(one, tmp_path)
    folder = house.folder / found.index / f"{found.file}{end}"
    (folder / "mine").mkdir(parents=True)
    assert house.find(one.index, one.wheel_pattern, one.key) is None
    assert not house.verify()
    assert not house.wheels()
    with raises("not-writable", match=re.escape(str(folder))):
        house.admit(path, found)
    folder.rename(tmp_path / "moved")
    house.admit(path, found)
    assert house.find(one.index, one.wheel_pattern, one.key) == found


def test_a_killed_admission_leaves_the_old_wheel_the_new_one_or_none(tmp_path: Path) -> None:
    """The new wheel has the name and the size of the old one, and another key."""
    house, one = Wheelhouse(tmp_path / "house"), build("8.9")
    path, old = make(one, tmp_path)
    changed = tmp_path / "changed" / path.name
    changed.parent.mkdir()
    changed.write_bytes(path.read_bytes()[:-1] + b"\1")
    new = msgspec.structs.replace(old, key="c" * 64, sha256=files.sha256(changed))
    outcomes: list[tuple[bool, bool]] = []
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        shutil.rmtree(house.folder, ignore_errors=True)
        house.admit(path, old)
        if (child := os.fork()) == 0:
            counted, code = killer(len(outcomes)), 1
            try:
                for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "copyfile"), (os, "fsync")):
                    setattr(owner, name, counted(getattr(owner, name)))
                house.admit(changed, new)
                code = 0
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = {each.key: house.find(one.index, one.wheel_pattern, each.key) for each in (old, new)}
        for each in filter(None, found.values()):
            assert files.sha256(house.path(each)) == each.sha256
        outcomes.append((found[old.key] is not None, found[new.key] is not None))
        house.admit(changed, new)
        assert house.find(one.index, one.wheel_pattern, new.key) == new
        assert not list(house.folder.rglob(".*"))
    assert status == 0
    assert set(outcomes) == {(True, False), (False, False), (False, True)}
    assert outcomes == sorted(outcomes, key=lambda each: (not each[0], each[1]))


def test_wheels_of_older_versions_are_found_and_moved(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    builds = [build(arch) for arch in ARCHS]
    listed = flat(house.folder, tmp_path, *builds)
    mine = house.folder / "torch-1-py3-none-any.whl"
    mine.write_text("mine")
    for _ in range(3):
        assert sorted(each.file for each in house.wheels()) == sorted(each.file for each in listed)
        assert not [each for each in house.verify() if each.error]
        for each, found in zip(builds, listed, strict=True):
            assert house.find(each.index, each.wheel_pattern, each.key) == found
            assert files.sha256(house.path(found)) == found.sha256
        house.arrange()
    assert [path.name for path in house.folder.glob("*.whl*")] == [mine.name]
    assert len(list(house.folder.glob("cu130/sm_*/tiny/index.html"))) == len(ARCHS)


@pytest.mark.parametrize("step", range(5))
def test_an_interrupted_move_loses_nothing(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    house = Wheelhouse(tmp_path / "house")
    (found,) = flat(house.folder, tmp_path, build("8.9"))
    left = step

    def killed(real: Any) -> Any:
        def call(*words: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*words)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", killed(os.link))
        patched.setattr(Path, "unlink", killed(Path.unlink))
        with pytest.raises(KeyboardInterrupt) if step < 4 else nullcontext():
            house.arrange()
    for _ in range(2):
        assert house.wheels() == [found]
        assert files.sha256(house.path(found)) == found.sha256
        house.arrange()
    assert house.place(found).parent == house.folder / "cu130/sm_89"


def test_another_file_in_the_place_is_kept(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    (found,) = flat(house.folder, tmp_path, build("8.9"))
    other = house.folder / found.index / found.file
    other.parent.mkdir(parents=True)
    other.write_text("other")
    house.arrange()
    assert other.read_text() == "other"
    assert (house.folder / found.file).is_file()


def test_a_manifest_in_another_gpus_index_does_not_count(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path / "house")
    found = admit(house, build("9.0"), tmp_path)
    shutil.copytree(house.folder / found.index, house.folder / "cu130/sm_89")
    assert house.wheels() == [found]


@pytest.mark.process
def test_concurrent_admissions_are_all_in_the_index(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core import manifest; from core.wheelhouse import Wheelhouse\n"
        "for each in sys.argv[2:]:\n"
        "    wheel = Path(each)\n"
        "    Wheelhouse(Path(sys.argv[1])).admit(wheel, manifest.read(Path(f'{wheel}.json')))"
    )
    groups = []
    for number in range(4):
        made = [make(build("8.9", version=f"{number}.{minor}"), tmp_path) for minor in range(5)]
        for path, found in made:
            Path(f"{path}.json").write_text(manifest.encode(found))
        groups.append([str(path) for path, _ in made])
    words = [sys.executable, "-c", code, str(tmp_path / "house")]
    running = [subprocess.Popen([*words, *group], cwd=files.CHECKOUT) for group in groups]
    assert [each.wait() for each in running] == [0] * 4
    page = (tmp_path / "house/cu130/sm_89/tiny/index.html").read_text()
    assert {Path(each).name for group in groups for each in group} == set(re.findall(">(.*?)</a>", page))


# --- prune -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hearth:
    """A Hearth whose recipe `tiny` is at 0.3, with wheels of 0.1, 0.2 and 0.3, oldest first."""
    hearth = Hearth(tmp_path / "hearth")
    hearth.edit("recipe.toml", 'version = "0.1"', 'version = "0.3"')
    hearth.edit("recipe.toml", '"8.9" = "89"', "\n".join(f'"{arch}" = "{to}"' for arch, to in TARGETS.items()))
    hearth.edit("recipe.toml", '"9.0" = "90a"\n"12.1"', '"12.1"')
    hearth.edit("recipe.toml", '"8.0" = "tiny was never', '"7.5" = "tiny was never')
    for name, value in hearth.variables().items():
        monkeypatch.setenv(name, value)
    for version in ("0.1", "0.2", "0.3"):
        admit(workspace.current().wheelhouse, current("8.9", version), tmp_path)
    return hearth


def current(arch: str, version: str = "0.3", profile: str = "plain") -> matrix.Build:
    """A build of the recipe as it is now, or was in another version."""
    found = load_recipe(Path(os.environ["HEARTH_RECIPES"]) / "tiny")
    return replace(build(arch, profile), recipe=msgspec.structs.replace(found, version=version))


def versions() -> list[str]:
    return [each.version.partition("+")[0] for each in workspace.current().wheelhouse.wheels()]


def names(hearth: Hearth) -> set[str]:
    return {str(path.relative_to(hearth.wheelhouse)) for path in hearth.wheelhouse.rglob("*") if path.is_file()}


def test_prune_deletes_what_the_current_recipe_replaced(pruning: Hearth) -> None:
    before = names(pruning)
    plan = pruning.inv("wheels", "--prune", "--dry-run")
    assert plan.returncode == 2, plan.stderr
    assert len(re.findall(r"^tiny-0\.[12]\S+ is replaced by tiny-0\.3", plan.stderr, re.MULTILINE)) == 2
    refused = pruning.inv("wheels", "--prune")
    assert (refused.returncode, kind_of(refused.stderr)) == (63, "refused")
    assert names(pruning) == before
    done = pruning.inv("wheels", "--prune", "--yes")
    assert done.returncode == 0, done.stderr
    assert versions() == ["0.3"]
    page = (pruning.wheelhouse / "cu130/sm_89/tiny/index.html").read_text()
    assert re.findall(r">tiny-(0\.\d)", page) == ["0.3"]
    again = pruning.inv("wheels", "--prune", "--dry-run")
    assert again.returncode == 0
    assert "nothing to prune" in again.stderr


def test_prune_deletes_wheels_for_several_gpus(pruning: Hearth, tmp_path: Path) -> None:
    for version in ("0.1", "0.2", "0.3"):
        admit(workspace.current().wheelhouse, current("8.9;12.0", version), tmp_path)
    done = pruning.inv("wheels", "--prune", "--yes")
    assert done.returncode == 0, done.stderr
    left = [(each.version.partition("+")[0], each.arch) for each in workspace.current().wheelhouse.wheels()]
    assert sorted(left) == [("0.3", "8.9"), ("0.3", "8.9;12.0")]


def edit(old: str, new: str) -> Callable[[Hearth], None]:
    return lambda hearth: hearth.edit("recipe.toml", old, new)


def damage(hearth: Hearth) -> None:
    for path in hearth.wheels():
        path.write_bytes(path.read_bytes()[:-1] + b"x")


NO_CURRENT_WHEEL: dict[str, Callable[[Hearth], object]] = {
    "recipe missing": lambda hearth: shutil.rmtree(hearth.tiny),
    "recipe invalid": lambda hearth: (hearth.tiny / "recipe.toml").write_text("x = "),
    "recipe newer": edit('version = "0.3"', 'version = "0.4"'),
    "recipe older": edit('version = "0.3"', 'version = "0.1"'),
    "recipe edited": edit('nvcc = ["-O1"]', 'nvcc = ["-O2"]'),
    "source missing": lambda hearth: shutil.rmtree(hearth.tiny / "src"),
    "arch dropped": edit('"8.9" = "89"', ""),
    "wheels damaged": damage,
}


@pytest.mark.parametrize("change", NO_CURRENT_WHEEL)
def test_prune_keeps_everything_without_a_current_wheel(pruning: Hearth, change: str) -> None:
    NO_CURRENT_WHEEL[change](pruning)
    before = names(pruning)
    pruning.inv("wheels", "--prune", "--yes")
    assert names(pruning) == before


def test_prune_keeps_what_it_does_not_know(pruning: Hearth, tmp_path: Path) -> None:
    """Foreign files, drafts of running processes, and wheels for other purposes."""
    house = workspace.current().wheelhouse
    others = [current("9.0", "0.1"), current("8.9", "0.1", "small"), current("8.9+PTX", "0.1")]
    chain = others[0].toolchain
    others.append(replace(current("8.9", "0.1"), toolchain=replace(chain, python="3.9")))
    others.append(replace(current("8.9", "0.1"), toolchain=replace(chain, platform=Platform.LINUX_AARCH64)))
    for version in ("0.1", "0.3"):
        path, fat = make(current("12.0", version), tmp_path)
        house.admit(path, msgspec.structs.replace(fat, arch="8.9;12.0"))
    kept = {house.place(admit(house, each, tmp_path)) for each in others}
    for folder in (house.folder, house.folder / "cu130/sm_89"):
        for name in ("mine.txt", "mine-1-py3-none-any.whl", ".gitignore", "bad.whl.json"):
            (folder / name).write_text("mine")
            kept.add(folder / name)
    with files.draft(house.folder / "cu130/sm_89/new.whl") as part:
        part.write_text("in progress")
        done = pruning.inv("wheels", "--prune", "--yes")
        assert part.read_text() == "in progress"
    assert done.returncode == 0, done.stderr
    assert {each for each in kept if not each.exists()} == set()
    assert len(versions()) == len(others) + 3


def test_prune_needs_no_compiler(pruning: Hearth) -> None:
    done = pruning.inv("wheels", "--prune", "--yes", PATH="/nowhere", CXX="/nowhere/g++")
    assert done.returncode == 0, done.stderr
    assert versions() == ["0.3"]


def test_prune_waits_for_a_running_build(pruning: Hearth) -> None:
    with workspace.current().building():
        waiting = pruning.start("wheels", "--prune", "--yes")
        assert waiting.stdout
        assert "another build is running" in waiting.stdout.readline()
        assert len(versions()) == 3
    waiting.communicate()
    assert versions() == ["0.3"]


@pytest.mark.usefixtures("pruning")
def test_a_wheel_that_was_replaced_in_the_meantime_is_not_deleted(tmp_path: Path) -> None:
    house = workspace.current().wheelhouse
    old = [each for each, _ in store.superseded(house.verify())]
    assert len(old) == 2
    again = current("8.9", "0.1")
    admit(house, replace(again, recipe=msgspec.structs.replace(again.recipe, summary="other")), tmp_path)
    house.delete(old)
    assert versions() == ["0.1", "0.3"]


def test_the_docs_install_the_wheel_of_the_current_recipe() -> None:
    found = load_recipe(files.CHECKOUT / "recipes/sageattention")
    pages = [(files.CHECKOUT / page).read_text() for page in ("README.md", "docs/how-to/build-kernels.md")]
    (version,) = {each for page in pages for each in re.findall(r"sageattention==([^\s']+)", page)}
    assert version == f"{found.version}+cu130.sm{found.archs['8.9']}.{found.default_profile}"


def test_path_of_a_damaged_wheel_is_an_error(filled: Filled) -> None:
    with raises("hash-mismatch"):
        filled.house.path(msgspec.structs.replace(filled.wheels["8.9"], sha256="0" * 64))
