"""The uploads of a deploy, and the address that it reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from agent.schema.change import App, Env, WheelFile
from core import files
from core.manifest import Manifest
from deploy.inputs import Inputs
from deploy.look import web_address
from deploy.profile import Setting
from deploy.upload import Upload
from lock import requirements
from tests.errors import raises
from tests.plans import FRESH, inputs, spark, wheel

TLS = {name: Setting(why="w", value="/x") for name in ("--tls-keyfile", "--tls-certfile")}


@pytest.mark.parametrize(
    ("values", "flags", "expected"),
    [
        ({}, {}, "http://127.0.0.1:8188"),
        ({"listen": "0.0.0.0"}, {}, "http://spark:8188"),
        ({"listen": "0.0.0.0,::"}, {}, "http://spark:8188"),
        ({"listen": "127.0.0.1,0.0.0.0"}, {}, "http://spark:8188"),
        ({"listen": "::", "port": 80}, {}, "http://spark:80"),
        ({"listen": "::1"}, {}, "http://[::1]:8188"),
        ({"listen": "127.0.0.1,192.168.1.5"}, {}, "http://192.168.1.5:8188"),
        ({"listen": "::1,2001:db8::5"}, {}, "http://[2001:db8::5]:8188"),
        ({"listen": "0.0.0.0", "address": ""}, {}, "http://127.0.0.1:8188"),
        ({"listen": "::", "address": ""}, {}, "http://[::1]:8188"),
        ({"listen": "0.0.0.0", "address": "anna@2001:db8::5"}, {}, "http://[2001:db8::5]:8188"),
        ({}, TLS, "https://127.0.0.1:8188"),
        ({}, {"--tls-keyfile": TLS["--tls-keyfile"]}, "http://127.0.0.1:8188"),
    ],
)
def test_the_address_is_one_that_a_browser_can_open(
    values: dict[str, Any], flags: dict[str, Setting], expected: str
) -> None:
    target = spark()
    host = msgspec.structs.replace(target.host, **values)
    profile = msgspec.structs.replace(target.profile, flags=flags)
    assert web_address(replace(target, host=host, profile=profile)) == expected


def packed(step: Env, stock: Inputs, scratch: Path, *, offline: bool = False) -> tuple[Env, dict[str, Path]]:
    upload = Upload(cast("Any", None), FRESH, stock, scratch, offline)
    found = upload.pack_step(step)
    assert isinstance(found, Env)
    return found, upload.blobs


def kernel(house: Path, content: bytes) -> Manifest:
    (house / "sageattention.whl").write_bytes(content)
    digest = files.sha256(house / "sageattention.whl")
    return wheel("sageattention", sha256=digest, size=len(content), profile="inference")


def env(**values: Any) -> Env:
    step = Env("t", "w", "u", "env-1", "python3", False, "", ("sageattention.whl",), "3.12", ())
    return replace(step, **values)


@pytest.mark.parametrize("damage", [b"wrong", b"short", None])
def test_a_damaged_wheel_is_named_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setenv("HEARTH_WHEELHOUSE", str(tmp_path))
    found = kernel(tmp_path, b"right")
    step, blobs = packed(env(), inputs(found), tmp_path)
    assert step.wheels == (WheelFile("sageattention.whl", found.sha256),)
    assert blobs == {found.sha256: tmp_path / "sageattention.whl"}
    if damage:
        (tmp_path / "sageattention.whl").write_bytes(damage)
    else:
        (tmp_path / "sageattention.whl").unlink()
    with raises("hash-mismatch", match=r"sageattention\.whl differs from the inspected wheel") as raised:
        packed(env(), inputs(found), tmp_path)
    assert "inv build-kernels --force --kernel sageattention --arch 12.1 --stack cu130" in raised.value.hint
    assert raised.value.hint.endswith("--profile inference")


def test_a_damaged_package_of_the_cache_is_named_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "six-1-py3-none-any.whl"
    package.write_bytes(b"right")
    text = f"six==1 \\\n    --hash=sha256:{files.sha256(package)}\n    # via -r comfyui.txt\n"
    lock = requirements.LockedList("cu130", "linux_aarch64", "3.12", text)
    stock = replace(inputs(), locks={("linux_aarch64", "3.12"): lock})
    monkeypatch.setattr(requirements, "download", lambda *_: tmp_path)
    address = env(
        kernels=[], requirements="six @ https://example.org/six-1-py3-none-any.whl \\\n    --hash=sha256:00\n"
    )
    step, _ = packed(address, stock, tmp_path, offline=True)
    assert step.requirements == "six==1 \\\n    --hash=sha256:00\n"  # among the wheels that are sent
    assert [each.file for each in step.wheels] == [package.name]
    package.write_bytes(b"wrong")
    with raises("hash-mismatch", match=r"six-1-py3-none-any\.whl is damaged"):
        packed(env(kernels=[]), stock, tmp_path, offline=True)


def test_a_tree_with_a_link_out_of_it_is_neither_packed_nor_bundled(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "id_ed25519").write_text("PRIVATE KEY")
    (tree / "web.js").symlink_to(tmp_path / "id_ed25519")
    with raises("unsafe-tree", match=r"web\.js is a link to"):
        Upload(cast("Any", None), FRESH, inputs(), tmp_path).pack_tree(
            App("t", "w", "u", "app-1", "python3"), "app", tree
        )
    assert not list(tmp_path.glob("*.tar.gz"))
