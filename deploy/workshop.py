"""Builds kernel wheels natively on a host, as its login and without root, and brings them back."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from core import console, files, lockfile, manifest
from core.errors import HashMismatchError, UsageError
from core.stack import Platform
from deploy import connection, flow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.manifest import Manifest
    from deploy.connection import Ssh

PLACE = ".cache/hearth/workshop"
"""Where it happens, below the login's home: uv, this checkout, a cache and a wheelhouse."""

CHECKOUT = ("tasks", "pyproject.toml", "uv.lock", "README.md", "core", "kernels", "deploy", "config", "recipes")
"""What `inv build-kernels` needs of this checkout."""


def build(name: str, asked: Mapping[str, str], *, force: bool, dry_run: bool) -> list[Manifest]:
    """Run `inv build-kernels` on a host, `asked` its flags with their values; the wheels are in the wheelhouse then.

    Returns their manifests. On a dry run, only what the host says is printed. Raises what connecting raises, and
    RemoteError.
    """
    target = flow.find_target(name)
    if not target.host.address:
        raise UsageError(f"{name} is this machine", hint="leave --host out")
    with connection.connect(target) as agent:
        assert isinstance(agent, connection.Ssh)
        machine = agent.shell("uname -m", console.say).strip()
        platform = Platform.parse(f"linux_{machine}")
        uv = lockfile.install("uv", platform, "3.11") / "bin/uv"
        checkout = _send(agent, uv)
        command = f"cd {checkout} && exec {_environment()} ../uv run --frozen --no-group dev inv build-kernels"
        words = [word for flag, value in asked.items() if value for word in (f"--{flag}", value)]
        words += [*(["--force"] if force else []), "--dry-run" if dry_run else "--json"]
        said = agent.shell(f"{command} {shlex.join(words)}", console.say)
        if dry_run:
            console.data(said.rstrip())
            return []
        found = msgspec.convert(json.loads(said), list[manifest.Manifest])
        for each in found:
            _fetch(agent, each)
    return found


def _environment() -> str:
    return "env HEARTH_CACHE=$HOME/.cache/hearth HEARTH_WHEELHOUSE=$PWD/../wheelhouse HEARTH_RECIPES=$PWD/more-recipes"


def _send(agent: Ssh, uv: Path) -> str:
    """Send uv and the checkout, each where its hash says, when it is not there; return the checkout's folder."""
    archive = _pack()
    digest = hashlib.sha256(archive).hexdigest()[:16]
    place = f"{PLACE}/checkout-{digest}"
    agent.shell(f"mkdir -p {PLACE}", console.say)
    if agent.shell(f"test -x {PLACE}/uv && sha256sum < {PLACE}/uv || true", console.say)[:64] != files.sha256(uv):
        agent.put(uv.read_bytes(), f"{PLACE}/uv.part")
        agent.shell(f"chmod 755 {PLACE}/uv.part && mv {PLACE}/uv.part {PLACE}/uv", console.say)
    if agent.shell(f"test -d {place} && echo there || true", console.say).strip() != "there":
        agent.put(archive, f"{place}.tar.gz")
        unpack = f"rm -rf {place}.part && mkdir {place}.part && tar -C {place}.part -xzf {place}.tar.gz"
        agent.shell(f"{unpack} && rm {place}.tar.gz && mv {place}.part {place}", console.say)
    return place


def _pack() -> bytes:
    """The checkout and the folders of $HEARTH_RECIPES as one archive; the user's hosts stay here."""
    buffer = io.BytesIO()
    extra = [Path(each) for each in os.environ.get("HEARTH_RECIPES", "").split(os.pathsep) if each]
    trees = [(files.CHECKOUT / each, each) for each in CHECKOUT]
    recipes = [file.parent for folder in extra for file in folder.glob("*/recipe.toml")]
    trees += [(recipe, f"more-recipes/{recipe.name}") for recipe in recipes]

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name or info.name == "config/hosts.toml":
            return None
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for path, name in trees:
            tar.add(path, name, filter=wanted)
    return buffer.getvalue()


def _fetch(agent: Ssh, wheel: Manifest) -> None:
    """Bring one wheel home, into the wheelhouse."""
    with tempfile.TemporaryDirectory(prefix="hearth-") as folder:
        place = Path(folder) / wheel.file
        agent.get(f"{PLACE}/wheelhouse/{wheel.file}", place)
        if files.sha256(place) != wheel.sha256:
            raise HashMismatchError(f"{wheel.file} was altered on the way", hint="run the same command again")
        manifest.admit(place, wheel)
