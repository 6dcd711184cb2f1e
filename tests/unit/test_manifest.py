"""Untrusted manifests of wheels and TOML files, of any type, size and nesting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core import files, manifest
from core.config import load
from core.wheelhouse import Wheelhouse
from tests.errors import raises
from tests.plans import wheel


def put(path: Path, what: str | None) -> None:
    """Create a file with this text, or something else: a folder, a pipe, a dangling link."""
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a link to nothing":
            path.symlink_to(path.with_name("nothing"))
        case None:
            pass
        case _:
            path.write_text(what)


@pytest.mark.parametrize(
    "what",
    [
        *("a folder", "a pipe", "a link to nothing", "", "[" * 10**5, " " * 9_000_000),
        '{"inputs":{"a":' + "[" * 5000 + "]" * 5000 + "}}",
    ],
    ids=lambda what: what[:20].strip() or str(len(what)),
)
def test_unreadable_manifest_is_skipped(tmp_path: Path, what: str) -> None:
    good = wheel("good", size=4)
    (tmp_path / good.file).write_text("good")
    (tmp_path / f"{good.file}.json").write_text(manifest.encode(good))
    put(tmp_path / "bad.whl.json", what)
    (tmp_path / "bad.whl").write_text("bad")
    assert manifest.read(tmp_path / "bad.whl.json") is None
    assert Wheelhouse(tmp_path).wheels() == [good]


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a link to nothing", None])
def test_missing_or_special_wheel_is_skipped(tmp_path: Path, what: str | None) -> None:
    listed = wheel("odd")
    put(tmp_path / listed.file, what)
    size = (tmp_path / listed.file).stat().st_size if what in ("a folder", "a pipe") else 1
    listed = msgspec.structs.replace(listed, size=size)
    (tmp_path / f"{listed.file}.json").write_text(manifest.encode(listed))
    assert Wheelhouse(tmp_path).wheels() == []
    with raises("hash-mismatch", match="differs from the inspected wheel"):
        Wheelhouse(tmp_path).path(listed)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (None, "does not exist"),
        ("a link to nothing", "does not exist"),
        ("a folder", "not a regular file"),
        ("a pipe", "not a regular file"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("x = " + "{a=" * 5000, "is not TOML"),
        ("x = " + "1" * 5000, "is not TOML"),
        (".".join("x" * 100_000) + " = 1", "more than 200 dots"),
        ("[" + ".".join("x" * 100_000) + "]", "more than 200 dots"),
        ("#" * 9_000_000, "is larger than"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_invalid_toml_is_a_config_error(tmp_path: Path, what: str | None, says: str) -> None:
    put(tmp_path / "x.toml", what)
    with raises("config", match=says):
        load(tmp_path / "x.toml", dict[str, Any])


def test_unreadable_toml_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"x = '\\xff'".replace(b"\\xff", b"\xff"))
    with raises("config", match="is not TOML"):
        load(tmp_path / "x.toml", dict[str, Any])
    with raises("config", match="cannot be read"):
        load(tmp_path / "x.toml/y.toml", dict[str, Any])
    assert max(path.stat().st_size for path in (files.CHECKOUT / "recipes").rglob("*.toml")) < 100_000


def test_an_older_manifest_never_describes_a_new_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed between the two renames leaves a wheel without a manifest."""
    house, old = Wheelhouse(tmp_path / "house"), wheel("same", size=3)
    (tmp_path / "built").write_text("old")
    house.admit(tmp_path / "built", old)
    assert house.wheels() == [old]
    (tmp_path / "built").write_text("new")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        house.admit(tmp_path / "built", msgspec.structs.replace(old, sha256="c" * 64))
    assert house.wheels() == []
    assert [path.read_text() for path in (tmp_path / "house").rglob("*.whl")] == ["new"]


def test_a_wheel_replaces_one_of_its_build_with_another_platform_tag(tmp_path: Path) -> None:
    """Installers would choose between both: they prefer the newest manylinux, not the newest build."""
    house, stem = Wheelhouse(tmp_path / "house"), "same-1+sm89"
    (tmp_path / "built").write_text("any")
    names = ("cp312-cp312-linux_x86_64", "cp312-cp312-manylinux_2_34_x86_64", "cp312-cp312-manylinux_2_24_x86_64")
    others = ("cp311-cp311-manylinux_2_34_x86_64", "cp312-cp312-manylinux_2_34_aarch64")
    for name in (*others, *names):
        platform = f"linux_{name.partition('_')[2].removeprefix('2_34_').removeprefix('2_24_')}"
        listed = wheel("same", size=3, file=f"{stem}-{name}.whl", key=name.encode().hex().rjust(64, "0")[-64:])
        listed = msgspec.structs.replace(listed, platform=platform, sha256=files.sha256(tmp_path / "built"))
        house.admit(tmp_path / "built", listed)
    kept = {f"{stem}-{name}.whl" for name in (*others, names[-1])}
    assert {each.file for each in house.wheels()} == {path.name for path in house.folder.rglob("*.whl")} == kept
    pattern, key = f"{stem}-cp312-cp312-*linux*_x86_64.whl", names[-1].encode().hex()[-64:]
    assert house.find(listed.index, pattern, key) is not None
    assert house.find(listed.index, pattern, "0" * 64) is None
    assert house.find(listed.index, pattern.replace("x86_64", "aarch64"), key) is None
