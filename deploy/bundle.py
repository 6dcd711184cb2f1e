"""Bundles: one file with everything that a host needs, for places without network access.

A bundle is a tar of a reduced checkout, a cache and a wheelhouse. Its first member, `bundle.json`, lists every other
file with size and SHA-256. The second is an SSH signature of the first, if the bundle is signed. Every byte is checked
before use, and a deploy from a bundle uses only its contents.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import tarfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from core import console, files, lockfile, signature, source, workspace
from core.console import counted
from core.errors import BundleError
from core.manifest import Sha256
from core.signature import Signed
from core.stack import Platform
from core.typed import from_json
from core.workspace import Workspace
from deploy import archive, containers, proofs
from deploy import release as releases
from lock import image_base, nodes, requirements

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from core.manifest import Manifest
    from deploy.host import Target
    from deploy.inputs import Inputs

FORMAT = 5
MANIFEST = "bundle.json"
SIGNATURE = "bundle.json.sig"
LIMIT, SHORT = 64_000_000, 64_000
"""Size limits in bytes: of a manifest (300,000 files), and of its signature (about 300) or of a header."""
DEPTH = 100
"""Maximum depth of nested folders."""
AGENT = "agent.pyz"


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle; `size` in bytes."""

    sha256: Sha256
    size: int
    executable: bool = False


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The target of a bundle and all its files.

    `requesters` are its nodes, and ComfyUI-Manager if selected; `proofs` are the workflows that a release must run.
    """

    format: int
    profile: str
    platform: str
    python: str
    version: str
    requesters: tuple[str, ...]
    kernels: dict[str, str]
    proofs: tuple[str, ...]
    files: dict[str, File]

    @property
    def size(self) -> int:
        """The total size of its files, in bytes."""
        return sum(each.size for each in self.files.values())


@dataclass(frozen=True)
class Opened:
    """A bundle that was read: `seal` is its manifest's SHA-256, signed or not; `origin` names the signer."""

    bundle: Bundle
    seal: Signed
    origin: str

    @property
    def id(self) -> str:
        """The SHA-256 of its manifest, which covers the whole content. Compare it with its maker's id."""
        return self.seal.text


def signers_file() -> Path:
    """The list of permitted bundle signers: $HEARTH_ALLOWED_SIGNERS, else `config/allowed_signers`."""
    return Path(os.environ.get("HEARTH_ALLOWED_SIGNERS") or files.CHECKOUT / "config/allowed_signers")


def _origin(seal: Signed) -> str:
    """The signer of a bundle, in words; raises BundleError if this client has a list and the signer is not in it."""
    place = signers_file()
    if (listed := _signers(place)) is not None:
        return f"signed by {seal.signer(listed, str(place))}"
    return f"signed with {seal.key()}, which is not listed in {place}" if seal.signature else "not signed"


def _signers(place: Path) -> str | None:
    """This client's list of permitted signers; None if no variable names one and the default file does not exist.

    Raises BundleError if the list exists but cannot be read: a check that could not run has failed.
    """
    try:
        if not os.environ.get("HEARTH_ALLOWED_SIGNERS"):
            try:
                place.lstat()  # a dangling link is a list that cannot be read
            except FileNotFoundError:
                return None
        with _plain_file(place) as file:
            content = file.read(signature.LIMIT + 1)
    except OSError as error:
        hint = "create it or correct its permissions, or set HEARTH_ALLOWED_SIGNERS to another file"
        raise BundleError(
            "signature", f"{place} lists who may sign, and cannot be read", cause=str(error), hint=hint
        ) from error
    if len(content) > signature.LIMIT:
        raise BundleError(
            "signature", f"{place} lists who may sign, and is larger than {signature.LIMIT // 1_000_000} MB"
        )
    return content.decode(errors="replace")


