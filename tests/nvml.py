"""A stand-in for NVIDIA's library: `fixtures/nvml/nvml.c`, which answers from recordings of real machines."""

from __future__ import annotations

import atexit
import functools
import json
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


def python(code: str, recording: str) -> str:
    """The output of a program in a process of its own, on a machine with this recording.

    The program can change the file RECORDING.
    """
    server, place = _server(os.getpid())
    place.write_text(recording, errors="surrogateescape")
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps(code) + "\n")
    server.stdin.flush()
    output = ""
    while not (line := server.stdout.readline()).startswith(END):
        assert line, "the server has ended"
        output += line
    assert line == f"{END} 0\n", "the program failed"
    return output


END = "--- the program's status:"

SERVER = f"""
import json, os, sys, traceback
from pathlib import Path
import agent.look.facts, agent.look.samples, agent.metrics.gather, agent.metrics.host, core.arch, pynvml
for line in sys.stdin:
    if not (child := os.fork()):
        status = 1
        try:
            exec(json.loads(line), {{"RECORDING": Path(sys.argv[1])}})
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    print("{END}", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a child for each program, so that no program imports the agent anew. It has not loaded the library itself."""


@functools.cache
def _server(_: int) -> tuple[subprocess.Popen[str], Path]:
    """This process's server, and the path of its recording."""
    place = Path(tempfile.mkdtemp(prefix="hearth-nvml-"), "recording")
    env = {**os.environ, "LD_LIBRARY_PATH": str(library(place).parent)}
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(place)], env=env, cwd=files.CHECKOUT, stdin=pipe, stdout=pipe, text=True
    )

    def end(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:
            server.communicate()
            shutil.rmtree(place.parent)

    atexit.register(end)
    return server, place
