"""Bundles: one file with all that a host needs, for places that no network reaches.

A bundle is a tar of a small checkout's data, a cache and a wheelhouse. Its first member, `bundle.json`, names every
other file with its size and SHA-256; the second is a signature of the first by an SSH key, where it is signed. No byte
is used before it was checked, and what is deployed from a bundle is taken from there and from nowhere else.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from core import console, files, lockfile, signature, source
from core import manifest as manifests
from core.errors import BundleError
from core.manifest import Sha256
from core.signature import Signed
from core.stack import Platform
from deploy import application as applications
from deploy import connection, environment, exporter, nodes
from deploy import release as releases

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.manifest import Manifest
    from deploy.host import Target
    from deploy.plan import Shelf

FORMAT = 2
MANIFEST = "bundle.json"
SIGNATURE = "bundle.json.sig"
LIMIT = 64_000_000
"""Bytes of a manifest: 300,000 files. A signature has about 300."""
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
    def size(self) -> int:
        """The bytes of its files."""
        return sum(each.size for each in self.files.values())


@dataclass(frozen=True)
class Opened:
    """A bundle that was read: `seal` is its manifest's SHA-256, signed or not, and `origin` says by whom."""

    bundle: Bundle
    seal: Signed
    origin: str

    @property
    def id(self) -> str:
        """The SHA-256 of its manifest, and so of all that is in it: to compare with what the maker says."""
        return self.seal.text


def signers_file() -> Path:
    """Who may sign bundles that this client uses: $HEARTH_ALLOWED_SIGNERS, else `config/allowed_signers`."""
    return Path(os.environ.get("HEARTH_ALLOWED_SIGNERS") or files.CHECKOUT / "config/allowed_signers")


def _origin(seal: Signed) -> str:
    """Who signed a bundle, in words; raises SignatureError for nobody whom this client's list has, if it has one."""
    if (place := signers_file()).exists():
        return f"signed by {seal.signer(place.read_text(), str(place))}"
    return f"signed with {seal.key()}, which {place} could name" if seal.signature else "not signed"


