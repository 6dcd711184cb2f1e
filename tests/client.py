"""Calls of `inv` from this checkout, with separate settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from core import files
from tests import warm


class Client(ABC):
    """Calls `inv`; `without` lists environment variables that it must not inherit."""

    without: ClassVar[tuple[str, ...]] = ()
    patience: float = 900
    """Time-out of a call, in seconds."""
    checkout: Path = files.CHECKOUT
    python: str = sys.executable
    """The checkout and the interpreter of `inv`."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """The environment of this client."""

    def environment(self, **env: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in self.without}
        return {**inherited, **self.variables(), **env}

    def command(self, *words: str) -> list[str]:
        return [self.python, "-m", "invoke", *words]

    def inv(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `inv` to its end, in a fork of a warm process if that equals a new Python."""
        argv, variables = self.command(*words), self.environment(**env)
        if argv[:3] == [sys.executable, "-m", "invoke"] and self.checkout == files.CHECKOUT:
            python = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
            if python == {name: value for name, value in variables.items() if name.startswith("PYTHON")}:
                return warm.run(argv[3:], variables, self.checkout, self.patience)
        return subprocess.run(
            argv,
            cwd=self.checkout,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.patience,
            check=False,
        )

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=self.checkout,
            env=self.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whoever starts the tests in the background makes them, and all they start, deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
