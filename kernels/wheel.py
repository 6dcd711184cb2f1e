"""Assembles a wheel: metadata, record and archive, the same bytes from the same inputs."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from packaging.metadata import Metadata, RFC822Message

from core.errors import ConfigError
from kernels import inspection, sbom

if TYPE_CHECKING:
    from pathlib import Path

    from kernels.matrix import Build

# The earliest time of a zip archive: wheels contain no build time.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def assemble(build: Build, tree: Path, modules: dict[str, Path], place: Path) -> Path:
    """Write the wheel of `build` into the folder `place` and return its path.

    `tree` is the patched source, `modules` the linked file of each extension module by name.
    """
    recipe = build.recipe
    content: dict[str, bytes] = {}
    root = tree / recipe.root
    for pattern in recipe.files:
        for path in root.glob(pattern):
            name = str(path.relative_to(root))
            if path.is_file() and not any(fnmatch(name, each) for each in recipe.exclude_files):
                content[name] = path.read_bytes()
    for module in build.modules:
        content[build.module_file(module)] = modules[module.name].read_bytes()
    elves = [inspection.Elf(path) for path in modules.values()]
    platform = inspection.platform_tag(elves, build.toolchain.platform)
    info = f"{recipe.file_name}-{build.version}.dist-info"
    for license_file in recipe.license_files:
        content[f"{info}/licenses/{license_file}"] = (tree / license_file).read_bytes()
    content[f"{info}/METADATA"] = metadata(build)
    content[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: hearth\nRoot-Is-Purelib: false\nTag: {build.tag(platform)}\n"
    ).encode()
    content[f"{info}/sboms/hearth.cdx.json"] = sbom.write(build)
    record = io.StringIO()  # CSV: a path may contain a comma
    rows = [(each, _hash(body), len(body)) for each, body in sorted(content.items())]
    csv.writer(record, lineterminator="\n").writerows([*rows, (f"{info}/RECORD", "", "")])
    place.mkdir(parents=True, exist_ok=True)
    wheel = place / build.wheel_name(platform)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, body in [*sorted(content.items()), (f"{info}/RECORD", record.getvalue().encode())]:
            entry = zipfile.ZipInfo(each, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if each.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, body)
    return wheel


def metadata(build: Build) -> bytes:
    """Core metadata 2.4 of a build's wheel. torch is pinned to the stack's: its C++ ABI changes with every release.

    The stable ABI does not, so that such a wheel requires the recipe's range.

    Raises ConfigError where the recipe has a value that installers reject.
    """
    recipe = build.recipe
    message = RFC822Message()
    torch = recipe.torch if recipe.stable_torch else f"=={build.toolchain.stack.torch}"
    fields = [
        ("Metadata-Version", "2.4"),
        ("Name", recipe.name),
        ("Version", build.version),
        ("Summary", recipe.summary),
        ("Home-page", recipe.homepage),
        ("License-Expression", recipe.license),
        *(("License-File", each) for each in recipe.license_files),
        ("Requires-Python", recipe.python),
        *(("Requires-Dist", each) for each in (f"torch{torch}", *recipe.requires)),
    ]
    for name, value in fields:
        if value:
            message[name] = value
    text = message.as_bytes()
    try:
        Metadata.from_email(text, validate=True)
    except ExceptionGroup as group:
        errors = "; ".join(str(each) for each in group.exceptions)
        raise ConfigError(
            "config", f"{recipe.path / 'recipe.toml'}: its wheel could not be installed: {errors}"
        ) from group
    return text


def _hash(body: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest())
    return f"sha256={digest.decode().rstrip('=')}"
