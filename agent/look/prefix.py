"""The prefix and its contents, as needed before a deletion."""

from __future__ import annotations

import itertools
import os
import pwd
import re
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, recorded
from agent.folders import mounts
from agent.layout import DATA, Layout
from agent.schema.facts import Place
from agent.schema.site import Site
from agent.serve.systemd import Systemd

OWN = ("current", "gateway", "parts", "releases", "secrets", "state")
"""Hearth's entries in the prefix, except the data."""


def prefix_state(layout: Layout) -> Place:
    """Return the properties and contents of the prefix that a deletion must consider."""
    prefix, real = layout.prefix, os.path.realpath(layout.prefix)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(path.name for path in layout.prefix.iterdir())
    # The pattern matches temporary names of `link` and `folders` after a killed run.
    own = [name for name in names if name in OWN or re.fullmatch(r"\.(current|data)\.\w+", name)]
    points = sorted({each["point"] for each in mounts() if each["point"].startswith(f"{real}/")})
    data = (layout.data, *(layout.data / name for name in DATA))
    deployed = None
    with suppress(AgentError):
        deployed = recorded(layout.state / "site.json", Site)
    traces = [*layout.state.glob("runs/*.jsonl"), *layout.releases.glob("*/release.json")]
    return Place(
        real=real,
        link=prefix.is_symlink(),
        mount=os.path.ismount(prefix),
        homes=tuple(
            sorted(entry.pw_name for entry in pwd.getpwall() if _holds(Path(real), Path(entry.pw_dir), layout.data))
        ),
        own=tuple(own),
        others=tuple(name for name in names if name not in (*own, "data")),
        data=os.path.lexists(layout.data) and _deletable(f"{real}/data", points),
        crossings=tuple(name for name in own if name != "current" and (prefix / name).is_symlink()),
        mounts=tuple(points),
        links={str(path): target for path in data if (target := _target(path))},
        service=deployed.service if deployed else "",
        scope=deployed.scope if deployed else "",
        user=_owner(layout, deployed.user) if deployed else "",
        elsewhere=_elsewhere(layout),
        ours=bool(deployed or traces),
    )


def _target(path: Path) -> str:
    with suppress(OSError):
        return str(path.readlink())
    return ""


def _owner(layout: Layout, user: str) -> str:
    """Return the user if it owns the data, else empty."""
    with suppress(OSError, KeyError):
        return user if user and layout.data.stat().st_uid == pwd.getpwnam(user).pw_uid else ""
    return ""


def _elsewhere(layout: Layout) -> str:
    """Return another existing prefix that the service's unit links to; empty if none."""
    systemd = Systemd(layout)
    for name in (systemd.unit, systemd.container):
        with suppress(OSError):
            prefix = systemd.place(name).readlink().parent.parent  # PREFIX/current/SERVICE.service
            if (prefix / "state/site.json").exists() and os.path.realpath(prefix) != os.path.realpath(layout.prefix):
                return str(prefix)
    return ""


def _deletable(path: str, points: list[str]) -> bool:
    """Return whether a path contains more than mount points and their parent folders."""
    pending = [path]
    while pending:
        path = pending.pop()
        if not any(each == path or each.startswith(f"{path}/") for each in points):
            return True
        if path not in points:
            with suppress(OSError), os.scandir(path) as entries:  # the service may replace it meanwhile
                pending += [entry.path for entry in itertools.islice(entries, len(points) + 1)]
    return False


def _holds(folder: Path, home: Path, data: Path) -> bool:
    """Return whether a folder is or contains a user's home; the service's home, the data, does not count."""
    same = home.name == folder.name and os.path.realpath(home) == str(folder)  # realpath last: homes may be remote
    return home != data and (same or folder in (home, *home.parents))
