"""Removes metadata from files: writes clean copies, or replaces the files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agent.media import images, recordings
from agent.media.cleaner import Cleaner, UnknownFormatError
from agent.schema.live import Sanitised

DRAFT = ".sanitise-"
"""Prefix of the temporary files; a killed run leaves one, and the next run for the same file replaces it."""


def examine(file: IO[bytes]) -> Cleaner:
    """Find a file's metadata. Raises UnknownFormatError, ValueError if it is damaged, or OSError."""
    found = Cleaner(file)
    head = os.pread(file.fileno(), 16, 0)
    for matches, clean in (
        (head.startswith(b"\x89PNG\r\n\x1a\n"), images.png),
        (head.startswith(b"\xff\xd8\xff"), images.jpeg),
        (head[:4] == b"RIFF" and head[8:12] == b"WEBP", images.webp),
        (head.startswith(b"fLaC"), recordings.flac),
        (head[4:8] == b"ftyp", recordings.mp4),
        (head.startswith(b"\x1a\x45\xdf\xa3"), recordings.webm),
    ):
        if matches:
            clean(found)
            return found
    raise UnknownFormatError("it is not a PNG, JPEG, WebP, FLAC, MP4 or WebM file")


def sanitise(folder: Path, name: str, *, write: bool, replace: bool) -> Sanitised:
    """Look for a file's metadata; with `write`, write a clean copy, or with `replace` the file itself. Never raises."""
    removed: tuple[str, ...] = ()
    try:
        with _opened(folder / name) as file:
            found = examine(file)
            removed = tuple(found.removed)
            copy = "" if replace else f"{Path(name).stem}.clean{Path(name).suffix}"
            if not removed:
                return Sanitised(name, "clean")
            if copy and os.path.lexists(folder / copy):
                _compare(folder / copy, found)
                return Sanitised(name, "copied", removed, copy)
            if write:
                _write(folder, name, copy or name, found)
            return Sanitised(name, "written" if write else "dirty", removed, copy)
    except UnknownFormatError as error:
        return Sanitised(name, "unknown", error=str(error))
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Sanitised(name, "failed", removed, error=why)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file. Raises ValueError for a link or another kind of file."""
    if stat.S_ISLNK(path.lstat().st_mode):
        raise UnknownFormatError("it is a symbolic link")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UnknownFormatError("it is not a regular file")
        yield file


def _compare(copy: Path, found: Cleaner) -> None:
    """Raise ValueError unless a file is the clean copy."""
    with _opened(copy) as other:
        if any(other.read(len(block)) != block for block in found.content()) or other.read(1):
            raise ValueError(f"{copy.name} exists with other content; move it away")


def _write(folder: Path, name: str, target: str, found: Cleaner) -> None:
    """Write a cleaned file with the original's mode and time, and rename it to `target`: a kill loses nothing."""
    before = found.status
    draft = folder / f"{DRAFT}{hashlib.sha256(os.fsencode(target)).hexdigest()[:16]}"
    with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another run is cleaning it") from None
        if not os.path.samestat(os.fstat(out.fileno()), draft.lstat()):
            raise ValueError("another run has just cleaned it")
        try:
            out.truncate()
            for block in found.content():
                out.write(block)
            out.flush()
            os.fchmod(out.fileno(), before.st_mode & 0o777)
            os.utime(out.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
            if os.geteuid() == 0:
                os.fchown(out.fileno(), before.st_uid, before.st_gid)
            os.fsync(out.fileno())
            now = (folder / name).lstat()
            if not os.path.samestat(now, before) or (now.st_size, now.st_mtime_ns) != (found.size, before.st_mtime_ns):
                raise ValueError("it was changed meanwhile; run the same command again")
            draft.rename(folder / target)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
