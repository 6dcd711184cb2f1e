"""Users, groups and their permissions."""

from __future__ import annotations

import grp
import pwd
import shutil
from contextlib import suppress
from pathlib import Path

from agent.layout import Layout


def user_exists(name: str) -> bool:
    """Return whether a user exists; true for an empty name."""
    with suppress(KeyError):
        return not name or bool(pwd.getpwnam(name))
    return False


def user_name(number: int) -> str:
    """Return a user's name, or the number of an unknown one."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """Return a group's name, or the number of an unknown one."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def account_problem(layout: Layout) -> str:
    """Return why the service must not run as its existing user; empty if it may.

    Any other process of that user allows escaping the unit's sandbox through /proc/PID/root.
    """
    with suppress(KeyError):
        entry = pwd.getpwnam(layout.user) if layout.user else None
        if entry and entry.pw_uid == 0:
            return "is root"
        if entry and entry.pw_dir != str(layout.data) and Path(entry.pw_dir).exists():
            return f"has its home in {entry.pw_dir}: other programs of that user would be a way out of the sandbox"
    return ""


def group_members(layout: Layout) -> tuple[str, ...] | None:
    """Return the members' group; None if it does not exist or the service's own group has members."""
    groups = {each.gr_name: each.gr_mem for each in grp.getgrall()} if layout.user else {"": []}
    return None if layout.group not in groups or groups.get(layout.user) else tuple(sorted(groups[layout.group]))


def member_rights(layout: Layout) -> str | None:
    """Return Hearth's sudoers file for members; empty if missing, None without sudo or a service user."""
    if not layout.user or not shutil.which("visudo", path="/usr/sbin:/sbin"):
        return None
    with suppress(OSError):
        return sudoers(layout).read_text()
    return ""


def sudoers(layout: Layout) -> Path:
    """Return the path of Hearth's sudoers file for members."""
    return Path(f"/etc/sudoers.d/hearth-{layout.service}")
