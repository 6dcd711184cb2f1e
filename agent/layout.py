"""Where everything of one host lies, and who may do what there."""

from __future__ import annotations

import grp
import json
import os
import pwd
import struct
from contextlib import suppress
from pathlib import Path

from agent.files import Fault, Json, read, write


class Layout:
    """Where on this host: the folders of a prefix, and who owns them."""

    def __init__(self, layout: Json) -> None:
        self.json = layout
        self.prefix = Path(layout["prefix"]).expanduser()
        self.service = str(layout["service"])
        self.scope = str(layout["scope"])  # "system" (root, systemd) or "user"
        self.user = str(layout["user"])  # whom the service runs as; empty: whoever runs this
        self.group = f"{self.user}-members" if self.user else ""  # the people's, which the service is not in
        self.exporter = str(layout.get("exporter", ""))  # whom its exporter runs as
        self.public = bool(layout.get("public"))  # whether everybody on the machine may read the data
        self.address = str(layout["address"])
        self.port = int(layout["port"])
        self.mounts: dict[str, str] = layout.get("mounts", {})  # systemd's unit for each mount point
        self.elsewhere: dict[str, str] = layout.get("folders", {})  # where folders lie that are not in the data
        self.parts = self.prefix / "parts"
        self.releases = self.prefix / "releases"
        self.current = self.prefix / "current"
        self.data = self.prefix / "data"
        self.state = self.prefix / "state"
        self.secrets = self.prefix / "secrets"
        self.incoming = self.state / "incoming"
        self.agent = self.state / "agent"  # the agent that units run
        self.exporter_agent = self.state / "exporter"  # the agent that the exporter's unit runs
        self.exporter_settings = self.state / "exporter.json"
        self.pending = self.state / "pending.json"
        self.history = self.state / "history.jsonl"
        self.lock = self.state / "lock"
        self.cut = self.state / "cut-over.json"
        self.paused = self.state / "paused.json"
        self.lingered = self.state / "lingered"  # the login's systemd outlives it since Hearth asked for that
        self.database = self.data / "user/comfyui.db"
        self.choice = self.state / "manager.json"  # which manager runs the service

    def release(self) -> str:
        """The current release's id; empty when there is none. Raises Fault when `current` is not Hearth's."""
        if not self.current.is_symlink():
            if self.current.exists():
                raise Fault(
                    "foreign",
                    f"{self.current} is no link of Hearth's",
                    "something else made it, or it was edited by hand",
                    f"look at it, move it away (mv {self.current} {self.current}.old), then deploy again",
                )
            return ""
        target = self.current.readlink()
        if target.parent != Path("releases") or not read(self.releases / target.name / "release.json", lenient=True):
            raise Fault(
                "foreign",
                f"{self.current} points at {target}, which is no release of Hearth's",
                "the release was deleted or damaged, or the link was edited by hand",
                f"remove the link (rm {self.current}), then deploy again; data/ is not touched by that",
            )
        return target.name

    def note_manager(self, name: str) -> None:
        """Record which manager runs the service."""
        with suppress(OSError):  # a full disk must not stop a revert; the unit or `enabled` shows it, too
            write(self.choice, json.dumps({"manager": name}))

    def folder(self, name: str) -> Path:
        """Where ComfyUI has its models, input, output or user files."""
        return Path(self.elsewhere.get(name) or self.data / name)

    def unmounted(self) -> list[str]:
        """The mount points where nothing is mounted."""
        return [path for path in self.mounts if not os.path.ismount(path)]

    def manifest(self, release: str) -> Json:
        """What a release is; empty when it is not there."""
        return read(self.releases / release / "release.json")

    def owner(self) -> tuple[int, int]:
        """User and group of the service, or -1 (unchanged) when it runs as whoever runs this."""
        if not self.user:
            return -1, -1
        entry = pwd.getpwnam(self.user)
        return entry.pw_uid, entry.pw_gid

    def sharing(self) -> tuple[int, int]:
        """User and group that the data belongs to: the service's user, and the members' group."""
        return (self.owner()[0], grp.getgrnam(self.group).gr_gid) if self.user else self.owner()


SHARING = "system.posix_acl_default"


def shared(mode: int, user: int) -> bytes:
    """What is made in a folder of this mode gets, whatever its maker's umask: owner, service and members may do all.

    An access control list as the kernel keeps it (acl(5), include/uapi/linux/posix_acl_xattr.h).
    """
    nobody = 0xFFFFFFFF
    entries = ((0x01, 7, nobody), (0x02, 7, user), (0x04, 7, nobody), (0x10, 7, nobody), (0x20, mode & 5, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


PROOF = "hearth-gate"
"""The folder in the output where the health gate has its picture written, for a moment."""

DATA = ("models", "input", "output", "user", "temp", "cache", "datasets")
"""The folders of the data that ComfyUI writes to."""

SHARED = ("models", "input", "output", "user/default")
"""What of the data its members may change. The rest holds code: caches of compiled kernels and of torch.hub, what nodes
keep, extensions of the interface."""

UNUSED = "custom_nodes"
"""A folder of the data that nothing is loaded from: nodes are the release's. It is empty, root's and read-only, so that
whoever puts one there is told."""

DATABASE = ("comfyui.db", "comfyui.db-wal", "comfyui.db-shm", "comfyui.db-journal")
"""The files of ComfyUI's database, SQLite's (sqlite.org/tempfiles.html); what else is named alike is the user's."""
