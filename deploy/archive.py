"""The agent as one file: its contents, and how a host checks and starts it."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

from core import files, workspace

OLD_PYTHON, NO_SUDO, NO_PYTHON, NO_AGENT = 96, 97, 98, 99
"""Exit statuses of the code that runs before the agent, which itself ends with 0, 1, 3 or 4."""


# Any Python 3 can parse this, and nothing is imported before the version check. A path before the verb is a pipe that
# replaces standard input, which sudo used.
_MAIN = f"""\
import os
import sys

if sys.version_info < (3, 10):
    sys.stderr.write(sys.version.split()[0])
    sys.exit({OLD_PYTHON})
if sys.argv[1].startswith("/"):
    os.dup2(os.open(sys.argv.pop(1), os.O_RDONLY), 0)
if os.path.isdir(sys.path[0]):
    sys.path[0] = os.path.realpath(sys.path[0])  # its link may point at another agent tomorrow
sys.dont_write_bytecode = True  # `agent/install.py` has done so

from agent.main import main

sys.exit(main(sys.argv[1:]))
"""


# Arguments: the archive, its hash, the prefix's state folder, and the agent's own arguments.
# Runs the unpacked agent of that hash if only root and the current user can write to it and to all parent folders (a
# sticky parent is accepted, since others cannot replace our entries there). Otherwise runs the bytes of the archive
# after comparing their hash, so that the login cannot replace a file in between. Any Python can parse this.
LOADER = f"""\
import hashlib, os, runpy, sys
if sys.version_info < (3, 10):
    sys.stderr.write(sys.version.split()[0])
    sys.exit({OLD_PYTHON})
archive, digest, state = sys.argv[1:4]
place = os.path.realpath(os.path.join(os.path.expanduser(state), "agents", digest[:16]))
def own(path):
    found = os.lstat(path)
    private = not found.st_mode & 0o022 or found.st_mode & 0o1000 and path != place
    return found.st_uid in (0, os.geteuid()) and private and (path == "/" or own(os.path.dirname(path)))
if not (os.path.isdir(place) and own(place)):
    raw = open(archive, "rb").read()
    if hashlib.sha256(raw).hexdigest() != digest:
        sys.exit({NO_AGENT})
    memory = os.memfd_create("hearth")
    os.write(memory, raw)
    place = "/proc/self/fd/%d" % memory
sys.argv[:4] = [place]
runpy.run_path(place, run_name="__main__")
"""


LIBRARIES = ("prometheus_client", "pynvml")
"""The libraries in the agent's file: pure Python from this checkout's environment, pinned by `uv.lock`."""


@functools.cache
def packed_agent() -> bytes:
    """`agent/` and its libraries as one file that Python runs.

    The same code gives the same bytes; their hash is the file's name on hosts. Not compressed, because zlib's versions
    differ.
    """
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for path in sorted((files.CHECKOUT / "agent").rglob("*.py")):
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(files.CHECKOUT))), path.read_bytes())
        for name in LIBRARIES:
            spec = find_spec(name)
            assert spec is not None
            assert spec.origin is not None
            origin = Path(spec.origin)
            package = origin.name == "__init__.py"
            top = origin.parents[1] if package else origin.parent
            for path in sorted(origin.parent.rglob("*.py")) if package else [origin]:
                archive.writestr(zipfile.ZipInfo(str(path.relative_to(top))), path.read_bytes())
        archive.writestr(zipfile.ZipInfo("__main__.py"), _MAIN)
    return output.getvalue()


def agent_hash() -> str:
    """The name of the unpacked agent's folder on hosts."""
    return hashlib.sha256(packed_agent()).hexdigest()[:16]


def agent_name() -> str:
    """The name of the packed agent's file, here and on hosts."""
    return f"agent-{agent_hash()}.pyz"


def agent_file() -> Path:
    """The packed agent in the cache; rewritten if the file differs."""
    place = workspace.current().cache / "agents" / agent_name()
    if not place.is_file() or place.read_bytes() != packed_agent():
        files.write(place, packed_agent())
    return place
