"""A checkout of its own for `inv update`: with a repository of tags, and an index of tiny packages with dates."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from core import files, lockfile, source
from lock import advisory, resolution
from lock.application import application
from lock.updates import update, upstream
from lock.updates.proposal import Proposal, Request
from tests.comfyui import tree as real_tree

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


@dataclass
class Checkout:
    """A checkout with a ComfyUI, a repository of its tags, and an index that says when a package was uploaded."""

    place: Path
    uploads: dict[str, datetime] = field(default_factory=dict)
    connections: int = 0
    ranges: bool = True
    """Whether the index sends parts of files."""

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
        paths = [each for each in self.root.rglob("*") if each.is_file() and not {".git", ".update"} & {*each.parts}]
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
        protocol_version = "HTTP/1.1"  # keeps connections

        def setup(self) -> None:
            super().setup()
            made.connections += 1

        def do_GET(self) -> None:
            name, _, file = self.path.removeprefix("/simple/").partition("/")
            path = tmp_path / "simple" / name / file
            page = made.listing(name)
            content = path.read_bytes() if file and path.is_file() else json.dumps(page).encode()
            whole, start = len(content), 0
            part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "") if made.ranges and file else "")
            if part:
                start = int(part[1]) if part[1] else max(0, whole - int(part[2]))
                content = content[start : int(part[2]) + 1 if part[1] and part[2] else whole]
            self.send_response(206 if part else 200 if page else 404)
            if part:
                self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{whole}")
            self.send_header(
                "Content-Type", "application/octet-stream" if file else "application/vnd.pypi.simple.v1+json"
            )
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                with suppress(ConnectionError):  # uv has read enough
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
    names = ("main.py", "nodes.py", "folder_paths.py", "comfy/cli_args.py")
    real = {name: (real_tree() / name).read_text() for name in names}  # from the user's cache
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
