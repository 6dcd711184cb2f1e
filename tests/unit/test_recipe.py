"""A recipe's values become parts of file names, version labels and command lines: wrong ones are refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from packaging.utils import parse_wheel_filename

from core import console, stack, workspace
from deploy import inputs
from kernels.matrix import Request, select
from kernels.recipe import find_recipes, load_recipe, recipes
from kernels.source import _mirror
from tests import plans
from tests.conftest import FIXTURES
from tests.errors import raises


def edited(place: Path, old: str, new: str) -> Path:
    shutil.copytree(FIXTURES / "recipes/tiny", place / "tiny")
    text = (place / "tiny/recipe.toml").read_text()
    assert old in text
    (place / "tiny/recipe.toml").write_text(text.replace(old, new))
    return place / "tiny"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "tiny"', 'name = "ti/ny"'),
        ('name = "tiny"', 'name = ""'),
        ('name = "tiny"', 'name = "tíny"'),
        ('version = "0.1"', 'version = "0.1-rc1"'),
        ('version = "0.1"', 'version = "0.1+git1"'),
        ('version = "0.1"', 'version = "v0.1"'),
        ('version = "0.1"', 'version = "latest"'),
        ("[profiles.small]", "[profiles.no-half]"),
        ("[profiles.small]", "[profiles.Small]"),
        ("[profiles.small]", "[profiles.01]"),
        ("default = true", "default = false"),
        ("[profiles.small]", "[profiles.small]\ndefault = true"),
        ('"12.1" = "121a"', '"12.1" = "120a"'),
        ('"12.1" = "121a"', '"12.1" = "122"'),
        ('"12.1" = "121a"', '"12.1" = "90"'),
        ('"12.1" = "121a"', '"12.1" = "sm_121a"'),
        ('"12.1" = "121a"', '"12.10" = "1210"'),
        ('name = "tiny._sum"', 'name = "tiny._scale"'),
        ('name = "tiny._sum"', 'name = "tiny/_sum"'),
        ("memory_mb = 700", "memory_mb = 0"),
    ],
)
def test_a_value_that_cannot_be_part_of_a_wheel_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with raises("config"):
        load_recipe(edited(tmp_path, old, new))


@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("old", "new"), [('name = "tiny"', 'name = "Tiny-Kernels_2"'), ('version = "0.1"', 'version = "1.0rc1.post2"')]
)
def test_the_wheels_of_a_valid_recipe_have_names_that_installers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    recipe = load_recipe(edited(tmp_path, old, new))
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    (build,), _ = select(Request(arch="8.9", kernel=recipe.name, python="3.11"))
    assert str(parse_wheel_filename(build.wheel_name("manylinux_2_28_x86_64"))[1]) == build.version


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[cu130]", '["cu130-torch212"]'),
        ("[cu130]", "[Cu130]"),
        ("[cu130]", '["cu130.1"]'),
        ('cxx = "c++20"', 'cxx = "20"'),
        ('cxx = "c++20"', 'cxx = "c++20 -DX"'),
        ("default = true", ""),
        ("[cu132]", "[cu132]\ndefault = true"),
    ],
)
def test_invalid_stacks_are_refused(tmp_path: Path, old: str, new: str) -> None:
    text = (workspace.current().checkout / "config/stacks.toml").read_text()
    assert old in text
    (tmp_path / "checkout/config").mkdir(parents=True)
    (tmp_path / "checkout/config/stacks.toml").write_text(text.replace(old, new))
    with workspace.using(workspace.Workspace.of_bundle(tmp_path)), raises("config"):
        stack.stacks()


def test_a_tree_is_mirrored_whatever_was_there(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in ("same", "edited", "mode", "folder/file", "file", "gone/inner/x"):
        (old / path).parent.mkdir(parents=True, exist_ok=True)
        (old / path).write_text("old")
    (old / "link").symlink_to("nowhere")
    for path in ("same", "edited", "mode", "folder", "file/inner", "link"):
        (new / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).write_text("old" if path in ("same", "mode") else "new")
    (new / "mode").chmod(0o755)
    times = {path: (old / path).stat().st_mtime_ns for path in ("same", "edited")}
    wanted = {str(path.relative_to(new)): path.is_file() and path.read_text() for path in new.rglob("*")}
    _mirror(new, old)
    assert {str(path.relative_to(old)): path.is_file() and path.read_text() for path in old.rglob("*")} == wanted
    assert (old / "mode").stat().st_mode & 0o100
    assert (old / "same").stat().st_mtime_ns == times["same"]
    assert (old / "edited").stat().st_mtime_ns > times["edited"]


def test_a_file_is_new_for_ninja_even_if_the_run_ends_with_its_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old/file", tmp_path / "new/file"
    for path in (old, new):
        path.parent.mkdir()
        path.write_text(path.parent.name)
        os.utime(path, (1, 1))
    rename = Path.replace

    def killed(self: Path, target: Path) -> Path:
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _mirror(new.parent, old.parent)
    assert (old.read_text(), old.stat().st_mtime > 1) == ("new", True)


BROKEN = {
    "not TOML": ('version = "0.1"', 'version = "0.1'),
    "unknown key": ('version = "0.1"', 'version = "0.1"\nsumary = "x"'),
    "invalid value": ('version = "0.1"', 'version = "latest"'),
    "missing patch": ('file = "0001-say-which-cuda.patch"', 'file = "gone.patch"'),
}


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes: a good one, and one that is not valid."""
    place = edited(tmp_path, *request.param)
    shutil.copytree(FIXTURES / "recipes/tiny", tmp_path / "good")
    text = (tmp_path / "good/recipe.toml").read_text()
    (tmp_path / "good/recipe.toml").write_text(text.replace('name = "tiny"', 'name = "good"', 1))
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    return place


