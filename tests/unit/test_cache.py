"""`inv cache`: sizes, what is deleted, and what is in use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from core import cache, files, workspace
from tests.client import Client
from tests.errors import kind_of, raises


@dataclass
class Filled(Client):
    """A cache with some of its directories, and one that Hearth did not make."""

    place: Path

    def variables(self) -> dict[str, str]:
        return {"HEARTH_CACHE": str(self.place)}

    def names(self) -> set[str]:
        return {str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file()}


DIRECTORIES = ("sources", "build", "wheels", "installed", "mine")


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Filled:
    place = tmp_path / "cache"
    for number, name in enumerate(DIRECTORIES, 1):
        (place / name / "inner").mkdir(parents=True)
        (place / name / "inner/file").write_bytes(bytes(1000 * number))
        os.link(place / name / "inner/file", place / name / "same")
    (place / "build.lock").touch()
    (place / "build/.ninja_log").touch()
    monkeypatch.setenv("HEARTH_CACHE", str(place))
    return Filled(place)


def test_directories_have_sizes_and_contents(filled: Filled) -> None:
    done = filled.inv("cache", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)}
    sizes = {"sources": 1000, "objects": 2000, "downloads": 3000, "installed": 4000, "mine": 5000}
    assert {name: each["size"] for name, each in found.items()} == sizes
    assert {name for name, each in found.items() if each["kept"]} == {"mine"}
    assert all(each["content"] for each in found.values())
    table = filled.inv("cache").stdout
    assert f"15.0 kB in {filled.place}" in table


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--clear"], {"mine"}),
        (["--clear", "all"], {"mine"}),
        (["--clear", "objects"], {"sources", "wheels", "installed", "mine"}),
        (["--clear", "downloads,sources"], {"build", "installed", "mine"}),
    ],
)
def test_chosen_directories_are_cleared(filled: Filled, words: list[str], left: set[str]) -> None:
    before = filled.names()
    plan = filled.inv("cache", *words, "--dry-run")
    assert plan.returncode == 2, plan.stderr
    refused = filled.inv("cache", *words)
    assert (refused.returncode, kind_of(refused.stderr)) == (63, "refused")
    assert filled.names() == before
    done = filled.inv("cache", *words, "--yes")
    assert done.returncode == 0, done.stderr
    assert {name.partition("/")[0] for name in filled.names() if "/" in name} == left
    assert filled.inv("cache", *words, "--dry-run").returncode == 0


@pytest.mark.parametrize("name", ["mine", "source", "../x", "all,nothing"])
def test_unknown_directory_is_an_error(filled: Filled, name: str) -> None:
    before = filled.names()
    done = filled.inv("cache", "--clear", name, "--yes")
    assert (done.returncode, kind_of(done.stderr)) == (15, "unknown-name")
    assert filled.names() == before


def test_empty_and_missing_caches(tmp_path: Path) -> None:
    for words in ((), ("--clear", "--yes")):
        done = Filled(tmp_path / "missing").inv("cache", "--json", *words)
        assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_a_shared_directory_is_kept(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    (filled.place / "toolchains").symlink_to(tmp_path / "other")
    (filled.place / "sources/link").symlink_to(tmp_path / "other")
    assert filled.inv("cache", "--clear", "--yes").returncode == 0
    assert (filled.place / "toolchains/file").exists()
    assert not (filled.place / "sources/link").is_symlink()
    assert (tmp_path / "other/file").exists()


@pytest.mark.process
@pytest.mark.parametrize("hold", ["building", "reading"])
def test_clear_waits_for_builds_and_deploys(filled: Filled, hold: str) -> None:
    before = filled.names() | {"read.lock"}
    with getattr(workspace.current(), hold)():
        waiting = filled.start("cache", "--clear", "--yes")
        assert waiting.stdout
        assert "waiting for it to end" in waiting.stdout.readline()
        assert filled.names() | {"read.lock"} == before
    waiting.communicate()
    assert waiting.returncode == 0
    assert not (filled.place / "sources/same").exists()


@pytest.mark.usefixtures("filled")
def test_several_commands_read_the_cache() -> None:
    code = "from core import workspace\nwith workspace.current().reading(): print('both')"
    with workspace.current().reading():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=files.CHECKOUT, capture_output=True, text=True, check=True
        )
    assert (done.stdout, done.stderr) == ("both\n", "")


def test_drafts_of_running_processes_are_kept(filled: Filled) -> None:
    with files.atomic_dir(filled.place / "sources/new") as part:
        (part / "half").touch()
        (filled.place / "sources/.old.killed").mkdir()
        assert filled.inv("cache", "--clear", "--yes").returncode == 0
        assert (part / "half").exists()
        assert [path.name for path in (filled.place / "sources").iterdir()] == [part.parent.name]
    assert (filled.place / "sources/new/half").exists()


def test_a_killed_clear_leaves_no_incomplete_folder(filled: Filled) -> None:
    """An existing source or installation counts as complete."""
    code = (
        "import os, shutil; from core import cache\n"
        "shutil.rmtree = lambda *_, **__: os._exit(9)\n"
        "cache.clear(cache.choose(cache.directories(), 'all'))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=files.CHECKOUT, check=False).returncode == 9
    chosen = cache.choose(cache.directories(), "all")
    left = {str(path.relative_to(filled.place)) for path in filled.place.glob("*/inner")}
    assert len(left) >= len(DIRECTORIES) - 1  # the first entry may be a file
    assert all((filled.place / each / "file").exists() for each in left)
    cache.clear(chosen)
    assert {path.name for each in chosen for path in Path(each.path).iterdir()} == set()


def test_unknown_name_lists_the_directories() -> None:
    with raises("unknown-name") as raised:
        cache.choose([], "object")
    assert "'objects'" in raised.value.hint


def test_every_directory_of_the_cache_is_known() -> None:
    sources = (
        path
        for name in ("core", "kernels", "lock", "deploy", "ops", "gateway")
        for path in (files.CHECKOUT / name).rglob("*.py")
    )
    used = {name for path in sources for name in re.findall(r'\.cache / "([\w-]+)["/]', path.read_text())}
    assert used == {folder for folder, _ in cache.KNOWN.values()}
