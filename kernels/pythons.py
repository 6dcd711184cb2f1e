"""Finds the Python interpreters that bindings are built for, with their headers."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from functools import cache
from pathlib import Path

from core import console, files, shell, tools
from core.errors import ToolError


@cache
def find(version: str) -> tuple[str, str, str]:
    """Return an interpreter of this minor version, its headers and their identity.

    The build machine's own headers serve both platforms: between 64-bit little-endian Linux machines, CPython's
    headers differ only in macros that no public header reads (docs/decisions/0003).
    """
    asked = known(version)
    if asked is None:
        console.say(f"Python {version} is not installed; uv installs it")
        installed = tools.uv("python", "install", "--quiet", version, check=False)
        asked = ask(_uv(version), version)
    if asked is None:
        raise ToolError(
            "python-missing",
            f"Python {version} is not installed, and uv could not install it",
            cause=shell.last_words(installed, 1).strip(),
            hint=f"apt-get install python{version}-dev, or uv python install {version} if GitHub can be reached",
        )
    interpreter, full, include = asked[0], asked[1], Path(asked[2])
    if not (include / "Python.h").exists():
        raise ToolError(
            "python-missing",
            f"Python {version} has no headers: {include / 'Python.h'} does not exist",
            hint=f"apt-get install libpython{version}-dev, or: uv python install {version}",
        )
    # Listed individually: distributions link other packages' headers (numpy's) into this folder.
    headers = [str(path.relative_to(include)) for path in include.rglob("*") if path.is_file()]
    multiarch = [
        files.sha256(each) for each in sorted(include.parent.glob(f"*-linux-gnu/{include.name}/*.h"))
    ]  # Debian
    digest = hashlib.sha256(json.dumps(multiarch).encode()).hexdigest()[:16]
    return interpreter, str(include), f"{full} headers {files.tree_hash(include, headers)} {digest}"


def known(version: str) -> list[str] | None:
    """As `ask`, for the installed interpreter of this minor version: this one, the one in PATH, or uv's."""
    return own(version) or ask(f"python{version}", version) or ask(_uv(version), version)


def own(version: str) -> list[str] | None:
    """As `ask`, for the interpreter that runs this, if it has the version and headers: starts no process."""
    include = sysconfig.get_path("include")
    if (
        version != f"{sys.version_info[0]}.{sys.version_info[1]}"
        or sys.abiflags
        or not Path(include, "Python.h").exists()
    ):
        return None
    return [sys._base_executable, sys.version.split()[0], include]  # type: ignore[attr-defined]


def _uv(version: str) -> str:
    """Return uv's interpreter of this minor version; empty if uv has none."""
    return tools.uv("python", "find", "--no-project", "--system", version, check=False).stdout.strip()


def ask(program: str, version: str) -> list[str] | None:
    """Return an interpreter's own path (outside any virtual environment), full version and header folder.

    None if it cannot be run, has another minor version, or has another ABI: a debug build, or one without the GIL.
    """
    if not program or not shell.which(program):
        return None
    code = "import sys, sysconfig as s; print(sys._base_executable, sys.version.split()[0], s.get_path('include'),"
    code += " any(map(s.get_config_var, ('Py_GIL_DISABLED', 'Py_DEBUG'))) or '', sep='\\n')"
    *answer, other = tools.build(program, "-ISc", code, check=False).stdout.split("\n")[:4] or [""]
    return answer if len(answer) == 3 and not other and answer[1].startswith(f"{version}.") else None