@pytest.mark.needs("g++")
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN, indirect=True)
def test_a_broken_recipe_blocks_no_other_and_is_named(broken: Path) -> None:
    builds, skipped = select(Request(arch="8.9", python="3.11"))
    assert {"good", "sageattention"} <= {build.recipe.name for build in builds}
    (reason,) = [each.reason for each in skipped if each.kernel == "tiny"]
    assert str(broken) in reason
    assert select(Request(arch="8.9", python="3.11", kernel="good,sageattention"))[1] == []
    with raises("config", match=str(broken)):
        select(Request(arch="8.9", kernel="good,tiny"))


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN, indirect=True)
def test_a_broken_recipe_stops_only_a_deploy_of_its_kernel(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    target = plans.spark()

    def needed(*kernels: str) -> tuple[set[str], list[str]]:
        profile = msgspec.structs.replace(target.profile, kernels=kernels)
        known, errors = inputs._recipes(replace(target, profile=profile))
        return set(known), [each.kind for each in errors]

    assert needed("sageattention", "good") == ({"sageattention", "good"}, [])
    assert [each for each in said if str(broken) in each]
    assert needed("sageattention", "tiny") == ({"sageattention"}, ["config"])
    assert needed("sageattention:full") == ({"sageattention"}, [])
    assert needed("sageattention:fulll")[1] == ["config"]


def test_a_folder_without_recipes_stops_a_deploy_of_kernels_and_no_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a share that is not mounted, and any kernel's recipe may be in it."""
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path / "share"))
    target = plans.spark()
    known, errors = inputs._recipes(target)
    assert (known, [each.kind for each in errors]) == ({}, ["usage"])
    without = replace(target, profile=msgspec.structs.replace(target.profile, kernels=()))
    assert inputs._recipes(without) == ({}, [])
    given = replace(plans.inputs(), recipe_errors=errors)
    planned = plans.made(stock=given)
    assert [each.kind for each in planned.refusals] == ["recipe"]
    assert not planned.steps


def test_a_broken_recipe_does_not_reveal_the_one_that_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(tmp_path, 'name = "tiny"', 'name = "SageAttention"\nsumary = "x"')
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    with raises("config", match="sumary"):
        find_recipes("sageattention")


def test_names_that_installers_do_not_distinguish_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would write the same wheel file, each over the other's."""
    edited(tmp_path, 'name = "tiny"', 'name = "flash_attn"')
    monkeypatch.setenv("HEARTH_RECIPES", str(tmp_path))
    assert [each.path.name for each in find_recipes("Flash-Attn")] == ["tiny"]
    assert "flash-attn" not in recipes()
    shutil.copytree(tmp_path / "tiny", tmp_path / "other")
    text = (tmp_path / "other/recipe.toml").read_text()
    (tmp_path / "other/recipe.toml").write_text(
        text.replace("flash_attn", "flash.attn").replace("flash.attn", "Flash-attn")
    )
    with raises("config", match="one name for installers"):
        find_recipes("flash_attn")


def test_a_relative_search_path_means_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git and the compilers run in other folders."""
    monkeypatch.chdir(edited(tmp_path, 'version = "0.1"', 'version = "0.2"').parent)
    monkeypatch.setenv("HEARTH_RECIPES", ".")
    assert find_recipes("tiny")[0].path.is_absolute()
    assert find_recipes("tiny")[0].version == "0.2"
