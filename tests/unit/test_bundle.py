"""Bundles: what is in one, whether it is whole, and that nothing else is used once it is open."""

from __future__ import annotations

import platform
import socket
import tarfile
from pathlib import Path

import msgspec
import pytest

from core import files
from core.errors import BundleError, RefusedError
from core.stack import Platform
from deploy import bundle, environment, exporter, flow
from deploy.bundle import Bundle
from deploy.plan import Options

APP = """\
name = "comfyui"
version = "1.2.3"
tree = ""
extra = []
size = { cu130 = 1, cu124 = 1 }
files = { cu130 = 1, cu124 = 1 }
[[source]]
folder = "src"
"""
SIX = """\
six==1.17.0 \\
    --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274
    # via -r hearth.txt
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A real bundle of a small application: one package of the index, the real uv, no nodes."""
    place = tmp_path_factory.mktemp("bundle")
    (place / "app/src/comfy").mkdir(parents=True)
    (place / "app/locks").mkdir()
    (place / "app/app.toml").write_text(APP)
    (place / "app/src/comfy/cli_args.py").write_text("parser.add_argument('--cpu', action='store_true')\n")
    (place / "app/src/folder_paths.py").write_text("folder_names_and_paths = {}\n")
    for cpu in ("x86_64", "aarch64"):
        (place / f"app/locks/cu130-linux_{cpu}-cp311.txt").write_text(SIX)
    (place / "hosts.toml").write_text(
        '[hosts.far]\naddress = "nowhere.invalid"\nprofile = "cpu"\nmetrics_port = 9188\n'
        f'[hosts.local]\nprofile = "cpu"\nscope = "user"\nprefix = "{place}/prefix"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEARTH_APP", str(place / "app"))
        patch.setenv("HEARTH_HOSTS", str(place / "hosts.toml"))
        (place / ".far.tar.999999999").write_text("left by a run that was killed")
        output, found = flow.make_bundle("far", place / "far.tar", "linux_x86_64", "3.11", ask_sudo=False)
        again, _ = flow.make_bundle("far", place / "again.tar", "linux_x86_64", "3.11", ask_sudo=False)
        flow.make_bundle("far", place / "arm.tar", "linux_aarch64", "3.11", ask_sudo=False)
    assert output.read_bytes() == again.read_bytes()
    assert not list(place.glob(".far.tar*"))
    return output, found


def test_a_bundle_names_every_file_and_is_found_whole(made: tuple[Path, Bundle]) -> None:
    path, written = made
    assert bundle.verify(path) == written
    names = set(written.files)
    assert {"agent.pyz", "checkout/uv.lock", "checkout/recipes/comfyui/src/comfy/cli_args.py"} <= names
    assert [name for name in names if name.endswith("six-1.17.0-py2.py3-none-any.whl")]
    assert [name for name in names if name.endswith("prometheus_client/exposition.py")]
    assert [name for name in names if name.endswith("bin/uv") and written.files[name].executable]
    assert (written.version, written.platform, written.python, written.asking) == ("1.2.3", "linux_x86_64", "3.11", ())


def test_what_is_deployed_from_a_bundle_comes_from_it_alone(
    made: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, _ = made
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HEARTH_HOSTS", str(path.with_name("hosts.toml")))

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with bundle.opened(path) as opened:
        assert opened.version == "1.2.3"
        target = flow.find_target("far")
        stock = flow.shelf(target)
        assert list(stock.locks) == [("linux_x86_64", "3.11")]
        assert stock.application.version == "1.2.3"
        assert files.cache().is_relative_to(tmp_path / "empty/bundles")
        lock = stock.locks["linux_x86_64", "3.11"]
        (wheel,) = environment.download(lock, stock.nodes, Platform.parse("linux_x86_64")).glob("*.whl")
        assert wheel.name.startswith("six")
        tree = exporter.tree(Platform.parse("linux_x86_64"))
        assert (tree / "prometheus_client/exposition.py").exists()
        assert tree.name == stock.exporter.digest
    assert not list((tmp_path / "empty/bundles").iterdir())


def test_a_bundle_for_another_platform_is_refused(made: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_HOSTS", str(made[0].with_name("hosts.toml")))
    other = "arm.tar" if platform.machine() == "x86_64" else "far.tar"
    with (
        bundle.opened(made[0].with_name(other)) as opened,
        pytest.raises(BundleError, match=f"and local is linux_{platform.machine()}"),
    ):
        flow.deploy("local", Options(), bundle=opened)


def test_a_bundle_needs_a_list_for_its_platform_and_python(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no list of packages for linux_riscv64, Python 3\.11"):
        flow.make_bundle("local", tmp_path / "x.tar", "linux_riscv64", "3.11", ask_sudo=False)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_bundle_that_was_cut_short_is_refused(made: tuple[Path, Bundle], tmp_path: Path, share: float) -> None:
    path, _ = made
    content = path.read_bytes()
    short = tmp_path / "short.tar"
    short.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BundleError, match="is no whole bundle"):
        bundle.verify(short)


def test_a_bundle_that_was_altered_is_refused_and_nothing_of_it_stays(
    made: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = made
    content = path.read_bytes()
    place = content.index(b"add_argument('--cpu'")
    altered = tmp_path / "altered.tar"
    altered.write_bytes(content[:place] + b"X" + content[place + 1 :])
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "empty"))
    with pytest.raises(BundleError, match=r"was altered: checkout/recipes/comfyui/src/comfy/cli_args\.py"):
        bundle.verify(altered)
    with pytest.raises(BundleError, match="was altered"), bundle.opened(altered):
        pass
    assert not list((tmp_path / "empty/bundles").iterdir())


def test_what_is_no_bundle_or_another_hearths_is_refused(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    path, written = made
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.verify(tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(BundleError, match="no whole bundle"):
        bundle.verify(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "climbs.tar", "w") as tar:
        tar.add(path, "../climbs")
    with pytest.raises(BundleError, match=r"holds '\.\./climbs'"):
        bundle.verify(tmp_path / "climbs.tar")
    later = msgspec.structs.replace(written, format=2, files={})
    (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(later))
    with tarfile.open(tmp_path / "later.tar", "w") as tar:
        tar.add(tmp_path / "bundle.json", "bundle.json")
    with pytest.raises(BundleError, match="has format 2"):
        bundle.verify(tmp_path / "later.tar")
