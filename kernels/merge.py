"""Merges the objects of one CUDA source that nvcc compiled for one arch each: ninja's rule `merge` runs this file.

    merge.py COMPILER OUTPUT OBJECT...

A module linked from the result has the same bytes as one that nvcc compiled with all -gencode options at once
(tests/kernels/test_archs.py). Fails if the host code of the objects differs.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# Of a fatbin, which holds the device code of one object: magic number, version, the header's size, size of the images.
HEADER = struct.Struct("<IHHQ")
MAGIC = 0xBA55ED50


def images(fatbin: bytes) -> bytes:
    """Return the images of a fatbin; raises ValueError or struct.error for anything else."""
    magic, version, header, size = HEADER.unpack_from(fatbin)
    if (magic, version, header) != (MAGIC, 1, HEADER.size) or fatbin[header + size :].strip(b"\0"):
        raise ValueError("the device code is not one fatbin")
    return fatbin[header : header + size]


def merge(compiler: str, output: str, objects: list[str]) -> None:
    """Write an object with the device code of all; raises ValueError, and the errors of objcopy and files."""
    asked = subprocess.run([compiler, "-print-prog-name=objcopy"], check=True, capture_output=True, text=True)
    content = b""
    hosts: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        code, host = Path(folder, "code"), Path(folder, "host")

        def objcopy(option: str, source: str, target: str | Path) -> None:
            words = [asked.stdout.strip(), f"--{option}-section", f".nv_fatbin={code}", source, target]
            subprocess.run(words, check=True)

        for each in objects:
            objcopy("dump", each, host)
            content += images(code.read_bytes())
            code.write_bytes(b"")
            objcopy("update", each, host)
            # names that nothing refers to, such as those of CUB's constants, which contain the arch
            subprocess.run([asked.stdout.strip(), "--strip-unneeded", host], check=True)
            hosts.add(host.read_bytes())
        if len(hosts) > 1:
            raise ValueError("the host code depends on the arch")
        code.write_bytes(HEADER.pack(MAGIC, 1, HEADER.size, len(content)) + content)
        objcopy("update", objects[0], output)


if __name__ == "__main__":
    status = 0
    try:
        merge(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (ValueError, struct.error, OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"{sys.argv[2]}: {error}; compiling it for all archs at once\n")
        status = 1
    sys.exit(status)
