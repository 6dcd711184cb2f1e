"""A booted machine with a client's configuration for it, and methods to inspect and break it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from agent.parts import damage_of
from core import files, source, workspace
from lock.application import application
from tests.client import Client
from tests.host.machine import Machine, clear, free_port, mounted_below, place_for

PREFIX = "/opt/comfyui"

SOONER = 'override.flags."--disable-api-nodes" = { why = "a start takes a sixth less CPU time" }\n'
"""A line of a host's table in hosts.toml."""


@dataclass
class Fleet(Client):
    """A machine, a client's configuration for it, and modified ComfyUIs to deploy."""

    machine: Machine
    place: Path
    env: dict[str, str] = field(default_factory=dict)
    default: str | None = ""
    """The application in service, as configured by default; empty: ComfyUI. None: any release is, or nothing."""

    def configure(self, text: str = "", profile: str = "cpu") -> None:
        """Write hosts.toml: the host `spark`, then `text`. ComfyUI starts sooner, unless the text has overrides."""
        quick = "" if "override" in text else SOONER
        (self.place / "hosts.toml").write_text(
            f'[hosts.spark]\naddress = "spark"\nprofile = "{profile}"\nport = {self.machine.port}\n{quick}{text}'
        )

    def variables(self) -> dict[str, str]:
        own = {
            "HEARTH_HOSTS": str(self.place / "hosts.toml"),
            "HEARTH_SSH_CONFIG": str(self.machine.place / "ssh_config"),
            "HEARTH_WHEELHOUSE": str(self.place / "wheelhouse"),
        }
        return {**own, **self.env}

    def facts(self) -> dict[str, Any]:
        found = json.loads(self.inv("facts", "--host", "spark", "--json").stdout)
        assert isinstance(found, dict)
        return found

    def deploy(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.inv("deploy", "--host", "spark", *words, **env)

    def becomes(self, text: str = "", *words: str) -> subprocess.CompletedProcess[str]:
        """Configure, and deploy without a trial, which takes as long as the rest; the deploy must succeed."""
        self.configure(text)
        done = self.deploy("--no-trial", *words)
        assert done.returncode == 0, done.stderr
        return done

    def run_by_default(self, app: str) -> Fleet:
        """Deploy this application with no further configuration, unless it is in service."""
        if self.default != app:
            self.env["HEARTH_APP"] = app
            self.becomes()
            self.default = app
        return self

    @property
    def prefix(self) -> Path:
        """The prefix, as a path outside the machine."""
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
        """Create a modified ComfyUI (see `modified`); returns the app.toml's folder."""
        return modified(self.place / name, edits)

    def records(self) -> set[str]:
        """Files in state/ that a finished run must not leave: the current run, and data for a revert."""
        kept = {"pending.json", "cut-over.json", "reserve", "trial"} & {
            path.name for path in (self.prefix / "state").iterdir()
        }
        places = [
            *(self.prefix / "state").glob("database-*"),
            *(self.prefix / "state").glob(".*"),
            *self.prefix.glob(".*"),
        ]
        return kept | {path.name for path in places}

    def database(self) -> set[str]:
        """The tables of ComfyUI's database and its migration revision; the database must be intact."""
        with closing(sqlite3.connect(f"file:{self.prefix}/data/user/comfyui.db?mode=ro", uri=True)) as database:
            assert [*database.execute("pragma integrity_check")] == [("ok",)]
            tables = {name for (name,) in database.execute("select name from sqlite_master")}
            return tables | {revision for (revision,) in database.execute("select version_num from alembic_version")}

    def data(self) -> dict[str, str]:
        """The SHA-256 of the user files in data/: without ComfyUI's database, log, temporary files and caches."""
        root = self.prefix / "data"
        own = re.compile(r"(temp|cache)/|user/comfyui")
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*")
            if path.is_file() and not own.match(name := str(path.relative_to(root)))
        }


