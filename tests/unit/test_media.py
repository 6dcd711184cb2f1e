"""Metadata is removed from real files; pixels and samples, decoded by Pillow and FFmpeg, stay the same."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from agent.sanitise import DRAFT, sanitise

SECRET = b"s3cret-workflow"
TEXT = SECRET.decode()


def exif(orientation: int = 1) -> Image.Exif:
    found = Image.Exif()
    found[0x010E] = TEXT
    found[0x0112] = orientation
    return found


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 1) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), np.uint8)
    image = Image.frombytes("L" if mode == "P" else mode, size, pixels.tobytes())
    return image.quantize(17) if mode == "P" else image


def png(path: Path, image: Image.Image, **more: Any) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", TEXT)
    info.add_text("prompt", TEXT * 100, zip=True)
    info.add_itxt("XML:com.adobe.xmp", TEXT)
    image.save(path, pnginfo=info, exif=exif(), **more)


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pictures(path: Path) -> list[tuple[Any, ...]]:
    """Everything of a picture that affects its look: pixels, size, mode, palette, profile, and an animation's times."""
    found: list[tuple[Any, ...]] = []
    with Image.open(path) as image:
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            shown = image.tobytes() if image.mode == "I;16" else image.convert("RGBA").tobytes()
            names = ("duration", "loop", "icc_profile", "gamma", "jfif_density", "dpi" if image.format == "PNG" else "")
            about = {name: image.info.get(name) for name in names}
            found.append((image.mode, image.size, image.getpalette(), sha256(shown).hexdigest(), about))
    return found


def samples(path: Path) -> list[Any]:
    """Every packet, and every decoded frame with its time."""
    with av.open(str(path)) as file:
        packets = [(each.stream_index, each.pts, each.dts, sha256(bytes(each)).hexdigest()) for each in file.demux()]
    with av.open(str(path)) as file:
        frames = [(each.pts, sha256(each.to_ndarray().tobytes()).hexdigest()) for each in file.decode()]
    assert frames
    return [packets, frames]


def animated(path: Path, **more: Any) -> None:
    first, *others = (noise(seed=each) for each in range(4))
    first.save(path, save_all=True, append_images=others, duration=[40, 80, 120, 160], loop=3, **more)


def add_chunk(path: Path, kind: bytes, data: bytes) -> None:
    raw = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(raw[:33] + chunk + raw[33:])


def png_16(path: Path) -> None:
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path)
    add_chunk(path, b"tEXt", b"workflow\0" + SECRET)


