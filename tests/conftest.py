"""Shared by all tests: a separate Hearth (cache, wheelhouse, recipes) and calls of `inv` in it."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import workspace
from tests.client import Client

FIXTURES = Path(__file__).parent / "fixtures"

PACKAGES = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "apt-get": "apt",
    "ccache": "ccache",
    "certutil": "libnss3-tools",
    "chromium-headless-shell": "chromium-headless-shell",
    "debootstrap": "debootstrap",
    "docker-registry": "docker-registry",
    "dpkg-deb": "dpkg",
    "fish": "fish",
    "g++": "g++",
    "Python.h": "python3-dev",
    "git": "git",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "jq": "jq",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.xfs": "xfsprogs",
    "munged": "munge",
    "nft": "nftables",
    "openssl": "openssl",
    "pgrep": "procps",
    "podman": "podman",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "qemu-aarch64-static": "qemu-user-static",
    "runc": "runc",
    "skopeo": "skopeo",
    "slurmctld": "slurm-wlm",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "sudo": "sudo",
    "systemd-analyze": "systemd",
    "systemd-nspawn": "systemd-container",
    "tcsh": "tcsh",
    "unshare": "util-linux",
    "zsh": "zsh",
}
"""The Debian package of each program that `needs` may name; .ci/run installs them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", action="store_true", help="every interruption at every step and operation, and many random times"
    )
    parser.addoption("--spark", action="store_true", help="a deploy to an emulated arm64 host")
    parser.addoption("--browser", action="store_true", help="people use a deployed gateway by Chromium")
    parser.addoption("--podman", action="store_true", help="deploys of containers to a Debian 13")


def pytest_configure() -> None:
    """Choose the seed of all random faults for this run; HEARTH_SEED repeats one. xdist passes it on."""
    os.environ.setdefault("HEARTH_SEED", str(random.SystemRandom().randrange(1_000_000)))
    os.environ["PATH"] = _without_shims(os.environ.get("PATH", os.defpath))
    gc.set_threshold(100_000, 50, 50)  # thousands of collected tests are no garbage


def _without_shims(path: str) -> str:
    """A PATH with pyenv's chosen versions instead of its shims: starting one of those runs forty shell scripts."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    chosen = os.environ.get("PYENV_VERSION", "").split(":")
    if chosen == [""]:
        chosen = (root / "version").read_text().split() if (root / "version").is_file() else []
    direct = [str(max(found)) for version in chosen if (found := [*root.glob(f"versions/{version}*/bin")])]
    places = [direct if place == str(root / "shims") and direct else [place] for place in path.split(os.pathsep)]
    return os.pathsep.join(each for place in places for each in place)


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_report_header() -> str:
    return f"HEARTH_SEED={os.environ['HEARTH_SEED']}"


def _has(name: str, path: str) -> bool:
    header = Path(sysconfig.get_path("include"), name)
    return header.exists() if header.suffix == ".h" else bool(shutil.which(name, path=path))


FIRST = (
    "host/test_deploy.py",
    "host/test_readme.py",
    "kernels/test_build.py",
    "kernels/test_faults.py",
    "host/test_update.py",
    "unit/test_workflows.py",
    "unit/test_hostile.py",
    "unit/test_wheelhouse.py",
    "unit/test_preview.py",
)
"""Those that take longest. On a new machine, all hosts wait for the environment that the first one makes."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn `needs` into skips that name the packages to install. In CI (`CI` is set), the test fails instead."""
    items.sort(key=lambda item: FIRST.index(name) if (name := "/".join(item.path.parts[-2:])) in FIRST else len(FIRST))
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    for item in items:
        needed = [str(name) for mark in item.iter_markers("needs") for name in mark.args]
        needed += ["Python.h"] if "g++" in needed else []  # what is compiled includes it
        packages = {PACKAGES[name] for name in needed if name != "root" and not _has(name, path)}
        reasons = [f"apt-get install {' '.join(sorted(packages))}"] if packages else []
        reasons += ["run as root"] if "root" in needed and os.geteuid() != 0 else []
        if reasons and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))
        item.stash[LACKS] = "; ".join(reasons)


LACKS = pytest.StashKey[str]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if lacks := item.stash.get(LACKS, ""):
        pytest.fail(f"CI cannot leave this test out: {lacks}", pytrace=False)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """Undo PR_SET_CHILD_SUBREAPER (prctl(2)), which code under test sets."""
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


@dataclass
class Hearth(Client):
    """A separate cache, wheelhouse and recipe folder; compilers and torch come from the user's cache."""

    without = ("TORCH_CUDA_ARCH_LIST",)

    place: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache.mkdir(parents=True)
        # Gigabytes that no test changes: installed once a machine, shared between tests.
        for shared in ("installed", "exports", "emulation", "pycache"):
            real = workspace.current().cache / shared
            real.mkdir(parents=True, exist_ok=True)
            (self.cache / shared).symlink_to(real)
        shutil.copytree(FIXTURES / "recipes", self.recipes)

    @property
    def cache(self) -> Path:
        return self.place / "cache"

    @property
    def wheelhouse(self) -> Path:
        return self.place / "wheelhouse"

    @property
    def recipes(self) -> Path:
        return self.place / "recipes"

    @property
    def tiny(self) -> Path:
        return self.recipes / "tiny"

    def wheels(self) -> list[Path]:
        return sorted(self.wheelhouse.rglob("*.whl"))

    def variables(self) -> dict[str, str]:
        own = {
            "HEARTH_CACHE": str(self.cache),
            "HEARTH_WHEELHOUSE": str(self.wheelhouse),
            "HEARTH_RECIPES": str(self.recipes),
        }
        return {**own, **self.env}

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in a file of the tiny recipe; the text must be there."""
        path = self.tiny / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for builds that need not compile anything themselves: ccache has what one of them has compiled."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place  # all workers share one
    return {"HEARTH_COMPILER_LAUNCHER": "ccache", "CCACHE_DIR": str(place / "ccache")} if shutil.which("ccache") else {}


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    return Hearth(tmp_path / "hearth")
