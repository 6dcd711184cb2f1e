"""Compute capabilities: parsed from `TORCH_CUDA_ARCH_LIST` syntax, never a float (12.1 is not 12.10)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from core.config import load
from core.errors import SupportError, suggest
from core.files import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, order=True)
class Arch:
    """One compute capability: `8.9`, `9.0a` (architecture-specific instructions), `8.9+PTX` (also keeps PTX)."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> Arch:
        """Read `major.minor[a|f][+PTX]`; raises SupportError. The minor number has one digit, as NVIDIA's have."""
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", text.strip(), re.IGNORECASE)
        if not match:
            raise SupportError(
                "arch",
                f"{text!r} is not a compute capability",
                cause="expected major.minor with one digit after the point, optionally followed by a, f or +PTX",
                hint="for example 8.9, 9.0a or '8.9+PTX'; several: '8.9;12.0'",
            )
        return cls(int(match[1]), int(match[2]), match[3].lower(), bool(match[4]))

    @property
    def capability(self) -> str:
        """The plain capability, as `config/archs.toml` and recipes name it: `12.1`."""
        return f"{self.major}.{self.minor}"

    def __str__(self) -> str:
        return f"{self.capability}{self.suffix}{'+PTX' if self.ptx else ''}"


class ArchInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `config/archs.toml`: the GPUs of a capability, and the defaults of its builds."""

    gpus: str
    platform: str
    python: str
    suffixes: tuple[str, ...] = ()


def known_archs() -> dict[str, ArchInfo]:
    """The capabilities of `config/archs.toml`, by their plain name."""
    return load(CHECKOUT / "config/archs.toml", dict[str, ArchInfo])


def parse_list(text: str, known: Mapping[str, ArchInfo]) -> list[Arch]:
    """Read a list in `TORCH_CUDA_ARCH_LIST` syntax (separated by `;`, `,` or spaces), sorted, without repeats.

    Raises SupportError for a malformed or unknown capability and for an empty list.
    """
    archs = sorted({Arch.parse(word) for word in re.split(r"[;,\s]+", text.strip()) if word})
    if not archs:
        raise SupportError("arch", "no compute capability given", hint=suggest("", known))
    for arch in archs:
        if arch.capability not in known:
            raise SupportError(
                "arch",
                f"unknown compute capability {arch.capability}",
                cause="no GPU has it, or the GPU is too old for the kernels, which need 8.0 or newer",
                hint=suggest(arch.capability, known),
            )
        if arch.suffix and arch.suffix not in known[arch.capability].suffixes:
            raise SupportError(
                "arch",
                f"{arch} is not supported: {arch.capability} has no {arch.suffix!r} variant in config/archs.toml",
                hint=f"use {arch.capability}",
            )
    return archs


def local_gpu() -> Arch | None:
    """The capability of the first GPU of this machine, or None without a GPU or driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver library, device or permission: all mean "no usable GPU"
        return None
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
        return Arch(int(major), int(minor))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
