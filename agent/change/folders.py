"""Steps that mount file systems and create folders."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, Note, link, sync, write
from agent.folders import branches, opened
from agent.layout import DATA, SHARED, SHARING, UNUSED, Layout, shared
from agent.parts import as_service
from agent.processes import run
from agent.schema.change import Folders, Mount
from agent.serve.systemd import UNITS


def mount(layout: Layout, step: Mount, note: Note) -> None:
    """Mount a file system with a mount unit: now, at boot, and whenever its device appears. Raises AgentError."""
    path, unit = Path(step.path), layout.mounts[step.path]
    mounted = os.path.ismount(path)
    path.mkdir(parents=True, exist_ok=True)
    if not mounted and any(os.scandir(path)):
        hint = f"move them away first: ls {path}"
        raise AgentError("step", f"there are files in {path} itself, which the mount would hide", "", hint)
    write(UNITS / unit, step.text)
    link(UNITS / "multi-user.target.wants" / unit, f"../{unit}")
    if step.what.startswith("/dev/"):
        device = run(["systemd-escape", "--path", "--suffix=device", step.what]).strip()
        link(UNITS / f"{device}.wants" / unit, f"../{unit}")
    run(["systemctl", "daemon-reload"])
    done = subprocess.run(["systemctl", "reload" if mounted else "start", unit], capture_output=True, text=True)
    if done.returncode:
        tail = run(["journalctl", "--no-pager", "--output=cat", "--lines=5", f"--unit={unit}"])
        hint = "check that the server or device responds, then run the same command again"
        raise AgentError("step", f"{step.what} cannot be mounted at {path}", tail.strip() or done.stderr.strip(), hint)


def folders(layout: Layout, step: Folders, note: Note) -> None:
    """Create the folders of the prefix. Existing folders, mounts and links are kept. Raises AgentError."""
    for folder in (layout.parts, layout.releases, layout.state, layout.incoming):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (layout.data, *map(Path, layout.elsewhere.values())):
        if folder.exists() or folder.is_symlink():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        # Other users with write access to the parent may have replaced the new folder.
        place = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(place).st_uid != os.geteuid() or os.listdir(place):  # noqa: PTH208
                raise AgentError("step", f"{fresh} was replaced while it was being made", "check who can write there")
            os.fchown(place, *layout.sharing())
            os.fchmod(place, 0o750 if layout.user and not layout.public else 0o755)
        finally:
            os.close(place)
        fresh.rename(folder)
        sync(folder.parent)
    group = layout.sharing()[1]
    mode = (0o2755 if layout.public else 0o2750) if layout.user else 0
    whole = as_service(layout, share_folders, layout.data, list(layout.elsewhere.values()), group, mode, sharing=True)
    if not whole:
        note(f"{layout.data} has too many files to give all to the members at once; inv deploy continues")
    _make_unused(layout)


def _make_unused(layout: Layout) -> None:
    """Create data/custom_nodes, read-only and owned by root. If it is not empty, keep it; facts report it."""
    with suppress(OSError), opened(Path(os.path.realpath(layout.data))) as data:
        with suppress(OSError):
            os.rmdir(UNUSED, dir_fd=data)
        os.mkdir(UNUSED, 0o555, dir_fd=data)
        # Use a descriptor: the service may have replaced it by a link.
        place = os.open(UNUSED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=data)
        os.fchmod(place, 0o555)
        os.close(place)


SHARE_SECONDS = 300
"""Time limit for sharing folders with members: the service may have created an endless tree."""


def share_folders(data: Path, elsewhere: list[str], group: int, mode: int) -> bool:
    """Create the data folders and make the shared ones writable for members. Return False on a timeout.

    `mode` is the data folder's mode; 0: change no permissions (without root there are no members).
    """
    end = time.monotonic() + SHARE_SECONDS
    for name in (*DATA, *SHARED):
        if not (data / name).is_symlink():
            (data / name).mkdir(exist_ok=True)
    sync(data)
    above = {"", *(os.path.dirname(each) for each in SHARED)}  # noqa: PTH120  names, not paths
    for root in (data, *map(Path, elsewhere)) if mode else ():
        for name, place in branches(root):
            if time.monotonic() > end:
                return False
            try:
                status = place.stat()
                if status.st_uid != os.geteuid():  # another owner's
                    continue
                if root == data and not any(name.startswith(f"{each}/") for each in SHARED):
                    os.chown(place, -1, group if name.rstrip("/") in above else os.getegid())
                    place.chmod(mode if name.rstrip("/") in above else status.st_mode & 0o705)
                    with suppress(OSError):  # set by older versions: let members change every new file
                        os.removexattr(place, SHARING)
                    continue
                if status.st_gid != group:
                    _give_to_group(place, group)
                wanted = status.st_mode | 0o2770
                place.chmod(wanted)
                with suppress(OSError):  # NFS 4 has a different kind of ACL
                    os.setxattr(place, SHARING, shared(wanted, os.geteuid()))
            except FileNotFoundError:  # deleted meanwhile
                pass
    return True


def _give_to_group(folder: Path, group: int) -> None:
    """Change the group of a folder and its files, except files of other owners."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                os.chown(entry.path, -1, group, follow_symlinks=False)
    os.chown(folder, -1, group)
