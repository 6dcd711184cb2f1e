"""The manifest beside each wheel: what it was built from, and what inspection found in it.

`kernels` writes it, `deploy` reads it; its JSON schema is in docs/reference/manifest.schema.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from core import foreign
from core.errors import TreeError

if TYPE_CHECKING:
    from pathlib import Path

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
WheelFile = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.whl$(?!\n)")]


class ModuleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one extension module holds.

    `sass` and `ptx` are the targets found in it (`sm_121a`), `cubins` how many device images, `needed` its shared
    libraries, `undefined` how many symbols others must provide, of which `from_driver` come with the GPU's driver.
    `glibc` and `glibcxx` are the highest symbol versions it asks for.
    """

    name: str
    sass: tuple[str, ...]
    ptx: tuple[str, ...]
    cubins: int
    needed: tuple[str, ...]
    undefined: int
    from_driver: tuple[str, ...]
    glibc: str
    glibcxx: str
    size: int


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a check that needs a certain machine ran: `passed` or `not run`, how, or why not."""

    result: str
    detail: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One wheel: its file and hash, its coordinates, the key and what went into it, and what was found in it."""

    file: WheelFile
    sha256: Sha256
    size: int
    key: Sha256
    identifier: str
    kernel: str
    version: str
    arch: str
    stack: str
    torch: str
    python: str
    platform: str
    profile: str
    glibc: str
    glibcxx: str
    modules: tuple[ModuleReport, ...]
    imported: Proof
    smoke: Proof
    inputs: dict[str, Any]


def read(path: Path) -> Manifest | None:
    """The manifest in a file; None when there is none that can be read, as of a folder, a pipe or nested JSON."""
    try:
        return decode(foreign.content(path))
    except (OSError, TreeError, msgspec.DecodeError, RecursionError):
        return None


def decode(text: bytes) -> Manifest:
    """Read a manifest; raises msgspec.ValidationError or msgspec.DecodeError when it is none."""
    return msgspec.json.decode(text, type=Manifest)


def encode(manifest: Manifest) -> str:
    """Write a manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode() + "\n"
