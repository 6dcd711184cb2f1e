"""The import of built wheels: what ends the interpreter that waits for one, and errors of torch itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from core.stack import Platform, find_stack
from kernels import toolchain
from kernels.importer import Importer
from kernels.matrix import Build, Request, select
from kernels.toolchain import Toolchain
from tests.errors import raises
from tests.unit.test_inspection import archive

TORCH = """
class _C:
    _dispatch_get_all_op_names = list
__version__ = "2.0"
class ops:
    load_library = print
"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A build for a torch that the test writes, without modules."""
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(Toolchain, "site", property(lambda _: tmp_path))
    (found,), _ = select(Request(arch="8.9", kernel="sageattention", python="3.11", platform="linux_x86_64"))
    chain = replace(toolchain.describe(find_stack(), Platform.LINUX_X86_64, "3.11"), interpreter=sys.executable)
    return replace(found, toolchain=chain, recipe=msgspec.structs.replace(found.recipe, modules=()))


def test_an_interpreter_that_gets_no_wheel_ends(tmp_path: Path, build: Build) -> None:
    ended = tmp_path / "ended"
    text = f"{TORCH}\nimport atexit, pathlib\natexit.register(pathlib.Path({str(ended)!r}).touch)\n"
    (tmp_path / "torch/__init__.py").write_text(text)
    with Importer(build.toolchain):
        pass
    assert ended.exists()


def test_a_wheel_is_imported_by_a_waiting_interpreter(tmp_path: Path, build: Build) -> None:
    (tmp_path / "torch/__init__.py").write_text(TORCH)
    with Importer(build.toolchain) as importer:
        proof = importer.prove(archive(tmp_path / "w.whl", {"m.py": b""}), build)
    assert (proof.result, proof.detail) == ("passed", "imported with torch 2.0, natively on x86_64")


def test_a_torch_that_cannot_be_imported_is_an_error(tmp_path: Path, build: Build) -> None:
    """The interpreter ends before it reads anything."""
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('no libc10')")
    with Importer(build.toolchain) as importer, raises("inspection") as caught:
        importer.prove(archive(tmp_path / "w.whl", {"m.py": b""}), build)
    assert caught.value.cause == "no libc10"
