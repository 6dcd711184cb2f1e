"""Adopt an existing installation of ComfyUI, and undo the adoption.

The tree belongs to another user, so root opens it component by component and follows no links.
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
from agent.change.database import LARGEST
from agent.deletion import remove
from agent.files import AgentError, Note, discard, sync
from agent.folders import LEVELS, opened, tree
from agent.journal import AdoptionJournal, now
from agent.layout import DATABASE, SHARING, Layout
from agent.look.survey import all_processes
from agent.processes import run
from agent.schema.change import Adopt, Retire, Unadopt
from agent.schema.records import AdoptionChange
from agent.serve.health import drain
from agent.serve.systemd import UNITS


def rename(source: Path, target: Path) -> None:
    """Rename without following symlinks or replacing an existing target (renameat2, glibc 2.28). Raises OSError."""
    import ctypes  # only needed here

    with opened(source.parent) as here, opened(target.parent) as there:
        names = os.fsencode(source.name), os.fsencode(target.name)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(here, names[0], there, names[1], 1):  # RENAME_NOREPLACE
            code = ctypes.get_errno()
            if code != errno.EINVAL or os.path.lexists(target):
                raise OSError(code, os.strerror(code), str(source), None, str(target))
            os.rename(*names, src_dir_fd=here, dst_dir_fd=there)  # NFS and older ZFS do not support the flag
        os.fsync(there)
        os.fsync(here)


def retire(layout: Layout, step: Retire, note: Note) -> None:
    """Wait for the old installation's jobs, then stop, disable and set aside its units. Raises AgentError."""
    drain(Endpoint(("127.0.0.1",), step.port), step.drain, step.force, note)
    record = AdoptionJournal(layout)
    known = {event.unit.name for event in record.events() if event.unit}
    for unit in step.units:
        if unit.name not in known:
            record.add(AdoptionChange("unit", unit=unit))
    for unit in step.units:
        if not os.path.lexists(unit.path):
            continue
        run(["systemctl", "stop", unit.name])
        # Drop-ins, too: they would apply to Hearth's unit of the same name.
        own = [UNITS / f"{unit.name}.d", UNITS / unit.name]
        for place in own:
            _copy(place, layout.state / "adopted" / place.name)
        if unit.enabled:
            run(["systemctl", "disable", unit.name])
        for place in own:
            _drop(place)
    run(["systemctl", "daemon-reload"])
    for each in all_processes():
        if each["place"] == step.path:
            what = f"the old ComfyUI still runs: pid {each['pid']} of {each['user']}"
            raise AgentError(
                "step", what, "none of the stopped units started it", "stop it, then run the same command again"
            )


def _copy(source: Path, target: Path) -> None:
    """Copy a unit or its drop-ins with `cp -a`; /etc and the prefix may be on different file systems."""
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


def adopt(layout: Layout, step: Adopt, note: Note) -> None:
    """Move a folder of the old installation into the data and change its owner to the service."""
    record = AdoptionJournal(layout)
    source, target = Path(step.source), layout.data.resolve() / step.name
    if step.name == "user":
        _keep_database(layout, source, record)
    left = _move_tree(source, target, record)
    for each in left[:20]:
        note(f"not moved, because data/ has one of that name: {each}")
    if left[20:]:
        note(f"and {len(left) - 20} more")
    moved = [Path(event.target) for event in record.events() if event.event == "rename"]
    owners = {*step.owners, layout.owner()[0]}
    kept = sum(
        _take_tree(layout, each, owners, record) for each in dict.fromkeys(moved) if target in (each, *each.parents)
    )
    if kept:
        note(f"files that keep their owners and modes (hard links, or owners other than the installation's): {kept}")


