"""uv.lock: the pinned requirements of an extra, and its installation in the cache."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING

import tomli

from core import console, files, shell, tools, workspace
from core.errors import LockError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from core.shell import Done
    from core.stack import Platform


def renew(*, check: bool) -> None:
    """Resolve uv.lock again; `check` changes nothing. Raises LockError."""
    done = tools.uv("lock", *(["--check"] if check else []), cwd=workspace.current().checkout, check=False)
    if done.returncode and check:
        raise LockError("lock-stale", "uv.lock is stale", cause=shell.last_words(done, 1), hint="run inv lock")
    _resolved(done)


def _resolved(done: Done) -> None:
    if done.returncode:
        cause, hint = shell.last_words(done, 20), "change the requirements in pyproject.toml"
        raise LockError("resolution", "uv.lock could not be resolved", cause=cause, hint=hint)


def upgrade(names: Sequence[str], newest: str) -> None:
    """Resolve uv.lock again with newer versions of these packages; raises LockError.

    Only versions uploaded until `newest` (RFC 3339; empty: now) count. A package whose locked version is younger stays.
    """
    path = workspace.current().checkout / "uv.lock"
    before = path.read_text()
    times = {
        each["name"]: file.get("upload-time", "")
        for each in tomli.loads(before)["package"]
        for file in each.get("wheels", [])[:1]
    }
    chosen = [name for name in names if not newest or times.get(name, "") <= newest]
    words = [word for name in chosen for word in ("--upgrade-package", name)]
    words += [word for name in chosen if newest for word in ("--exclude-newer-package", f"{name}={newest}")]
    _resolved(tools.uv("lock", *words, cwd=path.parent, check=False))
    if newest and "[options" not in before:  # uv records the limit, and would resolve again without it
        text = re.sub(r"^\[options\.exclude-newer-package\]\n(.+\n)+\n", "", path.read_text(), flags=re.MULTILINE)
        files.write(path, re.sub(r"^\[options\]\n\n*", "", text, flags=re.MULTILINE))


def versions() -> dict[str, str]:
    """The locked versions of every package in uv.lock; several are separated by commas."""
    found: dict[str, list[str]] = {}
    for each in tomli.loads((workspace.current().checkout / "uv.lock").read_text())["package"]:
        found.setdefault(each["name"], []).append(each.get("version", ""))
    return {name: ", ".join(sorted(each)) for name, each in found.items()}


def requirements(extra: str) -> list[str]:
    """The locked requirements of an extra, one string each with its hashes, as `uv export` writes them.

    They are cached by the hash of uv.lock, because uv takes 0.1 s to export them.
    """
    kept = exported(extra)
    if not kept.exists():
        words = ["export", "--quiet", "--frozen", "--no-default-groups", "--no-emit-project", "--no-header"]
        text = tools.uv(*words, "--no-annotate", "--extra", extra, cwd=workspace.current().checkout).stdout
        files.write(kept, text.replace(" \\\n", ""))
    return kept.read_text().splitlines()


def exported(extra: str) -> Path:
    """The cached file with the locked requirements of an extra."""
    here = workspace.current()
    return here.cache / "exports" / f"{extra}-{files.sha256(here.checkout / 'uv.lock')[:16]}.txt"


def place(extra: str, platform: Platform, python: str, pinned: Sequence[str] = ()) -> Path:
    """The cache folder of an extra, or of `pinned` ones of its requirements, for a platform and Python.

    It exists if they are installed.
    """
    digest = hashlib.sha256(json.dumps([*(pinned or requirements(extra))]).encode()).hexdigest()
    name = f"{extra}-{platform.cpu}-cp{python.replace('.', '')}-{digest[:12]}"
    return workspace.current().cache / "installed" / name


def install(
    extra: str,
    platform: Platform,
    python: str,
    *,
    pinned: Sequence[str] = (),
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Install a locked extra for a platform and Python into its own cache folder, in one rename.

    `pinned` are those of its requirements to install (default: all). `finish` completes the folder before the rename.
    """
    folder = place(extra, platform, python, pinned)
    if folder.is_dir():
        return folder
    pinned = pinned or requirements(extra)
    console.say(f"installing {extra} (packages: {len(pinned)}) for {platform.value}, Python {python}, into the cache")
    with files.atomic_dir(folder) as part:
        install_into(part, platform, python, pinned)
        if finish is not None:
            finish(part)
    return folder


def install_into(folder: Path, platform: Platform, python: str, pinned: Sequence[str]) -> None:
    """Install requirements with their hashes into a folder, for a platform and Python; nothing of them runs."""
    words = ["pip", "install", "--quiet", "--only-binary", ":all:", "--no-deps", "--require-hashes"]
    words += ["--target", str(folder), "--python-version", python, "--python-platform", platform.uv_name]
    words += ["--python", sys.executable]  # uv reads its paths; without one it looks for any in the current folder
    tools.uv(*words, "--requirements", "-", input_text="\n".join(pinned) + "\n")