def _plain_file(path: Path) -> IO[bytes]:
    """Open a file for reading; raises OSError for a folder, pipe or device, without blocking."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def write(
    target: Target,
    inputs: Inputs,
    platform: str,
    python: str,
    wheels: Sequence[Manifest],
    output: Path,
    key: Path | None = None,
) -> Opened:
    """Write a bundle for a platform and Python, atomically by rename; `key` signs it.

    The same content gives the same bytes, except for signatures of key types that are not deterministic.
    """
    if output.exists() and not output.is_file():
        raise BundleError(
            "bundle", f"{output} is not a file, so a bundle cannot replace it", hint="choose another file with --output"
        )
    requesters = releases.requesters(target, inputs.nodes)
    listed = _listed(inputs, requesters, platform, python, wheels)
    listed |= {f"checkout/{name}": path for name, path in proofs.bundled(target).items()}
    listed |= _root(target, Platform.parse(platform)) if target.host.runtime == "podman" else {}
    total = sum(path.stat().st_size for path in listed.values())
    console.say(f"bundling {counted(len(listed), 'file')}, {console.size(total)}")
    found = {
        name: File(files.sha256(path), path.stat().st_size, bool(path.stat().st_mode & 0o100))
        for name, path in sorted(listed.items())
    }
    bundle = Bundle(
        format=FORMAT,
        profile=target.profile_name,
        platform=platform,
        python=python,
        version=inputs.application.version,
        requesters=tuple(requesters),
        kernels={wheel.kernel: wheel.version for wheel in wheels},
        proofs=tuple(each.name for each in inputs.proofs),
        files=found,
    )
    text = msgspec.json.encode(bundle)
    digest = hashlib.sha256(text).hexdigest()
    seal = signature.sign(digest, key) if key else Signed(digest, "")
    with files.draft(output) as part:
        _write_tar(part, {MANIFEST: text, SIGNATURE: seal.signature.encode()}, found, listed)
        part.replace(output)
    return Opened(bundle, seal, f"signed with {seal.key()}" if key else "not signed")


def _write_tar(output: Path, texts: Mapping[str, bytes], found: Mapping[str, File], listed: Mapping[str, Path]) -> None:
    """Write the texts that are not empty, then the listed files."""
    with (
        console.Progress("bundling", sum(each.size for each in found.values()), len(found)) as progress,
        tarfile.open(output, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in texts.items():
            if content:
                tar.addfile(_member(name, File("", len(content))), io.BytesIO(content))
        for name, each in found.items():
            with listed[name].open("rb") as file:
                tar.addfile(_member(name, each), file)
            progress.advance(each.size)


def _member(name: str, file: File) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = file.size, 0o755 if file.executable else 0o644
    return info


def _listed(
    inputs: Inputs, requesters: Sequence[str], platform: str, python: str, wheels: Sequence[Manifest]
) -> dict[str, Path]:
    """Every file of a bundle by its name in it; fetches what the cache lacks."""
    app, lock, here = inputs.application, inputs.locks[platform, python], workspace.current()
    found = {AGENT: archive.agent_file(), "checkout/uv.lock": here.checkout / "uv.lock"}
    for pattern in ("config/stacks.toml", "config/profiles/*.toml", "config/modes/*.toml", "recipes/comfyui/units/*"):
        found |= {f"checkout/{path.relative_to(here.checkout)}": path for path in here.checkout.glob(pattern)}
    recipe = [app.path / "app.toml", nodes.catalogue_file()]
    found |= {f"checkout/recipes/comfyui/{path.name}": path for path in recipe if path.exists()}
    found[f"checkout/recipes/comfyui/locks/{lock.name}.txt"] = requirements.folder(app.path) / f"{lock.name}.txt"
    tree = source.fetch(app)
    if own := app.source[0].folder:
        found |= {f"checkout/recipes/comfyui/{own}/{name}": path for name, path in files.tree(tree)}
    cached = [
        *nodes.fetch(inputs.nodes).values(),
        requirements.download(lock, requesters, Platform.parse(platform)),
        lockfile.install("uv", Platform.parse(platform), "3.11"),
        *([] if own else [tree]),
    ]
    for folder in cached:
        inner = files.tree(folder, largest=files.LARGEST_WHEEL)
        found |= {f"cache/{folder.relative_to(here.cache)}/{name}": path for name, path in inner}
    exported = lockfile.exported("uv")
    found[f"cache/{exported.relative_to(here.cache)}"] = exported
    for wheel in wheels:
        place = here.wheelhouse.path(wheel)
        found |= {f"wheelhouse/{wheel.index}/{wheel.file}": place}
        found |= {f"wheelhouse/{wheel.index}/{wheel.file}.json": place.with_name(f"{wheel.file}.json")}
    return found


def _root(target: Target, platform: Platform) -> dict[str, Path]:
    """The root file system of a container, as the cache has it, and what describes it."""
    cache = workspace.current().cache
    pairs = containers.layers(platform, cuda=target.profile.cuda)
    found = {f"cache/{path.relative_to(cache)}": path for pair in pairs for path in pair}
    return found | {f"checkout/recipes/image/{path.name}": path for path in image_base.recipe()}


def verify(path: Path) -> Opened:
    """Read a whole bundle and compare every file with its hash; unpacks nothing.

    Raises BundleError as `opened` does.
    """
    return _read(path, None)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Unpack and check a bundle, and use only its contents while the context lasts.

    Raises BundleError, also if this client has a list of signers (`signers_file`) and none of them signed it.
    """
    with files.draft(workspace.current().cache / "bundles/open") as place:
        place.mkdir()
        found = _read(path, place)
        console.say(f"{path.name} is intact, and {found.origin}")
        theirs = found.bundle.files.get(AGENT)
        if theirs is None or theirs.sha256 != hashlib.sha256(archive.packed_agent()).hexdigest():
            raise BundleError(
                "bundle",
                f"{path} was made by another version of Hearth",
                cause="its agent differs from this version's, and may act differently on a host",
                hint="use the checkout that made it, or create it again: inv bundle",
            )
        with workspace.using(Workspace.of_bundle(place)):
            yield found