def _move_tree(source: Path, target: Path, record: AdoptionJournal) -> list[str]:
    """Rename a folder, or merge it into an existing one; return the paths that could not be moved."""
    left: list[str] = []
    pending = [(source, target)]
    while pending:
        here, there = pending.pop()
        if len(here.parts) - len(source.parts) > LEVELS or max(len(bytes(here)), len(bytes(there))) > LONGEST:
            left.append(str(here))
            continue
        if not os.path.lexists(here):
            continue
        with suppress(OSError), opened(there.parent) as place:
            os.rmdir(there.name, dir_fd=place)  # replace an empty folder
        if not os.path.lexists(there):
            record.add(AdoptionChange("rename", source=str(here), target=str(there)))
            rename(here, there)
        elif any(each.is_symlink() or not each.is_dir() for each in (here, there)):
            left.append(str(here))
        else:
            pending += [(each, there / each.name) for each in sorted(here.iterdir(), reverse=True)]
    return left


LONGEST = 3800
"""Maximum length of a path in bytes; the kernel accepts 4096."""


def _take_tree(layout: Layout, root: Path, owners: set[int], record: AdoptionJournal) -> int:
    """Set a tree's owner and group to the service's, except files not owned by `owners`; return the number kept."""
    left = 0
    with opened(root.parent) as parent:
        left += _take_entries(parent, root.parent, [root.name], layout.sharing(), owners, record)
    for folder in tree(root):
        try:
            with opened(folder) as place:
                names = os.listdir(place)  # noqa: PTH208  of an open folder
                left += _take_entries(place, folder, names, layout.sharing(), owners, record)
        except OSError as error:  # deleted, replaced by a link, or its path is too long
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
    return left


def _take_entries(
    place: int, folder: Path, names: list[str], owner: tuple[int, int], owners: set[int], record: AdoptionJournal
) -> int:
    """Do the same for entries of the open folder `place`. Records their owners and modes first."""
    changes: list[tuple[tuple[Any, ...], int]] = []
    left = 0
    for name in names:
        status = os.lstat(name, dir_fd=place)
        kind, mode = stat.S_IFMT(status.st_mode), _harmless(status.st_mode)
        if (kind == stat.S_IFREG and status.st_nlink > 1) or status.st_uid not in owners:
            left += 1  # another hard link may be another user's
            continue
        wanted = {stat.S_IFDIR: mode | 0o2770, stat.S_IFREG: mode | 0o660}.get(kind, mode)
        if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (*owner, wanted):
            changes.append(((name, status.st_uid, status.st_gid, mode, status.st_ino), wanted))
    if changes:
        record.add(AdoptionChange("own", folder=str(folder), entries=tuple(before for before, _ in changes)))
    for (name, *_, inode), wanted in changes:
        _set_owner(place, name, *owner, wanted, inode)
    return left


def _harmless(mode: int) -> int:
    """Clear the setuid and setgid bits of a file: it would run as the service or as the restored owner."""
    return stat.S_IMODE(mode) & (0o3777 if stat.S_ISDIR(mode) else 0o1777)


def _set_owner(place: int, name: str, user: int, group: int, mode: int, inode: int) -> None:
    """Set the owner and mode of an entry of an open folder; follow no symlink.

    Skips files with several hard links and files with another inode number.
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


def _keep_database(layout: Layout, folder: Path, record: AdoptionJournal) -> None:
    """Copy the old ComfyUI's database: a newer version migrates it, and the old one then fails. Raises AgentError."""
    kept = layout.state / "adopted/database"
    if kept.exists() or not folder.is_dir():
        return
    fresh = kept.with_name(".database")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    for name, status in _database(folder).items():
        if status.st_size > LARGEST:
            what = f"{folder / name} is {status.st_size} bytes, more than ComfyUI's database can have ({LARGEST})"
            raise AgentError("step", what, "", f"inspect it, then move it away: mv {folder / name} …")
        _copy_file(folder, fresh, name)
    record.add(AdoptionChange("database", folder=str(folder)))
    os.sync()
    fresh.rename(kept)
    sync(kept.parent)


def _database(folder: Path) -> dict[str, os.stat_result]:
    """Return the regular files of a ComfyUI's database."""
    found: dict[str, os.stat_result] = {}
    with opened(folder) as place:
        for name in DATABASE:
            with suppress(FileNotFoundError):
                found[name] = os.lstat(name, dir_fd=place)
    return {name: status for name, status in found.items() if stat.S_ISREG(status.st_mode)}


