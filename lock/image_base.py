"""The base of container images: locked Debian packages (`recipes/image`), unpacked without root, for any platform.

`base.lock` pins each package by version and SHA-256, so that the base has the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from pathlib import Path
from urllib.parse import unquote

import msgspec

from core import console, debian, files, shell, tools, workspace
from core.config import load
from core.errors import LockError, SourceError
from core.stack import Platform

GROUPS = ("base", "compiler")
USER = 1000
"""The uid and gid of ComfyUI in images."""

VERSION = 1
"""Increase it when the same packages become other files."""

_ACCOUNTS = {
    "etc/passwd": f"root:x:0:0::/root:/bin/sh\ncomfyui:x:{USER}:{USER}::/:/bin/sh\n",
    "etc/group": f"root:x:0:\ncomfyui:x:{USER}:\n",
}


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`base.toml`: the Python of images, the versions of the C and C++ libraries, and groups of Debian packages."""

    python: str
    glibc: str
    glibcxx: str
    cxxabi: str
    packages: dict[str, tuple[str, ...]]


def _folder() -> Path:
    """The folder of base.toml and base.lock: $HEARTH_IMAGE_BASE, else `recipes/image`."""
    here = workspace.current()
    own = None if here.bundled else os.environ.get("HEARTH_IMAGE_BASE")
    return Path(own or here.checkout / "recipes/image").absolute()


def recipe() -> list[Path]:
    """The files that describe the base; empty in a bundle without one."""
    return [path for name in ("base.toml", "base.lock") if (path := _folder() / name).exists()]


def base() -> Base:
    """The description of the base."""
    return load(_folder() / "base.toml", Base)


def locked(platform: Platform, group: str) -> dict[str, tuple[str, str]]:
    """The version and SHA-256 of each package of a group; raises LockError if the group is not locked."""
    rows = (line.split() for line in (_folder() / "base.lock").read_text().splitlines() if not line.startswith("#"))
    found = {name: (version, digest) for *where, name, version, digest in rows if where == [platform.value, group]}
    if not found:
        what = f"{_folder() / 'base.lock'} has no packages of {group} for {platform.value}"
        raise LockError("lock-stale", what, hint="inv image --renew-base")
    return found


def renew() -> tuple[int, Path]:
    """Resolve the packages of all groups again, for all platforms; return the number of packages and the lock.

    Raises SourceError if they cannot be downloaded.
    """
    rows = []
    for platform in Platform:
        known: set[str] = set()
        for group in GROUPS:
            console.say(f"resolving the Debian packages of {group} for {platform.value}")
            with tempfile.TemporaryDirectory() as scratch:
                names = [name for each in GROUPS[: GROUPS.index(group) + 1] for name in base().packages[each]]
                for name, (version, path) in _download(platform, names, Path(scratch)).items():
                    if name not in known:
                        rows.append(f"{platform.value} {group} {name} {version} {files.sha256(path)}\n")
                        known.add(name)
    head = "# Written by inv image --renew-base: platform, group, package, version, SHA-256.\n"
    path = _folder() / "base.lock"
    files.write(path, head + "".join(sorted(rows)))
    return len(rows), path


def _download(platform: Platform, names: list[str], scratch: Path) -> dict[str, tuple[str, Path]]:
    """Download packages with their dependencies: version and file by name."""
    done = debian.download(platform, names, scratch / "apt")
    if done.returncode:
        cause = shell.last_words(done, 3)
        other = "with another system's sources, set HEARTH_DEBIAN_SOURCES to a sources.list of Debian 12"
        if re.search(r"was not found|Unable to locate|unmet dependencies", done.stderr):
            what = f"this machine's package sources lack locked Debian packages for {platform.value}"
            hint = f"inv image --renew-base locks the current versions; {other}"
            raise LockError("lock-stale", what, cause=cause, hint=hint)
        what = f"the Debian packages for {platform.value} could not be downloaded"
        raise SourceError("source-unreachable", what, cause=cause, hint=f"check apt-get update; {other}")
    found = {}
    for path in sorted((scratch / "apt/archives").glob("*.deb")):
        name, version, _ = path.stem.split("_")
        found[name] = unquote(version), path
    return found


def tree(platform: Platform, group: str) -> Path:
    """The unpacked packages of a group, in the cache; downloaded if necessary.

    Raises LockError, or SourceError.
    """
    packages = locked(platform, group)
    digest = hashlib.sha256(repr((VERSION, sorted(packages.items()))).encode()).hexdigest()[:12]
    place = workspace.current().cache / "installed" / f"debian-{platform.cpu}-{group}-{digest}"
    if place.is_dir():
        return place
    console.say(f"fetching the Debian packages of an image's {group} for {platform.value}")
    with files.atomic_dir(place) as part, tempfile.TemporaryDirectory() as scratch:
        pinned = {**(locked(platform, "base") if group != "base" else {}), **packages}
        found = _download(platform, [f"{name}={version}" for name, (version, _) in pinned.items()], Path(scratch))
        for name, (_, digest) in packages.items():
            path = found[name][1]
            if files.sha256(path) != digest:
                raise SourceError("hash-mismatch", f"{path.name} does not have its locked hash", hint="try again later")
            tools.build("dpkg-deb", "-x", path, part)
        if group == "base":
            _complete(part)
            compile_all(part, "/", part if platform is Platform.local() else None)
    return place


def _complete(root: Path) -> None:
    """Do what the packages' own scripts would: the file of all CAs, the accounts, a cache of libraries.

    The cache is empty, and the NVIDIA container toolkit replaces it. Triton calls `ldconfig -p`, which needs one.
    """
    (root / "etc/ld.so.cache").write_bytes(struct.pack("<20sIIB19x", b"glibc-ld.so.cache1.1", 0, 0, 2))
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_bytes(b"".join(path.read_bytes() for path in sorted(root.glob("usr/share/ca-certificates/*/*.crt"))))
    for name, text in _ACCOUNTS.items():
        (root / name).write_text(text)
    for folder in ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale"):
        for path in root.glob(f"{folder}/*"):
            if path.is_dir() and not path.is_symlink():  # licences stay
                for inner in [each for each in path.rglob("*") if each.name != "copyright" and not each.is_dir()]:
                    inner.unlink()


def compile_all(folder: Path, place: str, root: Path | None = None) -> None:
    """Compile the Python files of a folder that an image has at `place`, for the base's Python.

    Bytecode is the same on every CPU, so this machine's build of that Python compiles it (`root`; default: the base
    for this machine). It ignores times, which a layer does not keep, and files that are not valid Python.
    """
    root = root or tree(Platform.local(), "base")
    (loader,) = [*root.glob("lib64/ld-linux-*.so.2"), *root.glob("lib/ld-linux-*.so.1")]
    libraries = ":".join(str(path) for each in ("lib", "usr/lib") for path in root.glob(f"{each}/*-linux-gnu"))
    python: list[str | Path] = [
        loader,
        "--library-path",
        libraries,
        root / f"usr/bin/python{base().python}",
        "-s",
        "-S",
    ]
    words = ["-m", "compileall", "-q", "-f", "-j", str(os.cpu_count() or 1), "--invalidation-mode", "unchecked-hash"]
    env = {"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0"}
    tools.build(*python, *words, "-s", folder, "-p", place, folder, env=env, check=False)
