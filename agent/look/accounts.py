"""Users, groups and their rights."""

from __future__ import annotations

import grp
import pwd
import shutil
from contextlib import suppress
from pathlib import Path

from agent.layout import Layout


def user_exists(name: str) -> bool:
    """Whether a user exists; true for no name."""
    with suppress(KeyError):
        return not name or bool(pwd.getpwnam(name))
    return False


def account_problem(layout: Layout) -> str:
    """Why the service must not run as a user that is there; empty when it may.

    Whatever else runs as that user is a way out of the unit's sandbox, by /proc/PID/root.
    """
    with suppress(KeyError):
        entry = pwd.getpwnam(layout.user) if layout.user else None
        if entry and entry.pw_uid == 0:
            return "is root"
        if entry and entry.pw_dir != str(layout.data) and Path(entry.pw_dir).exists():
            return f"has its home in {entry.pw_dir}: what else runs as it would be a way out of the sandbox"
    return ""


def group_members(layout: Layout) -> tuple[str, ...] | None:
    """Who is in the members' group; None when that is not there, or people are in the service's own group."""
    groups = {each.gr_name: each.gr_mem for each in grp.getgrall()} if layout.user else {"": []}
    return None if layout.group not in groups or groups.get(layout.user) else tuple(sorted(groups[layout.group]))


def member_rights(layout: Layout) -> str | None:
    """What members may do by sudo, as our file says; None where there is no sudo."""
    if not layout.user or not shutil.which("visudo", path="/usr/sbin:/sbin"):
        return None
    with suppress(OSError):
        return sudoers(layout).read_text()
    return ""


def sudoers(layout: Layout) -> Path:
    """What members may do as root."""
    return Path(f"/etc/sudoers.d/hearth-{layout.service}")
