"""Finds the metadata of PNG, JPEG, WebP, FLAC and MP4 files, and what remains without it.

Nothing is decoded: a cleaned file consists of ranges of the original. Only what is known to affect the picture or sound
is kept, such as colour profiles and the orientation. Why no library: docs/decisions/0018-metadata-without-decoding.md
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

BLOCK = 1 << 20
ITEMS = 1_000_000
"""Maximum number of chunks, segments or boxes of a file: only a hostile one has more."""

IN_MEMORY = 1 << 28
"""Maximum size in bytes of a JPEG, which is searched in memory."""

ZEROS = -1


class UnknownFormatError(ValueError):
    """The file is none of the supported formats."""


class Cleaner:
    """Collects what a cleaned file consists of. Raises ValueError if the file is damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.status = os.fstat(file.fileno())
        self.size = self.status.st_size
        self.pieces: list[tuple[int, int] | bytes] = []  # a range (offset or ZEROS, length), or new bytes
        self.removed: dict[str, None] = {}  # what is removed, in order
        self._items = 0

    def read(self, at: int, length: int) -> bytes:
        """Return exactly `length` bytes; each call counts as an item."""
        self._items += 1
        if self._items > ITEMS:
            raise ValueError("it has too many parts")
        data = os.pread(self._file.fileno(), length, at)
        if len(data) < length:
            raise ValueError("it is truncated")
        return data

    def blocks(self, at: int, length: int) -> Iterator[bytes]:
        """Yield a range block by block."""
        for start in range(at, at + length, BLOCK):
            yield self.read(start, min(BLOCK, at + length - start))

    def blank(self, at: int, length: int) -> bool:
        """Return whether a range contains only zeros."""
        return not any(block.strip(b"\0") for block in self.blocks(at, length))

    def keep(self, at: int, length: int) -> None:
        """Keep a range of the original."""
        last: tuple[int, int] | bytes = self.pieces[-1] if self.pieces else b""
        if isinstance(last, tuple) and last[0] >= 0 and sum(last) == at:
            self.pieces[-1] = (last[0], last[1] + length)
        else:
            self.pieces.append((at, length))

    def drop(self, what: str) -> None:
        """Note what is removed."""
        self.removed.setdefault(what)

    def drop_rest(self, at: int) -> None:
        """Remove what follows the end of the format's data."""
        if at < self.size:
            self.drop("data after the end")

    def content(self) -> Iterator[bytes]:
        """Yield the cleaned file."""
        self._items = 0
        for piece in self.pieces:
            if isinstance(piece, bytes):
                yield piece
            elif piece[0] == ZEROS:
                yield from (bytes(min(BLOCK, piece[1] - done)) for done in range(0, piece[1], BLOCK))
            else:
                yield from self.blocks(*piece)


def examine(file: IO[bytes]) -> Cleaner:
    """Find a file's metadata. Raises UnknownFormatError, ValueError if it is damaged, or OSError."""
    found = Cleaner(file)
    head = os.pread(file.fileno(), 16, 0)
    for matches, clean in (
        (head.startswith(b"\x89PNG\r\n\x1a\n"), _png),
        (head.startswith(b"\xff\xd8\xff"), _jpeg),
        (head[:4] == b"RIFF" and head[8:12] == b"WEBP", _webp),
        (head.startswith(b"fLaC"), _flac),
        (head[4:8] == b"ftyp", _mp4),
    ):
        if matches:
            clean(found)
            return found
    raise UnknownFormatError("it is not a PNG, JPEG, WebP, FLAC or MP4 file")


