"""A Python of another CPU: qemu user-mode emulation with a small tree of Debian packages. Needs no root.

The tree contains an interpreter and the C and C++ libraries; torch and the wheel come from elsewhere. It is built from
the distribution's package sources, so only the distribution's own Python version is available.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from core import console, debian, files, shell, tools, workspace
from core.errors import ProcessError, ToolError
from core.stack import Platform

# qemu 7.2 shows the build machine's /proc/cpuinfo to the guest, and torch 2.14 crashes on one without these lines.
_CORE = """\
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


@dataclass(frozen=True)
class Runner:
    """How to start a Python: command prefix, environment, and display name."""

    argv: tuple[str, ...]
    env: dict[str, str]
    label: str


def runner(platform: Platform, python: str) -> Runner | str:
    """Return a Python of `platform` under emulation, or the reason why there is none."""
    qemu = shell.which(f"qemu-{platform.cpu}-static") or shell.which(f"qemu-{platform.cpu}")
    if qemu is None:
        return f"no emulator for {platform.cpu} is installed (apt-get install qemu-user-static)"
    try:
        root = _root(platform, python)
    except (ProcessError, ToolError) as error:
        if error.kind not in ("process", "program-missing"):
            raise
        return f"no {platform.cpu} Python {python} to emulate: {error.what}"
    if platform is Platform.LINUX_AARCH64 and not (root / "proc/cpuinfo").exists():
        files.write(
            root / "proc/cpuinfo", "\n".join(f"processor\t: {core}\n{_CORE}" for core in range(os.cpu_count() or 1))
        )
    # -L makes the guest use its own loader, libraries and standard library first.
    argv = (qemu, "-L", str(root), str(root / f"usr/bin/python{python}"))
    return Runner(argv, {"PYTHONHOME": str(root / "usr")}, f"under {Path(qemu).name}")


def _root(platform: Platform, python: str) -> Path:
    """Return the tree with that Python; raises ProcessError or ToolError if it cannot be created."""
    place = workspace.current().cache / "emulation" / f"{platform.cpu}-python{python}"
    if (place / f"usr/bin/python{python}").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)  # an older version kept incomplete ones
    console.say(
        f"fetching Python {python} for {platform.cpu} from the distribution, to import the wheel under emulation"
    )
    with files.atomic_dir(place) as part:
        done = debian.download(platform, [f"python{python}", "libstdc++6"], part / "apt")
        if done.returncode:  # also after a part of the packages: the tree would lack libraries for ever
            raise ProcessError(
                "process", f"no {platform.cpu} package python{python} could be fetched", cause=shell.last_words(done, 1)
            )
        for package in sorted((part / "apt/archives").glob("*.deb")):
            tools.build("dpkg-deb", "-x", package, part)
        shutil.rmtree(part / "apt")
    return place
