"""Debian packages of any platform, downloaded with apt into a folder. Needs no root and installs nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from core import tools
from core.stack import Platform

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from core.shell import Done

ARCHITECTURES = {Platform.LINUX_AARCH64: "arm64", Platform.LINUX_X86_64: "amd64"}
"""Debian's names of the platforms."""


def download(platform: Platform, names: Iterable[str], place: Path) -> Done:
    """Download packages with all their dependencies into `place`/archives; the result has apt's status.

    A name is as apt-get(8) takes it: `libc6`, `libc6=2.36-9`. Apt gets an empty state of its own in `place`: nothing is
    installed there, so it downloads every dependency. The sources are the machine's, or those in
    $HEARTH_DEBIAN_SOURCES, a file in the format of sources.list(5).
    """
    for folder in (place / "archives/partial", place / "lists/partial"):
        folder.mkdir(parents=True)
    (place / "status").touch()
    architecture = ARCHITECTURES[platform]
    options = [f"Dir::State={place}", f"Dir::State::status={place}/status", f"Dir::State::Lists={place}/lists"]
    options += [f"Dir::Cache={place}", f"APT::Architecture={architecture}", f"APT::Architectures={architecture}"]
    options += ["APT::Sandbox::User="]
    if sources := os.environ.get("HEARTH_DEBIAN_SOURCES"):
        options += [f"Dir::Etc::SourceList={os.path.abspath(sources)}", "Dir::Etc::SourceParts=-"]  # noqa: PTH100
    apt = ["apt-get", "-qq", "-y", *(word for each in options for word in ("-o", each))]
    tools.apt(*apt, "update")  # a source without this architecture is not fatal
    return tools.apt(*apt, "install", "--download-only", "--no-install-recommends", *names)
