"""State of mounts and folders, and whether the service and its members can use them."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from agent.files import AgentError, read_text, regular
from agent.folders import inside, mounts
from agent.layout import DATABASE, SHARED, SHARING, UNUSED, Layout, shared
from agent.look.accounts import user_exists
from agent.parts import as_service
from agent.schema.facts import MountState, WantedMount
from agent.serve.systemd import UNITS

T = TypeVar("T")


def shares(layout: Layout) -> bool:
    """Return whether members can change the shared data, and others can read the data only if it is public."""
    if not layout.user or not user_exists(layout.user) or not layout.data.exists():
        return True
    others = layout.data.stat().st_mode & 0o7
    fits = others == (0o5 if layout.public else 0)
    return fits and looked(layout, lambda: all(_shared(layout, layout.data / name) for name in SHARED), lambda _: False)


def unused(layout: Layout) -> list[str]:
    """Return up to 20 entries of data/custom_nodes, from which nothing is loaded."""

    def look() -> list[str]:
        with suppress(FileNotFoundError), os.scandir(layout.data / UNUSED) as entries:
            return [entry.name for entry in itertools.islice(entries, 20)]
        return []

    return sorted(looked(layout, look, lambda error: [str(error)]))


def mount_state(layout: Layout, path: str, wanted: WantedMount) -> MountState:
    """Return the state of a mount point."""
    mounted = os.path.ismount(path)
    source = next((each["what"] for each in reversed(mounts()) if each["point"] == path), "")
    unit = read_text(UNITS / layout.mounts[path])
    error, remedy = _unmountable(path, wanted.what, wanted.type) if wanted.what and not mounted else ("", "")
    return MountState(mounted, source, unit, error, remedy)


def _unmountable(path: str, what: str, kind: str) -> tuple[str, str]:
    """Return why a file system cannot be mounted at a path, and the remedy; empty if it can."""
    if what.startswith("/dev/mapper/") and not Path(what).exists():
        opening = f"on the host: cryptsetup open DEVICE {shlex.quote(Path(what).name)} (or vgchange -ay)"
        return "this encrypted or logical volume is not open", f"{opening}; then it is mounted automatically"
    if what.startswith("/") and not Path(what).exists():
        return "the host has no such device", "connect it, or correct `what`"
    if kind.startswith(("nfs", "cifs")) and not shutil.which(f"mount.{kind}", path="/sbin:/usr/sbin"):
        package = "nfs-common" if kind.startswith("nfs") else "cifs-utils"
        return f"the host has no mount.{kind}", f"on the host: apt-get install {package}"
    if Path(path).is_dir() and any(os.scandir(path)):
        return "the folder contains files, which the mount would hide", f"move them away first: ls {shlex.quote(path)}"
    return "", ""


def folder_problem(layout: Layout, path: Path, use: str) -> str:
    """Return why the service cannot use a folder (`use`: "read", "write" or "bind"); empty if it can."""
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is not a folder"
    need = os.R_OK | os.X_OK | (os.W_OK if use == "write" else 0)
    inside = None
    if use == "bind":  # the unit bind-mounts it, so parent permissions do not matter
        path, inside = Path(), os.open(path, os.O_PATH)
    try:
        may = not user_exists(layout.user) or as_service(layout, _access, str(path), need, inside, seconds=10)
    except AgentError as error:
        return f"cannot be checked as the service user: {error.report['what']}"
    return "" if may else f"cannot be {'written' if use == 'write' else 'read'} by the service user"


def traps(layout: Layout) -> dict[str, str]:
    """Return database paths that are not regular files, with the problem: ComfyUI would block on a pipe.

    Also reports a link made by the service in place of the folder: it could lead to files that the unit hides.
    """
    folder = layout.database.parent

    def look() -> dict[str, str]:
        try:
            with inside(folder) as here:
                names = [name for name in DATABASE if os.path.lexists(here / name) and not regular(here / name)]
                return {str(folder / name): "is not a regular file" for name in names}
        except OSError as error:
            return {str(folder): f"is not accepted: {error.strerror}"} if error.errno == errno.ELOOP else {}

    return looked(layout, look, lambda error: {str(folder): str(error)})


def looked(layout: Layout, look: Callable[[], T], otherwise: Callable[[Exception], T]) -> T:
    """Run `look` as the service user with a time limit (links and dead mounts are possible); on failure `otherwise`."""
    try:
        found: T = as_service(layout, look, seconds=5) if user_exists(layout.user) else look()
        return found
    except KeyError:  # no such group yet
        return look()
    except (OSError, AgentError) as error:
        return otherwise(error)


def _access(path: str, need: int, inside: int | None) -> bool:
    return os.access(path, need, dir_fd=inside, effective_ids=True)


def free_bytes(path: Path) -> int:
    """Return the free bytes at a folder or its nearest existing parent."""
    disk = os.statvfs(next(each for each in (path, *path.parents) if each.exists()))
    return disk.f_bavail * disk.f_frsize


def _shared(layout: Layout, folder: Path) -> bool:
    """Return whether members can change each other's new files in a folder of the service."""
    try:
        status = folder.stat()
        owner, group = layout.sharing()
        if status.st_uid != owner:
            return True  # another owner's folder is not managed
        fits = status.st_gid == group and status.st_mode & stat.S_ISGID
        return bool(fits) and os.getxattr(folder, SHARING) == shared(status.st_mode, owner)
    except KeyError:  # no such group yet
        return False
    except OSError as error:  # ACLs not supported, or no such folder: fine
        return error.errno in (errno.ENOTSUP, errno.ENOENT)


def databases(layout: Layout) -> dict[str, str]:
    """Return the releases with a saved database, and when it was copied: UTC, ISO 8601."""
    found = {place.name: place.stat().st_mtime for place in layout.databases.glob("*")}
    return {name: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) for name, at in found.items()}