def png_48(path: Path) -> None:
    """Written by FFmpeg: Pillow has no mode with 16 bits per colour."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as file:
        stream = file.add_stream("png", rate=1, width=40, height=30, pix_fmt="rgb48be")
        pixels = np.random.default_rng(1).integers(0, 65536, (30, 40, 3), np.uint16)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb48be")))
        file.mux(stream.encode())
    add_chunk(path, b"tEXt", b"workflow\0" + SECRET)


def animated_png(path: Path) -> None:
    animated(path, format="PNG")
    add_chunk(path, b"iTXt", b"workflow\0\0\0\0\0" + SECRET)


IMAGES: dict[str, Callable[[Path], Any]] = {
    "rgb.png": lambda path: png(path, noise(), icc_profile=profile(), dpi=(300, 300)),
    "rgba.png": lambda path: png(path, noise("RGBA")),
    "grey.png": lambda path: png(path, noise("L")),
    "palette.png": lambda path: png(path, noise("P"), transparency=3),
    "16.png": png_16,
    "48.png": png_48,
    "animated.png": animated_png,
    "baseline.jpg": lambda path: noise().save(
        path, exif=exif(), icc_profile=profile(), comment=SECRET, xmp=b"<x>" + SECRET, dpi=(300, 300)
    ),
    "progressive.jpg": lambda path: noise().save(path, progressive=True, comment=SECRET, subsampling=0, quality=98),
    "grey.jpg": lambda path: noise("L").save(path, exif=exif()),
    "cmyk.jpg": lambda path: noise("CMYK").save(path, exif=exif()),
    "restart.jpg": lambda path: noise().save(path, comment=SECRET, restart_marker_rows=1),
    "lossy.webp": lambda path: noise().save(path, exif=exif(), xmp=b"<x>" + SECRET, icc_profile=profile()),
    "alpha.webp": lambda path: noise("RGBA").save(path, exif=exif()),
    "lossless.webp": lambda path: noise("RGBA", (41, 31)).save(path, exif=exif(), lossless=True),
    "animated.webp": lambda path: animated(path, exif=exif(), xmp=SECRET),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_picture_keeps_its_pixels_and_loses_its_metadata(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    IMAGES[name](path)
    before = pictures(path)
    assert SECRET in path.read_bytes()
    decoded = samples(path)[1] if name == "48.png" else None
    found = sanitise(tmp_path, name, write=True, replace=True)
    assert (found.state, found.error) == ("written", "")
    assert found.removed
    assert SECRET not in path.read_bytes()
    assert pictures(path) == before
    assert decoded is None or samples(path)[1] == decoded
    assert sanitise(tmp_path, name, write=True, replace=True).state == "clean"
    with Image.open(path) as image:
        assert not image.getexif()
        assert not {"comment", "xmp", "workflow", "prompt", "XML:com.adobe.xmp"} & image.info.keys()


def video(path: Path, codec: str = "libx264", movflags: str = "use_metadata_tags") -> None:
    with av.open(str(path), "w", options={"movflags": movflags}) as file:
        file.metadata["workflow"] = file.metadata["comment"] = TEXT
        picture: av.VideoStream = file.add_stream(  # type: ignore[assignment]
            codec, rate=10, width=64, height=48, pix_fmt="yuv420p", options={"bf": "2"}
        )
        sound = file.add_stream("aac", rate=44100, layout="stereo")
        picture.metadata["title"] = sound.metadata["title"] = TEXT
        for each in range(20):
            pixels = np.random.default_rng(each).integers(0, 256, (48, 64, 3), np.uint8)
            file.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        for each in range(40):
            waves = np.random.default_rng(each).random((2, 1024), np.float32) - np.float32(0.5)
            frame = av.AudioFrame.from_ndarray(waves, "fltp", "stereo")
            frame.rate, frame.pts = 44100, each * 1024
            file.mux(sound.encode(frame))
        file.mux(picture.encode())
        file.mux(sound.encode())


def webm(path: Path) -> None:
    with av.open(str(path), "w") as file:
        file.metadata["workflow"] = file.metadata["title"] = TEXT
        picture: av.VideoStream = file.add_stream("libvpx-vp9", rate=10, width=64, height=48, pix_fmt="yuv420p")
        picture.metadata["title"] = TEXT
        for each in range(20):
            pixels = np.random.default_rng(each).integers(0, 256, (48, 64, 3), np.uint8)
            file.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(picture.encode())


def flac(path: Path) -> None:
    with av.open(str(path), "w") as file:
        file.metadata["workflow"] = TEXT
        stream = file.add_stream("flac", rate=44100, layout="stereo")
        for each in range(20):
            waves = np.random.default_rng(each).integers(-9000, 9000, (1, 2 * 4608), np.int16)
            frame = av.AudioFrame.from_ndarray(waves, "s16", "stereo")
            frame.rate, frame.pts = 44100, each * 4608
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def flac_with_id3(path: Path) -> None:
    flac(path)
    path.write_bytes(path.read_bytes() + b"TAG" + SECRET.ljust(125, b"\0"))


MEDIA: dict[str, Callable[[Path], Any]] = {
    "plain.mp4": video,
    "mpeg4.mp4": lambda path: video(path, "mpeg4"),
    "fast.mp4": lambda path: video(path, movflags="faststart"),
    "fragmented.mp4": lambda path: video(path, movflags="frag_keyframe+empty_moov+use_metadata_tags"),
    "quicktime.mov": video,
    "clip.webm": webm,
    "matroska.mkv": video,
    "sound.flac": flac,
    "id3.flac": flac_with_id3,
}


@pytest.mark.parametrize("name", MEDIA)
def test_a_video_or_sound_keeps_its_samples_and_loses_its_metadata(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    MEDIA[name](path)
    before = samples(path)
    assert SECRET in path.read_bytes()
    found = sanitise(tmp_path, name, write=True, replace=True)
    assert (found.state, found.error) == ("written", "")
    assert SECRET not in path.read_bytes()
    compared = slice(1 if name == "id3.flac" else 0, 2)  # FFmpeg takes the ID3 tag for a part of the last packet
    assert samples(path)[compared] == before[compared]
    with av.open(str(path)) as file:
        left = {name for each in (file, *file.streams) for name, value in each.metadata.items() if value}
    assert left <= {"major_brand", "minor_version", "compatible_brands", "language", "vendor_id"}, left
    assert sanitise(tmp_path, name, write=True, replace=True).state == "clean"


# --- what is kept, and what is damaged -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "lossless.webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_only_the_orientation_of_exif_is_kept(tmp_path: Path, name: str, orientation: int) -> None:
    noise().save(tmp_path / name, None, exif=exif(orientation), lossless="lossless" in name)
    assert sanitise(tmp_path, name, write=True, replace=True).removed == ("Exif",)
    with Image.open(tmp_path / name) as image:
        assert dict(image.getexif()) == {0x0112: orientation}
    assert sanitise(tmp_path, name, write=True, replace=True).state == "clean"


def test_thumbnails_and_data_after_the_end_are_removed(tmp_path: Path) -> None:
    """Phones append videos to pictures, and a cropped picture's thumbnail may show the whole one."""
    noise().save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    assert raw[2:4] == b"\xff\xe0"
    thumbnail = b"\xff\xe0" + struct.pack(">H", 16 + 3) + raw[6:18] + b"\1\1abc"
    (tmp_path / "a.jpg").write_bytes(raw[:2] + thumbnail + raw[20:] + SECRET)
    assert sanitise(tmp_path, "a.jpg", write=True, replace=True).removed == ("thumbnail", "data after the end")
    assert (tmp_path / "a.jpg").read_bytes() == raw
    for name in ("a.png", "a.webp"):
        noise().save(tmp_path / name)
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw + SECRET)
        assert sanitise(tmp_path, name, write=True, replace=True).removed == ("data after the end",)
        assert (tmp_path / name).read_bytes() == raw


