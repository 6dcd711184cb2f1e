"""A Python of another CPU: qemu's user mode over a small tree of Debian packages. Needs no root.

The tree holds an interpreter and the C and C++ libraries; torch and the wheel come from elsewhere. It is made
from the distribution's own package sources, so it exists for the Python version that the distribution has.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from core import console, files, shell, workspace
from core.errors import ProcessError, ToolError
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
    try:
        root = _root(platform, python)
    except (ProcessError, ToolError) as error:
        if error.kind not in ("process", "program-missing"):
            raise
        return f"no {platform.cpu} Python {python} to emulate: {error.what}"
    # -L makes the guest find its own loader, libraries and standard library first.
    argv = (qemu, "-L", str(root), str(root / f"usr/bin/python{python}"))
    return Runner(argv, {"PYTHONHOME": str(root / "usr")}, f"under {Path(qemu).name}")


def _root(platform: Platform, python: str) -> Path:
    """The tree with that Python; raises ProcessError or ToolError where it cannot be made."""
    place = workspace.current().cache / "emulation" / f"{platform.cpu}-python{python}"
    if place.is_dir():
        return place
    console.say(
        f"fetching a {platform.cpu} Python {python} from the distribution's packages, to import under emulation"
    )
    with files.atomic_dir(place) as part:
        archives = part / "apt/archives"
        for folder in (archives / "partial", part / "apt/lists/partial"):
            folder.mkdir(parents=True)
        (part / "apt/status").touch()
        architecture = _DEBIAN[platform]
        # apt with a state of its own: nothing is installed there, so it downloads the package with all it needs.
        apt = [
            *("apt-get", "-qq", "-y", "-o", f"Dir::State={part}/apt", "-o", f"Dir::State::status={part}/apt/status"),
            *("-o", f"Dir::State::Lists={part}/apt/lists", "-o", f"Dir::Cache={part}/apt"),
            *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
            *("-o", "APT::Sandbox::User="),
        ]
        shell.run([*apt, "update"], check=False)  # a source without this architecture is no reason to stop
        install = ["install", "--download-only", "--no-install-recommends", f"python{python}", "libstdc++6"]
        shell.run([*apt, *install], check=False)
        packages = sorted(archives.glob("*.deb"))
        if not packages:
            raise ProcessError("process", f"the distribution has no {architecture} package python{python}")
        for package in packages:
            shell.run(["dpkg-deb", "-x", package, part])
        shutil.rmtree(part / "apt")
    return place