def write(
    target: Target,
    stock: Shelf,
    platform: str,
    python: str,
    wheels: Sequence[Manifest],
    output: Path,
    key: Path | None = None,
) -> Opened:
    """Write a bundle for machines of a platform and Python, in one rename, signed with `key` where one is given.

    The same content gives the same bytes, but for the signature, where the kind of key has none that is the same.
    """
    asking = releases.asking(target, stock.nodes)
    listed = _listed(stock, asking, platform, python, wheels)
    total = sum(path.stat().st_size for path in listed.values())
    console.say(f"bundling {len(listed)} files, {console.size(total)}")
    found = {
        name: File(files.sha256(path), path.stat().st_size, bool(path.stat().st_mode & 0o100))
        for name, path in sorted(listed.items())
    }
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
    digest = hashlib.sha256(text).hexdigest()
    seal = signature.sign(digest, key) if key else Signed(digest, "")
    with files.draft(output) as part:
        with (
            console.Progress("bundling", total, len(listed)) as progress,
            tarfile.open(part, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name, content in ((MANIFEST, text), (SIGNATURE, seal.signature.encode())):
                if content:
                    tar.addfile(_member(name, File("", len(content))), io.BytesIO(content))
            for name, each in found.items():
                with listed[name].open("rb") as file:
                    tar.addfile(_member(name, each), file)
                progress.advance(each.size)
        part.replace(output)
    return Opened(bundle, seal, f"signed with {seal.key()}" if key else "not signed")


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


def verify(path: Path) -> Opened:
    """Read a whole bundle and compare every file with its hash; raises BundleError, or SignatureError as for `opened`.

    Nothing is unpacked.
    """
    return _read(path, None)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Unpack a bundle, checked, and take everything from there for as long as the context lasts.

    Raises BundleError, and SignatureError where this client lists who may sign (`signers_file`) and nobody of them did.
    """
    with files.draft(files.cache() / "bundles/open") as place:
        place.mkdir()
        console.say(f"unpacking {path.name}, {console.size(path.stat().st_size)}")
        found = _read(path, place)
        console.say(f"{path.name} is whole, and {found.origin}")
        if found.bundle.files[AGENT].sha256 != hashlib.sha256(connection.packed_agent()).hexdigest():
            raise BundleError(
                f"{path} was made by another version of Hearth",
                cause="its agent is not this one's, so what it would do on a host may differ",
                hint="use the checkout that it was made with, or make it again: inv bundle",
            )
        with files.inside(place):
            yield found


def _read(path: Path, place: Path | None) -> Opened:
    """Check a bundle: its signature first, then its manifest, then every file; unpack it where a place is given."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            text, member = _head(path, tar, tar.next()), tar.next()
            signed = b""
            if member and member.name == SIGNATURE:
                signed, member = _head(path, tar, member), tar.next()
            seal = Signed(hashlib.sha256(text).hexdigest(), signed.decode("ascii"))
            origin = _origin(seal)
            bundle = _manifest(path, text)
            missing = dict(bundle.files)
            while member:
                wanted = missing.pop(member.name, None)
                if wanted is None or not _passes(tar, member, wanted, place and place / member.name):
                    raise BundleError(f"{path} was altered: {member.name}", hint=_ALTERED)
                member = tar.next()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise BundleError(f"{path} cannot be read", cause=str(error)) from error
        raise _cut_short(path, str(error)) from error
    if missing:
        raise _cut_short(path, f"{min(missing)} is missing")
    return Opened(bundle, seal, origin)


_ALTERED = "do not use it; ask for it again where it was made"


def _cut_short(path: Path, why: str) -> BundleError:
    again = "copy it again, or make it again: inv bundle"
    return BundleError(f"{path} is no whole bundle", cause=f"cut short, or something else: {why}", hint=again)


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file with all its bytes: no link, device or folder, and not sparse, small here and huge."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _head(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    """The bytes of a bundle's manifest or of its signature."""
    if member is None or member.name not in (MANIFEST, SIGNATURE) or not _plain(member) or member.size > LIMIT:
        hint = "an older Hearth's has its manifest at its end: use that one, or make the bundle again"
        cause = f"it begins with {member.name!r}, not with {MANIFEST}" if member else "it is empty"
        raise BundleError(f"{path} is no bundle of this Hearth's", cause=cause, hint=hint)
    content = tar.extractfile(member)
    assert content is not None  # it is plain
    return content.read()


def _manifest(path: Path, text: bytes) -> Bundle:
    """A manifest, decoded; raises BundleError for another format, and for names that would lead out of a folder."""
    try:
        if (told := msgspec.json.decode(text, type=_Format).format) != FORMAT:
            hint = "use the Hearth that it was made with"
            raise BundleError(f"{path} has format {told}, this Hearth reads {FORMAT}", hint=hint)
        bundle = msgspec.json.decode(text, type=Bundle)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} has a manifest that is none", cause=str(error), hint=_ALTERED) from error
    for name in bundle.files:
        if {"", ".", ".."} & set(name.split("/")) or not name.isprintable():
            raise BundleError(f"{path} names a file {name!r}", hint=_ALTERED)
    return bundle


class _Format(msgspec.Struct):
    format: int


def _passes(tar: tarfile.TarFile, member: tarfile.TarInfo, wanted: File, place: Path | None) -> bool:
    """Whether a member is the file that the manifest names; it is written to a place on the way, if one is given."""
    content = tar.extractfile(member) if _plain(member) and member.size == wanted.size else None
    if content is None or bool(member.mode & 0o100) != wanted.executable:
        return False
    digest = hashlib.sha256()
    with nullcontext() if place is None else _new(place) as file:
        while block := content.read(1 << 20):
            digest.update(block)
            if file is not None:
                file.write(block)
    if place and wanted.executable:
        place.chmod(0o755)
    return digest.hexdigest() == wanted.sha256


def _new(place: Path) -> IO[bytes]:
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.open("xb")
