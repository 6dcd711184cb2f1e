"""Archs with real compilers: nvcc's own list, fat wheels, and the paths in kernels' Python sources."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core import files
from core.arch import known_archs
from core.errors import SourceError
from core.source import fetch
from core.stack import stacks
from kernels import merge
from kernels.recipe import load_recipe, recipes
from tests.conftest import Hearth

pytestmark = [pytest.mark.toolchain, pytest.mark.needs("g++", "git")]

FAT = ("build-kernels", "--kernel", "tiny", "--python", "3.11", "--fat", "--json")


@pytest.fixture(scope="module")
def fat(tmp_path_factory: pytest.TempPathFactory, compiled: dict[str, str]) -> Hearth:
    """The kernel `tiny`, built for 8.9, and then for 8.9 and 9.0 in one wheel."""
    hearth = Hearth(tmp_path_factory.mktemp("fat") / "hearth", {**compiled})
    for arch in ("8.9", "8.9;9.0"):
        done = hearth.inv(*FAT, "--arch", arch)
        assert done.returncode == 0, done.stderr
    (hearth.place / "answer.json").write_text(done.stdout)
    (hearth.place / "steps.txt").write_text(done.stderr)
    return hearth


def built(fat: Hearth) -> dict[str, object]:
    (found,) = json.loads((fat.place / "answer.json").read_text())
    assert isinstance(found, dict)
    return found


def test_each_module_of_a_fat_wheel_has_its_archs(fat: Hearth) -> None:
    found = built(fat)
    assert ".sm89.sm90a.plain-" in str(found["file"])
    assert found["arch"] == "8.9;9.0"
    modules = found["modules"]
    assert isinstance(modules, list)
    both = ["sm_89", "sm_90a"]
    assert {each["name"]: (each["sass"], each["cubins"]) for each in modules} == {
        "tiny._driver": ([], 0),
        "tiny._scale": (both, 4),
        "tiny._sum": (both, 2),
    }
    assert isinstance(found["imported"], dict)
    assert found["imported"]["result"] == "passed"


def test_a_fat_wheel_shares_the_objects_of_one_arch(fat: Hearth) -> None:
    text = (fat.place / "steps.txt").read_text()
    compiled = re.findall(r"^\[.*/(\w+\.cu)$", text, re.MULTILINE)
    assert sorted(compiled) == ["scale.cu", "scale_half.cu", "sum.cu"]  # for 9.0 only
    assert "at once" not in text + "".join(path.read_text() for path in (fat.cache / "build/logs").iterdir())


def test_a_fat_module_has_the_bytes_of_nvccs_own(fat: Hearth) -> None:
    """The rule's second command is one compile with all -gencode options: here of the two files that include little."""
    place = fat.cache / "build"
    (module,) = (path for path in place.rglob("tiny/_scale.so") if ".sm90a" in str(path))
    merged = module.read_bytes()
    graph = place / "build.ninja"
    text = graph.read_text()
    assert text.count("$python $merge") == 1
    graph.write_text(text.replace("$python $merge", "false $merge"))
    words = ["ninja", "-C", str(place), str(module.relative_to(place))]
    said = subprocess.run(words, env=fat.environment(), capture_output=True, text=True, check=True).stdout
    assert "csrc/scale_half.cu" in said
    assert module.read_bytes() == merged


def test_fat_wheel_is_found_again(fat: Hearth) -> None:
    done = fat.inv(*FAT, "--arch", "9.0 8.9", "--dry-run")
    assert [each["state"] for each in json.loads(done.stdout)] == ["in the wheelhouse"]


def test_archs_are_those_of_the_locked_compiler(fat: Hearth) -> None:
    (nvcc,) = {path.resolve() for path in (fat.cache / "toolchains").glob("*/nvcc/bin/nvcc")}
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    options = subprocess.run([nvcc, "--help"], check=True, capture_output=True, text=True).stdout
    known = known_archs()
    plain = {name.replace(".", "") for name in known}
    assert {f"sm_{each}" for each in plain} == set(listed.split())
    targets = {name.replace(".", "") + suffix for name, info in known.items() for suffix in ("", *info.suffixes)}
    assert targets == set(re.findall(r"'sm_(\d+[af]?)'", options))
    for stack in stacks().values():
        assert set(stack.archs) <= known.keys()


