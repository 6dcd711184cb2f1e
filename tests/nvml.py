"""A stand-in for NVIDIA's library: `fixtures/nvml/nvml.c`, which answers from recordings of real machines."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from core import files

FIXTURES = Path(__file__).parent / "fixtures/nvml"
MACHINES = ("rtx-4070", "h200", "gb10")


@functools.cache
def library(recording: Path = Path("/etc/nvml-recording")) -> Path:
    """The library that answers from a recording; for Debian's path of it and for any LD_LIBRARY_PATH.

    The path is compiled in: a variable would not reach the agent, which forgets its caller's environment.
    """
    folder = tempfile.mkdtemp(prefix="hearth-nvml-")
    atexit.register(shutil.rmtree, folder)
    place = Path(folder) / "libnvidia-ml.so.1"
    words = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    words += [f'-DRECORDING="{recording}"']
    subprocess.run([*words, "-o", str(place), str(FIXTURES / "nvml.c")], check=True)
    return place


def recording(machine: str, *edits: tuple[str, str]) -> str:
    """The recorded answers of a machine; each edit replaces or adds the line of a key such as `memory`."""
    lines = (FIXTURES / f"{machine}.txt").read_text().splitlines()
    for key, value in edits:
        kept = [line for line in lines if line.split()[:1] != [key]]
        before = kept.index("gpu") + (key not in ("driver", "cuda", "gpus", "fails"))
        lines = [*kept[:before], f"{key} {value}", *kept[before:]]
    return "\n".join(lines) + "\n"


def environment(place: Path) -> dict[str, str]:
    """This process's environment, with the library in it and the recording at `place`."""
    return {**os.environ, "LD_LIBRARY_PATH": str(library(place).parent)}


def python(code: str, place: Path) -> str:
    """The output of a program that runs with the library and the recording at `place`."""
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, env=environment(place), cwd=files.CHECKOUT, capture_output=True, text=True, check=True)
    return run.stdout