def _read(path: Path, place: Path | None) -> Opened:
    """Check a bundle: signature, then manifest, then every file; unpack it into `place` if given."""
    try:
        with _plain_file(path) as file:
            if place:
                console.say(f"unpacking {path.name}, {console.size(path.stat().st_size)}")
            members = _members(path, file)
            text, member = _head(path, file, next(members, None), MANIFEST, LIMIT), next(members, None)
            signed = b""
            if member and member.name == SIGNATURE:
                signed, member = _head(path, file, member, SIGNATURE, SHORT), next(members, None)
            seal = Signed(hashlib.sha256(text).hexdigest(), signed.decode("ascii"))
            origin = _origin(seal)
            bundle = _manifest(path, text)
            missing = dict(bundle.files)
            while member:
                wanted = missing.pop(member.name, None)
                if wanted is None or not _passes(file, member, wanted, place and place / member.name):
                    raise _altered(path, member.name)
                member = next(members, None)
    except OSError as error:
        raise BundleError("bundle", f"{path} cannot be {'unpacked' if place else 'read'}", cause=str(error)) from error
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise _cut_short(path, str(error)) from error
    if missing:
        raise _cut_short(path, f"{min(missing)} is missing")
    return Opened(bundle, seal, origin)


_ALTERED = "do not use it; get another copy from where it was made"


def _cut_short(path: Path, why: str) -> BundleError:
    again = "copy it again, or create it again: inv bundle"
    return BundleError(
        "bundle", f"{path} is not a complete bundle", cause=f"truncated, or not a bundle: {why}", hint=again
    )


def _altered(path: Path, name: str) -> BundleError:
    return BundleError("bundle", f"{path} was altered: {name}", hint=_ALTERED)


