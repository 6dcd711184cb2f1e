"""Bundles: their contents and integrity; an open bundle is the only source of files."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import socket
import subprocess
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from agent.schema.facts import Questions
from core import files, shell, signature, workspace
from core.signature import Signed
from core.stack import Platform
from deploy import bundle, deploy
from deploy.bundle import Bundle, File, Opened
from deploy.inputs import gather
from deploy.look import find_target, questions
from deploy.plan import Options
from lock import requirements
from tests.errors import killed, raises
from tests.plans import FRESH

if TYPE_CHECKING:
    from deploy.facts import Facts
    from deploy.host import Target

APP = """\
name = "comfyui"
version = "1.2.3"
tree = ""
extra = []
size = 1
files = 1
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
    (place / "app/src/requirements.txt").write_text("six\n")
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
        output, found = deploy.make_bundle("far", place / "far.tar", "linux_x86_64", "3.11", ask_sudo=False)
        again, _ = deploy.make_bundle("far", place / "again.tar", "linux_x86_64", "3.11", ask_sudo=False)
        deploy.make_bundle("far", place / "arm.tar", "linux_aarch64", "3.11", ask_sudo=False)
    assert output.read_bytes() == again.read_bytes()
    assert not list(place.glob(".far.tar*"))
    return output, found


def test_bundle_lists_every_file_and_verifies(made: tuple[Path, Opened]) -> None:
    path, opened = made
    assert bundle.verify(path) == opened
    assert opened.origin == "not signed"
    written = opened.bundle
    names = set(written.files)
    assert {"agent.pyz", "checkout/uv.lock", "checkout/recipes/comfyui/src/comfy/cli_args.py"} <= names
    assert [name for name in names if name.endswith("six-1.17.0-py2.py3-none-any.whl")]
    assert [name for name in names if name.endswith("bin/uv") and written.files[name].executable]
    assert (written.version, written.platform, written.python, written.requesters) == (
        "1.2.3",
        "linux_x86_64",
        "3.11",
        (),
    )