@pytest.mark.parametrize(
    "path", [each.path.name for same in recipes().values() for each in same if each.name != "tiny"]
)
def test_python_source_has_a_path_for_every_arch(path: str) -> None:
    """Where it compares the GPU with names such as sm89, an arch that it does not name would only raise."""
    recipe = load_recipe(files.CHECKOUT / "recipes" / path)
    try:
        tree = fetch(recipe)
    except SourceError as error:
        assert error.kind == "source-unreachable"
        pytest.skip(error.what)
    paths = [path for pattern in recipe.files for path in tree.glob(pattern) if path.suffix == ".py"]
    choices = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.If)]
    parts = {id(each) for choice in choices for each in choice.orelse}  # elif
    chains = [named_by(each) for each in choices if id(each) not in parts]
    assert any(chains) or recipe.name != "sageattention"
    for named in filter(None, chains):
        assert {f"sm{arch.replace('.', '')}" for arch in recipe.archs} <= named


def named_by(choice: ast.If) -> set[str]:
    """The archs that an if statement compares with, up to an `else` that raises; empty if others have a path, too."""
    tests, rest = [choice.test], choice.orelse
    while len(rest) == 1 and isinstance(rest[0], ast.If):
        tests, rest = [*tests, rest[0].test], rest[0].orelse
    strings = [node.value for test in tests for node in ast.walk(test) if isinstance(node, ast.Constant)]
    named = {each for each in strings if isinstance(each, str) and re.fullmatch(r"sm\d{2,3}", each)}
    return named if any(isinstance(each, ast.Raise) for each in rest) else set()


def assemble(place: Path, images: bytes, host: str) -> str:
    """An object with device code, as nvcc lays it out, and with a constant that is named for its arch, as CUB's."""
    content = merge.HEADER.pack(merge.MAGIC, 1, merge.HEADER.size, len(images)) + images
    listed = ",".join(map(str, content))
    source = f'.section .nv_fatbin,"a"\n.align 8\nfatbinData:\n.byte {listed}\n.text\n.globl {host}\n{host}: ret\n'
    source += f".section .rodata\nsm_{images[:1].decode()}: .long 1\n"
    place.with_suffix(".s").write_text(source)
    subprocess.run(["g++", "-c", place.with_suffix(".s"), "-o", place], check=True)
    return str(place)


def test_objects_with_other_host_code_are_not_merged(tmp_path: Path) -> None:
    first, second = (assemble(tmp_path / f"{each}.o", each.encode() * 8, "run") for each in "ab")
    merge.merge("g++", str(tmp_path / "both.o"), [first, second])
    code = tmp_path / "code"
    dump = ["objcopy", "--dump-section", f".nv_fatbin={code}", str(tmp_path / "both.o"), str(tmp_path / "copy.o")]
    subprocess.run(dump, check=True)
    assert merge.images(code.read_bytes()) == b"aaaaaaaabbbbbbbb"
    other = assemble(tmp_path / "other.o", b"c" * 8, "run_for_sm90")
    (tmp_path / "none.s").write_text(".text\n")
    subprocess.run(["g++", "-c", tmp_path / "none.s", "-o", tmp_path / "none.o"], check=True)
    for wrong in (other, str(tmp_path / "none.o"), str(tmp_path / "missing.o")):
        words = [sys.executable, "-IS", str(files.CHECKOUT / "kernels/merge.py"), "g++", str(tmp_path / "x.o")]
        done = subprocess.run([*words, first, wrong], capture_output=True, text=True, check=False)
        assert done.returncode
        assert "for all archs at once" in done.stderr
        assert not (tmp_path / "x.o").exists()
