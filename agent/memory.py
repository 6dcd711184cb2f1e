"""The machine's memory."""

from __future__ import annotations

from pathlib import Path

from agent.files import read_text


def meminfo() -> dict[str, int]:
    """The machine's memory in bytes, as /proc/meminfo names it."""
    lines = (line.split() for line in read_text(Path("/proc/meminfo")).splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
