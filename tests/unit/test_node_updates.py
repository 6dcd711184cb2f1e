"""Changes to the list of nodes, from real repositories; they keep people's own edits of the file."""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.errors import HearthError
from lock import nodes
from lock.updates import node_updates
from lock.updates import outdated as listing
from lock.updates import upstream as upstreams
from lock.updates.proposal import Request
from tests.errors import raises

pytestmark = pytest.mark.process  # git


@dataclass
class Upstream:
    """A node's repository."""

    place: Path

    @property
    def url(self) -> str:
        return f"file://{self.place}"

    def git(self, *words: str) -> str:
        argv = ["git", "-C", str(self.place), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, subject: str, **contents: str) -> str:
        for name, text in contents.items():
            (self.place / name.replace("__py", ".py").replace("__txt", ".txt")).write_text(text)
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", subject)
        return self.git("rev-parse", "HEAD")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that each test's is a copy of."""
    one = Upstream(tmp_path_factory.mktemp("first") / "My-Node")
    one.place.mkdir()
    one.git("init", "--quiet", "--initial-branch=main")
    one.git("config", "uploadpack.allowAnySHA1InWant", "true")  # as GitHub allows
    one.git("config", "uploadpack.allowFilter", "true")
    one.commit(
        "first",
        __init____py="from .types import NODE_CLASS_MAPPINGS\n",
        types__py='NODE_CLASS_MAPPINGS = {"MyType": object}\n',
        later__py="",
        requirements__txt="numpy\n",
    )
    one.git("tag", "-a", "v1", "-m", "v1")
    return one.place


