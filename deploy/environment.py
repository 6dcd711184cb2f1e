"""The locked environments of ComfyUI: one hash-locked list per stack, platform and Python."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core import console, files, lockfile, shell, source
from core.errors import LockStaleError
from core.stack import Platform, stacks
from deploy.application import application

if TYPE_CHECKING:
    from pathlib import Path

    from core.stack import Stack
    from deploy.application import Application

TRIO = ("torch", "torchvision", "torchaudio")


@dataclass(frozen=True)
class Lock:
    """One locked list: what it is for, and its text, a requirement with hashes per line (pip's format)."""

    stack: str
    platform: str
    python: str
    text: str

    @property
    def name(self) -> str:
        """The list's file name without the ending."""
        return f"{self.stack}-{self.platform}-cp{self.python.replace('.', '')}"


def folder() -> Path:
    """Where the lists are kept."""
    return files.CHECKOUT / "recipes/comfyui/locks"


def combinations() -> list[tuple[Stack, Platform, str]]:
    """Every stack, platform and Python that a list is made for."""
    return [
        (stack, Platform.parse(platform), python)
        for stack in stacks().values()
        for platform in stack.platforms
        for python in stack.pythons
    ]


def find(stack: str, platform: str, python: str) -> Lock | None:
    """The locked list for a combination; None where there is none."""
    lock = Lock(stack, platform, python, "")
    path = folder() / f"{lock.name}.txt"
    return Lock(stack, platform, python, path.read_text()) if path.exists() else None


def trio(stack: Stack) -> list[str]:
    """The stack's torch, torchvision and torchaudio, exactly as `uv.lock` pins them."""
    pinned = [line.split()[0] for line in lockfile.requirements(stack.name)]
    return [each for each in pinned if each.partition("==")[0] in TRIO]


def compile_all(*, check: bool) -> list[str]:
    """Compile every list whose inputs changed and return their names; with `check` raise LockStaleError instead.

    A list's first line names the hash of its inputs, so that checking needs no network.
    """
    app = application()
    stale: list[str] = []
    for stack, platform, python in combinations():
        lock = Lock(stack.name, platform.value, python, "")
        path = folder() / f"{lock.name}.txt"
        first = f"# Compiled by `inv lock` from inputs {_inputs(app, stack)}; do not edit.\n"
        if path.exists() and path.read_text().startswith(first):
            continue
        stale.append(lock.name)
        if not check:
            files.write(path, first + _compile(app, stack, platform, python, path))
    if check and stale:
        raise LockStaleError(
            f"the environments of ComfyUI are stale: {', '.join(stale)}",
            cause="ComfyUI's version, the stack's torch or the extra packages changed since they were compiled",
            hint="inv lock",
        )
    return stale


def download(lock: Lock, platform: Platform) -> Path:
    """Every wheel of a list, in a folder of the cache: for a host that cannot fetch them itself."""
    digest = hashlib.sha256(lock.text.encode()).hexdigest()[:16]
    place = files.cache() / "wheels" / f"{lock.name}-{digest}"
    if place.is_dir():
        return place
    console.say(f"downloading the packages of {lock.name}")
    tag = lock.name.rpartition("-")[2]
    with files.whole(place) as part:
        listed = part / "requirements.txt"
        listed.write_text(lock.text)
        words: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
        words += ["--dest", part]
        words += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", lock.python]
        # pip takes tags literally: an older manylinux is not implied by a newer one.
        tags = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
        words += [word for each in [*tags, "linux"] for word in ("--platform", f"{each}_{platform.cpu}")]
        words += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
        shell.run([*words, "--requirement", listed])
        listed.unlink()
    return place


def _inputs(app: Application, stack: Stack) -> str:
    """The hash of everything that decides a list."""
    return hashlib.sha256(json.dumps([app.tree, app.extra, trio(stack)]).encode()).hexdigest()[:16]


def _compile(app: Application, stack: Stack, platform: Platform, python: str, path: Path) -> str:
    """Resolve one list. What is pinned already stays where it can."""
    requirements = source.fetch(app) / "requirements.txt"
    words = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
    words += ["--only-binary", ":all:", "--python-version", python, "--python-platform", platform.uv_name]
    extra = "\n".join([*trio(stack), *app.extra]) + "\n"
    old = ["--constraints", str(path)] if path.exists() else []
    done = shell.run([*words, *old, str(requirements), "-"], input_text=extra, check=False)
    if done.returncode and old:  # what was pinned does not fit any more
        done = shell.run([*words, str(requirements), "-"], input_text=extra)
    return done.stdout
