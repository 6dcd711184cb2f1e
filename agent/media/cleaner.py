"""What remains of a file without its metadata, as ranges of the original."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO

BLOCK = 1 << 20
ITEMS = 1_000_000
"""Maximum number of chunks, segments or boxes of a file: only a hostile one has more."""

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
