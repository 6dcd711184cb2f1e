"""CUDA starts in a ComfyUI that confines itself (`agent/serve/confine.py`), and in the processes that it starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROBE = """
import ctypes, subprocess, sys
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
for done in (cuda.cuInit(0), cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0)):
    assert done == 0, done  # 304: the driver may not do what it asks the kernel for
place = ctypes.c_void_p()
for name, more in {"cuMemAlloc_v2": (), "cuMemHostAlloc": (0,), "cuMemAllocManaged": (1,)}.items():
    assert getattr(cuda, name)(ctypes.byref(place), ctypes.c_size_t(1 << 20), *more) == 0, name
assert ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() == 0
for line in sys.argv[1:]:
    subprocess.run([sys.executable, "-c", line], check=True)
"""


@pytest.mark.gpu
def test_cuda_works_confined_and_in_a_child_process() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as code:  # pytest's own is closed to others
        shutil.copytree(Path(__file__).parents[2] / "agent", f"{code}/agent")
        Path(code).chmod(0o755)
        run(code)


def run(code: str) -> None:
    """Runs as nobody if this is root: root could change kernel settings, so it gets less of /proc."""
    start = f"import sys, json; sys.path.insert(0, {code!r}); from agent.serve import confine; "
    start += "confine.main(json.loads(sys.argv[1]), sys.argv[2:])"
    spec = {"read": [code], "write": [], "bind": [], "connect": [], "udp": False}
    lowered: dict[str, Any] = {} if os.geteuid() else {"user": 65534, "group": 65534, "extra_groups": []}
    python = sys.executable if os.geteuid() else "/usr/bin/python3"  # root's own may lie in a closed folder
    command = [python, "-I", "-S", "-B", "-c", start, json.dumps(spec), python, "-c", PROBE, PROBE]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, **lowered)
    assert done.returncode == 0, done.stderr
