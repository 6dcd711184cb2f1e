"""What tests share: a Hearth of their own (cache, wheelhouse, recipes) and a way to call `inv` in it."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import workspace
from tests.client import Client

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_configure() -> None:
    """Choose the seed of all random faults, anew for every run; HEARTH_SEED repeats one. xdist passes it on."""
    os.environ.setdefault("HEARTH_SEED", str(random.SystemRandom().randrange(1_000_000)))


def pytest_report_header() -> str:
    return f"HEARTH_SEED={os.environ['HEARTH_SEED']}"


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """What code under test does to have the children of its children (prctl(2)) ends with the test."""
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


@dataclass
class Hearth(Client):
    """A cache, a wheelhouse and a recipe folder in one place; compilers and torch come from the user's cache."""

    without = ("TORCH_CUDA_ARCH_LIST",)

    place: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache.mkdir(parents=True)
        # Gigabytes that no test changes: installed once a machine, shared between tests.
        for shared in ("installed", "exports", "emulation"):
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
        return sorted(self.wheelhouse.glob("*.whl"))

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


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    return Hearth(tmp_path / "hearth")
