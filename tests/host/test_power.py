"""Power cuts: a machine boots from its disk at one instant of a deploy; release and data must be intact.

The disk is an image file that is copied repeatedly during a deploy; some randomly chosen copies are booted. It
contains all writes of the machine, including systemd's units, so a copy is a consistent instant. It lacks the Debian
base below the overlay, and the environment in an update, which does not write to it (see replica.py); in a first
deploy the environment is on the disk. `--faults` makes 42 cuts, otherwise three. HEARTH_SEED repeats a choice, but the
deploy's timing still varies.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from agent.change import database, folders
from agent.files import discard, write
from agent.layout import Layout
from agent.parts import damage_of, part
from agent.schema.change import Folders
from agent.serve.systemd import Systemd
from tests.host import replica
from tests.host.fleet import PREFIX, Fleet, within
from tests.host.machine import place_for
from tests.host.replica import Replica
from tests.host.small import small
from tests.host.test_deploy import broken
from tests.host.test_faults import MIGRATES

pytestmark = pytest.mark.host

UNHEALTHY = "[hosts.spark.override]\nstart_seconds = 6\n"
"""The health gate's duration for a release that never answers."""


@dataclass(frozen=True)
class Cut:
    """The disk at one instant, and the release that was current then."""

    image: Path
    at: float
    current: str


@dataclass
class Tower(Fleet):
    """A fleet whose machine's disk can be replaced."""

    machine: Replica


@pytest.fixture(scope="module")
def images() -> Iterator[Path]:
    with replica.store() as folder:
        yield folder


@pytest.fixture(scope="module")
def original(deployed: Fleet) -> Iterator[Fleet]:
    """The deployed machine, powered off: replicas use its port meanwhile."""
    deployed.machine.power_off()
    yield deployed
    deployed.machine.boot()
    assert deployed.answers()


@contextmanager
def tower(folder: Path, images: Path, kind: str, of: Fleet | None) -> Iterator[Tower]:
    """A booted machine with this file system type: a replica that answers, or one with an empty disk."""
    image = replica.make_image(images / f"{kind}.img", kind, "20G")
    settings: dict[str, Any] = {"of": of.machine, "port": of.machine.port} if of else {}
    fleet = Tower(Replica(place_for("tower"), PREFIX, image=image, **settings), folder)
    fleet.configure()
    try:
        fleet.machine.boot()
        assert not of or fleet.answers(90)
        fleet.machine.sync()
        yield fleet
    finally:
        fleet.machine.discard()
        for left in images.iterdir():
            left.unlink()


def chance(request: pytest.FixtureRequest) -> random.Random:
    """A test's own random numbers; the seed is printed with its output."""
    print(f"HEARTH_SEED={os.environ['HEARTH_SEED']}")
    return random.Random(f"{os.environ['HEARTH_SEED']} {request.node.name}")


def cuts(fleet: Tower, client: Popen[str], rest: float, random_: random.Random) -> list[Cut]:
    """Copy the disk at random times until `rest` seconds after the client's end, more often after a journal entry."""
    found: list[Cut] = []
    runs, image = fleet.prefix / "state/runs", fleet.machine.image
    assert image

    def journalled() -> int:
        size = 0
        for path in runs.glob("*.jsonl"):
            with suppress(FileNotFoundError):  # pruned just now
                size += path.stat().st_size
        return size

    end, changed, size = float("inf"), 0.0, 0
    while time.monotonic() < end:
        if end == float("inf") and client.poll() is not None:
            end = time.monotonic() + rest
        pause = random_.uniform(0, 0.15 if time.monotonic() < changed + 1 else 0.8)
        resume = time.monotonic() + pause
        while time.monotonic() < resume:
            if size != (size := journalled()):
                changed = time.monotonic()
                break
            time.sleep(0.005)
        current = fleet.prefix / "current"
        now = current.readlink().name if current.is_symlink() else ""
        copy = image.with_name(f"cut-{len(found)}.img")
        replica.clone(image, copy)
        found.append(Cut(copy, time.monotonic(), now))
    return found


