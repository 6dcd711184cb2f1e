"""The exporter of metrics as hosts get it: a tree of its package, what it uses of the agent, and prometheus-client."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core import files, lockfile

if TYPE_CHECKING:
    from pathlib import Path

    from core.stack import Platform

EXTRA = "exporter"

AGENT = (
    "__init__",
    "api",
    "files",
    "journal",
    "layout",
    "locks",
    "look/__init__",
    "look/gpu",
    "schema/__init__",
    "schema/facts",
)
"""The agent's modules that the exporter reaches. Not all of it: what changes the tree restarts ComfyUI, too."""

MAIN = "import sys\n\nfrom exporter.__main__ import main\n\nmain(sys.argv[1:])\n"


@dataclass(frozen=True)
class Exporter:
    """One version of the exporter: the hash of what decides its tree, and its packages' versions by name."""

    digest: str = ""
    packages: dict[str, str] = field(default_factory=dict)


def exporter() -> Exporter:
    """The exporter of this checkout."""
    pinned = lockfile.requirements(EXTRA)
    listed = [[str(path.relative_to(files.CHECKOUT)), files.sha256(path)] for path in _own()]
    digest = hashlib.sha256(json.dumps([listed, MAIN, pinned]).encode()).hexdigest()[:16]
    return Exporter(digest, dict(line.split()[0].split("==") for line in pinned))


def _own() -> list[Path]:
    folder = files.CHECKOUT / "agent"
    return [*sorted((files.CHECKOUT / "exporter").glob("*.py")), *(folder / f"{name}.py" for name in AGENT)]


def packages(platform: Platform) -> Path:
    """The packages that it needs, in the cache: pure Python, for any Python that a stack has."""
    return lockfile.install(EXTRA, platform, "3.11")


def tree(platform: Platform) -> Path:
    """The tree, in the cache; Python runs it as it runs a file (`__main__.py`)."""
    place = files.cache() / "exporters" / exporter().digest
    if not place.is_dir():
        with files.whole(place) as part:
            shutil.copytree(
                packages(platform), part, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True
            )
            for path in _own():
                copied = part / path.relative_to(files.CHECKOUT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied)
            (part / "__main__.py").write_text(MAIN)
    return place
