"""Git repositories to fetch from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def repository(place: Path, files: dict[str, str], *more: tuple[str, ...]) -> str:
    """Create a repository with one commit of these files; returns the commit."""
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    git = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    served = [("config", "uploadpack.allowAnySHA1InWant", "true"), ("config", "uploadpack.allowFilter", "true")]
    for words in (("init", "--quiet"), *served, *more, ("add", "-A"), ("commit", "--quiet", "-m", "one")):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
