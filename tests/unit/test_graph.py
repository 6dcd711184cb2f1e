"""A wheel's metadata, record and SBOM."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kernels import inspection, sbom, wheel
from kernels.matrix import Build, Request, select
from tests.errors import raises

pytestmark = pytest.mark.needs("g++")


@pytest.fixture(scope="module")
def build() -> Build:
    (found,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11"))
    return found


def test_an_sbom_names_the_inputs_and_is_the_same_every_time(build: Build) -> None:
    text = sbom.write(build)
    assert sbom.write(replace(build)) == text
    found = json.loads(text)
    assert found["metadata"]["component"]["version"] == build.version
    assert {each["name"] for each in found["components"]} == {"sageattention", "torch", "nvcc", "g++"}
    commit = build.recipe.source[0].commit
    assert f"pkg:github/woct0rdho/sageattention@{commit}" in [each.get("purl") for each in found["components"]]


def test_a_record_is_csv(build: Build, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(build.recipe, files=("*.py",), license_files=(), modules=())
    (tmp_path / "a, b.py").write_text("x = 1")
    path = wheel.assemble(replace(build, recipe=recipe), tmp_path, {}, tmp_path / "out")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith("/RECORD"))).decode()
    assert [row[0] for row in csv.reader(text.splitlines())] == names
    assert next(name for name in names if "/sboms/" in name).endswith(".dist-info/sboms/hearth.cdx.json")


def test_metadata_is_what_installers_accept(build: Build) -> None:
    requires = ("einops>=0.8; python_version < '3.12' and platform_machine == 'aarch64' and sys_platform == 'linux'",)
    summary = "Attention für GPUs — " + "which is a long summary " * 5
    recipe = msgspec.structs.replace(build.recipe, summary=summary.strip(), requires=requires)
    lines = wheel.metadata(replace(build, recipe=recipe)).decode().splitlines()
    assert f"Summary: {summary.strip()}" in lines
    assert f"Requires-Dist: {requires[0]}" in lines


def test_metadata_that_installers_reject_is_an_error(build: Build) -> None:
    recipe = msgspec.structs.replace(build.recipe, requires=("einops ;;",), summary="two\nlines")
    with raises("config", match="requires-dist"):
        wheel.metadata(replace(build, recipe=recipe))


PIP = (*(sys.executable, "-m", "pip", "install", "--python-version", "3.11", "--platform"), "{platform}_x86_64")
UV = ("uv", "pip", "install", "--no-config", "--python-version", "3.11", "--python-platform", "x86_64-{platform}")


def installed(installer: tuple[str, ...], wheel_file: Path, platform: str, place: Path) -> bool:
    words = [word.format(platform=platform) for word in installer]
    words += ["--no-deps", "--no-index", "--only-binary", ":all:", "--target", str(place)]
    done = subprocess.run([*words, "--find-links", str(wheel_file.parent), "sageattention"], check=False)
    return done.returncode == 0


@pytest.mark.installer
@pytest.mark.parametrize("installer", [PIP, UV], ids=["pip", "uv"])
def test_installers_accept_the_wheel_on_a_system_that_is_new_enough(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: tuple[str, ...]
) -> None:
    requires = ("einops>=0.8; python_version < '3.12' and platform_machine == 'aarch64' and sys_platform == 'linux'",)
    summary = "Attention für GPUs — " + "which is a long summary " * 5
    recipe = msgspec.structs.replace(
        build.recipe, summary=summary.strip(), requires=requires, files=("*.py",), license_files=(), modules=()
    )
    (tmp_path / "a, b.py").write_text("x = 1")
    monkeypatch.setattr(inspection, "platform_tag", lambda *_: "manylinux_2_34_x86_64")
    path = wheel.assemble(replace(build, recipe=recipe), tmp_path, {}, tmp_path / "out")
    assert path.name.endswith("-cp310-abi3-manylinux_2_34_x86_64.whl")
    with zipfile.ZipFile(path) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
    assert "Tag: cp310-abi3-manylinux_2_34_x86_64\n" in text
    assert installed(installer, path, "manylinux_2_34", tmp_path / "new")
    assert (tmp_path / "new/a, b.py").exists()
    assert not installed(installer, path, "manylinux_2_28", tmp_path / "old")