def upright(exif: bytes) -> bytes:
    """Return Exif data with only the orientation; empty if that is normal or missing."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if not order:
        return b""
    with suppress(struct.error):
        (place,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == 0x112 and 2 <= value <= 8:
                return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, value, 0, 0)
    return b""


# --- PNG (w3.org/TR/png-3) -----------------------------------------------------------------------------------------

PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs sPLT acTL fcTL fdAT".split()
)


def _png(found: Cleaner) -> None:
    found.keep(0, 8)
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", found.read(at, 8))
        name = kind.decode("latin-1")
        if at == 8 and kind != b"IHDR":
            raise ValueError("its first chunk is not IHDR")
        checksum = 0
        for block in found.blocks(at + 4, 4 + length):
            checksum = zlib.crc32(block, checksum)
        if found.read(at + 8 + length, 4) != checksum.to_bytes(4, "big"):
            raise ValueError(f"its chunk {name} is damaged")
        if kind in PNG_KEPT:
            found.keep(at, length + 12)
        elif not kind[0] & 0x20:
            raise ValueError(f"its critical chunk {name} is unknown")
        else:
            _drop_chunk(found, kind, at + 8, length)
        at += length + 12
    found.drop_rest(at)


def _drop_chunk(found: Cleaner, kind: bytes, at: int, length: int) -> None:
    """Remove an ancillary chunk of a PNG, except the orientation."""
    if kind == b"eXIf" and (small := upright(raw := found.read(at, min(length, BLOCK)))):
        body = kind + small
        found.pieces.append(len(small).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big"))
        if raw == small:
            return
    name = kind.decode("latin-1")
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        name = f"text {found.read(at, min(length, 79)).partition(bytes(1))[0].decode('latin-1')}"
    found.drop({"eXIf": "Exif", "tIME": "time", "caBX": "C2PA"}.get(name, name))


# --- JPEG (ITU-T T.81; JFIF 1.02) ----------------------------------------------------------------------------------

# The next marker in entropy-coded data: neither a stuffed byte nor a restart marker.
_MARKER = re.compile(rb"\xff(?=[^\x00\xff\xd0-\xd7])", re.DOTALL)
_FRAME = frozenset([*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD])  # frames, scans and their tables
_SEGMENTS = ((0xE1, b"Exif\0", "Exif"), (0xE1, b"http", "XMP"), (0xED, b"Photoshop", "IPTC"), (0xEB, b"JP", "C2PA"))


def _jpeg(found: Cleaner) -> None:
    if found.size > IN_MEMORY:
        raise ValueError("it is too large for a JPEG")
    data = found.read(0, found.size)
    found.keep(0, 2)
    at = 2
    while data[at : at + 2] != b"\xff\xd9":
        if len(data) < at + 4:
            raise ValueError("it is truncated")
        marker, kind, length = struct.unpack_from(">BBH", data, at)
        end = at + 2 + length
        if marker != 0xFF or (length < 2 and kind != 0xFF):
            raise ValueError("it is damaged: a marker is missing")
        if kind == 0xFF:  # fill byte
            at += 1
            continue
        if kind == 0xDA:  # a scan
            following = _MARKER.search(data, end)
            end = following.start() if following else found.size + 1
        if end > found.size:
            raise ValueError("it is truncated")
        if kind in _FRAME:
            found.keep(at, end - at)
        else:
            _segment(found, kind, data[at + 4 : end], at)
        at = end
    found.keep(at, 2)
    found.drop_rest(at + 2)


def _segment(found: Cleaner, kind: int, body: bytes, at: int) -> None:
    """Keep an application segment if it affects the picture: JFIF, colour profile, Adobe's transform, orientation."""
    small = b""
    if kind == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
        small = body
    elif kind == 0xEE and body.startswith(b"Adobe"):
        small = body[:12]
    elif kind == 0xE0 and body.startswith(b"JFIF\0"):
        small = body[:12] + bytes(2)  # without a thumbnail
    elif kind == 0xE1 and body.startswith(b"Exif\0") and (exif := upright(body[6:])):
        small = b"Exif\0\0" + exif
    if small == body:
        found.keep(at, len(body) + 4)
        return
    if small:
        found.pieces.append(struct.pack(">BBH", 0xFF, kind, len(small) + 2) + small)
    names = (name for each, start, name in _SEGMENTS if each == kind and body.startswith(start))
    found.drop("comment" if kind == 0xFE else next(names, "thumbnail" if small else f"segment {kind:X}"))


# --- WebP (RFC 9649) -----------------------------------------------------------------------------------------------

_EXIF, _XMP = 0x08, 0x04  # flags of VP8X


