"""Paths, users and permissions of one host."""

from __future__ import annotations

import grp
import os
import pwd
import struct
from contextlib import suppress
from pathlib import Path

from agent.files import AgentError, Json, record, recorded
from agent.schema.decode import decode
from agent.schema.manifest import ReleaseManifest
from agent.schema.records import Choice
from agent.schema.site import Site


class Layout:
    """The folders of a prefix and their owners."""

    def __init__(self, layout: Json) -> None:
        self.site = site = decode(Site, layout, lenient=True)
        self.prefix = Path(site.prefix).expanduser()
        self.service, self.scope, self.user = site.service, site.scope, site.user
        self.group = f"{self.user}-members" if self.user else ""  # the members' group, without the service
        self.exporter, self.public = site.exporter, site.public
        self.address, self.port, self.trial = site.address, site.port, site.trial
        self.mounts, self.elsewhere = site.mounts, site.folders
        self.parts = self.prefix / "parts"
        self.releases = self.prefix / "releases"
        self.current = self.prefix / "current"
        self.data = self.prefix / "data"
        self.state = self.prefix / "state"
        self.secrets = self.prefix / "secrets"
        self.incoming = self.state / "incoming"
        self.agent = self.state / "agent"  # the agent used by units
        self.exporter_agent = self.state / "exporter"  # the agent used by the exporter's unit
        self.exporter_settings = self.state / "exporter.json"
        self.pending = self.state / "pending.json"
        self.history = self.state / "history.jsonl"
        self.lock = self.state / "lock"
        self.cut = self.state / "cut-over.json"
        self.paused = self.state / "paused.json"
        self.lingered = self.state / "lingered"  # exists if Hearth has enabled lingering
        self.database = self.data / "user/comfyui.db"
        self.databases = self.state / "databases"  # of releases whose successor has migrated it, by release
        self.choice = self.state / "manager.json"  # which manager runs the service

    def release(self) -> str:
        """Return the current release's id; empty if there is none. Raises AgentError if `current` is not Hearth's."""
        if not self.current.is_symlink():
            if self.current.exists():
                raise AgentError(
                    "foreign",
                    f"{self.current} is not Hearth's link",
                    "another program made it, or it was edited by hand",
                    f"inspect it, move it away (mv {self.current} {self.current}.old), then run inv deploy",
                )
            return ""
        target = self.current.readlink()
        place = self.releases / target.name / "release.json"
        if target.parent != Path("releases") or not recorded(place, ReleaseManifest, lenient=True).id:
            raise AgentError(
                "foreign",
                f"{self.current} points at {target}, which is not a release",
                "the release was deleted or damaged, or the link was edited by hand",
                f"remove the link (rm {self.current}), then run inv deploy; data/ stays as it is",
            )
        return target.name

    def note_manager(self, name: str) -> None:
        """Record the service's manager."""
        with suppress(OSError):  # a full disk must not stop a revert; the unit and `enabled` also show it
            record(self.choice, Choice(name))

    def folder(self, name: str) -> Path:
        """Return ComfyUI's models, input, output or user folder."""
        return Path(self.elsewhere.get(name) or self.data / name)

    def unmounted(self) -> list[str]:
        """Return the mount points where nothing is mounted."""
        return [path for path in self.mounts if not os.path.ismount(path)]

    def check_mounted(self) -> None:
        """Raise AgentError if a mount is missing that the plan found: systemd would wait for it without a limit."""
        if missing := self.unmounted():
            what = f"{' and '.join(missing)} was unmounted after the plan was made"
            raise AgentError("step", what, "", "mount it there, then run the same command again")

    def manifest(self, release: str) -> ReleaseManifest:
        """Return a release's manifest; without an id if it does not exist. Raises AgentError if it is damaged."""
        return recorded(self.releases / release / "release.json", ReleaseManifest)

    def owner(self) -> tuple[int, int]:
        """Return the service's uid and gid; -1 (unchanged) if it has no user. Raises KeyError for an unknown user."""
        if not self.user:
            return -1, -1
        entry = pwd.getpwnam(self.user)
        return entry.pw_uid, entry.pw_gid

    def sharing(self) -> tuple[int, int]:
        """Return the data's uid and gid: the service's user and the members' group. Raises KeyError."""
        return (self.owner()[0], grp.getgrnam(self.group).gr_gid) if self.user else self.owner()


SHARING = "system.posix_acl_default"


def shared(mode: int, user: int) -> bytes:
    """Return a folder's default ACL: owner, `user` and group get full access to new entries, whatever the umask.

    Others get the folder's `mode` without write access. Encoding: acl(5), include/uapi/linux/posix_acl_xattr.h.
    """
    nobody = 0xFFFFFFFF
    entries = ((0x01, 7, nobody), (0x02, 7, user), (0x04, 7, nobody), (0x10, 7, nobody), (0x20, mode & 5, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


PROOF = "hearth-gate"
"""The folder in the output for the health gate's temporary pictures."""

DATA = ("models", "input", "output", "user", "temp", "cache", "datasets")
"""The data folders that ComfyUI writes to."""

SHARED = ("models", "input", "output", "user/default")
"""The data folders that members may change. The others contain code: compiled kernels, torch.hub, the nodes' files,
frontend extensions."""

UNUSED = "custom_nodes"
"""A data folder from which nothing is loaded: nodes belong to the release. It is empty, owned by root and read-only, so
that installing a node there fails with an error."""

DATABASE = ("comfyui.db", "comfyui.db-wal", "comfyui.db-shm", "comfyui.db-journal")
"""The files of ComfyUI's SQLite database (sqlite.org/tempfiles.html); other files with similar names are the user's."""
