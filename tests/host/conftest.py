"""One booted Debian with ComfyUI deployed to it, for all host tests; and the ways to look at it and break it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import files, source
from deploy.application import application
from tests.host import machine
from tests.host.machine import Machine

PREFIX = "/opt/comfyui"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="every interruption at every step and many random times")
    parser.addoption("--spark", action="store_true", help="a deploy to an emulated arm64 host")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in ("faults", "spark") if not config.getoption(f"--{name}", default=False)]
    items[:] = [item for item in items if not any(item.get_closest_marker(name) for name in left_out)]


@dataclass
class Fleet:
    """A machine, a client's configuration for it, and ComfyUIs of one's own to deploy."""

    machine: Machine
    place: Path
    env: dict[str, str] = field(default_factory=dict)
    patience: float = 600

    def configure(self, text: str = "", profile: str = "cpu") -> None:
        """Write hosts.toml: the host `spark`, and `text` after it."""
        (self.place / "hosts.toml").write_text(
            f'[hosts.spark]\naddress = "spark"\nprofile = "{profile}"\nport = {self.machine.port}\n{text}'
        )

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "invoke", *words]

    def environment(self, **env: str) -> dict[str, str]:
        import os

        own = {
            "HEARTH_HOSTS": str(self.place / "hosts.toml"),
            "HEARTH_SSH_CONFIG": str(self.machine.place / "ssh_config"),
            "HEARTH_WHEELHOUSE": str(self.place / "wheelhouse"),
        }
        return {**os.environ, **own, **self.env, **env}

    def inv(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=files.CHECKOUT,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.patience,
            check=False,
        )

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=files.CHECKOUT,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def deploy(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.inv("deploy", "--host", "spark", *words, **env)

    @property
    def prefix(self) -> Path:
        """The prefix, as seen from outside the machine."""
        return self.machine.root / PREFIX.lstrip("/")

    def current(self) -> str:
        return (self.prefix / "current").readlink().name

    def ask(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.machine.port}{path}", timeout=5) as answer:
            found = json.load(answer)
        assert isinstance(found, dict)
        return found

    def answers(self, within: float = 60) -> bool:
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                return bool(self.ask("/system_stats"))
            except OSError:
                time.sleep(0.2)
        return False

    def comfyui(self, name: str, edits: dict[str, tuple[str, str]]) -> Path:
        """A ComfyUI of one's own: the pinned tree with, in some files, a pattern replaced; its app.toml's folder."""
        folder = self.place / "apps" / name
        shutil.copytree(source.fetch(application()), folder / "src")
        text = (files.CHECKOUT / "recipes/comfyui/app.toml").read_text().partition("[[source]]")[0]
        text = re.sub(r"paths = \[.*?\]\n", "", text, flags=re.DOTALL)
        (folder / "app.toml").write_text(text + '[[source]]\nfolder = "src"\n')
        for file, (pattern, replacement) in edits.items():
            path = folder / "src" / file
            changed, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
            assert count == 1
            path.write_text(changed)
        return folder

    def data(self) -> dict[str, str]:
        """The SHA-256 of what users keep in data/: all but ComfyUI's own database, log, temporary files and caches."""
        root = self.prefix / "data"
        own = re.compile(r"(temp|cache)/|user/comfyui")
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
            if path.is_file() and not own.match(name := str(path.relative_to(root)))
        }


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The machine, booted; nothing is deployed yet."""
    if not machine.possible():
        pytest.skip("needs root, systemd-nspawn, debootstrap and ssh-keygen")
    # Not in pytest's folder: the overlay must be on the file system of uv's cache, to share it by hard links.
    place = files.cache() / "hosts/running" / tmp_path_factory.getbasetemp().name
    shutil.rmtree(place, ignore_errors=True)
    one = Machine(place, prefix=PREFIX)
    try:
        one.add_disk("blocks", "80M")
        one.add_disk("inodes", "2G", "-N", "300")
        one.boot()
        fleet = Fleet(one, tmp_path_factory.mktemp("fleet"))
        fleet.configure()
        yield fleet
    finally:
        one.discard()


@pytest.fixture(scope="session")
def deployed(fleet: Fleet) -> Fleet:
    """ComfyUI on it, with some files of users in data/."""
    done = fleet.deploy("--json")
    assert done.returncode == 0, done.stderr
    for name, text in (("models/checkpoints/one.safetensors", "weights"), ("output/picture.png", "art")):
        path = fleet.prefix / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return fleet


@pytest.fixture
def steady(deployed: Fleet) -> Iterator[Fleet]:
    """The deployed machine; afterwards it must be as before, and a deploy must find nothing to do."""
    release, data = deployed.current(), deployed.data()
    yield deployed
    deployed.configure()
    done = deployed.deploy()
    assert done.returncode == 0, done.stderr
    assert deployed.current() == release
    assert deployed.data() == data
    again = deployed.deploy("--dry-run")
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr
