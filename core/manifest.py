"""The manifest of a wheel: its inputs, and the findings of the inspection.

`kernels` writes it, `deploy` reads it; its JSON schema is in docs/reference/manifest.schema.json.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from core import console, foreign
from core.errors import SourceError
from core.typed import from_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
StackName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9]*$(?!\n)")]
WheelFile = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.whl$(?!\n)")]


class ModuleReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of one extension module.

    `sass` and `ptx` are the targets in it (`sm_121a`), `cubins` the number of device images, `needed` its shared
    libraries, `undefined` the number of undefined symbols, of which the GPU's driver provides `from_driver`.
    `glibc`, `glibcxx` and `cxxabi` are the highest symbol versions it requires.
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
    cxxabi: str = ""


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of a check that needs a certain machine: `passed` or `not run`, with details or the reason."""

    result: str
    detail: str


class Hearth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of Hearth. An empty value is not reported; `modified` means that files differ from the commit."""

    version: str = ""
    commit: str = ""
    modified: bool = False


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One wheel: its file and hash, its coordinates, its key with the inputs, and the findings of the inspection.

    `hearth` built it. Fields with a default are missing in older manifests. `torch` is one version, or a range for a
    wheel on LibTorch's stable ABI. `python` is empty for a wheel that serves every Python version of its tag.
    """

    file: WheelFile
    sha256: Sha256
    size: int
    key: Sha256
    identifier: str
    kernel: str
    version: str
    arch: str
    stack: StackName
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
    cxxabi: str = ""
    hearth: Hearth = Hearth()

    @property
    def capabilities(self) -> list[str]:
        """The compute capabilities that it was built for: `12.1`."""
        return capabilities(self.arch)

    @property
    def index(self) -> str:
        """The index that it belongs to."""
        return index(self.stack, self.arch)

    def suits(self, python: str, torch: str) -> bool:
        """Whether the wheel runs with this Python and torch."""
        try:
            versions = SpecifierSet(self.torch if self.torch.startswith(">=") else f"=={self.torch}")
        except InvalidSpecifier:  # of another host
            return False
        return self.python in ("", python) and torch in versions


def capabilities(arch: str) -> list[str]:
    """The plain compute capabilities in a list of archs: `9.0a+PTX` has `9.0`."""
    return re.findall(r"\d+\.\d", arch)


def index(stack: str, arch: str) -> str:
    """The wheelhouse's folder for a stack and a GPU, `STACK/sm_89`; `STACK/sm_89.sm_120` for wheels of both.

    All wheels in it run on that GPU: the suffix and `+PTX` of an arch do not count.
    """
    numbers = dict.fromkeys(each.replace(".", "") for each in capabilities(arch))
    return f"{stack}/{'.'.join(f'sm_{each}' for each in numbers)}"


def read(path: Path) -> Manifest | None:
    """The manifest in a file; None when the file cannot be read or decoded."""
    try:
        return decode(foreign.content(path))
    except (OSError, SourceError, msgspec.DecodeError, RecursionError):
        return None


def decode(text: bytes) -> Manifest:
    """Read a manifest; raises msgspec.ValidationError or msgspec.DecodeError."""
    return from_json(text, Manifest)


def encode(manifest: Manifest) -> str:
    """Write a manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode() + "\n"


def rows(manifests: Sequence[Manifest]) -> list[str]:
    """A table of wheels: size, machine code, and the results of the import and the smoke test."""
    cells = [
        (
            each.file,
            console.size(each.size),
            ",".join(sorted({target for module in each.modules for target in module.sass})),
            each.glibc,
            each.imported.result,
            each.smoke.result,
        )
        for each in manifests
    ]
    return console.table(("wheel", "size", "SASS", "glibc", "import", "GPU"), cells)


def unproven(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A line for each wheel whose import or smoke test was not run, with the reason."""
    for each in manifests:
        for title, proof in (("import", each.imported), ("smoke test", each.smoke)):
            if proof.result != "passed":
                yield f"{each.identifier}: {title} not run: {proof.detail}"
