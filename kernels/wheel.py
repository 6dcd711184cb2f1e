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
from kernels.elf import Elf

if TYPE_CHECKING:
    from pathlib import Path

    from kernels.matrix import Build

# The earliest time of a zip archive: wheels contain no build time.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def assemble(build: Build, tree: Path, modules: dict[str, Path], place: Path) -> Path:
    """Write the wheel of `build` into the folder `place` and return its path.

    `tree` is the patched source, `modules` the linked file of each extension module by name.
    """
    content = source_files(build, tree)
    for module in build.modules:
        content[build.module_file(module)] = modules[module.name].read_bytes()
    elves = [Elf(path) for path in modules.values()]
    platform = inspection.platform_tag(elves, build.toolchain.platform)
    info = _info(build)
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


def _info(build: Build) -> str:
    return f"{build.recipe.file_name}-{build.version}.dist-info"


def source_files(build: Build, tree: Path) -> dict[str, bytes]:
    """The files of the wheel that are in the source, by their path in the wheel: packages and licences.

    Raises ConfigError for a licence that does not exist, a pattern that matches no file, and a file in the place of one
    that Hearth writes.
    """
    recipe, root = build.recipe, tree / build.recipe.root
    content: dict[str, bytes] = {}
    wrong = [f"license_files: {each}" for each in recipe.license_files if not (tree / each).is_file()]
    for pattern in recipe.files:
        paths = [path for path in root.glob(pattern) if path.is_file()]
        wrong += [] if paths else [f"files: {pattern}"]
        names = {str(path.relative_to(root)): path for path in paths}
        kept = {name for name in names if not any(fnmatch(name, each) for each in recipe.exclude_files)}
        content |= {name: names[name].read_bytes() for name in kept}
    if wrong:
        what = f"{recipe.path / 'recipe.toml'}: no file of the source matches {', '.join(wrong)}"
        raise ConfigError("config", what, cause=f"looked in {root}")
    own = {build.module_file(module) for module in build.modules}
    if taken := sorted(name for name in content if name in own or name.partition("/")[0].endswith(".dist-info")):
        what = f"{recipe.path / 'recipe.toml'}: `files` includes {', '.join(taken)}, which the build writes"
        raise ConfigError("config", what, hint="list it in exclude_files")
    licences = {f"{_info(build)}/licenses/{each}": (tree / each).read_bytes() for each in recipe.license_files}
    return content | licences


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
