"""Taking over a ComfyUI that somebody else installed, and putting all of it back.

Its folders belong to whoever ran it, who may have put a link anywhere; so what root changes there is opened name by
name, and no link is followed.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.api import Endpoint
from agent.comfyui import drain
from agent.files import Fault, Json, discard, opened, remove, run, sync, tree
from agent.journal import Adopted, now
from agent.services import UNITS
from agent.site import SHARING, Site
from agent.survey import all_processes


def rename(source: Path, target: Path) -> None:
    """Rename, following no link, and never onto something that is there (renameat2, glibc 2.28); raises OSError."""
    import ctypes  # a megabyte that no other verb needs

    with opened(source.parent) as here, opened(target.parent) as there:
        names = os.fsencode(source.name), os.fsencode(target.name)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(here, names[0], there, names[1], 1):  # RENAME_NOREPLACE
            code = ctypes.get_errno()
            if code != errno.EINVAL or os.path.lexists(target):
                raise OSError(code, os.strerror(code), str(source), None, str(target))
            os.rename(*names, src_dir_fd=here, dst_dir_fd=there)  # some file systems (NFS, older ZFS) know no such flag
        os.fsync(there)
        os.fsync(here)


def retire(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Take what served before out of service: its jobs awaited, its units stopped, disabled and set aside."""
    drain(Endpoint(("127.0.0.1",), step["port"]), step["drain"], step["force"], note)
    record = Adopted(site)
    known = {event["unit"]["name"] for event in record.events() if event["event"] == "unit"}
    for unit in step["units"]:
        if unit["name"] not in known:
            record.add("unit", unit=unit)
    for unit in step["units"]:
        if not os.path.lexists(unit["path"]):
            continue
        run(["systemctl", "stop", unit["name"]])
        # Drop-ins, too: they would change Hearth's unit of that name.
        own = [UNITS / f"{unit['name']}.d", UNITS / unit["name"]]
        for place in own:
            _copy(place, site.state / "adopted" / place.name)
        if unit["enabled"]:
            run(["systemctl", "disable", unit["name"]])
        for place in own:
            _drop(place)
    run(["systemctl", "daemon-reload"])
    for each in all_processes():
        if each["place"] == step["path"]:
            what = f"the old ComfyUI still runs: pid {each['pid']} of {each['user']}"
            raise Fault("step", what, "no unit that was stopped is its own", "end it, then run the same command again")