def _copy_file(source: Path, target: Path, name: str) -> None:
    """Copy a file with its owner and mode, up to its present size; never replace an existing file. Raises OSError."""
    with (
        opened(source) as here,
        opened(target) as there,
        open(name, "rb", opener=_within(here)) as old,
        open(name, "xb", opener=_within(there)) as new,
    ):
        status = os.fstat(old.fileno())
        left = min(LARGEST, status.st_size) if stat.S_ISREG(status.st_mode) else 0
        while block := old.read(min(left, 1 << 20)):
            left -= new.write(block)
        os.fchown(new.fileno(), status.st_uid, status.st_gid)
        os.fchmod(new.fileno(), status.st_mode & 0o777)
        new.flush()
        os.fsync(new.fileno())


def _unchanged(kept: Path, folder: Path) -> bool:
    """Return whether the database equals the kept copy; reads only if all sizes match."""
    old, now = _database(kept), _database(folder)
    if {name: each.st_size for name, each in old.items()} != {name: each.st_size for name, each in now.items()}:
        return False
    with opened(kept) as here, opened(folder) as there:
        for name, status in old.items():
            with open(name, "rb", opener=_within(here)) as one, open(name, "rb", opener=_within(there)) as other:
                if any(one.read(1 << 20) != other.read(1 << 20) for _ in range(0, status.st_size, 1 << 20)):
                    return False
    return True


def _within(place: int) -> Callable[[str, int], int]:
    """Return an opener for names in an open folder; it follows no symlink and does not block on pipes."""
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=place)


def _return_database(layout: Layout, folder: Path) -> None:
    """Restore the old database if a newer version has changed it; keep the newer one beside it."""
    kept = (layout.state / "adopted/database").resolve()
    if _unchanged(kept, folder):
        return
    for name in DATABASE:
        if os.path.lexists(folder / name):
            rename(folder / name, folder / f"{name}.newer-{now()}")
    for name in _database(kept):
        _copy_file(kept, folder, name)


def unadopt(layout: Layout, step: Unadopt, note: Note) -> None:
    """Undo an adoption, last change first: owners and modes, folders, database, units. Raises AgentError."""
    record = AdoptionJournal(layout)
    stuck: list[str] = []
    for event in reversed(record.events()):
        try:
            _undo(layout, event)
        except (AgentError, OSError) as error:
            stuck.append(str(error))
    if stuck:
        hint = "inspect them, then run the same command again"
        raise AgentError("step", f"paths that could not be restored: {len(stuck)}", "\n".join(stuck[:20]), hint)
    shutil.rmtree(layout.state / "adopted", ignore_errors=True)
    record.path.rename(record.path.with_name("adopted.undone.jsonl"))
    sync(layout.state)


def _undo(layout: Layout, event: AdoptionChange) -> None:
    """Undo one recorded change, if it was carried out."""
    if event.event == "own" and Path(event.folder).is_dir():
        with opened(Path(event.folder)) as place:
            for name, user, group, mode, *inode in event.entries:
                with suppress(FileNotFoundError):
                    # Records of older versions have no inode number.
                    same = inode[0] if inode else os.lstat(name, dir_fd=place).st_ino
                    _set_owner(place, name, user, group, mode, same)
                with suppress(OSError):  # added by a later deploy
                    os.removexattr(f"/proc/self/fd/{place}/{name}", SHARING, follow_symlinks=False)
    elif event.event == "rename" and os.path.lexists(event.target):
        rename(Path(event.target), Path(event.source))
    elif event.event == "database" and (layout.state / "adopted/database").is_dir():
        _return_database(layout, Path(event.folder))
    elif unit := event.unit:
        for own in (UNITS / unit.name, UNITS / f"{unit.name}.d"):
            if not os.path.lexists(own):
                _copy(layout.state / "adopted" / own.name, own)
        run(["systemctl", "daemon-reload"])
        if unit.enabled:
            run(["systemctl", "enable", unit.name])
        if unit.active:
            run(["systemctl", "start", unit.name])
