"""`inv update`: from a repository with tags, an index with tiny packages and dates, in a checkout of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from core import files, lockfile, source, stack
from core.errors import HearthError
from lock import advisory, nodes, requirements, resolution
from lock.application import application, channels, versions
from lock.preview import Preview, Release
from lock.updates import node_updates, outdated, transaction, update, upstream
from lock.updates.proposal import Proposal, Request
from tests.comfyui import tree as real_tree
from tests.errors import raises

APP = """\
# My ComfyUI.
name = "comfyui"
version = "0.30.0"
tree = ""

# What runs.
paths = ["comfy", "custom_nodes", "folder_paths.py", "main.py", "nodes.py", "requirements.txt", "models/configs"]

extra = []
manager = "manager==1" # for --enable-manager
size = 1
files = 1

[[source]]
git = "URL"
commit = "" # v0.30.0

[[source]] # elsewhere
sdist = "comfy"
version = "1"
sha256 = "0"
"""
STACKS = """\
[cu130]
default = true
torch = "2.14.0" # the newest
cuda = "13.0"
compiler = "locked"
cxx = "c++20"
cxx11_abi = true
pythons = ["3.11"]
platforms = ["linux_x86_64"]
driver = "580.65.06"
gcc = 15
archs = ["8.9"]
archs_reason = "a test"
size = 1
files = 1
"""
PROJECT = """\
[project]
name = "mine"
version = "0"
requires-python = ">=3.11"
[project.optional-dependencies]
cu130 = [ # the stack
    "torch==2.14.0; sys_platform == 'linux'",
    "torchvision==0.29.0; sys_platform == 'linux'", # 0.29.2 is for another CUDA
    "nvidia-cuda-nvcc==13.0.1; sys_platform == 'linux'",
]
uv = ["uv==1.0"]
[dependency-groups]
tool = ["invoke>=1"]
[tool.uv]
package = false
"""
BAD = """
[[advisory]]
package = "aimdo"
versions = ["==0.4.11"]
what = "it hangs"
source = "https://example.org/1"
tolerated = "a test"
[[advisory]]
urls = ["URL"]
versions = ["==0.33.0"]
what = "it burns"
source = "https://example.org/2"
"""
OLD, NEW = datetime(2026, 1, 1, tzinfo=UTC), datetime.now(UTC) - timedelta(days=2)


pytestmark = pytest.mark.installer


@dataclass
class Checkout:
    """A checkout with a ComfyUI, a repository of its tags, and an index that says when a package was uploaded."""

    place: Path
    uploads: dict[str, datetime] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.place / "checkout"

    @property
    def url(self) -> str:
        return f"file://{self.place}/upstream"

    def git(self, *words: str, date: datetime = OLD) -> str:
        env = {**os.environ, "GIT_COMMITTER_DATE": date.isoformat(), "GIT_AUTHOR_DATE": date.isoformat()}
        argv = ["git", "-C", str(self.place / "upstream"), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True, env=env).stdout.strip()

    def tag(self, version: str, date: datetime = OLD, /, **contents: str) -> str:
        """Release a version with these files, `__` for a dot; returns its commit."""
        for name, text in {"comfyui_version__py": f'__version__ = "{version}"\n', **contents}.items():
            path = self.place / "upstream" / name.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", version, date=date)
        self.git("tag", f"v{version}")
        return self.git("rev-parse", "HEAD")

    def publish(self, name: str, version: str, *requires: str, date: datetime = OLD) -> None:
        folder = self.place / "simple" / name
        folder.mkdir(parents=True, exist_ok=True)
        info = f"{name.replace('-', '_')}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
        with zipfile.ZipFile(folder / f"{info}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}.dist-info/METADATA", metadata)
            wheel.writestr(f"{info}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}.dist-info/RECORD", "")
        self.uploads[f"{info}-py3-none-any.whl"] = date

    def listing(self, name: str) -> dict[str, Any] | None:
        """The index's page of a package (PEP 691, 700)."""
        wheels = sorted((self.place / "simple" / name).glob("*.whl"))
        found = [
            {
                "filename": each.name,
                "url": each.name,
                "hashes": {"sha256": hashlib.sha256(each.read_bytes()).hexdigest()},
                "upload-time": self.uploads[each.name].strftime("%Y-%m-%dT%H:%M:%S.000000Z"),
                "size": each.stat().st_size,
            }
            for each in wheels
        ]
        versions = [each.name.split("-")[1] for each in wheels]
        return {"meta": {"api-version": "1.1"}, "name": name, "versions": versions, "files": found} if wheels else None

    def texts(self) -> dict[str, str]:
        """All files that an update may change."""
        paths = [each for each in self.root.rglob("*") if each.is_file() and ".update" not in each.parts]
        return {str(each.relative_to(self.root)): each.read_text() for each in paths}

    def file(self, name: str) -> Path:
        return self.root / name

    def update(self, part: str, to: str = "", cooldown: str = "", *, dry_run: bool = False) -> Proposal:
        made, failures = update.update(Request(part, to, upstream.cutoff(cooldown)), dry_run=dry_run)
        assert not failures
        return made

    def moved(self, part: str, to: str = "", cooldown: str = "") -> dict[str, str]:
        return {each.name: each.new for each in self.update(part, to, cooldown).moves}


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[Checkout, str]]:
    made = Checkout(tmp_path)

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, _, file = self.path.removeprefix("/simple/").partition("/")
            path = tmp_path / "simple" / name / file
            page = made.listing(name)
            content = path.read_bytes() if file and path.is_file() else json.dumps(page).encode()
            self.send_response(200 if page else 404)
            self.send_header(
                "Content-Type", "application/octet-stream" if file else "application/vnd.pypi.simple.v1+json"
            )
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815  http.server's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield made, f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@pytest.fixture
def own(index: tuple[Checkout, str], monkeypatch: pytest.MonkeyPatch) -> Checkout:
    made, address = index
    for name in ("config", "recipes/comfyui/locks"):
        (made.root / name).mkdir(parents=True)
    monkeypatch.setattr(files, "CHECKOUT", made.root)
    monkeypatch.setattr(advisory, "_path", lambda: made.file("recipes/comfyui/known-bad.toml"))
    for name in ("HEARTH_APP", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEARTH_CACHE", str(made.place / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(made.place / "uv"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    made.publish("torch", "2.14.0", "cuda-toolkit==13.0.3")
    made.publish("torchvision", "0.29.0", "torch==2.14.0")
    for name, *published in (
        ("cuda-toolkit", "13.0.3", "13.2.2"),
        ("nvidia-cuda-nvcc", "13.0.1", "13.2.1"),
        ("uv", "1.0"),
        ("invoke", "1.0"),
        ("six", "1", "2"),
        ("manager", "1", "2"),
        ("aimdo", "0.4.11", "0.4.12"),
    ):
        for version in published:
            made.publish(name, version)
    (made.place / "upstream").mkdir()
    made.git("init", "--quiet", "--initial-branch=main")
    made.git("config", "uploadpack.allowAnySHA1InWant", "true")
    made.git("config", "uploadpack.allowFilter", "true")
    real = {name: (REAL / name).read_text() for name in ("main.py", "nodes.py", "folder_paths.py", "comfy/cli_args.py")}
    more = {"requirements.txt": "six\n", "custom_nodes/example": "", "models/configs/v1.yaml": "", "tests/a.py": ""}
    more |= {"manager_requirements.txt": "manager==1\n", "run.bat": "", "comfy/gone.py": ""}
    commit = made.tag("0.30.0", **{name.replace(".", "__"): text for name, text in {**real, **more}.items()})
    made.file("recipes/comfyui/app.toml").write_text(
        APP.replace("URL", made.url).replace('commit = ""', f'commit = "{commit}"')
    )
    made.file("recipes/comfyui/known-bad.toml").write_text(BAD.replace("URL", made.url))
    made.file("config/stacks.toml").write_text(STACKS)
    made.file("pyproject.toml").write_text(PROJECT)
    app = made.file("recipes/comfyui/app.toml")
    app.write_text(app.read_text().replace('tree = ""', f'tree = "{source.pin(application()).tree}"'))
    lockfile.renew(check=False)
    resolution.compile_all(check=False)
    return made


REAL = real_tree()


def test_the_newest_good_release_of_comfyui(own: Checkout) -> None:
    before = own.texts()
    assert own.update("comfyui").moves == []
    assert own.texts() == before
    own.git("rm", "--quiet", "-r", "comfy/gone.py", "models")
    commit = own.tag(
        "0.31.0", requirements__txt="six==2\n", manager_requirements__txt="# a comment\nmanager==2\n", fresh__py="",
        **{"web/a.js": "", ".github": "", "pytest__ini": "", "SECURITY__md": "", 'a "b" c/d': ""},
    )  # fmt: skip
    own.tag("0.31.1", requirements__txt="six\naimdo\n-c limits.txt\n", limits__txt="AimDo==0.4.11\n")
    own.tag("0.32.0", requirements__txt="six\naimdo==0.4.11\n")
    own.tag("0.33.0", requirements__txt="six\n")
    own.tag("0.34.0-rc1")
    own.tag("0.34.0", NEW)
    proposed = own.update("comfyui", cooldown="14d", dry_run=True)
    assert own.texts() == before
    made = own.update("comfyui", cooldown="14d")
    assert made == proposed
    assert [(each.old, each.new, each.date) for each in made.moves] == [("0.30.0", "0.31.0", "2026-01-01")]
    why = {each.split(":")[0]: each for each in made.skipped}
    assert why.keys() == {"ComfyUI 0.34.0", "ComfyUI 0.33.0", "ComfyUI 0.32.0", "ComfyUI 0.31.1"}
    assert "cool-down" in why["ComfyUI 0.34.0"]
    assert "it burns" in why["ComfyUI 0.33.0"]
    assert "aimdo 0.4.11: it hangs" in why["ComfyUI 0.32.0"]
    app, text = application(), own.file("recipes/comfyui/app.toml").read_text()
    assert (app.version, app.manager, app.source[0].commit, len(app.source)) == ("0.31.0", "manager==2", commit, 1)
    assert app.paths == (
        'a "b" c',
        "comfy", "comfyui_version.py", "custom_nodes", "folder_paths.py", "fresh.py", "main.py",
        "nodes.py", "requirements.txt", "web",
    )  # fmt: skip
    assert "# My ComfyUI." in text
    assert f'commit = "{commit}" # v0.31.0, 2026-01-01' in text
    assert "# for --enable-manager" in text
    assert resolution.compile_all(check=True) == []
    found = requirements.find("cu130", "linux_x86_64", "3.11")
    assert found is not None
    assert found.versions().items() >= {"six": "2", "manager": "2", "torch": "2.14.0"}.items()
    assert {each for each, text in own.texts().items() if text != before[each]} == set(made.files)
    assert set(transaction.undo()) == {str(own.file(each)) for each in made.files}
    assert own.texts() == before
    with raises("usage", match="no update to undo"):
        transaction.undo()


def test_a_channel_moves_alone(own: Checkout) -> None:
    before = own.texts()

    def move(channel: str, to: str = "", kept: frozenset[str] = frozenset()) -> Proposal:
        return update.update(Request("comfyui", to, None, channel, kept), dry_run=False)[0]

    assert [each.new for each in move("stable").moves] == ["0.30.0"]
    commit = own.tag("0.31.0", requirements__txt="six==2\n")
    assert [(each.name, each.old, each.new) for each in move("latest").moves] == [
        ("ComfyUI (latest)", "0.30.0", "0.31.0")
    ]
    assert channels() == {"stable": "0.30.0", "latest": "0.31.0"}
    assert (application().version, application("latest").source[0].commit) == ("0.30.0", commit)
    resolution.compile_all(check=True)
    found = requirements.find("cu130", "linux_x86_64", "3.11", application("latest").path)
    assert found is not None
    assert found.versions()["six"] == "2"
    assert move("latest").moves == []
    own.tag("0.32.0", requirements__txt="six\n")
    move("")
    assert application().version == "0.32.0"
    assert application("stable").version == "0.30.0"  # kept, because it is a channel's
    move("", "0.31.0", frozenset({"0.32.0"}))
    assert [*versions()] == ["0.31.0", "0.30.0", "0.32.0"]
    resolution.compile_all(check=True)
    transaction.undo()
    assert application().version == "0.32.0"
    assert [*versions()] == ["0.32.0", "0.30.0", "0.31.0"]
    assert not own.file("recipes/comfyui/versions/0.32.0").exists()
    with raises("unknown-name"):
        move("lates")
    with raises("usage"):
        Request("nodes", channel="latest")
    assert own.texts().keys() > before.keys()


@pytest.mark.parametrize("to", ["", "0.30.0", "0.31.0", "0.32.0"])
def test_a_channel_whose_version_was_deleted_is_repaired(own: Checkout, to: str) -> None:
    own.tag("0.31.0", requirements__txt="six==2\n")
    wanted = Request("comfyui", "", None, "latest")
    update.update(wanted, dry_run=False)
    shutil.rmtree(own.file("recipes/comfyui/versions/0.31.0"))
    with raises("config") as caught:
        application("latest")
    assert caught.value.hint == "inv update comfyui --channel latest"
    own.tag("0.32.0", requirements__txt="six==2\n")
    made, _ = update.update(replace(wanted, to=to), dry_run=False)
    assert made.warnings == []
    assert channels() == {"latest": to or "0.32.0"}
    assert application("latest").version == (to or "0.32.0")
    resolution.compile_all(check=True)
    assert application().version == "0.30.0"


def test_an_older_channel_that_was_deleted_becomes_the_pinned_version(own: Checkout) -> None:
    own.file("recipes/comfyui/channels.toml").write_text('stable = "0.29.0"\n')
    update.update(Request("comfyui", "", None, "stable"), dry_run=False)
    assert channels() == {"stable": "0.30.0"}


def test_requirements_of_a_release_may_be_in_several_files(own: Checkout) -> None:
    more = {"requirements/base__txt": "six\n", "limits__txt": "six<2\n"}
    own.tag("0.31.0", requirements__txt="-r requirements/base.txt\n-c limits.txt\n", **more)
    assert own.moved("comfyui") == {"ComfyUI": "0.31.0"}
    assert {"limits.txt", "requirements"} <= {*application().paths}
    found = requirements.find("cu130", "linux_x86_64", "3.11")
    assert found
    assert found.versions()["six"] == "1"


def test_a_preview_never_prevents_an_update(own: Checkout) -> None:
    own.tag("0.31.0", requirements__txt="six==2\n")

    def look(old: Release, new: Release) -> Preview:
        (name,) = old.packages.keys() & new.packages.keys()
        assert (old.packages[name]["six"], new.packages[name]["six"]) == ("2", "2")
        assert old.tree != new.tree
        return Preview(old=old.version, new=new.version, migrations=("m1",))

    made, _ = update.update(Request("comfyui"), dry_run=True, look=look)
    assert made.preview == Preview(old="0.30.0", new="0.31.0", migrations=("m1",))
    assert any("m1" in line for line in update.rows(made))
    made, _ = update.update(Request("tool"), dry_run=True, look=look)
    assert made.preview is None

    def fail(*_: Release) -> Preview:
        raise ValueError("no way")

    made, _ = update.update(Request("comfyui"), dry_run=False, look=fail)
    assert made.warnings == ["the preview is incomplete: no way"]
    assert application().version == "0.31.0"


def test_a_requested_version(own: Checkout) -> None:
    own.tag("0.33.0", requirements__txt="six\naimdo==0.4.11\n")
    (made,) = own.update("comfyui", "v0.33.0").moves
    assert [each for each in made.notes if "known problem" in each] == [
        "known problem: it burns (https://example.org/2)",
        "known problem: aimdo 0.4.11: it hangs (https://example.org/1)",
    ]
    assert own.moved("comfyui", "0.30.0") == {"ComfyUI": "0.30.0"}
    with raises("unknown-name", match="no tag v0.33.1") as raised:
        own.update("comfyui", "0.33.1")
    assert "'0.33.0'" in raised.value.hint
    with raises("usage"):
        own.update("nodes", "1")
    for part in ("kernels", "comfy"):
        with pytest.raises(HearthError, match=r"kernels|comfy"):
            own.update(part)


def test_what_does_not_fit_changes_nothing(own: Checkout) -> None:
    own.publish("needs", "1", "six<2")
    own.tag("0.31.0")
    own.tag("0.32.0", requirements__txt="six==2\nneeds\n")
    own.tag("0.33.1", requirements__txt="nothing-of-this-name\n")
    before = own.texts()
    with raises("resolution", match="no set of versions") as raised:
        own.update("comfyui")
    assert "nothing-of-this-name" in raised.value.cause
    assert "the newest version that fits: inv update comfyui --to 0.31.0" in raised.value.hint
    assert str(own.root) in raised.value.hint  # not the draft
    with raises("resolution") as raised:
        own.update("comfyui", "0.32.0")
    assert "needs" in raised.value.cause
    assert "inv update comfyui --to 0.31.0" in raised.value.hint
    assert own.texts() == before


def test_tags_that_were_moved_or_deleted(own: Checkout) -> None:
    own.tag("0.31.0")
    own.git("tag", "--force", "v0.30.0")
    with raises("tag-moved"):
        own.update("comfyui", "0.30.0")
    made = own.update("comfyui", dry_run=True)
    assert "the tag v0.30.0 is at commit" in made.warnings[0]
    assert made.moves
    own.git("tag", "--delete", "v0.30.0")
    assert "the tag v0.30.0 of the pinned ComfyUI does not exist" in own.update("comfyui").warnings[0]


def test_what_is_no_comfyui_is_refused(own: Checkout) -> None:
    own.git("rm", "--quiet", "requirements.txt", "nodes.py")
    own.tag("0.31.0")
    before = own.texts()
    with raises("not-comfyui") as raised:
        own.update("comfyui")
    assert raised.value.cause == "it lacks nodes.py, requirements.txt"
    shutil.rmtree(own.place / "upstream")
    with raises("source-unreachable"):
        own.update("comfyui")
    assert own.texts() == before


def test_the_stack_moves_within_its_cuda(own: Checkout) -> None:
    own.publish("torch", "2.14.1", "cuda-toolkit==13.0.3")
    own.publish("torch", "2.14.2", "cuda-toolkit==13.0.3", date=NEW)
    own.publish("torch", "2.15.0", "cuda-toolkit==13.2.2")
    own.publish("torchvision", "0.29.1", "torch==2.14.1")
    own.publish("torchvision", "0.29.2", "torch")
    own.publish("nvidia-cuda-nvcc", "13.0.2")
    with raises("resolution", match=r"torch==2\.15\.0 fits the stack cu130"):
        own.update("stack", "2.15.0")
    made = own.moved("stack", cooldown="14d")
    assert made == {"cu130 torch": "2.14.1", "cu130 torchvision": "0.29.1", "cu130 nvidia-cuda-nvcc": "13.0.2"}
    assert (stack.find_stack().torch, requirements.trio(stack.find_stack())) == (
        "2.14.1", ["torch==2.14.1", "torchvision==0.29.1"],
    )  # fmt: skip
    assert "\"torchvision==0.29.1; sys_platform == 'linux'\", # 0.29.2" in own.file("pyproject.toml").read_text()
    assert '"2.14.1" # the newest' in own.file("config/stacks.toml").read_text()
    lockfile.renew(check=True)
    resolution.compile_all(check=True)
    assert own.moved("stack") == {"cu130 torch": "2.14.2", "cu130 torchvision": "0.29.2"}


def test_the_tool_moves_and_keeps_the_environments(own: Checkout) -> None:
    locks = {name: text for name, text in own.texts().items() if "/locks/" in name}
    for name in ("uv", "invoke"):
        own.publish(name, "1.1")
        own.publish(name, "1.2", date=NEW)
    assert own.moved("tool", cooldown="14d") == {"uv": "1.1", "invoke": "1.1"}
    lockfile.renew(check=True)
    assert "exclude-newer" not in own.file("uv.lock").read_text()
    assert own.moved("tool") == {"uv": "1.2", "invoke": "1.2"}
    assert own.moved("tool", cooldown="14d") == {}  # nothing moves back
    assert {name: text for name, text in own.texts().items() if "/locks/" in name} == locks


def test_edits_are_kept_and_shown(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    own.tag("0.31.0")
    path = own.file("recipes/comfyui/app.toml")
    renew = lockfile.renew

    def edit(*, check: bool) -> None:
        renew(check=check)
        path.write_text("# edited meanwhile\n" + path.read_text())

    with monkeypatch.context() as patch:
        patch.setattr(lockfile, "renew", edit)
        with raises("refused") as raised:
            own.update("comfyui")
    assert "+# edited meanwhile" in raised.value.cause
    assert application().version == "0.30.0"
    own.update("comfyui")
    assert "# edited meanwhile" in path.read_text()
    path.write_text("# mine\n" + path.read_text())
    before = own.texts()
    with raises("refused") as raised:
        transaction.undo()
    assert "+# mine" in raised.value.cause
    assert own.texts() == before


def test_nodes_move_and_a_dead_one_stays(own: Checkout) -> None:
    git = {name: Repository(own.place / name) for name in ("Mine", "Dead")}
    first = {name: each.commit(OLD, requirements="six") for name, each in git.items()}
    for each in git.values():
        node_updates.add(each.url, "a test")
    resolution.compile_all(check=False)
    second = git["Mine"].commit(OLD + timedelta(days=1), requirements="six==2")
    third = git["Mine"].commit(NEW, requirements="six>=1")
    assert own.moved("nodes", cooldown="14d") == {"Mine": second[:9]}
    assert own.moved("nodes", cooldown="14d") == {}
    shutil.rmtree(git["Dead"].place)
    wanted = Request("nodes")
    found, failures = outdated.outdated(wanted)
    assert failures.keys() == {"Dead"}
    assert [(each.pinned, each.newest, each.days) for each in found] == [(second[:9], third[:9], 2)]
    made, failures = update.update(wanted, dry_run=False)
    assert failures.keys() == {"Dead"}
    assert [each.new for each in made.moves] == [third[:9]]
    assert {name: each.commit for name, each in nodes.catalogue().nodes.items()} == {
        "Mine": third,
        "Dead": first["Dead"],
    }
    resolution.compile_all(check=True)
    assert own.moved("comfyui") == {}


def test_an_application_of_ones_own(own: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    app = own.place / "app"
    shutil.copytree(REAL / "comfy", app / "src/comfy", ignore=lambda *_: ["ldm", "text_encoders", "k_diffusion"])
    shutil.copy(REAL / "folder_paths.py", app / "src")
    (app / "src/requirements.txt").write_text("six==1")
    (app / "app.toml").write_text(
        'name = "comfyui"\nversion = "1"\ntree = ""\nextra = []\nsize = 1\nfiles = 1\n[[source]]\nfolder = "src"\n'
    )
    monkeypatch.setenv("HEARTH_APP", str(app))
    mine, before = Repository(own.place / "Mine"), own.texts()
    mine.commit(OLD, requirements="six")
    node_updates.add(mine.url, "a test")
    new = mine.commit(NEW, requirements="six<3")
    assert own.moved("nodes") == {"Mine": new[:9]}
    resolution.compile_all(check=True)
    assert [each.name for each in (app / "locks").iterdir()] == ["cu130-linux_x86_64-cp311.txt"]
    assert own.texts() == before  # the lists of the recipe stay
    with raises("config", match="no git source"):
        own.update("comfyui")
    transaction.undo()
    assert not (app / "locks").exists()
    resolution.compile_all(check=False)


@dataclass
class Repository:
    """A node's repository."""

    place: Path

    @property
    def url(self) -> str:
        return f"file://{self.place}"

    def commit(self, date: datetime, requirements: str) -> str:
        env = {**os.environ, "GIT_COMMITTER_DATE": date.isoformat(), "GIT_AUTHOR_DATE": date.isoformat()}
        git = ["git", "-C", str(self.place), "-c", "user.name=a", "-c", "user.email=a@b"]

        def run(*words: str) -> str:
            return subprocess.run([*git, *words], check=True, capture_output=True, text=True, env=env).stdout.strip()

        if not self.place.exists():
            self.place.mkdir()
            run("init", "--quiet", "--initial-branch=main")
            run("config", "uploadpack.allowAnySHA1InWant", "true")
            run("config", "uploadpack.allowFilter", "true")
        (self.place / "__init__.py").write_text("")
        (self.place / "requirements.txt").write_text(requirements)
        run("add", "-A")
        run("commit", "--quiet", "-m", requirements)
        return run("rev-parse", "HEAD")


def test_outdated_lists_every_part(own: Checkout) -> None:
    own.tag("0.31.0", NEW)
    own.tag("0.32.0", requirements__txt="six\naimdo==0.4.11\n")
    own.publish("torch", "2.14.1", "cuda-toolkit==13.0.3", date=NEW)
    own.publish("torchvision", "0.29.1", "torch==2.14.1")
    own.publish("invoke", "1.1", date=NEW)
    own.publish("invoke", "2.0rc1")
    for name, version in (("one", "1"), ("one", "2"), ("two", "1")):
        own.publish(name, version)
    for name in ("one", "two"):
        recipe = own.file(f"recipes/{name}/recipe.toml")
        recipe.parent.mkdir()
        recipe.write_text(f'name = "{name}"\n[[source]]\nsdist = "{name}"\nversion = "1"\n')
    found, failures = outdated.outdated(Request("all"))
    assert not failures
    assert {(each.part, each.name, each.newest) for each in found if each.newest != each.pinned} == {
        ("comfyui", "ComfyUI", "0.31.0"),
        ("stack", "cu130 torch", "2.14.1"),
        ("stack", "cu130 torchvision", "0.29.1"),
        ("kernels", "one", "2"),
        ("tool", "invoke", "1.1"),
    }
    assert {each.name: each.days for each in found}["ComfyUI"] == 2
    assert "0.32.0: aimdo 0.4.11: it hangs" in next(each.note for each in found if each.name == "ComfyUI")
    assert [*outdated.rows(found, failures)][-1] == "2 up to date, 5 outdated, 0 not examined"
    found, failures = outdated.outdated(Request("all", before=upstream.cutoff("14d")))
    assert {each.name for each in found if each.newest != each.pinned} == {"one"}
    shutil.rmtree(own.place / "upstream")
    shutil.rmtree(own.place / "simple/one")
    found, failures = outdated.outdated(Request("all"))
    assert failures.keys() == {"ComfyUI", "kernel one"}
    assert len(found) == 5


@pytest.mark.parametrize("text", ["14", "d", "-1d", "1w", "99999d", "14d "])
def test_a_cooldown_has_a_unit(text: str) -> None:
    with raises("usage"):
        upstream.cutoff(text)
