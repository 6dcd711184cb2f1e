"""A Python of another CPU: qemu's user mode over a small tree of Debian packages. Needs no root.

The tree holds an interpreter and the C and C++ libraries; torch and the wheel come from elsewhere. It is made
from the distribution's own package sources, so it exists for the Python version that the distribution has.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from core import console, files, shell
from core.stack import Platform

_DEBIAN = {Platform.LINUX_AARCH64: "arm64", Platform.LINUX_X86_64: "amd64"}


@dataclass(frozen=True)
class Runner:
    """How to start a Python: the words before its arguments, its environment, and a name for people."""

    argv: tuple[str, ...]
    env: dict[str, str]
    label: str


def runner(platform: Platform, python: str) -> Runner | str:
    """A Python of `platform` under emulation, or the reason why there is none."""
    qemu = shell.which(f"qemu-{platform.cpu}-static") or shell.which(f"qemu-{platform.cpu}")
    if qemu is None:
        return f"no emulator for {platform.cpu} here (apt-get install qemu-user-static)"
    root = _root(platform, python)
    if isinstance(root, str):
        return root
    # -L makes the guest find its own loader, libraries and standard library first.
    argv = (qemu, "-L", str(root), str(root / f"usr/bin/python{python}"))
    return Runner(argv, {"PYTHONHOME": str(root / "usr")}, f"under {Path(qemu).name}")


def _root(platform: Platform, python: str) -> Path | str:
    place = files.cache() / "emulation" / f"{platform.cpu}-python{python}"
    if place.is_dir():
        return place
    if not shell.which("apt-get") or not shell.which("dpkg-deb"):
        return f"no {platform.cpu} Python {python} here: it is made from Debian packages, and there is no apt-get"
    console.say(
        f"fetching a {platform.cpu} Python {python} from the distribution's packages, to import under emulation"
    )
    part = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    archives = part / "apt/archives"
    for folder in (archives / "partial", part / "apt/lists/partial"):
        folder.mkdir(parents=True)
    (part / "apt/status").touch()
    architecture = _DEBIAN[platform]
    # apt with a state of its own: nothing is installed there, so it downloads the package with all it needs.
    apt = [
        *(
            "apt-get",
            "-qq",
            "-y",
            "-o",
            f"Dir::State={part}/apt",
            "-o",
            f"Dir::State::status={part}/apt/status",
        ),
        *("-o", f"Dir::State::Lists={part}/apt/lists", "-o", f"Dir::Cache={part}/apt"),
        *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
        *("-o", "APT::Sandbox::User="),
    ]
    try:
        shell.run([*apt, "update"], check=False)  # a source without this architecture is no reason to stop
        wanted = [f"python{python}", "libstdc++6"]
        done = shell.run([*apt, "install", "--download-only", "--no-install-recommends", *wanted], check=False)
        packages = sorted(archives.glob("*.deb"))
        if done.returncode or not packages:
            return f"the distribution has no {architecture} package python{python}"
        tree = part / "root"
        for package in packages:
            shell.run(["dpkg-deb", "-x", package, tree])
        tree.rename(place)
        return place
    finally:
        shutil.rmtree(part, ignore_errors=True)