def _webp(found: Cleaner) -> None:
    end = 8 + int.from_bytes(found.read(4, 4), "little")
    if end > found.size:
        raise ValueError("it is truncated")
    found.pieces.append(b"")  # the header; its size follows
    flags, kinds = -1, set[bytes]()
    for kind, at, length in _chunks(found, 12, end):
        kinds.add(kind)
        if kind == b"VP8X":
            flags = len(found.pieces)
            head = found.read(at, 18)
            found.pieces.append(head[:8] + bytes([head[8] & ~(_EXIF | _XMP)]) + head[9:])
        elif kind == b"ANMF":
            _frame(found, at, length)
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ICCP"):
            found.keep(at, 8 + length)
            _pad(found, length)
        elif kind == b"EXIF":
            raw = found.read(at + 8, min(length, BLOCK)).removeprefix(b"Exif\0\0")
            if (small := upright(raw)) and flags > 0 and isinstance(old := found.pieces[flags], bytes):
                found.pieces[flags] = old[:8] + bytes([old[8] | _EXIF]) + old[9:]
                found.pieces.append(b"EXIF" + struct.pack("<I", len(small)) + small)
            if raw != small:
                found.drop("Exif")
        else:
            found.drop({b"XMP ": "XMP", b"C2PA": "C2PA"}.get(kind, kind.decode("latin-1")))
    if not kinds & {b"VP8 ", b"VP8L", b"ANMF"}:
        raise ValueError("it has no picture")
    size = sum(len(each) if isinstance(each, bytes) else each[1] for each in found.pieces)
    found.pieces[0] = b"RIFF" + struct.pack("<I", size + 4) + b"WEBP"
    found.drop_rest(end)


