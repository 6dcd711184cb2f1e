"""Locked lists, resolved by uv with an index of tiny wheels: no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from packaging.utils import canonicalize_name

from core import files, tools
from core.stack import Platform, stacks
from lock import advisory, nodes, requirements, resolution
from lock import application as applications
from lock.requirements import LockedList
from tests.errors import killed, raises

pytestmark = pytest.mark.installer

BAD = """
same-files = [["opencv-headless", "opencv", "opencv-contrib"]]
[[advisory]]
package = "six"
versions = [">=3,<3.2", "==2.1"]
what = "it steals"
source = "https://example.org/1"
[[advisory]]
package = "aimdo"
versions = ["==0.4.11"]
what = "it hangs"
source = "https://example.org/2"
tolerated = "nothing else fits"
"""


@dataclass
class Own:
    """A ComfyUI, an index with tiny wheels, and nodes of which only the requirements exist."""

    place: Path

    def publish(self, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> str:
        """Add a wheel to the index; returns its address, as if it was elsewhere."""
        folder = self.place / "simple" / name
        folder.mkdir(parents=True, exist_ok=True)
        file, info = f"{name.replace('-', '_')}-{version}-{tag}.whl", f"{name.replace('-', '_')}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
        metadata += "".join(f"Provides-Extra: {each}\n" for each in re.findall("extra == '(.*)'", "\n".join(requires)))
        with zipfile.ZipFile(folder / file, "w") as wheel:
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            wheel.writestr(f"{info}/RECORD", "")
        links = [f'<a href="{each.name}">{each.name}</a>' for each in folder.glob("*.whl")]
        (folder / "index.html").write_text("".join(links))
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        return f"https://example.org/{file}#sha256={digest}"

    def app(self, *lines: str) -> None:
        (self.place / "src/comfy").mkdir(parents=True, exist_ok=True)
        for name in ("comfy/cli_args.py", "folder_paths.py"):
            (self.place / "src" / name).touch()
        (self.place / "src/requirements.txt").write_text("\n".join(lines))

    def node(self, name: str, text: str, more: str = "") -> None:
        """Add a node with that requirements.txt to the catalogue."""
        (self.place / "trees" / name).mkdir(parents=True)
        (self.place / "trees" / name / "requirements.txt").write_text(text)
        with (self.place / "nodes.toml").open("a") as file:
            file.write(f'[nodes.{name}]\nurl = "https://example.org/{name}"\ntree = "t"\nwhy = "w"\n')
            file.write(f'commit = "{"a" * 40}"\n{more}\n')

    def lock(self) -> dict[str, LockedList]:
        resolution.compile_all(check=False)
        resolution.compile_all(check=True)
        found = [requirements.find(stack.name, each.value, python) for stack, each, python in COMBINATIONS]
        return {each.name: each for each in found if each}


COMBINATIONS = [(stacks()["cu130"], platform, python) for platform in Platform for python in ("3.11", "3.12")]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    found = Own(tmp_path)
    (tmp_path / "locks").mkdir()
    (tmp_path / "app.toml").write_text(
        'name = "comfyui"\nversion = "1"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
    )
    (tmp_path / "known-bad.toml").write_text(BAD)
    for each in requirements.trio(stacks()["cu130"]):
        found.publish(*each.split("=="))
    for version in ("1", "2", "2.1", "3", "3.1"):
        found.publish("six", version)
    found.app("six")
    monkeypatch.setattr(requirements, "combinations", lambda *_: COMBINATIONS)
    monkeypatch.setattr(advisory, "_path", lambda: tmp_path / "known-bad.toml")
    monkeypatch.setattr(nodes, "fetch", lambda known: {name: tmp_path / "trees" / name for name in known})
    monkeypatch.setenv("HEARTH_APP", str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"file://{tmp_path}/simple")
    return found


def test_every_version_has_lists_of_its_own(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    newer = own.place / "versions/2"
    shutil.copytree(own.place / "src", newer / "src")
    (newer / "src/requirements.txt").write_text("six<2\n")
    (newer / "app.toml").write_text((own.place / "app.toml").read_text().replace('version = "1"', 'version = "2"'))
    names = [lock.name for lock in own.lock().values()]
    for place, version in ((own.place, "2"), (newer, "1")):
        found = [requirements.find(stack.name, each.value, python, place) for stack, each, python in COMBINATIONS]
        assert {lock.versions()["six"] for lock in found if lock} == {version}
        assert sorted(path.stem for path in (place / "locks").iterdir()) == sorted(names)
    (newer / "src/requirements.txt").write_text("six<3\n")
    (newer / "locks/cu124-linux_x86_64-cp311.txt").touch()
    with raises("lock-stale", match="stale: 2/"):
        resolution.compile_all(check=True)
    own.app("six", "lacking")  # the lists of all versions are written, or none
    before = files.tree_hash(newer / "locks")
    with raises("resolution"):
        own.lock()
    assert files.tree_hash(newer / "locks") == before
    own.app("six")
    capsys.readouterr()
    assert resolution.compile_all(check=False) == [f"2/{name}" for name in names]
    assert "removed" in capsys.readouterr().err
    assert sorted(path.stem for path in (newer / "locks").iterdir()) == sorted(names)


def test_known_bad_versions_are_avoided(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    assert {each.versions()["six"] for each in own.lock().values()} == {"2"}
    own.publish("six", "3.2")
    (own.place / "known-bad.toml").write_text(BAD.replace("2.1", "2"))  # a list contains what became known
    with raises("lock-stale") as raised:
        resolution.compile_all(check=True)
    assert raised.value.cause == "six 2: it steals (https://example.org/1)"
    assert {each.versions()["six"] for each in own.lock().values()} == {"3.2"}
    capsys.readouterr()
    own.publish("aimdo", "0.4.11")
    own.publish("aimdo", "0.4.12")
    own.app("six", "aimdo==0.4.11")
    own.node("any", "six")  # the inputs of a local ComfyUI are not hashed
    assert {each.versions()["aimdo"] for each in own.lock().values()} == {"0.4.11"}
    said = "warning: aimdo 0.4.11: it hangs (https://example.org/2); it is kept: nothing else fits"
    assert capsys.readouterr().err.count(said) == 2  # of `inv lock`, and of `inv lock --check`


def test_who_needs_a_known_bad_version_is_named(own: Own) -> None:
    own.node("bad", "six==2.1")
    own.node("good", "six>1")
    with raises("resolution", match="requirements of bad") as raised:
        own.lock()
    assert "six==2.1" in raised.value.cause
    assert not list((own.place / "locks").iterdir())
    own.app("six==3.1")
    with raises("resolution") as raised:
        own.lock()
    assert "avoided: six 3.1: it steals (https://example.org/1)" in raised.value.cause


@pytest.fixture
def served(own: Own, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The index at an address. Only https is accepted otherwise."""
    monkeypatch.setattr(requirements, "_PINNED", re.compile(requirements._PINNED.pattern.replace("https", "http")))
    handler = partial(SimpleHTTPRequestHandler, directory=str(own.place / "simple"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def installed(place: Path, listed: str, *words: str) -> str:
    """The packages of an environment that uv makes from a list as on a host."""
    (place / "listed.txt").write_text(listed)
    tools.uv("venv", "--clear", "--python", sys.executable, place / "env")
    argv = ("pip", "sync", "--require-hashes", "--strict", "--only-binary", ":all:", *words)
    tools.uv(*argv, "--python", place / "env/bin/python", place / "listed.txt")
    return tools.uv("pip", "freeze", "--python", place / "env/bin/python").stdout


def test_a_wheel_by_address_arrives(own: Own, served: str) -> None:
    own.publish("ftfy", "6")
    address = own.publish("lark", "1.0+x", "ftfy").replace("https://example.org", f"{served}/lark")
    own.publish("lark", "2")
    own.app("six", "lark")
    own.node("mine", address.replace("#sha256=", " --hash=sha256:"))
    for lock in own.lock().values():
        assert lock.versions([]).items() >= {"lark": "1.0+x", "ftfy": "6"}.items()  # ComfyUI requires it, too
    ours = next(each for name, each in own.lock().items() if name.endswith("x86_64-cp311"))
    assert f"lark @ {served}/lark/" in installed(own.place, ours.select([]))
    sent = [word for each in (own.place / "simple").iterdir() for word in ("--find-links", str(each))]
    assert "lark==1.0+x" in installed(own.place, requirements.offline(ours.select([])), "--no-index", *sent)


def test_a_node_is_left_out_where_no_wheel_fits(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.publish("decord", "0.6.0", tag="py3-none-manylinux2010_x86_64")
    own.publish("young", "1", tag="cp311-cp311-manylinux2014_x86_64")
    own.publish("young", "1", tag="cp311-cp311-manylinux2014_aarch64")
    own.node("video", "decord\nsix==1")
    own.node("old", "young")
    own.node("needs", "six", 'requires = ["video"]')
    own.node("plain", "six")
    lists = own.lock()
    for name, lock in lists.items():
        arm, old = "aarch64" in name, name.endswith("cp311")
        assert lock.unavailable.keys() == {*(["video", "needs"] * arm), *(["old"] * (not old))}
        assert ("decord" in lock.versions(), "young" in lock.versions()) == (not arm, old)
        assert lock.versions()["six"] == ("2" if arm else "1")
        assert lock.fits(nodes.catalogue())
    spark = next(name for name in lists if "aarch64" in name)
    assert "Wheels are available for `decord` (v0.6.0)" in lists[spark].unavailable["video"]
    said = capsys.readouterr().err
    assert f"{spark} lacks video: Wheels are available for `decord`" in said
    assert f"{spark} lacks needs: it requires the node video\n" in said


def test_a_wheel_by_address_for_another_platform_leaves_its_node_out(own: Own) -> None:
    address = own.publish("lark", "1", tag="py3-none-manylinux_2_17_x86_64")
    own.node("mine", f"lark @ {address}")
    asked = {"comfyui.txt": ["six"], "hearth.txt": [], "mine.node.txt": [f"lark @ {address}"]}
    for tag, file, wanted in (
        ("linux_aarch64", address, True),
        ("linux_x86_64", address.replace("manylinux_2_17_x86_64", "win_amd64"), True),
        ("linux_x86_64", address.replace("py3-none", "cp311-cp311"), True),
        ("linux_x86_64", address.replace("py3-none", "cp311-abi3"), False),
        ("linux_x86_64", address, False),
    ):
        asked["mine.node.txt"] = [f"lark @ {file}"]
        empty = LockedList("cu130", tag, "3.12", "")
        made = resolution.Resolver(own.place, asked, nodes.catalogue(), stacks()["cu130"], empty)
        assert bool(made.unfit("mine.node.txt")) is wanted, file


def test_a_node_that_no_list_can_have_is_an_error(own: Own) -> None:
    own.publish("decord", "0.6.0", tag="py3-none-win_amd64")
    own.node("video", "decord")
    own.node("plain", "six")
    with raises("resolution", match="requirements of video") as raised:
        own.lock()
    assert "decord" in raised.value.cause
    assert "[left-out]" in raised.value.hint
    assert not list((own.place / "locks").iterdir())


def test_nodes_that_conflict_are_named(own: Own) -> None:
    own.node("one", "six<2")
    own.node("two", "six>=2")
    own.node("three", "six")
    with raises("resolution", match="no set of versions") as raised:
        own.lock()
    assert "without one or without two:" in raised.value.hint
    assert not list((own.place / "locks").iterdir())


def test_an_index_that_fails_leaves_no_node_out(own: Own) -> None:
    own.node("mine", "lark")
    for each in (own.place / "simple/six").glob("*.whl"):
        each.write_bytes(b"damaged")
    (own.place / "simple/lark").mkdir()
    (own.place / "simple/lark/index.html").write_bytes(b"\xff")
    with raises("resolution"):
        own.lock()
    assert not list((own.place / "locks").iterdir())


def test_a_killed_uv_is_no_conflict(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    own.node("mine", "six")
    killed(own.place, monkeypatch, "uv")
    with raises("resolution") as caught:
        own.lock()
    assert caught.value.cause == "it was killed by signal 9 (Killed)"
    assert "left-out" not in caught.value.hint


def test_packages_with_the_same_files_are_refused(own: Own) -> None:
    for name in ("opencv", "opencv-contrib", "opencv-headless"):
        own.publish(name, "5.0")
    own.node("one", "opencv")
    own.lock()
    own.publish("rembg", "2", "opencv-headless")
    own.node("two", "rembg")
    with raises("same-files", match="opencv-headless and opencv install the same files") as raised:
        own.lock()
    assert "opencv is required by one" in raised.value.cause
    assert "opencv-headless is required by rembg" in raised.value.cause
    assert 'opencv = { requirement = "opencv-headless", why = "..." }' in raised.value.hint
    with (own.place / "nodes.toml").open("a") as file:
        file.write('[override]\nopencv = { requirement = "opencv-headless", why = "the same files" }\n')
    assert {"opencv" in each.versions() for each in own.lock().values()} == {False}


def test_constraints_of_a_node_apply(own: Own) -> None:
    own.node("mine", "-c limits.txt\nsix")
    (own.place / "trees/mine/limits.txt").write_text("six<2\ntorch==1\nlark==1")
    for lock in own.lock().values():
        assert lock.versions().items() >= {"six": "1"}.items()
        assert "lark" not in lock.versions()
        assert "six==1" in lock.select([])
    own.node("other", "six>=2")
    with raises("resolution") as raised:
        resolution.compile_all(check=False)
    assert "without mine or without other:" in raised.value.hint


def test_a_node_gets_what_pip_would_install(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, from the same index, for odd files."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    for name, version, *requires in (
        ("lark", "1"), ("lark", "2"), ("lark", "3"), ("onnx", "1"), ("foo-bar-baz", "1"), ("foo-bar-baz", "2"),
        ("rembg", "1", "mark", "onnx ; extra == 'gpu'"), ("mark", "1"), ("old", "1"),
        ("deep", "1", "rembg[gpu]<2", "lark<3"),
    ):  # fmt: skip
        own.publish(name, version, *requires)
    digest = hashlib.sha256((own.place / "simple/lark/lark-2-py3-none-any.whl").read_bytes()).hexdigest()
    odd: dict[str, str | bytes] = {
        "utf16": "# \u6d4b\r\nfoo_bar-BAZ<2\r\n\r\nonnx \\\r\n  >=1\r\n".encode("utf-16"),
        "hashes": f"lark==2 \\\n    --hash=sha256:{digest} \\\n    --hash=sha256:{'0' * 64}\n",
        "comment": "onnx # why \\\nold ; python_version < '3'\n# lark \\\nold\n",
        "nested": "-r sub/more.txt\n-r sub/more.txt\n",
        "extras": "rembg[gpu,none] ; python_version >= '3.8'\nold ; sys_platform == 'win32'\n",
        "tabs": "deep\t>=1 ; extra == 'never' or os_name == 'posix'\t# so\n",
    }
    for name, content in odd.items():
        own.node(name, "")
        (own.place / "trees" / name / "requirements.txt").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    sub = own.place / "trees/nested/sub"
    sub.mkdir()
    (sub / "more.txt").write_text("-c ../limits.txt\nfoo.bar_baz\n-r ../last.txt")
    (sub.parent / "limits.txt").write_text("foo-bar-baz<2\nrare==7\n")
    (sub.parent / "last.txt").write_text("onnx")
    lock = own.lock()[f"cu130-{Platform.LINUX_X86_64.value}-cp311"]
    common = lock.versions([])
    for name in odd:
        words = ["install", "--dry-run", "--quiet", "--ignore-installed", "--report", str(own.place / "report.json")]
        place = own.place / "trees" / name / "requirements.txt"
        tools.pip(*words, "--python-version=3.11", "--only-binary=:all:", "--target", own.place / "to", "-r", place)
        report = json.loads((own.place / "report.json").read_text())["install"]
        wanted = {canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"] for each in report}
        found = lock.versions([name])
        assert {each: found.get(each) for each in wanted} == wanted, name
        assert found.keys() - common.keys() == wanted.keys() - common.keys(), name


def test_constraints_of_comfyui_apply(own: Own) -> None:
    own.app("-c limits.txt", "six")
    (own.place / "src/limits.txt").write_text("six<2\ntorch==1\nlark==1\n")
    for lock in own.lock().values():
        assert lock.versions().items() >= {"six": "1"}.items()
        assert "lark" not in lock.versions()
        assert lock.requesters("six") == ["comfyui.txt"]
    wanted = requirements.required(applications.application(), nodes.catalogue())
    assert requirements.uncovered(lock, wanted, []) == {}
    later = replace(lock, text=lock.text.replace("six==1", "six==3"))
    assert requirements.uncovered(later, wanted, []) == {"six<2": "3"}
    own.node("comfyui", "-c more.txt\nsix")
    (own.place / "trees/comfyui/more.txt").write_text("six>=2")
    with raises("resolution"):
        own.lock()


@pytest.mark.parametrize("name", ["Open_CV", "open.cv", "OPEN--CV"])
def test_an_override_counts_in_any_spelling(own: Own, name: str) -> None:
    own.publish("open-cv", "1")
    own.node("mine", "open_cv", f'[override]\n"{name}" = {{ requirement = "six<3", why = "w" }}')
    for lock in own.lock().values():
        assert lock.versions()["six"] == "2"
        assert "open-cv" not in lock.versions()


def test_known_bad_packages_count_in_any_spelling(own: Own) -> None:
    bad = BAD.replace('"six"', '"SIX"').replace('"opencv-headless"', '"OpenCV_Headless"')
    (own.place / "known-bad.toml").write_text(bad)
    assert [each.name for each in advisory.bad_packages({"six": "2.1"})] == ["six"]
    assert advisory.clashing({"opencv", "opencv-headless"}) == [["opencv-headless", "opencv"]]


def test_an_override_of_nothing_is_reported(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    """One replaces a node's requirement, one a dependency's, one a version; `nothing` and `typo` are of no use."""
    own.publish("deep", "1")
    own.publish("rembg", "2", "deep", "lark")
    own.publish("lark", "1")
    own.publish("lark", "2")
    own.publish("own", "1")
    own.node(
        "mine",
        "rembg\nown ; sys_platform == 'win32'",
        """[override]
deep = { why = "w" }
lark = { requirement = "lark<2", why = "w" }
own = { requirement = "six", why = "w" }
nothing = { why = "w" }
typo = { requirement = "six<9", why = "w" }""",
    )
    own.lock()
    said = capsys.readouterr().err
    assert re.findall(r"\[override\] of nodes.toml has (\S+), which nothing requires", said) == ["nothing", "typo"]
    own.lock()
    assert "nothing requires" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ['"a b" = { why = "w" }', 'a = { requirement = "b >>1", why = "w" }', 'A = { why = "w" }\na = { why = "w" }'],
)
def test_an_invalid_override_is_an_error(own: Own, text: str) -> None:
    own.node("mine", "six", f"[override]\n{text}")
    with raises("config"):
        nodes.catalogue()


@pytest.mark.parametrize("text", ['Torch = { why = "w" }', 'torch = { requirement = "torch==1", why = "w" }'])
def test_what_the_stack_pins_has_no_override(own: Own, text: str) -> None:
    own.node("mine", "six", f"[override]\n{text}")
    with raises("config", match="which the stack pins"):
        own.lock()


def test_a_damaged_list_is_resolved_again(own: Own) -> None:
    name, lock = next(iter(own.lock().items()))
    (own.place / f"locks/{name}.txt").write_text(f"{lock.text}six @ https://x/six.zip\n")
    with raises("lock-stale", match=name):
        resolution.compile_all(check=True)
    assert own.lock()[name].versions() == lock.versions()
    assert "avoided" not in lock.text


def test_ignored_options_are_said(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    own.node("mine", "--extra-index-url https://example.org/simple\nsix")
    own.lock()
    assert "mine lists '--extra-index-url https://example.org/simple': ignored" in capsys.readouterr().err