@pytest.fixture
def upstream(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upstream:
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (app / "src/nodes.py").write_text('NODE_CLASS_MAPPINGS = {"KSampler": 1}\n')
    (app / "app.toml").write_text(
        'name = "comfyui"\nversion = "1"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
    )
    (app / "nodes.toml").write_text('# mine\n[sets]\nbest = [] # to be filled\n\n[override]\ncmake = { why = "no" }\n')
    monkeypatch.setenv("HEARTH_APP", str(app))
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(first, tmp_path / "My-Node")
    return Upstream(tmp_path / "My-Node")


def outdated() -> dict[str, tuple[str, str]]:
    """The nodes with newer commits."""
    found, failures = listing.outdated(Request("nodes"))
    if failures:
        raise node_updates.together(failures)
    return {each.name: (each.pinned, each.newest) for each in found if each.newest != each.pinned}


def test_fix_is_searched_in_the_commit_history(upstream: Upstream, tmp_path: Path) -> None:
    first = upstream.git("rev-parse", "HEAD")
    second = upstream.commit("second", later__py="x = 1\n")
    assert upstreams.holds(upstream.url, second, first) is True
    assert upstreams.holds(upstream.url, first, second) is False
    assert upstreams.holds(upstream.url, second, "a" * 40) is None
    assert upstreams.holds(upstream.url, f"--upload-pack=touch {tmp_path}/run; git-upload-pack", first) is None
    assert not (tmp_path / "run").exists()
    assert upstreams.holds(f"file://{tmp_path}/nothing", second, first) is None


def test_known_bad_node_causes_a_warning(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "https://github.com/AppleBotzz/ComfyUI_LLMVISION"
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{upstream.url}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", address)
    node_updates.add(upstream.url, "for a test")
    assert "warning" not in capsys.readouterr().err
    node_updates.add(address, "for a test")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "ComfyUI_LLMVISION has known problems (affected: all versions): stole browser passwords" in line


def test_left_out_node_is_not_added(upstream: Upstream) -> None:
    nodes.catalogue_file().write_text('[left-out]\nMy-Node = "it comes with ComfyUI"\n')
    with raises("config", match="it comes with ComfyUI"):
        node_updates.add(upstream.url, "for a test")


def test_add_update_and_remove(upstream: Upstream) -> None:
    first = upstream.git("rev-parse", "HEAD")
    assert node_updates.add(f"{upstream.url}@v1", "for a test") == "My-Node"
    node = nodes.catalogue().nodes["My-Node"]
    assert (node.url, node.commit, node.why) == (upstream.url, first, "for a test")
    assert (nodes.fetch({"My-Node": node})["My-Node"] / "types.py").exists()
    with raises("config", match="already listed"):
        node_updates.add(upstream.url, "again")
    assert outdated() == {}
    assert node_updates.update([], dry_run=False) == []

    upstream.commit("second", types__py="import os\n", later__py="x = 1\n", requirements__txt="numpy\nscipy\n")
    third = upstream.commit("third", README__txt="hello")
    assert outdated() == {"My-Node": (first[:9], third[:9])}
    (change,) = node_updates.update(["My-Node"], dry_run=True)
    assert [line.partition(" ")[2][11:] for line in change.commits] == ["third", "second"]
    assert change.requirements == ("+scipy",)
    assert change.imported == ("types.py",)  # later.py also changed, but no file imports it
    assert nodes.catalogue().nodes["My-Node"] == node
    assert change.powers == ()
    node_updates.update([], dry_run=False)
    assert nodes.catalogue().nodes["My-Node"].commit == third

    path = nodes.catalogue_file()
    path.write_text(path.read_text().replace("best = []", 'best = ["My-Node"]'))
    node_updates.remove("My-Node")
    left = nodes.catalogue()
    assert (left.nodes, left.sets) == ({}, {"best": ()})
    assert "# mine" in path.read_text()
    assert "# to be filled" in path.read_text()


LISTED = """\
# mine
[sets]
best = [] # to be filled

# about A
[nodes.A]
url = "https://example.org/A"
commit = "1111111111111111111111111111111111111111" # 2026-01-01
tree = ""
why = "a test"
# of A as well

# about what nodes ask for

# of all of them
[override]
cmake = { why = "no" }
"""


def test_comments_of_other_tables_stay_where_they_are(upstream: Upstream) -> None:
    path = nodes.catalogue_file()
    path.write_text(LISTED)
    node_updates.add(upstream.url, "for a test")
    after = "\n\n# about what nodes ask for\n"
    first, last = LISTED.split(after)
    added = path.read_text().removeprefix(first)
    assert added.endswith(after + last)
    table = r"\n\n\[nodes.My-Node\]\n(\w+ = .*\n){3}why = \"for a test\""
    assert re.fullmatch(table, added.removesuffix(after + last))
    node_updates.remove("My-Node")
    assert path.read_text() == LISTED
    node_updates.remove("A")
    assert path.read_text() == re.sub(r"\[nodes.A\].*# of A as well\n\n", "", LISTED, flags=re.DOTALL)


def test_update_shows_new_capabilities(upstream: Upstream) -> None:
    node_updates.add(upstream.url, "for a test")
    (upstream.place / "evil.pth").write_text("import os\n")
    (upstream.place / "lib.so").write_bytes(b"\x7fELF")
    (upstream.place / "link").symlink_to("types.py")
    upstream.commit(
        "more",
        types__py="import subprocess, ctypes\nfrom os import system\neval('1')\nimport socket\n",
        later__py="import importlib\nimportlib.import_module('x')\n",
    )
    (change,) = node_updates.update([], dry_run=True)
    assert set(change.powers) == {
        "binary: lib.so",
        "native code: types.py (ctypes)",
        "network: types.py (socket)",
        "runs at every start of Python (.pth): evil.pth",
        "runs text as code: later.py (importlib, importlib.import_module), types.py (eval)",
        "starts programs: types.py (os.system, subprocess)",
        "symbolic links: link",
    }


def test_failed_update_does_not_block_others(
    upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [Upstream(tmp_path / name) for name in ("Gone", "Leads-Out")]
    for each in others:
        shutil.copytree(upstream.place, each.place)
    for each in (*others, upstream):
        node_updates.add(each.url, "for a test")
    before = nodes.catalogue().nodes
    shutil.rmtree(others[0].place)
    (others[1].place / "link").symlink_to("/etc/passwd")
    others[1].commit("a link")
    new = upstream.commit("second", types__py="import socket\n")
    for look in (lambda: outdated(), lambda: node_updates.update([], dry_run=True)):
        with pytest.raises(HearthError, match=r"Gone"):
            look()
        assert nodes.catalogue().nodes == before
    assert f"My-Node {before['My-Node'].commit[:9]} -> {new[:9]}" in capsys.readouterr().err
    with pytest.raises(HearthError, match=r"Gone, Leads-Out") as raised:
        node_updates.update([], dry_run=False)
    assert "Gone cannot be reached" in str(raised.value)
    assert "/etc/passwd" in str(raised.value)
    assert "network: types.py (socket)" in capsys.readouterr().err
    after = nodes.catalogue().nodes
    assert after["My-Node"].commit == new
    assert [after[name] for name in ("Gone", "Leads-Out")] == [before[name] for name in ("Gone", "Leads-Out")]
    with raises("source-unreachable", match="Gone"):  # one error class: its exit code stays
        node_updates.update(["Gone"], dry_run=False)


def test_all_links_are_reported_after_rewritten_history(upstream: Upstream) -> None:
    (upstream.place / "link").symlink_to("types.py")
    upstream.commit("a link")
    node_updates.add(upstream.url, "for a test")
    upstream.git("commit", "--amend", "--quiet", "-m", "another")
    upstream.git("reflog", "expire", "--expire=now", "--all")
    upstream.git("gc", "--quiet", "--prune=now")
    (change,) = node_updates.update([], dry_run=False)
    assert change.commits == ("(its history was rewritten)",)
    assert change.powers == ("symbolic links: link",)


def test_requirements_are_compared_in_any_order(upstream: Upstream) -> None:
    upstream.commit("some", requirements__txt="a\nb\nc\n")
    node_updates.add(upstream.url, "for a test")
    upstream.commit("others", requirements__txt="d\nb\na\n")
    (change,) = node_updates.update([], dry_run=True)
    assert change.requirements == ("-c", "+d")


@pytest.mark.parametrize(
    ("address", "why", "error", "said"),
    [
        ("{url}", "", "usage", "reason"),
        ("{url}@nothing", "x", "unknown-name", "has no 'nothing'"),
        ("{url}-gone", "x", "source-unreachable", "cannot be reached"),
    ],
)
def test_invalid_additions_are_refused(upstream: Upstream, address: str, why: str, error: str, said: str) -> None:
    before = nodes.catalogue_file().read_text()
    with raises(error, match=said):
        node_updates.add(address.format(url=upstream.url), why)
    assert nodes.catalogue_file().read_text() == before


@pytest.mark.usefixtures("upstream")
def test_unknown_names() -> None:
    with raises("unknown-name"):
        node_updates.remove("My-Nod")
    with raises("unknown-name"):
        node_updates.update(["My-Nod"], dry_run=False)


EDITOR = {
    "nodes": [{"type": "KSampler"}, {"type": "MyType"}, {"type": "Note"}, {"type": "sub-1"}],
    "definitions": {"subgraphs": [{"id": "sub-1", "nodes": [{"type": "Nobodys"}]}]},
}
API = {"1": {"class_type": "KSampler"}, "2": {"class_type": "MyType"}, "3": {"class_type": "Nobodys"}}


def png(chunk: bytes, text: bytes) -> bytes:
    """The start of a PNG with one chunk of text."""
    return b"\x89PNG\r\n\x1a\n" + len(text).to_bytes(4, "big") + chunk + text + b"\x00\x01\xff\xfeIDAT"


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


WORKFLOWS = {
    "saved": dump(EDITOR),
    "exported": dump(API),
    "BOM": codecs.BOM_UTF8 + dump(EDITOR),
    "UTF-16": json.dumps(EDITOR).encode("utf-16"),
    "UTF-16 without BOM": json.dumps(EDITOR).encode("utf-16-le"),
    "UTF-32": json.dumps(API).encode("utf-32"),
    "sent to /prompt": dump({"prompt": API, "client_id": "a"}),
    "exported with its workflow": dump({"prompt": API, "workflow": EDITOR}),
    "wrapped": dump({"workflow": EDITOR}),
    "from /history": dump({"id-1": {"prompt": [7, "id-1", API, {}, ["9"]], "outputs": {}, "status": {}}}),
    "PNG": png(b"tEXt", b"prompt\0{}") + png(b"tEXt", b"workflow\0" + dump(EDITOR)),
    "PNG with a prompt alone": png(b"tEXt", b"prompt\0" + dump(API)),
    "PNG, international text": png(b"iTXt", b"workflow\0\0\0\0\0" + dump(EDITOR)),
    "PNG, misleading bytes": png(b"tEXt", b"workflow\0{x") + png(b"tEXt", b"workflow\0" + dump(EDITOR)),
    "WebP": b"RIFF\0\0\0\0WEBPVP8X" + b"prompt:" + dump(API) + b"\0workflow:" + dump(EDITOR) + b"\0\xff",
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_nodes_that_a_workflow_needs(upstream: Upstream, tmp_path: Path, name: str) -> None:
    node_updates.add(upstream.url, "for a test")
    path = tmp_path / "workflow"
    path.write_bytes(WORKFLOWS[name])
    assert node_updates.search(path) == {"MyType": ["My-Node"], "Nobodys": []}


@pytest.mark.parametrize("sign", ">/")
def test_types_of_group_nodes(upstream: Upstream, tmp_path: Path, sign: str) -> None:
    node_updates.add(upstream.url, "for a test")
    groups = {
        "a pair": {"nodes": [{"type": "MyType"}, {"type": f"workflow{sign}b"}]},
        "b": {"nodes": [{"type": "KSampler"}]},
    }
    nodes_ = [{"type": f"workflow{sign}{name}"} for name in ("a pair", "gone")]
    (tmp_path / "workflow").write_bytes(dump({"nodes": nodes_, "extra": {"groupNodes": groups}}))
    assert node_updates.search(tmp_path / "workflow") == {"MyType": ["My-Node"], f"workflow{sign}gone": []}


@pytest.mark.parametrize(
    "workflow",
    [
        {"nodes": []},
        {"nodes": [{"type": None}]},
        {"nodes": [{"type": "s"}], "definitions": {"subgraphs": [{"id": "s", "nodes": []}]}},
        {"nodes": [], "definitions": {"subgraphs": None}, "extra": None},
        {"nodes": [], "definitions": None, "extra": {"groupNodes": None, "ds": {}}},
    ],
)
@pytest.mark.usefixtures("upstream")
def test_a_workflow_that_needs_no_nodes(tmp_path: Path, workflow: dict[str, object]) -> None:
    (tmp_path / "workflow").write_bytes(dump(workflow))
    assert node_updates.search(tmp_path / "workflow") == {}


def test_types_that_only_javascript_defines(upstream: Upstream, tmp_path: Path) -> None:
    (upstream.place / "web").mkdir()
    (upstream.place / "web/set.js").write_text(
        "// don't\nLiteGraph.registerNodeType('SetNode', SetNode);\n"
        'const add = (name) => name + " (mine)";\nexport const Names = { LABEL: add("Label"), MY: "MyType" };\n'
    )
    (upstream.place / "web/large.js").write_text("x" * 2_000_000)
    upstream.commit("scripts")
    node_updates.add(upstream.url, "for a test")
    wanted = ["SetNode", "Label (mine)", "Label (other)", "Set", "MyType"]
    (tmp_path / "workflow").write_bytes(dump({"nodes": [{"type": each} for each in wanted]}))
    ours = ["My-Node"]
    assert node_updates.search(tmp_path / "workflow") == {
        "SetNode": ours,
        "Label (mine)": ours,
        "MyType": ours,
        "Label (other)": [],
        "Set": [],
    }


def test_unreadable_tree_is_reported_and_retried(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node_updates.add(upstream.url, "for a test")
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(API))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        assert node_updates.search(path)["MyType"] == []
    assert capsys.readouterr().err.count("cannot be read") == 2
    assert node_updates.search(path)["MyType"] == ["My-Node"]


def test_files_that_run_at_import(tmp_path: Path) -> None:
    imports = {"__init__": "from . import a", "a": "import b.c", "b/c": "from .. import d", "d": "from ....e import f"}
    (tmp_path / "b").mkdir()
    for name in (*imports, "e", "f", "g"):
        (tmp_path / f"{name}.py").write_text(imports.get(name, ""))
    assert node_updates.imported(tmp_path) == {"__init__.py", "a.py", "b/c.py", "d.py", "e.py"}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "9" * 5_000, "[" * 100_000, "[]", "{}", '{"prompt": 1}', '{"a":' * 400 + "1" + "}" * 400),
        *('{"nodes": [1]}', '{"nodes": [{"type": []}]}', '{"nodes": [], "definitions": 1}'),
        '{"nodes": [], "definitions": {"subgraphs": [1]}}',
        *(f'{{"1": {{"class_type": {each}}}}}' for each in ("1", "{}", "null")),
    ],
)
@pytest.mark.usefixtures("upstream")
def test_invalid_workflow_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "workflow.json").write_text(text)
    for path in (tmp_path / "workflow.json", tmp_path, tmp_path / "none.json"):
        with raises("config"):
            node_updates.search(path)


@pytest.mark.parametrize(("failures", "arrives"), [(2, True), (3, False)])
def test_transient_fetch_error_is_retried(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, arrives: bool
) -> None:
    node_updates.add(upstream.url, "for a test")
    monkeypatch.setenv("HEARTH_CACHE", str(tmp_path / "another"))
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("git")
    (programs / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *fetch*) if [ $(cat {tmp_path}/count) -gt 0 ]; then\n'
        f"echo $(($(cat {tmp_path}/count) - 1)) > {tmp_path}/count\n"
        f'echo "fatal: early EOF" >&2; exit 128; fi;; esac\nexec {real} "$@"\n'
    )
    (programs / "git").chmod(0o755)
    (tmp_path / "count").write_text(str(failures))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("time.sleep", lambda _: None)
    known = nodes.catalogue().nodes
    if arrives:
        assert nodes.fetch(known)["My-Node"].is_dir()
    else:
        with raises("source-unreachable", match="early EOF"):
            nodes.fetch(known)