def _chunks(found: Cleaner, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, offset and length of each chunk of a WebP."""
    while at < end:
        kind, length = struct.unpack("<4sI", found.read(at, 8))
        if at + 8 + length > end:
            raise ValueError("it is truncated")
        if length < (kind == b"ANMF") * 16 or (length != 10 and kind == b"VP8X"):
            raise ValueError(f"its chunk {kind.decode('latin-1')} is damaged")
        yield kind, at, length
        at += 8 + length + length % 2


def _pad(found: Cleaner, length: int) -> None:
    if length % 2:
        found.pieces.append(b"\0")


def _frame(found: Cleaner, at: int, length: int) -> None:
    """Keep a frame of an animation, without unknown chunks."""
    first = len(found.pieces)
    found.pieces.append(b"")
    found.keep(at + 8, 16)
    for kind, place, size in _chunks(found, at + 24, at + 8 + length):
        if kind in (b"VP8 ", b"VP8L", b"ALPH"):
            found.keep(place, 8 + size)
            _pad(found, size)
        else:
            found.drop(f"{kind.decode('latin-1')} of a frame")
    inner = sum(len(each) if isinstance(each, bytes) else each[1] for each in found.pieces[first:])
    found.pieces[first] = b"ANMF" + struct.pack("<I", inner)


# --- FLAC (RFC 9639) -----------------------------------------------------------------------------------------------

_FLAC_NAMES = {1: "padding", 2: "application", 4: "tags", 5: "cue sheet", 6: "picture"}


def _flac(found: Cleaner) -> None:
    at, head, kept = 4, 0, list[tuple[int, int, int]]()
    while not head & 0x80:
        head, *size = found.read(at, 4)
        kind, length = head & 0x7F, int.from_bytes(bytes(size), "big")
        if at == 4 and (kind, length) != (0, 34):
            raise ValueError("its first block is not STREAMINFO")
        empty = kind == 1 and found.blank(at + 4, length)
        if kind in (0, 3) or empty:  # STREAMINFO, SEEKTABLE
            kept.append((kind, at, length))
        else:
            found.drop(_FLAC_NAMES.get(kind, f"block {kind}"))
        at += 4 + length
    end = found.size - 128 if found.size >= at + 128 and found.read(found.size - 128, 3) == b"TAG" else found.size
    _check_last_frame(found, at, end)
    found.keep(0, 4)
    for kind, place, length in kept:
        found.pieces.append(bytes([kind | 0x80 * ((kind, place, length) == kept[-1])]))
        found.keep(place + 1, 3 + length)
    found.keep(at, end - at)
    if end < found.size:
        found.drop("ID3")


def _check_last_frame(found: Cleaner, at: int, end: int) -> None:
    """Raise ValueError unless the file ends with a whole frame: its CRC-16, which ends it, makes the sum 0."""
    longest = min(int.from_bytes(found.read(15, 3), "big") or BLOCK, BLOCK)
    data = found.read(max(at, end - longest), min(longest, end - at))
    starts = [each.start() for each in re.finditer(rb"\xff[\xf8\xf9]", data)]
    table = list(range(0, 1 << 16, 1 << 8))
    for _ in range(8):
        table = [(crc << 1 ^ 0x8005 * (crc >> 15)) & 0xFFFF for crc in table]
    for start in starts[:-33:-1]:  # two bytes that only look like a start are rare
        crc = 0
        for byte in data[start:]:
            crc = (crc << 8 & 0xFF00) ^ table[crc >> 8 ^ byte]
        if not crc:
            return
    raise ValueError("it is truncated")


# --- MP4 (ISO/IEC 14496-12) ----------------------------------------------------------------------------------------

_CONTAINERS = frozenset(b"moov trak edts mdia minf dinf stbl mvex moof traf mfra".split())
_BOXES = _CONTAINERS | frozenset(
    b"ftyp styp pdin mdat mvhd tkhd tref elst mdhd hdlr elng vmhd smhd hmhd nmhd sthd gmhd dref stsd stts ctts cslg "
    b"stss stsh stdp stsc stsz stz2 stco co64 padb sdtp sbgp sgpd subs saiz saio mehd trex leva trep mfhd tfhd tfdt "
    b"trun tfra mfro sidx ssix tapt load trgr iods senc pssh".split()
)
_TRACKS = (b"vide", b"soun", b"text", b"sbtl", b"subt", b"clcp")
_STILLS = frozenset(b"mif1 msf1 heic heix hevc hevx avif avis crx".split())


def _mp4(found: Cleaner) -> None:
    """Overwrite metadata with empty boxes of the same size, so that offsets of samples stay valid."""
    length = int.from_bytes(found.read(0, 4), "big")
    brands = found.read(8, max(0, min(length, 4096) - 8))
    if {brands[at : at + 4].strip() for at in range(0, len(brands), 4) if at != 4} & _STILLS:
        raise UnknownFormatError("it is a HEIF or AVIF picture, which is not supported")
    if not {b"moov", b"moof"} & set(_boxes(found, 0, found.size, b"", 0)):
        raise ValueError("it is truncated: it has no box moov")


def _boxes(found: Cleaner, at: int, end: int, parent: bytes, depth: int) -> Iterator[bytes]:
    """Clean the boxes of a range; yield their kinds."""
    if depth > 10:
        raise ValueError("its boxes are nested too deeply")
    while at < end:
        size, kind = struct.unpack(">I4s", found.read(at, 8))
        head = 16 if size == 1 else 8
        if size == 1:
            size = int.from_bytes(found.read(at + 8, 8), "big")
        elif not size and not parent:
            size = end - at
        if size < head or at + size > end:
            raise ValueError("it is truncated" if not parent else f"its box {kind.decode('latin-1')} is damaged")
        yield kind
        if kind in _CONTAINERS:
            found.keep(at, head)
            list(_boxes(found, at + head, at + size, kind, depth + 1))
        elif kind in _BOXES:
            _box(found, kind, at, head, size, parent)
        elif kind in (b"free", b"skip", b"wide") and found.blank(at + head, size - head):
            found.keep(at, size)
        else:
            found.drop({b"udta": "tags", b"meta": "tags"}.get(kind, kind.decode("latin-1")))
            found.pieces += [found.read(at, 4) + b"free" + found.read(at + 8, head - 8), (ZEROS, size - head)]
        at += size


def _box(found: Cleaner, kind: bytes, at: int, head: int, size: int, parent: bytes) -> None:
    """Keep a box without its times or its handler's name."""
    blank = (size, 0)
    if kind in (b"mvhd", b"tkhd", b"mdhd"):
        blank = (head + 4, 16 if found.read(at + head, 1)[0] else 8)
    elif kind == b"hdlr":
        if (track := found.read(at + head + 8, 4)) not in _TRACKS and parent == b"mdia":
            name = track.decode("latin-1")
            raise ValueError(
                f"its track of kind {name} may hold metadata; copy only video and sound: ffmpeg -map 0:v -map 0:a"
            )
        blank = (head + 24, max(0, size - head - 24))
    start, length = blank
    if not found.blank(at + start, length):
        found.drop("times" if kind != b"hdlr" else "handler names")
    found.keep(at, start)
    found.pieces.append((ZEROS, length))
    found.keep(at + start + length, size - start - length)