def _members(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of a bundle. The caller reads each one from the file before it requests the next.

    Accepts only the output of `write`: plain files, with an extended header if a name is long. tarfile is unsafe here:
    it reads headers of any size into memory, follows them without limit, and accepts sparse files that expand to a
    huge size.
    """
    extended: dict[str, str] = {}
    while (head := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
        if member.type == tarfile.XHDTYPE and not extended and 0 < member.size <= SHORT:
            extended = _pax_records(path, _whole(file, member.size))
        else:
            member.name, member.size = extended.get("path", member.name), int(extended.get("size", member.size))
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
                raise _altered(path, member.name)
            extended = {}
            yield member
        file.read(-member.size % tarfile.BLOCKSIZE)


def _pax_records(path: Path, records: bytes) -> dict[str, str]:
    """Parse the pax records for the next member's name and size; raises BundleError for any other record."""
    values: dict[str, str] = {}
    while records:
        found = re.match(rb"(\d{1,5}) (?:(path)=([^\n]+)|(size)=(\d{1,15}))\n", records)
        if not found or int(found[1]) != found.end():
            raise _altered(path, f"its archive reports {records[:80]!r}")
        values[(found[2] or found[4]).decode()] = (found[3] or found[5]).decode()
        records = records[found.end() :]
    return values


def _whole(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes of a file; raises TarError if there are fewer."""
    if len(content := file.read(size)) < size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _head(path: Path, file: IO[bytes], member: tarfile.TarInfo | None, name: str, most: int) -> bytes:
    """The content of a bundle's manifest or signature member."""
    if member is None:
        raise _cut_short(path, "it is empty")
    if member.name != name:
        hint = "in bundles of older versions the manifest is at the end: use that version, or create the bundle again"
        cause = f"it begins with {member.name!r}, not with {name}"
        raise BundleError("bundle", f"{path} is not a bundle of this version of Hearth", cause=cause, hint=hint)
    if member.size > most:
        raise BundleError("bundle", f"{path} was altered: its {name} has {console.size(member.size)}", hint=_ALTERED)
    return _whole(file, member.size)


def _manifest(path: Path, text: bytes) -> Bundle:
    """Decode a manifest; raises BundleError for another format, or for names that would escape the folder."""
    try:
        if (number := from_json(text, _Format).format) != FORMAT:
            hint = "use the version of Hearth that made it"
            raise BundleError("bundle", f"{path} has format {number}, this Hearth reads {FORMAT}", hint=hint)
        bundle = from_json(text, Bundle)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError("bundle", f"{path} has an invalid manifest", cause=str(error), hint=_ALTERED) from error
    for name in bundle.files:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or len(parts) > DEPTH or not name.isprintable():
            raise BundleError("bundle", f"{path} names a file {name!r}", hint=_ALTERED)
    return bundle


class _Format(msgspec.Struct):
    format: int


def _passes(file: IO[bytes], member: tarfile.TarInfo, wanted: File, place: Path | None) -> bool:
    """Whether a member matches its manifest entry; writes it to `place`, if given."""
    if member.size != wanted.size or bool(member.mode & 0o100) != wanted.executable:
        return False
    digest, left = hashlib.sha256(), member.size
    with nullcontext() if place is None else _new(place) as written:
        while left:
            block = _whole(file, min(left, 1 << 20))
            left -= len(block)
            digest.update(block)
            if written is not None:
                written.write(block)
    if place and wanted.executable:
        place.chmod(0o755)
    return digest.hexdigest() == wanted.sha256


def _new(place: Path) -> IO[bytes]:
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.open("xb")


def summary(path: Path, found: Opened) -> dict[str, Any]:
    """A bundle for JSON, without its list of files."""
    about = {key: value for key, value in msgspec.to_builtins(found.bundle).items() if key != "files"}
    about |= {"file": str(path), "id": found.id, "origin": found.origin}
    return {**about, "bytes": found.bundle.size, "files": len(found.bundle.files)}


def rows(path: Path, found: Opened) -> list[str]:
    """The contents and the signer of a bundle, as a table of two columns."""
    bundle = found.bundle
    kernels = [f"{name} {version}" for name, version in bundle.kernels.items()]
    cells = [
        ("bundle", f"{path}, intact: {counted(len(bundle.files), 'file')}, {console.size(bundle.size)}"),
        ("id", found.id),
        ("origin", found.origin),
        ("for", f"profile {bundle.profile}, {bundle.platform}, Python {bundle.python}"),
        ("ComfyUI", bundle.version),
        ("kernels", ", ".join(kernels) or "none"),
        ("nodes", ", ".join(bundle.requesters) or "none"),
        ("proofs", ", ".join(bundle.proofs) or "none"),
    ]
    return console.table(("", ""), cells)
