"""The wheelhouse: finished wheels, each with its manifest (`NAME.whl.json`), in one package index per stack and GPU.

`STACK/sm_89/` holds the wheels for one GPU, and a static simple index of them (PEP 503): an installer that is pointed
there, with --find-links or --index-url, cannot choose another GPU's wheel. It would compare their labels as text. A
wheel for several GPUs lies in `STACK/sm_89.sm_120/`, with a link to it in the folder of each.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import quote

from core import files
from core import manifest as manifests
from core.errors import HostError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from core.manifest import Manifest


@dataclass(frozen=True)
class Entry:
    """A manifest and the path of its wheel; `error` describes the wheel's problem, and is empty for a verified one."""

    wheel: Path
    manifest: Manifest
    error: str


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of indexes. A wheel without a manifest does not count.

    Wheels of older versions of Hearth lie in the folder itself; they count, too.
    """

    folder: Path

    def wheels(self) -> list[Manifest]:
        """The manifests of all wheels that exist with the size that the manifest states; no wheel is hashed."""
        return [each for wheel, each in self._listed() if wheel.is_file() and wheel.stat().st_size == each.size]

    def _listed(self) -> list[tuple[Path, Manifest]]:
        """Every manifest in its place, and the path of its wheel."""
        found: dict[tuple[str, str], tuple[Path, Manifest]] = {}
        for path in (*self.folder.glob("*.whl.json"), *self.folder.glob("*/sm_*/*.whl.json")):
            wheel, each = path.with_suffix(""), manifests.read(path)
            if each and each.file == wheel.name and wheel.parent in (self.folder, self.folder / each.index):
                found[each.index, each.file] = wheel, each
        return [found[key] for key in sorted(found)]

    def find(self, index: str, pattern: str, key: str) -> Manifest | None:
        """The manifest of the wheel with this key, of those whose file name matches; None if there is none.

        The wheel's hash is that of the manifest: a damaged wheel is built again.
        """
        for path in (path for folder in (self.folder / index, self.folder) for path in folder.glob(f"{pattern}.json")):
            wheel, found = path.with_suffix(""), manifests.read(path)
            same = found and (found.index, found.file, found.key) == (index, wheel.name, key)
            if found and same and not _error(wheel, found):
                return found
        return None

    def verify(self) -> list[Entry]:
        """Every manifest, with its wheel hashed again."""
        return [Entry(wheel, each, _error(wheel, each)) for wheel, each in self._listed()]

    def place(self, manifest: Manifest) -> Path:
        """The path of a wheel."""
        place, old = self.folder / manifest.index / manifest.file, self.folder / manifest.file
        return old if old.is_file() and not place.exists() else place

    def path(self, manifest: Manifest) -> Path:
        """The path of a wheel whose hash matches its manifest; raises SourceError."""
        wheel = self.place(manifest)
        if _error(wheel, manifest):
            words = ["--kernel", manifest.kernel, "--arch", manifest.arch, "--stack", manifest.stack]
            words += ["--fat"] if ";" in manifest.arch else []
            words += ["--python", manifest.python] if manifest.python else []
            words += ["--platform", manifest.platform]
            words += ["--profile", manifest.profile] if manifest.profile else []
            raise SourceError(
                "hash-mismatch",
                f"{wheel} differs from the inspected wheel",
                cause="its SHA-256 differs from the manifest: it was damaged or replaced",
                hint=f"inv build-kernels --force {shlex.join(words)}",
            )
        return wheel

    def install_command(self, manifest: Manifest, server: str = "") -> str:
        """The command that installs exactly this wheel, and nothing else, into the active environment.

        It takes the wheel from `server` if given, else from the folder; as a URL, since uv splits a path at commas.
        """
        folder = ["--no-index", "--find-links", self.place(manifest).parent.as_uri()]
        source = ["--index-url", f"{server}/{manifest.index}/"] if server else folder
        return shlex.join(["uv", "pip", "install", "--no-deps", *source, f"{manifest.kernel}=={manifest.version}"])

    def check_writable(self) -> None:
        """Raise OSError if no file can be written into the wheelhouse."""
        files.write(self.folder / ".writable", "")
        (self.folder / ".writable").unlink(missing_ok=True)  # another run may have deleted it

    def admit(self, wheel: Path, manifest: Manifest) -> Path:
        """Copy an inspected wheel into its index, then write its manifest.

        An older manifest of the file goes first: it must never describe the new wheel. An older wheel of the same build
        with another platform tag goes last: installers would choose between both.
        """
        place = self.folder / manifest.index / manifest.file
        for path in (place, place.with_name(f"{place.name}.json")):
            if path.is_dir():
                hint = "move it away, then run the same command again"
                raise HostError("not-writable", f"{path} is a folder", cause="a wheel needs this name", hint=hint)
        with files.draft(place) as part:
            shutil.copyfile(wheel, part)  # a rename is not atomic between file systems
            place.with_name(f"{place.name}.json").unlink(missing_ok=True)
            part.replace(place)
        files.write(place.with_name(f"{place.name}.json"), manifests.encode(manifest))
        same = f"{manifest.file.rpartition('-')[0]}-*linux*_{manifest.platform.removeprefix('linux_')}.whl"
        others = ((old, each) for old, each in self._listed() if old.parent == place.parent and old != place)
        self.delete(Entry(old, each, "") for old, each in others if fnmatchcase(old.name, same))
        return place

    def arrange(self) -> None:
        """Move the wheels of older versions of Hearth into their indexes, if the wheelhouse is writable.

        At every moment, each wheel is complete in at least one place.
        """
        if not os.access(self.folder, os.W_OK):
            return
        for wheel, manifest in self._listed():
            place = self.folder / manifest.index / wheel.name
            if wheel == place or wheel.is_symlink():
                continue
            with suppress(OSError):  # the file system has no hard links, or another file is there: the wheel stays
                place.parent.mkdir(parents=True, exist_ok=True)
                names = (wheel.name, f"{wheel.name}.json")
                for old, new in ((self.folder / name, place.with_name(name)) for name in names):
                    if not (new.exists() and new.samefile(old)):
                        os.link(old, new)
                for name in reversed(names):
                    (self.folder / name).unlink()
        self._write_indexes()

    def delete(self, entries: Iterable[Entry]) -> None:
        """Delete wheels, unless they were replaced in the meantime."""
        for each in entries:
            manifest = each.wheel.with_name(f"{each.wheel.name}.json")
            if manifests.read(manifest) == each.manifest:
                each.wheel.unlink(missing_ok=True)
                manifest.unlink(missing_ok=True)  # last: without it, nothing would know the wheel
        self._write_indexes()

    def _write_indexes(self) -> None:
        """Write the pages, and the links that --find-links needs: it reads folders, and no page."""
        written: dict[Path, str] | None = None
        while (pages := self._pages()) != written:  # another run may have changed the wheelhouse in the meantime
            for path, text in pages.items():
                if not path.is_file() or path.read_text() != text:
                    files.write(path, text)
            self._link()
            written = pages

    def _link(self) -> None:
        """Link each wheel for several GPUs into the folder of each, and remove links to deleted wheels."""
        wanted = {
            wheel.parent.with_name(name) / wheel.name: wheel
            for wheel, _ in self._listed()
            for name in wheel.parent.name.split(".")
            if name != wheel.parent.name and wheel.parent != self.folder
        }
        for link in self.folder.glob("*/sm_*/*.whl"):
            if link.is_symlink() and link not in wanted and re.match(r"\.\./sm_\d+\.sm_", str(link.readlink())):
                link.unlink(missing_ok=True)
        for link, wheel in wanted.items():
            if not os.path.lexists(link):  # a wheel for this GPU alone may have the same name, and then the same bytes
                with suppress(OSError):  # the file system has no links: the pages remain
                    link.symlink_to(os.path.relpath(wheel, link.parent))

    def _pages(self) -> dict[Path, str]:
        """The pages of all indexes; empty without wheels. A wheel for several GPUs is also in the index of each."""
        links: dict[Path, dict[Path, str]] = {}
        for wheel, manifest in self._listed():
            project = re.sub(r"[-_.]+", "-", manifest.kernel).lower()
            for name in {wheel.parent.name, *wheel.parent.name.split(".")} if wheel.parent != self.folder else ():
                index = wheel.parent.with_name(name)
                links.setdefault(index, {})[index / project] = f"{project}/"
                address = f"{quote(os.path.relpath(wheel, index / project))}#sha256={manifest.sha256}"
                links.setdefault(index / project, {})[wheel] = address
        for pattern in ("*/sm_*/index.html", "*/sm_*/*/index.html"):
            for page in self.folder.glob(pattern):
                links.setdefault(page.parent, {})
        return {
            folder / "index.html": _page([(path.name, links[folder][path]) for path in sorted(links[folder])])
            for folder in links
        }


def _error(wheel: Path, manifest: Manifest) -> str:
    if not wheel.is_file():
        return "the wheel is missing"
    return "" if files.sha256(wheel) == manifest.sha256 else "the wheel differs from the inspected one"


def _page(links: Sequence[tuple[str, str]]) -> str:
    head = '<!DOCTYPE html>\n<meta name="pypi:repository-version" content="1.0">\n'
    return head + "".join(f'<a href="{address}">{text}</a><br>\n' for text, address in links)
