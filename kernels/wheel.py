"""Assembles a wheel: metadata, record and archive, the same bytes from the same inputs."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from email.message import EmailMessage
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kernels.matrix import Build

# The earliest time a zip archive can hold; wheels carry no time of their build.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def assemble(build: Build, tree: Path, modules: dict[str, Path], place: Path) -> Path:
    """Write the wheel of `build` into the folder `place` and return its path.

    `tree` is the patched source, `modules` the linked file of each extension module by name.
    """
    recipe, chain = build.recipe, build.toolchain
    tag = chain.python.replace(".", "")
    suffix = f".cpython-{tag}-{chain.platform.cpu}-linux-gnu.so"
    content: dict[str, bytes] = {}
    for pattern in recipe.files:
        for path in tree.glob(pattern):
            name = str(path.relative_to(tree))
            if path.is_file() and not any(fnmatch(name, each) for each in recipe.exclude_files):
                content[name] = path.read_bytes()
    for module in build.modules:
        content[module.path + suffix] = modules[module.name].read_bytes()
    info = f"{recipe.file_name}-{build.version}.dist-info"
    for license_file in recipe.license_files:
        content[f"{info}/licenses/{license_file}"] = (tree / license_file).read_bytes()
    content[f"{info}/METADATA"] = _metadata(build).encode()
    content[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: hearth\nRoot-Is-Purelib: false\nTag: {build.tag}\n"
    ).encode()
    record = "".join(f"{each},{_hash(body)},{len(body)}\n" for each, body in sorted(content.items()))
    record += f"{info}/RECORD,,\n"
    place.mkdir(parents=True, exist_ok=True)
    wheel = place / build.wheel_name
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, body in [*sorted(content.items()), (f"{info}/RECORD", record.encode())]:
            entry = zipfile.ZipInfo(each, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if each.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, body)
    return wheel


def _metadata(build: Build) -> str:
    """Core metadata 2.4. torch is pinned to the stack's: its C++ ABI changes with every release."""
    recipe = build.recipe
    message = EmailMessage()
    message["Metadata-Version"] = "2.4"
    message["Name"] = recipe.name
    message["Version"] = build.version
    message["Summary"] = recipe.summary
    message["Home-page"] = recipe.homepage
    message["License-Expression"] = recipe.license
    for license_file in recipe.license_files:
        message["License-File"] = license_file
    message["Requires-Python"] = recipe.python
    for requirement in (f"torch=={build.toolchain.stack.torch}", *recipe.requires):
        message["Requires-Dist"] = requirement
    return message.as_string()


def _hash(body: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest())
    return f"sha256={digest.decode().rstrip('=')}"