def test_deploy_from_bundle_uses_no_other_source(
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
        target = find_target("far")
        inputs = gather(target)
        assert list(inputs.locks) == [("linux_x86_64", "3.11")]
        assert inputs.application.version == "1.2.3"
        assert workspace.current().cache.is_relative_to(tmp_path / "empty/bundles")
        lock = inputs.locks["linux_x86_64", "3.11"]
        (wheel,) = requirements.download(lock, inputs.nodes, Platform.parse("linux_x86_64")).glob("*.whl")
        assert wheel.name.startswith("six")
    assert not list((tmp_path / "empty/bundles").iterdir())


def test_a_bundle_has_the_proofs_of_its_host(
    made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files are gone when it is deployed."""
    monkeypatch.setenv("HEARTH_APP", str(made[0].with_name("app")))
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    files_there = tmp_path / "mine"
    files_there.mkdir()
    workflow, picture = files_there / "a b.json", files_there / "like.png"
    workflow.write_text('{"1": {"class_type": "SaveImage", "inputs": {}}}')
    picture.write_bytes(b"\x89PNG\r\n\x1a\n...")
    table = '[hosts.far]\naddress = "nowhere.invalid"\nprofile = "cpu"\nmetrics_port = 9188\n[[hosts.far.prove]]\n'
    table += f'file = "{workflow}"\nlike = "{os.path.relpath(picture, files.CHECKOUT)}"\n'
    (tmp_path / "hosts.toml").write_text(table)
    wanted = gather(find_target("far")).proofs
    path, found = deploy.make_bundle("far", tmp_path / "far.tar", "linux_x86_64", "3.11", ask_sudo=False)
    assert found.bundle.proofs == (str(workflow),)
    assert str(workflow) in "\n".join(bundle.rows(path, found))
    shutil.rmtree(files_there)
    with bundle.opened(path) as opened:
        assert gather(find_target("far")).proofs == wanted
        assert wanted[0].like
        capsys.readouterr()
        deploy._tell_idle_proofs(opened, "far", wanted)
        assert capsys.readouterr().err == ""
        deploy._tell_idle_proofs(opened, "far", ())
        assert str(workflow) in capsys.readouterr().err
        (tmp_path / "hosts.toml").write_text(table.replace("a b.json", "other.json"))
        with raises("config", match=r"other.json, neither in the bundle nor here") as caught:
            gather(find_target("far"))
    assert "inv bundle" in caught.value.hint
    with raises("config", match="a b.json|other.json"):
        deploy.make_bundle("far", tmp_path / "again.tar", "linux_x86_64", "3.11", ask_sudo=False)


@pytest.mark.installer
def test_a_bundle_has_the_version_that_its_host_selects(
    made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    app, newer = made[0].with_name("app"), tmp_path / "app/versions/1.3"
    shutil.copytree(app, tmp_path / "app")
    shutil.copytree(app, newer)
    (newer / "app.toml").write_text(APP.replace("1.2.3", "1.3"))
    (newer / "src/comfy/cli_args.py").write_text("parser.add_argument('--newer', action='store_true')\n")
    for path in (newer / "locks").iterdir():
        path.write_text(SIX.replace("hearth.txt", "comfyui.txt"))
    (tmp_path / "app/channels.toml").write_text('latest = "1.3"\n')
    hosts = tmp_path / "hosts.toml"
    selects = '[hosts.far]\naddress = "nowhere.invalid"\nprofile = "cpu"\ncomfyui = "{}"\n'
    hosts.write_text(selects.format("latest"))
    monkeypatch.setenv("HEARTH_APP", str(tmp_path / "app"))
    monkeypatch.setenv("HEARTH_HOSTS", str(hosts))
    path, written = deploy.make_bundle("far", tmp_path / "far.tar", "linux_x86_64", "3.11", ask_sudo=False)
    assert written.bundle.version == "1.3"
    with bundle.opened(path):
        for which in ("latest", "pinned", "1.3"):
            hosts.write_text(selects.format(which))
            inputs = gather(find_target("far"))
            assert (inputs.application.version, list(inputs.flags)) == ("1.3", ["--newer"])
            assert "comfyui.txt" in inputs.locks["linux_x86_64", "3.11"].text
        hosts.write_text(selects.format("1.2.3"))
        with raises("config", match=r"1\.2\.3"):
            gather(find_target("far"))


def test_a_bundle_of_a_tree_that_the_list_does_not_cover_is_refused(
    made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(made[0].with_name("app"), tmp_path / "app")
    (tmp_path / "app/src/requirements.txt").write_text("six>=2\n")
    monkeypatch.setenv("HEARTH_APP", str(tmp_path / "app"))
    monkeypatch.setenv("HEARTH_HOSTS", str(made[0].with_name("hosts.toml")))
    with raises("refused", match="six>=2"):
        deploy.make_bundle("far", tmp_path / "far.tar", "linux_x86_64", "3.11", ask_sudo=False)


def test_a_bundle_for_another_platform_is_refused(made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEARTH_HOSTS", str(made[0].with_name("hosts.toml")))
    other = "arm.tar" if platform.machine() == "x86_64" else "far.tar"
    with (
        bundle.opened(made[0].with_name(other)) as opened,
        raises("bundle", match=f"and local is linux_{platform.machine()}"),
    ):
        deploy.deploy("local", Options(), bundle=opened)


def test_a_bundle_needs_a_list_for_its_platform_and_python(tmp_path: Path) -> None:
    with raises("refused", match=r"no list of packages for linux_riscv64, Python 3\.11"):
        deploy.make_bundle("local", tmp_path / "x.tar", "linux_riscv64", "3.11", ask_sudo=False)


def test_a_bundle_for_a_stack_that_comfyui_cannot_run_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts.toml").write_text('[hosts.far]\naddress = "far"\nprofile = "cpu"\noverride.stack = "cu132"\n')
    monkeypatch.setenv("HEARTH_HOSTS", str(tmp_path / "hosts.toml"))
    with raises("refused", match="only for builds"):
        deploy.make_bundle("far", tmp_path / "x.tar", "linux_x86_64", "3.11", ask_sudo=False)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated_bundle_is_refused(made: tuple[Path, Opened], tmp_path: Path, share: float) -> None:
    path, _ = made
    content = path.read_bytes()
    short = tmp_path / "short.tar"
    short.write_bytes(content[: int(len(content) * share)])
    with raises("bundle", match="is not a complete bundle"):
        bundle.verify(short)


def test_altered_bundle_is_refused_and_removed(
    made: tuple[Path, Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = made
    content = path.read_bytes()
    place = content.index(b"add_argument('--cpu'")
    altered = tmp_path / "altered.tar"
    altered.write_bytes(content[:place] + b"X" + content[place + 1 :])
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "empty"))
    with raises("bundle", match=r"was altered: checkout/recipes/comfyui/src/comfy/cli_args\.py"):
        bundle.verify(altered)
    with raises("bundle", match="was altered"), bundle.opened(altered):
        pass
    assert not list((tmp_path / "empty/bundles").iterdir())


def test_non_bundle_and_other_format_are_refused(made: tuple[Path, Opened], tmp_path: Path) -> None:
    _, opened = made
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.tar", "folder", "pipe"):
        with raises("bundle", match="cannot be read"):
            bundle.verify(tmp_path / name)
        with raises("bundle", match="cannot be unpacked"), bundle.opened(tmp_path / name):
            pass
    (tmp_path / "text.tar").write_text("no tar")
    with raises("bundle", match="not a complete bundle"):
        bundle.verify(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "older.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("agent.pyz"))
    with raises("bundle") as raised:
        bundle.verify(tmp_path / "older.tar")
    assert raised.value.cause == "it begins with 'agent.pyz', not with bundle.json"
    later = msgspec.structs.replace(opened.bundle, format=99, files={})
    with raises("bundle", match="has format 99"):
        bundle.verify(built(tmp_path, later))


def built(place: Path, manifest: Bundle, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A bundle with any manifest, followed by any members."""
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


def test_unexpected_members_are_refused(made: tuple[Path, Opened], tmp_path: Path) -> None:
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
        with raises("bundle", match="was altered"):
            bundle.verify(built(tmp_path, named("a"), each))
    with raises("bundle", match=r"altered: a"):
        bundle.verify(built(tmp_path, named("a"), member("a", b"abc"), member("a", b"abc")))
    with raises("bundle", match="not a complete bundle"):
        bundle.verify(built(tmp_path, named("a")))
    for name in ("../a", "/a", "a/../b", "a//b", "./a", "a\nb", "a\x1b[2J", ""):
        with raises("bundle", match="names a file"):
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
    with raises("bundle", match="was altered: a"):
        bundle.verify(tmp_path / "joined.tar")


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(text: bytes) -> bytes:
    return header(tarfile.XHDTYPE, len(text)) + text.ljust(512, b"\0")


LONG, NEXT = header(b"L", 2) + b"x".ljust(512, b"\0"), pax(b"10 path=a\n")
WRONG = {
    "nothing": b"",
    "a block of zeros": bytes(512),
    "half a header": b"x" * 300,
    "no header": b"x" * 512,
    "no end": header(b"0", 10**12, "bundle.json"),
    "a long signature": header(b"0", 10**8, "bundle.json.sig"),
    "a link": header(b"2", 0, "bundle.json"),
    "a folder": header(b"5", 0, "bundle.json"),
    "a chain of long names": LONG * 3000,
    "a chain of pax headers": NEXT * 3000,
    "a manifest in its depths": header(b"0", 10**6, "bundle.json") + (b'{"format":2,"x":' + b"[" * 10**6)[: 10**6],
    "a manifest of no sense": header(b"0", 6, "bundle.json") + b"\xff\xfe{}[]".ljust(512, b"\0"),
    **{f"{chr(kind)} of {size}": header(bytes([kind]), size) for kind in b"0LKxgS" for size in (-1, -513, 6 * 10**8)},
    **{
        f"pax {each!r}": pax(each)
        for each in (
            b"22 GNU.sparse.map=a,b\n",
            b"11 size=zz\n",
            b"11 size=-5\n",
            b"99999999999999999999 path=x\n",
            b"0 path=x\n",
            b"10 path=\xff\n",
            b"nonsense",
        )
    },
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_archives_are_refused_with_bounded_memory(
    made: tuple[Path, Opened], tmp_path: Path, what: str, *, first: bool
) -> None:
    whole = built(tmp_path, msgspec.structs.replace(made[1].bundle, files={"a": File("0" * 64, 3)})).read_bytes()
    path = tmp_path / "wrong.tar"
    path.write_bytes(
        WRONG[what] if first else whole.rstrip(b"\0").ljust(-len(whole.rstrip(b"\0")) // 512 * -512, b"\0")
    )
    with path.open("ab") as file:
        if not first:
            file.write(WRONG[what])
        file.truncate(path.stat().st_size + 7 * 10**8)
    tracemalloc.start()
    with raises("bundle", match=r"bundle|altered|manifest"):
        bundle.verify(path)
    assert tracemalloc.get_traced_memory()[1] < 3e7
    tracemalloc.stop()


def test_names_of_any_length_are_read_and_others_refused(made: tuple[Path, Opened], tmp_path: Path) -> None:
    def named(name: str, file: str = "a") -> Path:
        each = File(hashlib.sha256(b"abc").hexdigest(), 3)
        return built(tmp_path, msgspec.structs.replace(made[1].bundle, files={name: each}), member(file, b"abc"))

    for name in ("n" * 200 + "/" + "m" * 200, "\u00e4" * 80):
        assert bundle.verify(named(name, name)).bundle.files
    with raises("bundle", match="names a file"):
        bundle.verify(named("a/" * 1000 + "a"))
    with raises("bundle", match="another version of Hearth"), bundle.opened(named("a")):  # the bundle has no agent
        pass
    with raises("bundle", match="cannot be unpacked"), bundle.opened(named("n" * 300, "n" * 300)):
        pass


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
        _, opened = deploy.make_bundle("far", place, "linux_x86_64", "3.11", keys / "anna", ask_sudo=False)
    assert opened.id == made[1].id
    assert opened.origin.startswith("signed with ED25519 key SHA256:")
    return place


def test_unsigned_bundle_is_refused_if_signers_are_listed(
    made: tuple[Path, Opened], signed: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "allowed_signers"
    assert bundle.verify(signed).origin.startswith("signed with ED25519 key SHA256:")
    assert bundle.verify(made[0]).origin == "not signed"
    monkeypatch.setenv("HEARTH_ALLOWED_SIGNERS", str(listed))
    listed.write_text("# ours\n" + allowed(keys, "eve") + allowed(keys, "anna", 'valid-before="29990101"'))
    assert bundle.verify(signed).origin == "signed by anna@example.org"
    with bundle.opened(signed) as opened:
        assert opened.origin == "signed by anna@example.org"
    with raises("signature", match="it is not signed"):
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
        with raises("signature", match="signed it; its key is ED25519 key SHA256:"):
            bundle.verify(signed)


def test_foreign_signature_is_refused_before_reading(
    made: tuple[Path, Opened], signed: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = signed.read_bytes()
    place = content.index(b'"version":"1.2.3"')
    altered = tmp_path / "altered.tar"
    altered.write_bytes(content[:place] + content[place:].replace(b"1.2.3", b"1.2.4", 1))
    with raises("signature", match="does not match the content"):
        bundle.verify(altered)
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    with raises("signature"), bundle.opened(altered):
        pass
    assert not list((tmp_path / "cache/bundles").iterdir())
    other = signature.sign("another text", keys / "anna").signature
    with raises("signature", match="does not match the content"):
        Signed(made[1].id, other).key()
    for text in ("", "nonsense", other[:200], "-----BEGIN SSH SIGNATURE-----\n" * 2):
        with raises("signature"):
            Signed(made[1].id, text).signer(allowed(keys, "anna"), "the list")


def test_a_key_that_cannot_sign_says_why(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "none"))
    alone = tmp_path / "alone.pub"
    shutil.copy(keys / "eve.pub", alone)
    os.mkfifo(tmp_path / "pipe")
    for key in (tmp_path / "none", alone, Path("/dev/null"), tmp_path / "pipe", tmp_path):
        with raises("signature", match=rf"ssh-keygen cannot sign with {key}"):
            signature.sign("text", key)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["missing", "a link to nothing", "a folder", "a pipe", "too large", "below a file"])
def test_invalid_signers_list_is_an_error(
    made: tuple[Path, Opened], signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, named: bool
) -> None:
    listed = tmp_path / "config/allowed_signers"
    listed.parent.mkdir()
    match kind:
        case "a link to nothing":
            listed.symlink_to(tmp_path / "nothing")
        case "a folder":
            listed.mkdir()
        case "a pipe":
            os.mkfifo(listed)
        case "too large":
            listed.write_text("#" * 10**6 + "\n")
        case "below a file":
            listed.parent.rmdir()
            listed.parent.write_text("")
    if named:
        monkeypatch.setenv("HEARTH_ALLOWED_SIGNERS", str(listed))
    else:
        monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    if kind == "missing" and not named:
        assert bundle.verify(made[0]).origin == "not signed"
        return
    for path in (made[0], signed):
        with raises("signature", match=r"allowed_signers lists who may sign, and (cannot be read|is larger)"):
            bundle.verify(path)


def public(keys: Path, name: str) -> str:
    return " ".join((keys / f"{name}.pub").read_text().split()[:2])


def test_revoked_key_is_refused(keys: Path, tmp_path: Path) -> None:
    anna, eve = public(keys, "anna"), public(keys, "eve")
    by_key = signature.sign("text", keys / "anna")
    shutil.copy(keys / "anna", tmp_path / "anna")
    shutil.copy(keys / "anna.pub", tmp_path / "anna.pub")
    certify: list[str | Path] = [
        "ssh-keygen",
        "-q",
        "-s",
        keys / "eve",
        "-I",
        "id",
        "-n",
        "carol",
        tmp_path / "anna.pub",
    ]
    subprocess.run(certify, check=True)
    shutil.copy(tmp_path / "anna", tmp_path / "anna-cert")
    by_certificate = signature.sign("text", tmp_path / "anna-cert.pub")
    authority = f"carol cert-authority {eve}\n"
    assert by_key.signer(f"# \xe4\n  anna,bob {anna}\r\n@revoked eve {eve} eve@host\n", "the list") == "anna"
    assert by_key.signer(f'x valid-before="20200101" {anna}\nbob {anna}\n', "the list") == "bob"  # alone ends a line
    assert by_certificate.signer(authority, "the list") == "carol"
    for seal, lines in (
        (by_key, f"bob {anna}\n@revoked anna {anna}\nanna {anna}\n"),
        (by_key, f"\ufeff \t@revoked {anna}\nbob {anna}"),
        (by_key, f'bob {anna}\n@revoked "anna smith" valid-before="20200101" {anna} a comment'),
        (by_certificate, f"{authority}@revoked anna {anna}\n"),
        (by_certificate, f"{authority}@revoked eve cert-authority {eve}\n"),
    ):
        with raises("signature", match=r"is revoked in the list: ED25519|no key in the list"):
            seal.signer(lines, "the list")
    for mark in (
        "@revoked",
        "@revoked bob",
        f"@revoke {anna}",
        f"@Revoked {eve}",
        f"@revoked {anna[:-9]}!",
        f"@{anna}",
    ):
        with raises("signature", match="the list has an invalid line: '@"):
            by_key.signer(f"anna {anna}\n{mark}\n", "the list")


def test_key_expiry_uses_the_verification_time(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its earlier signatures do not count either, since their times cannot be verified."""
    words: list[str] = []
    run = shell.run

    def record(argv: list[str | Path], **more: Any) -> shell.Done:
        words.extend(map(str, argv))
        return run(argv, **more)

    monkeypatch.setattr(shell, "run", record)
    seal = signature.sign("text", keys / "anna")
    with raises("signature", match="no key in the list signed it"):
        seal.signer(allowed(keys, "anna", 'valid-before="19700102Z"'), "the list")
    assert "verify" in words or "find-principals" in words
    assert not [word for word in words if "verify-time" in word]


def test_a_killed_ssh_keygen_has_a_cause(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = signature.sign("text", keys / "anna")
    key = seal.key()
    killed(tmp_path, monkeypatch, "ssh-keygen")
    with raises("signature") as caught:
        seal.key()
    assert caught.value.cause == "it was killed by signal 9 (Killed)"
    monkeypatch.setattr(Signed, "key", lambda _: key)
    with raises("signature") as caught:
        seal.signer(allowed(keys, "anna"), "the list")
    assert caught.value.cause == "it was killed by signal 9 (Killed)"


def test_host_with_signers_refuses_other_bundles(made: tuple[Path, Opened], signed: Path, keys: Path) -> None:
    facts = replace(FRESH, machine="x86_64", signers=allowed(keys, "anna"))
    with bundle.opened(signed) as opened:
        deploy._accept(opened, "far", facts)
        with raises("signature", match="no key in /etc/hearth/allowed_signers on far signed it"):
            deploy._accept(opened, "far", replace(FRESH, machine="x86_64", signers=""))
    with bundle.opened(made[0]) as opened, raises("signature", match="it is not signed"):
        deploy._accept(opened, "far", facts)


def test_host_refuses_a_bundle_before_reading_it(made: tuple[Path, Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its profiles: the requests to the host and the connection depend only on the operator's hosts.toml."""
    monkeypatch.setenv("HEARTH_HOSTS", str(made[0].with_name("hosts.toml")))
    asked: list[Questions] = []

    def look(_: object, target: Target, *__: object) -> Facts:
        asked.append(questions(target))
        return replace(FRESH, signers="")

    monkeypatch.setattr(deploy, "look", look)
    with bundle.opened(made[0]) as opened:
        inside = workspace.current().checkout
        shutil.rmtree(inside)
        inside.mkdir()
        (inside / "config/profiles").mkdir(parents=True)
        for place in ("config/hosts.toml", "config/profiles/cpu.toml", "config/stacks.toml"):
            (inside / place).write_text("this is = no = TOML")
        for name in ("local", "far"):
            with raises("signature", match="it is not signed"):
                deploy.deploy(name, Options(), bundle=opened)
    assert [each.pythons for each in asked] == [(), ()]
    assert [each.metrics_port for each in asked] == [None, 9188]


def test_a_bundle_with_other_nodes_is_refused(made: tuple[Path, Opened]) -> None:
    with raises("bundle", match=r"has other nodes \(none\) than far \(six\)"):
        deploy._same_nodes(made[1], "far", ["six"])


def test_bundle_does_not_replace_a_folder(tmp_path: Path) -> None:
    wanted: Any = None
    with raises("bundle", match="is not a file"):
        bundle.write(wanted, wanted, "", "", [], tmp_path)
