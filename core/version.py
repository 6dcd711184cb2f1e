"""The version and commit of this Hearth."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import tomli

from core import files, tools
from core.errors import HearthError
from core.manifest import Hearth


def own() -> Hearth:
    """This Hearth. The commit is reported only if the checkout is a git repository, not a copy inside of one."""
    found = Hearth(tomli.loads((files.CHECKOUT / "pyproject.toml").read_text())["project"]["version"])
    with suppress(HearthError):
        top, commit = tools.git("rev-parse", "--show-toplevel", "HEAD", cwd=files.CHECKOUT).stdout.splitlines()
        if Path(top) == files.CHECKOUT.resolve():
            words = ("--no-optional-locks", "status", "--porcelain", "--untracked-files=normal")
            changes = tools.git(*words, cwd=files.CHECKOUT).stdout
            return Hearth(found.version, commit, bool(changes))
    return found