def test_segments_that_do_not_affect_the_picture_are_removed(tmp_path: Path) -> None:
    noise("CMYK").save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    at = raw.index(b"\xff\xee")
    assert raw[at : at + 9] == b"\xff\xee\0\x0eAdobe"
    longer = b"\xff\xee" + struct.pack(">H", 14 + len(SECRET)) + raw[at + 4 : at + 16] + SECRET
    more = b"".join(struct.pack(">BBH", 0xFF, kind, 2 + len(SECRET)) + SECRET for kind in (0xE2, 0xEF, 0xF3, 0xFD))
    (tmp_path / "a.jpg").write_bytes(raw[:at] + more + longer + raw[at + 16 :])
    assert sanitise(tmp_path, "a.jpg", write=True, replace=True).state == "written"
    assert (tmp_path / "a.jpg").read_bytes() == raw


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(data), kind) + data


@pytest.mark.parametrize("kind", [b"uuid", b"udta", b"meta", b"free", b"skip", b"prft", b"\xa9xyz"])
def test_any_unknown_box_of_a_video_is_emptied(tmp_path: Path, kind: bytes) -> None:
    """XMP and C2PA are in `uuid`, the place of a phone is in `©xyz`; FFmpeg does not list all of these."""
    path = tmp_path / "a.mp4"
    video(path)
    assert sanitise(tmp_path, "a.mp4", write=True, replace=True).state == "written"
    clean = path.read_bytes()
    path.write_bytes(clean + box(kind, SECRET))
    found = sanitise(tmp_path, "a.mp4", write=True, replace=True)
    assert found.state == "written"
    assert path.read_bytes() == clean + box(b"free", bytes(len(SECRET)))


def test_times_of_a_video_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"mvhd") + 8
    raw[at : at + 8] = b"\xd8\0\0\0\xd9\0\0\0"
    path.write_bytes(raw)
    assert "times" in sanitise(tmp_path, "a.mp4", write=True, replace=True).removed
    assert path.read_bytes()[at : at + 8] == bytes(8)


def test_a_track_of_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video(path)
    path.write_bytes(path.read_bytes().replace(b"soun", b"meta"))
    found = sanitise(tmp_path, "a.mp4", write=True, replace=True)
    assert found.state == "failed"
    assert "track of kind meta" in found.error


def element(name: int, data: bytes) -> bytes:
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + (len(data) | 1 << 56).to_bytes(8, "big") + data


HEADER = element(0x1A45DFA3, b"\x42\x82\x84webm")


@pytest.mark.parametrize("size", [1, 117, 118, 119, 120, 5000])
@pytest.mark.parametrize("name", [0x1254C367, 0x1941A469, 0x1043A770, 0xEC, 0xBF, 0x4444])
def test_any_unknown_element_of_a_webm_is_emptied(tmp_path: Path, name: int, size: int) -> None:
    secret = element(name, b"x" * size)
    (tmp_path / "a.webm").write_bytes(HEADER + element(0x18538067, secret + element(0x1F43B675, b"cluster")))
    found = sanitise(tmp_path, "a.webm", write=True, replace=True)
    assert found.state == "written"
    raw = (tmp_path / "a.webm").read_bytes()
    assert len(raw) == len(HEADER) + 12 + len(secret) + 12 + 7
    assert b"xx" not in raw
    assert b"cluster" in raw
    void = raw[len(HEADER) + 12 : len(HEADER) + 12 + len(secret)]
    head, length = (2, void[1] & 0x7F) if void[1] & 0x80 else (9, int.from_bytes(void[2:9], "big"))
    assert (void[0], length, void[head:]) == (0xEC, len(secret) - head, bytes(len(secret) - head))
    assert sanitise(tmp_path, "a.webm", write=True, replace=True).state == "clean"


