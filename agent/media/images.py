"""The metadata of pictures: PNG, JPEG and WebP. Only what is known to affect the picture is kept."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from agent.media.cleaner import BLOCK, Cleaner

IN_MEMORY = 1 << 28
"""Maximum size in bytes of a JPEG, which is searched in memory."""


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
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs acTL fcTL fdAT".split()
)
PNG_LONGEST = {
    b"IHDR": 13, b"PLTE": 768, b"IEND": 0, b"tRNS": 256, b"cHRM": 32, b"gAMA": 4, b"sBIT": 4, b"sRGB": 1, b"cICP": 4,
    b"mDCV": 24, b"cLLI": 8, b"bKGD": 6, b"hIST": 512, b"pHYs": 9, b"acTL": 8, b"fcTL": 26,
}  # fmt: skip
"""Maximum lengths of chunks: what is longer holds something else."""


def png(found: Cleaner) -> None:
    """Clean a PNG. Raises ValueError."""
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
        if found.read(at + 8 + length, 4) != checksum.to_bytes(4, "big") or length > PNG_LONGEST.get(kind, length):
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
_REMOVED = frozenset([*range(0xE0, 0xF7), *range(0xF9, 0xFF)])  # applications, reserved, comments; others are needed
_SEGMENTS = ((0xE1, b"Exif\0", "Exif"), (0xE1, b"http", "XMP"), (0xED, b"Photoshop", "IPTC"), (0xEB, b"JP", "C2PA"))


def jpeg(found: Cleaner) -> None:
    """Clean a JPEG. Raises ValueError."""
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
        elif kind in _REMOVED:
            _segment(found, kind, data[at + 4 : end], at)
        else:
            raise ValueError(f"its segment {kind:X} is unknown")
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


def webp(found: Cleaner) -> None:
    """Clean a WebP. Raises ValueError."""
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
        if length < (kind == b"ANMF") * 16 or length != {b"VP8X": 10, b"ANIM": 6}.get(kind, length):
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