def _copy(source: Path, target: Path) -> None:
    """Copy a unit or its drop-ins as they are, links as links; /etc may be another file system than the prefix."""
    if not os.path.lexists(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.fresh")
    for stale in (fresh, target):
        _drop(stale)
    run(["cp", "-a", str(source), str(fresh)])
    fresh.rename(target)
    os.sync()


def _drop(place: Path) -> None:
    remove(place) if place.is_dir() and not place.is_symlink() else discard(place)


def adopt(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Rename a folder of the old installation into the data, and let the service read and write it."""
    record = Adopted(site)
    source, target = Path(step["source"]), site.data.resolve() / step["name"]
    if step["name"] == "user":
        _keep_database(site, source, record)
    left = _bring(source, target, record)
    for each in left[:20]:
        note(f"left where it is, the data has one of that name: {each}")
    if left[20:]:
        note(f"and {len(left) - 20} more of these")
    moved = [Path(event["target"]) for event in record.events() if event["event"] == "rename"]
    owners = {*step["owners"], site.owner()[0]}
    kept = sum(_own(site, each, owners, record) for each in dict.fromkeys(moved) if target in (each, *each.parents))
    if kept:
        note(f"{kept} files have several names or another owner than the installation, and keep their owners and modes")


def _bring(source: Path, target: Path, record: Adopted) -> list[str]:
    """Rename a folder, or what is in it where there is one already; answers what had to stay."""
    if not os.path.lexists(source):
        return []
    with suppress(OSError), opened(target.parent) as place:
        os.rmdir(target.name, dir_fd=place)  # an empty one is as good as none
    if not os.path.lexists(target):
        record.add("rename", source=str(source), target=str(target))
        rename(source, target)
        return []
    if any(each.is_symlink() or not each.is_dir() for each in (source, target)):
        return [str(source)]
    return [left for each in sorted(source.iterdir()) for left in _bring(each, target / each.name, record)]


def _own(site: Site, root: Path, owners: set[int], record: Adopted) -> int:
    """Give a tree to the service and its group, as far as it is the `owners`'; answers how many files were left."""
    left = 0
    with opened(root.parent) as parent:
        left += _own_entries(parent, root.parent, [root.name], site.sharing(), owners, record)
    for folder in tree(root):
        try:
            with opened(folder) as place:
                names = os.listdir(place)  # noqa: PTH208  of an open folder
                left += _own_entries(place, folder, names, site.sharing(), owners, record)
        except OSError as error:  # gone, a link by now, or so deep that no path leads to it
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
    return left


def _own_entries(
    place: int, folder: Path, names: list[str], owner: tuple[int, int], owners: set[int], record: Adopted
) -> int:
    """The same for some entries of an open folder. What they were is recorded before."""
    changes: list[tuple[list[Any], int]] = []
    left = 0
    for name in names:
        status = os.lstat(name, dir_fd=place)
        kind, mode = stat.S_IFMT(status.st_mode), _harmless(status.st_mode)
        if (kind == stat.S_IFREG and status.st_nlink > 1) or status.st_uid not in owners:
            left += 1  # another name of it may be elsewhere, of somebody else's
            continue
        wanted = {stat.S_IFDIR: mode | 0o2770, stat.S_IFREG: mode | 0o660}.get(kind, mode)
        if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (*owner, wanted):
            changes.append(([name, status.st_uid, status.st_gid, mode, status.st_ino], wanted))
    if changes:
        record.add("own", folder=str(folder), entries=[before for before, _ in changes])
    for (name, *_, inode), wanted in changes:
        _give(place, name, *owner, wanted, inode)
    return left


def _harmless(mode: int) -> int:
    """A mode without what makes a file run as its owner or group: that would be the service, or who gets it back."""
    return stat.S_IMODE(mode) & (0o3777 if stat.S_ISDIR(mode) else 0o1777)


def _give(place: int, name: str, user: int, group: int, mode: int, inode: int) -> None:
    """Set owner and mode of an entry of an open folder, of a link its own.

    What has several names, or is another file than the one of that number, is left alone.
    """
    kind = stat.S_IFMT(os.lstat(name, dir_fd=place).st_mode)
    if kind == stat.S_IFLNK:
        os.chown(name, user, group, dir_fd=place, follow_symlinks=False)
    elif kind in (stat.S_IFREG, stat.S_IFDIR):
        entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        try:
            status = os.fstat(entry)
            if status.st_ino == inode and (kind == stat.S_IFDIR or status.st_nlink == 1):
                os.fchown(entry, user, group)
                os.fchmod(entry, _harmless(kind | mode))
        finally:
            os.close(entry)


def _keep_database(site: Site, folder: Path, record: Adopted) -> None:
    """Copy the old ComfyUI's database: a newer version migrates it, and the old one would not start any more."""
    kept = site.state / "adopted/database"
    if kept.exists() or not folder.is_dir():
        return
    fresh = kept.with_name(".database")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    for name, (content, *owner, mode) in _database(folder).items():
        (fresh / name).write_bytes(content)
        os.chown(fresh / name, *owner)
        (fresh / name).chmod(mode)
    record.add("database", folder=str(folder))
    os.sync()
    fresh.rename(kept)
    sync(kept.parent)


def _database(folder: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """The files of a ComfyUI's database with owner, group and mode. It is small, an index of models and pictures."""
    found: dict[str, tuple[bytes, int, int, int]] = {}
    with opened(folder) as place:
        for path in folder.glob("comfyui.db*"):
            with suppress(OSError), open(path.name, "rb", opener=_within(place)) as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and ".newer-" not in path.name:
                    mode = stat.S_IMODE(status.st_mode)
                    found[path.name] = file.read(), status.st_uid, status.st_gid, mode
    return found


def _within(place: int) -> Callable[[str, int], int]:
    """An opener of names in an open folder that follows no link and waits for no pipe."""
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=place)


def _return_database(site: Site, folder: Path) -> None:
    """Put the old database back where a newer version has changed it; the newer one stays beside it."""
    before, present = _database((site.state / "adopted/database").resolve()), _database(folder)
    if before == present:
        return
    for name in present:
        rename(folder / name, folder / f"{name}.newer-{now()}")
    with opened(folder) as place:
        for name, (content, *owner, mode) in before.items():
            with open(name, "xb", opener=_within(place)) as file:
                file.write(content)
                os.fchown(file.fileno(), *owner)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())


def unadopt(site: Site, step: Json, note: Callable[[str], None]) -> None:
    """Put back all that adopting changed, the last first: owners and modes, folders, database, units."""
    record = Adopted(site)
    stuck: list[str] = []
    for event in reversed(record.events()):
        try:
            _undo(site, event)
        except (Fault, OSError) as error:
            stuck.append(str(error))
    if stuck:
        hint = "look at them, then run the same command again"
        raise Fault("step", f"{len(stuck)} things could not be put back", "\n".join(stuck[:20]), hint)
    shutil.rmtree(site.state / "adopted", ignore_errors=True)
    record.path.rename(record.path.with_name("adopted.undone.jsonl"))
    sync(site.state)


def _undo(site: Site, event: Json) -> None:
    """Take one line of the record back, as far as it was done."""
    if event["event"] == "own" and Path(event["folder"]).is_dir():
        with opened(Path(event["folder"])) as place:
            for name, user, group, mode, *inode in event["entries"]:
                with suppress(FileNotFoundError):
                    # records of older versions have no number
                    same = inode[0] if inode else os.lstat(name, dir_fd=place).st_ino
                    _give(place, name, user, group, mode, same)
                with suppress(OSError):  # what a deploy added since
                    os.removexattr(f"/proc/self/fd/{place}/{name}", SHARING, follow_symlinks=False)
    elif event["event"] == "rename" and os.path.lexists(event["target"]):
        rename(Path(event["target"]), Path(event["source"]))
    elif event["event"] == "database" and (site.state / "adopted/database").is_dir():
        _return_database(site, Path(event["folder"]))
    elif event["event"] == "unit":
        unit = event["unit"]
        for own in (UNITS / unit["name"], UNITS / f"{unit['name']}.d"):
            if not os.path.lexists(own):
                _copy(site.state / "adopted" / own.name, own)
        run(["systemctl", "daemon-reload"])
        if unit["enabled"]:
            run(["systemctl", "enable", unit["name"]])
        if unit["active"]:
            run(["systemctl", "start", unit["name"]])
