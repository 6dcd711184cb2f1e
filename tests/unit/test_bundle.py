"""Bundles: what is in one, whether it is whole, and that nothing else is used once it is open."""

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core import files, signature
from core.errors import BundleError, RefusedError, SignatureError
from core.signature import Signed
from core.stack import Platform
from deploy import bundle, environment, exporter, flow
from deploy.bundle import Bundle, File, Opened
from deploy.plan import Options
from tests.unit.test_plan import FRESH

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
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Opened]:
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


def test_a_bundle_names_every_file_and_is_found_whole(made: tuple[Path, Opened]) -> None:
    path, opened = made
    assert bundle.verify(path) == opened
    assert opened.origin == "not signed"
    written = opened.bundle
    names = set(written.files)
    assert {"agent.pyz", "checkout/uv.lock", "checkout/recipes/comfyui/src/comfy/cli_args.py"} <= names
    assert [name for name in names if name.endswith("six-1.17.0-py2.py3-none-any.whl")]
    assert [name for name in names if name.endswith("prometheus_client/exposition.py")]
    assert [name for name in names if name.endswith("bin/uv") and written.files[name].executable]
    assert (written.version, written.platform, written.python, written.asking) == ("1.2.3", "linux_x86_64", "3.11", ())


def test_what_is_deployed_from_a_bundle_comes_from_it_alone(
    made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, _ = made
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HEARTH_HOSTS", str(path.with_name("hosts.toml")))

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with bundle.opened(path) as opened:
        assert opened.bundle.version == "1.2.3"
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


def test_a_bundle_for_another_platform_is_refused(made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_bundle_that_was_cut_short_is_refused(made: tuple[Path, Opened], tmp_path: Path, share: float) -> None:
    path, _ = made
    content = path.read_bytes()
    short = tmp_path / "short.tar"
    short.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BundleError, match="is no whole bundle"):
        bundle.verify(short)


def test_a_bundle_that_was_altered_is_refused_and_nothing_of_it_stays(
    made: tuple[Path, Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_what_is_no_bundle_or_another_hearths_is_refused(made: tuple[Path, Opened], tmp_path: Path) -> None:
    path, opened = made
    with pytest.raises(BundleError, match="cannot be read"):
        bundle.verify(tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(BundleError, match="no whole bundle"):
        bundle.verify(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "older.tar", "w") as tar:
        tar.add(path, "agent.pyz")
    with pytest.raises(BundleError) as raised:
        bundle.verify(tmp_path / "older.tar")
    assert raised.value.cause == "it begins with 'agent.pyz', not with bundle.json"
    later = msgspec.structs.replace(opened.bundle, format=99, files={})
    with pytest.raises(BundleError, match="has format 99"):
        bundle.verify(built(tmp_path, later))


def built(place: Path, manifest: Bundle, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A bundle with any manifest and any members after it."""
    text = msgspec.json.encode(manifest)
    head = tarfile.TarInfo("bundle.json")
    head.size = len(text)
    path = place / f"{len(list(place.iterdir()))}.tar"
    with tarfile.open(path, "w") as tar:
        for info, content in ((head, text), *members):
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def test_members_that_are_not_what_the_manifest_names_are_refused(made: tuple[Path, Opened], tmp_path: Path) -> None:
    def named(name: str, size: int = 3) -> Bundle:
        digest = hashlib.sha256(b"abc").hexdigest()
        return msgspec.structs.replace(made[1].bundle, files={name: File(digest, size)})

    assert bundle.verify(built(tmp_path, named("a"), member("a", b"abc"))).bundle.files
    wrong = [
        member("b", b"abc"),
        member("a", b"abd"),
        member("a", b"abcd"),
        member("a", b"abc", mode=0o755),
        member("a", b"", tarfile.SYMTYPE, linkname="/etc/shadow"),
        member("a", b"", tarfile.LNKTYPE, linkname="bundle.json"),
        member("a", b"", tarfile.FIFOTYPE),
        member("a", b"", tarfile.CHRTYPE),
        member("a", b"", tarfile.DIRTYPE),
        member("a", b"3\n0\n3\n", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "3"}),
    ]
    for each in wrong:
        with pytest.raises(BundleError, match="was altered"):
            bundle.verify(built(tmp_path, named("a"), each))
    with pytest.raises(BundleError, match=r"altered: a"):
        bundle.verify(built(tmp_path, named("a"), member("a", b"abc"), member("a", b"abc")))
    with pytest.raises(BundleError, match="no whole bundle"):
        bundle.verify(built(tmp_path, named("a")))
    for name in ("../a", "/a", "a/../b", "a//b", "./a", "a\nb", "a\x1b[2J", ""):
        with pytest.raises(BundleError, match="names a file"):
            bundle.verify(built(tmp_path, named(name), member(name, b"abc")))
    (place := tmp_path / "sparse").mkdir()
    with (place / "a").open("wb") as file:
        file.truncate(10**9)
    subprocess.run(["tar", "-cSf", place / "sparse.tar", "--format=gnu", "-C", place, "a"], check=True)
    with tarfile.open(place / "sparse.tar") as tar:
        sparse = tar.getmembers()[0]
    assert sparse.issparse()
    text = built(tmp_path, named("a", 10**9)).read_bytes()[: -2 * 512]
    (tmp_path / "joined.tar").write_bytes(text.rstrip(b"\0") + bytes(-len(text.rstrip(b"\0")) % 512))
    with (tmp_path / "joined.tar").open("ab") as file:
        file.write((place / "sparse.tar").read_bytes())
    with pytest.raises(BundleError, match="was altered: a"):
        bundle.verify(tmp_path / "joined.tar")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SSH keys: anna's and eve's."""
    place = tmp_path_factory.mktemp("keys")
    for name in ("anna", "eve"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", place / name]
        subprocess.run(words, check=True)
    return place


def allowed(keys: Path, name: str, options: str = "") -> str:
    kind, key, _ = (keys / f"{name}.pub").read_text().split()
    return f"{name}@example.org {options} {kind} {key}\n"


@pytest.fixture(scope="module")
def signed(made: tuple[Path, Opened], keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle, signed by anna."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEARTH_APP", str(made[0].with_name("app")))
        patch.setenv("HEARTH_HOSTS", str(made[0].with_name("hosts.toml")))
        place = tmp_path_factory.mktemp("signed") / "far.tar"
        _, opened = flow.make_bundle("far", place, "linux_x86_64", "3.11", keys / "anna", ask_sudo=False)
    assert opened.id == made[1].id
    assert opened.origin.startswith("signed with ED25519 key SHA256:")
    return place


def test_a_bundle_is_signed_by_somebody_or_refused(
    made: tuple[Path, Opened], signed: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "allowed_signers"
    monkeypatch.setenv("HEARTH_ALLOWED_SIGNERS", str(listed))
    assert bundle.verify(signed).origin.startswith("signed with ED25519 key SHA256:")
    assert bundle.verify(made[0]).origin == "not signed"
    listed.write_text("# ours\n" + allowed(keys, "eve") + allowed(keys, "anna", 'valid-before="29990101"'))
    assert bundle.verify(signed).origin == "signed by anna@example.org"
    with bundle.opened(signed) as opened:
        assert opened.origin == "signed by anna@example.org"
    with pytest.raises(SignatureError, match="it is not signed"):
        bundle.verify(made[0])
    for lines in (
        "",
        allowed(keys, "eve"),
        allowed(keys, "anna", 'valid-before="20200101"'),
        allowed(keys, "anna", 'valid-after="29990101"'),
        allowed(keys, "anna", 'namespaces="git"'),
        "nonsense\n",
    ):
        listed.write_text(lines)
        with pytest.raises(SignatureError, match="signed it: its key is ED25519 key SHA256:"):
            bundle.verify(signed)


def test_a_signature_of_something_else_is_refused_before_anything_is_read(
    made: tuple[Path, Opened], signed: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTH_ALLOWED_SIGNERS", str(tmp_path / "none"))
    content = signed.read_bytes()
    place = content.index(b'"version":"1.2.3"')
    altered = tmp_path / "altered.tar"
    altered.write_bytes(content[:place] + content[place:].replace(b"1.2.3", b"1.2.4", 1))
    with pytest.raises(SignatureError, match="is not one of this content"):
        bundle.verify(altered)
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SignatureError), bundle.opened(altered):
        pass
    assert not list((tmp_path / "cache/bundles").iterdir())
    other = signature.sign("another text", keys / "anna").signature
    with pytest.raises(SignatureError, match="is not one of this content"):
        Signed(made[1].id, other).key()
    for text in ("", "nonsense", other[:200], "-----BEGIN SSH SIGNATURE-----\n" * 2):
        with pytest.raises(SignatureError):
            Signed(made[1].id, text).signer(allowed(keys, "anna"), "the list")


def test_a_key_that_cannot_sign_says_why(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "none"))
    alone = tmp_path / "alone.pub"
    shutil.copy(keys / "eve.pub", alone)
    for key in (tmp_path / "none", alone, Path("/dev/null")):
        with pytest.raises(SignatureError, match=rf"ssh-keygen cannot sign with {key}"):
            signature.sign("text", key)


def test_a_host_that_lists_signers_takes_no_other_bundle(made: tuple[Path, Opened], signed: Path, keys: Path) -> None:
    facts = msgspec.structs.replace(FRESH, machine="x86_64", signers=allowed(keys, "anna"))
    with bundle.opened(signed) as opened:
        flow._accept(opened, "far", facts, [])
        with pytest.raises(SignatureError, match="nobody of /etc/hearth/allowed_signers on far signed it"):
            flow._accept(opened, "far", msgspec.structs.replace(FRESH, machine="x86_64", signers=""), [])
    with bundle.opened(made[0]) as opened, pytest.raises(SignatureError, match="it is not signed"):
        flow._accept(opened, "far", facts, [])
