"""Bytecode that a part takes from its predecessor: the same as compiled, and only for the same sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from agent.change.bytecode import compile_part, take_bytecode
from agent.files import record
from agent.layout import Layout
from agent.parts import part
from agent.schema.manifest import ReleaseManifest

SOURCES = {"a.py": "def f():\n    return 1\n", "in/b.c.py": "B = [lambda: 2]\n", "in/changed.py": "C = 1\n"}
TAG = f"{sys.implementation.cache_tag}.pyc"
OLD, NEW = "env-0000000000000001", "env-0000000000000002"


def fill(place: Path, sources: dict[str, str]) -> None:
    for number, (name, text) in enumerate(sources.items()):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
        os.utime(place / name, (number, number))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A prefix whose release has the environment OLD."""
    found = Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    with part(found, OLD) as place:
        fill(place, SOURCES)
        compile_part(found, OLD, place, sys.executable)
    (found.releases / "one").mkdir(parents=True)
    record(found.releases / "one/release.json", ReleaseManifest("one", parts={"env": OLD, "app": "app-1"}))
    found.current.symlink_to("releases/one")
    return found


def taken(layout: Layout, name: str = NEW) -> tuple[Path, dict[str, bytes]]:
    """A part with one changed source and one more, and the bytecode that it takes."""
    place = layout.parts / f".{name}"
    place.mkdir()
    fill(place, {"more.py": "", **SOURCES, "in/changed.py": "C = 2\n"})
    take_bytecode(layout, name, place)
    return place, {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*.pyc")}


@pytest.mark.process
def test_unchanged_sources_are_not_compiled_again(layout: Layout) -> None:
    place, found = taken(layout)
    assert {*found} == {f"__pycache__/a.{TAG}", f"in/__pycache__/b.c.{TAG}"}
    compile_part(layout, NEW, place, sys.executable)
    assert (place / f"in/__pycache__/changed.{TAG}").exists()
    for name, content in found.items():
        assert (place / name).read_bytes() == content
        (place / name).unlink()
    compile_part(layout, NEW, place, sys.executable)
    assert {name: (place / name).read_bytes() for name in found} == found


def test_a_file_that_the_package_brings_is_kept(layout: Layout) -> None:
    """It may be hard-linked to uv's cache."""
    other = layout.parts / "cached.pyc"
    other.write_bytes(b"uv's")
    place = layout.parts / f".{NEW}"
    (place / "__pycache__").mkdir(parents=True)
    fill(place, SOURCES)
    (place / f"__pycache__/a.{TAG}").hardlink_to(other)
    take_bytecode(layout, NEW, place)
    assert other.read_bytes() == b"uv's"
    assert (place / f"in/__pycache__/b.c.{TAG}").exists()


@pytest.mark.parametrize("name", ["app-0000000000000002", "env-2", OLD])
def test_another_kind_of_part_gives_none(layout: Layout, name: str) -> None:
    assert not taken(layout, name)[1]


def test_a_damaged_part_gives_none(layout: Layout) -> None:
    (layout.parts / OLD / f"__pycache__/a.{TAG}").chmod(0o644)
    assert not taken(layout)[1]


def test_bytecode_of_another_source_is_not_taken(layout: Layout) -> None:
    """A package may bring bytecode; compileall leaves it if it fits, and makes it anew if not."""
    with part(layout, "env-0000000000000003") as place:
        fill(place, SOURCES)
        compile_part(layout, "env-0000000000000003", place, sys.executable)
        os.utime(place / "a.py", (7, 7))
    record(layout.releases / "one/release.json", ReleaseManifest("one", parts={"env": "env-0000000000000003"}))
    assert {*taken(layout)[1]} == {f"in/__pycache__/b.c.{TAG}"}


def test_a_first_release_takes_none(tmp_path: Path) -> None:
    layout = Layout({"prefix": str(tmp_path), "service": "s", "scope": "user", "user": "", "address": "", "port": 1})
    layout.parts.mkdir()
    assert not taken(layout)[1]
