"""The wheelhouse: a folder of finished wheels, each with its manifest next to it (`NAME.whl.json`)."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core import files
from core import manifest as manifests
from core.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from core.manifest import Manifest


@dataclass(frozen=True)
class Entry:
    """A manifest of the wheelhouse; `error` describes the problem of its wheel, and is empty for a verified one."""

    manifest: Manifest
    error: str


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels. A wheel without a manifest does not count."""

    folder: Path

    def wheels(self) -> list[Manifest]:
        """The manifests of all wheels that exist with the size that the manifest states; no wheel is hashed."""
        read = [(manifests.read(path), path.with_suffix("")) for path in sorted(self.folder.glob("*.whl.json"))]
        named = [(each, wheel) for each, wheel in read if each and each.file == wheel.name and wheel.is_file()]
        return [each for each, wheel in named if wheel.stat().st_size == each.size]

    def find(self, name: str, key: str) -> Manifest | None:
        """The manifest of the wheel file `name`; None unless it exists with this key and the size stated."""
        wheel = self.folder / name
        found = manifests.read(wheel.with_name(f"{name}.json"))
        if found is None or found.key != key or not wheel.is_file() or wheel.stat().st_size != found.size:
            return None
        return found

    def verify(self) -> list[Entry]:
        """Every manifest, with its wheel hashed again."""
        read = [manifests.read(path) for path in sorted(self.folder.glob("*.whl.json"))]
        return [Entry(each, self._error(each)) for each in read if each]

    def _error(self, manifest: Manifest) -> str:
        wheel = self.folder / manifest.file
        if not wheel.is_file():
            return "the wheel is missing"
        return "" if files.sha256(wheel) == manifest.sha256 else "the wheel differs from the inspected one"

    def path(self, manifest: Manifest) -> Path:
        """The path of a wheel whose hash matches its manifest; raises SourceError."""
        if self._error(manifest):
            words = ["--kernel", manifest.kernel, "--arch", manifest.arch, "--stack", manifest.stack]
            words += ["--python", manifest.python, "--platform", manifest.platform]
            words += ["--profile", manifest.profile] if manifest.profile else []
            raise SourceError(
                "hash-mismatch",
                f"{self.folder / manifest.file} differs from the inspected wheel",
                cause="its SHA-256 differs from the manifest: it was damaged or replaced",
                hint=f"inv build-kernels --force {shlex.join(words)}",
            )
        return self.folder / manifest.file

    def check_writable(self) -> None:
        """Raise OSError if no file can be written into the wheelhouse."""
        files.write(self.folder / ".writable", "")
        (self.folder / ".writable").unlink(missing_ok=True)  # another run may have deleted it

    def admit(self, wheel: Path, manifest: Manifest) -> Path:
        """Copy an inspected wheel into the wheelhouse, then write its manifest.

        An older manifest of the file goes first: it must never describe the new wheel.
        """
        with files.draft(self.folder / manifest.file) as part:
            shutil.copyfile(wheel, part)  # a rename is not atomic between file systems
            (self.folder / f"{manifest.file}.json").unlink(missing_ok=True)
            part.replace(self.folder / manifest.file)
        files.write(self.folder / f"{manifest.file}.json", manifests.encode(manifest))
        return self.folder / manifest.file

    def prune(self, outdated: Callable[[Manifest], str]) -> list[tuple[Path, str]]:
        """Delete unwanted files and return them with the reasons.

        `outdated` returns why a wheel is no longer wanted, or an empty text.
        """
        gone = self._unwanted(outdated)
        for path, _ in gone:
            files.sweep(path)
            path.with_name(path.name + ".json").unlink(missing_ok=True)
        return gone

    def _unwanted(self, outdated: Callable[[Manifest], str]) -> list[tuple[Path, str]]:
        entries = {entry.manifest.file: entry for entry in self.verify()}
        reasons: list[tuple[Path, str]] = []
        for path in sorted(self.folder.glob("*.whl")):
            entry = entries.get(path.name)
            if reason := (entry.error or outdated(entry.manifest)) if entry else "it has no manifest":
                reasons.append((path, reason))
        orphans = [path for path in sorted(self.folder.glob("*.whl.json")) if not path.with_suffix("").exists()]
        reasons += [(path, "its wheel is missing") for path in orphans]
        return reasons + [(path, "left by an interrupted run") for path in sorted(self.folder.glob(".*"))]
