"""Text where nobody expects it in a file: it is removed, or the file is reported as one that cannot be cleaned."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from agent.sanitise import sanitise
from tests.unit.test_media import HEADER, SECRET, box, element, flac, noise, samples, video, webm


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(path: Path, old: bytes, new: bytes) -> None:
    noise().save(path, format="PNG", dpi=(72, 72))
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def inserted(path: Path, save: Callable[[Path], object], at: int, more: bytes) -> None:
    save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + more + raw[at:])


def segment(kind: int) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, 2 + len(SECRET)) + SECRET


def flac_with(path: Path, seek_table: bytes = b"", before_sound: bytes = b"") -> None:
    flac(path)
    raw, at = path.read_bytes(), 42
    while not raw[at] & 0x80:
        at += 4 + int.from_bytes(raw[at + 1 : at + 4], "big")
    at += 4 + int.from_bytes(raw[at + 1 : at + 4], "big")
    table = b"\3" + len(seek_table).to_bytes(3, "big") + seek_table if seek_table else b""
    path.write_bytes(raw[:42] + table + raw[42:at] + before_sound + raw[at:])


def external(path: Path) -> None:
    """A track whose samples are in another file, as older editors wrote it."""
    video(path)
    raw = path.read_bytes()
    own = box(b"url ", b"\0\0\0\1")
    assert own in raw
    path.write_bytes(raw.replace(own, box(b"url ", b"\0\0\0\0" + SECRET)))


REFUSED: dict[str, Callable[[Path], object]] = {
    "end.png": lambda path: png(path, chunk(b"IEND", b""), chunk(b"IEND", SECRET)),
    "resolution.png": lambda path: inserted(path, lambda to: noise().save(to), 33, chunk(b"pHYs", bytes(9) + SECRET)),
    "hierarchical.jpg": lambda path: inserted(path, lambda to: noise().save(to), 2, segment(0xDE)),
    "lossless.jpg": lambda path: inserted(path, lambda to: noise().save(to), 2, segment(0xF7)),
    "seek.flac": lambda path: flac_with(path, seek_table=SECRET),
    "gap.flac": lambda path: flac_with(path, before_sound=SECRET),
    "external.mov": external,
    "compressed.mov": lambda path: path.write_bytes(
        box(b"ftyp", b"qt  \0\0\0\0") + box(b"moov", box(b"cmov", SECRET)) + box(b"mdat", b"x")
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_cleaned_is_never_called_clean(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    REFUSED[name](path)
    raw = path.read_bytes()
    assert SECRET in raw
    found = sanitise(tmp_path, name, write=True, replace=True)
    assert (found.state, bool(found.error)) == ("failed", True)
    assert path.read_bytes() == raw


def test_a_suggested_palette_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise().save(path)
    clean = path.read_bytes()
    path.write_bytes(clean[:33] + chunk(b"sPLT", SECRET + b"\0\x08") + clean[33:])
    assert sanitise(tmp_path, "a.png", write=True, replace=True).removed == ("sPLT",)
    assert path.read_bytes() == clean


VOID = 0xEC


@pytest.mark.parametrize("name", [VOID, 0x258688, 0x3A9697, 0x3B4040, 0x26B240, 0x536E])
def test_names_of_a_codec_and_what_an_editor_left_in_a_track_are_removed(tmp_path: Path, name: int) -> None:
    track = element(0x1654AE6B, element(0xAE, element(0xD7, b"\1") + element(name, SECRET)))
    check_emptied(tmp_path, HEADER + element(0x18538067, track + element(0x1F43B675, b"cluster")))


@pytest.mark.parametrize("parent", [0x114D9B74, 0x1C53BB6B])
def test_what_an_editor_left_in_an_index_is_removed(tmp_path: Path, parent: int) -> None:
    check_emptied(tmp_path, HEADER + element(0x18538067, element(parent, element(VOID, SECRET))))


def test_what_is_unknown_in_the_header_is_removed(tmp_path: Path) -> None:
    header = element(0x1A45DFA3, b"\x42\x82\x84webm" + element(VOID, SECRET))
    check_emptied(tmp_path, header + element(0x18538067, b""))


def check_emptied(folder: Path, raw: bytes) -> None:
    (folder / "a.webm").write_bytes(raw)
    assert sanitise(folder, "a.webm", write=True, replace=True).state == "written"
    cleaned = (folder / "a.webm").read_bytes()
    assert (len(cleaned), SECRET in cleaned, b"webm" in cleaned) == (len(raw), False, True)
    assert sanitise(folder, "a.webm", write=True, replace=True).state == "clean"


def test_real_files_are_still_clean(tmp_path: Path) -> None:
    for name, write in {"a.webm": webm, "a.mkv": video, "a.mp4": video, "a.flac": flac}.items():
        write(tmp_path / name)
        before = samples(tmp_path / name)
        assert sanitise(tmp_path, name, write=True, replace=True).state == "written"
        assert samples(tmp_path / name) == before
    Image.new("L", (4, 4)).save(tmp_path / "a.png", dpi=(72, 72))
    assert sanitise(tmp_path, "a.png", write=True, replace=True).state == "clean"
