"""Operators' machines other than Linux: every command starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core import files

MACOS = """
import sys
import sysconfig
sysconfig.get_config_vars()  # of this machine: its file is named by the platform
sys.platform = "darwin"
import os, importlib, pathlib
for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "splice", "posix_fallocate", "posix_fadvise",
             "unshare", "setns", "pidfd_open", "copy_file_range", "getrandom", "eventfd"):
    if hasattr(os, name):
        delattr(os, name)
import types
scproxy = sys.modules["_scproxy"] = types.ModuleType("_scproxy")  # macOS's only; urllib reads proxies by it
scproxy._get_proxy_settings = scproxy._get_proxies = dict
sys.modules["spwd"] = sys.modules["ossaudiodev"] = None  # Linux's only
import tasks
for folder in ("core", "lock", "deploy", "kernels", "ops", "gateway"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.name not in ("attention.py", "smoke.py"):  # for an interpreter with torch
            importlib.import_module(".".join(path.with_suffix("").parts))
assert len(tasks.ns.task_names) > 20
assert {"nodes", "workflows"} <= set(tasks.ns.collections)
print("imported")
"""


@pytest.mark.process
def test_every_tasks_module_is_imported_on_macos() -> None:
    words = [sys.executable, "-c", MACOS]
    done = subprocess.run(words, cwd=files.CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