def damaged(fleet: Fleet) -> list[str]:
    """Files in finished environments whose size differs from their package's RECORD.

    Hearth knows only a part's state at its completion. uv does not sync the files that it unpacks into its cache, and
    a resumed deploy uses those.
    """
    found: list[str] = []
    for record in (fleet.prefix / "parts").glob("env-*/lib/python*/site-packages/*.dist-info/RECORD"):
        packages = record.parents[1]
        with record.open(newline="") as file:
            for path, _, size in csv.reader(file):
                whole = packages / path
                if size and not path.startswith("..") and not (whole.is_file() and whole.stat().st_size == int(size)):
                    found.append(path)
    return found


def recovers(fleet: Tower, cut: Cut, allowed: set[str], **env: str) -> None:
    """Boot from a cut: the run ends by itself, a deploy converges, and a second one has nothing to do."""
    fleet.machine.exchange_disk(cut.image)
    cut.image.unlink()  # it is mounted
    fleet.machine.boot()
    now = fleet.current() if (fleet.prefix / "current").is_symlink() else ""
    assert now in allowed
    assert within(240, lambda: not (fleet.prefix / "state/pending.json").exists()), fleet.machine.run(
        "journalctl --no-pager -u comfyui-apply | tail -50"
    )
    assert damaged(fleet) == []
    ended = fleet.current() if (fleet.prefix / "current").is_symlink() else ""
    assert ended in allowed
    if ended:
        assert fleet.answers(120), fleet.machine.run("journalctl --no-pager -u comfyui | tail -50")
        fleet.database()
    done = fleet.deploy("--no-trial", **env)
    assert done.returncode == 0, done.stderr
    again = fleet.deploy(**env)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stdout + again.stderr
    assert fleet.answers(1)
    assert fleet.records() == set()


@contextmanager
def disks(images: Path) -> Iterator[tuple[Path, Path, Path, Path]]:
    """Paths for an image and its copy, and folders to mount them; all are removed afterwards."""
    image, copy, disk, other = (images / name for name in ("one.img", "two.img", "disk", "other"))
    disk.mkdir()
    other.mkdir()
    try:
        yield image, copy, disk, other
    finally:
        for mounted in (disk, other):
            replica.unmount(mounted)
            mounted.rmdir()
        image.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [*replica.MKFS])
def test_replica_has_synced_data_only(images: Path, kind: str) -> None:
    """The basis of all tests in this file."""
    with disks(images) as (image, copy, disk, other):
        replica.mount_image(replica.make_image(image, kind, "1G"), disk)
        (disk / "synced").write_text("synced")
        subprocess.run(["sync", "--file-system", str(disk)], check=True)
        (disk / "not").write_text("not")
        replica.clone(image, copy)
        replica.mount_image(copy, other)
        assert (other / "synced").read_text() == "synced"
        assert not (other / "not").exists()