def test_hostile_webm_files_fail(tmp_path: Path) -> None:
    nested = b""
    for _ in range(5000):
        nested = element(0x18538067, nested)
    track = element(0x1654AE6B, element(0xAE, element(0x83, b"\x21")))
    streamed = b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    states = {}
    for name, data in {"nested": nested, "track": element(0x18538067, track), "streamed": streamed, "0": b"\0"}.items():
        (tmp_path / name).write_bytes(HEADER + data)
        states[name] = sanitise(tmp_path, name, write=False, replace=True).state
    assert states == {"nested": "dirty", "track": "failed", "streamed": "failed", "0": "failed"}


ALL = IMAGES | MEDIA


@pytest.mark.parametrize("name", [each for each in ALL if each != "id3.flac"])
def test_a_truncated_file_fails_and_is_not_changed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ALL[name](path)
    raw = path.read_bytes()
    rng = np.random.default_rng(7)
    for length in [len(raw) - 1, *rng.integers(17, len(raw) - 1, 25)]:
        path.write_bytes(raw[:length])
        found = sanitise(tmp_path, name, write=True, replace=True)
        if found.state != "failed":  # cut between two fragments or boxes, it is a whole file
            assert name.endswith((".mp4", ".mov"))
            assert found.state in ("written", "clean")
            continue
        assert found.error
        assert path.read_bytes() == raw[:length]
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ALL)
def test_random_damage_never_raises(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ALL[name](path)
    raw = path.read_bytes()
    rng = np.random.default_rng(11)
    for _ in range(60):
        damaged = bytearray(raw)
        for at in rng.integers(0, min(len(raw), 600), 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        found = sanitise(tmp_path, name, write=True, replace=False)
        assert found.state in ("clean", "written", "failed", "unknown", "copied")
        assert path.read_bytes() == damaged
        for each in tmp_path.glob("*.clean.*"):
            each.unlink()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\0\0" + bytes(20),
        b"RIFF\x14\0\0\0WEBPVP8X\0\0\0\0EXIF\0\0\0\0",
        b"RIFF\x0c\0\0\0WEBPANMF\0\0\0\0",
        b"RIFF\x26\0\0\0WEBPEXIF\x1a\0\0\0" + b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\3" + bytes(6),
        b"fLaC",
        b"fLaC\x80\0\0\x22" + bytes(34),
        b"\0\0\0\x08ftyp",
        b"\0\0\0\0ftypisom",
        b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x01moov",
        box(b"ftyp", b"isom") + box(b"moov", bytes(8) * 3),
        box(b"ftyp", b"isom") + box(b"moov", box(b"hdlr", b"")),
        box(b"ftyp", b"avif") + box(b"meta", b"the picture"),
        box(b"ftyp", b"isom0000avif") + box(b"moov", b""),
    ],
    ids=range(16),
)
def test_files_that_are_hardly_begun_fail(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert sanitise(tmp_path, "a", write=True, replace=True).state in ("failed", "unknown")
    assert (tmp_path / "a").read_bytes() == data


def test_a_sound_of_nothing_but_starts_of_frames_ends_soon(tmp_path: Path) -> None:
    head = b"fLaC\x80\0\0\x22" + bytes(7) + b"\xff\xff\xff" + bytes(24)
    (tmp_path / "a.flac").write_bytes(head + b"\xff\xf8" * 20_000_000)
    assert sanitise(tmp_path, "a.flac", write=True, replace=True).error == "it is truncated"


def test_a_damaged_chunk_of_a_png_is_reported(tmp_path: Path) -> None:
    png(tmp_path / "a.png", noise())
    raw = bytearray((tmp_path / "a.png").read_bytes())
    raw[raw.index(b"IDAT") + 20] ^= 1
    (tmp_path / "a.png").write_bytes(raw)
    assert sanitise(tmp_path, "a.png", write=True, replace=True).error == "its chunk IDAT is damaged"


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_original_is_kept_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.png", tmp_path / "a.clean.png"
    png(path, noise())
    path.chmod(0o640)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    raw = path.read_bytes()
    dry = sanitise(tmp_path, "a.png", write=False, replace=False)
    assert (dry.state, dry.copy) == ("dirty", "a.clean.png")
    assert [*tmp_path.iterdir()] == [path]
    assert sanitise(tmp_path, "a.png", write=True, replace=False).state == "written"
    assert path.read_bytes() == raw
    assert SECRET not in copy.read_bytes()
    assert (copy.stat().st_mode & 0o777, copy.stat().st_mtime) == (0o640, 1_000_000_000)
    before = copy.stat()
    for write in (True, False):
        assert sanitise(tmp_path, "a.png", write=write, replace=False).state == "copied"
    assert copy.stat() == before
    assert sanitise(tmp_path, "a.clean.png", write=True, replace=False).state == "clean"


def test_another_file_with_the_copys_name_is_not_replaced(tmp_path: Path) -> None:
    png(tmp_path / "a.png", noise())
    (tmp_path / "a.clean.png").write_bytes(b"mine")
    found = sanitise(tmp_path, "a.png", write=True, replace=False)
    assert (found.state, found.error) == ("failed", "a.clean.png exists with other content; move it away")
    assert (tmp_path / "a.clean.png").read_bytes() == b"mine"


def test_links_pipes_and_missing_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    png(tmp_path / "a.png", noise())
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "out/link.png").symlink_to("../a.png")
    os.mkfifo(tmp_path / "out/pipe.png")
    (tmp_path / "out/text.png").write_text("text")
    (tmp_path / "out/empty.png").touch()
    found = {
        name: sanitise(tmp_path / "out", f"{name}.png", write=True, replace=True)
        for name in ("link", "pipe", "text", "empty", "none")
    }
    assert {name: each.state for name, each in found.items()} == {
        "link": "unknown", "pipe": "unknown", "text": "unknown", "empty": "unknown", "none": "failed",
    }  # fmt: skip
    assert found["link"].error == "it is a symbolic link"
    assert (tmp_path / "a.png").read_bytes() == raw


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("at", range(9))
def test_a_killed_run_loses_nothing_and_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The process is killed before each of its calls in turn: the last number kills nothing."""
    path = tmp_path / "a.png"
    png(path, noise())
    raw = path.read_bytes()
    if os.fork() == 0:
        calls = [0]

        def killed(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*given: Any, **more: Any) -> Any:
                calls[0] += 1
                if calls[0] > at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **more)

            return run

        for name in ("open", "fchmod", "utime", "fsync"):
            monkeypatch.setattr(os, name, killed(getattr(os, name)))
        monkeypatch.setattr(Path, "rename", killed(Path.rename))
        sanitise(tmp_path, "a.png", write=True, replace=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    assert status == (0 if at == 8 else -signal.SIGKILL)
    after = path.read_bytes()
    assert after == raw or SECRET not in after
    assert sanitise(tmp_path, "a.png", write=True, replace=True).state in ("written", "clean")
    assert pictures(path)
    assert SECRET not in path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_two_runs_at_once_do_not_write_the_same_file(tmp_path: Path) -> None:
    png(tmp_path / "a.png", noise())
    draft = tmp_path / f"{DRAFT}{sha256(b'a.png').hexdigest()[:16]}"
    with draft.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = sanitise(tmp_path, "a.png", write=True, replace=True)
        assert (found.state, found.error) == ("failed", "another run is cleaning it")
        assert draft.exists()
    assert sanitise(tmp_path, "a.png", write=True, replace=True).state == "written"
    assert not draft.exists()


def test_a_file_that_changes_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(tmp_path / "a.png", noise())
    other = noise(seed=5)

    def change(*_: object) -> None:
        png(tmp_path / "a.png", other)
        os.utime(tmp_path / "a.png", (1, 1))

    monkeypatch.setattr(os, "fchmod", change)
    found = sanitise(tmp_path, "a.png", write=True, replace=True)
    assert found.state == "failed"
    assert SECRET in (tmp_path / "a.png").read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_file_that_changes_before_it_is_written_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png(tmp_path / "a.png", noise())

    def change(_: Path) -> bool:
        raw = bytearray((tmp_path / "a.png").read_bytes())
        raw[-30] ^= 1
        (tmp_path / "a.png").write_bytes(raw)
        os.utime(tmp_path / "a.png", (1, 1))
        return False

    monkeypatch.setattr(os.path, "lexists", change)
    assert sanitise(tmp_path, "a.png", write=True, replace=False).state == "failed"
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    png(tmp_path / "a.png", noise())
    raw = (tmp_path / "a.png").read_bytes()

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    found = sanitise(tmp_path, "a.png", write=True, replace=True)
    assert (found.state, found.error) == ("failed", os.strerror(number))
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.png", raw)]
