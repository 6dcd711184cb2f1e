"""What tests share: a Hearth of their own (cache, wheelhouse, recipes) and a way to call `inv` in it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core import files

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass
class Hearth:
    """A cache, a wheelhouse and a recipe folder in one place; compilers and torch come from the user's cache."""

    place: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache.mkdir(parents=True)
        # Gigabytes that no test changes: installed once a machine, shared between tests.
        for shared in ("installed", "exports", "emulation"):
            real = files.cache() / shared
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

    def environment(self, **env: str) -> dict[str, str]:
        own = {
            "HEARTH_CACHE": str(self.cache),
            "HEARTH_WHEELHOUSE": str(self.wheelhouse),
            "HEARTH_RECIPES": str(self.recipes),
        }
        inherited = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
        return {**inherited, **own, **self.env, **env}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "invoke", *words]

    def inv(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=files.CHECKOUT,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=files.CHECKOUT,
            env=self.environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whoever starts the tests in the background makes them, and all they start, deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in a file of the tiny recipe; the text must be there."""
        path = self.tiny / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


@pytest.fixture
def hearth(tmp_path: Path) -> Hearth:
    return Hearth(tmp_path / "hearth")