@pytest.mark.parametrize("kind", [*replica.MKFS])
def test_recorded_steps_survive_power_loss(images: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A synced record implies that an earlier action is on disk. btrfs syncs only the requested file."""
    with disks(images) as (image, copy, disk, other):
        replica.mount_image(replica.make_image(image, kind, "1G"), disk)
        layout = Layout(
            {"prefix": f"{disk}/prefix", "service": "s", "scope": "user", "user": "", "address": "", "port": 1}
        )
        monkeypatch.setenv("HOME", f"{disk}/home")
        units, kept = Systemd(layout).units, layout.state / "database"
        monkeypatch.setattr("agent.serve.systemd.run", lambda *_: "")
        for path in (units / "default.target.wants/s.service", layout.paused, layout.database, kept / "comfyui.db"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("old")
        layout.database.with_name("comfyui.db-wal").write_text("new")
        os.sync()  # simulates that all this happened long ago

        folders.folders(layout, Folders("t", "w", "u"), lambda _: None)
        with part(layout, "env-1") as place:
            (place / "python").write_text("python")
        Systemd(layout).disable()
        discard(layout.paused)
        database.restore(kept, layout.database.parent)
        write(layout.state / "record", "all that was done")
        replica.clone(image, copy)

        replica.mount_image(copy, other)
        found = Layout({**vars(layout.site), "prefix": f"{other}/prefix"})
        assert (found.state / "record").exists()
        assert (found.parts / "env-1/python").read_text() == "python"
        assert damage_of(found.parts / "env-1") == ""
        assert (found.data / "cache").is_dir()
        assert not (other / units.relative_to(disk) / "default.target.wants/s.service").exists()
        assert not found.paused.exists()
        assert not found.database.with_name("comfyui.db-wal").exists()


def series(*always: str) -> Iterator[object]:
    """(file system, number of cuts): one for each named one, many more with `--faults`."""
    for kind in replica.MKFS:
        yield pytest.param(kind, 1, id=kind, marks=[] if kind in always else [pytest.mark.faults])
        yield pytest.param(kind, 4, id=f"{kind}-more", marks=pytest.mark.faults)


@pytest.mark.parametrize(("kind", "count"), [*series("ext4")])
def test_power_loss_during_an_update(
    original: Fleet, images: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str, count: int
) -> None:
    with tower(tmp_path, images, kind, original) as fleet:
        old, data = fleet.current(), fleet.data()
        app = str(small(fleet.place, "other"))
        random_ = chance(request)
        client = fleet.start("deploy", "--host", "spark", HEARTH_APP=app)
        found = cuts(fleet, client, 6, random_)
        said, _ = client.communicate()
        assert client.returncode == 0, said
        new = fleet.current()
        assert new != old
        for cut in random_.sample(found, count):
            recovers(fleet, cut, {old, new}, HEARTH_APP=app)
            assert fleet.current() == new
            assert fleet.data() == data


@pytest.mark.parametrize(("kind", "count"), [*series("ext4")])
def test_power_loss_during_rollback_of_a_migration(
    original: Fleet, images: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str, count: int
) -> None:
    """Half of the cuts are in its gate, half from a second before its revert to six after its end; at least one each.

    The old release refuses a migrated database, so it answers only on the right one.
    """
    with tower(tmp_path, images, kind, original) as fleet:
        old, data, tables = fleet.current(), fleet.data(), fleet.database()
        app = str(fleet.comfyui("migrates", broken(MIGRATES)))
        random_ = chance(request)
        fleet.configure(UNHEALTHY)
        client = fleet.start("deploy", "--host", "spark", "--no-trial", HEARTH_APP=app)
        found = cuts(fleet, client, 6, random_)
        said, _ = client.communicate()
        assert client.returncode == 66, said
        fleet.configure()
        gate = [cut for cut in found if cut.current != old]
        revert = [cut for cut in found if cut.at > gate[-1].at - 1]
        half = (count + 1) // 2
        for cut in random_.sample(gate, half) + random_.sample(revert, half):
            recovers(fleet, cut, {old, cut.current})
            assert fleet.current() == old
            assert fleet.database() == tables
            assert fleet.data() == data


@pytest.mark.faults
@pytest.mark.parametrize("kind", [*replica.MKFS])
def test_power_loss_during_a_first_deploy(
    images: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    """Its environment is created on the disk, gigabytes of files that are not synced individually: three cuts."""
    with tower(tmp_path, images, kind, None) as fleet:
        random_ = chance(request)
        client = fleet.start("deploy", "--host", "spark")
        found = cuts(fleet, client, 6, random_)
        said, _ = client.communicate()
        assert client.returncode == 0, said
        new = fleet.current()
        for cut in random_.sample(found, 3):
            recovers(fleet, cut, {"", new})
            assert fleet.current() == new
