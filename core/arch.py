"""Compute capabilities: parsed from `TORCH_CUDA_ARCH_LIST` syntax, never a float (12.1 is not 12.10)."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from core import console
from core.config import load
from core.errors import SupportError
from core.files import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


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
                cause="expected major.minor with one digit after the point, optionally followed by a, f or +PTX; "
                "names such as Ada and All stand for several, or for other ones in each torch version",
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
    suffixes: tuple[str, ...] = ()


def known_archs() -> dict[str, ArchInfo]:
    """The capabilities of `config/archs.toml`, by their plain name."""
    return load(CHECKOUT / "config/archs.toml", dict[str, ArchInfo])


def parse_list(
    text: str, known: Mapping[str, ArchInfo], skip: Callable[[SupportError], None] | None = None
) -> list[Arch]:
    """Read a list in `TORCH_CUDA_ARCH_LIST` syntax (separated by `;`, `,` or spaces), sorted, without repeats.

    Raises SupportError for a malformed or unknown capability, unless `skip` takes it, and for an empty list.
    """
    archs: set[Arch] = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        try:
            archs |= {_known(Arch.parse(word), known)} if word else set()
        except SupportError as error:
            if skip is None:
                raise
            skip(error)
    if not archs:
        raise SupportError("arch", "no compute capability given", hint=f"choose from {', '.join(known)}")
    return sorted(archs)


def _known(arch: Arch, known: Mapping[str, ArchInfo]) -> Arch:
    """Return a capability that nvcc knows; raises SupportError for another one."""
    if arch.capability not in known:
        raise SupportError(
            "arch",
            f"unknown compute capability {arch.capability}",
            cause=f"CUDA compilers know {', '.join(known)}",
            hint="the GPU's own: nvidia-smi --query-gpu=name,compute_cap --format=csv",
        )
    if arch.suffix and arch.suffix not in known[arch.capability].suffixes:
        variants = [f"{arch.capability}{suffix}" for suffix in ("", *known[arch.capability].suffixes)]
        what = f"CUDA compilers have no {arch.capability}{arch.suffix}"
        raise SupportError("arch", what, hint=f"use {' or '.join(variants)}")
    return arch


def wanted_archs(text: str) -> list[Arch]:
    """The requested archs: `text`, else $TORCH_CUDA_ARCH_LIST, else the local GPUs'; raises SupportError.

    Archs of the variable that no CUDA compiler knows are skipped with a note: other programs read it, too.
    """
    known = known_archs()
    if text:
        return parse_list(text, known)
    if variable := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        source, hint = f"TORCH_CUDA_ARCH_LIST={variable}", "--arch overrides the variable"
    elif gpus := local_gpus():
        variable = ";".join(str(gpu.arch) for gpu in gpus)
        source, hint = "the GPUs of this machine", "to build for another machine's GPU: --arch"
    else:
        raise SupportError(
            "arch",
            "no compute capability given, and this machine has no NVIDIA GPU",
            cause="neither --arch nor TORCH_CUDA_ARCH_LIST is set",
            hint="choose one with --arch: " + ", ".join(f"{name} ({info.gpus})" for name, info in known.items()),
        )
    skipped: list[SupportError] = []
    try:
        found = parse_list(variable, known, skipped.append)
    except SupportError as error:
        why = "\n".join(each.what for each in skipped)
        raise SupportError("arch", f"{source}: no usable compute capability", cause=why, hint=hint) from error
    for each in skipped:
        console.say(f"{source}: skipped: {each.what}")
    return found


class LocalGpu(NamedTuple):
    """A GPU of this machine: its capability, and NVIDIA's name of the device (`GPU-...`)."""

    arch: Arch
    uuid: str


def local_gpus() -> list[LocalGpu]:
    """The GPUs of this machine, without those that CUDA_VISIBLE_DEVICES hides; empty without a GPU or driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver library, device or permission: all mean "no usable GPU"
        return []
    found: list[LocalGpu] = []
    with suppress(pynvml.NVMLError):
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # a GPU that has fallen off the bus
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
                found.append(LocalGpu(Arch(int(major), int(minor)), str(pynvml.nvmlDeviceGetUUID(device))))
        pynvml.nvmlShutdown()
    return _visible(found)


def _visible(gpus: list[LocalGpu]) -> list[LocalGpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES shows (CUDA C++ Programming Guide, "CUDA Environment Variables").

    Numbers count from CUDA's fastest GPU, unless CUDA_DEVICE_ORDER is PCI_BUS_ID. NVML does not say which that is, so
    numbers choose from different GPUs only in that order. An entry that names a part of a GPU (MIG) hides none.
    """
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")]
    ordered = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.arch for gpu in gpus}) < 2
    found: list[LocalGpu] = []
    for word in words:
        if word == "all" or word.startswith("MIG-") or (word.isdecimal() and not ordered):
            return gpus
        named = [gpu for gpu in gpus if word.startswith("GPU-") and gpu.uuid.startswith(word)]
        named = gpus[int(word) : int(word) + 1] if word.isdecimal() else named
        if not named:  # CUDA ignores the rest of the list, too
            break
        found += named
    return found


def device_environment(gpus: Sequence[LocalGpu], capability: str) -> dict[str, str]:
    """The variables with which CUDA's first device has this capability, on a machine with these GPUs."""
    if any(gpu.arch.capability != capability for gpu in gpus):
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in gpus if gpu.arch.capability == capability)}
    return {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER") if name in os.environ}