def modified(folder: Path, edits: dict[str, tuple[str, str]]) -> Path:
    """Create a modified ComfyUI, the pinned tree with patterns replaced, as an app.toml with its source in a folder."""
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


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait for the condition; returns whether it held in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def taken_port(machine: Machine) -> Iterator[tuple[int, str]]:
    """A port that another program on the machine serves, and its process id."""
    port = free_port()
    pid = machine.run(f"sh -c 'python3 -m http.server {port} --bind 127.0.0.1 >/dev/null 2>&1 & echo $!'").strip()

    def serves() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert within(60, serves)
        yield port, pid
    finally:
        machine.run(f"kill {pid}")


@contextmanager
def unchanged(fleet: Fleet) -> Iterator[None]:
    """Afterwards return to the release and data from before, by a deploy, which leaves nothing to do or fails."""
    release, data = fleet.current(), fleet.data()
    yield
    fleet.becomes()
    assert fleet.current() == release
    assert fleet.data() == data


F = TypeVar("F", bound=Fleet)


@contextmanager
def fresh(
    folder: Path,
    name: str,
    kind: type[F],
    prefix: str = PREFIX,
    *,
    bare: bool = False,
    place: Path | None = None,
    **machine: Any,
) -> Iterator[F]:
    """A fleet with its own machine, not booted yet and discarded at the end.

    The environment is there already (see `environment`), unless the machine is `bare`.
    """
    layers = () if bare else (environment(),)
    fleet = kind(Machine(place or place_for(name), prefix=prefix, layers=layers, **machine), folder)
    fleet.configure()
    try:
        yield fleet
    finally:
        fleet.machine.discard()


MAKERS = ("agent/parts.py", "agent/change/env.py", "agent/change/trees.py", "deploy/selection.py", "uv.lock")
"""The code that makes an environment. Its name is a hash of all else that it consists of."""


@functools.cache
def environment() -> Path:
    """An overlay layer with the environment of a real first deploy, for all machines: 60,000 files.

    One is kept on this machine, as long as it is intact and neither the locks nor the code that makes it change.
    """
    hosts, locks = workspace.current().cache / "hosts", (files.CHECKOUT / "recipes/comfyui/locks").glob("*.txt")
    names = [*MAKERS, *(str(path.relative_to(files.CHECKOUT)) for path in locks)]
    place = hosts / f"environment-{files.tree_hash(files.CHECKOUT, names)[:16]}"
    with files.locked(hosts / "environment.lock", lambda: None):
        made = [*place.glob("opt/*/parts/env-*")]
        if not made or any(damage_of(each) for each in made):
            if place.exists():
                clear(place)
            for stale in hosts.glob("environment-*"):
                # Another checkout's tests may be about to mount theirs.
                old = time.time() - stale.stat().st_mtime > 86400
                if old and str(stale) not in Path("/proc/mounts").read_text():
                    clear(stale)
            with files.atomic_dir(place) as part:
                _deploy_first(part)
    return place


def _deploy_first(layer: Path) -> None:
    """Deploy to a new machine, and move the environment to this folder."""
    with TemporaryDirectory() as folder, fresh(Path(folder), "first", Fleet, bare=True, downloads=True) as first:
        first.machine.boot()
        done = first.deploy()
        assert done.returncode == 0, done.stderr
        assert "-> make env-" in done.stderr
        first.machine.power_off()
        for point in mounted_below(first.machine.place):
            subprocess.run(["umount", str(point)], check=True)
        parts = f"{PREFIX.lstrip('/')}/parts"
        (layer / parts).mkdir(parents=True)
        for made in (first.machine.disk / "upper" / parts).glob("env-*"):
            made.rename(layer / parts / made.name)


def link_environment(prefix: Path) -> None:
    """Give a prefix on the file system of uv's cache that environment, by hard links."""
    (prefix / "parts").mkdir(parents=True)
    for made in (environment() / PREFIX.lstrip("/") / "parts").iterdir():
        subprocess.run(["cp", "-al", str(made), str(prefix / "parts")], check=True)
