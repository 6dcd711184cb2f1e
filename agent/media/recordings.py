"""The metadata of sounds and videos: FLAC, MP4, WebM. Only what is known to affect them is kept."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from agent.media.cleaner import BLOCK, ZEROS, Cleaner, UnknownFormatError

# --- FLAC (RFC 9639) -----------------------------------------------------------------------------------------------

_FLAC_NAMES = {1: "padding", 2: "application", 4: "tags", 5: "cue sheet", 6: "picture"}


def flac(found: Cleaner) -> None:
    """Clean a FLAC. Raises ValueError."""
    at, head, kept = 4, 0, list[tuple[int, int, int]]()
    while not head & 0x80:
        head, *size = found.read(at, 4)
        kind, length = head & 0x7F, int.from_bytes(bytes(size), "big")
        if at == 4 and (kind, length) != (0, 34):
            raise ValueError("its first block is not STREAMINFO")
        empty = kind == 1 and found.blank(at + 4, length)
        if kind in (0, 3) and length % 18 != (16 if kind == 0 else 0):
            raise ValueError("its seek table is damaged")
        if kind in (0, 3) or empty:  # STREAMINFO, SEEKTABLE
            kept.append((kind, at, length))
        else:
            found.drop(_FLAC_NAMES.get(kind, f"block {kind}"))
        at += 4 + length
    end = found.size - 128 if found.size >= at + 128 and found.read(found.size - 128, 3) == b"TAG" else found.size
    if found.read(at, 2) not in (b"\xff\xf8", b"\xff\xf9"):
        raise ValueError("its sound does not begin where it should")
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
COPY = "may hold metadata; copy only video and sound: ffmpeg -map 0:v -map 0:a"
_UUIDS = {"d8fec3d61b0e483c92975828877ec481": "C2PA", "be7acfcb97a942e89c71999491e3afac": "XMP"}
_STILLS = frozenset(b"mif1 msf1 heic heix hevc hevx avif avis crx".split())


def mp4(found: Cleaner) -> None:
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
        elif kind in (b"cmov", b"rmra"):
            raise ValueError(f"its box {kind.decode()} is not supported")
        elif kind in _BOXES:
            _box(found, kind, at, head, size, parent)
        elif kind in (b"free", b"skip", b"wide") and found.blank(at + head, size - head):
            found.keep(at, size)
        else:
            named = found.read(at + head, 16).hex() if kind == b"uuid" and size >= head + 16 else ""
            found.drop(_UUIDS.get(named) or {b"udta": "tags", b"meta": "tags"}.get(kind, kind.decode("latin-1")))
            found.pieces += [found.read(at, 4) + b"free" + found.read(at + 8, head - 8), (ZEROS, size - head)]
        at += size


def _box(found: Cleaner, kind: bytes, at: int, head: int, size: int, parent: bytes) -> None:
    """Keep a box without its times or its handler's name."""
    blank = (size, 0)
    if kind in (b"mvhd", b"tkhd", b"mdhd"):
        blank = (head + 4, 16 if found.read(at + head, 1)[0] else 8)
    elif kind == b"dref":
        _check_references(found, at + head, at + size)
    elif kind == b"hdlr":
        if (track := found.read(at + head + 8, 4)) not in _TRACKS and parent == b"mdia":
            name = track.decode("latin-1")
            raise ValueError(f"its track of kind {name} {COPY}")
        blank = (head + 24, max(0, size - head - 24))
    start, length = blank
    if not found.blank(at + start, length):
        found.drop("times" if kind != b"hdlr" else "handler names")
    found.keep(at, start)
    found.pieces.append((ZEROS, length))
    found.keep(at + start + length, size - start - length)


def _check_references(found: Cleaner, at: int, end: int) -> None:
    """Raise ValueError if a track refers to another file: the box names its path or address."""
    for entry in range(at + 8, end, 12):
        if found.read(entry, 4) != b"\0\0\0\x0c" or not found.read(entry + 11, 1)[0] & 1:
            raise ValueError("it refers to another file")


# --- WebM and Matroska (RFC 9559) ----------------------------------------------------------------------------------

_HEADER, _SEGMENT, _INFO, _TRACKS_LIST, _TRACK, _VOID = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xEC
_SEEK_HEAD, _CUES = 0x114D9B74, 0x1C53BB6B
_MASTER_IN = {_HEADER: 0, _SEGMENT: 0, _TRACK: _TRACKS_LIST}
_MASTER_IN |= dict.fromkeys((_INFO, _TRACKS_LIST, _SEEK_HEAD, _CUES), _SEGMENT)
_KEPT_IN = {
    _HEADER: {0x4286, 0x42F7, 0x42F2, 0x42F3, 0x4282, 0x4287, 0x4285},  # versions, limits, type
    _SEGMENT: {0x1F43B675},  # clusters
    _SEEK_HEAD: {0x4DBB},
    _CUES: {0xBB},
    _INFO: {0x2AD7B1, 0x4489},  # scale of times, duration
    _TRACKS_LIST: set[int](),
}
_NAMES = {0x4D80: "programs", 0x5741: "programs"}  # mandatory: emptied
_DROPPED = {0x1254C367: "tags", 0x1941A469: "attachments", 0x1043A770: "chapters", 0x7BA9: "tags", 0x4461: "times"}
_NOT_IN_TRACK = {0x536E, 0x258688, 0x3A9697, 0x3B4040, 0x26B240, 0x7446, 0xBF, _VOID}
"""Names and addresses of a track and its codec, attachments, checksums."""


def webm(found: Cleaner) -> None:
    """Overwrite metadata with void elements of the same size, so that offsets stay valid."""
    _elements(found, 0, found.size, 0)


def _elements(found: Cleaner, at: int, end: int, parent: int) -> None:
    while at < end:
        name, id_length = _number(found, at)
        size, size_length = _number(found, at + id_length)
        head = id_length + size_length
        size &= (1 << 7 * size_length) - 1
        if size == (1 << 7 * size_length) - 1:
            raise ValueError("its length is unknown: it was streamed")
        if at + head + size > end:
            raise ValueError("it is truncated")
        kept = name in _KEPT_IN.get(parent, ()) or (parent == _TRACK and name not in _NOT_IN_TRACK)
        if parent == _TRACK and name == 0x83 and found.read(at + head, 1) == b"\x21":
            raise ValueError(f"its track of metadata {COPY}")
        if _MASTER_IN.get(name) == parent:
            found.keep(at, head)
            _elements(found, at + head, at + head + size, name)
        elif kept or (name in (_VOID, *_NAMES) and found.blank(at + head, size)):
            found.keep(at, head + size)
        elif name in _NAMES:
            found.drop("programs")
            found.keep(at, head)
            found.pieces.append((ZEROS, size))
        else:
            found.drop(_DROPPED.get(name, "track names" if parent == _TRACK else f"element {name:X}"))
            short = head + size <= 128
            found.pieces.append(bytes([_VOID, 0x80 | head + size - 2]) if short else _long_void(head + size))
            found.pieces.append((ZEROS, head + size - (2 if short else 9)))
        at += head + size


def _long_void(length: int) -> bytes:
    return bytes([_VOID, 1]) + (length - 9).to_bytes(7, "big")


def _number(found: Cleaner, at: int) -> tuple[int, int]:
    """Return a number of variable length, with its marker, and its length."""
    length = 9 - found.read(at, 1)[0].bit_length()
    if length > 8:
        raise ValueError("an element is damaged")
    return int.from_bytes(found.read(at, length), "big"), length
