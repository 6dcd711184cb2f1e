"""Our nodes sign pictures and videos; C2PA's own reader validates them with the certificate authority of the test."""

from __future__ import annotations

import io
import json
import sys
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from agent.sanitise import sanitise


def certificate(name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None) -> Any:
    """A certificate with its key; of its own without an issuer. C2PA's rules: spec.c2pa.org, "X.509 Certificates"."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name),
            x509.NameAttribute(x509.oid.NameOID.ORGANIZATION_NAME, "Test"),
        ]
    )
    by, signing = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    now, leaf = datetime.now(UTC), issuer is not None
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=leaf, key_cert_sign=not leaf, crl_sign=not leaf, decipher_only=False, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if leaf:
        purpose = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION])
        built = built.add_extension(purpose, critical=False)
    return built.sign(signing, hashes.SHA256()), key


def pem(found: x509.Certificate) -> str:
    return found.public_bytes(serialization.Encoding.PEM).decode()


class Tensor:
    """What the node uses of torch's."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values, self.shape = values, values.shape

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.values


class Components:
    """ComfyUI's VideoFromComponents, which encodes frames with PyAV. Its own needs torch."""

    def __init__(self, frames: np.ndarray[Any, Any]) -> None:
        self.frames = frames

    def save_to(self, path: io.BytesIO, metadata: dict[str, str] | None = None) -> None:
        with av.open(path, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as file:
            file.metadata.update(metadata or {})
            stream: av.VideoStream = file.add_stream("h264", rate=8)
            _, stream.height, stream.width, _ = self.frames.shape
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1  # with several, two encodings can differ
            for each in self.frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(each, "rgb24")))
            file.mux(stream.encode())


class LoadedVideo:
    """What the node uses of a video that was loaded from a file: its streams would be copied, with the metadata."""

    def __init__(self, frames: np.ndarray[Any, Any]) -> None:
        self.frames = frames

    def get_dimensions(self) -> tuple[int, int]:
        return self.frames.shape[2], self.frames.shape[1]

    def get_components(self) -> np.ndarray[Any, Any]:
        return self.frames

    def save_to(self, path: io.BytesIO) -> None:
        Components(self.frames).save_to(path, {"prompt": "a secret"})


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The node, with what it uses of ComfyUI."""
    paths: Any = SimpleNamespace(
        get_output_directory=lambda: str(tmp_path),
        get_save_image_path=lambda prefix, folder, *_: (folder, prefix, 1, "", prefix),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    implementations: Any = SimpleNamespace(VideoFromComponents=Components)
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace(input_impl=implementations))
    monkeypatch.setitem(sys.modules, "comfy_api.input_impl", implementations)
    monkeypatch.delitem(sys.modules, "recipes.comfyui.provenance", raising=False)
    return import_module("recipes.comfyui.provenance")


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> str:
    root = certificate("root")
    middle, key = certificate("leaf", root)
    monkeypatch.setenv("C2PA_CHAIN", (pem(middle) + pem(root[0])).strip())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.setenv("C2PA_KEY", private.decode().strip())
    return pem(root[0])


def validated(path: Path, anchors: str) -> dict[str, Any]:
    settings = {"trust": {"trust_anchors": anchors}, "verify": {"verify_trust": True}}
    with c2pa.Context.from_dict(settings) as context, c2pa.Reader(str(path), context=context) as reader:
        found: dict[str, Any] = json.loads(reader.json())
    return found


PIXELS = np.random.default_rng(1).random((2, 48, 64, 3), np.float32)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_signed_pictures_are_valid_and_trusted(node: ModuleType, authority: str, tmp_path: Path, kind: str) -> None:
    images = [Tensor(each) for each in PIXELS]
    saved = node.SaveSignedImage().save(images, "a", kind, "trainedAlgorithmicMedia")["ui"]["images"]
    assert [each["filename"] for each in saved] == [f"a_00001_.{kind}", f"a_00002_.{kind}"]
    path = tmp_path / saved[1]["filename"]
    found = validated(path, authority)
    assert found["validation_state"] == "Trusted"
    manifest = found["manifests"][found["active_manifest"]]
    (action,) = next(each for each in manifest["assertions"] if each["label"].startswith("c2pa.actions"))["data"][
        "actions"
    ]
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert "thumbnail" not in manifest
    plain = io.BytesIO()
    Image.fromarray(np.clip(255 * PIXELS[1], 0, 255).astype(np.uint8)).save(plain, kind, **node.FORMATS[kind][1])
    assert path.stat().st_size - len(plain.getvalue()) < 20_000
    with Image.open(path) as signed, Image.open(plain) as unsigned:
        assert signed.tobytes() == unsigned.tobytes()


def decoded(path: Any) -> list[bytes]:
    with av.open(path) as file:
        return [frame.to_ndarray(format="yuv420p").tobytes() for frame in file.decode(video=0)]


def test_a_signed_video_is_valid_and_trusted(node: ModuleType, authority: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (4, 64, 96, 3), np.uint8)
    (saved,) = node.SaveSignedVideo().save(LoadedVideo(frames), "a", "algorithmicMedia")["ui"]["images"]
    assert saved["filename"] == "a_00001_.mp4"
    path = tmp_path / saved["filename"]
    assert validated(path, authority)["validation_state"] == "Trusted"
    assert b"a secret" not in path.read_bytes()
    plain = io.BytesIO()
    Components(frames).save_to(plain)
    assert path.stat().st_size - len(plain.getvalue()) < 20_000
    plain.seek(0)
    assert decoded(str(path)) == decoded(plain)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"mdat") + 50] ^= 1
    path.write_bytes(raw)
    assert validated(path, authority)["validation_state"] == "Invalid"


@pytest.mark.usefixtures("authority")
def test_content_credentials_of_a_video_are_removed_like_other_metadata(node: ModuleType, tmp_path: Path) -> None:
    frames = np.zeros((2, 64, 96, 3), np.uint8)
    node.SaveSignedVideo().save(LoadedVideo(frames), "a", "digitalCreation")
    found = sanitise(tmp_path, "a_00001_.mp4", write=True, replace=True)
    assert (found.state, "C2PA" in found.removed) == ("written", True)
    with pytest.raises(c2pa.C2paError.ManifestNotFound):
        c2pa.Reader(str(tmp_path / "a_00001_.mp4"))


def test_another_authority_is_not_trusted_and_a_changed_picture_is_invalid(
    node: ModuleType, authority: str, tmp_path: Path
) -> None:
    node.SaveSignedImage().save([Tensor(PIXELS[0])], "a", "png", "digitalCreation")
    path = tmp_path / "a_00001_.png"
    assert validated(path, pem(certificate("other")[0]))["validation_state"] == "Valid"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    assert validated(path, authority)["validation_state"] == "Invalid"


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_content_credentials_are_removed_like_other_metadata(node: ModuleType, tmp_path: Path, kind: str) -> None:
    node.SaveSignedImage().save([Tensor(PIXELS[0])], "a", kind, "digitalCreation")
    found = sanitise(tmp_path, f"a_00001_.{kind}", write=True, replace=True)
    assert (found.state, found.removed) == ("written", ("C2PA",))
    with pytest.raises(c2pa.C2paError.ManifestNotFound):
        c2pa.Reader(str(tmp_path / f"a_00001_.{kind}"))


def test_without_a_key_nothing_is_saved(node: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("C2PA_CHAIN", "C2PA_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="C2PA_CHAIN or C2PA_KEY is not set"):
        node.SaveSignedImage().save([Tensor(PIXELS[0])], "a", "png", "digitalCreation")
    assert not [*tmp_path.iterdir()]
