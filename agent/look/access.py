"""Access to the GPU's device files: modes, groups, and the settings that control them."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.layout import Layout
from agent.look.accounts import group_name, user_name
from agent.schema.settings import Access, Node, Rule


def access(layout: Layout, users: Sequence[str]) -> Access:
    """Return the GPU's device files, which `users` may not use each, and the settings that control access."""
    people = {name: _groups(name) for name in users}
    nodes: list[Node] = []
    for place in map(str, [*sorted(Path("/dev").glob("nvidia*")), *sorted(Path("/dev/dri").glob("render*"))]):
        status = Path(place).stat()
        if not stat.S_ISCHR(status.st_mode):
            continue
        group = group_name(status.st_gid)
        denied = tuple(name for name, groups in people.items() if not may_use(status, name, groups))
        nodes.append(Node(place, stat.S_IMODE(status.st_mode), user_name(status.st_uid), group, denied))
    params = {}
    with suppress(OSError):
        lines = Path("/proc/driver/nvidia/params").read_text().splitlines()
        split = (line.partition(": ") for line in lines)
        params = {
            name: value for name, _, value in split if name.startswith("DeviceFile") or name == "ModifyDeviceFiles"
        }
    rules: list[Rule] = []
    for folder in ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"):
        if Path(folder).resolve() in {Path(each.file).parent for each in rules}:
            continue  # /lib links to /usr/lib
        for path in sorted(Path(folder).resolve().glob("*.rules")):
            rules += [
                Rule(str(path), line.strip()[:200])
                for line in path.read_text(errors="replace").splitlines()
                if not line.lstrip().startswith("#") and re.search(r"nvidia|renderD|0x10de", line)
            ]
    return Access(tuple(nodes), params, tuple(rules), people)


def _groups(user: str) -> tuple[str, ...] | None:
    """Return a user's groups; None if the user does not exist."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return None
    return tuple(sorted(group_name(each) for each in os.getgrouplist(user, entry.pw_gid)))


def may_use(status: os.stat_result, user: str, groups: tuple[str, ...] | None) -> bool:
    """Return whether a user may read and write a device by its mode (ACLs are ignored)."""
    if groups is None:
        return False
    if user_name(status.st_uid) == user:
        return status.st_mode & 0o600 == 0o600
    shift = 3 if group_name(status.st_gid) in groups else 0
    return (status.st_mode >> shift) & 0o6 == 0o6
