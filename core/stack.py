"""Stacks and platforms: which torch, for which CUDA, on which machines."""

from __future__ import annotations

import platform as machine
import re
import sys
from enum import Enum
from typing import Literal

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from core import workspace
from core.config import load
from core.errors import ConfigError, UsageError, suggest


class Platform(Enum):
    """The platform of a wheel, named as in wheel tags."""

    LINUX_X86_64 = "linux_x86_64"
    LINUX_AARCH64 = "linux_aarch64"

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read a platform's name; raises UsageError."""
        try:
            return cls(text)
        except ValueError:
            raise UsageError(
                "unknown-name", f"there is no platform {text!r}", hint=suggest(text, [each.value for each in cls])
            ) from None

    @classmethod
    def local(cls) -> Platform:
        """The platform of this machine; raises UsageError where Hearth does not run."""
        return cls.parse(f"linux_{machine.machine()}")

    @property
    def cpu(self) -> str:
        """The CPU as compilers, qemu and multiarch directories name it."""
        return self.value.removeprefix("linux_")

    @property
    def uv_name(self) -> str:
        """The platform as uv names it. 2_28 is the glibc that torch's own wheels need."""
        return f"{self.cpu}-manylinux_2_28"


class Stack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One torch and its CUDA: the properties that uv.lock cannot state; `config/stacks.toml` explains them."""

    torch: str
    cuda: str
    compiler: Literal["locked", "system"]
    cxx: str
    cxx11_abi: bool
    pythons: tuple[str, ...]
    platforms: tuple[str, ...]
    driver: str
    gcc: int
    archs: tuple[str, ...]
    archs_reason: str
    size: int
    files: int
    default: bool = False
    deprecated: str = ""
    builds_only: str = ""
    comfyui: str = ""
    name: str = ""

    @property
    def label(self) -> str:
        """The stack's part of a wheel's local version label: `NAME.torch2.11.0`."""
        return f"{self.name}.torch{self.torch}"

    @property
    def notice(self) -> str:
        """The note for users of this stack; empty unless it is deprecated."""
        return f"stack {self.name} is deprecated: {self.deprecated}" if self.deprecated else ""

    def runs(self, comfyui: str) -> bool:
        """Whether it runs this version of ComfyUI."""
        return not self.builds_only and SpecifierSet(self.comfyui).contains(comfyui, prereleases=True)

    @property
    def python(self) -> str:
        """The Python to build for by default: the one that runs Hearth, or the newest if torch has no build for it."""
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        return running if running in self.pythons else self.pythons[-1]


def stacks() -> dict[str, Stack]:
    """The stacks of `config/stacks.toml`, by name."""
    loaded = load(workspace.current().checkout / "config/stacks.toml", dict[str, Stack])
    for name, stack in loaded.items():  # all are parts of the version label of wheels, or of a compiler's command
        if not re.fullmatch(r"[a-z][a-z0-9]* \d+(\.\d+)* c\+\+\d+", f"{name} {stack.torch} {stack.cxx}", re.ASCII):
            raise ConfigError(
                "config",
                f"config/stacks.toml: stack {name!r} with torch {stack.torch!r} and cxx {stack.cxx!r} is not valid",
                hint="a name has lower-case letters and digits; torch is a release, such as 2.11.0; cxx is c++20 or so",
            )
        try:
            SpecifierSet(stack.comfyui)
        except InvalidSpecifier:
            what = f"config/stacks.toml: stack {name!r} with comfyui {stack.comfyui!r} is not valid"
            raise ConfigError("config", what, hint="versions such as <0.32 (PEP 440)") from None
    if sum(stack.default for stack in loaded.values()) != 1:
        raise ConfigError("config", "config/stacks.toml: one stack, and only one, must have default = true")
    return {name: msgspec.structs.replace(stack, name=name) for name, stack in loaded.items()}


def find_stack(name: str = "") -> Stack:
    """Return the stack `name`, or the default one; raises UsageError with the nearest name."""
    known = stacks()
    if not name:
        return next(stack for stack in known.values() if stack.default)
    if name not in known:
        raise UsageError("unknown-name", f"there is no stack {name!r}", hint=suggest(name, known))
    return known[name]
