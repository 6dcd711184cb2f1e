"""Workflows inside pictures, videos, sounds, latents and 3D models: plain JSON in a binary file."""

from __future__ import annotations

import json
import re
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXT = 64_000_000
"""Maximum bytes of a workflow. ComfyUI's largest template has 0.5 MB; a picture inside a node may add some."""

_START = re.compile(rb'\{\s*"[^"\\\x00-\x1f\x7f-\xff]{1,200}"\s*:\s*["\[{\d]')


def objects(raw: Any) -> Iterator[Any]:
    """The JSON objects in a binary file.

    PNG, WebP, SVG, EXR, MP4, WebM, FLAC, MP3, Opus, glTF and safetensors keep a workflow as plain JSON; programs that
    edit a PNG may compress it. Nothing else of the file, which may be hostile, is decoded.
    """
    if raw[:4] == b"OggS":
        raw = b"".join(_pages(raw))
    for part in (raw, *(_compressed(raw) if raw[:4] == b"\x89PNG" else ())):
        yield from _objects(part)


def _objects(raw: Any) -> Iterator[Any]:
    at, left, decoder = 0, 10 * TEXT, json.JSONDecoder()  # `left`: what may still be decoded in vain
    while left > 0 and (match := _START.search(raw, at)):
        at = match.start() + 1
        for size in (1 << 16, 1 << 20, TEXT):
            text = raw[match.start() : match.start() + size].decode(errors="replace")
            try:
                value, length = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                left -= len(text)
                if match.start() + size >= len(raw) or left < 0:
                    break
            else:
                at += len(text[:length].encode()) - 1
                yield value
                break


def _pages(raw: Any) -> Iterator[bytes]:
    """The contents of an Ogg file (RFC 3533): a page has at most 65 kB, and a header of its own."""
    at = 0
    while raw[at : at + 4] == b"OggS" and at < TEXT:
        sizes = raw[at + 27 : at + 27 + raw[at + 26]]
        at += 27 + len(sizes)
        yield raw[at : at + sum(sizes)]
        at += sum(sizes)


def _compressed(raw: Any) -> Iterator[bytes]:
    """The compressed texts of a PNG: of at most TEXT bytes together."""
    at, left = 8, TEXT
    while left > 0 and len(head := raw[at : at + 8]) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        _, _, rest = raw[at + 8 : at + 8 + min(size, TEXT)].partition(b"\0") if kind in _TEXTS else (b"", b"", b"")
        at += 12 + size
        packed = rest[1:] if kind == b"zTXt" else b""
        if kind == b"iTXt" and rest[:1] == b"\1":
            packed = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated name
        if packed:
            with suppress(zlib.error):
                text = zlib.decompressobj().decompress(packed, left)
                left -= len(text)
                yield text


_TEXTS = (b"zTXt", b"iTXt")
