"""Fast replicas of a machine with a deployed ComfyUI, optionally with an image file as disk.

An image is on btrfs, so that a copy takes one ioctl: it contains the disk at that instant, as after a power cut,
without data that was only in the page cache of the inner file system. A loop device writes data to its file before it
acknowledges it, so the copy has every acknowledged write. (To simulate disks that lose their own cache before a flush,
device-mapper's dm-log-writes would be needed, which not every kernel has.)
"""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.host.machine import Machine, clear, mounted_below, place_for

FICLONE = 0x40049409
"""The ioctl that makes a file a copy of another one on the same file system, with shared blocks (linux/fs.h)."""

MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


def clone(image: Path, copy: Path) -> None:
    """Copy a file atomically, even while it is written."""
    with image.open("rb") as source, copy.open("wb") as target:
        fcntl.ioctl(target, FICLONE, source.fileno())


@contextmanager
def store() -> Iterator[Path]:
    """A folder on a separate btrfs, for images. It takes only the used space."""
    place = place_for("store")
    folder = place / "images"
    folder.mkdir(parents=True)
    try:
        subprocess.run(["truncate", "-s", "60G", str(place / "btrfs.img")], check=True)
        subprocess.run([*MKFS["btrfs"], "-m", "single", str(place / "btrfs.img")], check=True)
        subprocess.run(["mount", "-o", "loop,discard=sync", str(place / "btrfs.img"), str(folder)], check=True)
        yield folder
    finally:
        clear(place)


def make_image(place: Path, kind: str, size: str) -> Path:
    """A sparse image file with an empty file system of this type."""
    subprocess.run(["truncate", "-s", size, str(place)], check=True)
    subprocess.run([*MKFS[kind], str(place)], check=True)
    return place


def mount_image(image: Path, place: Path) -> None:
    """Mount an image, even if another one with the same UUID is still mounted.

    That can last: a mount namespace that another program created meanwhile also has the old disk's mount. XFS needs an
    option for it, btrfs supports it since Linux 6.7.
    """
    with image.open("rb") as file:
        options = "loop,nouuid" if file.read(4) == b"XFSB" else "loop"
    subprocess.run(["mount", "-o", options, str(image), str(place)], check=True)


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder on a file system of its own, in one file: a disk with online discard takes milliseconds to delete each
    of a real first deploy's 60,000 files."""
    place = place_for(name)
    folder = place / "disk"
    folder.mkdir(parents=True)
    try:
        mount_image(make_image(place / "disk.img", "ext4", "60G"), folder)
        yield folder
    finally:
        clear(place)


def unmount(place: Path) -> None:
    """Unmount everything below a folder, as soon as it is unused."""
    end = time.monotonic() + 20
    while points := mounted_below(place):
        if subprocess.run(["umount", "--quiet", str(points[0])], check=False).returncode:
            assert time.monotonic() < end, f"{points[0]} is in use"
            time.sleep(0.05)


@dataclass(kw_only=True)
class Replica(Machine):
    """A machine with the disk contents of another one, `of`; its prefix is on a plain file system, not overlayfs.

    With an `image`, all of the machine's writes are in that file. The environment, gigabytes that an update of ComfyUI
    does not change, is bind-mounted from the other machine instead of copied; uv's cache is left out.
    """

    of: Machine | None = None
    image: Path | None = None

    @property
    def disk(self) -> Path:
        return self.place / "disk"

    def mount(self) -> None:
        self.disk.mkdir(exist_ok=True)
        if self.image:
            mount_image(self.image, self.disk)
        inside = self.prefix.lstrip("/")
        upper = self.disk / "upper"
        if not upper.exists():
            (upper / inside).mkdir(parents=True)
            if self.of:
                self._fill(upper)
        super().mount()
        binds = {upper / inside: self.root / inside}
        if self.of:
            parts = Path(inside) / "parts"
            # only the current one: a deploy prunes those of old releases, and cannot delete a mount point
            used = (self.of.root / inside / "current/env").resolve()
            binds |= {used: self.root / parts / used.name}
        for source, target in binds.items():
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", str(source), str(target)], check=True)

    def _fill(self, upper: Path) -> None:
        """Copy the other machine's writes, with nanoseconds, owners, ACLs and overlayfs attributes."""
        assert self.of
        kept = ["--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner"]
        prefix = f".{self.prefix}"
        left_out = [f"--exclude={prefix}/{name}/*" for name in ("parts/env-*", "state/cache")]
        pack = ["tar", "-C", str(self.of.disk / "upper"), *kept, *left_out, "-cf", "-", "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            subprocess.run(["tar", "-C", str(upper), *kept, "-xpf", "-"], stdin=packing.stdout, check=True)
        assert packing.returncode in (0, 1)  # 1: a log grew during the copy

    def sync(self) -> None:
        """Flush all writes to disk: for the test, they happened long ago."""
        subprocess.run(["sync", "--file-system", str(self.disk)], check=True)

    def exchange_disk(self, image: Path) -> None:
        """Cut the power and replace the disk; `boot` then boots from the new one."""
        self.power_off()
        unmount(self.place)
        self.image = image
        self.mount()
