"""Bundles: one file with all that a host needs, for places that no network reaches.

A bundle is a tar of a small checkout's data, a cache and a wheelhouse, with `bundle.json`, which names every file with
its SHA-256, as its last member. What is deployed from it is taken from there and from nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from core import console, files, lockfile, source
from core import manifest as manifests
from core.errors import BundleError
from core.manifest import Sha256
from core.stack import Platform
from deploy import application as applications
from deploy import connection, environment, exporter, nodes
from deploy import release as releases

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.manifest import Manifest
    from deploy.host import Target
    from deploy.plan import Shelf

FORMAT = 1
MANIFEST = "bundle.json"
AGENT = "agent.pyz"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle; `size` in bytes."""

    sha256: Sha256
    size: int
    executable: bool = False


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a bundle is for, and every file that it holds. `asking` are its nodes, and ComfyUI-Manager where chosen."""

    format: int
    profile: str
    platform: str
    python: str
    version: str
    asking: tuple[str, ...]
    kernels: dict[str, str]
    files: dict[str, File]

    @property
    def id(self) -> str:
        """The SHA-256 of its manifest, and so of all that is in it: to compare with what the maker says."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    @property
    def size(self) -> int:
        """The bytes of its files."""
        return sum(each.size for each in self.files.values())


def write(target: Target, stock: Shelf, platform: str, python: str, wheels: Sequence[Manifest], output: Path) -> Bundle:
    """Write a bundle for machines of a platform and Python, in one rename. The same content gives the same bytes."""
    asking = releases.asking(target, stock.nodes)
    listed = _listed(stock, asking, platform, python, wheels)
    total = sum(path.stat().st_size for path in listed.values())
    console.say(f"bundling {len(listed)} files, {console.size(total)}")
    found: dict[str, File] = {}
    with files.draft(output) as part:
        with (
            console.Progress("bundling", total, len(listed)) as progress,
            tarfile.open(part, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, path in sorted(listed.items()):
                found[name] = File(files.sha256(path), path.stat().st_size, bool(path.stat().st_mode & 0o100))
                with path.open("rb") as file:
                    tar.addfile(_member(name, found[name]), file)
                progress.advance(found[name].size)
            bundle = Bundle(
                format=FORMAT,
                profile=target.profile_name,
                platform=platform,
                python=python,
                version=stock.application.version,
                asking=tuple(asking),
                kernels={wheel.kernel: wheel.version for wheel in wheels},
                files=found,
            )
            text = msgspec.json.encode(bundle)
            tar.addfile(_member(MANIFEST, File("", len(text))), io.BytesIO(text))
        part.replace(output)
    return bundle


def _member(name: str, file: File) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = file.size, 0o755 if file.executable else 0o644
    return info


def _listed(
    stock: Shelf, asking: Sequence[str], platform: str, python: str, wheels: Sequence[Manifest]
) -> dict[str, Path]:
    """Every file of a bundle by its name there; what the cache lacks is fetched."""
    app, lock = stock.application, stock.locks[platform, python]
    found = {AGENT: connection.agent_file(), "checkout/uv.lock": files.checkout() / "uv.lock"}
    for pattern in ("config/stacks.toml", "config/profiles/*.toml", "config/modes/*.toml", "recipes/comfyui/units/*"):
        found |= {f"checkout/{path.relative_to(files.checkout())}": path for path in files.checkout().glob(pattern)}
    recipe = [applications.folder() / "app.toml", nodes.catalogue_file()]
    found |= {f"checkout/recipes/comfyui/{path.name}": path for path in recipe if path.exists()}
    found[f"checkout/recipes/comfyui/locks/{lock.name}.txt"] = environment.folder() / f"{lock.name}.txt"
    tree = source.fetch(app)
    if own := app.source[0].folder:
        found |= {f"checkout/recipes/comfyui/{own}/{name}": path for name, path in files.tree(tree)}
    cached = [
        *nodes.fetch(stock.nodes).values(),
        environment.download(lock, asking, Platform.parse(platform)),
        lockfile.install("uv", Platform.parse(platform), "3.11"),
        exporter.packages(Platform.parse(platform)),  # a few hundred kB; whether a host wants it is not the bundle's
        *([] if own else [tree]),
    ]
    for folder in cached:
        found |= {f"cache/{folder.relative_to(files.cache())}/{name}": path for name, path in files.tree(folder)}
    for exported in (lockfile.exported("uv"), lockfile.exported(exporter.EXTRA)):
        found[f"cache/{exported.relative_to(files.cache())}"] = exported
    for wheel in wheels:
        found |= {f"wheelhouse/{wheel.file}": manifests.whole(wheel)}
        found |= {f"wheelhouse/{wheel.file}.json": files.wheelhouse() / f"{wheel.file}.json"}
    return found


def verify(path: Path) -> Bundle:
    """Read a whole bundle and compare every file with its hash; raises BundleError."""
    return _read(path, None)


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """Unpack a bundle, checked, and take everything from there for as long as the context lasts; raises BundleError."""
    with files.draft(files.cache() / "bundles/open") as place:
        place.mkdir()
        console.say(f"unpacking {path.name}, {console.size(path.stat().st_size)}")
        bundle = _read(path, place)
        if bundle.files[AGENT].sha256 != hashlib.sha256(connection.packed_agent()).hexdigest():
            raise BundleError(
                f"{path} was made by another version of Hearth",
                cause="its agent is not this one's, so what it would do on a host may differ",
                hint="use the checkout that it was made with, or make it again: inv bundle",
            )
        with files.inside(place):
            yield bundle


def _read(path: Path, place: Path | None) -> Bundle:
    """Check every file of a bundle, and unpack it where a place is given."""
    found: dict[str, File] = {}
    text = b""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() and member.name not in found else None
                if content is None or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise BundleError(f"{path} is no bundle of Hearth's", cause=f"it holds {member.name!r}")
                if member.name == MANIFEST:
                    text = content.read()
                    continue
                executable = bool(member.mode & 0o100)
                found[member.name] = File(_passed(content, place and place / member.name), member.size, executable)
                if place and executable:
                    (place / member.name).chmod(0o755)
        bundle = msgspec.json.decode(text, type=Bundle)
    except (OSError, tarfile.TarError, msgspec.DecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise BundleError(f"{path} cannot be read", cause=str(error)) from error
        again = "copy it again, or make it again: inv bundle"
        raise BundleError(
            f"{path} is no whole bundle", cause=f"cut short, or something else: {error}", hint=again
        ) from error
    if bundle.format != FORMAT:
        hint = "use the Hearth that it was made with"
        raise BundleError(f"{path} has format {bundle.format}, this Hearth reads {FORMAT}", hint=hint)
    wrong = sorted(name for name in found.keys() | bundle.files.keys() if found.get(name) != bundle.files.get(name))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = "do not use it; ask for it again where it was made"
        raise BundleError(f"{path} was altered: {', '.join(wrong[:3])}{more}", hint=hint)
    return bundle


def _passed(content: IO[bytes], place: Path | None) -> str:
    """The SHA-256 of what is read, written to a place on its way where one is given."""
    digest = hashlib.sha256()
    with nullcontext() if place is None else _new(place) as file:
        while block := content.read(1 << 20):
            digest.update(block)
            if file is not None:
                file.write(block)
    return digest.hexdigest()


def _new(place: Path) -> IO[bytes]:
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.open("xb")
