"""Replicas of a machine that ComfyUI is deployed to, made in seconds; also ones whose disk is an image file.

An image lies on btrfs, so that a copy of it is one ioctl: it has what the disk had in that instant, as after a power
cut, and nothing that was only in the memory of the file system inside. A loop device writes what it gets to its file
before it says that it has, so the copy lacks no write that was acknowledged. (Disks that lose their own cache, which
they may until they are told to flush, need device-mapper's dm-log-writes, which is not in every kernel.)
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
"""The ioctl that makes a file a copy of another one on the same file system, sharing its blocks (linux/fs.h)."""

MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


def clone(image: Path, copy: Path) -> None:
    """Copy a file in one atomic step, also one that is being written to."""
    with image.open("rb") as source, copy.open("wb") as target:
        fcntl.ioctl(target, FICLONE, source.fileno())


@contextmanager
def store() -> Iterator[Path]:
    """A folder on a btrfs of its own, for images. It takes only the space that is in use."""
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
    """An image file with an empty file system of a kind, sparse."""
    subprocess.run(["truncate", "-s", size, str(place)], check=True)
    subprocess.run([*MKFS[kind], str(place)], check=True)
    return place


def mount_image(image: Path, place: Path) -> None:
    """Mount an image, also where another one with the same UUID still is mounted.

    It may be for long: a mount namespace that some other program made meanwhile has the mount of the disk before, too.
    XFS has to be told, btrfs knows since Linux 6.7.
    """
    with image.open("rb") as file:
        options = "loop,nouuid" if file.read(4) == b"XFSB" else "loop"
    subprocess.run(["mount", "-o", options, str(image), str(place)], check=True)


def unmount(place: Path) -> None:
    """Unmount all below a folder, as soon as nothing uses it any more."""
    end = time.monotonic() + 20
    while points := mounted_below(place):
        if subprocess.run(["umount", "--quiet", str(points[0])], check=False).returncode:
            assert time.monotonic() < end, f"{points[0]} is in use"
            time.sleep(0.05)


@dataclass(kw_only=True)
class Replica(Machine):
    """A machine with what another one has on its disk, `of`; its prefix is a file system's own folder, not overlayfs.

    With an `image`, all that the machine writes is in that file. The environment, gigabytes that an update of ComfyUI
    does not touch, is not copied but bound from the other machine, and uv's cache is left out.
    """

    of: Machine | None = None
    image: Path | None = None
    downloads: bool = False

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
            binds |= {path: self.root / parts / path.name for path in (self.of.root / parts).glob("env-*")}
        for source, target in binds.items():
            subprocess.run(["mount", "--bind", str(source), str(target)], check=True)

    def _fill(self, upper: Path) -> None:
        """Copy what the other machine has written, with nanoseconds, owners, lists of access and overlayfs's notes."""
        assert self.of
        kept = ["--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner"]
        prefix = f".{self.prefix}"
        left_out = [f"--exclude={prefix}/{name}/*" for name in ("parts/env-*", "state/cache")]
        pack = ["tar", "-C", str(self.of.disk / "upper"), *kept, *left_out, "-cf", "-", "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            subprocess.run(["tar", "-C", str(upper), *kept, "-xpf", "-"], stdin=packing.stdout, check=True)
        assert packing.returncode in (0, 1)  # 1: a log grew meanwhile

    def sync(self) -> None:
        """Bring to the disk what was written so far: it is long ago, as far as the test is concerned."""
        subprocess.run(["sync", "--file-system", str(self.disk)], check=True)

    def exchange_disk(self, image: Path) -> None:
        """Pull the plug and put another disk in; `boot` boots from it."""
        self.power_off()
        unmount(self.place)
        self.image = image
        self.mount()
