"""The checked-in configuration loads and agrees with the lock; an invalid one is refused with a near match."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from core import config, files
from core.arch import known_archs
from core.config import load
from core.stack import Platform, find_stack, stacks
from deploy.host import hosts
from deploy.inputs import gather
from deploy.look import find_target
from kernels.recipe import Recipe, load_recipe, recipes
from tests.errors import raises

PYPROJECT = tomllib.loads((files.CHECKOUT / "pyproject.toml").read_text())


def test_every_arch_has_defaults_that_exist() -> None:
    for name, info in known_archs().items():
        stack = find_stack()
        assert name in stack.archs or name == "8.7"  # no stack runs on Jetson Orin
        assert Platform.parse(info.platform).value in stack.platforms


def test_stacks_agree_with_their_extras() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert PYPROJECT["tool"]["uv"]["conflicts"] == [[{"extra": name} for name in stacks()]]
    for name, stack in stacks().items():
        pinned = dict(each.partition(";")[0].split("==") for each in extras[name])
        assert stack.builds_only or pinned.keys() >= {"torch", "torchvision", "torchaudio"}
        assert pinned["torch"] == stack.torch
        compilers = {package: version for package, version in pinned.items() if package.startswith("nvidia-")}
        assert {".".join(version.split(".")[:2]) for version in compilers.values()} == {stack.cuda}
        assert ("nvidia-nvvm" in compilers) == (stack.compiler == "locked")


def test_no_other_file_names_a_stack() -> None:
    words = ["git", "ls-files", "*.py", "*.toml", "*.sh", ".ci/*", "ARCHITECTURE.md"]
    listed = subprocess.run(words, cwd=files.CHECKOUT, capture_output=True, text=True, check=True).stdout.splitlines()
    own = ("config/stacks.toml", "pyproject.toml", "tests/", "recipes/")  # recipes list those they support
    named = re.compile(rf"\b({'|'.join(stacks())})")
    found = [path for path in listed if not path.startswith(own) and named.search((files.CHECKOUT / path).read_text())]
    assert found == []


@pytest.mark.installer
def test_a_table_and_an_extra_make_a_stack(tmp_path: Path) -> None:
    """In a copy of the checkout: uv locks the extra, and a build for the stack is planned."""
    copied = [
        "agent",
        "config",
        "core",
        "deploy",
        "gateway",
        "kernels",
        "lock",
        "ops",
        "recipes",
        "tasks.py",
        "uv.lock",
    ]
    for name in copied:
        whole = files.CHECKOUT / name
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / name)
    default = find_stack()
    text = (files.CHECKOUT / "pyproject.toml").read_text()
    extra = text[text.index(f"\n{default.name} = [") :].partition("\n]\n")[0] + "\n]\n"
    text = text.replace(extra, extra + extra.replace(default.name, "fresh"), 1)
    text = text.replace(f'{{ extra = "{default.name}" }}', f'{{ extra = "{default.name}" }}, {{ extra = "fresh" }}')
    (tmp_path / "pyproject.toml").write_text(text)
    table = (tmp_path / "config/stacks.toml").read_text().partition(f"[{default.name}]\n")[2].partition("\n[")[0]
    with (tmp_path / "config/stacks.toml").open("a") as file:
        file.write(f"\n[fresh]\n{table.replace('default = true', '')}")
    for recipe in (tmp_path / "recipes").glob("*/recipe.toml"):
        recipe.write_text(recipe.read_text().replace(f'"{default.name}"', f'"{default.name}", "fresh"'))
    subprocess.run(["uv", "lock", "--quiet"], cwd=tmp_path, check=True)
    words = ("build-kernels", "--arch", "8.9", "--stack", "fresh", "--python", "3.11", "--dry-run", "--json")
    env = {**os.environ, "HEARTH_RECIPES": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "invoke", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {each["state"] for each in json.loads(done.stdout)} == {"to build"}
    assert all("-fresh-" in each["identifier"] for each in json.loads(done.stdout))


def test_every_recipe_supports_only_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTH_RECIPES", raising=False)  # a user's own recipes need no smoke test
    for recipe in (each for same in recipes().values() for each in same):
        assert set(recipe.archs) <= set(known_archs())
        assert any(not recipe.unsupported_version(stack) for stack in stacks().values())
        assert recipe.summary
        assert recipe.license
        assert not recipe.unpinned
        assert recipe.path.joinpath("smoke.py").exists()
        assert all(patch.reason for patch in recipe.patches)


@pytest.mark.parametrize(
    ("old", "new", "place", "near"),
    [
        ("summary =", "sumary =", "sumary", "summary"),
        ("bindings = [", "binding = [", "$.modules[0]", "bindings"),
        ("cxx = [", "cxxx = [", "$.flags", "cxx"),
        ("git = ", "gti = ", "$.source[0]", "git"),
    ],
)
def test_unknown_key_error_has_path_and_suggestion(tmp_path: Path, old: str, new: str, place: str, near: str) -> None:
    text = (files.CHECKOUT / "recipes/sageattention/recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text.replace(old, new, 1))
    with raises("config") as caught:
        load(tmp_path / "recipe.toml", Recipe)
    assert place in caught.value.what
    assert f"perhaps you meant {near!r}" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ('runtime = "docker"', ("native, podman", "inv image", "compose.yaml")),
        ("runtime = true", ("native, podman",)),
        ('scope = "sytem"', ("perhaps you meant 'system'", "system, user")),
        ('members_may = ["stop"]', ("restart",)),
        ('folders = { modles = "/x" }', ("input, models, output, user",)),
        ('override = { restart = "no" }', ("always, on-failure",)),
        ('override = { network = "of" }', ("lan-deny, offline, open",)),
        ("port = true", ()),
    ],
)
def test_an_error_of_an_enumerated_key_lists_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, listed: tuple[str, ...]
) -> None:
    (tmp_path / "hosts.toml").write_text(f'[hosts.box]\naddress = "a"\n{text}\n')
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    with raises("config") as caught:
        hosts()
    for each in listed:
        assert each in caught.value.hint
    assert bool(caught.value.hint) == bool(listed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("memory_mb = 700", "memory_mb = 'a lot'"),
        ('folder = "src"', 'folder = "src"\ngit = "https://example.org"'),
        ('folder = "src"', 'git = "https://example.org"'),
        ('file = "0001-say-which-cuda.patch"', 'file = "0002-not-there.patch"'),
        ('kernels = ["csrc/sum.cu"]', 'kernels = ["csrc/sum.cu"]\narchs = ["10.0"]'),
        ("[[source]]", "[[source"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str) -> None:
    folder = files.CHECKOUT / "tests/fixtures/recipes/tiny"
    for name in ("include", "patches", "src"):
        (tmp_path / name).symlink_to(folder / name)
    text = (folder / "recipe.toml").read_text()
    assert old in text
    (tmp_path / "recipe.toml").write_text(text.replace(old, new))
    with raises("config"):
        load_recipe(tmp_path)


def test_a_command_reads_each_configuration_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    parse = config._parse
    monkeypatch.setattr(config, "_parsed", {})

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return parse(path)

    monkeypatch.setattr(config, "_parse", counted)
    for _ in range(2):
        gather(find_target("local"))
    assert len(read) == len(set(read)) > 10


def test_a_configuration_file_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_bytes(b"\xef\xbb\xbf[a]\nb = 1\n")
    assert config.table(tmp_path / "hosts.toml") == {"a": {"b": 1}}


def test_a_configuration_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for number in range(50):  # within a file system's time resolution
        path.write_text(f"x = {number % 10}")
        assert config.table(path) == {"x": number % 10}
