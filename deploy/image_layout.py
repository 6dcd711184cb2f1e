"""OCI image layouts: layers, configurations, manifests and the index, written without a container engine.

The same content gives the same bytes on every machine: layers are sorted, have no owners, times or compression (zlib's
versions differ), and modes that depend on no umask. Format: github.com/opencontainers/image-spec, version 1.1.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import msgspec

from core import files
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

FORMAT = 1
"""Increase it when layers with the same key get other bytes."""

EPOCH = 315_532_800
"""The time of every file and image: 1980, the first year that a ZIP archive can express."""
CREATED = "1980-01-01T00:00:00Z"

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
EMPTY = "application/vnd.oci.empty.v1+json"
NAME = "org.opencontainers.image.ref.name"

Descriptor: TypeAlias = dict[str, Any]
Entry: TypeAlias = tuple[tarfile.TarInfo, "bytes | Path"]
"""A member of a layer, and the content of a file."""


def file(name: str, content: bytes | Path, *, executable: bool = False) -> Entry:
    """A file of a layer."""
    info = tarfile.TarInfo(name)
    info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
    info.mode = 0o755 if executable else 0o644
    return info, content


def link(name: str, target: str) -> Entry:
    """A symbolic link of a layer."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
    return info, b""


def folder(name: str, *, mode: int = 0o755, user: int = 0) -> Entry:
    """A folder of a layer; those that contain other entries need none."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, user, user
    return info, b""


def tree(root: Path, place: str, leave: Callable[[str], bool] = lambda _: False) -> Iterator[Entry]:
    """The entries of a folder that the image has at `place` (`""`: its root), without those that `leave` names."""
    pending = [""]
    while pending:
        at = pending.pop()
        with os.scandir(root / at) as found:
            for each in found:
                inner = f"{at}{each.name}"
                name = f"{place}/{inner}".lstrip("/")
                if leave(inner):
                    continue
                if each.is_symlink():
                    yield link(name, str(Path(each.path).readlink()))
                elif each.is_dir():
                    sticky = each.stat().st_mode & 0o1000
                    yield folder(name, mode=0o1777 if sticky else 0o755)
                    pending.append(f"{inner}/")
                elif each.is_file():
                    yield file(name, Path(each.path), executable=bool(each.stat().st_mode & 0o100))


class Layout:
    """An image layout in the folder `place`; `records` is a cache folder that remembers the layers of keys.

    Blobs come first and the index last, each in one rename: an interrupted run leaves the previous image, or none.
    """

    def __init__(self, place: Path, records: Path) -> None:
        self.place = place
        self._records = records
        self._blobs = place / "blobs/sha256"
        if place.exists() and not (self._blobs.is_dir() or not any(place.iterdir())):
            what = f"{place} is not an image layout, so an image cannot replace it"
            raise UsageError("usage", what, hint="choose another folder with --output")

    def layer(self, key: str, entries: Callable[[], AbstractContextManager[Iterable[Entry]]]) -> Descriptor:
        """A layer with these entries; `key` names everything that they depend on. A known one is not written again."""
        record = self.record(key)
        if record.exists():
            known: Descriptor = json.loads(record.read_bytes())
            if self._holds(known):
                return known
        self._blobs.mkdir(parents=True, exist_ok=True)
        with files.draft(self._blobs / "layer") as part:
            with part.open("wb") as raw, entries() as listed:
                hashed = _Hashed(raw)
                _write_tar(hashed, listed)
                os.fsync(raw.fileno())  # what an index names is complete, also after a power cut
            found = self._put(part, LAYER, hashed.hash.hexdigest(), hashed.size)
        files.write(record, json.dumps(found))
        return found

    def record(self, key: str) -> Path:
        """The file that remembers the layer of a key."""
        return self._records / f"{hashlib.sha256(f'{FORMAT} {key}'.encode()).hexdigest()}.json"

    def blob(self, content: bytes, kind: str) -> Descriptor:
        """A blob with this content, of a media type."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        with files.draft(self._blobs / "blob") as part:
            with part.open("wb") as raw:
                raw.write(content)
                raw.flush()
                os.fsync(raw.fileno())
            return self._put(part, kind, hashlib.sha256(content).hexdigest(), len(content))

    def _put(self, part: Path, kind: str, digest: str, size: int) -> Descriptor:
        found = {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}
        if not self._holds(found):
            part.replace(self.path(found))
        return found

    def _holds(self, found: Descriptor) -> bool:
        """Whether the layout has a blob, of its whole size."""
        blob = self.path(found)
        return blob.exists() and blob.stat().st_size == int(found["size"])

    def path(self, found: Descriptor) -> Path:
        """The file of a blob."""
        return self._blobs / str(found["digest"]).removeprefix("sha256:")

    def image(
        self,
        layers: Mapping[str, Descriptor],
        config: Mapping[str, Any],
        architecture: str,
        annotations: Mapping[str, str],
    ) -> Descriptor:
        """An image of these layers, by what they contain; `config` is how it runs."""
        image = {
            "created": CREATED,
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in layers.values()]},
            "history": [{"created": CREATED, "created_by": f"hearth: {name}"} for name in layers],
        }
        found = self._manifest(self._json(image, CONFIG), [*layers.values()], annotations)
        return {**found, "platform": {"architecture": architecture, "os": "linux"}}

    def referrer(self, subject: Descriptor, content: bytes, kind: str) -> Descriptor:
        """A file about an image, such as its SBOM, that refers to it as its subject."""
        about = {name: subject[name] for name in ("mediaType", "digest", "size")}
        more = {"artifactType": kind, "subject": about}
        found = self._manifest(self.blob(b"{}", EMPTY), [self.blob(content, kind)], {}, more)
        return {**found, "artifactType": kind}

    def index(self, manifests: Sequence[Descriptor]) -> Descriptor:
        """An index of manifests."""
        return self._json({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, INDEX)

    def _manifest(
        self,
        config: Descriptor,
        layers: Sequence[Descriptor],
        annotations: Mapping[str, str],
        more: Mapping[str, Any] | None = None,
    ) -> Descriptor:
        content = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers, **(more or {})}
        return self._json({**content, **({"annotations": annotations} if annotations else {})}, MANIFEST)

    def _json(self, content: Any, kind: str) -> Descriptor:
        return self.blob(_encoded(content), kind)

    def finish(self, manifests: Sequence[Descriptor], name: str) -> None:
        """Write the index, which makes the images visible, then delete blobs of previous ones.

        manifest.json is for `docker load`, which gives the first image this name.
        """
        image = self._content(manifests[0])
        paths = [f"blobs/{each['digest'].replace(':', '/')}" for each in (image["config"], *image["layers"])]
        docker = [{"Config": paths[0], "RepoTags": [name], "Layers": paths[1:]}]
        files.write(self.place / "oci-layout", _encoded({"imageLayoutVersion": "1.0.0"}))
        files.write(self.place / "manifest.json", _encoded(docker))
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        files.write(self.place / "index.json", _encoded(index))
        used = {digest.removeprefix("sha256:") for each in manifests for digest in self._reached(each)}
        for path in self._blobs.iterdir():
            if not path.is_file():
                files.sweep(path)  # of a killed run
            elif path.name not in used:
                path.unlink()

    def _content(self, found: Descriptor) -> Any:
        return json.loads(self.path(found).read_bytes())

    def _reached(self, found: Descriptor) -> Iterator[str]:
        """The digests of everything that a descriptor leads to."""
        yield found["digest"]
        if found["mediaType"] in (INDEX, MANIFEST):
            content = self._content(found)
            parts = [content.get("config"), content.get("subject"), *content.get("layers", ())]
            for each in [*parts, *content.get("manifests", ())]:
                if each:
                    yield from self._reached(each)


def _encoded(content: Any) -> bytes:
    return msgspec.json.encode(content, order="sorted")


class _Hashed(io.RawIOBase):
    """A file that hashes and counts what is written to it."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output, self.hash, self.size = output, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.hash.update(block)
        self.size += len(block)
        return self._output.write(block)


def _write_tar(output: _Hashed, entries: Iterable[Entry]) -> None:
    """Write entries sorted by name, with the folders that contain them; of several with one name, the first."""
    listed: dict[str, Entry] = {}
    for info, content in entries:
        listed.setdefault(info.name, (info, content))
    for name in list(listed):
        while name := name.rpartition("/")[0]:
            if name in listed:
                break
            listed[name] = folder(name)
    # A buffer, because tarfile writes headers of 512 bytes; a name is a path, so a folder comes before its contents.
    with (
        io.BufferedWriter(output, 1 << 20) as buffered,
        tarfile.open(fileobj=buffered, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(listed, key=lambda name: name.split("/")):
            info, content = listed[name]
            info.mtime = EPOCH
            if not info.isreg():
                tar.addfile(info)
            elif isinstance(content, bytes):
                tar.addfile(info, io.BytesIO(content))
            else:
                with content.open("rb") as source:
                    tar.addfile(info, source)
